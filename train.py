"""Train a face parser; one run is one folder below runs/.

python train.py --name a --dice 1.5 --lr 8e-4
python train.py --resume a
python train.py --name b --nproc 2        # two processes, each on a GPU of its own

runs/NAME/ contains args.json (arguments, commit, versions), metrics.jsonl (one line per epoch), best.json (scores of
the best epoch by label and image), best.pt (for inference) and last.pt (for resuming). Flags: options.py.
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
import subprocess
import sys
import threading
import time
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
from device import all_sum, choose_speed, device_name, on_rank_0, select_device, start_processes
from evaluate import batch_score, evaluate, f_scores, label_scores, official_score
from labels import NUM_CLASSES
from losses import training_loss
from model import PARAM_LIMIT, build, check_logits, count_parameters
from options import NEUTRAL, flag, from_record, network_arguments, parse, parse_sizes, strength
from register import find_run, find_weights, lock, make_name, read_metrics, run_arguments

# A Training's progress at its start.
NO_PROGRESS = {"epoch": 0, "step": 0, "loss": 0.0, "best": -1.0, "best_epoch": 0, "seconds": 0.0}
COEFFICIENTS, STEPS, MOMENTUM = (3.4445, -4.7750, 2.0315), 5, 0.95  # of Muon, from its article
LOWER = "start again with a lower --lr, and --overwrite or another --name"


def resumed_args(args, given):
    """Returns `args`; with --resume, the arguments in that run's args.json.

    UserError if a flag in `given` differs from the run's.
    """
    if not args.resume:
        return args
    folder = find_run(args.resume, args.runs)
    if not (folder / "last.pt").is_file():
        raise UserError(f"{folder} has no last.pt to continue from; start a new run")
    settings = run_arguments(folder)
    recorded = vars(from_record(settings, folder / "args.json"))
    if removed := sorted(key for key in settings.keys() - vars(args).keys() - NEUTRAL if settings[key]):
        remedy = f"start a new run with FROM={make_name(folder)}"
        raise UserError(f"{folder} uses {', '.join(removed)}, which this version no longer has; {remedy}")
    for key in sorted(given - NEUTRAL):
        if vars(args)[key] != recorded[key]:
            raise UserError(
                f"{flag(key)} {vars(args)[key]} differs from run {folder.name}'s {recorded[key]}: a resumed run "
                f"keeps its arguments; use another NAME, with FROM={make_name(folder)} to start from its weights"
            )
    kept = {key: vars(args)[key] for key in NEUTRAL & (given | {"resume", "runs"})}
    return argparse.Namespace(**recorded | kept)


def choose_folder(args):
    """The folder of the run. UserError if it contains anything, unless it is a run and --overwrite is given."""
    if args.resume:
        return find_run(args.resume, args.runs)
    numbered = (f"{args.recipe or 'run'}-{number}" for number in itertools.count(1))
    name = args.name or next(name for name in numbered if not Path(args.runs, name).exists())
    if name.startswith(".") or "/" in name:
        raise UserError(f"--name {name!r}: use a plain folder name")
    folder = Path(args.runs, name)
    if (folder / "args.json").is_file():
        if not args.overwrite:
            remedy = f"`make resume NAME={make_name(folder)}`, OVERWRITE=1, or choose another NAME"
            raise UserError(f"run {folder} exists: {remedy}")
        run_arguments(folder)
    # A run that was killed while its files replaced an older one's has its args.json in a temporary folder.
    elif any(folder.glob("[!.]*")) and not any(folder.glob(".args.json.*.tmp/args.json")):
        raise UserError(f"{folder} exists and is not a run: choose another NAME, or move its files away")
    return folder


def open_run(args):
    """The folder of the run, locked for this process, with the files of any older run still in it."""
    folder = choose_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    if args.resume:
        remove_unfinished(folder, register.RUN_FILES)
    return folder


def write_metrics(folder, lines):
    """Write metrics.jsonl, atomically."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def rounded(values):
    """Floats for JSON: 4 digits, None for NaN."""
    return [None if math.isnan(value) else round(float(value), 4) for value in values]


