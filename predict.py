"""Masks for images: a file or a folder of any size to palette PNGs of the same size.

python predict.py --input photo.jpg --output masks --overlay --cutout head --json
python predict.py --input data/test/images --output masks --weights runs/a/best.pt --views flip,scales

From Python: FaceParser; README.md shows how. A photo that is one portrait, like those of the challenge, is parsed
as a whole. In any other the faces are found first, and each is cropped from the full-size photo and parsed (photo.py).
"""

import argparse
import json
import os
import re
import sys
import time
from numbers import Integral
from pathlib import Path

from common import (
    TITLE,
    ArgumentParser,
    UserError,
    atomic,
    check_target,
    duration,
    enough_memory,
    make_folder,
    natural,
    print_message,
    printable,
    run_main,
    show_line,
    show_progress,
)

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from checkpoint import load_model
from device import select_device
from images import DECODE_ERRORS, check_mask_target, image_files, mask_image, picture_pixels, read_image, read_picture
from labels import COLOURS, NAMES
from photo import load_locator, parse_photos
from register import find_weights
from views import check_size, parse_views

# How the pictures and the JSON begin that we write: they may be replaced.
OUR_PICTURE = rb"\x89PNG.*" + TITLE.encode()
OUR_JSON = rb'\{"image": ".*", "width": \d+, "height": \d+, "face_found": '
GROUPS = {"head": tuple(name for name in NAMES if name not in ("background", "neck_l", "neck", "cloth"))}


class FaceParser:
    """Parses photos with trained weights: parser(image) -> photo.Parsed, whose `mask` is uint8 (H, W).

    `parser.names` are the labels' names, by id.

    weights: a checkpoint file or the name or folder of a run; default the release.
    views: views to average, as "flip,scales". size: side of the network's input, 0 for the checkpoint's own.
    UserError for weights or settings that cannot be used. Start other processes with `spawn`: one that is forked after
    its use may wait for OpenMP's threads for ever.
    """

    names = NAMES

    def __init__(self, weights=None, *, views="", size=0, device="auto", threads=0):
        self.views, self.device = parse_views(views), select_device(device, threads)
        check_size(size)
        self.source = find_weights(weights)
        model, info = load_model(self.source, self.device)
        self.models, self.size, self.locator = [model], size or info["size"], None

    def __call__(self, image, *, whole=False, box=None, cutout=None):
        """Parse a path, a PIL image or a uint8 RGB array (H, W, 3); a list of images of one size gives a list.

        `whole` treats the image as one portrait; `box` (left, top, width, height) is the only portrait in it; the
        probability of the labels `cutout`, as "hair,hat" or "head", becomes the `alpha` of the result. UserError if an
        image cannot be read, for both or a wrong box, or for an unknown label.
        """
        if box is not None:
            if whole or len(box) != 4 or not all(isinstance(value, Integral) for value in box) or min(box[2:]) < 1:
                raise UserError(f"box {box}: give (left, top, width, height) in whole pixels, without whole=True")
            box = tuple(map(int, box))
        cutout = parse_labels(cutout) if isinstance(cutout, str) else cutout
        several = isinstance(image, (list, tuple))
        photos = list(map(_pixels, image if several else [image]))
        if len({pixels.shape for pixels in photos}) > 1:
            raise UserError("the images of a list must have one size")
        if self.locator is None and not (whole or box):
            self.locator = load_locator(self.device)
        parsed = parse_photos(self, photos, whole, box, cutout)
        return parsed if several else parsed[0]


def _pixels(image):
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    try:
        pixels = picture_pixels(image)[0] if isinstance(image, Image.Image) else image
    except DECODE_ERRORS as error:
        raise UserError(f"cannot read the image: {error}") from None
    if not isinstance(pixels, np.ndarray):
        raise UserError(f"an image is a path, a PIL image or a uint8 array, not a {type(image).__name__}")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise UserError(f"an image array must be uint8 (H, W, 3), not {pixels.dtype} {pixels.shape}")
    return pixels


def overlay(pixels, mask):
    """Blend the mask's colours half and half with pixels (H, W, 3), background unchanged: uint8 (H, W, 3)."""
    tint = np.where(mask[..., None] > 0, np.array(COLOURS, np.uint8)[mask], pixels)
    return np.array(Image.blend(Image.fromarray(pixels), Image.fromarray(tint), 0.5))


