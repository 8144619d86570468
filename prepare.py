"""Make a data folder (train/images, train/masks, dev/images, test/images) from what one downloads.

python prepare.py --raw challenge.zip --out data
python prepare.py --raw CelebAMask-HQ --out data-hq --count 1000

RAW is a folder or a zip, of the challenge's form or of the raw CelebAMask-HQ release (Lee et al., arXiv 1907.11922).
An interrupted run is continued by the same command.
"""

import argparse
import io
import lzma
import os
import re
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from errors import ArgumentParser, UserError, positive, run_main
from images import UNREADABLE, by_colour, must_be_file
from labels import NAMES, NUM_CLASSES, PALETTE
from parallel import in_parallel

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MAX_BYTES = 64 << 20  # a portrait is far smaller; more is a zip bomb or a mistake
SPLITS = {"train": "train", "dev": "dev", "val": "dev", "test": "test"}
PARTS = {name: label for label, name in enumerate(NAMES) if label}
LOOKED_FOR = "train/images and train/masks (challenge), CelebA-HQ-img and CelebAMask-HQ-mask-anno (raw release)"
_source = None  # in a worker: the folder (Path) or the ZipFile it reads from


def open_image(data, name):
    """The image in `data` (bytes), decoded; UserError naming `name` where it is damaged or a decompression bomb."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
        except UNREADABLE as error:
            reason = f"no {', '.join(FORMATS)} inside" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f"damaged image {name} ({reason}); replace it, or remove it and its partner") from None
    return image


def _open_source(source):
    global _source
    _source = zipfile.ZipFile(source) if source.is_file() else source


def list_files(raw, out):
    """Names (relative, with '/') of the files of a folder or zip, without those of OUT, dot files and __MACOSX.

    UserError where RAW is missing, empty, no zip, encrypted, or has members that point out of it.
    """
    if not raw.exists():
        raise UserError(f"no such file or folder: {raw}; give the download as `make data RAW=/path/to/it`")
    if raw.is_dir():
        names = _walk(raw, out)
    else:
        try:
            with zipfile.ZipFile(raw) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{raw} is no folder and no readable zip ({error}); download it again") from None
        for info in members:
            if re.match(r"[/\\]|[A-Za-z]:", info.filename) or ".." in re.split(r"[/\\]", info.filename):
                raise UserError(f"{raw} has a member that points out of it, {info.filename!r}; do not trust this zip")
            if info.flag_bits & 1:
                raise UserError(f"{raw} is encrypted; unpack it and give the folder")
        names = [info.filename for info in members]
    names = sorted(n for n in names if not any(p.startswith(".") or p == "__MACOSX" for p in n.split("/")))
    if not names:
        raise UserError(f"{raw} is empty; looked for {LOOKED_FOR}")
    return names


def _walk(raw, out):
    def fail(error):
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}")

    # Links are followed, for data sets are often linked into place; a folder met twice is a loop.
    seen = {os.path.realpath(out)}
    for folder, folders, files in os.walk(raw, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for file in files:
            yield Path(folder, file).relative_to(raw).as_posix()


def _add(found, key, name):
    if key in found:
        raise UserError(f"{found[key]} and {name} are the same item; remove one")
    found[key] = name


def find_challenge(names, top=""):
    """{(split, "images" or "masks"): {stem: name}} of the challenge's files; `top` is the name of what holds them."""
    found, homes = {}, {}
    for name in names:
        path = PurePosixPath(top, name)
        split, kind = ("", "", *(part.lower() for part in path.parts))[-3:-1]
        wanted = split in SPLITS and (kind == "images" or (split, kind) == ("train", "masks"))
        if not wanted or path.suffix.lower() not in SUFFIXES:
            continue
        key = SPLITS[split], kind
        home = homes.setdefault(key, path.parent)
        if home != path.parent:
            raise UserError(f"both {home} and {path.parent} could be {'/'.join(key)}; give a RAW with one of them")
        _add(found.setdefault(key, {}), path.stem, name)
    return found


def find_release(names, top=""):
    """({"00000": image name}, {"00000": {label: part name}}) of the raw CelebAMask-HQ release."""
    images, parts = {}, {}
    for name in names:
        path = PurePosixPath(top, name)
        if path.suffix.lower() not in SUFFIXES:
            continue
        if path.parent.name == "CelebA-HQ-img" and path.stem.isdecimal():
            _add(images, f"{int(path.stem):05d}", name)
        elif "CelebAMask-HQ-mask-anno" in path.parts:
            number, _, part = path.stem.partition("_")
            if not number.isdecimal() or part not in PARTS:
                raise UserError(f"{name} is not NUMBER_PART.png with a part of {', '.join(PARTS)}; remove it")
            _add(parts.setdefault(f"{int(number):05d}", {}), PARTS[part], name)
    return images, parts


def plan(raw, out, count=None):
    """{path below OUT: file name in RAW, or {label: file name} of the parts to paint}; UserError as in the docstrings
    above, and where neither form is found."""
    names = list_files(raw, out)
    top = raw.resolve().stem if raw.is_file() else raw.resolve().name
    found = find_challenge(names, top)
    images, parts = find_release(names, top)
    if found and (images or parts):
        raise UserError(f"{raw} holds both the challenge's data and the raw release; give a RAW with one of them")
    if not found and not (images or parts):
        raise UserError(f"no data recognised in {raw}; looked for {LOOKED_FOR} (zips inside it: unpack them first)")
    images, parts = images or found.pop(("train", "images"), {}), parts or found.pop(("train", "masks"), {})
    jobs = {}
    stems = sorted(images.keys() | parts.keys())[:count]
    for lack, what in ((parts, "images without a mask"), (images, "masks without an image")):
        lonely = [stem for stem in stems if stem not in lack]
        if lonely:
            first = ", ".join(lonely[:3]) + (", ..." if len(lonely) > 3 else "")
            raise UserError(f"{raw} has {len(lonely)} training {what} ({first}); download it again or remove them")
    for name in stems:
        jobs[f"train/images/{name}.jpg"] = images[name]
        jobs[f"train/masks/{name}.png"] = parts[name]
    for (split, _), files in found.items():
        jobs.update((f"{split}/images/{name}.jpg", file) for name, file in files.items())
    return jobs


