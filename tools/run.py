"""The organisers' entry point: predict the mask of a face image, or of every image in a folder.

python3 run.py --input IMAGE.jpg --output MASK.png --weights ckpt.pth
python3 run.py --input IMAGES --output MASKS --weights ckpt.pth

In the repository: `python -m tools.run`. The checkpoint sets the input size and the views.
"""

import time
from pathlib import Path

from common import ArgumentParser, UserError, atomic, make_folder, run_main, show_progress

import torch

from checkpoint import load_model
from images import check_mask_target, image_files, mask_image, read_image
from views import parse_views, parse_whole


def find_outputs(source, output):
    """{mask path: image}; creates the output folder. UserError if two images would have the same mask path."""
    files, several, output, outputs = image_files(source), Path(source).is_dir(), Path(output), {}
    make_folder(output if several else output.parent)
    for path in files:
        target = output / f"{path.stem}.png" if several else output
        if (first := outputs.setdefault(target, path)) != path:
            raise UserError(f"{first} and {path} would both be written to {target.name}; rename one")
        check_mask_target(target)
    return outputs


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", required=True, help="image, or folder of images")
    parser.add_argument("--output", required=True, help="PNG of the mask, or folder for NAME.png")
    parser.add_argument("--weights", default="ckpt.pth", help="checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the masks must not depend on the machine's number of cores
    model, info = load_model(args.weights)
    views, outputs, start = parse_views(info.get("views", "")), find_outputs(args.input, args.output), time.monotonic()
    for done, (target, path) in enumerate(outputs.items(), 1):
        mask = parse_whole(model, read_image(path), info["size"], views)
        with atomic(target) as temporary:
            mask_image(mask).save(temporary, format="PNG")
        show_progress("predicting", done, len(outputs), time.monotonic() - start)


if __name__ == "__main__":
    run_main(main)
