"""Portraits of the data set pasted into a larger photo: how many of them the search of photo.py finds.

python -m checks.photos --data data --count 40

The background is the astronaut's suit and shuttle, enlarged, without a face. A portrait is found if a window overlaps
it by more than half (intersection over union); a window that overlaps none is a false face.
"""

from common import ArgumentParser, positive, run_main

import numpy as np
from PIL import Image

from data import find_data, load_pairs, split
from evaluate import confusion, official_score
from photo import overlap
from predict import FaceParser

BACKGROUND, WIDTH, HEIGHT = "docs/astronaut.jpg", 1600, 1200


def compose(rng, portrait):
    """A photo (HEIGHT, WIDTH, 3) with a portrait (S, S, 3) pasted into it, and its window (left, top, side, side)."""
    with Image.open(BACKGROUND) as image:
        photo = image.convert("RGB").crop((0, 240, 512, 512)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    side = round(np.exp(rng.uniform(np.log(150), np.log(1000))))
    left, top = (int(rng.integers(0, length - side + 1)) for length in (WIDTH, HEIGHT))
    photo.paste(Image.fromarray(portrait).resize((side, side), Image.Resampling.LANCZOS), (left, top))
    return np.asarray(photo), (left, top, side, side)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", help="checkpoint or run; default the release")
    parser.add_argument("--data", help="folder with train/; default ./data, else synthetic faces")
    parser.add_argument("--cache", default="build/cache", help="cache folder")
    parser.add_argument("--count", type=positive, default=40, help="number of held-out portraits")
    args = parser.parse_args()
    face_parser, pairs = FaceParser(args.weights, device="cpu"), load_pairs(find_data(args.data), args.cache)
    rng, covers, confusions = np.random.default_rng(0), [], []
    for index in split(len(pairs.names))[1][: args.count]:
        portrait, true = pairs.images[index].transpose(1, 2, 0), pairs.masks[index]
        photo, (left, top, side, _) = compose(rng, portrait)
        parsed = face_parser(photo)
        faces = [] if parsed.missed else parsed.faces
        covers.append([overlap(window, (left, top, side, side)) > 0.5 for _, window in faces])
        pasted = Image.fromarray(parsed.mask[top : top + side, left : left + side])
        masks = np.asarray(pasted.resize(true.shape, Image.Resampling.NEAREST)), face_parser(portrait, whole=True).mask
        confusions.append([confusion(mask, true) for mask in masks])
    in_photo, alone = (official_score(part) for part in np.stack(confusions, 1))
    print(f"{sum(map(any, covers))} of {len(covers)} found, {sum(c.count(False) for c in covers)} false faces")
    print(f"official score {in_photo:.4f} in the photos, {alone:.4f} of the portraits alone")


if __name__ == "__main__":
    run_main(main)
