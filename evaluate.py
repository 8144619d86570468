"""The official score, of a network on held-out pairs or of a folder of masks: uncorrected labels, 512 x 512.

python evaluate.py --weights runs/a/best.pt
python evaluate.py --weights a --views flip,scales --data data
python evaluate.py --masks masks --truth data/train/masks

The held-out pairs are those that the checkpoint names, else those it was not trained on, else the reference's.
"""

import json
import sys
import time
from pathlib import Path

from common import ArgumentParser, UserError, natural, print_message, read_json, run_main, show_progress, write_text

import numpy as np
import torch

import checkpoint
import register
from data import find_data_of, is_synthetic, load_pairs, split
from device import select_device
from images import image_files, read_mask
from labels import NAMES, NUM_CLASSES
from losses import segmentation_loss, soft_labels
from views import ONE_VIEW, area, check_size, label_map, log_probabilities, parse_views, to_device


def confusion(pred, true):
    """Pixel counts (19, 19) int64, rows true, columns predicted, of two label maps of the same shape, values 0..18."""
    pairs = true.ravel().astype(np.int64) * NUM_CLASSES + pred.ravel()
    return np.bincount(pairs, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)


def f_scores(confusions):
    """F of every label (..., 19) from confusions (..., 19, 19); NaN if the label is absent from the truth."""
    tp = np.diagonal(confusions, axis1=-2, axis2=-1).astype(float)
    predicted, true = confusions.sum(-2), confusions.sum(-1)
    precision, recall = tp / (predicted + 1e-7), tp / (true + 1e-7)
    f = 2 * precision * recall / (precision + recall + 1e-7)
    return np.where(true > 0, f, np.nan)


def official_score(confusions):
    """The challenge's score, 0..1, of per-image confusions (N, 19, 19): mean F over present labels, then images."""
    return float(np.nanmean(f_scores(confusions), axis=1).mean())


def batch_score(confusions, batch=32):
    """The reference system's figure: the same F over the pooled pixels of each batch of images, averaged by batch."""
    pooled = [confusions[start : start + batch].sum(0) for start in range(0, len(confusions), batch)]
    return float(np.mean([np.nanmean(f_scores(c)) for c in pooled]))


def label_scores(confusions):
    """Mean F over the images that contain the label (19,), NaN if none does, and the number of these images (19,)."""
    f = f_scores(confusions)
    images = (~np.isnan(f)).sum(0)
    return np.nansum(f, 0) / np.where(images, images, np.nan), images


def score_table(confusions):
    """The scores as text: official, batch-of-32, and one line per label."""
    f, images = label_scores(confusions)
    scores = f"official score {official_score(confusions):.4f}   batch-of-32 score {batch_score(confusions):.4f}"
    lines = [f"{scores}   images {len(confusions)}", f"{'label':<12}{'F':>8}{'images':>8}"]
    lines += [f"{NAMES[i]:<12}{f[i]:>8.4f}{images[i]:>8d}" for i in range(NUM_CLASSES) if images[i]]
    return "\n".join(lines)


