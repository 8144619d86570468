"""Check a data folder for unpaired, damaged, wrong and duplicate files, and masks with left and right reversed.

python -m tools.audit --data data
python -m tools.audit --data data --list > faults.txt

Exit status 1 if there are faults. Reversed masks are no faults: training repairs them in memory.
"""

from collections import defaultdict
from pathlib import Path

from common import ArgumentParser, UserError, in_parallel, printable, run_main

from data import SIZE, find_data, reversed_sides
from images import image_files, image_hash, is_turned, read_image, read_mask

REVERSED = "left and right reversed"


def inspect(path):
    """Read one file as a training does: (faults, hash of an image's pixels; None for a mask)."""
    is_mask = path.parent.name == "masks"
    try:
        pixels = read_mask(path) if is_mask else read_image(path)
    except UserError as error:
        return [str(error).replace(f"{path}", "file").split(";")[0]], None
    faults = ["not 512 x 512"] if pixels.shape[:2] != (SIZE, SIZE) else []
    if path.parent.parent.name == "train" and is_turned(path):
        faults.append("EXIF orientation")
    if is_mask:
        faults += [REVERSED] * reversed_sides(pixels)
    return faults, None if is_mask else image_hash(pixels)


def audit(data, workers=None):
    """{fault: [path, ...]} of DATA/train and, if they exist, DATA/dev and DATA/test. UserError if a folder is empty."""
    images, masks = (image_files(Path(data, "train", kind)) for kind in ("images", "masks"))
    found, first = defaultdict(list), {}
    for files, partners, fault in ((images, masks, "image without mask"), (masks, images, "mask without image")):
        stems, seen = {path.stem for path in partners}, {}
        found[fault] = [path for path in files if path.stem not in stems]
        found["name of another file"] += [path for path in files if seen.setdefault(path.stem, path) != path]
    others = [Path(data, split, "images") for split in ("dev", "test") if Path(data, split).is_dir()]
    files = images + masks + [path for folder in others for path in image_files(folder)]
    for path, (faults, known) in zip(files, in_parallel(inspect, files, workers, "checking"), strict=True):
        if known and first.setdefault(known, path) != path:
            faults.append(f"same pixels as {first[known]}")
        for fault in faults:
            found[fault].append(path)
    return {fault: paths for fault, paths in found.items() if paths}


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with train/, dev/ and test/; default ./data, else synthetic faces")
    parser.switch("--list", help="name every file, not only the first of each fault")
    args = parser.parse_args()
    data = find_data(args.data)
    found = audit(data)
    for fault, paths in found.items():
        for path in paths if args.list else paths[:1]:
            more = "" if args.list or len(paths) == 1 else "; LIST=1 names all"
            print(f"{printable(fault)} ({len(paths)}): {printable(str(path))}{more}")
    repaired = len(found.pop(REVERSED, []))
    print(f"{data}: {sum(map(len, found.values()))} faults, {repaired} reversed masks (repaired in training)")
    return int(bool(found))


if __name__ == "__main__":
    run_main(main)
