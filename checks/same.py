"""Whether two trainings came to the same: weights, optimiser, metrics and scores, all but the time they took."""

import json

import torch

import checkpoint

TIMES = ("minutes", "images_per_s")


def equal(a, b):
    """Whether two states of last.pt are equal to the bit, seconds apart."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def metrics(folder):
    """The lines of metrics.jsonl without what depends on time; ValueError where one is torn."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def difference(folder, other):
    """What differs between the folders of two finished runs, "" where nothing does."""
    lines = metrics(folder)
    if [line["epoch"] for line in lines] != list(range(1, len(lines) + 1)):
        return f"metrics.jsonl has epochs {[line['epoch'] for line in lines]}"
    if lines != metrics(other):
        return "metrics.jsonl differs"
    if not equal(checkpoint.load(folder / "last.pt"), checkpoint.load(other / "last.pt")):
        return "last.pt differs"
    for name in ("best.pt", "best.json"):
        if (folder / name).read_bytes() != (other / name).read_bytes():
            return f"{name} differs"
    names = ({path.name for path in run.iterdir()} for run in (folder, other))
    extra = set.symmetric_difference(*names)
    return f"files differ: {', '.join(sorted(extra))}" if extra else ""
