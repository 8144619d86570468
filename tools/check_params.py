"""Parameters of a network by module; fails at the challenge's limit.

python -m tools.check_params                                    # of the weights that `make submit` would submit
python -m tools.check_params --name a                           # of a run
python -m tools.check_params --model microsegformer --no-lmsa   # of a training with these flags of train.py
"""

import sys

from common import UserError, run_main

from checkpoint import load
from model import PARAM_LIMIT, build, check_logits, count_parameters
from options import flag, network_arguments, parse
from register import find_weights


def parameter_table(model):
    """Parameters by top-level module and in total, as text."""
    rows = [(name, count_parameters(module)) for name, module in model.named_children()]
    rows = [(name, count) for name, count in rows if count] + [("total", count_parameters(model))]
    return "\n".join(f"{name:<18}{count:>12,}" for name, count in rows)


def main():
    args, given = parse(sys.argv[1:])
    name, arguments, source = args.model, network_arguments(args), ""
    if given <= {"name", "runs"}:
        path = find_weights(args.name, args.runs)
        content = load(path)
        name, arguments, source = content["model"], content["model_args"], f" of {path}"
    elif args.name:
        ignored = flag(min(given - {"name", "runs"}))
        raise UserError(f"{ignored} has no effect with --name, whose network is that of its weights")
    model = build(name, **arguments)
    check_logits(model)
    print(f"{name}{source}\n{parameter_table(model)}")
    if count_parameters(model) >= PARAM_LIMIT:
        print(f"FAIL: a submission must have fewer than {PARAM_LIMIT:,}", file=sys.stderr)
        return 1
    print(f"ok: fewer than {PARAM_LIMIT:,}")
    return 0


if __name__ == "__main__":
    run_main(main)
