"""Attack trainings, disks, files, images and numbers, and count the losses. `make faults`

python -m checks.faults --write                              # everything; writes runs/faults.json
python -m checks.faults --short --only fill_disk,stop_trainings

An attempt is lost if a resumed run differs by a bit, a file is torn, code in a checkpoint runs, bad input is neither
handled nor refused with status 2 and one line that names it, or if there is a traceback, a hang or a process left
behind. The exit status is 1 if there are losses.
"""

import contextlib
import ctypes
import fcntl
import functools
import io
import itertools
import json
import multiprocessing
import os
import pickle
import pkgutil
import random
import resource
import runpy
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import ArgumentParser, UserError, run_main, write_text

import numpy as np
import torch
import torch._dynamo  # here once, not in every child
from PIL import Image

import checkpoint
from checks.references import difference
from images import IMAGE_SUFFIXES, mask_image, read_image
from labels import COLOURS
from model import PARAM_LIMIT, build
from tools.synth import make_dataset

ROOT = Path(__file__).parent.parent
PATIENCE = 200  # seconds after which an attempt hangs
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TINY = {"widths": [4, 4, 8, 8, 8], "depths": [0, 1, 1, 1, 1], "decoder": [4, 4, 8, 8]}
FLAGS = [
    *("--model=microunet", f"--model-args={json.dumps(TINY)}", "--sizes=32:2,64:2", "--batch=4", "--optimiser=muon"),
    *("--ema=0.9", "--augment=advanced", "--lr=1e-3", "--warmup=1", "--val-split=0.3", "--val-every=2"),
    *("--keep-every=3", "--save-minutes=0", "--device=cpu"),
]


@dataclass
class Attempt:
    """How a script ended: exit status (negative: a signal), stdout, stderr, processes left behind."""

    status: int
    out: str
    err: str
    left: list

    def lost(self, *words, status=(0,)):
        """Why the attempt is lost, or "": with exit status 2 it must print one error, which contains `words`."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if self.status not in status or "Traceback" in self.err:
            return f"status {self.status}: {self.err.strip()[-300:]}"  # -14: hung
        if self.status == 2 and (len(errors) != 1 or not all(str(word) in errors[0] for word in words)):
            return f"not one error with {words}: {self.err.strip()[-300:]}"
        return f"left {len(self.left)} processes behind" if self.left else ""

    def not_refused(self, *words):
        """Why the attempt is no refusal with status 2 and one error, or ""."""
        return self.lost(*words, status=(2,))


def unless(fine, problem):
    return "" if fine else problem


def run(module, *args, prepare=lambda: None):
    """Run `python -m MODULE ARGS`, after `prepare()`, in a forked child, which spares it the import of torch."""
    streams = os.memfd_create("stdout"), os.memfd_create("stderr")
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        run_child(module, args, prepare, streams)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    deadline = time.monotonic() + 30
    while (left := find_processes(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in left:
        os.kill(process, signal.SIGKILL)
    out, err = (os.pread(stream, 1 << 24, 0).decode(errors="replace") for stream in streams)
    for stream in streams:
        os.close(stream)
    return Attempt(status, out, err, left)


def run_child(module, args, prepare, streams):
    status = 1
    try:
        os.setsid()
        signal.alarm(PATIENCE)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        for name, loaded in list(sys.modules.items()):  # imported again, with the prepared faults
            if Path(getattr(loaded, "__file__", None) or "/").parent in (ROOT, ROOT / "tools"):
                del sys.modules[name]
        sys.argv[1:] = map(str, args)
        prepare()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the child must end here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def find_processes(session):
    """Ids of a session's living processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


# Preparations of a child. They count calls and CPU time, so that a busy machine fails at the same point as an idle one.
def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def at_call(target, nth, act=kill, change=None):
    """Call `act` before, or `change` with the result of, the nth call of "module.function"; not in worker processes."""

    def prepare():
        owner, _, name = target.rpartition(".")
        owner, process, count = pkgutil.resolve_name(owner), os.getpid(), itertools.count(1)
        real = getattr(owner, name)

        def replaced(*args, **more):
            if os.getpid() != process or next(count) != nth:
                return real(*args, **more)
            return change(real(*args, **more)) if change else (act(), real(*args, **more))[1]

        setattr(owner, name, replaced)

    return prepare