@torch.inference_mode()
def evaluate(model, pairs, indices, size, device, *, views=ONE_VIEW, batch=0, ranks=(0, 1), stop=lambda: False):
    """Confusions (N, 19, 19) int64 of a network on pairs[indices] resized to `size`, and the mean CE + Dice loss.

    With ranks = (rank, processes) each process adds only its own rows, so that the sum over processes is the whole.
    In float32, as masks are predicted. Reversed masks are not corrected. `batch` 0 is 32 images on a GPU, else 4.
    Returns early once `stop()` is true, the rest 0.
    """
    was_training = model.training
    model.eval()
    confusions, loss = np.zeros((len(indices), NUM_CLASSES, NUM_CLASSES), np.int64), torch.zeros((), device=device)
    batch = batch or (32 if device.type == "cuda" else 4)
    rows, begin = np.arange(len(indices))[ranks[0] :: ranks[1]], time.monotonic()
    for start in range(0, len(rows), batch):
        if stop():
            break
        chosen = rows[start : start + batch]
        images, masks = (to_device(part, device) for part in pairs.batch(indices[chosen], fix_sides=False))
        log_p = log_probabilities([model], images, size, views)
        # The loss is taken on the logit grid, which need not divide the mask: reduce by a power of two, then average.
        ratio = max(1, masks.shape[-1] // log_p.shape[-1])
        stride = 2 ** (ratio.bit_length() - 1)
        target = area(soft_labels(masks, stride), log_p.shape[2:])
        # log_softmax leaves log-probabilities as they are, so these are logits.
        loss += segmentation_loss(log_p, target) * len(chosen)
        predicted = label_map(log_p, *masks.shape[1:]).cpu().numpy()
        confusions[chosen] = [confusion(*pair) for pair in zip(predicted, masks.cpu().numpy(), strict=True)]
        if not ranks[0]:
            show_progress("scoring", start + len(chosen), len(rows), time.monotonic() - begin)
    model.train(was_training)
    return confusions, loss.item() / len(indices)


def held_out(content, path, keys):
    """Indices of the pairs, (name, hash of the image) each, that a loaded checkpoint held out, or else did not use.

    If there are none, or the checkpoint does not name them: those that the reference held out.
    """
    index = {}
    for i, pair in enumerate(keys):
        for key in pair:
            index.setdefault(key, []).append(i)
    pairs = checkpoint.pairs_in(content, "held_out")
    found = [index.get(known or name, []) for name, known in pairs]
    if missing := found.count([]):
        print_message(f"{missing} of the {len(pairs)} pairs held out from {path} are missing: a score of the others")
    held = list(dict.fromkeys(sum(found, [])))
    held = held or [i for i, known in enumerate(checkpoint.seen(content, keys)) if not known]
    return np.array(held) if held else split(len(keys))[1]


def compare_folders(predicted, truth):
    """Confusions (N, 19, 19) of two folders' PNG masks, by name, with a warning if the truth has more.

    UserError if a mask is not in the truth, or differs in size.
    """
    files = image_files(predicted)
    missing = [path.name for path in files if not (truth / path.name).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(files)} masks are not in {truth}, such as {missing[0]}")
    if (count := len(image_files(truth))) > len(files):
        print_message(f"{len(files)} of the {count} masks in {truth} are predicted: the score is of these")
    confusions = []
    for path in files:
        pred, true = read_mask(path), read_mask(truth / path.name)
        if pred.shape != true.shape:
            raise UserError(f"{path.name}: prediction is {pred.shape[::-1]}, truth {true.shape[::-1]} (width, height)")
        confusions.append(confusion(pred, true))
    return np.stack(confusions)


def record_views(path, views, names, confusions):
    """Add the scores of some views to a run's best.json. UserError unless that file is of the same images."""
    record = read_json(path)
    if not isinstance(record, dict) or set(record.get("image_scores") or ()) != names:
        raise UserError(f"{path} has no scores of these {len(names)} images; --record is for the weights of a run")
    scores = {"official": official_score(confusions), "batch32": batch_score(confusions)}
    record["views"] = (record.get("views") or {}) | {views: scores}
    write_text(path, json.dumps(record) + "\n")


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", "--name", help="checkpoint or run; default the release")
    parser.add_argument("--data", help="folder with train/; default that of the training, else ./data")
    parser.add_argument("--cache", default="build/cache", help="cache folder")
    parser.add_argument("--views", default="", help="views to average: flip, scales, or numbers such as flip,1,1.5")
    parser.add_argument("--size", type=int, default=0, help="side of the network's input; 0: the checkpoint's own")
    parser.add_argument("--batch", type=natural, default=0, help="images per step; 0: 32 on a GPU, else 4")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--threads", type=natural, default=0, help="CPU threads; 0: torch's default")
    parser.switch("--record", help="keep the score of these views in the run's best.json, under `views`")
    parser.add_argument("--masks", type=Path, help="score this folder of PNG masks instead of a network")
    parser.add_argument("--truth", type=Path, help="with --masks: folder of the true masks, same names")
    args = parser.parse_args()
    if args.masks or args.truth:
        if not (args.masks and args.truth):
            raise UserError("--masks PREDICTED goes with --truth TRUE, two folders")
        if args.weights or args.views or args.size or args.record:
            raise UserError("--masks are scored as they are: without --weights (NAME=), --views, --size and --record")
        print(score_table(compare_folders(args.masks, args.truth)))
        return
    views, device = parse_views(args.views), select_device(args.device, args.threads)
    check_size(args.size)
    path = register.find_weights(args.weights)
    if path != Path(args.weights or ""):  # a run's
        path = register.scored_weights(path.parent)
    data = find_data_of(path, args.data)
    synthetic = " (synthetic faces)" if is_synthetic(data) else ""
    name = f"{path}{'' if args.weights else ' (no NAME given)'}"
    print(f"weights {name}, views: {args.views or 'none'}, data: {data}{synthetic}", file=sys.stderr)
    model, info = checkpoint.load_model(path, device)
    pairs = load_pairs(data, args.cache)
    indices = held_out(info, path, pairs.keys())
    if doubt := checkpoint.doubt(info, pairs.keys(indices)):
        print_message(f"{path} {doubt}")
    if args.record:
        own = register.run_record(path).get("pairs", {}).get("content") == pairs.digest
        scored = path.name in ("best.pt", "validated.pt") and path.with_name("best.json").is_file()
        if doubt or args.size or not (own and scored):
            raise UserError("--record is for the weights and pairs that best.json has the scores of, at their size")
    confusions, _ = evaluate(model, pairs, indices, args.size or info["size"], device, views=views, batch=args.batch)
    print(score_table(confusions))
    if args.record:
        record_views(path.parent / "best.json", args.views or "none", {pairs.names[i] for i in indices}, confusions)


if __name__ == "__main__":
    run_main(main)
