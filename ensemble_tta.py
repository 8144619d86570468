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
    members = [FaceParser(weights, **parser_settings(args)) for weights in args.weights]
    sizes = {member.size for member in members}
    if len(sizes) > 1:
        raise UserError(f"the checkpoints are for sizes {sorted(sizes)}: choose one with --size")
    # The finest logits first: the others are upsampled to their grid.
    members[0].models = sorted((member.models[0] for member in members), key=lambda model: model.stride)
    return predict_all(members[0], args)


if __name__ == "__main__":
    run_main(main)
