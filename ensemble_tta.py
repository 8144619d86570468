"""Masks from several checkpoints and views averaged, or from one run's checkpoints averaged into one model.

python ensemble_tta.py --weights runs/a/best.pt runs/b/best.pt --views flip --input photos --output masks
python ensemble_tta.py --weights runs/a/epoch-*.pt --average-weights --input photos --output masks

Averaging the predictions of several models is an ensemble, which the challenge forbids to submit; an average of the
weights of one run is one model, which it allows (arXiv 1803.05407).
"""

import argparse
import sys

import torch

import checkpoint
from device import local_device
from errors import ArgumentParser, UserError, run_main
from predict import add_arguments, predict_all
from rundir import find_weights


def average_weights(paths):
    """One checkpoint whose floating-point weights are the mean of those in `paths`; UserError where they differ."""
    contents = [checkpoint.load(path) for path in paths]
    first = contents[0]
    for path, content in zip(paths, contents, strict=True):
        same = all(content[key] == first[key] for key in ("model", "model_args"))
        shapes, wanted = ({k: v.shape for k, v in c["state_dict"].items()} for c in (content, first))
        if not same or shapes != wanted:
            raise UserError(f"{path} is of another network than {paths[0]}; average checkpoints of one run")
    for name, kept in first["state_dict"].items():
        if kept.is_floating_point():
            mean = torch.stack([content["state_dict"][name].float() for content in contents]).mean(0)
            first["state_dict"][name] = mean
    # Of a training at growing sizes the last one is what its network is for.
    size, validated = max(c["size"] for c in contents), all(checkpoint.validated(c) for c in contents)
    return {key: first[key] for key in ("model", "model_args", "state_dict")} | {"size": size, "validated": validated}


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--weights", nargs="+", required=True, help="checkpoints, or names or folders of runs")
    parser.add_argument("--average-weights", action="store_true", help="average the weights into one model")
    parser.add_argument("--save", help="with --average-weights: write the averaged checkpoint here")
    args = parser.parse_args()
    if args.save and not args.average_weights:
        raise UserError("--save goes with --average-weights")
    device = local_device(args.device)
    paths = [find_weights(weights) for weights in args.weights]
    if args.average_weights:
        if len({path.resolve().parent for path in paths}) > 1:
            print("note: checkpoints of several runs; the challenge allows an average of one run's", file=sys.stderr)
        content = average_weights(paths)
        if args.save:
            checkpoint.save(args.save, content)
        models, size = [checkpoint.restore(content, paths[0], device)], content["size"]
    else:
        if len(paths) > 1:
            print("note: an ensemble of models; the challenge forbids submitting its masks", file=sys.stderr)
        loaded = [checkpoint.load_model(path, device) for path in paths]
        sizes = {info["size"] for _, info in loaded}
        if len(sizes) > 1 and not args.size:
            raise UserError(f"the checkpoints are for sizes {sorted(sizes)}: give one with --size")
        # The finest logits first: the others are brought to their grid.
        models, size = sorted((model for model, _ in loaded), key=lambda model: model.stride), max(sizes)
    return predict_all(models, args.size or size, args, device)


if __name__ == "__main__":
    run_main(main)
