"""Attack trainings, disks, images, checkpoints, zips and numbers; count what is lost. `make faults`.

python -m checks.faults                          # all, below 15 minutes on two cores; writes runs/faults.json
python -m checks.faults --short --part killed    # a few attempts of one part, as `make test` has them

A loss is whatever should not be: a resumed training that differs from an uninterrupted one, a torn file, a bad input
that is neither handled rightly nor refused by one line that names it, a traceback, a hang, a process left behind.
The exit status is 1 where there is one.
"""

import argparse
import importlib
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

import checkpoint
from atomic import write_text
from checks.attempt import run
from errors import ArgumentParser, run_main
from model import build
from synth import make_dataset

PARTS = {
    "killed": "trainings and zips killed or stopped anywhere, one process or two",
    "disk": "full disks, forbidden folders, files that change, stale caches, one name for two",
    "images": "bad images and masks",
    "files": "bad checkpoints and zips",
    "numbers": "losses and weights that are no numbers, diverging rates, odd and tiny data, flags out of range",
    "fuzz": "fuzzed: augmentation, mixing, the score, argument parsing",
    "same": "same in, same out: trainings, masks, batches",
}
# A MicroUNet of a few thousand parameters.
TINY = {"widths": [4, 4, 8, 8, 8], "depths": [0, 1, 1, 1, 1], "decoder": [4, 4, 8, 8]}
FLAGS = (
    *("--model", "microunet", "--model-args", json.dumps(TINY), "--sizes", "32:2,64:2", "--batch", "4"),
    *("--optimiser", "muon", "--ema", "0.9", "--augment", "advanced", "--lr", "1e-3", "--warmup", "1"),
    *("--val-split", "0.3", "--val-every", "2", "--keep-every", "3", "--save-minutes", "0", "--device", "cpu"),
)  # fmt: skip


class Ledger:
    """Attempts and losses by part and case."""

    def __init__(self):
        self.cases = defaultdict(lambda: defaultdict(lambda: [0, 0]))
        self.losses, self.skipped = [], []

    def add(self, part, case, problem):
        """Count an attempt; `problem` says what was lost, "" for nothing."""
        count = self.cases[part][case]
        count[0] += 1
        if problem:
            count[1] += 1
            self.losses.append(f"{part}, {case}: {problem}")
            print(f"LOSS  {self.losses[-1]}", flush=True)

    def skip(self, part, case, why):
        """Note a case that cannot be tried on this machine."""
        self.skipped.append(f"{part}, {case}: {why}")

    def table(self):
        """Markdown: a line for each part; its cases stand in the JSON file."""
        lines = ["| attack | attempts | losses |", "|---|---|---|"]
        total = [0, 0]
        for part, cases in self.cases.items():
            sums = [sum(column) for column in zip(*cases.values(), strict=True)]
            total = [a + b for a, b in zip(total, sums, strict=True)]
            lines.append(f"| {PARTS[part]} | {sums[0]} | {sums[1]} |")
        return "\n".join([*lines, f"| all | {total[0]} | {total[1]} |"])


def make_place(root):
    """Drawn faces, their cache and a checkpoint whose masks vary, for the attacks; all below `root`."""
    place = SimpleNamespace(root=root, data=root / "data", cache=root / "cache", runs=root / "runs", flags=FLAGS)
    make_dataset(place.data, train=14, dev=0, test=3, workers=1)
    place.train = lambda name, *more, data=place.data, cache=place.cache: [
        "train.py", "--runs", place.runs, "--data", data, "--cache", cache, "--name", name, *FLAGS, *more,
    ]  # fmt: skip
    place.resume = lambda name, *more, data=place.data, cache=place.cache: [
        "train.py", "--runs", place.runs, "--data", data, "--cache", cache, "--resume", name, *more,
    ]  # fmt: skip
    torch.manual_seed(0)
    model = build("microunet", **TINY)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    place.weights = root / "weights.pt"
    place.content = {"model": "microunet", "model_args": TINY, "size": 64, "state_dict": model.state_dict()}
    checkpoint.save(place.weights, place.content)
    begun = os.times()
    whole = run(*place.train("whole"))
    ended = os.times()
    place.cpu = ended.children_user + ended.children_system - begun.children_user - begun.children_system
    if problem := whole.not_fine():
        raise SystemExit(f"the uninterrupted training failed: {problem}")
    place.whole = place.runs / "whole"
    return place


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer attempts")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="attacks to make")
    parser.add_argument("--out", help="JSON file of the counts; default runs/faults.json where all are made in full")
    args = parser.parse_args()
    ledger, begun, seconds = Ledger(), time.monotonic(), {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        place = make_place(Path(root).resolve())
        for part in args.part:
            start = time.monotonic()
            importlib.import_module(f"checks.faults_{part}").attack(ledger, place, args.short)
            seconds[part] = round(time.monotonic() - start, 1)
            print(f"{part}: {seconds[part]} s", flush=True)
    print("\n" + ledger.table())
    for case in ledger.skipped:
        print(f"not tried: {case}")
    minutes = (time.monotonic() - begun) / 60
    print(f"{len(ledger.losses)} losses, {minutes:.1f} minutes")
    out = args.out or ("runs/faults.json" if not args.short and args.part == list(PARTS) else None)
    if out:
        record = {
            "cases": ledger.cases, "losses": ledger.losses, "not_tried": ledger.skipped, "minutes": round(minutes, 1),
            "seconds": seconds,
        }  # fmt: skip
        write_text(out, json.dumps(record, indent=1) + "\n")
    return int(bool(ledger.losses))


if __name__ == "__main__":
    run_main(main)
