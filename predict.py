"""Masks for images: a file or a folder of any size to palette PNGs of the same size.

python predict.py --input photo.jpg --output masks --overlay --cutout head --json
python predict.py --input data/test/images --output masks --weights runs/a/best.pt --views flip,scales

A picture that is one portrait, as those of the challenge are, is parsed as a whole. In any other the faces are looked
for first (faces.py), and each is parsed at full resolution.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from atomic import atomic, write_text
from checkpoint import load_model
from device import local_device
from errors import ArgumentParser, UserError, run_main, tell
from images import image_files, overlay, read_image, write_mask
from photo import parse_photo
from regions import cut_out, describe, parse_labels
from rundir import find_weights
from terminal import duration, show_count, show_line
from views import check_size, label_map, log_probabilities, parse_views


def add_arguments(parser):
    """The flags that predict.py and ensemble_tta.py share."""
    parser.add_argument("--input", required=True, help="an image file, or a folder of them")
    parser.add_argument("--output", required=True, type=Path, help="folder for NAME.png masks")
    parser.add_argument("--views", default="", help="views to average: flip, scales, or numbers, as flip,1,1.5")
    parser.add_argument("--size", type=int, default=0, help="image side for the network; 0 is the checkpoint's own")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--whole", action="store_true", help="take each image for one portrait; no search for faces")
    place.add_argument(
        "--box", type=box, metavar="X,Y,W,H", help="portrait to parse; no search for faces; --box=-9,... where negative"
    )
    parser.add_argument("--overlay", action="store_true", help="also write NAME-overlay.png, the mask over the image")
    parser.add_argument(
        "--cutout",
        type=parse_labels,
        help="also write NAME-cutout.png, these labels (hair,hat or head) on transparency",
    )
    parser.add_argument("--json", action="store_true", help="also write NAME.json: areas, boxes, centroids by label")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")


def box(text):
    """An argparse type: x,y,w,h in pixels."""
    try:
        left, top, width, height = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not x,y,w,h, four whole numbers") from None
    if min(width, height) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has no area")
    return left, top, width, height


def mask_of(models, path, size, views, device):
    """RGB pixels (H, W, 3) of an image file and the uint8 mask (H, W) the models give it."""
    pixels = read_image(path)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device)
    log_p = log_probabilities(models, images, size, views)
    return pixels, label_map(log_p, *pixels.shape[:2])[0].cpu().numpy()


def parse_file(models, path, size, views, device, args):
    """Pixels (H, W, 3) of an image file and their Parsed labels; UserError that names the file."""
    pixels = read_image(path)
    try:
        return pixels, parse_photo(models, pixels, size, views, device, args.whole, args.box)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def write_results(args, path, pixels, parsed):
    """The mask of the image file `path` in the folder args.output, and what else is asked for beside it."""
    name = args.output / path.stem
    with atomic(f"{name}.png") as temporary:
        write_mask(temporary, parsed.mask)
    if args.overlay:
        with atomic(f"{name}-overlay.png") as temporary:
            Image.fromarray(overlay(pixels, parsed.mask)).save(temporary, format="PNG")
    if args.cutout:
        with atomic(f"{name}-cutout.png") as temporary:
            Image.fromarray(cut_out(pixels, parsed.mask, args.cutout)).save(temporary, format="PNG")
    if args.json:
        write_text(f"{name}.json", json.dumps({"image": path.name, **describe(parsed)}, ensure_ascii=False) + "\n")


def predict_all(models, size, args, device):
    """Write the masks of args.input into args.output; exit status 2 where some images could not be read.

    The others are done all the same. UserError where two images would share a mask's name, or a mask replace an image.
    """
    check_size(size)
    files = image_files(args.input)
    made = {}
    endings = [".png"] + ["-overlay.png"] * args.overlay + ["-cutout.png"] * bool(args.cutout)
    for name, path in ((path.stem + ending, path) for path in files for ending in endings):
        if name in made:
            raise UserError(f"{path} and {made[name]} would both become {name}; rename one")
        if os.path.realpath(path) == os.path.realpath(args.output / name):
            raise UserError(f"the mask of {path} would replace it; choose another OUT (--output)")
        made[name] = path
    views = parse_views(args.views)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {args.output}: {error.strerror}") from None
    failed, begun = 0, time.monotonic()
    for done, path in enumerate(files, 1):
        try:
            pixels, parsed = parse_file(models, path, size, views, device, args)
        except UserError as error:
            failed += 1
            show_line("", sys.stderr)
            tell(error)
            continue
        write_results(args, path, pixels, parsed)
        if parsed.missed:
            show_line("", sys.stderr)
            tell(f"no face found in {path}, taken as a whole; --box=x,y,w,h says where a portrait is", "warning")
        show_count("image", done, len(files), time.monotonic() - begun)
    print(f"{len(files) - failed} of {len(files)} masks in {args.output}, {duration(time.monotonic() - begun)}")
    return 2 if failed else 0


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--weights", help="checkpoint, or run's name or folder; default the release, else the best run")
    args = parser.parse_args()
    device = local_device(args.device)
    weights = find_weights(args.weights)
    model, info = load_model(weights, device)
    print(f"weights {weights}")
    return predict_all([model], args.size or info["size"], args, device)


if __name__ == "__main__":
    run_main(main)