def parse_labels(text):
    """Sorted label ids of names and GROUPS, as "hair,hat" or "head". UserError if one is unknown."""
    chosen = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part not in GROUPS and part not in NAMES:
            raise UserError(f"--cutout {text}: no label {part}; choose from {', '.join((*GROUPS, *NAMES))}")
        chosen.update(NAMES.index(name) for name in GROUPS.get(part, (part,)))
    if not chosen:
        raise UserError("--cutout names no label; use for example --cutout hair,hat or --cutout head")
    return sorted(chosen)


def cut_out(pixels, alpha, opacity=None):
    """RGBA (H, W, 4) uint8 of pixels (H, W, 3) with `alpha` (H, W) uint8, times the photo's own `opacity` (H, W)."""
    if opacity is not None:
        alpha = (alpha.astype(np.uint16) * opacity // 255).astype(np.uint8)
    return np.dstack([pixels * (alpha > 0)[..., None], alpha])


def label_regions(mask, left=0, top=0):
    """{name: {"area", "box", "centroid"}} of the labels in mask (H, W), whose corner lies at (left, top).

    Area in pixels; box as left, top, width, height; centroid as the mean x, y of the pixels' indices. 255 is no label.
    """
    regions = {}
    for label, name in enumerate(NAMES):
        found = mask == label
        rows, columns = found.sum(1), found.sum(0)
        if not (area := int(rows.sum())):
            continue
        (y0, y1), (x0, x1) = ((int(n[0]), int(n[-1])) for n in map(np.flatnonzero, (rows, columns)))
        x, y = (float(n @ np.arange(len(n)) / area) for n in (columns, rows))
        regions[name] = {
            "area": area,
            "box": [left + x0, top + y0, x1 - x0 + 1, y1 - y0 + 1],
            "centroid": [round(left + x, 2), round(top + y, 2)],
        }
    return regions


def describe(parsed):
    """A Parsed as numbers for JSON: the regions of the whole photo, and of each face from left to right.

    `face_found` is null with `box` or `whole`. A face's `window` is turned clockwise by `angle` degrees.
    """
    height, width = parsed.mask.shape
    faces = []
    for face in [] if parsed.missed else parsed.faces:
        labels = label_regions(np.where(face.mask > 0, face.mask, 255), *face.box[:2])
        record = {"window": list(face.window), "angle": face.angle, "score": face.score, "box": list(face.box)}
        faces.append(record | {"labels": labels})
    found = None if faces and faces[0]["score"] is None else bool(faces)
    return {"width": width, "height": height, "face_found": found, "labels": label_regions(parsed.mask), "faces": faces}


def add_arguments(parser):
    """Add the flags that predict.py and ensemble_tta.py share."""
    parser.add_argument("--input", "--in", required=True, help="an image file or a folder of images")
    parser.add_argument("--output", "--out", required=True, type=Path, help="folder for NAME.png masks")
    parser.add_argument("--views", default="", help="views to average: flip, scales, or numbers such as flip,1,1.5")
    parser.add_argument("--size", type=int, default=0, help="side of the network's input; 0: the checkpoint's own")
    place = parser.add_mutually_exclusive_group()
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    place.add_argument("--whole", **switch, help="treat each image as one portrait, without searching for faces")
    place.add_argument("--box", type=box, metavar="X,Y,W,H", help="portrait to parse; --box=-9,... if negative")
    parser.switch("--overlay", help="also write NAME-overlay.png, the mask over the image")
    parser.add_argument("--cutout", type=parse_labels, help="also write NAME-cutout.png of labels: hair,hat or head")
    parser.switch("--crop", help="with --cutout: crop it to what it shows")
    parser.switch("--json", help="also write NAME.json: area, box, centroid of each label in the photo and each face")
    parser.switch("--skip", help="skip images whose files are in the output folder already")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--threads", type=natural, default=0, help="CPU threads; 0: torch's default")


def parser_settings(args):
    """The keyword arguments of FaceParser in the flags."""
    return {key: getattr(args, key) for key in ("views", "size", "device", "threads")}


def box(text):
    """argparse type: x,y,w,h in pixels."""
    if not re.fullmatch(r"-?\d+,-?\d+,[1-9]\d*,[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not x,y,w,h in pixels, w and h at least 1")
    return tuple(map(int, text.split(",")))


def targets(args, path):
    """{ending: file to write} for the image file `path`, the mask last."""
    extra = {"-overlay.png": args.overlay, "-cutout.png": args.cutout, ".json": args.json, ".png": True}
    return {ending: args.output / f"{path.stem}{ending}" for ending, wanted in extra.items() if wanted}


def write_results(args, path, pixels, opacity, parsed):
    """Write the files of the image file `path`."""
    mark = PngInfo()
    mark.add_text("Title", TITLE)
    for ending, target in targets(args, path).items():
        with atomic(target) as temporary:
            if ending == ".json":
                name = os.fsencode(path.name).decode("utf-8", "replace")
                record = json.dumps({"image": name, **describe(parsed)}, ensure_ascii=False)
                temporary.write_text(record + "\n", encoding="utf-8")
            elif ending == "-overlay.png":
                Image.fromarray(overlay(pixels, parsed.mask)).save(temporary, "PNG", pnginfo=mark)
            elif ending == "-cutout.png":
                image = Image.fromarray(cut_out(pixels, parsed.alpha, opacity))
                image = image.crop(image.getchannel("A").getbbox()) if args.crop else image
                image.save(temporary, "PNG", pnginfo=mark)
            else:
                mask_image(parsed.mask).save(temporary, "PNG")


def files_to_parse(args):
    """The image files of args.input; with `skip`, those that lack an output.

    UserError if two outputs have one path, or one would replace a file not of ours.
    """
    files, made, left = image_files(args.input), {}, []
    for path in files:
        outputs = targets(args, path)
        for target in outputs.values():
            if (first := made.setdefault(target, path)) != path:
                raise UserError(f"{path} and {first} would both become {target.name}; rename one")
            if os.path.realpath(path) == os.path.realpath(target):
                raise UserError(f"the mask of {path} would replace it; choose another OUT (--out)")
        if args.skip and all(map(os.path.isfile, outputs.values())):
            continue
        left.append(path)
        check_mask_target(outputs.pop(".png"))
        for ending, target in outputs.items():
            check_target(target, OUR_JSON if ending == ".json" else OUR_PICTURE)
    if args.skip:
        print(f"{len(files) - len(left)} of {len(files)} skipped: their files are in {args.output}")
    return left


def predict_all(face_parser, args):
    """Write the masks of args.input into args.output: 0, or 2 if some images could not be read, which are reported."""
    if args.crop and not args.cutout:
        raise UserError("--crop crops the cut-out: add --cutout head")
    files = files_to_parse(args)
    if not files:
        return 0
    make_folder(args.output)
    failed, written, begin = 0, 0, time.monotonic()
    try:
        for done, path in enumerate(files, 1):
            show_line(f"parsing {printable(path.name)}", sys.stderr)
            start, parsed = time.monotonic(), None
            try:
                with enough_memory():
                    pixels, opacity = read_picture(path)
                    parsed = face_parser(pixels, whole=args.whole, box=args.box, cutout=args.cutout)
                write_results(args, path, pixels, opacity, parsed)
            except UserError as error:
                if parsed and "name too long" not in str(error):  # a full disk fails for every image
                    raise
                failed += 1
                print_message(error if str(path) in str(error) else f"{path}: {error}", "error")
                continue
            written += 1
            if parsed.missed:
                how = "parsed as one portrait, perhaps wrongly" if parsed.mask.any() else "all background"
                print_message(f"no face found in {path}: {how}; WHOLE=1 (--whole) or BOX=x,y,w,h (--box) parses it")
            elif not sys.stderr.isatty():
                count = len(parsed.faces)
                what = "not searched" if args.whole or args.box else f"{count} face{'' if count == 1 else 's'}"
                print(f"{printable(path.name)}: {what}, {time.monotonic() - start:.1f} s", flush=True)
            show_progress("predicting", done, len(files), time.monotonic() - begin)
    finally:  # also after Ctrl-C
        seconds = time.monotonic() - begin
        pace = f"{duration(seconds)} ({seconds / max(1, written + failed):.2f} s per image)"
        show_line("", sys.stderr)
        print(f"{written} of {len(files)} masks in {args.output}, {pace}", flush=True)
    return 2 if failed else 0


def main():
    parser = ArgumentParser(description="Write the masks of images.")
    add_arguments(parser)
    parser.add_argument("--weights", "--name", help="checkpoint or run; default the release")
    args = parser.parse_args()
    face_parser = FaceParser(args.weights, **parser_settings(args))
    print(f"weights {face_parser.source}")
    return predict_all(face_parser, args)


if __name__ == "__main__":
    run_main(main)
