"""Make a data folder (train/images, train/masks, dev/images, test/images) from a download, or check one.

python -m tools.prepare --raw challenge.zip
python -m tools.prepare --raw CelebAMask-HQ --data data-hq --count 1000
python -m tools.prepare --check --data data --list > faults.txt

RAW is a folder or a zip: the challenge's data or the raw CelebAMask-HQ release (Lee et al., arXiv 1907.11922). The same
command resumes an interrupted run. A check has status 1 if files are unpaired, damaged, wrong or copies; reversed masks
are no faults: training repairs them in memory.
"""

import functools
import glob
import hashlib
import io
import os
import re
import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

import common
from common import ArgumentParser, UserError, atomic, in_parallel, make_folder, positive, printable, run_main

import numpy as np
from PIL import Image

import images
from data import SIZE, find_data, reversed_sides
from labels import NAMES

REVERSED = "left and right reversed"
SPLITS = {"train": "train", "dev": "dev", "val": "dev", "test": "test"}
MAX_BYTES = 2**26  # of an image file: a zip member of zeros can claim gigabytes
PARTS = {name: label for label, name in enumerate(NAMES) if label}
open_zip = functools.cache(zipfile.ZipFile)  # one handle per worker process


def list_files(raw, data):
    """Relative names of the images in a folder or zip, sorted, without hidden files and those of DATA.

    UserError if RAW is missing or damaged.
    """
    try:
        if raw.is_dir():  # data sets are often linked into place, and glob follows links
            names, own = glob.glob("**", root_dir=raw, recursive=True), os.path.relpath(data.resolve(), raw.resolve())
            names = [name for name in names if not PurePosixPath(name).is_relative_to(own)]
        else:
            with zipfile.ZipFile(raw) as archive:
                names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"cannot read {raw} ({error}); give the downloaded zip or folder as RAW") from None
    names = (name for name in names if not re.search(r"(^|[/\\])(\.(?![/\\])|__MACOSX/)", name))  # ./a is a
    return sorted(name for name in names if _path(name).suffix.lower() in images.IMAGE_SUFFIXES)


def find_challenge(names):
    """Map (split, "images" or "masks") to {stem: name} for the challenge's files. UserError for two data sets."""
    found = {}
    for name in names:
        path = _path(name)
        split, kind = path.parent.parent.name.lower(), path.parent.name.lower()
        if split in SPLITS and (kind == "images" or (split, kind) == ("train", "masks")):
            files = found.setdefault((SPLITS[split], kind), {})
            first = next(iter(files.values()), name)
            if _path(first).parent != path.parent:
                raise UserError(f"{first} and {name} are of two data sets; give one of them as RAW")
            _add(files, path.stem, name)
    return found


def find_release(names):
    """({"00000": image name}, {"00000": {label: part name}}) of the raw CelebAMask-HQ release."""
    photos, parts = {}, {}
    for name in names:
        path = _path(name)
        if path.parent.name == "CelebA-HQ-img" and path.stem.isdecimal():
            _add(photos, f"{int(path.stem):05d}", name)
        elif "CelebAMask-HQ-mask-anno" in path.parts:
            number, _, part = path.stem.partition("_")
            if not number.isdecimal() or part not in PARTS:
                raise UserError(f"{name} is not NUMBER_PART.png with a part of {', '.join(PARTS)}; remove it")
            _add(parts.setdefault(f"{int(number):05d}", {}), PARTS[part], name)
    return photos, parts


def _path(name):
    """The path of a file's name in RAW; some zips of Windows have backslashes."""
    return PurePosixPath(name.replace("\\", "/"))


def _add(found, key, name):
    if key in found:
        raise UserError(f"{found[key]} and {name} are the same item; remove one")
    found[key] = name


