"""Masks for images: a file or a folder of any size to palette PNGs of the same size.

python predict.py --input photo.jpg --output masks
python predict.py --input data/test/images --output masks --weights runs/a/best.pt --views flip,scales --overlay
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from atomic import atomic
from checkpoint import load_model
from distributed import local_device
from errors import ArgumentParser, UserError, run_main, tell
from images import image_files, overlay, read_image, write_mask
from rundir import find_weights
from terminal import duration, show_count, show_line
from views import check_size, label_map, log_probabilities, parse_views


def add_arguments(parser):
    """The flags that predict.py and ensemble_tta.py share."""
    parser.add_argument("--input", required=True, help="an image file, or a folder of them")
    parser.add_argument("--output", required=True, type=Path, help="folder for NAME.png masks")
    parser.add_argument("--views", default="", help="views to average: flip, scales, or numbers, as flip,1,1.5")
    parser.add_argument("--size", type=int, default=0, help="image side for the network; 0 is the checkpoint's own")
    parser.add_argument("--overlay", action="store_true", help="also write NAME-overlay.png, the mask over the image")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")


def mask_of(models, path, size, views, device):
    """RGB pixels (H, W, 3) of an image file and the uint8 mask (H, W) the models give it."""
    pixels = read_image(path)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device)
    log_p = log_probabilities(models, images, size, views)
    return pixels, label_map(log_p, *pixels.shape[:2])[0].cpu().numpy()


def predict_all(models, size, args, device):
    """Write the masks of args.input into args.output; exit status 2 where some images could not be read.

    The others are done all the same. UserError where two images would share a mask's name.
    """
    check_size(size)
    files = image_files(args.input)
    stems = {}
    for path in files:
        if path.stem in stems:
            raise UserError(f"{path} and {stems[path.stem]} would both become {path.stem}.png; rename one")
        stems[path.stem] = path
    views = parse_views(args.views)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {args.output}: {error.strerror}") from None
    failed, begun = 0, time.monotonic()
    for done, path in enumerate(files, 1):
        try:
            pixels, mask = mask_of(models, path, size, views, device)
        except UserError as error:
            failed += 1
            show_line("", sys.stderr)
            tell(error)
            continue
        with atomic(args.output / f"{path.stem}.png") as temporary:
            write_mask(temporary, mask)
        if args.overlay:
            with atomic(args.output / f"{path.stem}-overlay.png") as temporary:
                Image.fromarray(overlay(pixels, mask)).save(temporary, format="PNG")
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