def _read(name):
    packed = isinstance(_source, zipfile.ZipFile)
    if not packed:
        must_be_file(_source / name)
    try:
        with _source.open(name) if packed else open(_source / name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        raise UserError(f"cannot read {name}: {error}; download it again") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{name} is larger than {MAX_BYTES >> 20} MiB unpacked: not a portrait; remove it")
    return data


def labels_of(image, name):
    """Labels (H, W), uint8 0..18, of a mask image of mode L or P (values) or RGB (the palette's colours)."""
    if image.format == "JPEG":
        raise UserError(f"mask {name} is a JPEG, whose labels are lost; a mask must be a PNG")
    if image.mode in ("RGB", "RGBA"):
        if (labels := by_colour(image)) is None:
            raise UserError(f"mask {name} has colours that are no label's; convert it to values 0-18")
        return labels
    if image.mode not in ("L", "P"):
        raise UserError(f"mask {name} has mode {image.mode}; convert it to 8-bit values 0-18")
    labels = np.asarray(image)
    colours = by_colour(image) if image.mode == "P" else None
    # PNG optimisers reorder palettes; where every value has a label's colour, the colour decides.
    if colours is not None and len(np.unique(colours)) == len(np.unique(labels)):
        return colours
    if labels.max() >= NUM_CLASSES:
        raise UserError(f"mask {name} has label {labels.max()}, but labels are 0-{NUM_CLASSES - 1}; repair the mask")
    return labels


def paint(parts):
    """Labels (H, W), uint8, of {label: (H, W) PIL image}: any value but 0 is the part, later labels over earlier.

    As the release's own g_mask.py does it.
    """
    labels = np.uint8(0)
    for label, part in sorted(parts.items()):
        labels = np.where(np.asarray(part.convert("L")) != 0, np.uint8(label), labels)
    return labels


def _image_bytes(name, size):
    data = _read(name)
    image = open_image(data, name)
    if (image.format, image.mode, image.size) == ("JPEG", "RGB", (size, size)):
        return data
    buffer = io.BytesIO()
    image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _mask_bytes(source, size):
    if isinstance(source, dict):
        parts = {label: open_image(_read(name), name) for label, name in source.items()}
        if len({part.size for part in parts.values()}) > 1:
            raise UserError(f"the parts of one mask differ in size, {', '.join(source.values())}; download them again")
        labels = paint(parts)
    else:
        labels = labels_of(open_image(_read(source), source), source)
    mask = Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST)
    mask.putpalette(PALETTE)
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()


def _is_done(path, size):
    try:
        with Image.open(path) as image:
            return image.size == (size, size)
    except UNREADABLE:
        return False


def _make(task):
    """Writes one file (in a worker process); False where it is there already."""
    path, source, size = task
    if _is_done(path, size):
        return False
    data = (_mask_bytes if path.suffix == ".png" else _image_bytes)(source, size)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; see --out") from None
    finally:
        temporary.unlink(missing_ok=True)
    return True


def prepare(raw, out, *, workers=None, count=None, size=512):
    """Make OUT from RAW (a folder or zip of either form); files of OUT that are there already stay.

    Returns ({path below OUT: its source}, how many files were written). UserError for whatever the user can mend.
    """
    raw, out = Path(raw), Path(out)
    if raw.is_dir() and raw.resolve().is_relative_to(out.resolve()):
        raise UserError(f"RAW {raw} lies in the output folder {out}; give another --out")
    jobs = plan(raw, out, count)
    targets = {out / name for name in jobs}
    try:
        for folder in sorted({target.parent for target in targets}):
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
            others = sorted(p.name for p in folder.iterdir() if p not in targets and not p.name.startswith("."))
            if others:
                raise UserError(f"{folder} has {len(others)} files not of {raw}, as {others[0]}; give another --out")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; see --out") from None
    tasks = [(out / name, source, size) for name, source in jobs.items()]
    return jobs, sum(in_parallel(_make, tasks, workers, "preparing", (_open_source, raw)))


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--raw", required=True, help="the download, a folder or a zip")
    parser.add_argument("--out", default="data", help="folder to make or to complete")
    parser.add_argument("--workers", type=positive, help="processes; without it one a core")
    parser.add_argument("--count", type=positive, help="only the first so many training pairs; without it all")
    parser.add_argument("--size", type=positive, default=512, help="side of every image and mask in pixels")
    args = parser.parse_args()
    jobs, written = prepare(args.raw, args.out, workers=args.workers, count=args.count, size=args.size)
    held = {key: sum(name.startswith(f"{key}/") for name in jobs) for key in ("train/masks", "dev", "test")}
    print(
        f"{args.out}: {held['train/masks']} training pairs, {held['dev']} dev and {held['test']} test images; "
        f"{written} files written, {len(jobs) - written} there already"
    )


if __name__ == "__main__":
    run_main(main)
