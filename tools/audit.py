"""Check a data folder for unpaired, damaged, wrong and duplicate files, and print label statistics.

python -m tools.audit --data data
python -m tools.audit --data data --list > faults.txt

Exit status 1 if there are faults. Masks with left and right reversed are no faults: training repairs them in memory.
"""

from collections import defaultdict
from pathlib import Path

from common import ArgumentParser, UserError, in_parallel, printable, run_main

import numpy as np

from data import SIZE, find_data, reversed_sides
from images import image_files, image_hash, is_turned, read_image, read_mask
from labels import NAMES, NUM_CLASSES

REVERSED = "left and right reversed"


def inspect(path):
    """Read one file as a training does: (faults, hash of an image's pixels or None, pixels (19,) by label or None)."""
    is_mask = path.parent.name == "masks"
    try:
        pixels = read_mask(path) if is_mask else read_image(path)
    except UserError as error:
        return [str(error).replace(f"{path}", "file").split(";")[0]], None, None
    faults = ["not 512 x 512"] if pixels.shape[:2] != (SIZE, SIZE) else []
    if path.parent.parent.name == "train" and is_turned(path):
        faults.append("EXIF orientation")
    if not is_mask:
        return faults, image_hash(pixels), None
    faults += [REVERSED] * reversed_sides(pixels)
    return faults, None, np.bincount(pixels.ravel(), minlength=NUM_CLASSES)


def audit(data, workers=None):
    """Check DATA/train and, if they exist, DATA/dev and DATA/test.

    Returns ({fault: [path, ...]}, pixels (M, 19) of each label of each readable mask). UserError if a folder is empty.
    """
    images, masks = (image_files(Path(data, "train", kind)) for kind in ("images", "masks"))
    found, first, pixels = defaultdict(list), {}, []
    for files, partners, fault in ((images, masks, "image without mask"), (masks, images, "mask without image")):
        stems, seen = {path.stem for path in partners}, {}
        found[fault] = [path for path in files if path.stem not in stems]
        found["name of another file"] += [path for path in files if seen.setdefault(path.stem, path) != path]
    others = [Path(data, split, "images") for split in ("dev", "test") if Path(data, split).is_dir()]
    files = images + masks + [path for folder in others for path in image_files(folder)]
    for path, (faults, known, counts) in zip(files, in_parallel(inspect, files, workers, "checking"), strict=True):
        if known and first.setdefault(known, path) != path:
            faults.append(f"same pixels as {first[known]}")
        for fault in faults:
            found[fault].append(path)
        pixels += [] if counts is None else [counts]
    return {fault: paths for fault, paths in found.items() if paths}, np.array(pixels).reshape(-1, NUM_CLASSES)


def main():
    parser = ArgumentParser(description="Check a data folder and print label statistics.")
    parser.add_argument("--data", help="folder with train/, dev/ and test/; default ./data, else synthetic faces")
    parser.switch("--list", help="name every file, not only the first of each fault")
    args = parser.parse_args()
    data = find_data(args.data)
    found, pixels = audit(data)
    print(f"{'label':<13} {'% of pixels':>11} {'% of masks':>11}")
    if len(pixels):
        fractions, present = 100 * (pixels / pixels.sum(1, keepdims=True)).mean(0), 100 * (pixels > 0).mean(0)
        for label, name in enumerate(NAMES):
            print(f"{label:>2} {name:<10} {fractions[label]:>11.2f} {present[label]:>11.1f}")
    for fault, paths in found.items():
        for path in paths if args.list else paths[:1]:
            more = "" if args.list or len(paths) == 1 else "; LIST=1 names all"
            print(f"{printable(fault)} ({len(paths)}): {printable(str(path))}{more}")
    faults = sum(len(paths) for fault, paths in found.items() if fault != REVERSED)
    repaired = len(found.get(REVERSED, []))
    print(f"{data}: {len(pixels)} readable masks, {faults} faults, {repaired} reversed masks (repaired in training)")
    return int(faults > 0)


if __name__ == "__main__":
    run_main(main)
