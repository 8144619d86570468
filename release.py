"""Make runs/release from a run: its records, and its weights in half precision.

python release.py --name a
python release.py --name a --weights runs/a/decoded.pt

predict.py, package.py and evaluate.py use runs/release where no other weights are named.
"""

import argparse
import shutil

import torch

import checkpoint
from atomic import write_text
from errors import ArgumentParser, UserError, run_main
from rundir import RELEASE, find_run, find_weights

LICENCE = """These weights were trained on CelebAMask-HQ (Lee et al., arXiv 1907.11922), which is for non-commercial
research and education; they come under the same restriction. They hold no image of it.
"""


def halved(content):
    """A checkpoint with its floating-point weights in half precision; loading turns them back into single."""
    state = content["state_dict"]
    return {**content, "state_dict": {k: v.half() if v.is_floating_point() else v for k, v in state.items()}}


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--name", required=True, help="the run")
    parser.add_argument("--weights", help="weights made from the run; default its best.pt")
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    args = parser.parse_args()
    folder = find_run(args.name, args.runs)
    if folder.resolve() == RELEASE.resolve():
        raise UserError(f"{folder} is the release already; name another run")
    content = halved(checkpoint.load(find_weights(args.weights or str(folder), args.runs)))
    if any(not value.isfinite().all() for value in content["state_dict"].values()):
        raise UserError(f"weights of {folder} do not fit half precision; release another run")
    RELEASE.mkdir(parents=True, exist_ok=True)
    for name in ("args.json", "metrics.jsonl", "best.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, RELEASE / name)
        else:  # the former release's would tell of other weights
            (RELEASE / name).unlink(missing_ok=True)
    checkpoint.save(RELEASE / "best.pt", content)
    write_text(RELEASE / "LICENCE.txt", LICENCE)
    size = (RELEASE / "best.pt").stat().st_size
    parameters = sum(v.numel() for v in content["state_dict"].values() if isinstance(v, torch.Tensor))
    print(f"{RELEASE}: {size / 1e6:.1f} MB, {parameters:,} numbers with the norms' statistics")


if __name__ == "__main__":
    run_main(main)
