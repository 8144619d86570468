"""Logit offsets by label that raise the official score, fitted on held-out pairs and folded into the classifier.

python decode.py --weights runs/a/best.pt
python decode.py --weights runs/a/best.pt --save runs/a/decoded.pt

The score averages F over the labels present in an image, so the best mask is not the likeliest label of every pixel:
a rare label deserves a lower bar. One offset a label is added to the logits. What is printed as the gain is
cross-validated: each fold is scored with offsets fitted on the other folds. The saved network is one plain network,
its classifier's bias moved by the offsets fitted on all held-out pairs.
"""

import argparse

import numpy as np
import torch

import checkpoint
from data import load_pairs, resolve
from device import local_device
from errors import ArgumentParser, UserError, run_main, tell
from evaluate import add_arguments, unseen
from labels import NAMES, NUM_CLASSES
from metrics import official_score
from model import upsample
from rundir import data_of, find_weights
from views import log_probabilities

STEPS = (-0.4, 0.4, -0.2, 0.2, -0.1, 0.1)
LEAST_GAIN = 2e-4  # a smaller one is not worth a degree of freedom
EVERY = 4  # one pixel in so many, each way, is compared while fitting: a sixteenth tells the same


@torch.inference_mode()
def held_out(model, pairs, indices, size, device):
    """Log-probabilities (N, 19, P) float32 of the pairs at P sampled pixels, and their labels (N, P) int64."""
    log_p, labels = [], []
    for index in indices:
        images, masks = pairs.batch(np.array([index]), fix_sides=False)
        one = log_probabilities([model], torch.from_numpy(images).to(device), size)
        log_p.append(sampled(upsample(one, masks.shape[1:])))
        labels.append(sampled(torch.from_numpy(masks).to(device).long()))
    return torch.cat(log_p), torch.cat(labels)


def sampled(maps):
    """Every EVERYth pixel of maps (B, ..., H, W), each way: (B, ..., P)."""
    return maps[..., EVERY // 2 :: EVERY, EVERY // 2 :: EVERY].flatten(-2)


def score(log_p, labels, offsets):
    """Official score, 0..1, at the sampled pixels of the labels that shifted log-probabilities choose."""
    shift = torch.tensor(offsets, dtype=log_p.dtype, device=log_p.device)
    # A cell of the confusion matrices for each pixel: image, true label, predicted label.
    cells = (log_p + shift[:, None]).argmax(1)
    cells += NUM_CLASSES * (labels + NUM_CLASSES * torch.arange(len(labels), device=labels.device)[:, None])
    confusions = cells.flatten().bincount(minlength=len(labels) * NUM_CLASSES**2)
    return official_score(confusions.view(-1, NUM_CLASSES, NUM_CLASSES).cpu().numpy())


def fit(log_p, labels):
    """Offsets (19,) by coordinate ascent on the score, label by label, each kept only if it gains LEAST_GAIN."""
    offsets = np.zeros(NUM_CLASSES)
    best = score(log_p, labels, offsets)
    for _ in range(2):
        for label in range(NUM_CLASSES):
            for step in STEPS:
                tried = offsets.copy()
                tried[label] += step
                if (gained := score(log_p, labels, tried)) > best + LEAST_GAIN:
                    offsets, best = tried, gained
    return offsets


def cross_validated(log_p, labels, folds):
    """Mean gain on pairs that the offsets were not fitted on, and the gain of each fold."""
    parts = np.array_split(np.random.default_rng(0).permutation(len(labels)), folds)
    gains = []
    for part in parts:
        rest = np.setdiff1d(np.arange(len(labels)), part)
        offsets = fit(log_p[rest], labels[rest])
        own = log_p[part], labels[part]
        gains.append(score(*own, offsets) - score(*own, np.zeros(NUM_CLASSES)))
    return float(np.average(gains, weights=[len(part) for part in parts])), gains


def with_offsets(content, offsets):
    """A checkpoint's dict with offsets (19,) added to its classifier's bias."""
    state = content["state_dict"]
    bias = state["classifier.bias"]
    return {**content, "state_dict": {**state, "classifier.bias": bias + torch.tensor(offsets, dtype=bias.dtype)}}


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--save", help="write the checkpoint with the offsets in its classifier here")
    parser.add_argument("--folds", type=int, default=3, help="of the cross-validation")
    args = parser.parse_args()
    path, device = find_weights(args.weights), local_device(args.device)
    model, info = checkpoint.load_model(path, device)
    pairs = load_pairs(resolve(data_of(path, args.data)), args.cache)
    held, remark = unseen(path, info, args, len(pairs.names))
    if not 2 <= args.folds <= len(held):
        raise UserError(f"--folds {args.folds}: from 2 to the {len(held)} held-out pairs")
    if remark:
        tell(remark, "warning")
    log_p, labels = held_out(model, pairs, held, info["size"], device)
    gain, gains = cross_validated(log_p, labels, args.folds)
    print(f"cross-validated gain {gain:+.4f} ({', '.join(f'{g:+.4f}' for g in gains)}) on {len(held)} pairs")
    offsets = fit(log_p, labels)
    plain, fitted = (score(log_p, labels, o) for o in (np.zeros(NUM_CLASSES), offsets))
    print(f"fitted on all of them: {plain:.4f} to {fitted:.4f} at the sampled pixels, which says less")
    print("offsets " + ", ".join(f"{NAMES[i]} {o:+.1f}" for i, o in enumerate(offsets) if o) + " (others 0)")
    if args.save:
        checkpoint.save(args.save, with_offsets(checkpoint.load(path), offsets))


if __name__ == "__main__":
    run_main(main)
