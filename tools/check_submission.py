"""Check a Codabench zip, ours or anyone's: one line per check, exit status 1 if one fails.

python -m tools.check_submission --zip runs/a/submission-test.zip
python -m tools.check_submission --zip runs/a/submission-test.zip --run 5

Nothing in the zip is executed unless --run is given. Then its run.py is executed in an empty folder, as the organisers
do, and its masks are compared with those in the zip: use it only on zips you trust.
"""

import io
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from common import ArgumentParser, UserError, natural, printable, run_main

import numpy as np
import torch

from checkpoint import leaves
from data import find_data_of
from images import DECODE_ERRORS, image_files, open_image, read_image, require_file
from labels import NUM_CLASSES, PALETTE
from model import PARAM_LIMIT

MAX_BYTES, MAX_MEMBERS = 2**28, 10_000  # against decompression bombs; a valid zip unpacks to less than 20 MB
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks the others without a limit
TIME_LIMIT = 180  # seconds for one image, including the start of Python and torch
PYTHON = (sys.executable, "-EB")  # -E ignores PYTHONPATH: only run.py's folder and installed packages; -B: no bytecode
FILES = ("ckpt.pth", "requirements.txt", "run.py")
# Batch norm's buffers are no parameters: tensors of these names, of this many values in all.
BUFFERS, MAX_BUFFERS = ("running_mean", "running_var", "num_batches_tracked"), 100_000
MAX_REST = 2**19  # bytes of solution/ beside the tensors, such as code; beyond, two count as a parameter


def verdict(check, faults, success=""):
    """Findings (status, check, detail): a FAIL for each of the first faults, or one ok with the text `success`."""
    if len(faults) > 10:
        faults = [*faults[:5], f"{len(faults) - 5} more"]
    return [("FAIL", check, fault) for fault in faults] or [("ok", check, success)]


def read_zip(source):
    """({name: bytes} of a zip's files, faults); reads nothing of a bomb. UserError if it is not a zip or damaged."""
    files, faults = {}, []
    try:
        with zipfile.ZipFile(source) as archive:
            infos = archive.infolist()
            if len(infos) > MAX_MEMBERS or sum(info.file_size for info in infos) > MAX_BYTES:
                return {}, [f"more than {MAX_MEMBERS:,} files or {MAX_BYTES:,} bytes unpacked"]
            for info in infos:
                name, parts = info.filename, info.filename.removesuffix("/").split("/")
                if stat.S_ISLNK(info.external_attr >> 16) or info.compress_type not in COMPRESSIONS:
                    faults.append(f"{name} is a link, or not compressed by deflate")
                elif {"", ".", ".."} & set(parts) or ":" in parts[0] or "\\" in name:
                    faults.append(f"{name} has an absolute path, a backslash, . or .. in its path")
                elif name in files:
                    faults.append(f"{name} occurs twice")
                elif not info.is_dir() and parts[0] != "__MACOSX" and parts[-1] != ".DS_Store":
                    with archive.open(info) as file:
                        files[name] = file.read(info.file_size)  # never more than it declares
    except (*DECODE_ERRORS, zipfile.BadZipFile) as error:
        raise UserError(f"{source} is not a readable zip: {error}") from None
    faults += [f"{name} lies in a file" for name in files if files.keys() & set(map(str, PurePosixPath(name).parents))]
    return files, faults


def check_folders(files, phase):
    """Findings on the top level: masks/, in the test phase also solution/, and nothing else."""
    top = {name if "/" not in name else name.split("/")[0] + "/" for name in files}
    missing = {"masks/", "solution/"} - top if phase == "test" else {"masks/"} - top
    faults = [f"no folder {name} at the top of the zip (phase {phase})" for name in sorted(missing)]
    if len(top) == 1 and missing and any("/masks/" in name for name in files):
        return verdict("folders", [f"everything is inside {top.pop()}: zip its contents, not the folder"])
    faults += [f"{name} does not belong at the top of the zip" for name in sorted(top - {"masks/", "solution/"})]
    return verdict("folders", faults, " and ".join(sorted(top)))


def read_labels(data, height, width):
    """Labels (height, width) uint8 of a mask file's bytes. UserError if it is not as the challenge requires."""
    try:
        with open_image(io.BytesIO(data), formats=("PNG",)) as image:
            if image.size != (width, height):
                raise UserError(f"is {image.width} x {image.height}, but its image {width} x {height}")
            if image.mode != "P":
                raise UserError(f"has mode {image.mode}, not P (one channel with a palette)")
            labels, palette = np.array(image), image.getpalette()[: len(PALETTE)]
    except DECODE_ERRORS:
        raise UserError("is not a readable PNG") from None
    if labels.max() >= NUM_CLASSES:
        raise UserError(f"contains label {labels.max()}; labels are 0 to {NUM_CLASSES - 1}")
    if palette != PALETTE[: len(palette)] or len(palette) < 3 * (labels.max() + 1):
        raise UserError("has another palette than the challenge's")
    return labels


def check_masks(files, images):
    """({image: labels} of the valid masks, findings): one mask per image and no other file."""
    expected = {f"masks/{path.stem}.png": path for path in images}
    if len(expected) < len(images):
        raise UserError(f"{images[0].parent} has two images of one name, which would share a mask; rename one")
    extra = sorted(files.keys() - expected.keys())
    masks, faults = {}, [f"{name} belongs to no image" for name in extra if name.startswith("masks/")]
    for name, path in expected.items():
        try:
            if name not in files:
                raise UserError("is missing")
            masks[path] = read_labels(files[name], *read_image(path).shape[:2])
        except UserError as error:
            faults.append(f"{name} {error}")
    return masks, verdict("masks", faults, f"{len(masks)}, one per image; size, mode, palette and labels are right")


