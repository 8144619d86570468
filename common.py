"""Shared helpers: one-line errors, command lines, atomic files, worker processes, progress lines."""

import argparse
import contextlib
import ctypes
import difflib
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

_main, _here = Path(getattr(sys.modules["__main__"], "__file__", None) or ""), Path(__file__).parent
_script = _main.resolve().parent in (_here, _here / "tools", _here / "checks")  # and not someone's program
_missing = [name for name in ("torch", "numpy", "PIL") if _script and importlib.util.find_spec(name) is None]
if _missing:
    _install = f"{sys.executable} -m pip install -r requirements.txt, or use .venv/bin/python"
    print(f"error: {', '.join(_missing)} not installed: {_install}", file=sys.stderr)
    sys.exit(2)
# OpenMP threads that spin for long while they wait are several times slower when another process uses a core.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# One process of several, which torchrun or train.py started; some clusters set RANK alone, for other purposes.
IN_GROUP = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


class UserError(Exception):
    """A mistake the user can fix. The message is one line that names the cause and the remedy."""


def require_packages(*names):
    """UserError with the pip command unless these packages of tools/requirements.txt are installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        remedy = f"{sys.executable} -m pip install -r tools/requirements.txt"
        raise UserError(f"{', '.join(missing)} not installed: {remedy}")


def did_you_mean(known, *words, count=3):
    """A question, "did you mean a or b?", with the `count` names of `known` most like each word; "" if none is."""
    similar = [match for word in words for match in difflib.get_close_matches(word, known, count)]
    return f"did you mean {' or '.join(similar)}?" if similar else ""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None, False and an empty text."""

    def _get_help_string(self, action):
        shown = action.default is not False and action.default not in (None, "")
        return super()._get_help_string(action) if shown else action.help


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in --help, `~` in paths, and switches that also take a value.

    `--lmsa=0` equals `--no-lmsa` and `--lmsa=1` equals `--lmsa`, so that make can pass LMSA=0 as it was typed.
    """

    def __init__(self, **settings):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **settings)

    def switch(self, flag, default=False, **settings):
        """Add a switch --flag / --no-flag."""
        self.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, **settings)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._normalise(text) for text in args], namespace)

    def _normalise(self, text):
        flag, equals, value = text.partition("=")
        action = self._option_string_actions.get(flag)
        if equals and isinstance(action, argparse.BooleanOptionalAction):
            if value.lower() not in ("0", "1", "false", "true"):
                self.error(f"{flag} {value}: give 1 or 0")
            plain = flag.removeprefix("--").removeprefix("no-")
            return ("--" if (value.lower() in ("1", "true")) == flag.endswith(f"--{plain}") else "--no-") + plain
        home = re.match(r"(--[a-z-]+=)?(~/.*)", text, re.DOTALL)  # not every shell expands ~ after IN=
        return (home[1] or "") + os.path.expanduser(home[2]) if home else text

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            similar = did_you_mean(self._option_string_actions, unknown[1], count=1)
            message += f"; {similar}" if similar else ""
        raise UserError(f"{message}; --help lists the flags")


def natural(text, low=0):
    """argparse type: an integer from `low` to 999999."""
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to 999999")
    return int(text)


positive = functools.partial(natural, low=1)


def run_main(main):
    """Call `main()` and exit with its return value; a UserError, OSError or lack of memory is one line and status 2.

    Ctrl-C exits with status 130, SIGTERM with 143. Any other exception is a bug and keeps its traceback.
    """
    null = open(os.devnull, "w")  # noqa: SIM115 - for closed streams
    sys.stdout, sys.stderr = sys.stdout or null, sys.stderr or null
    with contextlib.suppress(OSError):  # of a stream whose file was replaced
        for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no error
            stream.reconfigure(errors="backslashreplace")
    # Pillow warns about damaged metadata in lines of its own source; the pixels are still readable.
    warnings.filterwarnings("ignore", module="PIL")
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # Let glibc keep freed memory: returning large tensors to the system and faulting them in again is slow.
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
    # As an exception, SIGTERM removes temporary files and ends worker processes.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with enough_memory():
            sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as head, has ended
        sys.stderr.close()
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:
        if IN_GROUP and os.environ["RANK"] != "0":
            time.sleep(2)  # if rank 0 has the same error, it prints it and ends this process
        print_message(error, "error")
        sys.exit(2)


@contextlib.contextmanager
def enough_memory():
    """Make a lack of memory a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises the latter
        signs = "out of memory|can't allocate memory|ALLOC_FAILED"
        if isinstance(error, RuntimeError) and not re.search(signs, str(error)):
            raise
        raise UserError("out of memory: try a smaller BATCH, SIZES, SIZE, VIEWS or image") from None