def plan(raw, data, count=None):
    """Map each path below DATA to its source: a file name in RAW, or {label: file name} of a mask's parts.

    UserError if RAW contains neither form or both, or if one of the first `count` training files has no partner.
    """
    names = list_files(raw, data)
    found, (photos, masks) = find_challenge(names), find_release(names)
    if bool(found) == bool(photos or masks):  # neither or both
        expected = "either train/images and train/masks, or CelebA-HQ-img and CelebAMask-HQ-mask-anno, not both"
        raise UserError(f"{raw} must contain {expected}; unpack zips inside it, or give the folder above")
    photos, masks = photos or found.pop(("train", "images"), {}), masks or found.pop(("train", "masks"), {})
    stems = sorted(photos.keys() | masks.keys())[:count]
    for partners, what in ((masks, "images without a mask"), (photos, "masks without an image")):
        if unpaired := [stem for stem in stems if stem not in partners]:
            raise UserError(f"{raw} has {len(unpaired)} training {what}, such as {unpaired[0]}; download it again")
    jobs = {f"train/images/{stem}.jpg": photos[stem] for stem in stems}
    jobs |= {f"train/masks/{stem}.png": masks[stem] for stem in stems}
    for (split, _), files in found.items():
        jobs |= {f"{split}/images/{stem}.jpg": name for stem, name in files.items()}
    return jobs


