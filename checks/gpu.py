"""Run a script on emulated GPUs: tensors labelled cuda:N that hold a CPU tensor. Needs g++; GPUS=2 emulates two.

python -m checks.gpu train.py --device cuda --sizes 64:1

Every operation below autograd and autocast is computed on the CPU; operands on different devices are refused, as CUDA
refuses them. At the end it prints how often the CPU waited for the GPU: copies, and values read from it.
"""

import atexit
import collections
import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

GUARD = """#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Device = c10::Device; using Index = c10::DeviceIndex;  // what autograd asks a CUDA build of torch for
static thread_local Index current = 0;
extern "C" void set_current(int index) { current = index; }
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Index deviceCount() const noexcept override { return 8; }
  Device getDevice() const override { return {c10::DeviceType::CUDA, current}; }
  Device exchangeDevice(Device d) const override { auto old = getDevice(); current = d.index(); return old; }
  void setDevice(Device d) const override { current = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  c10::Stream getStream(Device d) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream s) const noexcept override { return s; }
  void record(void**, const c10::Stream&, const Index, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};
static Guard guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
namespace at { struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(Index) const override { return true; }
  Index deviceCount() const override { return 8; }
  Index getCurrentDevice() const override { return current; }
}; REGISTER_CUDA_HOOKS(CUDAHooks) }
"""
TORCH = Path(importlib.util.find_spec("torch").origin).parent
LIBRARY = Path(tempfile.gettempdir(), f"emulated-gpu-{os.getuid()}-{TORCH.stat().st_mtime_ns}.so")
if not LIBRARY.exists():
    FOLDERS = [f"-I{TORCH}/include", f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib", "-lc10", "-ltorch_cpu"]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", *FOLDERS, "-o", f"{LIBRARY}.{os.getpid()}"]
    subprocess.run(command, input=GUARD, text=True, check=True)
    os.replace(command[-1], LIBRARY)
GUARDS = ctypes.CDLL(str(LIBRARY))  # before torch, which asks for its hooks once

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

aten = torch.ops.aten
GPUS, FREE = int(os.environ.get("GPUS", "1")), int(os.environ.get("FREE", 1 << 34))
COPY, INTO = aten._to_copy.default, aten.copy_.default
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
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


def indexed(device):
    """The device, a GPU's with an index; RuntimeError if there is none such."""
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= GPUS:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def run(func, args, kwargs):
    """Run an operation on the CPU tensors inside its arguments; label its results."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    gpus, name = [t for t in tensors if isinstance(t, Gpu)], func.overloadpacket.__name__
    device = indexed(kwargs["device"]) if kwargs.get("device") is not None else gpus[0].device if gpus else None
    if not gpus and (device is None or device.type == "cpu"):
        return func(*args, **kwargs)
    index = [t for t in tree_leaves(args[1]) if t is not None] if func in INDEXING else []
    if func in (COPY, INTO):
        source, device = (args[0], device) if func is COPY else (args[1], args[0].device)
        asynchronous = hasattr(source, "pinned") and (kwargs.get("non_blocking") or True in args[2:])
        waits[name] += device.type != source.device.type and not asynchronous
    elif len({t.device for t in gpus} | {t.device for t in tensors if t.dim() and all(t is not i for i in index)}) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, in {name}")
    waits[name] += name in WAITING or any(t.dtype is torch.bool or not isinstance(t, Gpu) for t in index)
    inside, named = tree_map_only(Gpu, lambda x: x.inner, (args, kwargs))
    named |= {"device": torch.device("cpu")} if "device" in named else {}
    out = SYNC_BATCH_NORM.get(name, func)(*inside, **named)
    if func is COPY and out is inside[0]:
        out = out.clone()
    if func.namespace == "c10d" or device.type == "cpu":
        return tree_map_only(torch.Tensor, lambda x: next((g for g in gpus if g.inner is x), x), out)
    out = tree_map_only(torch.Tensor, lambda x: Gpu(x, device), out)
    return return_and_correct_aliasing(func, args, kwargs, out)


class Mode(TorchDispatchMode):
    """Sees the operations that create tensors, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def stats(x, eps):
    return x.float().mean((0, 2, 3)), (x.float().var((0, 2, 3), correction=0) + eps).rsqrt()


def gather(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    total, counts = counts.sum(), counts[:, None]
    mean = (means * counts).sum(0) / total
    var = ((invstds**-2 - eps + (means - mean) ** 2) * counts).sum(0) / total
    running_mean.lerp_(mean, momentum), running_var.lerp_(var * total / (total - 1), momentum)
    return mean, (var + eps).rsqrt()


def wide(x):
    return x[:, None, None]


def reduce(dy, x, mean, invstd, weight, *_):
    products = (dy.float() * (x.float() - wide(mean))).sum((0, 2, 3))
    return dy.float().sum((0, 2, 3)), products, products * invstd, dy.float().sum((0, 2, 3))


def backward(dy, x, mean, invstd, weight, sums, products, count):
    n = count.sum()
    centred = dy.float() - wide(sums / n) - (x.float() - wide(mean)) * wide(invstd**2 * products / n)
    return (centred * wide(invstd * weight)).to(x.dtype)


SYNC_BATCH_NORM = {  # torch has these for CUDA alone
    "batch_norm_stats": stats,
    "batch_norm_gather_stats_with_counts": gather,
    "batch_norm_elemt": lambda x, w, b, mean, invstd, eps: ((x.float() - wide(mean)) * wide(invstd * w) + wide(b)).to(
        x.dtype
    ),
    "batch_norm_backward_reduce": reduce,
    "batch_norm_backward_elemt": backward,
}


def install():
    """Make torch report GPUs and run its operations through `run`, in every thread."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    answers = {"is_available": True, "device_count": GPUS, "current_device": 0, "get_device_name": "emulated"}
    answers |= {"mem_get_info": (FREE, FREE), "is_bf16_supported": True, "manual_seed_all": None, "_lazy_init": None}
    for name, answer in (answers | {"is_current_stream_capturing": False}).items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    index, generator, start, thread = (
        *(torch.cuda._utils._get_device_index, torch.Generator, dist.init_process_group, threading.Thread.run),
    )
    torch.cuda.set_device = lambda device: GUARDS.set_current(index(device))  # which demands an index
    torch.Generator = type("Generator", (generator,), {"__new__": lambda cls, device="cpu": generator.__new__(cls)})
    torch.inference_mode = lambda mode=True: torch.no_grad()  # views of a Gpu fail in inference mode
    torch.Tensor.pin_memory = lambda tensor: setattr(tensor, "pinned", True) or tensor
    dist.init_process_group = lambda backend: start({"nccl": "gloo"}[backend])

    def enter(call):
        torch._C._set_only_lift_cpu_tensors(True)
        with Mode():
            call()

    threading.Thread.run = lambda self: enter(lambda: thread(self))
    return enter


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    enter = install()
    atexit.register(lambda: print("waits:", sum(waits.values()), dict(+waits), file=sys.stderr))
    enter(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
