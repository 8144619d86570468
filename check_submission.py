"""Judge a Codabench zip, ours or another's: a line for every check and every fault, exit status 1 where there is one.

python check_submission.py --zip runs/a/submission-test.zip
python check_submission.py --zip runs/a/submission-test.zip --run 5

Reading a zip executes nothing of it. With --run, its run.py is executed in an empty folder, as the organisers do, and
its masks are compared with those in the zip: do that with zips you trust.
"""

import argparse
import contextlib
import io
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from checkpoint import restore
from data import resolve
from errors import ArgumentParser, UserError, run_main
from images import UNREADABLE, image_files, read_image
from labels import NUM_CLASSES, PALETTE
from model import MODELS
from parameters import PARAM_LIMIT, count_parameters
from terminal import printable

MAX_BYTES, MAX_MEMBERS = 2**30, 10_000  # of an unpacked zip, far above a sound one's 20 MB
MAX_GROWTH, SMALL = 100, 2**25  # a file grows no more than so many times, unless it stays small
TIME_LIMIT = 180  # seconds for one image, the start of Python and torch included
SHOWN = 20  # faults of one check that are named
# run.py finds its own folder and the installed packages, but nothing of PYTHONPATH.
ISOLATED = ("-E",)
JUNK = ("__MACOSX", ".DS_Store")
FILES = ("ckpt.pth", "requirements.txt", "run.py")
UNZIPPABLE = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, EOFError, ValueError)
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Finding(NamedTuple):
    """One line of the table; status is ok, FAIL or note."""

    status: str
    check: str
    detail: str
    count: int = 1  # of the faults it tells of


def verdict(check, faults, fine):
    """A FAIL for each fault (the first SHOWN of them), or an ok saying `fine`."""
    told, left = [Finding("FAIL", check, fault) for fault in faults[:SHOWN]], len(faults) - SHOWN
    if left > 0:
        told.append(Finding("FAIL", check, f"and {left} more", left))
    return told or [Finding("ok", check, fine)]


def content(archive, info):
    """The bytes of a member, at most those it declares; UserError where it cannot be unpacked."""
    try:
        with archive.open(info) as file:
            return file.read(info.file_size)
    except UNZIPPABLE as error:
        raise UserError(f"{info.filename} cannot be unpacked: {error}") from None


def unsafe(info):
    """What makes a member unfit to be unpacked, or None."""
    path, kind = PurePosixPath(info.filename), stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or device, not a file"
    if path.is_absolute() or "\\" in info.filename or ":" in "".join(path.parts[:1]):
        return "has an absolute path or a backslash"
    if ".." in path.parts or not path.parts:
        return "leads out of its folder"
    return "is encrypted" if info.flag_bits & 1 else None


def check_members(archive):
    """({path parts: member} of the files fit to be read, findings); nothing is read of a zip bomb."""
    infos = archive.infolist()
    total = sum(info.file_size for info in infos)
    bombs = [
        f"{info.filename} claims to grow {info.file_size // max(info.compress_size, 1)}-fold when unpacked"
        for info in infos
        if info.file_size > max(SMALL, MAX_GROWTH * info.compress_size)
    ]
    if total > MAX_BYTES:
        bombs.append(f"{total:,} bytes unpacked, more than {MAX_BYTES:,}")
    if len(infos) > MAX_MEMBERS:
        bombs.append(f"{len(infos):,} members, more than {MAX_MEMBERS:,}")
    if bombs:
        return None, verdict("members", bombs, "")
    faults, files, junk = [], {}, 0
    for info in infos:
        parts = PurePosixPath(info.filename).parts
        if problem := unsafe(info):
            faults.append(f"{info.filename} {problem}")
        elif set(parts) & set(JUNK):
            junk += 1
        elif info.is_dir():
            continue
        elif parts in files:
            faults.append(f"{info.filename} is there twice")
        else:
            files[parts] = info
    findings = verdict("members", faults, f"{len(infos)}, {total / 1e6:.1f} MB unpacked")
    if junk:
        findings.append(Finding("note", "members", f"{junk} of macOS ({', '.join(JUNK)}), passed over"))
    return files, findings


