"""Where a network computes: the device, what the processor can, and how its memory is kept.

device = local_device("auto")
"""

import ctypes
import os
import sys

import torch

from errors import UserError


def chosen(name):
    """The name of the device that `auto` takes here: cuda, mps or cpu; any other as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def local_device(name):
    """The device of this process: `auto` takes cuda, mps or cpu; with several processes each its own GPU.

    UserError where there is no such device. A processor is set to keep its memory.
    """
    name = chosen(name)
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":  # which computes nothing
            raise RuntimeError
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not to be had here; give auto or cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_memory()
    return device


def keep_memory():
    """Have glibc keep what large tensors leave: it would return it to the system and fault it in again at the next.

    Does nothing where the C library is another.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def computes_bf16():
    """Whether this CPU multiplies bf16 numbers natively (AVX-512 BF16 or AMX)."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
