"""The device: choose it, its mixed precision, and copy to it without waiting."""

import contextlib
import functools
import os
import platform

from common import UserError

import torch


def select_device(name="auto", threads=0):
    """torch.device for `name`: auto (cuda, mps or cpu), cpu, cuda, cuda:1, mps. Under torchrun each process has a GPU.

    `threads`: CPU threads, 0 or less for torch's default. UserError if the device is not available.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":  # set_device needs an index
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name} is not available here; use auto or cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    return device


def device_name(device):
    """What the maker calls a device, such as NVIDIA A40."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def amp_dtype(amp, device):
    """The autocast dtype for --amp, or None.

    "auto": bf16 if the device multiplies it natively, else fp16 on CUDA, else none. UserError for fp16 on a CPU.
    """
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 is very slow on a CPU; use auto, bf16 or off")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        amp = "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def autocast(device, dtype):
    """The context of mixed precision in `dtype`; None for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def to_device(tensor, device):
    """Copy a CPU tensor to the device; to a GPU from pinned memory, so that neither waits for the other."""
    if device.type != "cuda":
        return tensor.to(device)
    with contextlib.suppress(RuntimeError):  # without pinned memory left, the copy waits
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@functools.cache
def constant(values, device, dtype=torch.float32):
    """A tensor of a tuple of numbers, copied to the device once."""
    return torch.tensor(values, dtype=dtype, device=device)