def limit_files(size=300):
    """Let no file grow beyond `size` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def drop_capabilities():
    """Let permission bits apply to root too."""
    ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))


class Place:
    """Synthetic faces, their cache, a finished training and a checkpoint whose masks vary, below `root`."""

    def __init__(self, root):
        self.root, self.data, self.cache, self.runs = root, root / "data", root / "cache", root / "runs"
        self.weights, self.whole, self.images = root / "weights.pt", self.runs / "whole", self.data / "test/images"
        make_dataset(self.data, train=14, dev=1, test=3, workers=1)
        torch.manual_seed(0)
        model = build("microunet", **TINY)
        torch.nn.init.normal_(model.classifier.weight, std=1.0)
        self.content = {"model": "microunet", "model_args": TINY, "size": 64, "state_dict": model.state_dict()}
        checkpoint.save(self.weights, self.content)
        begin = os.times().children_user
        if problem := run(*self.train("whole")).lost():
            raise UserError(f"the uninterrupted training failed: {problem}")
        self.seconds = os.times().children_user - begin
        self.predict = ["predict", "--whole", "--weights", self.weights, "--input", self.images, "--output"]
        self.package = ["tools.package", "--weights", self.weights, "--data", self.data, "--run", 0, "--zip"]

    def train(self, name, *flags, data=None, cache=None):
        """The command that trains a run, or resumes it if it exists."""
        command = ["train", "--runs", self.runs, "--data", data or self.data, "--cache", cache or self.cache]
        exists = (self.runs / name / "args.json").exists()
        return [*command, *(("--resume", name) if exists else ("--name", name, *FLAGS)), *flags]

    def not_equal(self, name, **places):
        """Why the run, trained or resumed to its end, differs from the uninterrupted one, or ""."""
        return run(*self.train(name, **places)).lost() or difference(self.runs / name, self.whole)


def interrupt_trainings(place, short):
    """trainings killed, or stopped by SIGTERM or Ctrl-C, up to three times at random points, then resumed"""
    rng = random.Random(6)
    calls = {"losses.training_loss": 8, "data._digest": 2, "torch.save": 8, "evaluate.confusion": 8, "os.replace": 12}
    for number in range(3 if short else 20):
        name, cache, points, problem = f"run-{number}", place.root / f"cache-{number}", [], ""
        while len(points) < 3 and not problem:
            target, act = rng.choice(list(calls)), functools.partial(kill, rng.choice(SIGNALS))
            prepare = at_call(target, rng.randint(1, calls[target]), act)
            if rng.random() < 0.2:
                target, seconds = "a random point", rng.uniform(0.05, place.seconds)
                prepare = functools.partial(signal.setitimer, signal.ITIMER_VIRTUAL, seconds)  # CPU time
            attempt = run(*place.train(name, cache=cache), prepare=prepare)
            problem = attempt.lost(status=(0, -signal.SIGKILL, -signal.SIGVTALRM, 130, 143))
            if attempt.status == 0:
                break  # it ended before that point
            points.append(f"{target}, status {attempt.status}")
            if attempt.status > 0 and (place.runs / name / "args.json").exists():
                problem = problem or unless("make resume" in attempt.out, f"does not say how to resume: {attempt.out}")
        problem = problem or place.not_equal(name, cache=cache)
        problem = problem or unless(not list(cache.glob("*.tmp")), "unfinished files left in the cache")
        for point in points or ["not interrupted"]:
            yield f"{name} in {point}", problem


def fill_disk(place, short):
    """a full disk in the write of checkpoints, scores, the cache, masks, zips and data"""
    writes = [("torch.save", 3, "last.pt"), ("torch.save", 6, "best.pt"), ("common.write_text", 4, "best.json")]
    for target, nth, name in writes[: 1 if short else None]:
        problem = run(*place.train(f"full-{name}"), prepare=at_call(target, nth, limit_files)).not_refused(name)
        yield name, problem or place.not_equal(f"full-{name}")
    out = place.root / "full"
    out.mkdir()
    for name in (f"{next(place.images.iterdir()).stem}.png", "a.zip"):
        (out / name).write_bytes(b"older")
    commands = [
        (["data", "--data", place.data, "--cache", out], limit_files),
        ([*place.predict, out], at_call("images.mask_image", 1, limit_files)),
        ([*place.package, out / "a.zip"], at_call("common.atomic", 2, limit_files)),
        (["tools.prepare", "--raw", place.data, "--data", place.root / "full-data"], limit_files),
    ]
    for command, prepare in commands[:2] if short else commands:
        problem = run(*command, prepare=prepare).not_refused("cannot write")
        intact = {path.read_bytes() for path in out.iterdir()} == {b"older"}
        yield command[0], problem or unless(intact, "an older file is damaged, or an unfinished one left")


def lock_folders(place, short):
    """folders without permission, unreadable files, files in place of folders, runs in use"""
    locked, secret = place.root / "locked", place.root / "locked" / "secret.png"
    shutil.copytree(place.whole, locked / "kept")
    shutil.copytree(place.data, locked / "data")
    secret.write_bytes(b"")
    for path in (locked, *locked.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444 if path != secret else 0)
    commands = [
        (*place.train("x"), "--runs", locked),
        (*place.train("x"), "--runs", secret),
        (*place.train("x"), "--cache", locked / "cache"),
        (*place.train("whole"), "--runs", locked, "--resume", "kept"),
        (*place.predict, locked),
        (*place.predict, secret),
        (*place.predict, place.root / "x", "--input", secret),
        (*place.package, locked / "a.zip"),
        ("tools.prepare", "--raw", place.data, "--data", locked / "new"),
        ("tools.synth", "--out", locked / "new"),
        ("tools.report", "--runs", locked),
    ]
    for command in commands[::4] if short else commands:
        yield f"{command[0]} {command[-1]}", run(*command, prepare=drop_capabilities).not_refused(locked)
    attempt = run(*place.train("locked-data", data=locked / "data"), prepare=drop_capabilities)
    yield "read-only data", attempt.lost() or difference(place.runs / "locked-data", place.whole)
    with open(place.whole / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for flags in ([], ["--overwrite", "--name", "whole", "--resume", ""]):
            yield "a run in use", run(*place.train("whole"), *flags).not_refused("another training")


def change_data(place, short):
    """masks that vanish or change before, in and after the start of a training"""
    data, cache = place.root / "changing", place.root / "changing-cache"
    shutil.copytree(place.data, data)
    mask, other = sorted((data / "train/masks").iterdir())[:2]
    kept, change = mask.read_bytes(), functools.partial(shutil.copyfile, other, mask)
    cases = [
        (at_call("data.find_pairs", 1, mask.unlink), mask.stem),
        (at_call("data._digest", 1, mask.unlink), mask.name),
        (at_call("data._build_cache", 1, mask.unlink), mask.name),
        (at_call("data._build_cache", 1, change), "changed while"),
    ]
    for prepare, words in cases[3:] if short else cases:
        attempt = run(*place.train("changed", data=data, cache=cache), prepare=prepare)
        yield words, attempt.not_refused(words) or unless(not (place.runs / "changed").exists(), "a run was created")
        mask.write_bytes(kept)
    stop = at_call("losses.training_loss", 3, functools.partial(kill, signal.SIGTERM))
    run(*place.train("changed", data=data, cache=cache), prepare=stop)
    change()
    yield "resumed", run(*place.train("changed", data=data, cache=cache)).not_refused("other pairs")


class Hostile:
    """Creates the file `executed` when it is unpickled."""

    def __reduce__(self):
        return open, ("executed", "w")


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def bad_checkpoints(place):
    """{case: bytes} of checkpoints that every script must refuse."""
    state, whole = place.content["state_dict"], place.weights.read_bytes()
    changes = {
        "code": {"state_dict": Hostile()},
        "weights of another network": {"state_dict": build("microunet", **TINY | {"widths": [8] * 5}).state_dict()},
        "a missing weight": {"state_dict": dict(list(state.items())[1:])},
        "a list of weights": {"state_dict": [1]},
        "NaN": {"state_dict": state | {"classifier.bias": torch.full((19,), torch.nan)}},
        "11 labels": {"state_dict": state | {"classifier.bias": torch.zeros(11)}},
        "a number as weight": {"state_dict": state | {"classifier.bias": 3}},
        "an unknown network": {"model": "resnet"},
        "a list as network": {"model": ["microunet"]},
        "unknown arguments": {"model_args": {"wings": 2}},
        "unusable arguments": {"model_args": {"widths": "abcde"}},
        "a number as arguments": {"model_args": 5},
        **{f"size {size!r}": {"size": size} for size in ("64", 0, 33, 10**6, None)},
    }
    return {case: saved(place.content | change) for case, change in changes.items()} | {
        "a list": saved([1, 2]),
        "weights alone": saved(state),
        "a module": saved(build("microunet", **TINY)),
        "code in a pickle": pickle.dumps(place.content | {"state_dict": Hostile()}),
        "no bytes": b"",
        "text": b"weights\n",
        "half of it": whole[: len(whole) // 2],
        "all but the last byte": whole[:-1],
    }


def load_checkpoints(place, short):
    """hostile, damaged and foreign checkpoints in every script that loads one"""
    path, image = place.root / "bad.pt", next(place.images.iterdir())
    commands = [
        [*place.predict, place.root / "x", "--weights", path],
        ["evaluate", "--weights", path, "--data", place.data, "--cache", place.cache],
        [*place.package, place.root / "bad.zip", "--weights", path],
        ["tools.run", "--weights", path, "--input", image, "--output", place.root / "bad.png"],
        ["ensemble_tta", "--weights", path, path, "--average-weights", "--input", image, "--output", place.root],
        place.train("from-bad", "--from", path),
    ]
    for number, (case, content) in enumerate(bad_checkpoints(place).items()):
        path.write_bytes(content)
        for command in [commands[number % 6]] if short else commands:
            if command[0] == "train" and case in ("unknown arguments", "unusable arguments"):
                continue  # --from takes the weights alone
            problem = run(*command).not_refused(path.name)
            yield f"{command[0]}, {case}", problem or unless(not Path("executed").exists(), "its code ran")


def resume_from_damage(place, short):
    """runs resumed with a damaged or foreign last.pt, args.json or metrics.jsonl"""
    folder = place.runs / "damaged"
    shutil.copytree(place.whole, folder)
    state = checkpoint.load(folder / "last.pt")
    cases = [("last.pt", (folder / "last.pt").read_bytes()[:-1000]), ("last.pt", (folder / "best.pt").read_bytes())]
    for key, value in (("optimiser", {"state": {}, "param_groups": []}), ("average", None), ("progress", 5)):
        cases.append(("last.pt", saved(state | {key: value})))
    cases += [("args.json", text) for text in (b"{", b"[]", b"{}", b"null", b'{"args": {"wings": 2}}')]
    cases += [("metrics.jsonl", b"null\n[]\n"), ("metrics.jsonl", b"")]
    for name, content in cases[::5] if short else cases:
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        yield f"{name} {content[:20]}", run(*place.train("damaged")).not_refused(name)
        (folder / name).write_bytes(kept)


def zipped(entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def mutated(rng, data):
    """`data` with up to 8 random bytes changed, most of them near its ends; sometimes cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        position = rng.choice((rng.randrange(60), rng.randrange(len(data)), -1 - rng.randrange(400)))
        data[position % len(data)] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