def print_message(message, kind="warning"):
    """Print an error or a warning as one line on stderr, in place of a progress line; warnings of rank 0 alone."""
    if kind == "warning" and IN_GROUP and os.environ["RANK"] != "0":
        return
    show_line("", sys.stderr)
    print(f"{kind}: {printable(str(message))}", file=sys.stderr)


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path next to `path` that replaces it on success and is removed on failure.

    UserError if the file cannot be written; an existing file is then unchanged.
    """
    path, temporary = Path(path), None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        os.umask(mask := os.umask(0))  # which can only be read by setting it
        os.chmod(temporary, 0o666 & ~mask)
        yield Path(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


TITLE = "face parsing"  # in our pictures and ONNX files


def check_target(path, ours):
    """UserError if a file would be lost at `path`: one that does not begin as `ours` says, a pattern of bytes."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            head = file.read(4096)
        if not head or re.match(ours, head, re.DOTALL):
            return
    if Path(path).exists():
        raise UserError(f"{path} exists and is not a file of this kind; move it away or choose another name")


def remove_unfinished(folder, names):
    """Delete the temporary files and folders that killed processes left in `folder` for files of these names."""
    for path in Path(folder).glob(".*.tmp"):
        if (match := re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}\.tmp", path.name)) and match[1] in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(path, text):
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path):
    """Create a folder and its parents. UserError if a file is in its place."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: a file is in the place of a folder; choose another") from None


def read_json(path):
    """Read a JSON file. UserError if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def in_parallel(function, tasks, label):
    """Yield function(task) for every task in order, from one process per core; UserError if one was killed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ProcessPoolExecutor(cores, initializer=_start_worker)
    start = time.monotonic()
    try:
        # In parts, since the workers would run ahead of a slow disk and fill the memory.
        parts = (tasks[first : first + 512] for first in range(0, len(tasks), 512))
        results = itertools.chain.from_iterable(pool.map(function, part, chunksize=8) for part in parts)
        for done, result in enumerate(results, 1):
            if done % 20 == 0:
                show_progress(label, done, len(tasks), time.monotonic() - start)
            yield result
    except BrokenProcessPool:
        raise UserError(f"{label}: a worker process was killed, possibly out of memory; run it again") from None
    finally:
        pool.shutdown(cancel_futures=True)
        show_line("", sys.stderr)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch():  # a worker whose parent was killed would wait for tasks forever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def printable(text):
    """`text` on one line, control characters and undecodable bytes replaced by `?`: for all that a terminal shows."""
    return "".join(c if c.isprintable() else "?" for c in re.sub(r"\s*[^\S ]\s*", " ", text.strip()))


_printed = time.monotonic()  # when `show_line` last printed to what is no terminal


def show_line(text, stream):
    """Overwrite the current terminal line with `text`; "" clears it. To a file or pipe, print a line per minute."""
    global _printed
    if stream.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}", end="" if text else "\r", file=stream, flush=True)
    elif text and time.monotonic() - _printed >= 60:
        _printed = time.monotonic()
        print(text, file=stream, flush=True)


def show_progress(label, done, total, seconds):
    """Show the progress and remaining time of `total` items on stderr; cleared after the last one."""
    left = duration((total - done) * seconds / done)
    show_line(f"{label} {done}/{total}, {left} left" if done < total else "", sys.stderr)


def duration(seconds):
    """Format a duration, such as 40 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
