"""Train a face parser; one run is one folder below runs/.

python train.py --name a --dice 1.5 --lr 8e-4
python train.py --resume a
torchrun --standalone --nproc-per-node 2 train.py --name b        # one process per GPU; the same as --nproc 2

runs/NAME/ contains args.json (arguments, commit, versions), metrics.jsonl (one line per epoch), best.json (scores of
the best epoch by label and image), best.pt (for inference) and last.pt (for resuming).

From top to bottom: the run's folder, set-up, one step, validation, the loop, what is printed. Flags: options.py.
"""

import argparse
import copy
import fcntl
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
from types import SimpleNamespace

from common import UserError, duration, print_message, read_json, run_main, show_line, write_text

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from augment import augment, draw, slice_batch
from checkpoint import find_run, find_weights, make_name, read_metrics, run_arguments, select_device
from data import Batches, find_data, is_synthetic, load_pairs, split
from evaluate import batch_score, evaluate, f_scores, label_scores, official_score
from labels import NUM_CLASSES
from losses import training_loss
from model import PARAM_LIMIT, build, check_logits, count_parameters
from muon import Muon
from options import NEUTRAL, compute, flag, learning_rate, network_arguments, parse, parse_sizes, size_at, strength

HERE = Path(__file__).parent
LONG_HOURS = 2  # a run estimated to take longer prints a warning
LOWER = "start again with a lower --lr, and --overwrite or another --name"
# The files of a run, deleted in this order: args.json marks a run as valid, so it goes first.
RUN_FILES = "args.json", "*.json", "metrics.jsonl", "*.pt", "submission-*.zip", "report.*", ".*.tmp"


def resumed_args(args, given):
    """Returns `args`; with --resume, the arguments in that run's args.json.

    UserError if a flag in `given` differs from the run's.
    """
    if not args.resume:
        return args
    folder = find_run(args.resume, args.runs)
    settings = run_arguments(folder)
    removed = {key for key in settings.keys() - vars(args).keys() if settings[key]}
    if removed:
        what = f"{folder} uses {', '.join(sorted(removed))}, which this version no longer has"
        raise UserError(f"{what}; start a new run with FROM={make_name(folder)}")
    for key in sorted(given - NEUTRAL - {"name"}):
        if vars(args)[key] != settings.get(key):
            raise UserError(
                f"{flag(key)} {vars(args)[key]} differs from run {folder.name}'s {settings.get(key)}: a resumed run "
                f"keeps its arguments; use another NAME, with FROM={make_name(folder)} to start from its weights"
            )
    kept = {key: vars(args)[key] for key in NEUTRAL & (given | {"resume", "runs"})}
    return argparse.Namespace(**vars(args) | settings | kept)


