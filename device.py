"""The device: choose it, its precision and threads, run one process per GPU."""

import contextlib
import copy
import functools
import itertools
import math
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from common import IN_GROUP, UserError

import torch
import torch.distributed as dist


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
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"--device {name} is not available here ({why}); use auto or cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    return device


def device_name(device):
    """What the maker calls a device, such as NVIDIA A40."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, TypeError):  # Linux; not every kernel names it
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()


def amp_dtype(amp, device):
    """The autocast dtype for --amp, or None.

    "auto": bf16 if the device multiplies it natively, else fp16 on CUDA, else none. UserError for fp16 on a CPU.
    """
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16, here or in the run resumed, is very slow on a CPU; use auto, bf16 or off")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        amp = "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def choose_speed(args, model, device, size):
    """Set the CPU threads and return the dtype of mixed precision, or None; both replace `auto` in args, for a resume.

    What --threads and --amp leave open is what trains fastest in a second of measurements: beside other work one thread
    can be several times as fast as two, and a CPU that multiplies bf16 may be slower with it.
    """
    dtype = amp_dtype(args.amp, device)
    if device.type != "cpu":
        return dtype
    threads = {args.threads} if args.threads else {1, torch.get_num_threads()}
    choices = list(itertools.product(threads, {dtype, None} if args.amp == "auto" else {dtype}))
    times = dict.fromkeys(choices, math.inf)
    if len(choices) > 1:
        model, images = copy.deepcopy(model), torch.zeros(2, 3, *[min(256, size)] * 2)
        for choice in choices * 3:
            torch.set_num_threads(choice[0])
            begin = time.perf_counter()
            with torch.autocast("cpu", choice[1], enabled=choice[1] is not None):
                loss = model(images, full_size=False).float().mean()
            loss.backward()
            times[choice] = min(times[choice], time.perf_counter() - begin)
    # float32 needs twice the memory of bf16: only for a real gain.
    args.threads, dtype = min(choices, key=lambda choice: times[choice] * (1 if choice[1] else 1.2))
    args.amp = "bf16" if dtype else "off"
    torch.set_num_threads(args.threads)
    return dtype


@functools.cache
def constant(values, device, dtype=torch.float32):
    """A tensor of a tuple of numbers, copied to the device once."""
    return torch.tensor(values, dtype=dtype, device=device)


def start_processes(count, device="auto"):
    """Run this command `count` > 1 times, each on a GPU, and exit as they do. UserError without enough GPUs.

    Returns at once for `count` 1, and in these processes.
    """
    if count <= 1 or IN_GROUP:
        return
    if device not in ("auto", "cuda"):
        raise UserError(f"NPROC={count} is for that many GPUs: leave DEVICE={device} out, or NPROC")
    if count > (gpus := torch.cuda.device_count()):
        raise UserError(f"NPROC={count} needs as many GPUs, there are {gpus}; NPROC=1 needs none")
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    processes = []
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends Ctrl-C to all by itself: each ignores the repeat
        signal.signal(number, lambda number, frame: [process.send_signal(number) for process in processes])
    group = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for i in range(count):
        own = group | {"RANK": str(i), "LOCAL_RANK": str(i)}
        processes.append(subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=own))
    while None in (codes := [process.poll() for process in processes]):
        if not {None, 0, 128 + signal.SIGINT, 128 + signal.SIGTERM}.issuperset(codes):
            for process in processes:  # the others would wait for the one that failed
                process.kill()
        time.sleep(0.1)
    sys.exit(next((code for code in codes if code > 0), int(any(codes))))


def on_rank_0(rank, function, *args, share=True):
    """The result of function(*args) on rank 0, or its error, on every process; without `share` the others get None."""
    result = error = None
    if rank == 0:
        try:
            result = function(*args)
        except (UserError, OSError) as raised:
            error = raised
    shared = [result if share else None, error]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    if shared[1]:
        raise shared[1]
    return shared[0] if rank else result


def all_sum(tensor):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
