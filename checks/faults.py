"""Attack trainings, disks, files and images, and count the losses. `make faults`

python -m checks.faults             # everything
python -m checks.faults --short     # a few attempts of each attack

An attempt is lost if a resumed run differs by a bit, a file is torn, or bad input is neither handled nor refused by one
error with status 2; and if there is a traceback, a hang or a process left behind.
"""

import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import os
import pkgutil
import random
import resource
import runpy
import select
import shutil
import signal
import struct
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from common import ArgumentParser, UserError, run_main

import numpy as np
import torch
import torch._dynamo  # here once, not in every child
from PIL import Image

from checks.conftest import FLAGS
from checks.references import difference
from images import IMAGE_SUFFIXES, mask_image, read_image
from tools.package import write_zip
from tools.synth import make_dataset

ROOT = Path(__file__).parent.parent
TRAINING = [*FLAGS.split(), "--sizes=32:2,64:2", "--batch=4", "--val-every=2", "--save-minutes=0"]
TRAINING += ["--device=cpu", "--threads=1", "--amp=off"]


class Attempt(NamedTuple):
    """How a script ended: exit status (negative: a signal; "hung": it or a process of it did not end) and output."""

    status: int | str
    text: str

    def lost(self, *words, status=None):
        """Why the attempt is lost, or "". Given `words`, it must end with status 2 and one error that contains them."""
        errors = [line for line in self.text.splitlines() if line.startswith("error: ")]
        refused = len(errors) == 1 and all(str(word) in errors[0] for word in words)
        fine = self.status in (status or ((2,) if words else (0,))) and (refused or self.status != 2)
        return "" if fine and "Traceback" not in self.text else f"status {self.status}: {self.text.strip()[-300:]}"


def run(module, *args, prepare=lambda: None):
    """Run `python -m MODULE ARGS`, after `prepare()`, in a forked child, which spares it the import of torch."""

    def child():
        os.setsid()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        for name, loaded in list(sys.modules.items()):  # imported again, with the prepared faults
            if Path(getattr(loaded, "__file__", None) or "/").parent in (ROOT, ROOT / "tools"):
                del sys.modules[name]
        sys.argv[1:] = map(str, args)
        prepare()
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(writer)
    text = b""  # complete once all processes of the attempt have ended; one that is silent for 100 s hangs
    while (ready := select.select([reader], [], [], 100)[0]) and (chunk := os.read(reader, 1 << 16)):
        text += chunk
    os.close(reader)
    if not ready:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return Attempt(process.exitcode if ready else "hung", text.decode(errors="replace"))


# Preparations of a child. They count calls, so that a busy machine fails at the same point as an idle one.
def at_call(target, nth, act):
    """Call `act` before the nth call of "module.function"; not in worker processes."""

    def prepare():
        owner, _, name = target.rpartition(".")
        owner, process, count = pkgutil.resolve_name(owner), os.getpid(), itertools.count(1)
        real = getattr(owner, name)

        def replaced(*args, **more):
            if os.getpid() == process and next(count) == nth:
                act()
            return real(*args, **more)

        setattr(owner, name, replaced)

    return prepare


