"""Run scripts on emulated GPUs: tensors labelled cuda:N that hold a CPU tensor. Needs g++; GPUS=2 emulates two.

python -m checks.gpu train.py --device cuda --sizes 64:1 -- evaluate.py

Every operation below autograd and autocast is computed on the CPU; operands on different devices are refused, as CUDA
refuses them. After each script it prints how often the CPU waited for the GPU: copies, and values read from it.
"""

import collections
import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import zlib
from pathlib import Path

GUARD = """#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;  // what autograd asks a CUDA build of torch for
static thread_local DeviceIndex current = 0;
extern "C" void set_current(int index) { current = index; }
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 8; }
  Device getDevice() const override { return {DeviceType::CUDA, current}; }
  Device exchangeDevice(Device d) const override { auto old = getDevice(); current = d.index(); return old; }
  void setDevice(Device d) const override { current = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
} guard;
static impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
namespace at { struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex getCurrentDevice() const override { return current; }
}; REGISTER_CUDA_HOOKS(CUDAHooks) }
"""
TORCH = Path(importlib.util.find_spec("torch").origin).parent
KEY = f"{os.getuid()}-{TORCH.stat().st_mtime_ns}-{zlib.crc32(GUARD.encode())}"
LIBRARY = f"{tempfile.gettempdir()}/emulated-gpu-{KEY}.so"
if not os.path.exists(LIBRARY):
    folders = [f"-I{TORCH}/include", f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib", "-lc10", "-ltorch_cpu"]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", *folders, "-o", f"{LIBRARY}.{os.getpid()}"]
    subprocess.run(command, input=GUARD, text=True, check=True)
    os.replace(command[-1], LIBRARY)
GUARDS = ctypes.CDLL(LIBRARY)  # before torch, which asks for its hooks once

import torch  # noqa: E402
from torch import distributed  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

GPUS, FREE = int(os.environ.get("GPUS", "1")), int(os.environ.get("FREE", 1 << 34))
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal"}
waits = collections.Counter()


class Gpu(torch.Tensor):
    """A CPU tensor `inner` with the label of a GPU."""

    @staticmethod
    def __new__(cls, inner, device):
        settings = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **settings, device=device)

    def __init__(self, inner, device):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __reduce_ex__(self, protocol):  # for torch.save
        return self.inner.detach().__reduce_ex__(protocol)

    def tolist(self):
        waits["tolist"] += 1
        return self.inner.tolist()


class Mode(TorchDispatchMode):
    """Sees the operations that create tensors, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Run an operation on the CPU tensors inside its arguments; label its results."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    gpus, name = [t for t in tensors if isinstance(t, Gpu)], func.overloadpacket.__name__
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else gpus[0].device if gpus else None
    if not gpus and (device is None or device.type != "cuda"):
        return func(*args, **kwargs)
    if device.type == "cuda" and device.index >= GPUS:
        raise RuntimeError("CUDA error: invalid device ordinal")
    index = [t for t in tree_leaves(args[1]) if t is not None] if name in ("index", "index_put_") else []
    if name in ("_to_copy", "copy_"):
        source, device = (args[0], device) if name == "_to_copy" else (args[1], args[0].device)
        asynchronous = hasattr(source, "pinned") and (kwargs.get("non_blocking") or True in args[2:])
        waits[name] += device.type != source.device.type and not asynchronous
    elif len({t.device for t in gpus} | {t.device for t in tensors if t.dim() and all(t is not i for i in index)}) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, in {name}")
    waits[name] += name in WAITING or any(t.dtype is torch.bool or not isinstance(t, Gpu) for t in index)
    inside, named = tree_map_only(Gpu, lambda x: x.inner, (args, kwargs))
    out = func(*inside, **named | ({"device": torch.device("cpu")} if "device" in named else {}))
    if func.namespace == "c10d" or device.type == "cpu":
        return tree_map_only(torch.Tensor, lambda x: next((g for g in gpus if g.inner is x), x), out)
    out = out.clone() if out is inside[0] and name == "_to_copy" else out
    out = tree_map_only(torch.Tensor, lambda x: Gpu(x, device), out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def sync_batch_norm(self, x):
    """SyncBatchNorm.forward from differentiable parts: torch has its own for CUDA alone."""
    whole = torch.cat(distributed.nn.functional.all_gather(x)) if self.training else x
    y = torch.nn.BatchNorm2d.forward(self, whole)
    return y.chunk(distributed.get_world_size())[distributed.get_rank()].clone() if self.training else y


def install():
    """Make torch report GPUs; returns a function that makes a call with its operations going through `run`."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    answers = {"is_available": True, "device_count": GPUS, "current_device": 0, "get_device_name": "emulated"}
    answers |= {"mem_get_info": (FREE, FREE), "is_bf16_supported": True, "manual_seed_all": None, "_lazy_init": None}
    for name, answer in (answers | {"is_current_stream_capturing": False}).items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    start, index, thread = distributed.init_process_group, torch.cuda._utils._get_device_index, threading.Thread.run
    kind = torch.Generator
    torch.cuda.set_device = lambda device: GUARDS.set_current(index(device))  # which demands an index
    torch.Generator = type("Generator", (kind,), {"__new__": lambda cls, device="cpu": kind.__new__(cls)})
    torch.inference_mode = lambda mode=True: torch.no_grad()  # views of a Gpu fail in inference mode
    torch.Tensor.pin_memory = lambda tensor: setattr(tensor, "pinned", True) or tensor
    torch.nn.SyncBatchNorm.forward = sync_batch_norm
    distributed.init_process_group = lambda backend: start({"nccl": "gloo"}[backend])

    def enter(call):
        torch._C._set_only_lift_cpu_tensors(True)
        with Mode():
            call()

    threading.Thread.run = lambda self: enter(lambda: thread(self))
    return enter


if __name__ == "__main__":
    enter, status, commands = install(), 0, [[]]
    for word in sys.argv[1:]:
        commands.append([]) if word == "--" else commands[-1].append(word)
    for sys.argv in commands:
        waits.clear()
        try:
            enter(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
        except SystemExit as ended:
            status = max(status, ended.code or 0)
        print("waits:", sum(waits.values()), dict(+waits), file=sys.stderr)
    sys.exit(status)
