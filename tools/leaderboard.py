"""Leaderboard of the runs, and the recipes with the reference's scores beside ours.

python -m tools.leaderboard
python -m tools.leaderboard --recipes
"""

import functools
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

from common import ArgumentParser, print_message, printable, read_json, run_main

import options
from checkpoint import is_validated, load
from register import is_running, make_name, read_metrics

NEUTRAL = options.NEUTRAL | {"name", "recipe", "overwrite"}


def number(value):
    """`value` if it is a finite int or float, else ValueError: a run's files may contain anything."""
    if type(value) not in (int, float) or not -1e300 < value < 1e300:
        raise ValueError(f"{textwrap.shorten(repr(value), 40)} is not a finite number")
    return value


def summary(folder):
    """The figures of a run as a dict; None if no epoch was scored."""
    record, lines, path = read_json(folder / "args.json"), read_metrics(folder), folder / "best.pt"
    args, scored = record["args"], [line for line in lines if "official" in line]
    if not scored:
        return None
    best, last = max(scored, key=lambda line: number(line["official"])), lines[-1]
    figures = {key: best[key] for key in ("official", "batch32", "epoch")} | {key: args[key] for key in ("lr", "dice")}
    figures |= {"epochs": last["epoch"], "minutes": last["minutes"], "parameters": record.get("parameters") or 0}
    row = {key: number(value) for key, value in figures.items()}
    row |= {
        "name": folder.name,
        "model": args["model"],
        "recipe": args["recipe"],
        "date": str(record.get("started", "-"))[:10],
    }
    pairs = record.get("pairs") or {}
    row |= {"synthetic": bool(pairs.get("drawn")), "images": number(pairs.get("validation") or 0)}
    row["lmsa"] = ("no", "yes")[args["lmsa"]] if args["model"] == "microsegformer" else "-"
    row["weights"] = ("yes" if is_validated(load(path)) else "all pairs") if path.is_file() else "-"
    return row | {"changed": changed_settings(args), "line": make_line(args)}


@functools.cache
def settings_of(recipe=None):
    """{argument: value} of a training with a recipe; the defaults if there is no such recipe."""
    return vars(options.parse(["--recipe", recipe] if recipe in options.load_recipes() else [])[0])


def changed_settings(args):
    """{setting: value} of a run that differ from the current recipe; one that no longer exists only if it was set."""
    usual, own = settings_of(args["recipe"]), settings_of() | args  # a run older than a flag used the flag's default
    changed = (k for k, v in own.items() if k not in NEUTRAL and (v not in (usual[k], None) if k in usual else v))
    return {"from" if key == "start_from" else key: own[key] for key in changed}


def make_line(args):
    """The make command that repeats a run with these arguments."""
    settings = {"recipe": args["recipe"]} if args["recipe"] in options.load_recipes() else {}
    settings |= changed_settings(args)
    return " ".join(["make train", *(f"{key.upper()}={shlex.quote(str(value))}" for key, value in settings.items())])


def survey(runs, read=summary):
    """(read(folder) of each run, without None; [(name, reason) of each run that cannot be read]).

    The only place that catches what reading the files of others can raise: anything, from RecursionError to KeyError.
    """
    found, unreadable = [], []
    for path in sorted(Path(runs).glob("*/args.json")):
        try:
            found.append(read(path.parent))
        except Exception as error:  # noqa: BLE001
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150)
            unreadable.append((path.parent.name, f"damaged or of another version ({reason})"))
    return [result for result in found if result is not None], unreadable


def recorded(runs):
    """Names of the runs that are the repository's records, which git tracks; None outside a checkout."""
    if not shutil.which("git"):
        return None
    git = subprocess.run(["git", "ls-files", "*/args.json"], cwd=runs, capture_output=True, text=True)
    return None if git.returncode else {Path(line).parent.name for line in git.stdout.splitlines()}


def remark(folder):
    """A line about a run that can be resumed or runs, or has no score; else None."""
    args, lines = read_json(folder / "args.json")["args"], read_metrics(folder)
    total = sum(length for _, length in options.parse_sizes(args["sizes"], args["epochs"]))
    done = lines[-1]["epoch"] if lines else 0
    score, epoch = max(((line["official"], line["epoch"]) for line in lines if "official" in line), default=(0, done))
    if done >= total or 0 < args.get("target", 0) <= score or 0 < args["patience"] <= done - epoch:
        return None if score else f"without score: {folder.name}, {done} epochs on all pairs"
    if not (folder / "last.pt").is_file():
        return None
    state = "running" if is_running(folder) else f"make resume NAME={make_name(folder)}"
    return f"unfinished: {folder.name}, {done} of {total} epochs, {state}"


LEGEND = """official: F over the labels present in an image, then over the images; one view per image
batch32: the reference's figure, F of the pooled pixels of 32 images; epoch: the best one / the last
size: thousands of parameters; weights: "all" were trained on all pairs, the score is of another
training, "-" were not kept; settings: recipe and changes, shortened; `make report` shows all"""
WIDTH = 100  # of a line


def leaderboard(rows):
    """The table of `make runs` as text: summaries with real faces first, then by score."""
    table = f"{'run':<20}official batch32   epoch   size  minutes weights settings"
    for row in sorted(rows, key=lambda row: (row["synthetic"], -row["official"])):
        line = f"{row['name']:<20}{row['official']:>8.4f}{row['batch32']:>8.4f}{row['epoch']:>5}/{row['epochs']:<3}"
        settings = " ".join([row["recipe"] or "defaults", *(f"{key}={value}" for key, value in row["changed"].items())])
        line += f"{row['parameters'] / 1000:>6.0f}{row['minutes']:>9.1f} {row['weights'].split()[0]:<8}"
        line = printable(f"{line}{'synthetic faces; ' * row['synthetic']}{settings}")
        table += "\n" + (line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}...")
    return table


def own_first(rows, tracked):
    """The tables of `make runs` as text: runs of the user, then those in `tracked`, the repository's records."""
    tracked = tracked or ()
    groups = {
        "your runs": [row for row in rows if row["name"] not in tracked],
        "records of the repository": [row for row in rows if row["name"] in tracked],
    }
    return "\n\n".join(f"{title}\n{leaderboard(group)}" for title, group in groups.items() if group)


def recipe_table(rows):
    """The table of `make recipes` as text: the reference's score and those of our best run with these settings."""
    lines = [f"{'recipe':<32} reference   batch32  official  about"]
    for name, recipe in options.load_recipes().items():
        own = [row for row in rows if row["recipe"] == name and row["changed"].keys() <= {"seed", "from"}]
        best = max((row for row in own if not row["synthetic"]), key=lambda row: row["official"], default={})
        scores = recipe.get("reference"), best.get("batch32"), best.get("official")
        figures = "".join(f"{score:>10.4f}" if score else f"{'-':>10}" for score in scores)
        lines.append(f"{name:<32}{figures}  {recipe.get('about', '')}")
    return "\n".join(lines)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    parser.switch("--recipes", help="list the recipes instead")
    args = parser.parse_args()
    options.load_recipes()  # an error in it is no error of the runs
    rows, unreadable = survey(args.runs)
    for name, reason in unreadable:
        print_message(f"skipped {name}: {reason}")
    if args.recipes:
        print(recipe_table(rows))
        return
    print("\n".join([own_first(rows, recorded(args.runs)), *map(printable, survey(args.runs, remark)[0]), "", LEGEND]))


if __name__ == "__main__":
    run_main(main)