class Place:
    """Synthetic faces, their cache and a finished training, below `root`."""

    def __init__(self, root, short):
        self.short, self.root, self.data, self.cache = short, root, root / "data", root / "cache"
        self.runs, self.whole, self.images = root / "runs", root / "runs/whole", root / "data/test/images"
        make_dataset(self.data, train=14, dev=1, test=3)
        begin = os.times().children_user
        if problem := run(*self.train("whole")).lost():
            raise UserError(f"the uninterrupted training failed: {problem}")
        self.seconds = os.times().children_user - begin
        self.predict = ["predict", "--whole", "--weights", self.whole, "--input", self.images, "--output"]
        self.evaluate = ["evaluate", "--weights", self.whole, "--data", self.data, "--cache"]
        self.package = ["tools.package", "--weights", self.whole, "--data", self.data, "--run", 0, "--zip"]

    def train(self, name, *flags):
        """The command that trains a run, or resumes it if it exists."""
        exists = (self.runs / name / "args.json").exists()
        begin = ["--resume", name] if exists else ["--name", name, *TRAINING]
        return ["train", "--runs", self.runs, "--data", self.data, "--cache", self.cache, *begin, *flags]

    def not_equal(self, name, *flags):
        """Why the run, trained or resumed to its end, differs from the uninterrupted one, or ""."""
        return run(*self.train(name, *flags)).lost() or difference(self.runs / name, self.whole)

    def some(self, cases, count):
        """All cases; `count` of them with --short."""
        return cases[:: -(-len(cases) // count)] if self.short else cases


def interrupt_trainings(place):
    """trainings killed, or stopped by SIGTERM or Ctrl-C, up to three times at random points, then resumed"""
    rng = random.Random(6)
    calls = {"losses.training_loss": 8, "torch.save": 8, "evaluate.confusion": 8, "os.replace": 12}
    calls["concurrent.futures.Future.result"] = 2  # while the cache is made
    for number in place.some(range(30), 2):
        name, cache, points, problem = f"run-{number}", place.root / f"cache-{number}", [], ""
        while len(points) < 3 and not problem:
            target, stop = rng.choice(list(calls)), rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            prepare = at_call(target, rng.randint(1, calls[target]), lambda stop=stop: os.kill(os.getpid(), stop))
            if rng.random() < 0.2:
                target, seconds = "a random point", rng.uniform(0.05, place.seconds)
                prepare = functools.partial(signal.setitimer, signal.ITIMER_VIRTUAL, seconds)  # CPU time
            attempt = run(*place.train(name, "--cache", cache), prepare=prepare)
            problem = attempt.lost(status=(0, -signal.SIGKILL, -signal.SIGVTALRM, 130, 143))
            if "stopping after" in attempt.text and "make resume" not in attempt.text:
                problem = problem or f"does not say how to resume: {attempt.text}"
            points.append(target)
            if attempt.status == 0:
                break  # it ended before that point
        problem = problem or place.not_equal(name, "--cache", cache) or " ".join(map(str, cache.glob("*.tmp")))
        yield f"{name} in {', '.join(points)}", problem


def fill_disk(place):
    """a full disk in the write of checkpoints, scores, the cache, masks, zips and data"""
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (300, 300))  # bytes that a file can have
    writes = [("torch.save", 3, "last.pt"), ("torch.save", 6, "best.pt"), ("common.write_text", 4, "best.json")]
    for target, nth, name in place.some(writes, 1):
        problem = run(*place.train(f"full-{name}"), prepare=at_call(target, nth, full)).lost(name)
        yield name, problem or place.not_equal(f"full-{name}")
    out, mask = place.root / "full", f"{next(place.images.iterdir()).stem}.png"
    out.mkdir()
    mask_image(np.zeros((9, 9), np.uint8)).save(out / mask)  # only files of our own kind are replaced
    write_zip(out / "a.zip", {"masks/older.png": b""})
    older = {path.read_bytes() for path in out.iterdir()}
    commands = [
        ([*place.evaluate, out], full),
        ([*place.predict, out], at_call("images.mask_image", 1, full)),
        ([*place.package, out / "a.zip"], at_call("common.atomic", 2, full)),
        (["tools.prepare", "--raw", place.data, "--data", place.root / "full-data"], full),
    ]
    for command, prepare in place.some(commands, 2):
        problem = run(*command, prepare=prepare).lost("cannot write")
        intact = {path.read_bytes() for path in out.iterdir()} == older
        yield command[0], problem or ("" if intact else "an older file is damaged, or an unfinished one left")


def lock_folders(place):
    """folders without permission, unreadable files, files in place of folders"""
    locked, secret = shutil.copytree(place.data, place.root / "locked"), place.root / "locked/secret.png"
    secret.touch()
    for path in (locked, *locked.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444 if path != secret else 0)
    drop_capabilities = functools.partial(ctypes.CDLL(None).capset, struct.pack("Ii", 0x20080522, 0), bytes(24))
    commands = [
        *(place.train("x", *flags) for flags in (["--runs", locked], ["--runs", secret], ["--cache", locked / "x"])),
        *([*place.predict, *flags] for flags in ([locked], [secret], [place.root / "x", "--input", secret])),
        [*place.package, locked / "a.zip"],
        ["tools.prepare", "--raw", place.data, "--data", locked / "new"],
    ]
    for command in place.some(commands, 2):
        yield str(command), run(*command, prepare=drop_capabilities).lost(locked)  # permissions bind root
    yield "read-only data", run(*place.train("read-only", "--data", locked), prepare=drop_capabilities).lost()


def mutated(rng, data):
    """`data` with up to 8 random bytes changed, most of them near its ends; sometimes cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        position = rng.choice((rng.randrange(60), rng.randrange(len(data)), -1 - rng.randrange(400)))
        data[position % len(data)] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


def judge_zips(place):
    """submission zips with random bytes changed"""
    path, rng = place.root / "judged.zip", random.Random(6)
    yield "a valid zip", run(*place.package, path).lost()
    whole = path.read_bytes()
    for number in place.some(range(150), 3):
        path.write_bytes(mutated(rng, whole))
        attempt = run("tools.check_submission", "--zip", path, "--data", place.data)
        yield f"mutation {number}", attempt.lost(status=(0, 1, 2))


def read_images(place):
    """images of every format and mode, damaged images, and images with random bytes changed"""
    folder, out, rng = place.root / "images", place.root / "masks", random.Random(6)
    folder.mkdir()
    picture = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    modes = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F")
    for mode, suffix in itertools.product(modes, IMAGE_SUFFIXES):
        with contextlib.suppress(OSError, ValueError, KeyError):  # not every format stores every mode
            picture.convert(mode).save(folder / f"{mode}-{suffix[1:]}{suffix}")
    for name in ("with space", "脸-🙂", "new\nline", "-dash", "$(x)", "\x1b[31m", "bytes-\udcff"):
        picture.save(folder / f"{name}.png", transparency=(0, 0, 0))
    picture.resize((1, 3000)).save(folder / "tall.png")
    good = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    png, jpg, bmp = (good[f"RGB-{kind}.{kind}"] for kind in ("png", "jpg", "bmp"))
    bomb = bmp[:18] + struct.pack("<2i", 50_000, 50_000) + bmp[26:]
    bad = {"empty.png": b"", "text.jpg": b"text", "cut.png": png[:99], "half.jpg": jpg[:400], "bomb.bmp": bomb}
    mutants = {f"mutant-{i}.png": mutated(rng, rng.choice(list(good.values()))) for i in place.some(range(2000), 30)}
    for name, content in (bad | mutants).items():
        (folder / name).write_bytes(content)
    (folder / "nowhere.png").symlink_to("nothing")
    attempt = run(*place.predict, out, "--input", folder)
    for path in sorted(folder.iterdir()):
        mask, refusals = out / f"{path.stem}.png", attempt.text.count(f"{path}: ")
        made = mask.is_file() and Image.open(mask).size == read_image(path).shape[1::-1]
        allowed = [0] if path.name in good else [0, 1] if path.name in mutants else [1]
        fine = attempt.status == 2 and refusals in allowed and made + refusals == 1
        yield ascii(path.name), "" if fine else f"status {attempt.status}, {refusals} errors: {attempt.text[-300:]}"


ATTACKS = interrupt_trainings, fill_disk, lock_folders, judge_zips, read_images


def count(attack, place):
    """The number of losses of an attack, which are printed; runs in a worker process."""
    attempts = list(attack(place))
    losses = [f"{case}: {problem}" for case, problem in attempts if problem]
    print(f"{len(attempts)} attempts, {len(losses)} losses: {attack.__doc__}", *losses, sep="\nLOSS  ", flush=True)
    return len(losses)


def main():
    parser = ArgumentParser(description="Attack everything and count the losses.")
    parser.switch("--short", help="only a few attempts of each attack")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        os.chdir(root)
        place = Place(Path(root).resolve(), args.short)
        with ProcessPoolExecutor(2) as pool:
            return int(any(list(pool.map(count, ATTACKS, [place] * len(ATTACKS)))))


if __name__ == "__main__":
    run_main(main)