def check_folders(files, phase):
    """(the files with paths as they should be, findings): masks/ (and solution/) at the top and nothing beside them."""
    wanted = ("masks", "solution")
    if len({parts[0] for parts in files}) == 1 and all(len(p) > 2 and p[1] in wanted for p in files):
        top = next(iter(files))[0]
        fault = f"all lies one folder too deep, in {top}/: zip the contents of {top}, not {top} itself"
        return {parts[1:]: info for parts, info in files.items()}, verdict("folders", [fault], "")
    tops = {parts[0] for parts in files if len(parts) > 1}
    needed = wanted if phase == "test" else wanted[:1]
    faults = [f"no folder {name}/ at the top" for name in needed if name not in tops]
    faults += [f"folder {name}/ does not belong at the top" for name in sorted(tops.difference(wanted))]
    faults += [f"{parts[0]} lies at the top, outside of masks/" for parts in files if len(parts) == 1]
    return files, verdict("folders", faults, f"{', '.join(f'{name}/' for name in sorted(tops))} at the top")


def mask_labels(data, height, width):
    """uint8 labels (height, width) of a mask file's bytes. UserError for what is not as the challenge asks."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.size != (width, height):
                raise UserError(f"is {image.width} x {image.height}, its image {width} x {height}")
            if image.mode != "P":
                raise UserError(f"is of mode {image.mode}, not P (one channel with a palette)")
            labels, palette = np.array(image), image.getpalette()[: len(PALETTE)]
    except UNREADABLE as error:
        raise UserError(f"is no readable PNG: {error}") from None
    if labels.max() >= NUM_CLASSES:
        raise UserError(f"holds label {labels.max()}; labels are 0 to {NUM_CLASSES - 1}")
    if palette != PALETTE[: len(palette)] or len(palette) < 3 * (labels.max() + 1):
        raise UserError("has another palette than the challenge's")
    return labels


def check_masks(archive, files, images):
    """({image: labels} of the sound masks, findings): one for every image and no other file."""
    expected = {f"{path.stem}.png": path for path in images}
    present = {"/".join(parts[1:]): info for parts, info in files.items() if parts[0] == "masks" and parts[1:]}
    names = [f"masks/{name} is missing" for name in expected if name not in present]
    names += [f"masks/{name} belongs to no image" for name in present if name not in expected]
    masks, faults = {}, []
    for name in sorted(expected.keys() & present.keys()):
        path = expected[name]
        try:
            masks[path] = mask_labels(content(archive, present[name]), *read_image(path).shape[:2])
        except UserError as error:
            faults.append(f"masks/{name} {error}")
    findings = verdict("names", names, f"a mask for each of {len(images)} images")
    if masks or faults:
        findings += verdict("masks", faults, f"{len(masks)} in mode P, palette and labels as they should be")
    return masks, findings


def check_checkpoint(data):
    """Findings on the bytes of ckpt.pth: plain tensors, a state_dict, fewer parameters than the limit."""
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if sum(info.file_size for info in archive.infolist()) > MAX_BYTES:
                    return verdict("checkpoint", [f"ckpt.pth claims to unpack to more than {MAX_BYTES:,} bytes"], "")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about old or foreign formats
            held = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's bytes can make the reader raise anything; that is the finding
        reason = str(error).strip().split("\n")[0][:120]
        return verdict("checkpoint", [f"ckpt.pth is damaged or holds more than plain tensors: {reason}"], "")
    state = held.get("state_dict") if isinstance(held, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        return verdict("checkpoint", ['ckpt.pth has no "state_dict" of tensors'], "")
    if not all(bool(tensor.isfinite().all()) for tensor in state.values() if tensor.is_floating_point()):
        return verdict("checkpoint", ["its state_dict holds weights that are no finite numbers"], "")
    if isinstance(held.get("model"), str) and held["model"] in MODELS and "model_args" in held:
        try:
            count, how = count_parameters(restore(held, "ckpt.pth")), f"a {held['model']}"
        except (UserError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
            return verdict("checkpoint", [f"its state_dict does not load into its model: {error}"], "")
    else:
        count = sum(tensor.numel() for name, tensor in state.items() if not str(name).endswith(BUFFERS))
        how = f"counted by name, those ending in {', '.join(BUFFERS)} left out"
    over = [] if count < PARAM_LIMIT else [f"{count:,} ({how}); fewer than {PARAM_LIMIT:,} are allowed"]
    fine = f"{count:,} ({how}), fewer than {PARAM_LIMIT:,}"
    return verdict("checkpoint", [], "plain tensors with a state_dict") + verdict("parameters", over, fine)


def check_solution(archive, files):
    """Findings on the files of solution/; none where there is no such folder."""
    solution = {"/".join(parts[1:]): info for parts, info in files.items() if parts[0] == "solution"}
    if not solution:
        return []
    findings = verdict(
        "solution", [f"solution/{name} is missing" for name in FILES if name not in solution], ", ".join(FILES)
    )
    if "ckpt.pth" in solution:
        try:
            findings += check_checkpoint(content(archive, solution["ckpt.pth"]))
        except UserError as error:
            findings += verdict("checkpoint", [str(error)], "")
    return findings


def execute(folder, image, target):
    """Run folder/run.py on an image as the organisers do; UserError where it fails or takes too long."""
    command = [
        sys.executable, *ISOLATED, "run.py", "--input", str(image), "--output", str(target), "--weights", "ckpt.pth",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            raise UserError(f"run.py took more than {TIME_LIMIT} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with it whatever it has started
            process.wait()
        log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
        last = log.read().decode(errors="replace").strip().split("\n")[-1]
    if status:
        raise UserError(f"run.py ended with status {status}: {last}")
    if not target.is_file():
        raise UserError(f"run.py wrote no mask: {last}")


def check_run(archive, files, masks, images, run):
    """Findings of run.py's masks on `run` images, the first and the last among them, against those in the zip."""
    chosen = [images[i] for i in sorted(set(np.linspace(0, len(images) - 1, run).round().astype(int)))]
    faults, seconds = [], []
    with tempfile.TemporaryDirectory(prefix="solution-") as folder:
        for parts, info in files.items():
            if parts[0] == "solution":
                path = Path(folder, *parts)
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content(archive, info))
                except (OSError, UserError) as error:
                    return verdict("run", [f"{info.filename} cannot be unpacked: {error}"], "")
        for path in chosen:
            target, start = Path(folder, f"{path.stem}.png"), time.monotonic()
            try:
                execute(Path(folder, "solution"), path.resolve(), target)
                labels = mask_labels(target.read_bytes(), *read_image(path).shape[:2])
            except UserError as error:
                faults.append(f"{path.name}: {error}")
                continue
            seconds.append(time.monotonic() - start)
            if path not in masks:
                faults.append(f"{path.name}: masks/ holds no right mask to compare with that of run.py")
            elif differing := np.count_nonzero(labels != masks[path]):
                faults.append(f"{path.name}: run.py and masks/ differ in {differing:,} of {labels.size:,} pixels")
    fine = f"run.py gives the same masks for {len(chosen)} images, {np.mean(seconds or 0):.1f} s each"
    return verdict("run", faults, fine)