def judge_zips(place, short):
    """submission zips with hostile, missing or damaged members, and with random bytes changed"""
    path, rng = place.root / "bad.zip", random.Random(6)
    yield "a valid zip", run(*place.package, path).lost()
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        z = {name: archive.read(name) for name in archive.namelist()}
    mask, weights = min(z), "solution/ckpt.pth"
    link = zipfile.ZipInfo("solution/link")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    names = ("../x.png", "/masks/x.png", "masks\\x.png", "C:/masks/x.png", "masks/../../x.png", link)
    cases = {
        "members": [z | {name: b""} for name in names] + [z | {"solution/bomb": bytes(1 << 28)}],
        "folders": [{}, z | {"code/x": b""}, {f"mine/{name}": content for name, content in z.items()}],
        "masks": [z | {"masks/x.png": z[mask]}, {name: z[name] for name in z if name != mask}]
        + [z | {mask: content} for content in (b"", z[mask][:200], next(place.images.iterdir()).read_bytes())],
        "solution": [{name: z[name] for name in z if not name.endswith(".py")}],
        "checkpoint": [
            z | {weights: b""},
            z | {weights: z[weights][:-999]},
            z | {weights: saved({"state_dict": Hostile()})},
        ]
        + [
            z | {weights: saved({"state_dict": {"w": torch.full((n,), v)}})} for n, v in ((PARAM_LIMIT, 1), (9, np.nan))
        ],
    }
    for check, entries in cases.items():
        for number, content in enumerate(entries[:1] if short else entries):
            path.write_bytes(zipped(content))
            attempt = run("tools.check_submission", "--zip", path, "--data", place.data)
            found = attempt.status == 1 and f"FAIL  {check}" in attempt.out and not Path("executed").exists()
            yield f"{check} {number}", attempt.trouble() or unless(found, attempt.out + attempt.err)
    for number in range(3 if short else 60):
        path.write_bytes(mutated(rng, whole))
        attempt = run("tools.check_submission", "--zip", path, "--data", place.data)
        yield f"mutation {number}", attempt.trouble() or (attempt.not_refused() if attempt.status not in (0, 1) else "")


