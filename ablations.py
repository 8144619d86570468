"""What a change of settings is worth: finished runs of one budget beside the one that differs least from all others.

make report NAME=a     # a table of them in runs/a/report.html
"""

import inspect
import json

from leaderboard import PLACES, settings_of
from model import MODELS
from rundir import faces_drawn

# What a training does beside computing its weights; `seed` is told apart, sizes and epochs are the budget.
IDLE = PLACES | {
    "train_score", "keep_every", "compile", "amp", "seed", "sizes", "epochs", "val_split", "split_seed", "model_args",
}  # fmt: skip


def finished(run):
    """Whether a run is scored and did all its epochs."""
    return run.row is not None and run.lines[-1]["epoch"] == sum(length for _, length in run.phases)


def budget(run):
    """What must be the same for two runs to be compared: sizes, epochs, and the pairs held out."""
    return json.dumps([run.phases, run.args["val_split"], run.args["split_seed"]])


def kind(run):
    """Of what the ablations of a report are: the network, and whether its faces were drawn."""
    return run.args["model"], faces_drawn(run.record)


def settings(run):
    """The settings that decide a run's result within its budget, its network's arguments among them, all of them."""
    given = {**settings_of(), **run.args}
    network = {name: p.default for name, p in inspect.signature(MODELS[given["model"]]).parameters.items()}
    known = {**network, **given, **json.loads(given["model_args"])}
    return {key: value for key, value in known.items() if key not in IDLE}


def difference(one, other):
    """{setting: value} of what `one` has otherwise than `other`."""
    return {key: value for key, value in one.items() if value != other.get(key)}


def ablations(run, runs):
    """(runs of the base, [({setting: value} that differs, runs), ...] best first) of one budget, or None.

    They are of the same network as `run` and of its budget, or where it stands alone in that, of the budget of most
    settings. The base is the setting that differs least from all others. Runs that differ in their seed alone count as
    one setting.
    """
    groups = {}
    for other in (other for other in runs if finished(other) and kind(other) == kind(run)):
        groups.setdefault(budget(other), {}).setdefault(json.dumps(settings(other), sort_keys=True), []).append(other)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    if not groups:
        return None
    group = groups.get(budget(run)) or max(groups.values(), key=len)
    known = {key: json.loads(key) for key in group}

    def distance(key):
        return sum(len(difference(known[key], other)) for other in known.values()), -len(group[key]), key

    base = min(group, key=distance)
    rows = [(difference(known[key], known[base]), members) for key, members in group.items() if key != base]
    return group[base], sorted(rows, key=lambda row: -mean_score(row[1]))


def mean_score(runs):
    """Mean official score of runs."""
    return sum(run.row["official"] for run in runs) / len(runs)