def judge(zip_path, images_dir, phase, run=0):
    """Findings, a list, on a zip for the images of a folder; phase is test or dev, `run` a number of images.

    With `run` above 0 the zip's run.py is executed. UserError where the zip or the images cannot be read at all.
    """
    if run < 0:
        raise UserError(f"--run {run}: give a number of images, 0 for none")
    images = image_files(images_dir)
    try:
        archive = zipfile.ZipFile(zip_path)
    except FileNotFoundError:
        raise UserError(f"no file {zip_path}") from None
    except UNZIPPABLE as error:
        raise UserError(f"{zip_path} is no zip or a damaged one: {error}") from None
    with archive:
        files, findings = check_members(archive)
        if files is None:
            return findings
        files, more = check_folders(files, phase)
        masks, of_masks = check_masks(archive, files, images)
        findings += more + of_masks + check_solution(archive, files)
        if run and ("solution", "run.py") in files:
            findings += check_run(archive, files, masks, images, run)
    return findings


def show(findings):
    """Print the table; the number of faults."""
    for finding in findings:
        # Names in a stranger's zip may hold control characters.
        print(f"{finding.status:4}  {finding.check:10}  {printable(finding.detail)}")
    return sum(finding.count for finding in findings if finding.status == "FAIL")


def guess_phase(zip_path):
    """test for a zip with a folder solution, dev for another."""
    try:
        with zipfile.ZipFile(zip_path) as archive:
            return "test" if any("solution/" in name for name in archive.namelist()) else "dev"
    except UNZIPPABLE:
        return "test"  # judge() says what is wrong with it


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--zip", required=True, help="zip to judge")
    parser.add_argument("--data", help="folder with test/images and dev/images; default ./data, else drawn faces")
    parser.add_argument("--images", help="folder of the images, instead of the phase's in --data")
    parser.add_argument("--phase", choices=("auto", "test", "dev"), default="auto", help="auto: test with solution/")
    parser.add_argument("--run", type=int, default=0, help="EXECUTE the zip's run.py on so many images")
    args = parser.parse_args()
    phase = guess_phase(args.zip) if args.phase == "auto" else args.phase
    images = args.images or resolve(args.data) / phase / "images"
    faults = show(judge(args.zip, images, phase, args.run))
    print(f"{args.zip}: {f'{faults} faults' if faults else 'fine'} as a zip of the {phase} phase")
    if phase == "test" and not args.run:
        print("Not executed: its run.py; --run 5 does that on 5 images and compares the masks")
    return 1 if faults else 0


if __name__ == "__main__":
    run_main(main)
