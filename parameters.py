"""A network's parameters by module, which fails at the challenge's limit.

python parameters.py --model microsegformer
python parameters.py --model microsegformer --no-lmsa
"""

import argparse
import sys

from errors import ArgumentParser, run_main
from model import MODELS, build, must_have_lmsa
from options import json_arguments

# A submission must have fewer parameters than this, frozen ones included.
PARAM_LIMIT = 1_821_085


def count_parameters(model):
    """All parameters, frozen ones included, as the challenge counts them; buffers are none."""
    return sum(p.numel() for p in model.parameters())


def parameter_table(model):
    """Parameters by top-level module and in all, as text."""
    rows = [(name, count_parameters(module)) for name, module in model.named_children()]
    rows = [(name, count) for name, count in rows if count] + [("total", count_parameters(model))]
    return "\n".join(f"{name:<18}{count:>12,}" for name, count in rows)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="microsegformer")
    parser.add_argument("--lmsa", action=argparse.BooleanOptionalAction, help="LMSA in MicroSegFormer; default with it")
    parser.add_argument("--model-args", default="{}", help="further constructor arguments as JSON")
    args = parser.parse_args()
    arguments = json_arguments(args.model_args)
    if args.lmsa is not None:
        must_have_lmsa(args.model)
        arguments["lmsa"] = args.lmsa
    model = build(args.model, **arguments)
    print(parameter_table(model))
    if count_parameters(model) >= PARAM_LIMIT:
        print(f"FAIL: the challenge wants fewer than {PARAM_LIMIT:,}", file=sys.stderr)
        return 1
    print(f"ok: fewer than {PARAM_LIMIT:,}")
    return 0


if __name__ == "__main__":
    run_main(main)
