"""Masks from several checkpoints and views averaged, or from one run's checkpoints averaged into one model.

python ensemble_tta.py --weights runs/a/best.pt runs/b/best.pt --views flip --input photos --output masks
python ensemble_tta.py --weights runs/a/epoch-*.pt --average-weights --save runs/a/average.pt

Averaging the predictions of several models is an ensemble, which the challenge forbids to submit. An average of the
weights of one run is one model, which it allows (arXiv 1803.05407).
"""

from pathlib import Path

from common import ArgumentParser, UserError, print_message, run_main

import torch

import checkpoint
from model import fold_batch_norm
from predict import FaceParser, add_arguments, parser_settings, predict_all


def average_weights(paths):
    """One checkpoint with the mean of the floating-point weights in `paths`. UserError if the networks differ."""
    contents = [checkpoint.load(path) for path in paths]
    first = contents[0]
    for path, content in zip(paths, contents, strict=True):
        same = all(content[key] == first[key] for key in ("model", "model_args"))
        shapes, expected = ({k: v.shape for k, v in c["state_dict"].items()} for c in (content, first))
        if not same or shapes != expected:
            raise UserError(f"{path} is of another network than {paths[0]}; average checkpoints of one run")
    for name, kept in first["state_dict"].items():
        if kept.is_floating_point():
            mean = torch.stack([content["state_dict"][name].float() for content in contents]).mean(0)
            first["state_dict"][name] = mean
    average = {key: first[key] for key in ("model", "model_args", "state_dict")}
    average["size"] = max(content["size"] for content in contents)  # the last of a training at growing sizes
    used = set().union(*(content.get("trained_on", ()) for content in contents))
    average |= {"trained_on": sorted(used), "held_out": [n for n in first.get("held_out", ()) if n not in used]}
    return average | {"validated": all(map(checkpoint.is_validated, contents))}


def main():
    parser = ArgumentParser(description="Write masks from averaged predictions or weights.")
    add_arguments(parser, required=False)
    parser.add_argument("--weights", nargs="+", required=True, help="checkpoints, or names or folders of runs")
    parser.switch("--average-weights", help="average the weights into one model")
    parser.add_argument("--save", help="with --average-weights: write the averaged checkpoint to this file")
    args = parser.parse_args()
    if args.save and not args.average_weights:
        raise UserError("--save requires --average-weights")
    if args.save and Path(args.save).exists():
        raise UserError(f"{args.save} exists; remove it or choose another file")
    if bool(args.input) != bool(args.output) or not (args.input or args.save):
        raise UserError("give --input IMAGES with --output FOLDER, or --average-weights with --save FILE, or all four")
    paths = [checkpoint.find_weights(weights) for weights in args.weights]
    if args.average_weights:
        if len({path.resolve().parent for path in paths}) > 1:
            print_message("checkpoints of several runs; the challenge allows an average of one run's")
        content = average_weights(paths)
        if args.save:
            checkpoint.save(args.save, content)
            print(f"{args.save}: the average of {len(paths)} checkpoints; next: make evaluate WEIGHTS={args.save}")
        if not args.input:
            return 0
        face_parser = FaceParser(paths[0], **parser_settings(args))
        face_parser.models = [fold_batch_norm(checkpoint.restore(content, paths[0], face_parser.device))]
        face_parser.size = args.size or content["size"]
    else:
        if len(paths) > 1:
            print_message("an ensemble of models; the challenge forbids submitting its masks")
        parsers = [FaceParser(path, **parser_settings(args)) for path in paths]
        sizes = {parser.size for parser in parsers}
        if len(sizes) > 1:
            raise UserError(f"the checkpoints are for sizes {sorted(sizes)}: choose one with --size")
        face_parser = parsers[0]
        # The finest logits first: the others are upsampled to their grid.
        face_parser.models = sorted((parser.models[0] for parser in parsers), key=lambda model: model.stride)
    return predict_all(face_parser, args)


if __name__ == "__main__":
    run_main(main)