def open_run(args):
    """The folder of the run, locked for this process. A new run never replaces an existing one without --overwrite."""
    if args.resume:
        folder = find_run(args.resume, args.runs)
        if not (folder / "last.pt").is_file():
            starts = f"; `make train FROM={make_name(folder)} NAME=...` starts from it"
            kept = (folder / "best.pt").is_file()
            raise UserError(f"{folder} has no last.pt to resume{starts if kept else ', only records of a training'}")
        lock(folder)
        for unfinished in folder.glob(".*.tmp"):  # left by a killed process
            unfinished.unlink()
        return folder
    name, number = args.name, 1
    while name is None:
        candidate = f"{args.recipe or 'run'}-{number}"
        name, number = (None if Path(args.runs, candidate).exists() else candidate), number + 1
    if not name or name.startswith(".") or "/" in name:
        raise UserError(f"--name {name!r}: use a plain folder name")
    folder = Path(args.runs, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        # A training killed before its args.json was written leaves these: not a run yet.
        started = {"last.pt", "metrics.jsonl", ".lock"}
        if not args.overwrite and any(p.name not in started and p.suffix != ".tmp" for p in folder.iterdir()):
            remedy = f"`make resume NAME={name}` continues it, " if (folder / "last.pt").exists() else ""
            raise UserError(f"run {folder} exists: {remedy}OVERWRITE=1 replaces it, or choose another NAME")
        for pattern in RUN_FILES:
            for old in folder.glob(pattern):
                old.unlink()
    except OSError as error:
        raise UserError(f"cannot use {folder}: {error.strerror}; see --runs") from None
    return folder


_locks = []  # open files: the system releases their locks when the process ends, even if it is killed


def lock(folder):
    """Hold the run for this process. UserError if another training does."""
    file = open(folder / ".lock", "w")  # noqa: SIM115 - stays open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another training is writing {folder}; wait for it or choose another NAME") from None
    _locks.append(file)


def is_running(folder):
    """True if a training holds the run."""
    try:
        with open(Path(folder, ".lock")) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


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
        commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, **git).stdout.strip()
        commit += "+" * (subprocess.run(["git", "diff", "--quiet", "HEAD"], **git).returncode != 0)
    except (OSError, subprocess.CalledProcessError):
        pass
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"pillow": PIL.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    versions["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"commit": commit, "versions": versions, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def set_up(args):
    """Everything a training needs, new or resumed (progress, networks, optimiser and scaler from last.pt)."""
    device = select_device(args.device, args.threads)
    rank, processes = join_processes(args, device)
    start = "" if args.resume else args.start_from or ""
    if start.startswith("runs/NAME/"):
        raise UserError(f"recipe {args.recipe} continues another run: add FROM={start} with its name")
    source = find_weights(start, args.runs) if start else None
    torch.backends.cudnn.benchmark = device.type == "cuda"
    if rank:
        dist.barrier()  # rank 0 creates the cache
    data = find_data(args.data)
    pairs = load_pairs(data, args.cache)
    if processes > 1 and not rank:
        dist.barrier()
    train_indices, val_indices = split(len(pairs.names), args.val_split, args.split_seed)
    trained_on, held = ([pairs.names[i] for i in indices] for indices in (train_indices, val_indices))
    augmentation = strength(args)
    # MixUp and CutMix blend neighbours, so each process needs an even number of images.
    unit = 1 if processes == 1 else processes * (2 if augmentation.mixup or augmentation.cutmix else 1)
    batch = min(args.batch, len(train_indices) // unit * unit)
    if not batch or batch % unit:
        raise UserError(f"--batch {args.batch} of {len(train_indices)} pairs is not a multiple of {unit}; try NPROC=1")
    phases = parse_sizes(args.sizes, args.epochs)
    if batch == 1 and any(size == 32 for size, _ in phases):
        raise UserError("batch norm needs more than one value: use a larger --batch or size than 1 image of 32 pixels")

    torch.manual_seed(args.seed)
    model = build(args.model, **network_arguments(args)).to(device, memory_format=torch.channels_last)
    check_logits(model)
    if source:
        content = checkpoint.load(source)
        if (other := content["model"]) != args.model:
            raise UserError(f"{source} is a {other}; use MODEL={other} (--model {other})")
        if held and checkpoint.has_seen(content, held):
            raise UserError(
                f"{source} was trained on pairs that this run would hold out: its scores would be too high; "
                "VAL_SPLIT=0 trains on all pairs, without scores"
            )
        trained_on = sorted({*trained_on, *content.get("trained_on", ())})
        checkpoint.load_state(model, content["state_dict"], source)
        if not rank:
            after = content.get("epoch") or (content.get("progress") or {}).get("epoch", "?")
            print(f"weights from {source}, after its epoch {after}")
    start_state = copy.deepcopy(model.state_dict()) if args.keep else None
    average = copy.deepcopy(model).requires_grad_(False) if args.ema else None
    if processes > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = torch.compile(model) if args.compile else model
    if processes > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    amp_dtype, scaler = precision(args.amp, device)
    # All input is validated by now: create or reopen the run.
    folder = None if rank else open_run(args)
    run = SimpleNamespace(
        args=args,
        folder=folder,  # None unless rank is 0, which alone writes
        device=device,
        rank=rank,
        processes=processes,
        pairs=pairs,
        batches=Batches(pairs, train_indices, device, args.fix_sides),
        val_indices=val_indices,
        names={"trained_on": trained_on, "held_out": held},  # trained_on: by this run, or the weights it started from
        phases=phases,  # [(size, epochs), ...]
        epochs=sum(length for _, length in phases),
        strength=augmentation,
        batch=batch,  # images per step, over all processes
        steps=len(train_indices) // batch,  # per epoch
        model=model,
        network=network,  # the model as it is called: compiled, distributed
        average=average,  # EMA of the model, or None
        start_state=start_state,  # the weights it started from, or None without --keep
        averaged=[[v for v in m.state_dict().values() if v.is_floating_point()] for m in (average, model) if average],
        optimiser=make_optimiser(model, args, device),
        amp_dtype=amp_dtype,
        scaler=scaler,
        loss=dict(ce=args.ce, dice=args.dice, focal=args.focal, smoothing=args.smoothing, dice_over=args.dice_over),
        # The next epoch and step, the summed loss of this epoch, the best score and its epoch, seconds so far.
        progress={"epoch": 0, "step": 0, "loss": 0.0, "best": -1.0, "best_epoch": 0, "seconds": 0.0},
        signals=catch_signals(),  # numbers of the signals received
    )
    run.loss["class_weights"] = label_weights(args, pairs, train_indices, device)
    used = {"training": len(train_indices), "validation": len(val_indices), "content": pairs.digest}
    used["drawn"] = is_synthetic(data)
    if args.resume:
        restore(run, used)
    elif not rank:
        save_last(run)
        write_metrics(folder, [])
        record = {"args": vars(args), "parameters": count_parameters(model), "pairs": used, "processes": processes}
        record |= {"device": device.type, "command": sys.argv, **environment()}
        # args.json is written last and marks the run as valid: any valid run can be resumed.
        write_text(folder / "args.json", json.dumps(record, indent=1) + "\n")
    return run


def restore(run, used):
    """Load the state of last.pt into the run. UserError if it was trained on other pairs or does not fit."""
    folder = find_run(run.args.resume, run.args.runs)
    recorded = read_json(folder / "args.json").get("pairs") or {}
    if any(recorded.get(key, value) != value for key, value in used.items()):
        remedy = "give its data folder with DATA=, or start a new run"
        raise UserError(f"{folder} was trained on other pairs than {run.args.data or 'data'} has now; {remedy}")
    source = folder / "last.pt"
    state = checkpoint.load(source)
    try:
        checkpoint.load_state(run.model, state["state_dict"], source)
        if run.average:
            checkpoint.load_state(run.average, state["average"], source)
        run.start_state = state["start_state"] if run.args.keep else None
        run.optimiser.load_state_dict(state["optimiser"])
        run.scaler.load_state_dict(state["scaler"])
        run.progress |= dict(state["progress"])
        run.names = {key: state.get(key, names) for key, names in run.names.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source} is of another run or version ({error}); start a new run") from None
    if run.rank == 0:
        done = run.progress["epoch"]
        lines = read_metrics(folder)[:done]
        if [line.get("epoch") for line in lines] != list(range(1, done + 1)):
            raise UserError(f"{folder}/metrics.jsonl is damaged: restore it, or start a new run")
        write_metrics(folder, lines)


def join_processes(args, device):
    """(rank, number of processes) of this process, joined to torchrun's group if it was started by torchrun."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type != "cuda" and (args.model != "microsegformer" or args.lmsa):
        raise UserError("batch norm over several processes needs GPUs; on a CPU use one process with threads")
    return dist.get_rank(), dist.get_world_size()


def start_processes(args):
    """Replace this process by torchrun if --nproc, or the number of GPUs, is above 1. UserError on a CPU."""
    if "RANK" in os.environ:
        return
    gpus = torch.cuda.device_count() if args.device in ("auto", "cuda") else 0
    count = args.nproc or max(1, gpus)
    if count > 1 and count > gpus:
        raise UserError(f"NPROC={count} needs {count} GPUs, and {gpus} are available; on a CPU use THREADS= instead")
    if count > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def catch_signals():
    """A list that collects SIGINT and SIGTERM: the first stops after the running step, the second at once."""
    signals = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch():
        while number := os.read(reader, 1)[0]:
            if signals:
                os._exit(128 + number)
            signals.append(number)
            print_message(f"{signal.Signals(number).name}: stopping after this step; once more stops at once")

    # Python's own handlers wait until a backward pass has ended; a thread that reads the wake-up pipe does not.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(writer)
    threading.Thread(target=watch, daemon=True).start()
    return signals


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
    # The first layer, depthwise filters (few inputs) and the classifier (labels as rows) are not hidden matrices.
    hidden = [p for p in matrices if p.shape[1] > 5 and p.shape[0] != NUM_CLASSES]
    others = [p for p in matrices if all(p is not h for h in hidden)]
    return Muon([{"params": hidden, "orthogonal": True}, {"params": others}, rest], **settings)


def precision(amp, device):
    """(autocast dtype or None, gradient scaler, which does nothing unless fp16).

    "auto": bf16 if the device multiplies it natively, else fp16 on CUDA, else none. UserError for fp16 on a CPU.
    """
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 is very slow on a CPU; use auto, bf16 or off")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        amp = "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "off"
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return dtype, torch.amp.GradScaler(device.type, enabled=amp == "fp16")


@torch.no_grad()
def update_average(kept, new, decay, step):
    """Move the EMA's tensors towards the model's; the decay warms up over the first steps."""
    torch._foreach_lerp_(kept, new, 1 - min(decay, (1 + step) / (10 + step)))


def all_sum(tensor):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def train_step(run, epoch, step, positions):
    """One step on the pairs at `positions` of the global batch: (mean loss, True if any process received a signal)."""
    args = run.args
    for group in run.optimiser.param_groups:
        group["lr"] = learning_rate(args, run.phases, epoch + (step + 1) / run.steps)
    # Dropout draws from the step's own seed, so that a resumed run draws the same.
    torch.manual_seed(int(np.random.SeedSequence((args.seed, epoch, step, run.rank)).generate_state(1)[0]))
    start, stop = (r * run.batch // run.processes for r in (run.rank, run.rank + 1))  # this process's images
    params = slice_batch(draw(run.batch, run.strength, (args.seed, epoch, step)), start, stop)
    images, masks = run.batches.read(positions[start:stop])
    stride = 1 if args.loss_grid == "image" else run.model.stride
    images, target = augment(images, masks, params, size_at(run.phases, epoch), stride, args.exchange_sides)
    with torch.autocast(run.device.type, run.amp_dtype, enabled=run.amp_dtype is not None):
        logits = run.network(images, full_size=False)
    loss = training_loss(logits.float(), target, **run.loss)
    status = torch.stack([loss.detach(), loss.new_tensor(float(bool(run.signals)))])
    value, signalled = all_sum(status).div_(run.processes).tolist()
    where = f"in epoch {epoch + 1}, step {step + 1}; {LOWER}"
    if not math.isfinite(value):
        raise UserError(f"the loss is {value} {where}")
    run.optimiser.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    if args.clip:
        run.scaler.unscale_(run.optimiser)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), args.clip or math.inf)
    if not (norm.isfinite() or run.scaler.is_enabled()):  # the scaler skips such a step itself
        raise UserError(f"the gradient norm is {norm} {where}")
    run.scaler.step(run.optimiser)
    run.scaler.update()
    if run.average:
        update_average(*run.averaged, args.ema, epoch * run.steps + step)
    return value, signalled > 0


def result(run, epoch):
    """The network that is scored and saved: the EMA, or the plain weights without --ema.

    After the last epoch --keep mixes in the weights that the run started from (arXiv 2109.01903).
    """
    model = run.average or run.model
    if run.args.keep and epoch + 1 == run.epochs:
        model = copy.deepcopy(model).requires_grad_(False)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(run.start_state[name].to(value), run.args.keep)
    return model


def scored(run, model, indices, size):
    """Confusions (N, 19, 19) and losses (N,) of some pairs, each process evaluating its fraction of them."""
    shared = {"ranks": (run.rank, run.processes), "stop": lambda: bool(run.signals)}
    confusions, losses = evaluate(model, run.pairs, indices, size, run.device, **shared)
    confusions = all_sum(torch.from_numpy(confusions).to(run.device)).cpu().numpy()
    return confusions, all_sum(torch.from_numpy(losses).float().to(run.device)).cpu().numpy()


def validate(run, model, size):
    """Scores of a network on the held-out pairs: (metrics, confusions).

    Returns None if interrupted.
    """
    confusions, losses = scored(run, model, run.val_indices, size)
    sample = min(run.args.train_score, len(run.val_indices))
    train_confusions = scored(run, model, run.batches.indices[:sample], size)[0] if sample else None
    if all_sum(torch.tensor(float(bool(run.signals)), device=run.device)) > 0:
        return None
    if not math.isfinite(losses.mean()):
        raise UserError(f"the validation loss is {losses.mean()}; {LOWER}")
    metrics = {"val_loss": float(losses.mean()), "official": official_score(confusions)}
    metrics |= {"batch32": batch_score(confusions), "labels": rounded(label_scores(confusions)[0])}
    if sample:
        metrics["train_official"] = official_score(train_confusions)
    return metrics, confusions


def finish_epoch(run, epoch, line):
    """Validate if due, then write metrics.jsonl, best.pt, best.json and last.pt.

    Returns False if interrupted: the epoch is not recorded then, and the resumed run validates.
    """
    size, confusions, model = size_at(run.phases, epoch), None, result(run, epoch)
    begin = time.monotonic()
    if len(run.val_indices) and ((epoch + 1) % run.args.val_every == 0 or epoch + 1 == run.epochs):
        validated = validate(run, model, size)
        if not validated:
            return False
        metrics, confusions = validated
        line |= metrics
    run.progress["seconds"] += time.monotonic() - begin
    line["minutes"] = round(run.progress["seconds"] / 60, 2)
    # Without validation the last epoch counts as the best.
    score = line.get("official", -1.0) if len(run.val_indices) else float(epoch)
    better = score > run.progress["best"]
    if better:
        run.progress |= {"best": score, "best_epoch": epoch + 1}
    run.progress |= {"epoch": epoch + 1, "step": 0, "loss": 0.0}
    if run.rank == 0:
        require_finite(run)
        write_metrics(run.folder, [*read_metrics(run.folder), line])
        if better:
            content = describe_network(run, model, size)
            content |= {"epoch": epoch + 1, "official": line.get("official"), "validated": bool(len(run.val_indices))}
            checkpoint.save(run.folder / "best.pt", content)
            if confusions is not None:
                write_best(run, line, confusions)
        show_line("", sys.stdout)
        print(epoch_line(line, run.epochs, better), flush=True)
    save_last(run)
    return True


def describe_network(run, model, size):
    """The entries of a checkpoint that rebuild the network; `size` is the side of its images."""
    content = {"model": run.args.model, "model_args": network_arguments(run.args), "size": size}
    return content | run.names | {"state_dict": model.state_dict()}


def write_best(run, line, confusions):
    """Write best.json: the epoch's scores by label and by image, and its confusion matrix."""
    f, images = label_scores(confusions)
    names = [run.pairs.names[i] for i in run.val_indices]
    record = {key: line[key] for key in ("epoch", "official", "batch32")}
    record |= {"labels": rounded(f), "images_with_label": images.tolist(), "confusion": confusions.sum(0).tolist()}
    record["image_scores"] = {name: rounded(row) for name, row in zip(names, f_scores(confusions), strict=True)}
    write_text(run.folder / "best.json", json.dumps(record) + "\n")


def require_finite(run):
    """UserError if the weights contain infinities or NaN."""
    if not all(checkpoint.is_finite(m) for m in (run.model, run.average) if m is not None):
        raise UserError(f"the weights are no longer finite; {LOWER}")


def save_last(run):
    """Write last.pt, from which --resume continues exactly."""
    if run.rank == 0:
        require_finite(run)
        content = describe_network(run, run.model, run.phases[-1][0])
        content |= {"average": run.average.state_dict() if run.average else None, "start_state": run.start_state}
        content["progress"] = run.progress
        content |= {"optimiser": run.optimiser.state_dict(), "scaler": run.scaler.state_dict()}
        checkpoint.save(run.folder / "last.pt", content)


def is_finished(run):
    """True once all epochs are done, the target is met, or early stopping applies."""
    stale = run.progress["epoch"] - run.progress["best_epoch"]
    stopped = 0 < run.args.target <= run.progress["best"] or 0 < run.args.patience <= stale
    return stopped or run.progress["epoch"] == run.epochs


def train(run):
    """Train the remaining epochs; returns the number of the signal that stopped them, or 0."""
    clock = saved = time.monotonic()
    session, total = 0, compute(run.phases, run.epochs)
    run.model.train()
    for epoch in range(run.progress["epoch"], run.epochs):
        if is_finished(run):
            break
        order = np.random.default_rng((run.args.seed, epoch)).permutation(len(run.batches.indices))
        begin, first = time.monotonic(), run.progress["step"]
        for step in range(first, run.steps):
            loss, signalled = train_step(run, epoch, step, order[step * run.batch : (step + 1) * run.batch])
            now = time.monotonic()
            run.progress["seconds"] += now - clock
            clock = now
            run.progress |= {"loss": run.progress["loss"] + loss, "step": step + 1}
            session, spent = session + 1, compute(run.phases, epoch + (step + 1) / run.steps)
            if session <= 2:  # not representative: the first steps fill caches
                warm_time, warm_spent, left = now, spent, None
            else:
                left = (total - spent) * (now - warm_time) / (spent - warm_spent)
            if run.rank == 0:
                speed = (step + 1 - first) * run.batch / (now - begin)
                show_line(step_line(run, epoch, step, speed, spent / total, left), sys.stdout)
                if session == 4 and left > LONG_HOURS * 3600:
                    print_message(f"this run takes about {duration(left)}; RECIPE=cpu takes half an hour on one core")
            if signalled:
                save_last(run)
                return run.signals[0] if run.signals else signal.SIGTERM
            if run.rank == 0 and now - saved > 60 * run.args.save_minutes:
                save_last(run)
                saved = now
        line = {"epoch": epoch + 1, "size": size_at(run.phases, epoch), "loss": run.progress["loss"] / run.steps}
        line["lr"] = learning_rate(run.args, run.phases, epoch + 1)
        line["images_per_s"] = round((run.steps - first) * run.batch / (time.monotonic() - begin), 2) or None
        if not finish_epoch(run, epoch, line):
            save_last(run)
            return run.signals[0] if run.signals else signal.SIGTERM
        clock = saved = time.monotonic()
    return 0


def step_line(run, epoch, step, speed, done, left):
    """The progress line after a step; `left` is the estimated seconds to the end, None if unknown."""
    loss = run.progress["loss"] / (step + 1)
    return (
        f"epoch {epoch + 1}/{run.epochs} {size_at(run.phases, epoch)}px step {step + 1}/{run.steps} loss {loss:.4f} "
        f"{speed:.1f} images/s {done:.0%}{f' {duration(left)} left' if left else ''}"
    )


def epoch_line(line, epochs, better):
    """One line for an epoch, from its line of metrics.jsonl; * marks the best score so far."""
    text = f"epoch {line['epoch']}/{epochs} {line['size']}px loss {line['loss']:.4f} lr {line['lr']:.2e}"
    if "official" in line:
        text += f" official {line['official']:.4f}{'*' * better} batch32 {line['batch32']:.4f}"
    return text + f" {line['images_per_s'] or '-'} images/s {line['minutes']:.1f} min"


def summary(run, stopped):
    """The closing lines: best epoch and score, files, next commands. `stopped`: a signal ended the training."""
    name, done = make_name(run.folder), run.progress["epoch"]
    epochs = f"{done} epoch{'s' * (done != 1)} in {duration(run.progress['seconds'])}"
    if stopped:
        return f"stopped in epoch {done + 1}, saved; {epochs}\nnext: make resume NAME={name}"
    score = f"official score {run.progress['best']:.4f} in " if len(run.val_indices) else ""
    best = f"best: {score}epoch {run.progress['best_epoch']}; {epochs}; weights: {run.folder}/best.pt"
    return f"{best}\nnext: make report, make predict NAME={name} IN=photos OUT=masks, make submit NAME={name}"


def main():
    args = resumed_args(*parse(sys.argv[1:]))
    start_processes(args)
    begin = time.monotonic()
    run = set_up(args)
    run.progress["seconds"] += time.monotonic() - begin  # a run's minutes include its cache and set-up
    count = count_parameters(run.model)
    if run.rank == 0:
        threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
        devices = f"{run.device}{threads}" + (f", {run.processes} processes" if run.processes > 1 else "")
        print(
            f"{run.folder}: {run.args.model} {count:,} parameters, "
            f"{len(run.batches.indices)} training and {len(run.val_indices)} validation pairs, {run.epochs} epochs x "
            f"{run.steps} steps of {run.batch} images, {devices}; the first step is slow",
            flush=True,
        )
        if count >= PARAM_LIMIT:
            print_message(f"{count:,} parameters: a submission must have fewer than {PARAM_LIMIT:,}")
        if args.resume and not is_finished(run):
            print(f"resuming at epoch {run.progress['epoch'] + 1}, step {run.progress['step'] + 1}")
    if is_finished(run):
        print(f"already finished; `make train FROM={args.resume} NAME=...` starts a new run from its weights")
        return 0
    number = train(run)
    if run.rank == 0:
        show_line("", sys.stdout)
        print(summary(run, number), flush=True)
    if run.processes > 1:
        dist.destroy_process_group()
    return 128 + number if number else 0


if __name__ == "__main__":
    run_main(main)
