"""Masks from the averaged predictions of several checkpoints, each seen through the views.

python ensemble_tta.py --weights runs/a/best.pt runs/b/best.pt --views flip --input photos --output masks

The challenge forbids submitting the masks of several models; one model seen through several views is one model, and
`make predict VIEWS=` does the same for it.
"""

from common import ArgumentParser, UserError, print_message, run_main

from predict import FaceParser, add_arguments, parser_settings, predict_all


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--weights", nargs="+", required=True, help="checkpoints, or names or folders of runs")
    args = parser.parse_args()
    if len(args.weights) > 1:
        print_message("an ensemble of models; the challenge forbids submitting its masks")
    parsers = [FaceParser(weights, **parser_settings(args)) for weights in args.weights]
    sizes = {parser.size for parser in parsers}
    if len(sizes) > 1:
        raise UserError(f"the checkpoints are for sizes {sorted(sizes)}: choose one with --size")
    face_parser = parsers[0]
    # The finest logits first: the others are upsampled to their grid.
    face_parser.models = sorted((parser.models[0] for parser in parsers), key=lambda model: model.stride)
    return predict_all(face_parser, args)


if __name__ == "__main__":
    run_main(main)
