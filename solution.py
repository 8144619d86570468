"""The organisers' entry point: a face image to its mask, with nothing but a checkpoint beside it.

python solution.py --input photo.jpg --output mask.png --weights ckpt.pth
python solution.py --input data/test/images --output masks --weights ckpt.pth

package.py joins this file with the ones it needs into the run.py of a submission. Size and views of the image are
those the checkpoint names. It computes on one CPU thread, so that its masks do not depend on the machine's cores.
"""

import argparse
import time
from pathlib import Path

import torch

from atomic import atomic
from checkpoint import load_model
from errors import ArgumentParser, UserError, run_main
from images import image_files, write_mask
from predict import mask_of
from terminal import show_count
from views import parse_views


def targets(source, output):
    """[(image, mask path), ...] for an image and a mask, or a folder of images and one of masks, which is made.

    UserError where two images would share a mask or a folder cannot be made.
    """
    files, output = image_files(source), Path(output)
    folder = output if Path(source).is_dir() else output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {folder}: {error.strerror}") from None
    if not Path(source).is_dir():
        if output.is_dir():
            raise UserError(f"--output {output} is a folder; name a file for the mask of one image")
        return [(files[0], output)]
    pairs = {f"{path.stem}.png": path for path in files}
    if len(pairs) < len(files):
        twin = next(path for path in files if pairs[f"{path.stem}.png"] != path)
        raise UserError(f"{twin} and {pairs[f'{twin.stem}.png']} would both become {twin.stem}.png; rename one")
    return [(path, folder / name) for name, path in pairs.items()]


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--input", required=True, help="an image, or a folder of images")
    parser.add_argument("--output", required=True, help="the mask's PNG, or a folder for NAME.png")
    parser.add_argument("--weights", default="ckpt.pth", help="checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, info = load_model(args.weights)
    views = parse_views(info.get("views", ""))
    pairs, begun = targets(args.input, args.output), time.monotonic()
    for done, (path, target) in enumerate(pairs, 1):
        _, mask = mask_of([model], path, info["size"], views, "cpu")
        with atomic(target) as temporary:
            write_mask(temporary, mask)
        show_count("mask", done, len(pairs), time.monotonic() - begun)
    return 0


if __name__ == "__main__":
    run_main(main)
