"""Audit a data folder: pairs, files, sizes, modes, labels, duplicates, and masks with left and right reversed.

python audit.py --data data
python audit.py --data data --list > faults.txt

Exit status 0 where all is well, 1 where something is wrong, 2 where there is nothing to audit. Reversed masks are told
and do no harm: training repairs them in memory.
"""

import argparse
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from data import resolve
from errors import ArgumentParser, UserError, positive, run_main
from labels import NAMES, NUM_CLASSES
from parallel import in_parallel
from prepare import open_image
from sides import reversed_sides
from terminal import printable

SIZE = (512, 512)
REVERSED = "left and right reversed"
CHECKS = (
    "file of another type", "name used twice", "image without mask", "mask without image", "unreadable",
    "not 512 x 512", "image not RGB", "mask not P or L", "label above 18", "same picture twice", REVERSED,
)  # fmt: skip


def _list(folder, data, suffixes, faults):
    """The folder's files of these suffixes by name; others and names used twice go to `faults`."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; `make data RAW=/path/to/download` makes one")
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    wanted = [p for p in files if p.suffix.lower() in suffixes and p.is_file()]
    if not wanted:
        raise UserError(f"no {' or '.join(suffixes)} files in {folder}; `make data RAW=/path/to/download` makes them")
    uses = Counter(p.stem for p in wanted)
    faults["file of another type"] += [_short(p, data) for p in sorted(set(files) - set(wanted))]
    faults["name used twice"] += [_short(p, data) for p in wanted if uses[p.stem] > 1]
    return wanted


def _short(path, data):
    return printable(path.relative_to(data).as_posix())


def inspect(path):
    """What is wrong with one image or mask (by its folder's name): (checks it fails, digest of an image's pixels or
    None, pixels (19,) int64 of each label of a mask or None)."""
    try:
        image = open_image(path.read_bytes(), path)
    except (UserError, OSError):
        return ["unreadable"], None, None
    faults = ["not 512 x 512"] if image.size != SIZE else []
    if path.parent.name == "images":
        if image.mode != "RGB":
            faults.append("image not RGB")
        pixels = np.asarray(image.convert("RGB"))
        return faults, hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest(), None
    if image.mode not in ("P", "L"):
        return [*faults, "mask not P or L"], None, None
    mask = np.asarray(image)
    if mask.max() >= NUM_CLASSES:
        return [*faults, "label above 18"], None, None
    if reversed_sides(mask):
        faults.append(REVERSED)
    return faults, None, np.bincount(mask.ravel(), minlength=NUM_CLASSES)


def audit(data, workers=None):
    """Audit DATA/train, and DATA/dev and DATA/test where they are.

    Returns ({check: [names below DATA]}, pixels (M, 19) of each label in each readable mask, number of files).
    UserError where a folder is missing or empty.
    """
    data = Path(data)
    faults = {check: [] for check in CHECKS}
    images = _list(data / "train" / "images", data, (".jpg", ".jpeg", ".png"), faults)
    masks = _list(data / "train" / "masks", data, (".png",), faults)
    image_stems, mask_stems = {p.stem for p in images}, {p.stem for p in masks}
    faults["image without mask"] += [_short(p, data) for p in images if p.stem not in mask_stems]
    faults["mask without image"] += [_short(p, data) for p in masks if p.stem not in image_stems]
    for split in ("dev", "test"):
        if (data / split).is_dir():
            images += _list(data / split / "images", data, (".jpg", ".jpeg", ".png"), faults)

    files, first, pixels = images + masks, {}, []
    for path, (failed, digest, counts) in zip(files, in_parallel(inspect, files, workers, "auditing"), strict=True):
        for check in failed:
            faults[check].append(_short(path, data))
        if digest is not None and first.setdefault(digest, path) != path:
            faults["same picture twice"].append(f"{_short(path, data)} = {_short(first[digest], data)}")
        if counts is not None:
            pixels.append(counts)
    return faults, np.array(pixels, np.int64).reshape(-1, NUM_CLASSES), len(files)


def report(faults, pixels, files, data, every=False):
    """The tables as text; `every` names all files instead of the first two of each check."""
    lines = [f"{'check':<24} {'count':>5}  first"]
    for check, names in faults.items():
        first = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
        lines.append(f"{check:<24} {len(names):>5}  {first}".rstrip())
    shares = pixels / np.maximum(pixels.sum(1, keepdims=True), 1)
    lines += ["", f"{'label':<13} {'% of pixels':>11} {'% of images':>11}"]
    for label, name in enumerate(NAMES):
        share, present = (100 * a[:, label].mean() if len(a) else 0 for a in (shares, pixels > 0))
        lines.append(f"{label:>2} {name:<10} {share:>11.2f} {present:>11.1f}")
    if every:
        lines += ["", *(f"{check}: {name}" for check, names in faults.items() for name in names)]
    lines += ["", f"{data}: {files} files, {len(pixels)} masks counted, {wrong(faults)} faults"]
    if faults[REVERSED]:
        lines[-1] += f"; masks with sides reversed, here {len(faults[REVERSED])}, are no faults: training repairs them"
    return "\n".join(lines)


def wrong(faults):
    """How many faults of `audit` a training would suffer from: all but reversed masks."""
    return sum(len(names) for check, names in faults.items() if check != REVERSED)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", help="folder with train/, dev/ and test/; default ./data, else drawn faces")
    parser.add_argument("--workers", type=positive, help="processes; without it one a core")
    parser.add_argument("--list", action="store_true", help="name every faulty file, one a line")
    args = parser.parse_args()
    data = resolve(args.data)
    faults, pixels, files = audit(data, args.workers)
    print(report(faults, pixels, files, data, args.list))
    return int(wrong(faults) > 0)


if __name__ == "__main__":
    run_main(main)
