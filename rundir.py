"""The folder of a run: opened once by one training, appended to, and found again.

args.json (arguments, commit, versions), metrics.jsonl (a line an epoch), best.json (the best epoch's scores by label
and image), best.pt (inference), last.pt (resume), .lock (held while a training runs).
"""

import argparse
import fcntl
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy
import PIL
import torch

import checkpoint
import distributed
from atomic import write_text
from errors import UserError
from metrics import by_label, f_scores
from options import RESUME_MAY_CHANGE

# args.json comes first: without it there is no run, whatever else of it is left.
KEPT = ("args.json", "*.pt", "submission-*.zip", "best.json", "metrics.jsonl", "pictures.json", "report.*")
# What a killed training leaves of files it was writing.
TEMPORARY = tuple(f".{name}.*.tmp" for name in ("args.json", "*.pt", "best.json", "metrics.jsonl"))
RELEASE = Path(__file__).with_name("runs") / "release"


def in_force(args, given):
    """The arguments of a training: those given or, where it resumes, the run's own from its args.json.

    UserError where a flag that was given differs from the run's.
    """
    if not args.resume:
        return args
    folder = find_run(args.resume, args.runs)
    try:
        settings = dict(read_json(folder / "args.json")["args"])
        settings["model"], settings["sizes"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder}/args.json tells no arguments; start anew with OVERWRITE=1 (--overwrite)") from None
    for key in sorted(given - RESUME_MAY_CHANGE - {"name"}):
        if vars(args)[key] != settings.get(key):
            raise UserError(
                f"--{key.replace('_', '-')} {vars(args)[key]} differs from run {folder.name}'s {settings.get(key)}: a "
                f"resumed run keeps its arguments; start a new one with --from {folder}"
            )
    kept = {key: vars(args)[key] for key in RESUME_MAY_CHANGE & (given | {"resume", "runs"})}
    return argparse.Namespace(**{**vars(args), **settings, **kept})


def open_run(args):
    """The folder of a run, locked for this process, and the state of its last.pt (None for a new run).

    A new run refuses an existing name unless --overwrite. With several processes the first decides for all.
    """
    folder = distributed.first(lambda: _reopen(args) if args.resume else _create(args))
    return folder, checkpoint.load(folder / "last.pt") if args.resume else None


def begin_run(folder, args, parameters, pairs, device):
    """Note a new run's arguments, its network's number of parameters, what its pairs are, a dict, and the device.

    With args.json a run begins to exist. It comes last, after last.pt, so that whatever exists can be resumed.
    """
    record = {
        "args": vars(args),
        "parameters": parameters,
        "pairs": pairs,
        "processes": distributed.processes(),
        "device": device.type,
        "command": sys.argv,
        "commit": commit(),
        "versions": versions(),
        "started": now(),
    }
    write_metrics(folder, [])
    write_text(folder / "args.json", json.dumps(record, indent=1) + "\n")


def faces_drawn(record):
    """Whether the run of an args.json was trained on drawn faces; older runs, which do not tell, were not."""
    return bool((record.get("pairs") or {}).get("drawn"))


def _reopen(args):
    folder = find_run(args.resume, args.runs)
    if not (folder / "last.pt").is_file():
        raise UserError(f"{folder} has no last.pt to go on from; start it anew with OVERWRITE=1 (--overwrite)")
    _lock(folder)
    _clear(folder, TEMPORARY)
    return folder


def _create(args):
    runs = Path(args.runs)
    name = args.name
    if name is None:
        prefix, number = args.recipe or "run", 1
        while (runs / f"{prefix}-{number}").exists():
            number += 1
        name = f"{prefix}-{number}"
    if not name or name in (".", "..") or "/" in name:
        raise UserError(f"--name {name!r}: give a plain folder name")
    folder = runs / name
    if _taken(folder) and not args.overwrite:
        remedy = f"`make resume NAME={name}` goes on with it" if (folder / "last.pt").exists() else "choose another"
        raise UserError(f"run {folder} exists: {remedy}, OVERWRITE=1 (--overwrite) replaces it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; see --runs") from None
    _lock(folder)
    if _taken(folder) and not args.overwrite:  # another training took it in between
        raise UserError(f"run {folder} exists: choose another --name")
    _clear(folder, KEPT + TEMPORARY)
    return folder


def same_pairs(folder, held):
    """UserError where the run began with other pairs than those `held`, as `begin_run` has noted them."""
    begun = read_json(folder / "args.json").get("pairs") or {}  # older runs tell numbers alone
    if any(begun.get(key, value) != value for key, value in held.items()):
        raise UserError(f"the pairs are no longer those that {folder} began with; a new run may start --from {folder}")


def _taken(folder):
    """Whether a folder holds more than what a training leaves that was killed before its run existed."""
    held = [p.name for p in folder.iterdir()] if folder.is_dir() else [""] if folder.exists() else []
    return any(name not in (".lock", "last.pt", "metrics.jsonl") and not name.endswith(".tmp") for name in held)


