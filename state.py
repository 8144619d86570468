"""Everything a training holds, set up from its arguments, new or resumed, and saved."""

import argparse
import copy
import signal
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import distributed
from augment import Strength, needs_pairs
from data import Batches, Pairs, load_pairs, resolve, split
from device import local_device
from errors import UserError
from labels import NAMES
from model import build
from optimisation import make_optimiser, precision
from options import class_weights, model_arguments, strength
from parameters import count_parameters
from rundir import begin_run, find_weights, open_run, same_pairs, truncate_metrics
from schedule import parse_sizes
from synth import MARKER


@dataclass
class Training:
    """Everything a training holds; `progress` with the networks, optimiser and scaler is what a resume restores."""

    args: argparse.Namespace
    folder: Path
    device: torch.device
    rank: int
    processes: int
    pairs: Pairs
    batches: Batches
    val_indices: np.ndarray
    phases: list  # [(size, epochs), ...]
    changes: Strength
    batch: int  # images a step, over all processes
    steps: int  # an epoch
    model: nn.Module
    network: nn.Module  # the model as it is called: compiled, distributed
    average: nn.Module | None
    optimiser: torch.optim.Optimizer
    autocast: object
    scaler: torch.amp.GradScaler
    label_weights: torch.Tensor | None
    progress: dict  # epoch and step to go on with, sum of losses since the epoch's start, best score, seconds spent
    caught: list  # numbers of the signals that came

    @property
    def epochs(self):
        """Epochs of all sizes together."""
        return sum(length for _, length in self.phases)

    @cached_property
    def averaging(self):
        """The average's weights and floating statistics, and the model's that they follow, as two lists of tensors."""
        return [[v for v in m.state_dict().values() if v.is_floating_point()] for m in (self.average, self.model)]


def set_up(args):
    """The training that the arguments describe, new or resumed."""
    device = local_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    rank, processes = distributed.start(device)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    data = distributed.first(lambda: resolve(args.data))
    if processes > 1:
        distributed.first(lambda: load_pairs(data, args.cache) and None)  # one of them makes the cache
    pairs = load_pairs(data, args.cache)
    train_indices, val_indices = split(len(pairs.names), args.val_split, args.split_seed)
    changes = strength(args)
    unit = 1 if processes == 1 else 2 * processes if needs_pairs(changes) else processes
    batch = min(args.batch, len(train_indices) // unit * unit)
    if not batch or batch % unit:
        raise UserError(f"--batch {args.batch} of {len(train_indices)} pairs is no multiple of {unit}; try NPROC=1")
    phases = parse_sizes(args.sizes, args.epochs)
    if batch == 1 and any(size == 32 for size, _ in phases):
        raise UserError(
            "one image of 32 pixels a batch leaves batch norm a single value; give a larger --batch or size"
        )

    torch.manual_seed(args.seed)
    model = build(args.model, **model_arguments(args))
    model.to(device, memory_format=torch.channels_last)
    if args.start_from and not args.resume:
        source = find_weights(args.start_from, args.runs)
        content = checkpoint.load(source)
        if (other := content["model"]) != args.model:
            raise UserError(f"{source} holds a {other}; give MODEL={other} (--model {other})")
        checkpoint.load_state(model, content["state_dict"], source)
    # Whatever the user can have mistaken is known by now: no run is begun that could not go on.
    caught = catch_signals()
    folder, state = open_run(args)
    held = {
        "training": len(train_indices), "validation": len(val_indices), "content": pairs.content,
        "drawn": (data / MARKER).is_file(),
    }  # fmt: skip
    if state:
        distributed.first(lambda: same_pairs(folder, held))
    average = copy.deepcopy(model).requires_grad_(False) if args.ema else None
    optimiser = make_optimiser(model, args, device)
    autocast, scaler = precision(args.amp, device)
    progress = {"epoch": 0, "step": 0, "loss": 0.0, "best": -1.0, "best_epoch": 0, "seconds": 0.0}
    if state:
        progress |= checkpoint.restore_training(state, folder / "last.pt", model, average, optimiser, scaler)
        if not rank:
            truncate_metrics(folder, progress["epoch"])

    network = distributed.synchronise_batch_norm(model) if processes > 1 else model
    if args.compile:
        network = torch.compile(network)
    if processes > 1:
        # Its statistics of batch norm are the same in all processes already.
        ids = [device.index] if device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=ids, forward_sync_buffers=False)
    t = Training(
        args, folder, device, rank, processes, pairs,
        Batches(pairs, train_indices, device, args.fix_sides, args.repeat_rare), val_indices,
        phases, changes, batch, len(train_indices) // batch, model, network, average, optimiser, autocast, scaler,
        label_weights(args, pairs, train_indices, device), progress, caught,
    )  # fmt: skip
    if not state:
        save_last(t)
        if not rank:
            begin_run(folder, args, count_parameters(model), held, device)
    return t


def catch_signals():
    """A list to which Ctrl-C and SIGTERM from now on add their numbers, instead of ending the process."""
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    return caught


def label_weights(args, pairs, indices, device):
    """Class weights as a tensor (19,) whose mean over the training pixels is 1, or None."""
    weights = class_weights(args)
    if weights is None:
        return None
    sample = pairs.masks[indices[:: max(1, len(indices) // 100)]]
    shares = np.bincount(sample.ravel(), minlength=len(NAMES)) / sample.size
    weights = 1 / np.sqrt(shares.clip(1e-4)) if weights == "balanced" else np.array(weights)
    return torch.tensor(weights / (weights * shares).sum(), dtype=torch.float32, device=device)


def save_last(t):
    """Write last.pt, from which --resume goes on exactly."""
    if t.rank == 0:
        checkpoint.must_be_finite(t.model, t.average)
        content = {
            "model": t.args.model, "model_args": model_arguments(t.args), "size": t.phases[-1][0],
            "state_dict": t.model.state_dict(), "average": t.average.state_dict() if t.average else None,
            "optimiser": t.optimiser.state_dict(), "scaler": t.scaler.state_dict(), "progress": t.progress,
        }  # fmt: skip
        checkpoint.save(t.folder / "last.pt", content)
