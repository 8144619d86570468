"""Train a face parser; one run is one folder below runs/.

python train.py --name a --dice 1.5 --lr 8e-4
python train.py --resume a
python train.py --name b --nproc 2        # two processes, each on a GPU of its own

runs/NAME/ contains args.json (arguments, commit, versions), metrics.jsonl (one line per epoch), best.json (scores of
the best epoch by label and image), best.pt (for inference) and last.pt (for resuming).

From top to bottom: the run's folder, set-up, one step, validation, the loop, what is printed. Flags: options.py.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from common import IN_GROUP, UserError, duration, print_message, remove_unfinished, run_main, show_line, write_text

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch import nn

import checkpoint
import register
from augment import Strength, augment, draw, slice_batch
from data import Batches, Pairs, find_data, is_synthetic, load_pairs, split
from device import amp_dtype, autocast, device_name, select_device
from evaluate import batch_score, evaluate, f_scores, label_scores, official_score
from labels import NUM_CLASSES
from losses import training_loss
from model import PARAM_LIMIT, build, check_logits, count_parameters
from muon import Muon
from options import NEUTRAL, flag, from_record, network_arguments, parse, parse_sizes, strength
from register import find_run, find_weights, lock, make_name, read_metrics, run_arguments

HERE = Path(__file__).parent
START = {"epoch": 0, "step": 0, "loss": 0.0, "best": -1.0, "best_epoch": 0, "seconds": 0.0}  # a Training's progress
LONG_HOURS = 2  # a run estimated to take longer prints a warning
LOWER = "start again with a lower --lr, and --overwrite or another --name"


def resumed_args(args, given):
    """Returns `args`; with --resume, the arguments in that run's args.json.

    UserError if a flag in `given` differs from the run's.
    """
    if not args.resume:
        return args
    folder = find_run(args.resume, args.runs)
    settings = run_arguments(folder)
    recorded = vars(from_record(settings, folder / "args.json"))
    removed = {key for key in settings.keys() - vars(args).keys() - NEUTRAL if settings[key]}
    if removed:
        what = f"{folder} uses {', '.join(sorted(removed))}, which this version no longer has"
        raise UserError(f"{what}; start a new run with FROM={make_name(folder)}")
    for key in sorted(given - NEUTRAL - {"name"}):
        if vars(args)[key] != recorded[key]:
            raise UserError(
                f"{flag(key)} {vars(args)[key]} differs from run {folder.name}'s {recorded[key]}: a resumed run "
                f"keeps its arguments; use another NAME, with FROM={make_name(folder)} to start from its weights"
            )
    kept = {key: vars(args)[key] for key in NEUTRAL & (given | {"resume", "runs"})}
    return argparse.Namespace(**recorded | kept)


def open_run(args):
    """The folder of the run, locked for this process, with the files of any older run still in it.

    UserError if it contains anything, unless it is a run and --overwrite is given.
    """
    if args.resume:
        folder = find_run(args.resume, args.runs)
        lock(folder)
        remove_unfinished(folder, register.RUN_FILES)
        return folder
    numbered = (f"{args.recipe or 'run'}-{number}" for number in itertools.count(1))
    name = args.name or next(name for name in numbered if not Path(args.runs, name).exists())
    if name.startswith(".") or "/" in name:
        raise UserError(f"--name {name!r}: use a plain folder name")
    folder = Path(args.runs, name)
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    if (folder / "args.json").is_file():
        if not args.overwrite:
            raise UserError(f"run {folder} exists: `make resume NAME={name}`, OVERWRITE=1, or choose another NAME")
        run_arguments(folder)
    # One that was killed while its files replaced those of an older run is neither.
    elif any(folder.glob("[!.]*")) and not any(folder.glob(".args.json.*.tmp/args.json")):
        raise UserError(f"{folder} exists and is no run: choose another NAME, or move its files away")
    return folder


def write_metrics(folder, lines):
    """Write metrics.jsonl, atomically."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def rounded(values):
    """Floats for JSON: 4 digits, None for NaN."""
    return [None if math.isnan(value) else round(float(value), 4) for value in values]


