"""Sizes and learning rates of a run as pure functions of the epoch and step."""

import math

from errors import UserError


def parse_sizes(text, epochs):
    """[(size, epochs), ...] of "128:36,256:12"; a size alone, as "512", runs for `epochs`.

    UserError for anything else; sizes are multiples of 32 from 32 to 512.
    """
    phases = []
    for part in str(text).split(","):
        size, _, length = part.partition(":")
        try:
            phases.append((int(size), int(length) if length else epochs))
        except ValueError:
            raise UserError(f"--sizes {text}: {part!r} is not SIZE or SIZE:EPOCHS, as in 128:36,256:12") from None
    if any(size % 32 or not 32 <= size <= 512 for size, _ in phases):
        raise UserError(f"--sizes {text}: sizes are multiples of 32 from 32 to 512")
    if any(length < 1 for _, length in phases):
        raise UserError(f"--sizes {text}: each phase needs at least one epoch")
    if len(phases) > 1 and any(":" not in part for part in str(text).split(",")):
        raise UserError(f"--sizes {text}: with several sizes each needs its epochs, as in 128:36,256:12")
    return phases


def size_at(phases, epoch):
    """Image size of an epoch, counted from 0."""
    for size, length in phases:
        if epoch < length:
            return size
        epoch -= length
    raise ValueError("epoch beyond the last phase")


def cost(phases, epoch):
    """Pixels of a side squared, summed over the epochs before `epoch` (a float): the compute spent until then."""
    spent = 0.0
    for size, length in phases:
        inside = min(max(epoch, 0), length)
        spent += inside * size * size
        epoch -= length
    return spent


def learning_rate(epoch, phases, *, lr, warmup, kind, floor, period, growth):
    """Learning rate at `epoch`, a float that counts finished epochs.

    Linear warm-up over `warmup` epochs (at most half of the run), then by `kind`: "constant"; "cosine" from lr to
    lr * floor over the compute spent (pixels, so that a small size takes a small share; arXiv 1608.03983 without
    restarts); "restarts", the same curve over `period` epochs, again and again, each period `growth` times the last.
    """
    length = sum(epochs for _, epochs in phases)
    warmup = min(warmup, length / 2)
    if epoch < warmup:
        return lr * epoch / warmup
    if kind == "constant":
        return lr
    if kind == "cosine":
        start, end = cost(phases, warmup), cost(phases, length)
        progress = (cost(phases, epoch) - start) / max(end - start, 1)
    else:
        inside = epoch - warmup
        while inside >= period:
            inside, period = inside - period, period * growth
        progress = inside / period
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1))))