def read(raw, name, load=True):
    """(bytes, PIL image, decoded if `load`) of a file in RAW. UserError if it is damaged or a decompression bomb."""
    try:
        if raw.is_dir() and not (raw / name).is_file():
            raise ValueError("not a file")
        with open(raw / name, "rb") if raw.is_dir() else open_zip(raw).open(name) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        image = images.open_image(io.BytesIO(content))
        if load:
            image.load()
    except (*images.DECODE_ERRORS, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {name}: {error}; replace it, or remove it and its partner") from None
    return content, image


def paint(raw, names):
    """Labels (H, W) uint8 of {label: file name}; higher labels cover lower ones, as in the release's g_mask.py."""
    parts = {label: read(raw, name)[1].convert("L") for label, name in sorted(names.items())}
    if len({part.size for part in parts.values()}) > 1:
        raise UserError(f"the parts of a mask differ in size: {', '.join(names.values())}; download them again")
    labels = np.uint8(0)
    for label, part in parts.items():
        labels = np.where(np.asarray(part) != 0, np.uint8(label), labels)
    return labels


def require_match(raw, image_name, mask):
    """UserError unless an image and its mask, a PIL image, are upright and of one shape: both become squares."""
    content, image = read(raw, image_name, load=False)
    (width, height), (mask_width, mask_height) = image.size, mask.size
    if width * mask_height != height * mask_width:
        sizes = f"{width} x {height}, its mask {mask_width} x {mask_height}"
        raise UserError(f"{image_name} is {sizes}: not the same picture; replace or remove the pair")
    if images.is_turned(io.BytesIO(content)):
        raise UserError(f"{image_name} has an EXIF orientation, its mask may not; turn the pixels and remove it")


def convert(task):
    """Write one file unless it exists; runs in a worker process. Returns True if written."""
    raw, source, path, size, image_name = task
    if path.exists():
        return False
    buffer = io.BytesIO()
    if path.suffix == ".jpg":
        content, image = read(raw, source)
        if (image.format, image.mode, image.size) == ("JPEG", "RGB", (size, size)):
            buffer.write(content)
        else:
            image = Image.fromarray(images.picture_pixels(image)[0]).resize((size, size), Image.Resampling.LANCZOS)
            image.save(buffer, "JPEG", quality=95)
    else:
        mask = Image.fromarray(paint(raw, source)) if isinstance(source, dict) else read(raw, source)[1]
        require_match(raw, image_name, mask)
        labels = Image.fromarray(images.mask_labels(mask, f"mask {source}"))
        images.mask_image(np.array(labels.resize((size, size), Image.Resampling.NEAREST))).save(buffer, "PNG")
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return True


def require_same_source(raw, data, paths, size):
    """Mark the folder `data` as made from RAW as it is now. UserError if its files are of another RAW, or may be."""
    files = [raw / name for name in list_files(raw, data)] if raw.is_dir() else [raw]
    state = size, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest, marker = hashlib.sha256(ascii(state).encode()).hexdigest(), data / ".raw"
    if marker.is_file() and marker.read_bytes() == digest.encode():
        return
    if any(path.exists() for path in paths):
        raise UserError(f"{data} was made from another RAW than {raw} is now; give another DATA, or remove it first")
    common.write_text(marker, digest)


def prepare(raw, data, count=None, size=SIZE):
    """Make the folder `data` from `raw` (a folder or zip of either form); existing files are kept.

    Returns ({path below data: source}, number of files written). UserError for bad input and other files in `data`.
    """
    raw, data = Path(raw), Path(data)
    if raw.is_dir() and raw.resolve().is_relative_to(data.resolve()):
        raise UserError(f"RAW {raw} lies in the output folder {data}; give another DATA")
    jobs = plan(raw, data, count)
    partners = {name: jobs.get(name.replace("/masks/", "/images/")[:-4] + ".jpg") for name in jobs}
    tasks = [(raw, source, data / name, size, partners[name]) for name, source in jobs.items()]
    paths = {data / name for name in jobs}
    for folder in sorted({path.parent for path in paths}):
        make_folder(folder)
        common.remove_unfinished(folder, {path.name for path in paths})
        others = sorted(p.name for p in folder.iterdir() if p not in paths and not p.name.startswith("."))
        if others:
            raise UserError(f"{folder} has {len(others)} files not from {raw}, such as {others[0]}; give another DATA")
    require_same_source(raw, data, paths, size)
    return jobs, sum(in_parallel(convert, tasks, "preparing"))


def inspect(path):
    """Read one file as a training does: (faults, hash of an image's pixels; None for a mask)."""
    is_mask = path.parent.name == "masks"
    try:
        pixels = images.read_mask(path) if is_mask else images.read_image(path)
    except UserError as error:
        return [str(error).replace(f"{path}", "file").split(";")[0]], None
    faults = ["not 512 x 512"] if pixels.shape[:2] != (SIZE, SIZE) else []
    if path.parent.parent.name == "train" and images.is_turned(path):
        faults.append("EXIF orientation")
    if is_mask:
        faults += [REVERSED] * reversed_sides(pixels)
    return faults, None if is_mask else images.image_hash(pixels)


def audit(data):
    """{fault: [path, ...]} of DATA/train and, if they exist, DATA/dev and DATA/test. UserError if a folder is empty."""
    photos, masks = (images.image_files(Path(data, "train", kind)) for kind in ("images", "masks"))
    found, first = defaultdict(list), {}
    for files, partners, fault in ((photos, masks, "image without mask"), (masks, photos, "mask without image")):
        stems, seen = {path.stem for path in partners}, {}
        found[fault] = [path for path in files if path.stem not in stems]
        found["name of another file"] += [path for path in files if seen.setdefault(path.stem, path) != path]
    others = [Path(data, split, "images") for split in ("dev", "test") if Path(data, split).is_dir()]
    files = photos + masks + [path for folder in others for path in images.image_files(folder)]
    for path, (faults, known) in zip(files, in_parallel(inspect, files, "checking"), strict=True):
        if known and first.setdefault(known, path) != path:
            faults.append(f"same pixels as {first[known]}")
        for fault in faults:
            found[fault].append(path)
    return {fault: paths for fault, paths in found.items() if paths}


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--raw", help="downloaded data: a zip or folder")
    parser.add_argument("--data", default="data", help="folder to create or complete, or to check")
    parser.add_argument("--count", type=positive, help="use only the first COUNT training pairs")
    parser.switch("--check", help="check the folder instead")
    parser.switch("--list", help="with --check: name every file, not only the first of each fault")
    args = parser.parse_args()
    if args.check:
        if args.raw or args.count:
            raise UserError("RAW= and COUNT= are for `make data`; a check is of DATA, as it is")
        data = find_data(args.data)
        found = audit(data)
        for fault, paths in found.items():
            for path in paths if args.list else paths[:1]:
                more = "" if args.list or len(paths) == 1 else "; LIST=1 names all"
                print(f"{printable(fault)} ({len(paths)}): {printable(str(path))}{more}")
        repaired = len(found.pop(REVERSED, []))
        print(f"{data}: {sum(map(len, found.values()))} faults, {repaired} reversed masks (repaired in training)")
        return int(bool(found))
    if not args.raw:
        raise UserError("give the downloaded zip or folder as RAW (--raw)")
    jobs, written = prepare(args.raw, args.data, args.count)
    pairs, dev, test = (sum(name.startswith(key) for name in jobs) for key in ("train/masks", "dev/", "test/"))
    made = f"{pairs} training pairs, {dev} dev and {test} test images"
    print(f"{args.data}: {made}; {written} of {len(jobs)} files written")
    return 0


if __name__ == "__main__":
    run_main(main)