def read_images(place, short):
    """images of every format and mode, damaged images, and images with random bytes changed"""
    folder, out, rng = place.root / "images", place.root / "masks", random.Random(6)
    folder.mkdir()
    picture, exif = Image.radial_gradient("L").resize((40, 30)).convert("RGB"), Image.Exif()
    exif[0x0112] = 6  # to be rotated
    for mode, suffix in itertools.product("1 L LA P PA RGB RGBA CMYK YCbCr LAB I F".split(), IMAGE_SUFFIXES):
        with contextlib.suppress(OSError, ValueError, KeyError):  # not every format stores every mode
            picture.convert(mode).save(folder / f"{mode}-{suffix[1:]}{suffix}")
    for name in ("with space", "脸-🙂", "new\nline", "-dash", "$(x)", "\x1b[31m", "bytes-\udcff"):
        picture.save(folder / f"{name}.png", transparency=(0, 0, 0))
    picture.save(folder / "rotated.jpg", exif=exif)
    picture.resize((1, 3000)).save(folder / "tall.png")
    Image.fromarray(np.float32([[np.nan, np.inf], [-np.inf, 1e30]])).save(folder / "not-finite.tif")
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    png, jpg, bmp = (files[folder / f"RGB-{kind}.{kind}"] for kind in ("png", "jpg", "bmp"))
    bomb = bmp[:18] + struct.pack("<2i", 50_000, 50_000) + bmp[26:]
    bad = {"empty.png": b"", "text.jpg": b"text", "cut.png": png[:99], "half.jpg": jpg[:400], "bomb.bmp": bomb}
    mutants = {f"mutant-{i}.png": mutated(rng, rng.choice(list(files.values()))) for i in range(30 if short else 600)}
    for name, content in (bad | mutants).items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    (folder / "nowhere.png").symlink_to("nothing")
    attempt = run(*place.predict, out, "--input", folder)
    problem = attempt.trouble() or unless(attempt.status == 2, f"status {attempt.status}")
    for path in sorted(folder.iterdir()):
        mask, refused = out / f"{path.stem}.png", attempt.err.count(f"{path}: ")
        lost = mask.is_file() + refused != 1 or (path in files and refused) or (path.name in bad and not refused)
        if mask.is_file() and path in files:
            with Image.open(mask) as image:
                lost = lost or image.mode != "P" or image.size != read_image(path).shape[1::-1]
        yield ascii(path.name), problem or unless(not lost, f"mask: {mask.is_file()}, lines: {refused}")