def environment():
    """Commit and versions for args.json. The commit ends with + if files differ from it."""
    commit = "unknown"
    try:
        git = {"cwd": HERE, "capture_output": True, "text": True}
        # Not in another repository, in which these files were unpacked.
        subprocess.run(["git", "ls-files", "--error-unmatch", "train.py"], check=True, **git)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, **git).stdout.strip()
        commit += "+" * (subprocess.run(["git", "diff", "--quiet", "HEAD"], **git).returncode != 0)
    except (OSError, subprocess.CalledProcessError):
        pass
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"pillow": PIL.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    return {"commit": commit, "versions": versions, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


@dataclass
class Training:
    """A training in progress: what a step, a validation and a save need."""

    args: argparse.Namespace
    folder: Path  # of the run; rank 0 alone writes
    device: torch.device
    rank: int
    processes: int
    pairs: Pairs
    batches: Batches
    val_indices: np.ndarray  # (V,), of the pairs held out
    names: dict  # pairs `trained_on`, also by the weights it started from, and `held_out`: [(name, hash), ...] each
    phases: list  # [(size, epochs), ...]
    strength: Strength
    batch: int  # images per step, over all processes
    model: nn.Module
    network: nn.Module  # the model as it is called: compiled, or itself
    average: nn.Module | None  # EMA of the model
    start: dict | None  # state_dict of the weights it started from, if --keep
    optimiser: torch.optim.Optimizer
    amp_dtype: torch.dtype | None  # None: float32
    scaler: torch.amp.GradScaler  # does nothing unless amp_dtype is float16
    loss: dict  # keyword arguments of the loss
    signals: list  # numbers of the signals received
    # The next epoch and step, the summed loss of this epoch, the best score and its epoch, seconds so far.
    progress: dict = field(default_factory=lambda: START.copy())
    unread: deque = field(default_factory=deque)  # results of `train_step` that a GPU still computes

    @property
    def steps(self):
        """Steps per epoch."""
        return len(self.batches.indices) // self.batch

    @property
    def epochs(self):
        """Epochs of the whole training."""
        return sum(length for _, length in self.phases)

    @functools.cached_property
    def averaged(self):
        """The tensors of the EMA, and the model's in the same order."""
        states = (model.state_dict().values() for model in (self.average, self.model))
        return [[value for value in state if value.is_floating_point()] for state in states]


def set_up(args):
    """The Training of these arguments, new or resumed from last.pt; all input is validated before a run is created."""
    device = select_device(args.device, args.threads)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    rank, processes = join_processes(args, device)
    data = on_rank_0(rank, find_data, args.data)
    # Rank 0 decodes the pairs into the cache, the others find them there.
    pairs = on_rank_0(rank, load_pairs, data, args.cache, share=False) or load_pairs(data, args.cache)
    train_indices, val_indices = split(len(pairs.names), args.val_split, args.split_seed, pairs.hashes[:, 0])
    names = {"trained_on": pairs.keys(train_indices), "held_out": pairs.keys(val_indices)}
    batch = batch_size(args, len(train_indices), processes)
    torch.manual_seed(args.seed)
    model = build(args.model, **network_arguments(args)).to(device, memory_format=torch.channels_last)
    check_logits(model)
    if args.start_from and not args.resume:
        start_from(model, args, names, rank)
    start = copy.deepcopy(model.state_dict()) if args.keep else None
    average = copy.deepcopy(model).requires_grad_(False) if args.ema else None
    if processes > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    dtype = amp_dtype(args.amp, device)
    loss = dict(ce=args.ce, dice=args.dice, focal=args.focal, smoothing=args.smoothing, dice_over=args.dice_over)
    loss["class_weights"] = label_weights(args, pairs, train_indices, device)
    training = Training(
        args=args,
        folder=on_rank_0(rank, open_run, args),
        device=device,
        rank=rank,
        processes=processes,
        pairs=pairs,
        batches=Batches(pairs, train_indices, device, args.fix_sides),
        val_indices=val_indices,
        names=names,
        phases=parse_sizes(args.sizes, args.epochs),
        strength=strength(args),
        batch=batch,
        model=model,
        network=torch.compile(model, dynamic=False) if args.compile else model,  # compiled for each size
        average=average,
        start=start,
        optimiser=make_optimiser(model, args, device),
        amp_dtype=dtype,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype is torch.float16),
        loss=loss,
        signals=catch_signals(rank),
    )
    used = {"training": len(train_indices), "validation": len(val_indices), "content": pairs.digest}
    used["drawn"] = is_synthetic(data)
    if args.resume:
        resume(training, used)
    elif not rank:
        create_run(training, used)
    return training


