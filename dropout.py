"""Dropout (Srivastava et al. 2014) for processors: 16 random bits an element, and no weights of attention kept.

torch draws a double for every element and, where attention drops weights, keeps several maps of all of them. On other
devices torch's own functions do it.
"""

import torch
import torch.nn.functional as F
from torch import nn

PART_WEIGHTS = 1 << 18  # attention weights worked on at a time: they stay in a core's cache


def keep_mask(shape, rate):
    """uint8 1s on the CPU, each 0 with probability `rate` (to 1/65536), drawn from torch's generator."""
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    # Booleans are turned into bf16 several times as slowly as integers.
    return (bits >= round(rate * 2**16) - 2**15).view(torch.uint8).view(shape)


class Dropout(nn.Dropout):
    """torch's nn.Dropout, faster on the CPU."""

    def forward(self, x):
        return dropout(x, self.p, self.training)


def dropout(x, rate, training=True):
    """x with each element 0 with probability `rate`, else divided by 1 - rate; x itself when not training."""
    if not (training and rate) or x.device.type != "cpu":
        return F.dropout(x, rate, training)
    return _Dropped.apply(x, rate)


class _Dropped(torch.autograd.Function):
    """Dropout that keeps a byte an element for backward."""

    @staticmethod
    def forward(ctx, x, rate):
        keep = keep_mask(x.shape, rate)
        ctx.save_for_backward(keep)
        ctx.rate = rate
        return _kept(x, keep, rate)

    @staticmethod
    def backward(ctx, dy):
        return _kept(dy, *ctx.saved_tensors, ctx.rate), None


def _kept(x, keep, rate):
    return x * keep.to(x.dtype).mul_(1 / (1 - rate))


def attention(q, k, v, rate=0.0):
    """Softmax attention of q (B, N, C) over k and v (B, M, C), its weights dropped at `rate`: (B, N, C)."""
    if rate and q.device.type == "cpu":
        return _DroppedAttention.apply(q, k, v, rate)
    heads = (x.unsqueeze(1) for x in (q, k, v))  # one head
    return F.scaled_dot_product_attention(*heads, dropout_p=rate).squeeze(1)


class _DroppedAttention(torch.autograd.Function):
    """Attention some rows at a time; backward computes the weights again, of which only what was dropped is kept."""

    @staticmethod
    def forward(ctx, q, k, v, rate):
        q, v = q * q.shape[-1] ** -0.5, v / (1 - rate)
        keep = keep_mask(torch.Size((*q.shape[:2], k.shape[1])), rate)
        out = torch.empty_like(q)
        for i, rows in _parts(keep):
            torch.mm(torch.mm(q[i, rows], k[i].T).softmax(-1).mul_(keep[i, rows]), v[i], out=out[i, rows])
        ctx.save_for_backward(q, k, v, keep)
        ctx.rate = rate
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, keep = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, rows in _parts(keep):
            weights = torch.mm(q[i, rows], k[i].T).softmax(-1)
            d_weights = torch.mm(d_out[i, rows], v[i].T).mul_(keep[i, rows])
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            torch.mm(d_scores, k[i], out=dq[i, rows])
            dk[i].addmm_(d_scores.T, q[i, rows])
            dv[i].addmm_(weights.mul_(keep[i, rows]).T, d_out[i, rows])
        return dq * q.shape[-1] ** -0.5, dk, dv / (1 - ctx.rate), None


def _parts(keep):
    """(image, slice of rows) that together cover weights (B, N, M)."""
    images, count, length = keep.shape
    step = max(1, PART_WEIGHTS // length)
    return [(i, slice(start, start + step)) for i in range(images) for start in range(0, count, step)]