def check_checkpoint(files):
    """The number of parameters in solution/, as text; executes nothing in it. UserError if ckpt.pth is invalid.

    All tensors in ckpt.pth count, but for batch norm's buffers, and what exceeds MAX_REST beside them.
    """
    data = files["solution/ckpt.pth"]
    try:
        if zipfile.is_zipfile(io.BytesIO(data)) and (faults := read_zip(io.BytesIO(data))[1]):
            raise ValueError(faults[0])
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        # Those that share their values count once.
        tensors = {(t.data_ptr(), t.shape): t for t in leaves(content) if isinstance(t, torch.Tensor)}.values()
    except Exception as error:  # foreign bytes make the reader raise anything
        raise UserError(f"ckpt.pth is damaged or contains more than tensors: {str(error)[:120]}") from None
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError('ckpt.pth has no "state_dict" of tensors')
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise UserError("ckpt.pth contains weights that are not finite")
    buffers = sum(tensor.numel() for name, tensor in state.items() if str(name).endswith(BUFFERS))
    size = sum(len(files[name]) for name in files if name.startswith("solution/"))
    rest = size - sum(tensor.nbytes for tensor in tensors)
    count = sum(tensor.numel() for tensor in tensors) - min(buffers, MAX_BUFFERS) + max(0, rest - MAX_REST) // 2
    if count >= PARAM_LIMIT:
        raise UserError(f"ckpt.pth has {count:,} parameters, with all entries; fewer than {PARAM_LIMIT:,} are allowed")
    return f"{count:,} parameters, fewer than {PARAM_LIMIT:,}"


def check_solution(files):
    """Findings on the files of solution/."""
    missing = [f"solution/{name} is missing" for name in FILES if f"solution/{name}" not in files]
    findings = verdict("solution", missing, ", ".join(FILES))
    if "solution/ckpt.pth" in files:
        try:
            findings += verdict("checkpoint", [], check_checkpoint(files))
        except (UserError, RuntimeError) as error:  # torch raises the latter for unusual tensors
            findings += verdict("checkpoint", [str(error)])
    return findings


def execute(folder, image):
    """Labels (H, W) uint8 of an image by folder/run.py, executed as the organisers do. UserError or TimeoutExpired."""
    target = folder.parent / f"{image.stem}.png"
    command = [*PYTHON, "run.py", "--input", image.resolve(), "--output", target, "--weights", "ckpt.pth"]
    done = subprocess.run(command, cwd=folder, input="", capture_output=True, errors="replace", timeout=TIME_LIMIT)
    if done.returncode or not target.is_file():
        raise UserError(f"run.py ended with status {done.returncode} or wrote no mask: {done.stderr[-300:]}")
    return read_labels(target.read_bytes(), *read_image(image).shape[:2])


def check_run(files, masks, images, run):
    """Findings on run.py's masks of `run` images, the first and last among them, compared with those in the zip."""
    chosen = [images[i] for i in sorted(set(np.linspace(0, len(images) - 1, run).round().astype(int)))]
    faults = []
    with tempfile.TemporaryDirectory(prefix="solution-") as folder:
        try:
            for name in (name for name in files if name.startswith("solution/")):
                Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, name).write_bytes(files[name])
        except OSError as error:
            return verdict("run", [f"solution/ cannot be unpacked: {error.strerror}"])
        for path in chosen:
            try:
                labels = execute(Path(folder, "solution"), path)
                if path in masks and (differing := np.count_nonzero(labels != masks[path])):
                    raise UserError(f"run.py and masks/ differ in {differing:,} of {labels.size:,} pixels")
            except (UserError, subprocess.TimeoutExpired) as error:
                faults.append(f"{path.name}: {error}")
    return verdict("run", faults, f"run.py predicts the same masks for {len(chosen)} images")


def judge(zip_path, images_dir, phase, run=0):
    """Findings [(ok or FAIL, check, detail), ...] on a zip, whose run.py predicts `run` images; phase: test, dev."""
    images = image_files(images_dir)
    files, faults = read_zip(zip_path)
    masks, of_masks = check_masks(files, images)
    findings = verdict("members", faults, f"{len(files)} files") + check_folders(files, phase) + of_masks
    if phase == "test" or "solution/run.py" in files:
        findings += check_solution(files)
    if run > 0 and "solution/run.py" in files:
        findings += check_run(files, masks, images, run)
    return findings


def show(findings):
    """Print the findings; True if no check failed."""
    for status, check, detail in findings:
        print(f"{status:4}  {check:10}  {printable(detail)}")
    return all(status != "FAIL" for status, _, _ in findings)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--zip", required=True, help="zip to check")
    parser.add_argument("--data", help="folder with test/images and dev/images; default that of the run, else ./data")
    parser.add_argument("--phase", choices=("test", "dev"), default="test", help="dev: only masks are needed")
    parser.add_argument("--run", type=natural, default=0, help="number of images on which to EXECUTE the zip's run.py")
    args = parser.parse_args()
    require_file(args.zip)
    valid = show(judge(args.zip, find_data_of(args.zip, args.data) / args.phase / "images", args.phase, args.run))
    print(f"{args.zip}: {'valid' if valid else 'NOT valid'} for the {args.phase} phase")
    return 0 if valid else 1


if __name__ == "__main__":
    run_main(main)
