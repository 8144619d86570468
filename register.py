"""The folders of runs: find a run, its weights and records; replace and lock its folder.

A run is a folder with args.json. Its files are those of RUN_FILES; whatever else is there is the user's.
"""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path

from common import UserError, did_you_mean, read_json, remove_unfinished

RELEASE = Path(__file__).with_name("runs") / "release"
RUN_FILES = (
    *("args.json", "best.json", "pictures.json", "metrics.jsonl", "best.pt", "last.pt", "validated.pt", "LICENCE.txt"),
    *("submission-test.zip", "submission-dev.zip", "report.html", "report.pdf"),
)


def find_run(name, runs="runs"):
    """The folder of a run, by name or path. UserError with the most similar names if there is none."""
    for folder in (Path(runs, name), Path(name)):
        if (folder / "args.json").is_file():
            return folder
    known = sorted(p.parent.name for p in Path(runs).glob("*/args.json"))
    what = f"no such file or run: {name}" if "/" in name or "." in name else f"no run {name} in {runs}"
    raise UserError(f"{what}; {did_you_mean(known, *Path(name).parts) or '`make runs` lists them'}")


def find_weights(text=None, runs="runs"):
    """The checkpoint file for `text`: a run's name or folder, or a file; by default the release."""
    text = str(RELEASE if text is None else text)
    if Path(text).is_file() and not Path(runs, text, "args.json").is_file():
        return Path(text)
    path = find_run(text, runs) / "best.pt"
    if not path.is_file():
        raise UserError(f"{path.parent} has no best.pt: its weights were not kept, or no epoch has finished")
    return path


def scored_weights(folder):
    """The weights that have the run's scores: the release also has others, trained on all pairs, as best.pt."""
    return folder / ("validated.pt" if (folder / "validated.pt").is_file() else "best.pt")


@contextlib.contextmanager
def replace_run(folder):
    """Yield an empty folder to write a run's files to, which then replace the older run's in `folder`.

    On failure the older files stay. args.json goes first and comes last: no mixture of two runs counts as one.
    """
    remove_unfinished(folder, RUN_FILES)
    made = Path(tempfile.mkdtemp(dir=folder, prefix=".args.json.", suffix=".tmp"))
    try:
        yield made
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        for path in sorted(made.iterdir(), key=lambda path: path.name == "args.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(made)


def run_record(path):
    """The args.json next to a file in a run's folder, as a dict; {} if there is none. UserError if it is damaged."""
    record = Path(path).with_name("args.json")
    content = read_json(record) if record.is_file() else {}
    parts = [content.get(key, {}) for key in ("args", "pairs")] if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(parts[0].get("data") or "", str):
        raise UserError(f"{record} is damaged: restore it")
    return content


def run_arguments(folder):
    """The arguments in a run's args.json as a dict. UserError if the file is damaged."""
    arguments = run_record(folder / "args.json").get("args", {})
    if not arguments.keys() >= {"model", "sizes"}:
        raise UserError(f"{folder}/args.json contains no arguments: restore it, or start a new run")
    return arguments


def make_name(folder):
    """A run as make's NAME= takes it, quoted for the shell; a run outside runs/ by its path."""
    return shlex.quote(folder.name if folder.parent.resolve() == Path("runs").resolve() else str(folder))


def read_metrics(folder):
    """The lines of metrics.jsonl as dicts; a line cut off by a crash ends the list."""
    metrics = []
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            metrics.append(dict(json.loads(line)))
    return metrics


_locks = []  # open files: the system releases their locks when the process ends, even if it is killed


def lock(folder):
    """Hold the run for this process. UserError if another training does."""
    _locks.append(os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)))
    try:
        fcntl.flock(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another training is writing {folder}; wait for it or choose another NAME") from None


def is_running(folder):
    """True if a training holds the run."""
    try:
        with open(Path(folder, ".lock")) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False
