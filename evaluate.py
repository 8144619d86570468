"""The official score of a network on held-out pairs, as the challenge counts: labels as they are, at 512 x 512.

python evaluate.py --weights runs/a/best.pt
python evaluate.py --weights a --views flip,scales --data data

The held-out pairs are those that the run beside the checkpoint (args.json) held out, else the reference's tenth.
"""

import argparse
import sys

import numpy as np
import torch

import checkpoint
from augment import soft_labels
from data import load_pairs, resolve, split
from device import local_device
from errors import ArgumentParser, UserError, run_main, tell
from labels import NUM_CLASSES
from losses import segmentation_loss
from metrics import confusion, table
from rundir import data_of, find_weights, training_args
from views import area, check_size, label_map, log_probabilities, parse_views


@torch.inference_mode()
def evaluate(
    model, pairs, indices, size, device, *, views=(False, (1.0,)), batch=4, share=(0, 1), stop=lambda: False
):  # fmt: skip
    """Confusions (N, 19, 19) int64 of a network on pairs[indices] seen at `size`, and their CE + Dice losses (N,).

    With `share` = (rank, processes), each process fills its own rows and leaves the others 0, so that a sum over the
    processes is the whole. Reversed masks stay as they are. Where `stop()` becomes true the rest is left 0.
    """
    was_training = model.training
    model.eval()
    rank, processes = share
    confusions = np.zeros((len(indices), NUM_CLASSES, NUM_CLASSES), np.int64)
    losses = np.zeros(len(indices))
    rows = np.arange(len(indices))[rank::processes]
    for start in range(0, len(rows), batch):
        if stop():
            break
        chosen = rows[start : start + batch]
        images, masks = pairs.batch(indices[chosen], fix_sides=False)
        log_p = log_probabilities([model], torch.from_numpy(images).to(device), size, views)
        # Halved down to the next finer grid, then averaged to the logits' own, which need not divide the mask.
        ratio = max(1, masks.shape[-1] // log_p.shape[-1])
        stride = 2 ** (ratio.bit_length() - 1)  # the power of two not above the ratio
        target = soft_labels(torch.from_numpy(masks).to(device), stride)
        target = area(target, log_p.shape[2:])
        for row, one, shares, mask in zip(chosen, log_p, target, masks, strict=True):
            losses[row] = segmentation_loss(one[None], shares[None]).item()
            confusions[row] = confusion(label_map(one[None], *mask.shape)[0].cpu().numpy(), mask)
    model.train(was_training)
    return confusions, losses


def unseen(path, content, args, count):
    """Indices of the pairs, of `count`, that the training of a checkpoint held out, as its args.json or flags say.

    And a remark where the training may have seen them, else "". UserError where there are none.
    """
    trained = training_args(path)
    own = trained.get("val_split") or 0.1, trained.get("split_seed", 42)
    flags = args.val_split, args.split_seed
    share, seed = (default if flag is None else flag for flag, default in zip(flags, own, strict=True))
    _, held = split(count, share, seed)
    if not len(held):
        raise UserError(f"--val-split {share} leaves nothing to evaluate")
    if not checkpoint.validated(content):
        return held, f"{path} was trained without validation: it may have seen these pairs"
    if (share, seed) != own:
        return held, f"{path} held out other pairs (--val-split {own[0]} --split-seed {own[1]}): it has seen these"
    return held, ""


def add_arguments(parser):
    """The flags that name a network and the pairs held out of its training."""
    parser.add_argument("--weights", help="checkpoint, or run's name or folder; default the release, else the best run")
    parser.add_argument("--data", help="folder with train/; default its training's, ./data, drawn faces")
    parser.add_argument("--cache", default="build/cache", help="folder of the decoded copies")
    parser.add_argument("--val-split", type=float, help="share held out; without it the training's, else 0.1")
    parser.add_argument("--split-seed", type=int, help="seed of the split; without it the training's, else 42")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--views", default="", help="views to average: flip, scales, or numbers, as flip,1,1.5")
    parser.add_argument("--size", type=int, default=0, help="image side for the network; 0 is the checkpoint's own")
    args = parser.parse_args()
    views, device = parse_views(args.views), local_device(args.device)
    check_size(args.size or 32)
    path = find_weights(args.weights)
    model, info = checkpoint.load_model(path, device)
    pairs = load_pairs(resolve(data_of(path, args.data)), args.cache)
    held, remark = unseen(path, info, args, len(pairs.names))
    if remark:
        tell(remark, "warning")
    print(f"{path} on {len(held)} held-out images, views {args.views or 'none'}", file=sys.stderr)
    print(table(evaluate(model, pairs, held, args.size or info["size"], device, views=views)[0]))


if __name__ == "__main__":
    run_main(main)
