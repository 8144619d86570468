"""Portraits of the dataset shrunk and laid on a larger picture: how many the search of predict.py finds again.

python -m checks.photos --data data --count 40

The ground is the astronaut's suit and shuttle, enlarged, which hold no face. A portrait is found when one of the
windows covers it by more than half (intersection over union); a window that covers none is a false face.
"""

import argparse
import time

import numpy as np
import torch
from PIL import Image

from checkpoint import load_model
from data import load_pairs, resolve, split
from errors import ArgumentParser, positive, run_main
from metrics import confusion, official_score
from photo import overlap, parse_photo
from rundir import find_weights
from views import parse_views

GROUND, WIDTH, HEIGHT = "docs/astronaut.jpg", 1600, 1200
NO_VIEWS = parse_views("")


def composed(rng, portrait):
    """A picture (HEIGHT, WIDTH, 3) with a portrait (S, S, 3) on it, and its window (left, top, side, side)."""
    with Image.open(GROUND) as ground:
        picture = ground.convert("RGB").crop((0, 240, 512, 512)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    side = round(np.exp(rng.uniform(np.log(150), np.log(1000))))
    left, top = (int(rng.integers(0, whole - side + 1)) for whole in (WIDTH, HEIGHT))
    picture.paste(Image.fromarray(portrait).resize((side, side), Image.Resampling.LANCZOS), (left, top))
    return np.asarray(picture), (left, top, side, side)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weights", help="checkpoint, or run's name or folder; default the release")
    parser.add_argument("--data", help="folder with train/images and train/masks; default ./data, else drawn faces")
    parser.add_argument("--cache", default="build/cache", help="folder of the decoded copies")
    parser.add_argument("--count", type=positive, default=40, help="pictures, of held-out portraits")
    args = parser.parse_args()
    model, info = load_model(find_weights(args.weights))
    pairs = load_pairs(resolve(args.data), args.cache)
    rng, found, false, seconds, scores = np.random.default_rng(0), 0, 0, 0.0, []
    chosen = split(len(pairs.names))[1][: args.count]
    for index in chosen:
        portrait, true = pairs.images[index].transpose(1, 2, 0), pairs.masks[index]
        picture, window = composed(rng, portrait)
        begun = time.process_time()
        parsed = parse_photo([model], picture, info["size"], NO_VIEWS, torch.device("cpu"))
        seconds += time.process_time() - begun
        covers = [overlap(face, window) > 0.5 for _, face in parsed.faces if not parsed.missed]
        found += any(covers)
        false += covers.count(False)
        left, top, side, _ = window
        pasted = Image.fromarray(parsed.mask[top : top + side, left : left + side])
        alone = parse_photo([model], portrait, info["size"], NO_VIEWS, torch.device("cpu"), whole=True).mask
        masks = np.asarray(pasted.resize(true.shape, Image.Resampling.NEAREST)), alone
        scores.append([confusion(mask, true) for mask in masks])
    laid, itself = (official_score(np.stack(part)) for part in zip(*scores, strict=True))
    print(f"{found} of {len(chosen)} found, {false} false faces, {seconds / len(chosen):.1f} s of processor time each")
    print(f"official score {laid:.4f} on the pictures, {itself:.4f} of the portraits by themselves")


if __name__ == "__main__":
    run_main(main)
