"""The runs by score, and the recipes with the reference's figures beside ours.

python leaderboard.py
python leaderboard.py --recipes
python leaderboard.py --markdown    # with the make line of each run, as docs/experiments.md has it
"""

import argparse
import functools
import shlex
import sys
from pathlib import Path

from errors import ArgumentParser, UserError, run_main
from options import load_recipes, parse
from rundir import faces_drawn, read_json, read_metrics

# Arguments that say where a run lies or runs, not what it computes.
PLACES = {"name", "runs", "recipe", "resume", "overwrite", "data", "cache", "device", "threads", "save_minutes"}


def summary(folder):
    """What the leaderboard tells of one run, as a dict; None where no epoch was scored."""
    record = read_json(folder / "args.json")
    args, lines = record["args"], read_metrics(folder)
    scored = [line for line in lines if "official" in line]
    if not scored:
        return None
    best, drawn = max(scored, key=lambda line: line["official"]), faces_drawn(record)
    return {
        "name": folder.name, "official": best["official"], "batch32": best["batch32"], "epoch": best["epoch"],
        "epochs": lines[-1]["epoch"], "parameters": record.get("parameters"), "lr": args["lr"], "dice": args["dice"],
        "lmsa": args["lmsa"] if args["model"] == "microsegformer" else None, "model": args["model"],
        "minutes": lines[-1]["minutes"], "drawn": drawn,
        "recipe": f"{args['recipe'] or ''} on drawn faces".strip() if drawn else args["recipe"],
        "labels": best["labels"],
        "sizes": args["sizes"], "line": make_line(args), "changed": changed_settings(args),
    }  # fmt: skip


@functools.cache
def is_recipe(name):
    """Whether recipes.toml has it."""
    return name in load_recipes()


@functools.cache
def settings_of(recipe=None):
    """{argument: value} of a training by a recipe, or by default."""
    return vars(parse(["--recipe", recipe] if recipe else [])[0])


def recipe_of(args):
    """The recipe of a run's arguments, None where it has none or one that is gone."""
    return args["recipe"] if is_recipe(args["recipe"]) else None


def changed_settings(args):
    """{argument: value} of a run that its recipe, as it is now, does not give; without a recipe the defaults."""
    defaults = settings_of()
    own = {key: args.get(key, defaults[key]) for key in defaults}  # a run older than a flag ran with its default
    usual = settings_of(recipe_of(args))
    return {k: v for k, v in own.items() if v != usual[k] and v is not None and k not in PLACES}


def make_line(args):
    """The make line that repeats a run of these arguments: its recipe, and what differs from it as it is now."""
    recipe, flags = recipe_of(args), []
    for key, own in changed_settings(args).items():
        flag = "--" + {"start_from": "from"}.get(key, key).replace("_", "-")
        flags += [flag if own else flag.replace("--", "--no-", 1)] if isinstance(own, bool) else [flag, str(own)]
    quoted = shlex.join(flags).replace('"', '\\"')
    return "make train" + (f" RECIPE={recipe}" if recipe else "") + (f' ARGS="{quoted}"' if flags else "")


def survey(runs, read=summary):
    """What `read` makes of each run's folder below `runs`, and [(name, reason), ...] of those it cannot read.

    A run of another version, or torn by a crash, is no reason to show none.
    """
    if not Path(runs).is_dir():
        raise UserError(f"no folder {runs}; `make train` makes the first run in it")
    found, unreadable = [], []
    for path in sorted(Path(runs).glob("*/args.json")):
        try:
            found.append(read(path.parent))
        except UserError as error:
            unreadable.append((path.parent.name, str(error)))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            unreadable.append((path.parent.name, f"its files lack or garble {error}"))
    return found, unreadable


def standing(row):
    """To sort summaries by: best score first, and after them those on drawn faces, whose scores are no measure."""
    return row["drawn"], -row["official"]


def summaries(runs):
    """Summaries of the scored runs below a folder by `standing`; those that cannot be read are named on stderr."""
    found, unreadable = survey(runs)
    for name, reason in unreadable:
        print(f"passed over {name}: {reason}", file=sys.stderr)
    return sorted(filter(None, found), key=standing)


def leaderboard(rows):
    """The table of `make runs` as text."""
    lines = [
        f"{'rank':<5}{'name':<28}{'official':>9}{'batch32':>9}{'epoch':>9}{'parameters':>12}{'LR':>9}{'Dice':>6}"
        f"{'LMSA':>6}{'minutes':>9}"
    ]
    for rank, row in enumerate(rows, 1):
        count = f"{row['parameters']:,}" if row["parameters"] else "-"
        lmsa = {True: "yes", False: "no", None: "-"}[row["lmsa"]]
        lines.append(
            f"{rank:<5}{row['name']:<28}{row['official']:>9.4f}{row['batch32']:>9.4f}"
            f"{row['epoch']:>5}/{row['epochs']:<3}{count:>12}{row['lr']:>9.1e}{row['dice']:>6g}{lmsa:>6}"
            f"{row['minutes']:>9.1f}{'  drawn faces' if row['drawn'] else ''}"
        )
    return "\n".join(lines)


def markdown(rows):
    """The runs as a table in Markdown, those of one recipe together, best first."""
    lines = ["| run | official | batch-of-32 | best epoch | sizes | command |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["recipe"] or "", -row["official"])):
        name = f"{row['name']}, drawn faces" if row["drawn"] else row["name"]
        lines.append(
            f"| {name} | {row['official']:.4f} | {row['batch32']:.4f} | {row['epoch']} of {row['epochs']} "
            f"| {row['sizes']} | `{row['line']}` |"
        )
    return "\n".join(lines)


def recipe_table(recipes, rows):
    """The table of `make recipes` as text: the reference's figure and our best batch-of-32 and official scores."""
    lines = [f"{'recipe':<34}{'reference':>10}{'batch32':>9}{'official':>9}  what it is"]
    for name, recipe in recipes.items():
        # Of the recipe as it is now; only a run that another must come before starts from its weights.
        own = [row for row in rows if row["recipe"] == name and set(row["changed"]) <= {"seed", "start_from"}]
        reference = f"{recipe['reference']:.4f}" if "reference" in recipe else "-"
        ours = [f"{own[0][key]:.4f}" if own else "-" for key in ("batch32", "official")]
        lines.append(f"{name:<34}{reference:>10}{ours[0]:>9}{ours[1]:>9}  {recipe.get('about', '')}")
    return "\n".join(lines)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    parser.add_argument("--recipes", action="store_true", help="list the recipes instead")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table with the make line of each run")
    args = parser.parse_args()
    if args.recipes:
        rows = summaries(args.runs) if Path(args.runs).is_dir() else []
        print(recipe_table(load_recipes(), rows))
        return 0
    rows = summaries(args.runs)
    if not rows:
        raise UserError(f"no run in {args.runs} has been scored yet; `make train` makes one")
    print((markdown if args.markdown else leaderboard)(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