def train_on_masks(place, short):
    """bad masks and images among the training pairs"""
    data, cache, labels = place.root / "bad-data", place.root / "bad-cache", np.zeros((512, 512), np.uint8)
    shutil.copytree(place.data, data)
    path, image = (min((data / "train" / kind).iterdir()) for kind in ("masks", "images"))
    colours, file = Image.fromarray(np.uint8(COLOURS)[labels]), io.BytesIO()
    mask_image(labels).convert("L").save(file, "JPEG")
    cases = [b"", b"text", path.read_bytes()[:300], file.getvalue(), colours, mask_image(labels[:256, :256])]
    cases += [mask_image(labels + 19), Image.fromarray(labels > 0), Image.fromarray(labels.astype(np.uint16))]
    for number, content in enumerate(cases[::4] if short else cases):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path)
        problem = run(*place.train("bad-data", data=data, cache=cache)).not_refused(path.name)
        audit = run("tools.audit", "--data", data)
        yield f"mask {number}", problem or audit.trouble() or unless(audit.status == 1, f"audit: {audit.status}")
    mask_image(labels).save(path)
    for content in (b"", image.read_bytes()[:500]):
        image.write_bytes(content)
        yield "an image", run("data", "--data", data, "--cache", cache).not_refused(image.name)


def spoil_numbers(place, short):
    """losses, gradients and weights that are not finite, divergence, images of one colour"""
    nan, inf = float("nan"), float("inf")
    cases = [
        ("losses.training_loss", 5, lambda loss: loss * nan),
        ("losses.training_loss", 3, lambda loss: loss * inf),
        ("torch.nn.utils.clip_grad_norm_", 4, lambda norm: norm * nan),
        ("evaluate.segmentation_loss", 2, lambda loss: loss * nan),
        ("train.update_average", 2, lambda loss: loss * nan),
    ]
    for number, (target, nth, change) in enumerate(cases[:1] if short else cases):
        attempt = run(*place.train(f"nan-{number}"), prepare=at_call(target, nth, change=change))
        yield f"{target}", attempt.not_refused("try a lower --lr") or place.not_equal(f"nan-{number}")
    data = place.root / "plain"
    shutil.copytree(place.data, data)
    for image, mask in zip((data / "train/images").iterdir(), (data / "train/masks").iterdir(), strict=True):
        Image.new("RGB", (512, 512), "red").save(image)
        mask_image(np.zeros((512, 512), np.uint8)).save(mask)
    cases = ["--lr=100", "--lr=100 --optimiser=adamw --clip=0", "--class-weights=balanced --focal=2 --dice-over=all"]
    for number, flags in enumerate(cases):
        folder = place.runs / f"plain-{number}"
        attempt = run(*place.train(folder.name, *flags.split(), data=data, cache=place.root / "plain-cache"))
        problem = attempt.not_refused("try a lower --lr") if attempt.status else attempt.lost()
        if not problem and (folder / "best.pt").exists():
            checkpoint.load_model(folder / "best.pt")
        yield flags, problem