def batch_size(args, count, processes):
    """Images per step of `count` pairs, over all processes. UserError if they cannot be shared among these."""
    # MixUp and CutMix blend neighbours, so each process needs an even number of images.
    augmentation = strength(args)
    unit = 1 if processes == 1 else processes * (2 if augmentation.mixup or augmentation.cutmix else 1)
    batch = min(args.batch, count // unit * unit)
    if not batch or batch % unit:
        raise UserError(f"--batch {args.batch} of {count} pairs is not a multiple of {unit}; try NPROC=1")
    if batch == 1 and any(size == 32 for size, _ in parse_sizes(args.sizes, args.epochs)):
        raise UserError("batch norm cannot train on one 32-pixel image; raise --batch or --sizes")
    return batch


def start_from(model, args, names, rank):
    """Load the weights of --from, and add the pairs that they were trained on to names["trained_on"].

    UserError if they are of another network, or have seen a pair that is held out here.
    """
    if args.start_from.startswith("runs/NAME/"):
        raise UserError(f"recipe {args.recipe} continues another run: add FROM={args.start_from} with its name")
    source = find_weights(args.start_from, args.runs)
    content, held = checkpoint.load(source), names["held_out"]
    if (other := content["model"]) != args.model:
        raise UserError(f"{source} is a {other}; use MODEL={other} (--model {other})")
    doubt = checkpoint.doubt(content, held)
    if any(checkpoint.seen(content, held)):
        remedy = "this run would hold them out, its scores would be too high; VAL_SPLIT=0 trains on all, without scores"
        raise UserError(f"{source} {doubt}; {remedy}")
    if doubt and held:
        print_message(f"{source} {doubt}")
    names["trained_on"] = sorted({*names["trained_on"], *checkpoint.pairs_in(content, "trained_on")}, key=str)
    checkpoint.load_state(model, content["state_dict"], source)
    if not rank:
        after = content.get("epoch") or (content.get("progress") or {}).get("epoch", "?")
        print(f"weights from {source}, after its epoch {after}")


def place(training):
    """The device and precision of a training, for args.json."""
    dtype = str(training.amp_dtype or torch.float32).removeprefix("torch.")
    return {"device_name": device_name(training.device), "amp": dtype}


def create_run(training, used):
    """Write the first files of a new run; those of an older run stay until these are on the disk."""
    args, folder = training.args, training.folder
    record = {"args": vars(args), "parameters": count_parameters(training.model), "pairs": used}
    record |= {"processes": training.processes, "device": training.device.type, **place(training)}
    record |= {"tf32": torch.get_float32_matmul_precision() == "high", "command": sys.argv, **environment()}
    with register.replace_run(folder) as training.folder:
        save_last(training)
        write_metrics(training.folder, [])
        write_text(training.folder / "args.json", json.dumps(record, indent=1) + "\n")
    training.folder = folder


def resume(training, used):
    """Load the state of last.pt into the training. UserError if it was trained on other pairs or does not fit."""
    folder = find_run(training.args.resume, training.args.runs)
    recorded = register.run_record(folder / "last.pt").get("pairs") or {}
    if any(recorded.get(key, value) != value for key, value in used.items()):
        remedy = "give its data folder with DATA=, or start a new run"
        raise UserError(f"{folder} was trained on other pairs than {training.args.data or 'data'} has now; {remedy}")
    source = folder / "last.pt"
    state = checkpoint.load(source)
    try:
        checkpoint.load_state(training.model, state["state_dict"], source)
        if training.average:
            checkpoint.load_state(training.average, state["average"], source)
        training.start = state["start_state"] if training.args.keep else None
        training.optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:  # empty unless it was saved in fp16
            training.scaler.load_state_dict(state["scaler"])
        training.progress |= dict(state["progress"])
        if any(type(training.progress[key]) is not type(value) for key, value in START.items()):
            raise TypeError("its progress is damaged")
        held = checkpoint.pairs_in(state, "held_out")
        if "held_out" in state and {name for name, _ in held} != {name for name, _ in training.names["held_out"]}:
            raise UserError(f"{folder}/args.json holds out other pairs than {source}: restore it, or start a new run")
        for key, own in training.names.items():  # an old run's names get their hashes
            hashes = dict(own)
            training.names[key] = [
                (name, known or hashes.get(name)) for name, known in checkpoint.pairs_in(state, key)
            ] or own
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source} is of another run or version ({error}); start a new run") from None
    if training.rank == 0:
        done = training.progress["epoch"]
        lines = read_metrics(folder)[:done]
        if [line.get("epoch") for line in lines] != list(range(1, done + 1)):
            raise UserError(f"{folder}/metrics.jsonl is damaged: restore it, or start a new run")
        write_metrics(folder, lines)
        record = register.run_record(source)
        for key, value in place(training).items():  # a run may go on elsewhere
            if value not in record.get(key, value).split(" then "):
                record[key] += f" then {value}"
        write_text(folder / "args.json", json.dumps(record, indent=1) + "\n")


