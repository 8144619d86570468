"""What the folder of a run holds, read and checked, and how its settings differ from others."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UserError
from labels import NUM_CLASSES
from leaderboard import PLACES, settings_of, standing, summary, survey
from rundir import in_training, read_json, read_metrics
from schedule import parse_sizes


@dataclass(frozen=True)
class Run:
    """What a run's folder holds; `row` is the leaderboard's, `best` is best.json, both None before a validation."""

    folder: Path
    record: dict
    lines: list
    phases: list
    row: dict | None
    best: dict | None
    training: bool

    @property
    def name(self):
        """The folder's name, which is the run's."""
        return self.folder.name

    @property
    def args(self):
        """Arguments of the training, as a dict."""
        return self.record["args"]


def must_be_numbers(*values):
    """TypeError or ValueError where one of the values is no finite number, which charts would fall over."""
    for value in values:
        if isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{value!r}, which is no finite number")


def read_run(folder):
    """The run of a folder. UserError, or an error of lookup, type or value, where its files are damaged."""
    record, lines, row = read_json(folder / "args.json"), read_metrics(folder), summary(folder)
    phases = parse_sizes(record["args"]["sizes"], record["args"]["epochs"])
    must_be_numbers(*(line[key] for line in lines for key in ("epoch", "loss", "lr")))
    must_be_numbers(*(line[key] for line in lines for key in ("val_loss", "official", "train_official") if key in line))
    if row:
        must_be_numbers(*(row[key] for key in ("official", "batch32", "epoch", "epochs", "lr", "dice", "minutes")))
        must_be_numbers(row["parameters"] or 0)
    if not isinstance(record["commit"], str) or not isinstance(record["versions"], dict):
        raise UserError(f"{folder}/args.json tells no commit or versions")
    best = read_best(folder) if (folder / "best.json").is_file() else None
    return Run(folder, record, lines, phases, row, best, in_training(folder))


def read_best(folder):
    """best.json of a run; UserError, or an error of lookup, type or value, where it is damaged."""
    best = read_json(folder / "best.json")
    confusion, labels, images = np.array(best["confusion"], float), best["labels"], best["images_with_label"]
    if confusion.shape != (NUM_CLASSES, NUM_CLASSES) or not len(labels) == len(images) == NUM_CLASSES:
        raise UserError(f"{folder}/best.json is not about {NUM_CLASSES} labels")
    must_be_numbers(best["official"], best["batch32"], *images, *confusion.flat)
    rows = [labels, *best["image_scores"].values()]
    must_be_numbers(*(f for row in rows for f in row if f is not None))
    return best


def read_runs(runs):
    """The runs below a folder: (scored ones by `standing`; unscored ones; [(name, reason), ...] of unreadable ones)."""
    found, unreadable = survey(runs, read_run)
    scored = sorted((run for run in found if run.row), key=lambda run: standing(run.row))
    return scored, [run for run in found if not run.row], unreadable


def changed(run):
    """{setting: value} of a run's arguments that differ from train.py's own defaults."""
    defaults = settings_of()
    return {key: value for key, value in run.args.items() if key not in PLACES and value != defaults.get(key)}


def shown(value):
    """A setting's value as it is typed."""
    return "on" if value is True else "off" if value is False else "none" if value is None else str(value)


def sentence(error):
    """The message of a UserError with a capital and a stop."""
    message = str(error)
    return f"{message[:1].upper()}{message[1:]}."