def pass_bad_flags(place, short):
    """flags out of range"""
    commands = {
        tuple(place.train("flags")): "--lr=nan --lr=inf --ema=1 --smoothing=nan --class-weights=nan --model-args=[[[[ "
        '--model-args={"widths":[0,0,0,0,0]} --model-args={"widths":"x"} --model-args={"decoder":[8]} --batch=0 '
        f"--sizes=33 --device=meta --device=cuda:99 --device= --name={'x' * 300} --threads=-1 --train-score=-1 "
        f"--data={'x' * 5000} --from={'x' * 5000} --seed=1e3 --val-split=0.01 --val-split=nan --recipe=x --name=a/b",
        (
            *place.predict,
            place.root / "x",
        ): "--size=33 --views=nan --device=meta --input= --weights=x --box=1",
        ("evaluate", "--weights", place.weights, "--data", place.data): "--size=31 --val-split=nan --split-seed=-1",
        ("tools.check_submission", "--data", place.data): f"--zip={'z' * 5000} --zip={place.root} --phase=x",
        ("tools.synth", "--out", place.root / "new"): f"--size=-1 --train=-1 --out={'s' * 300}",
        ("tools.prepare",): f"--raw={'r' * 5000} --raw={place.root}",
        ("tools.audit",): f"--data={'d' * 5000} --workers=0",
        ("model",): "--model-args={ --model-args=[1] --model=x",
    }
    cases = [(command, flag) for command, flags in commands.items() for flag in flags.split()]
    for command, flag in cases[::8] if short else cases:
        yield f"{command[0]} {flag[:60]}", run(*command, flag).not_refused()


