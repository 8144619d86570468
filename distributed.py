"""One run on several processes: start, shares of a batch, sums over all, and batch norm over the whole batch.

torchrun --standalone --nproc-per-node 2 train.py --name a
"""

import atexit
import contextlib
import os
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from errors import UserError
from parallel import follow_parent

MEET = 60  # seconds in which all processes must have come
SMALL = 1 << 14  # bytes; a socket takes twice as many without the other end reading
_peers = []  # a socket to each process by rank, None for this one; empty where not all are on this machine's CPU


def start(device):
    """Join the group torchrun set up, if it did; (rank, number of processes). UserError where one does not come."""
    if "RANK" not in os.environ:
        return 0, 1
    follow_parent()  # the launcher, without which the others would go on alone
    missing = UserError(f"not all processes of this training have come within {MEET} s; start it again")
    if os.environ["RANK"] != "0" and not first_is_there():
        raise missing
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEET)))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=count)
    except dist.DistError:
        raise missing from None
    atexit.register(dist.destroy_process_group)  # its threads abort an interpreter that ends before them
    if device.type == "cpu" and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        connect()
    return rank, count


def first_is_there():
    """Whether the first process can be reached within MEET seconds; torch's own waiting heeds no signal."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + MEET
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=MEET).close()
            return True
        time.sleep(0.1)
    return False


def leave(status):
    """End this process of several at once, for the group's threads can abort an interpreter that takes its time."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)


def processes():
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def connect():
    """Connect the group's processes, all of this machine, pair by pair: small sums wake none of gloo's threads."""
    rank, count = dist.get_rank(), dist.get_world_size()
    listener = socket.create_server(("127.0.0.1", 0), backlog=count)
    ports = [None] * count
    dist.all_gather_object(ports, listener.getsockname()[1])
    _peers[:] = [None] * count
    for other in range(rank):
        _peers[other] = socket.create_connection(("127.0.0.1", ports[other]))
        _peers[other].sendall(rank.to_bytes(4))
    for _ in range(rank + 1, count):
        caller = listener.accept()[0]
        _peers[int.from_bytes(caller.recv(4, socket.MSG_WAITALL))] = caller
    listener.close()
    for peer in filter(None, _peers):
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _exchange_sum(tensor):
    """The sum of a small tensor over the connected processes, in the order of their ranks, in place."""
    own = tensor.clone()
    for peer in filter(None, _peers):
        peer.sendall(own.numpy())
    tensor.zero_()
    for peer in _peers:
        tensor += own if peer is None else _received(peer, own)
    return tensor


def _received(peer, like):
    """A tensor of the shape and type of `like` that the peer sent."""
    tensor = torch.empty_like(like)
    room = memoryview(tensor.numpy()).cast("B")
    while room:
        count = peer.recv_into(room)
        if not count:
            raise ConnectionError("another process closed its connection")
        room = room[count:]
    return tensor


def total(tensor):
    """The sum of a tensor over all processes (in place and returned)."""
    if _peers and tensor.nbytes <= SMALL:
        return _exchange_sum(tensor)
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


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch norm with the moments of all processes' equal shares: native passes, one small sum each way."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        # Moments come in the type of the running ones that are passed: float32, whatever x is.
        mean, variance = torch.batch_norm_update_stats(x, *weight.new_zeros(2, len(weight)), 0.0)
        moments = total(torch.cat([mean, variance + mean * mean])) / dist.get_world_size()
        mean, square = moments.chunk(2)
        variance = square - mean * mean
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx, dy, *_):
        x, weight, mean, variance = ctx.saved_tensors
        # As if the moments were constants; the gradients of weight and bias are the sums that correct it.
        dx, *own = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        d_weight, d_bias = (total(torch.cat(own)) / (x.numel() // x.shape[1] * dist.get_world_size())).chunk(2)
        scale = -weight * torch.rsqrt(variance + ctx.eps)
        return dx.add_(F.batch_norm(x, mean, variance, scale * d_weight, scale * d_bias, eps=ctx.eps)), *own, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of the global batch; torch's own works on GPUs only."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        y, mean, variance = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return y


def synchronise_batch_norm(model):
    """Make every batch norm of the model use the global batch's statistics; the state_dict stays the same."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