def join_processes(args, device):
    """(rank, number of processes) of this process, joined to torchrun's group if it was started by torchrun."""
    if not IN_GROUP:
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type != "cuda" and (args.model != "microsegformer" or args.lmsa):
        raise UserError("batch norm over several processes needs GPUs; on a CPU use one process with threads")
    return dist.get_rank(), dist.get_world_size()


def on_rank_0(rank, function, *args, share=True):
    """function(*args) as rank 0 has it, on every process, or None on the others without `share`; so are its errors."""
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


def start_processes(args):
    """With --nproc above 1, run this command once per process, and exit as they do. UserError without enough GPUs."""
    if args.nproc <= 1 or IN_GROUP:
        return
    gpus = torch.cuda.device_count() if args.device in ("auto", "cuda") else 0
    if args.nproc > gpus:
        raise UserError(f"NPROC={args.nproc} needs as many GPUs, there are {gpus}; on a CPU use THREADS= instead")
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    group = os.environ | {"WORLD_SIZE": str(args.nproc), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=group | {"RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(args.nproc)
    ]
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends Ctrl-C to all by itself: each ignores the repeat
        signal.signal(number, lambda number, frame: [process.send_signal(number) for process in processes])
    while None in (codes := [process.poll() for process in processes]):
        if not {None, 0, 128 + signal.SIGINT, 128 + signal.SIGTERM}.issuperset(codes):
            for process in processes:  # the others would wait for the one that failed
                process.kill()
        time.sleep(0.1)
    sys.exit(max(codes))


def catch_signals(rank=0):
    """A list that collects SIGINT or SIGTERM: the first stops after the running step, the second at once.

    A repeat within two seconds is no second one: a launcher forwards what the terminal has sent to every process.
    """
    signals, (reader, writer) = [], os.pipe()
    os.set_blocking(writer, False)

    def watch():
        begin = 0.0
        while number := os.read(reader, 1)[0]:
            if not signals:
                begin = time.monotonic()
                signals.append(number)
                if rank == 0:
                    print_message(f"{signal.Signals(number).name}: stopping after this step; once more stops at once")
            elif time.monotonic() - begin > 2:
                os._exit(128 + number)

    # Python's own handlers wait until a backward pass has ended; a thread that reads the wake-up pipe does not.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(writer)
    threading.Thread(target=watch, daemon=True).start()
    return signals


def size_at(phases, epoch):
    """Image size of an epoch, counted from 0."""
    for size, length in phases:
        if epoch < length:
            return size
        epoch -= length
    raise ValueError("epoch beyond the last phase")


def pixels_before(phases, epoch):
    """Pixels of an image in all epochs before `epoch` (a float): a measure of the compute spent."""
    spent = 0.0
    for size, length in phases:
        spent += min(max(epoch, 0), length) * size * size
        epoch -= length
    return spent


def learning_rate(args, phases, epoch):
    """Learning rate at `epoch`, a float that counts finished epochs.

    Linear warm-up, then constant; or "cosine" to 0 over the compute spent (arXiv 1608.03983), so that epochs at small
    sizes take a small part of it; or "restarts": the cosine over periods of `restart_period` epochs, growing.
    """
    length = sum(epochs for _, epochs in phases)
    warmup = min(args.warmup, length / 2)
    if epoch < warmup:
        return args.lr * epoch / warmup
    if args.schedule == "constant":
        return args.lr
    if args.schedule == "cosine":
        start, end = pixels_before(phases, warmup), pixels_before(phases, length)
        progress = (pixels_before(phases, epoch) - start) / max(end - start, 1)
    else:
        inside, period = epoch - warmup, args.restart_period
        while inside - period > 1e-9:  # a step's rate is that of its end: the last one of a period takes 0
            inside, period = inside - period, period * args.restart_growth
        progress = inside / period
    return args.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def label_weights(args, pairs, indices, device):
    """Class weights as a tensor (19,) whose mean over the training pixels is 1, or None."""
    if not args.class_weights:
        return None
    sample = pairs.masks[indices[:: max(1, len(indices) // 100)]]
    frequency = np.bincount(sample.ravel(), minlength=NUM_CLASSES) / sample.size
    weights = 1 / np.sqrt(frequency.clip(1e-4))
    return torch.tensor(weights / (weights * frequency).sum(), dtype=torch.float32, device=device)


def make_optimiser(model, args, device):
    """AdamW, or Muon for the matrices of hidden layers and AdamW for all other parameters."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    settings = {"lr": args.lr, "fused": device.type != "mps", "weight_decay": args.weight_decay}
    rest = {"params": vectors, "weight_decay": args.weight_decay if args.decay_all else 0.0}
    if args.optimiser == "adamw":
        return torch.optim.AdamW([{"params": matrices}, rest], **settings)
    # Hidden matrices are not the first layer, the classifier or depthwise filters, which have one input.
    ends, hidden, others = tuple(f"{name}." for name in model.ends), [], []
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            (others if name.startswith(ends) or p.shape[1] == 1 else hidden).append(p)
    return Muon([{"params": hidden, "orthogonal": True}, {"params": others}, rest], **settings)


@torch.no_grad()
def update_average(kept, new, decay, step):
    """Move the EMA's tensors towards the model's; the decay warms up over the first steps."""
    torch._foreach_lerp_(kept, new, 1 - min(decay, (1 + step) / (10 + step)))


def all_sum(tensor):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def average_gradients(gradients):
    """Replace the gradients by their means over all processes, in place."""
    flat = all_sum(torch.cat([gradient.flatten() for gradient in gradients])).div_(dist.get_world_size())
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])


def load_batch(training, epoch, order, step):
    """This process's images and targets, augmented, of a step in an epoch whose pairs are in `order`."""
    start, stop = (r * training.batch // training.processes for r in (training.rank, training.rank + 1))
    params = slice_batch(draw(training.batch, training.strength, (training.args.seed, epoch, step)), start, stop)
    images, masks = training.batches.read(order[step * training.batch :][start:stop])
    stride = 1 if training.args.loss_grid == "image" else training.model.stride
    return augment(images, masks, params, size_at(training.phases, epoch), stride, training.args.exchange_sides)


def train_step(training, epoch, step, images, target):
    """One step: a tensor of its loss, gradient norm and the fraction of processes with a signal.

    On a GPU the step is only launched here; `read_status` waits for it.
    """
    args = training.args
    for group in training.optimiser.param_groups:
        group["lr"] = learning_rate(args, training.phases, epoch + (step + 1) / training.steps)
    # Dropout draws from the step's own seed, so that a resumed run draws the same.
    torch.manual_seed(int(np.random.SeedSequence((args.seed, epoch, step, training.rank)).generate_state(1)[0]))
    with autocast(training.device, training.amp_dtype):
        logits = training.network(images, full_size=False)
    loss = training_loss(logits.float(), target, **training.loss)
    training.optimiser.zero_grad(set_to_none=True)
    training.scaler.scale(loss).backward()
    if training.processes > 1:
        average_gradients([p.grad for p in training.model.parameters() if p.grad is not None])
    if args.clip:
        training.scaler.unscale_(training.optimiser)
    norm = nn.utils.clip_grad_norm_(training.model.parameters(), args.clip or math.inf)
    training.scaler.step(training.optimiser)
    training.scaler.update()
    if training.average:
        update_average(*training.averaged, args.ema, epoch * training.steps + step)
    status = torch.stack([loss.detach(), norm, torch.full_like(norm, float(bool(training.signals)))])
    return all_sum(status).div_(training.processes)


def read_status(training, status, epoch, step):
    """(loss, True if any process received a signal) of a step. UserError if the loss or the gradient is not finite."""
    loss, norm, signalled = status.tolist()
    where = f"in epoch {epoch + 1}, step {step + 1}; {LOWER}"
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} {where}")
    if not (math.isfinite(norm) or training.scaler.is_enabled()):  # the scaler skips such a step itself
        raise UserError(f"the gradient norm is {norm} {where}")
    return loss, signalled > 0


def result(training, epoch):
    """The network that is scored and saved: the EMA, or the plain weights without --ema.

    After the last epoch --keep mixes in the weights that the training started from (arXiv 2109.01903).
    """
    model = training.average or training.model
    if training.args.keep and epoch + 1 == training.epochs:
        model = copy.deepcopy(model).requires_grad_(False)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(training.start[name].to(value), training.args.keep)
    return model


def validate(training, model, size):
    """Confusions (N, 19, 19) and mean loss of a network on the held-out pairs, each process evaluating its fraction.

    Returns None if interrupted.
    """
    settings = {"batch": training.args.val_batch, "ranks": (training.rank, training.processes)}
    settings["stop"] = lambda: bool(training.signals)
    confusions, loss = evaluate(model, training.pairs, training.val_indices, size, training.device, **settings)
    confusions = all_sum(torch.from_numpy(confusions).to(training.device)).cpu().numpy()
    loss, signals = all_sum(torch.tensor([loss, bool(training.signals)], device=training.device)).tolist()
    if signals:
        return None
    if not math.isfinite(loss):
        raise UserError(f"the validation loss is {loss}; {LOWER}")
    return confusions, loss


def finish_epoch(training, epoch, line):
    """Validate if due, then write metrics.jsonl, best.pt, best.json and last.pt.

    Returns False if interrupted: the epoch is not recorded then, and the resumed run validates.
    """
    size, confusions, model = size_at(training.phases, epoch), None, result(training, epoch)
    begin = time.monotonic()
    if len(training.val_indices) and ((epoch + 1) % training.args.val_every == 0 or epoch + 1 == training.epochs):
        validated = validate(training, model, size)
        if not validated:
            return False
        confusions, line["val_loss"] = validated
        line |= {"official": official_score(confusions), "batch32": batch_score(confusions)}
        line["labels"] = rounded(label_scores(confusions)[0])
    training.progress["seconds"] += time.monotonic() - begin
    line["minutes"] = round(training.progress["seconds"] / 60, 2)
    # Without validation the last epoch counts as the best.
    score = line.get("official", -1.0) if len(training.val_indices) else float(epoch)
    better = score > training.progress["best"]
    if better:
        training.progress |= {"best": score, "best_epoch": epoch + 1}
    training.progress |= {"epoch": epoch + 1, "step": 0, "loss": 0.0}
    if training.rank == 0:
        require_finite(training)
        write_metrics(training.folder, [*read_metrics(training.folder), line])
        if better:
            content = describe_network(training, model, size)
            content |= {"epoch": epoch + 1, "official": line.get("official")}
            content |= {"validated": bool(len(training.val_indices))}
            checkpoint.save(training.folder / "best.pt", content)
            if confusions is not None:
                write_best(training, line, confusions)
        show_line("", sys.stdout)
        print(epoch_line(line, training.epochs, better), flush=True)
    save_last(training)
    return True


def describe_network(training, model, size):
    """The entries of a checkpoint that rebuild the network; `size` is the side of its images."""
    content = {"model": training.args.model, "model_args": network_arguments(training.args), "size": size}
    return content | training.names | {"state_dict": model.state_dict()}


def write_best(training, line, confusions):
    """Write best.json: the epoch's scores by label and by image, and its confusion matrix."""
    f, images = label_scores(confusions)
    names = [training.pairs.names[i] for i in training.val_indices]
    record = {key: line[key] for key in ("epoch", "official", "batch32")}
    record |= {"labels": rounded(f), "images_with_label": images.tolist(), "confusion": confusions.sum(0).tolist()}
    record["image_scores"] = {name: rounded(row) for name, row in zip(names, f_scores(confusions), strict=True)}
    write_text(training.folder / "best.json", json.dumps(record) + "\n")


def require_finite(training):
    """UserError if the weights contain infinities or NaN."""
    if not all(checkpoint.is_finite(m) for m in (training.model, training.average) if m is not None):
        raise UserError(f"the weights are no longer finite; {LOWER}")


def save_last(training):
    """Write last.pt, from which --resume continues exactly."""
    if training.rank == 0:
        require_finite(training)
        content = describe_network(training, training.model, training.phases[-1][0])
        loss = training.progress["loss"] + sum(float(status[0]) for status in training.unread)
        content |= {"average": training.average.state_dict() if training.average else None}
        content |= {"start_state": training.start}
        content |= {"progress": training.progress | {"loss": loss}}
        content |= {"optimiser": training.optimiser.state_dict(), "scaler": training.scaler.state_dict()}
        checkpoint.save(training.folder / "last.pt", content)


def is_finished(training):
    """True once all epochs are done, the target is met, or early stopping applies."""
    stale = training.progress["epoch"] - training.progress["best_epoch"]
    stopped = 0 < training.args.target <= training.progress["best"] or 0 < training.args.patience <= stale
    return stopped or training.progress["epoch"] == training.epochs


def train(training):
    """Train the remaining epochs; returns the number of the signal that stopped them, or 0."""
    clock = saved = time.monotonic()
    session, total = 0, pixels_before(training.phases, training.epochs)
    lag = 1 if training.device.type == "cuda" else 0  # a GPU has the next step to do while the loss of one is read
    training.model.train()
    for epoch in range(training.progress["epoch"], training.epochs):
        if is_finished(training):
            break
        order = np.random.default_rng((training.args.seed, epoch)).permutation(len(training.batches.indices))
        begin, first, signalled = time.monotonic(), training.progress["step"], False
        batch = load_batch(training, epoch, order, first) if first < training.steps else None
        for step in range(first, training.steps):
            training.unread.append(train_step(training, epoch, step, *batch))
            batch = load_batch(training, epoch, order, step + 1) if step + 1 < training.steps else None
            while len(training.unread) > (lag if batch else 0):
                loss, signalled = read_status(training, training.unread.popleft(), epoch, step - len(training.unread))
                training.progress["loss"] += loss
            now = time.monotonic()
            training.progress["seconds"] += now - clock
            clock = now
            training.progress["step"] = step + 1
            session, spent = session + 1, pixels_before(training.phases, epoch + (step + 1) / training.steps)
            if session <= 2:  # not representative: the first steps fill caches
                warm_time, warm_spent, left = now, spent, None
            else:
                left = (total - spent) * (now - warm_time) / (spent - warm_spent)
            if training.rank == 0:
                speed = (step + 1 - first) * training.batch / (now - begin)
                show_line(step_line(training, epoch, step, speed, spent / total, left), sys.stdout)
                if session == 4 and left > LONG_HOURS * 3600:
                    print_message(f"this run takes about {duration(left)}; RECIPE=cpu takes half an hour on one core")
            if signalled:
                save_last(training)
                return training.signals[0] if training.signals else signal.SIGTERM
            if training.rank == 0 and now - saved > 60 * training.args.save_minutes:
                save_last(training)
                saved = now
        line = {"epoch": epoch + 1, "size": size_at(training.phases, epoch)}
        line["loss"] = training.progress["loss"] / training.steps
        line["lr"] = learning_rate(training.args, training.phases, epoch + 1)
        line["images_per_s"] = round((training.steps - first) * training.batch / (time.monotonic() - begin), 2) or None
        if not finish_epoch(training, epoch, line):
            save_last(training)
            return training.signals[0] if training.signals else signal.SIGTERM
        clock = saved = time.monotonic()
    return 0


def step_line(training, epoch, step, speed, done, left):
    """The progress line after a step; `left` is the estimated seconds to the end, None if unknown."""
    loss = training.progress["loss"] / max(1, step + 1 - len(training.unread))
    return (
        f"epoch {epoch + 1}/{training.epochs} {size_at(training.phases, epoch)}px step {step + 1}/{training.steps} "
        f"loss {loss:.4f} {speed:.1f} images/s {done:.0%}{f' {duration(left)} left' if left else ''}"
    )


def epoch_line(line, epochs, better):
    """One line for an epoch, from its line of metrics.jsonl; * marks the best score so far."""
    text = f"epoch {line['epoch']}/{epochs} {line['size']}px loss {line['loss']:.4f} lr {line['lr']:.2e}"
    if "official" in line:
        text += f" official {line['official']:.4f}{'*' * better} batch32 {line['batch32']:.4f}"
    return text + f" {line['images_per_s'] or '-'} images/s {line['minutes']:.1f} min"


def summary(training, stopped):
    """The closing lines: best epoch and score, files, next commands. `stopped`: a signal ended the training."""
    name, done = make_name(training.folder), training.progress["epoch"]
    epochs = f"{done} epoch{'s' * (done != 1)} in {duration(training.progress['seconds'])}"
    if stopped:
        return f"stopped in epoch {done + 1}, saved; {epochs}\nnext: make resume NAME={name}"
    score = f"official score {training.progress['best']:.4f} in " if len(training.val_indices) else ""
    best = f"best: {score}epoch {training.progress['best_epoch']}; {epochs}; weights: {training.folder}/best.pt"
    return f"{best}\nnext: make report, make predict NAME={name} IN=photos OUT=masks, make submit NAME={name}"


def main():
    args = resumed_args(*parse(sys.argv[1:]))
    start_processes(args)
    begin = time.monotonic()
    training = set_up(args)
    training.progress["seconds"] += time.monotonic() - begin  # a run's minutes include its cache and set-up
    count = count_parameters(training.model)
    if training.rank == 0:
        devices = str(training.device)
        devices += f", {torch.get_num_threads()} threads" if training.device.type == "cpu" else ""
        devices += f", {training.processes} processes" if training.processes > 1 else ""
        print(
            f"{training.folder}: {training.args.model} {count:,} parameters, {len(training.batches.indices)} training "
            f"and {len(training.val_indices)} validation pairs, {training.epochs} epochs x {training.steps} steps of "
            f"{training.batch} images, {devices}; the first step is slow",
            flush=True,
        )
        if count >= PARAM_LIMIT:
            print_message(f"{count:,} parameters: a submission must have fewer than {PARAM_LIMIT:,}")
        if args.resume and not is_finished(training):
            print(f"resuming at epoch {training.progress['epoch'] + 1}, step {training.progress['step'] + 1}")
    if is_finished(training):
        print(f"already finished; `make train FROM={args.resume} NAME=...` starts a new run from its weights")
        return 0
    number = train(training)
    if training.rank == 0:
        show_line("", sys.stdout)
        print(summary(training, number), flush=True)
    if training.processes > 1:
        dist.destroy_process_group()
    return 128 + number if number else 0


if __name__ == "__main__":
    run_main(main)
