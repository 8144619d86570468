"""Held-out portraits in bad light and low quality: the official score of each kind, parsed as one portrait.

python -m checks.degradations --weights runs/release/validated.pt --data data --count 30

Prints one line per kind: the mean over the images of the mean F over the labels present, and the number of masks
without skin or hair. Pixels are those of 512 x 512 portraits.
"""

import io

from common import ArgumentParser, UserError, positive, run_main

import numpy as np
from PIL import Image, ImageFilter

import checkpoint
from data import find_data, load_pairs
from evaluate import confusion, held_out, official_score
from labels import NAMES
from predict import FaceParser

PERSON = [NAMES.index(name) for name in ("skin", "hair")]


def jpeg(image, quality=10):
    """The image as a JPEG file keeps it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def enlarged(image, side):
    """The image reduced to `side` pixels by area and enlarged again."""
    return image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def noisy(image, deviation=30):
    """The image with Gaussian noise, the same for every image, of a standard deviation in 0..255."""
    noise = np.random.default_rng(0).normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))


def degradations():
    """{kind: function from a PIL image (RGB, 512 x 512) to the same portrait in low quality}."""
    return {
        "as is": lambda image: image,
        "grey": lambda image: image.convert("L").convert("RGB"),
        "JPEG 10": jpeg,
        "blur, sigma 4": lambda image: image.filter(ImageFilter.GaussianBlur(4)),
        "from 64 px": lambda image: enlarged(image, 64),
        "from 32 px": lambda image: enlarged(image, 32),
        "dark / 4": lambda image: image.point(lambda value: value // 4),
        "noise 30": noisy,
    }


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", default="runs/release/validated.pt", help="checkpoint or run that held out pairs")
    parser.add_argument("--data", help="folder with train/; default ./data, else synthetic faces")
    parser.add_argument("--cache", default="build/cache", help="folder of the decoded copies")
    parser.add_argument("--count", type=positive, default=30, help="number of held-out portraits, from the first on")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    args = parser.parse_args()
    face_parser, pairs = FaceParser(args.weights, threads=args.threads), load_pairs(find_data(args.data), args.cache)
    content = checkpoint.load(face_parser.source)
    indices = held_out(content, face_parser.source, pairs.names)[: args.count]
    if checkpoint.has_seen(content, [pairs.names[i] for i in indices]):
        raise UserError(f"{face_parser.source} was trained on these portraits; give weights that held them out")
    print(f"{face_parser.source}, {len(indices)} portraits")
    for kind, change in degradations().items():
        confusions, blank = [], 0
        for index in indices:
            image = change(Image.fromarray(pairs.images[index].transpose(1, 2, 0)))
            mask = face_parser(image, whole=True).mask
            confusions.append(confusion(mask, pairs.masks[index]))
            blank += not np.isin(mask, PERSON).any()
        print(f"{kind:<16}{official_score(np.stack(confusions)):.4f}{f'  {blank} blank' * bool(blank)}", flush=True)


if __name__ == "__main__":
    run_main(main)