def predict_again(place, short):
    """masks predicted again, one by one and in another order"""
    folder, views = place.data / "train/images", ("--views", "flip,scales")
    problem = run(*place.predict, place.root / "once", *views, "--input", folder).lost()
    for path in sorted(folder.iterdir(), reverse=True)[: 2 if short else 14]:
        problem = problem or run(*place.predict, place.root / "again", *views, "--input", path).lost()
        once, again = ((place.root / name / f"{path.stem}.png").read_bytes() for name in ("once", "again"))
        yield path.name, problem or unless(once == again, "the mask differs")


def fuzz(place, short):
    """random augmentation, mixing, scores and flags against plain formulas"""
    from checks import test_faults

    for name in [] if short else [name for name in vars(test_faults) if name.startswith("test_fuzz")]:
        try:
            problem = getattr(test_faults, name)() or ""
        except Exception as error:
            problem = repr(error)[:500]
        yield from ((name, problem) for _ in range(test_faults.EXAMPLES))


ATTACKS = {
    attack.__name__: attack
    for attack in (
        *(interrupt_trainings, fill_disk, lock_folders, change_data, load_checkpoints, resume_from_damage, judge_zips),
        *(read_images, train_on_masks, spoil_numbers, pass_bad_flags, predict_again, fuzz),
    )
}


def attack(task):
    """(name, attempts, losses) of an attack; runs in a worker process."""
    name, place, short = task
    attempts, losses = 0, []
    for case, problem in ATTACKS[name](place, short):
        attempts += 1
        if problem:
            losses.append(f"{case}: {problem}")
            print(f"LOSS  {name}, {losses[-1]}", flush=True)
    return name, attempts, losses


def main():
    parser = ArgumentParser(description="Attack everything and count the losses.")
    parser.switch("--short", help="a few attempts of each attack")
    parser.add_argument("--only", default=",".join(ATTACKS), help="attacks, with commas")
    parser.switch("--write", help="write runs/faults.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin, record, context = time.monotonic(), {}, multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        place = Place(Path(root).resolve())
        tasks = [(name, place, args.short) for name in args.only.split(",")]
        with ProcessPoolExecutor(os.cpu_count(), context) as pool:
            for name, attempts, losses in pool.map(attack, tasks):
                record[ATTACKS[name].__doc__] = {"attempts": attempts, "losses": losses}
    print("| attack | attempts | losses |\n|---|---|---|")
    for what, counts in record.items():
        print(f"| {what} | {counts['attempts']} | {len(counts['losses'])} |")
    minutes = round((time.monotonic() - begin) / 60, 1)
    print(f"{minutes} minutes")
    if args.write:
        write_text("runs/faults.json", json.dumps({"minutes": minutes, "attacks": record}, indent=1) + "\n")
    return int(any(counts["losses"] for counts in record.values()))


if __name__ == "__main__":
    run_main(main)
