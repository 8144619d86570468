"""One run on several processes: start, shares of a batch, sums over all, and batch norm over the whole batch.

torchrun --standalone --nproc-per-node 2 train.py --name a
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from errors import UserError


def start(device):
    """Join the group torchrun set up, if it did; (rank, number of processes)."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def processes():
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(name):
    """The device of this process: `auto` takes cuda, mps or cpu; with several processes each its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not to be had here; give auto or cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def total(tensor):
    """The sum of a tensor over all processes (in place and returned)."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_of(flag, device):
    """Whether the flag is set in any process, so that all stop at the same step."""
    if not dist.is_initialized():
        return flag
    return bool(total(torch.tensor(float(flag), device=device)) > 0)


def first(function):
    """function() in the first process while the others wait; all get its result, and all meet its UserError."""
    if not dist.is_initialized():
        return function()
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, tensor):
        return total(tensor.clone())

    @staticmethod
    def backward(ctx, gradient):
        return total(gradient.clone())


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of the global batch; torch's own works on GPUs only."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        x = x.float()  # sums of squares overflow half precision
        count = x.numel() // x.shape[1] * dist.get_world_size()
        sums = _Sum.apply(torch.cat([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3))]))
        mean, square = (sums / count).chunk(2)
        variance = square - mean * mean
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def synchronise_batch_norm(model):
    """Make every batch norm of the model use the global batch's statistics; the state_dict stays the same."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
