"""The official score: F per label and image, averaged over the labels present, then over the images.

python metrics.py masks data/train/masks
python metrics.py --help
"""

import argparse
from pathlib import Path

import numpy as np

from errors import ArgumentParser, UserError, run_main
from images import read_mask
from labels import NAMES, NUM_CLASSES


def confusion(pred, true):
    """Pixel counts (19, 19) int64, rows true, columns predicted, of two label maps of the same shape, values 0..18."""
    if pred.shape != true.shape:
        raise ValueError(f"shapes differ: {pred.shape} and {true.shape}")
    pairs = true.ravel().astype(np.uint16)  # 16 bits hold every pair
    pairs *= NUM_CLASSES
    pairs += pred.ravel().astype(np.uint16)
    # Labels come in runs: their lengths are counted, of which there are a hundredth as many as pixels.
    ends = np.append(np.flatnonzero(pairs[1:] != pairs[:-1]), len(pairs) - 1)
    counts = np.bincount(pairs[ends], np.diff(ends, prepend=-1), NUM_CLASSES**2)
    return counts.astype(np.int64).reshape(NUM_CLASSES, NUM_CLASSES)


def f_scores(confusions):
    """F of every label (..., 19) from confusions (..., 19, 19); NaN where the label is absent from the truth."""
    tp = np.diagonal(confusions, axis1=-2, axis2=-1).astype(float)
    predicted, true = confusions.sum(-2), confusions.sum(-1)
    precision, recall = tp / (predicted + 1e-7), tp / (true + 1e-7)
    f = 2 * precision * recall / (precision + recall + 1e-7)
    return np.where(true > 0, f, np.nan)


def official_score(confusions):
    """The challenge's score, 0..1, of per-image confusions (N, 19, 19)."""
    return float(np.nanmean(f_scores(confusions), axis=1).mean())


def batch_score(confusions, batch=32):
    """The reference system's figure: the same F over the pooled pixels of each batch of images, averaged by batch."""
    pooled = [confusions[start : start + batch].sum(0) for start in range(0, len(confusions), batch)]
    return float(np.mean([np.nanmean(f_scores(c)) for c in pooled]))


def by_label(confusions):
    """Mean F over the images that have the label (19,), NaN where none has, and their number (19,)."""
    f = f_scores(confusions)
    images = (~np.isnan(f)).sum(0)
    with np.errstate(invalid="ignore"):
        return np.nansum(f, 0) / np.where(images, images, np.nan), images


def table(confusions):
    """The scores as text: official, batch-of-32, and a line for each label."""
    f, images = by_label(confusions)
    lines = [
        f"official score {official_score(confusions):.4f}   batch-of-32 score {batch_score(confusions):.4f}   "
        f"images {len(confusions)}",
        f"{'label':<12}{'F':>8}{'images':>8}",
    ]
    lines += [f"{NAMES[i]:<12}{f[i]:>8.4f}{images[i]:>8d}" for i in range(NUM_CLASSES) if images[i]]
    return "\n".join(lines)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pred", type=Path, help="folder of predicted masks")
    parser.add_argument("true", type=Path, help="folder of true masks; each prediction needs one of the same name")
    args = parser.parse_args()
    for folder in (args.pred, args.true):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}")
    names = sorted(path.name for path in args.pred.glob("*.png"))
    if not names:
        raise UserError(f"no PNG masks in {args.pred}")
    missing = [name for name in names if not (args.true / name).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(names)} predictions have no true mask, first {missing[0]}")
    confusions = []
    for name in names:
        pred, true = read_mask(args.pred / name), read_mask(args.true / name)
        if pred.shape != true.shape:
            raise UserError(f"{name}: prediction is {pred.shape[::-1]}, truth {true.shape[::-1]} (width, height)")
        confusions.append(confusion(pred, true))
    print(table(np.stack(confusions)))


if __name__ == "__main__":
    run_main(main)