def environment():
    """Commit and versions for args.json. The commit ends with + if files differ from it."""
    # Not of another repository, in which these files were unpacked.
    ours = "git ls-files --error-unmatch train.py && git describe --always --abbrev=40 --exclude='*' --dirty=+"
    git = subprocess.run(ours, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    commit = "unknown" if git.returncode else git.stdout.split()[-1]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"pillow": PIL.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    return {"commit": commit, "versions": versions, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


class Training:
    """A training in progress, new or resumed from last.pt; all input is validated before a run is created."""

    args: argparse.Namespace
    folder: Path  # of the run; rank 0 alone writes
    device: torch.device
    rank: int
    processes: int
    pairs: Pairs
    batches: Batches  # of the training pairs
    val_indices: np.ndarray  # (V,), of the pairs held out
    pair_keys: dict  # "trained_on", also by the weights it started from, and "held_out": [(name, hash), ...] each
    phases: list  # [(size, epochs), ...]
    sizes: list  # of each epoch
    batch: int  # images per step, over all processes
    steps: int  # per epoch
    strength: Strength
    loss: dict  # keyword arguments of the loss
    model: nn.Module
    network: nn.Module  # the model as it is called: compiled for each size, or itself
    average: nn.Module | None  # EMA of the model
    ema_tensors: list  # [those of the EMA, those of the model in the same order], or empty
    initial: dict | None  # state_dict that --keep mixes in at the end
    optimiser: torch.optim.Optimizer
    amp_dtype: torch.dtype | None  # None: float32
    scaler: torch.amp.GradScaler  # does nothing unless amp_dtype is float16
    signals: list  # numbers of the signals received
    progress: dict  # next epoch and step, summed loss of this epoch, best score and its epoch, seconds until saved_at
    saved_at: float  # time when last.pt was saved; at first, when the training started
    unread: list  # results of `train_step` that a GPU still computes

    def __init__(self, args):
        self.saved_at = time.monotonic()
        self.args, self.device = args, select_device(args.device, args.threads)
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        if IN_GROUP:
            if self.device.type != "cuda":
                raise UserError("several processes need GPUs; on a CPU use one process with threads")
            dist.init_process_group("nccl")
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if IN_GROUP else (0, 1)

        # Mistakes that need no data come before the pairs are decoded.
        on_rank_0(self.rank, choose_folder, args)
        if (args.start_from or "").startswith("runs/NAME/"):
            raise UserError(f"recipe {args.recipe} continues another run: add FROM={args.start_from} with its name")
        source = find_weights(args.start_from, args.runs) if args.start_from and not args.resume else None
        torch.manual_seed(args.seed)
        self.model = build(args.model, **network_arguments(args)).to(self.device, memory_format=torch.channels_last)
        check_logits(self.model)

        data = on_rank_0(self.rank, find_data, args.data)
        # Rank 0 decodes the pairs into the cache, the others find them there.
        self.pairs = on_rank_0(self.rank, load_pairs, data, args.cache, share=False) or load_pairs(data, args.cache)
        keys = self.pairs.keys()
        hashes = [known for _, known in keys]
        indices, self.val_indices = split(len(keys), args.val_split, args.split_seed, hashes)
        self.batches = Batches(self.pairs, indices, self.device, args.fix_sides)
        self.pair_keys = {"trained_on": self.pairs.keys(indices), "held_out": self.pairs.keys(self.val_indices)}
        self.strength, self.phases = strength(args), parse_sizes(args.sizes, args.epochs)
        self.sizes = [size for size, length in self.phases for _ in range(length)]
        self.batch = batch_size(args, len(indices), self.processes, self.strength)
        self.steps = len(indices) // self.batch
        if self.batch == 1 and min(self.sizes) == 32:
            raise UserError("batch norm cannot train on one 32-pixel image; raise --batch or --sizes")

        if source:
            start_from(self, source)
        self.initial = copy.deepcopy(self.model.state_dict()) if args.keep else None
        self.average = copy.deepcopy(self.model).requires_grad_(False) if args.ema else None
        if self.processes > 1:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        models = (self.average, self.model) if args.ema else ()
        self.ema_tensors = [[v for v in m.state_dict().values() if v.is_floating_point()] for m in models]
        self.amp_dtype = choose_speed(args, self.model, self.device, self.sizes[0])
        self.network = torch.compile(self.model, dynamic=False) if args.compile else self.model

        self.loss = {key: getattr(args, key) for key in ("ce", "dice", "focal", "smoothing", "dice_over")}
        if args.class_weights:
            sample = self.pairs.masks[indices[:: max(1, len(indices) // 100)]]
            self.loss["class_weights"] = label_weights(sample, self.device)
        self.optimiser = make_optimiser(self.model, args, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        self.folder = on_rank_0(self.rank, open_run, args)
        self.signals, self.progress, self.unread = catch_signals(self.rank), NO_PROGRESS.copy(), []
        pairs_record = {"training": len(indices), "validation": len(self.val_indices), "content": self.pairs.digest}
        pairs_record["drawn"] = is_synthetic(data)  # by tools/synth.py
        if args.resume:
            resume(self, pairs_record)
        elif self.rank == 0:
            create_run(self, pairs_record)


def hardware(training):
    """The device and precision of a training, for args.json."""
    dtype = str(training.amp_dtype or torch.float32).removeprefix("torch.")
    return {"device_name": device_name(training.device), "amp": dtype}


def batch_size(args, count, processes, strength):
    """Images per step of `count` pairs, over all processes. UserError if they cannot be shared among these."""
    # MixUp and CutMix blend neighbours, so each process needs an even number of images.
    unit = 1 if processes == 1 else processes * (2 if strength.mixup or strength.cutmix else 1)
    batch = min(args.batch, count // unit * unit)
    if not batch or batch % unit:
        raise UserError(f"--batch {args.batch} of {count} pairs is not a multiple of {unit}; try NPROC=1")
    return batch


def start_from(training, source):
    """Load the weights in the file `source`, and add the pairs that they were trained on to the training's.

    UserError if they are of another network, or have seen a pair that is held out here.
    """
    content, keys = checkpoint.load(source), training.pair_keys
    if (other := content["model"]) != training.args.model:
        raise UserError(f"{source} is a {other}; use MODEL={other} (--model {other})")
    if keys["held_out"] and (doubt := checkpoint.doubt(content, keys["held_out"])):
        remedy = "this run would hold them out, its scores would be too high; VAL_SPLIT=0 trains on all, without scores"
        raise UserError(f"{source} {doubt}; {remedy}")
    checkpoint.load_state(training.model, content["state_dict"], source)
    keys["trained_on"] = sorted({*keys["trained_on"], *checkpoint.pairs_in(content, "trained_on")})
    if training.rank == 0:
        print(f"weights from {source}")


def create_run(training, pairs_record):
    """Write the first files of a new run; those of an older run stay until these are on the disk."""
    record = {"args": vars(training.args), "parameters": count_parameters(training.model), "pairs": pairs_record}
    record |= {"processes": training.processes, "device": training.device.type, **hardware(training)}
    record |= {"tf32": torch.get_float32_matmul_precision() == "high", "command": sys.argv, **environment()}
    with register.replace_run(training.folder) as made:
        save_last(training, made)
        write_metrics(made, [])
        write_text(made / "args.json", json.dumps(record, indent=1) + "\n")


def resume(training, pairs_record):
    """Load the state of last.pt into the training. UserError if it was trained on other pairs or does not fit."""
    folder, source = training.folder, training.folder / "last.pt"
    record, state = register.run_record(source), checkpoint.load(source)
    if record.get("pairs") != pairs_record:
        remedy = "give its data folder with DATA=, or start a new run"
        raise UserError(f"{folder} was trained on other pairs than {training.args.data or 'data'} has now; {remedy}")
    try:
        checkpoint.load_state(training.model, state["state_dict"], source)
        if training.average:
            checkpoint.load_state(training.average, state["average"], source)
        training.initial = state["start_state"] if training.args.keep else None
        training.optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:  # empty unless it was saved in fp16
            training.scaler.load_state_dict(state["scaler"])
        training.progress = {key: state["progress"][key] for key in NO_PROGRESS}
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source} is of another run or version ({error}); start a new run") from None
    held = dict(checkpoint.pairs_in(state, "held_out"))
    if held.keys() != dict(training.pair_keys["held_out"]).keys():
        raise UserError(f"{folder}/args.json holds out other pairs than {source}: restore it, or start a new run")
    training.pair_keys = {key: checkpoint.pairs_in(state, key) for key in training.pair_keys}
    if training.rank == 0:
        epoch = training.progress["epoch"]
        lines = read_metrics(folder)[:epoch]
        if [line.get("epoch") for line in lines] != list(range(1, epoch + 1)):
            raise UserError(f"{folder}/metrics.jsonl is damaged: restore it, or start a new run")
        write_metrics(folder, lines)
        for key, value in hardware(training).items():  # a run may be resumed elsewhere
            if value not in str(record.get(key, value)).split(" then "):
                print_message(f"the run's {key} was {record[key]}, now {value}; AMP=auto THREADS=0 chooses again")
                record[key] = f"{record[key]} then {value}"
        write_text(folder / "args.json", json.dumps(record, indent=1) + "\n")


def catch_signals(rank=0):
    """A list that collects SIGINT or SIGTERM: the first stops after the running step, the second at once.

    A repeat within two seconds is no second one: a launcher forwards what the terminal has sent to every process.
    """
    signals, (reader, writer) = [], os.pipe()
    os.set_blocking(writer, False)

    def watch():
        begin = 0.0
        while True:
            number = os.read(reader, 1)[0]
            if number not in (signal.SIGINT, signal.SIGTERM):  # a signal that other code handles
                continue
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


def label_weights(masks, device):
    """Class weights as a tensor (19,) on the device, 1 / sqrt(frequency), whose mean over the masks' pixels is 1."""
    frequency = np.bincount(masks.ravel(), minlength=NUM_CLASSES) / masks.size
    weights = 1 / np.sqrt(frequency.clip(1e-4))
    return torch.tensor(weights / (weights * frequency).sum(), dtype=torch.float32, device=device)


def orthogonalise(matrices):
    """About U V^T of every float matrix (m, n) = U S V^T in a list: a Newton-Schulz iteration brings S near 1.

    Each step multiplies the matrix by a polynomial of its Gram matrix. The polynomials are accumulated on the short
    side, so that the long side is read only twice; Gram matrices of one side are stacked.
    """
    wide = [len(x) <= x.shape[1] for x in matrices]
    grams = [x @ x.mT if is_wide else x.mT @ x for x, is_wide in zip(matrices, wide, strict=True)]
    sides, results = {}, [None] * len(matrices)
    for i, gram in enumerate(grams):
        sides.setdefault(len(gram), []).append(i)
    for places in sides.values():
        for i, product in zip(places, _polynomials(torch.stack([grams[i] for i in places])), strict=True):
            results[i] = product @ matrices[i] if wide[i] else matrices[i] @ product
    return results


def _polynomials(grams):
    """The product (N, m, m) of all iterations for matrices with these Gram matrices (N, m, m), over their norms."""
    a, b, c = COEFFICIENTS
    squares = grams.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-14  # of the matrices' Frobenius norms
    grams, product = grams / squares, squares.rsqrt()
    for i in range(STEPS):
        step = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        product = step * product if i == 0 else step @ product
        if i + 1 < STEPS:
            grams = step @ grams @ step
    return product


class Muon(torch.optim.AdamW):
    """AdamW, except that groups with `orthogonal` set, of matrices or convolutions, take Muon's steps.

    Their momentum is orthogonalised before it becomes the step (Keller Jordan et al., "Muon: an optimizer for hidden
    layers in neural networks", 2024), which is scaled as in arXiv 2502.16982: learning rates are about AdamW's.
    """

    def __init__(self, groups, **settings):
        super().__init__(groups, **settings)
        self._step_supports_amp_scaling = False  # let the gradient scaler skip a step that overflows

    @torch.no_grad()
    def step(self):
        """One step of all groups."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group.get("orthogonal") and parameters:
                self._orthogonal_step(group, parameters)
        super().step()

    def _orthogonal_step(self, group, parameters):
        for p in parameters:
            if not self.state[p]:
                # AdamW expects a step in every parameter's state when one is loaded.
                self.state[p] |= {"momentum": torch.zeros_like(p), "step": torch.tensor(0.0)}
        gradients, momenta = [p.grad for p in parameters], [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        nesterov = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        # One row per output; a view if x is channels-last, since columns may be in any order.
        steps = orthogonalise([x if x.dim() == 2 else x.movedim(1, -1).flatten(1) for x in nesterov])
        scales = [-group["lr"] * 0.2 * max(step.shape) ** 0.5 for step in steps]
        steps = [
            step if p.dim() == 2 else step.unflatten(1, (*p.shape[2:], -1)).movedim(-1, 1)
            for p, step in zip(parameters, steps, strict=True)
        ]
        torch._foreach_mul_(steps, scales)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, steps)
        for p in parameters:
            p.grad = None  # AdamW skips parameters without a gradient


def make_optimiser(model, args, device):
    """AdamW, or Muon for the matrices of hidden layers and AdamW for all other parameters."""
    ends, hidden, others, vectors = tuple(f"{name}." for name in model.ends), [], [], []
    for name, p in model.named_parameters():
        # Hidden matrices are not the first layer, the classifier or depthwise filters, which have one input.
        inner = args.optimiser == "muon" and p.dim() >= 2 and p.shape[1] > 1 and not name.startswith(ends)
        group = vectors if p.dim() < 2 else hidden if inner else others
        group.append(p)
    settings = {"lr": args.lr, "fused": device.type != "mps", "weight_decay": args.weight_decay}
    groups = [{"params": others}, {"params": vectors, "weight_decay": args.weight_decay * args.decay_all}]
    if args.optimiser == "adamw":
        return torch.optim.AdamW(groups, **settings)
    return Muon([{"params": hidden, "orthogonal": True}, *groups], **settings)


def load_batch(training, epoch, order, step):
    """This process's images and targets, augmented, of a step in an epoch whose pairs are in `order`."""
    start, stop = (r * training.batch // training.processes for r in (training.rank, training.rank + 1))
    params = slice_batch(draw(training.batch, training.strength, (training.args.seed, epoch, step)), start, stop)
    images, masks = training.batches.read(order[step * training.batch :][start:stop])
    stride = 1 if training.args.loss_grid == "image" else training.model.stride
    return augment(images, masks, params, training.sizes[epoch], stride, training.args.exchange_sides)


def train_step(training, epoch, step, images, target):
    """One step: a tensor of its loss, gradient norm and the fraction of processes with a signal.

    On a GPU the step is only launched here; reading the tensor waits for it.
    """
    args, model = training.args, training.model
    for group in training.optimiser.param_groups:
        group["lr"] = learning_rate(args, training.phases, epoch + (step + 1) / training.steps)
    # Dropout draws from the step's own seed, so that a resumed run draws the same.
    torch.manual_seed(int(np.random.SeedSequence((args.seed, epoch, step, training.rank)).generate_state(1)[0]))
    with torch.autocast(training.device.type, training.amp_dtype, enabled=training.amp_dtype is not None):
        logits = training.network(images, full_size=False)
    loss = training_loss(logits.float(), target, **training.loss)
    training.optimiser.zero_grad(set_to_none=True)
    training.scaler.scale(loss).backward()
    if training.processes > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = all_sum(torch.cat([gradient.flatten() for gradient in gradients])).div_(training.processes)
        means = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [mean.view(g.shape) for mean, g in zip(means, gradients, strict=True)])
    if args.clip:
        training.scaler.unscale_(training.optimiser)
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
    training.scaler.step(training.optimiser)
    training.scaler.update()
    if training.average:
        done = epoch * training.steps + step
        torch._foreach_lerp_(*training.ema_tensors, 1 - min(args.ema, (1 + done) / (10 + done)))  # the decay warms up
    status = torch.stack([loss.detach(), norm, torch.full_like(norm, float(bool(training.signals)))])
    return all_sum(status).div_(training.processes)


def scored_network(training, epoch):
    """The network that is scored and saved: the EMA, or the plain weights without --ema.

    After the last epoch --keep mixes in the weights that the training started from (arXiv 2109.01903).
    """
    model = training.average or training.model
    if training.args.keep and epoch + 1 == len(training.sizes):
        model = copy.deepcopy(model).requires_grad_(False)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(training.initial[name].to(value), training.args.keep)
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
    """Validate if due, then write best.pt, best.json, metrics.jsonl and last.pt.

    Returns False if interrupted: the epoch is not recorded then, and the resumed run validates.
    """
    progress, size, held = training.progress, line["size"], len(training.val_indices)
    model, confusions, last = scored_network(training, epoch), None, epoch + 1 == len(training.sizes)
    if held and ((epoch + 1) % training.args.val_every == 0 or last):
        validated = validate(training, model, size)
        if not validated:
            return False
        confusions, line["val_loss"] = validated
        line |= {"official": official_score(confusions), "batch32": batch_score(confusions)}
        line["labels"] = rounded(label_scores(confusions)[0])
    line["minutes"] = round((progress["seconds"] + time.monotonic() - training.saved_at) / 60, 2)
    better = not held or line.get("official", -1.0) > progress["best"]  # without validation the last epoch is the best
    if better:
        progress |= {"best": line.get("official", -1.0), "best_epoch": epoch + 1}
    progress |= {"epoch": epoch + 1, "step": 0, "loss": 0.0}
    if training.rank == 0:
        if better:
            content = describe_network(training, model, size) | {"epoch": epoch + 1, "official": line.get("official")}
            checkpoint.save(training.folder / "best.pt", content | {"validated": bool(held)})
        if better and held:
            write_best(training, line, confusions)
        write_metrics(training.folder, [*read_metrics(training.folder), line])
        text = f"epoch {epoch + 1}/{len(training.sizes)} {size}px loss {line['loss']:.4f} lr {line['lr']:.2e}"
        if confusions is not None:
            text += f" official {line['official']:.4f}{'*' * better} batch32 {line['batch32']:.4f}"
        show_line("", sys.stdout)
        print(f"{text} {line['images_per_s'] or '-'} images/s {line['minutes']:.1f} min", flush=True)
    save_last(training)
    return True


def describe_network(training, model, size):
    """The entries of a checkpoint that rebuild a network for images of this side. UserError if it is not finite."""
    if not checkpoint.is_finite(model):
        raise UserError(f"the weights are no longer finite; {LOWER}")
    content = {"model": training.args.model, "model_args": network_arguments(training.args), "size": size}
    return content | training.pair_keys | {"state_dict": model.state_dict()}


def write_best(training, line, confusions):
    """Write best.json: the epoch's scores by label and by image, and its confusion matrix."""
    f, images = label_scores(confusions)
    names = [training.pairs.names[i] for i in training.val_indices]
    record = {key: line[key] for key in ("epoch", "official", "batch32")}
    record |= {"labels": rounded(f), "images_with_label": images.tolist(), "confusion": confusions.sum(0).tolist()}
    record["image_scores"] = {name: rounded(row) for name, row in zip(names, f_scores(confusions), strict=True)}
    write_text(training.folder / "best.json", json.dumps(record) + "\n")


def save_last(training, folder=None):
    """Write last.pt, from which --resume continues exactly, into the run's folder or another."""
    now = time.monotonic()
    training.progress["seconds"] += now - training.saved_at
    training.saved_at = now
    if training.rank == 0:
        content = describe_network(training, training.model, training.sizes[-1])
        loss = training.progress["loss"] + sum(float(status[0]) for status in training.unread)
        content |= {"average": training.average.state_dict() if training.average else None}
        content |= {"start_state": training.initial, "progress": training.progress | {"loss": loss}}
        content |= {"optimiser": training.optimiser.state_dict(), "scaler": training.scaler.state_dict()}
        checkpoint.save((folder or training.folder) / "last.pt", content)


def is_finished(training):
    """True once all epochs are done, the target is met, or a validation ends `--patience` epochs without gain."""
    args, epoch = training.args, training.progress["epoch"]
    met = 0 < args.target <= training.progress["best"]
    stale = 0 < args.patience <= epoch - training.progress["best_epoch"] and epoch % args.val_every == 0
    return met or stale or epoch == len(training.sizes)


def train(training):
    """Train the remaining epochs; returns False if a signal stopped it, after a save."""
    args, progress, unread, epochs = training.args, training.progress, training.unread, len(training.sizes)
    pixels = functools.partial(pixels_before, training.phases)
    total, before = pixels(epochs), pixels(progress["epoch"] + progress["step"] / training.steps)
    begin = time.monotonic()
    lag = 1 if training.device.type == "cuda" else 0  # a GPU has the next step to do while the loss of one is read
    while not is_finished(training):
        epoch, first, start = progress["epoch"], progress["step"], time.monotonic()
        order = np.random.default_rng((args.seed, epoch)).permutation(len(training.batches.indices))
        line = {"epoch": epoch + 1, "size": training.sizes[epoch]}
        for step in range(first, training.steps):
            unread.append(train_step(training, epoch, step, *load_batch(training, epoch, order, step)))
            signalled, progress["step"] = False, step + 1
            while len(unread) > (lag if step + 1 < training.steps else 0):
                loss, norm, signalled = unread.pop(0).tolist()
                # The scaler itself skips a step whose gradient is not finite.
                if not math.isfinite(loss) or not (math.isfinite(norm) or training.scaler.is_enabled()):
                    at = f"epoch {epoch + 1}, step {step + 1 - len(unread)}"
                    raise UserError(f"loss {loss}, gradient norm {norm} in {at}; {LOWER}")
                progress["loss"] += loss
            if training.rank == 0 and (read := step + 1 - len(unread)):
                now, spent = time.monotonic(), pixels(epoch + (step + 1) / training.steps)
                left = (total - spent) * (now - begin) / (spent - before)
                show_line(
                    f"epoch {epoch + 1}/{epochs} {line['size']}px step {step + 1}/{training.steps} "
                    f"loss {progress['loss'] / read:.4f} "
                    f"{(step + 1 - first) * training.batch / (now - start):.1f} images/s "
                    f"{spent / total:.0%} {duration(left)} left",
                    sys.stdout,
                )
            if signalled:
                save_last(training)
                return False
            if time.monotonic() - training.saved_at > 60 * args.save_minutes:
                save_last(training)
        line |= {"loss": progress["loss"] / training.steps, "lr": learning_rate(args, training.phases, epoch + 1)}
        line["images_per_s"] = round((training.steps - first) * training.batch / (time.monotonic() - start), 2) or None
        if not finish_epoch(training, epoch, line):
            save_last(training)
            return False
    return True


def main():
    args = resumed_args(*parse(sys.argv[1:]))
    start_processes(args.nproc, args.device)
    training = Training(args)
    progress, folder, count = training.progress, training.folder, count_parameters(training.model)
    say = functools.partial(print, flush=True) if training.rank == 0 else lambda text: None
    say(
        f"{folder}: {args.model} {count:,} parameters, {len(training.batches.indices)} training and "
        f"{len(training.val_indices)} validation pairs, {len(training.sizes)} epochs x {training.steps} steps of "
        f"{training.batch} images, {training.processes} x {training.device}, {torch.get_num_threads()} threads, "
        f"{hardware(training)['amp']}"
    )
    if count >= PARAM_LIMIT and training.rank == 0:
        print_message(f"{count:,} parameters: a submission must have fewer than {PARAM_LIMIT:,}")
    if is_finished(training):
        say(f"already finished; FROM={make_name(folder)} with its MODEL= or RECIPE= starts a new run from its weights")
        return 0
    if args.resume:
        say(f"resuming at epoch {progress['epoch'] + 1}, step {progress['step'] + 1}")
    number = 0 if train(training) else (training.signals or [signal.SIGTERM])[0]
    done, spent, name = progress["epoch"], duration(progress["seconds"]), make_name(folder)
    show_line("", sys.stdout)
    if number:
        say(f"stopped in epoch {done + 1} after {spent}, saved\nnext: make resume NAME={name}")
    else:
        score = f"official score {progress['best']:.4f} in " if len(training.val_indices) else ""
        say(f"best: {score}epoch {progress['best_epoch']} of {done}, {spent}; weights: {folder}/best.pt")
        say(f"next: make report, make predict NAME={name} IN=photos OUT=masks, make submit NAME={name}")
    if training.processes > 1:
        dist.destroy_process_group()
    return 128 + number if number else 0


if __name__ == "__main__":
    run_main(main)