def _clear(folder, patterns):
    for pattern in patterns:
        for old in folder.glob(pattern):
            old.unlink()


_locks = []


def _lock(folder):
    """Hold the run for this process; the system lets go of it when the process ends, however it ends."""
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115 - open as long as the process lives
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)  # `in_training` of another process holds it for a moment
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another training is writing {folder}; wait for it or choose another --name") from None
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}") from None
    _locks.append(file)


def close_run():
    """Let go of the runs this process holds, as its end would."""
    while _locks:
        _locks.pop().close()


def in_training(folder):
    """Whether a training, of this process or another, holds the run."""
    try:
        with open(Path(folder, ".lock")) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def find_run(name, runs="runs"):
    """The folder of a run given by name or path."""
    for folder in (Path(runs, name), Path(name)):
        if (folder / "args.json").is_file():
            return folder
    known = sorted(p.parent.name for p in Path(runs).glob("*/args.json"))
    raise UserError(f"no run {name} in {runs}; there are: {', '.join(known) or 'none'}")


def beyond_records(folder):
    """Whether a scored run's best.pt holds other weights than were scored: trained without validation, on all pairs."""
    weights = Path(folder, "best.pt")
    return weights.is_file() and best_score(Path(folder)) > 0 and not checkpoint.validated(checkpoint.load(weights))


def training_args(weights):
    """Arguments of the training that left a checkpoint, from the args.json beside it; {} where there is none."""
    record = Path(weights).with_name("args.json")
    return read_json(record).get("args", {}) if record.is_file() else {}


def data_of(weights, folder=None):
    """The data folder for `data.resolve`: `folder` where given, else what the training of the checkpoint was given."""
    return folder or training_args(weights).get("data")


def make_name(folder):
    """A run as make's NAME= takes it, quoted: make knows runs/ alone, so a run elsewhere goes by its path."""
    return shlex.quote(folder.name if folder.parent.resolve() == Path("runs").resolve() else str(folder))


def find_weights(text=None, runs="runs"):
    """The checkpoint file for `text`: a file, a run's name or folder; by default the release, else the best run's."""
    if text is None:
        scored = [(best_score(p.parent), p) for p in Path(runs).glob("*/best.pt")]
        if (RELEASE / "best.pt").is_file():
            return RELEASE / "best.pt"
        if not scored:
            raise UserError(f"no trained weights in {runs}; train with `make train` or name a file with --weights")
        return max(scored)[1]
    if Path(text).is_file():
        return Path(text)
    path = find_run(text, runs) / "best.pt"
    if not path.is_file():
        raise UserError(f"{path.parent} holds no best.pt: its weights were not kept or no epoch has ended")
    return path


def best_score(folder):
    """Best official score of a run, -1 where none was measured."""
    return max((line.get("official", -1.0) for line in read_metrics(folder)), default=-1.0)


def read_json(path):
    """A JSON file; UserError where it is missing or torn."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_metrics(folder):
    """The whole lines of metrics.jsonl as dicts; a last line torn by a crash is passed over."""
    try:
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    metrics = []
    for line in lines:
        try:
            metrics.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            break
    return metrics


def truncate_metrics(folder, epochs):
    """Keep the lines of the first `epochs` epochs, those that last.pt knows of."""
    kept = read_metrics(folder)[:epochs]
    if [line.get("epoch") for line in kept] != list(range(1, epochs + 1)):
        raise UserError(f"{folder}/metrics.jsonl is damaged: restore it, or start anew with OVERWRITE=1 (--overwrite)")
    write_metrics(folder, kept)


def append_metrics(folder, line):
    """Add an epoch's line."""
    write_metrics(folder, [*read_metrics(folder), line])


def write_metrics(folder, lines):
    """Write the lines of metrics.jsonl anew, atomically: a full disk leaves no torn one."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def write_best(folder, content, scores):
    """best.pt and, where there was a validation, best.json. `scores` is None or (line, confusions, image names)."""
    checkpoint.save(folder / "best.pt", content)
    if scores:
        line, confusions, names = scores
        f, images = by_label(confusions)
        record = {
            "epoch": line["epoch"], "official": line["official"], "batch32": line["batch32"],
            "labels": plain(f), "images_with_label": images.tolist(), "confusion": confusions.sum(0).tolist(),
            "image_scores": {name: plain(row) for name, row in zip(names, f_scores(confusions), strict=True)},
        }  # fmt: skip
        write_text(folder / "best.json", json.dumps(record) + "\n")


def plain(values):
    """Floats (a list of them) for JSON, to 4 digits, None for NaN."""
    return [None if math.isnan(value) else round(float(value), 4) for value in values]


def commit():
    """The repository's commit, with + where files differ from it; "unknown" outside a checkout."""
    where = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=where, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.returncode else "")


def versions():
    """What a record tells of packages and machine, as a dict."""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
        "pillow": PIL.__version__, "machine": platform.machine(), "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def now():
    """The time as ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
