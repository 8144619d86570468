"""The runs: the leaderboard, the recipes with the reference's scores beside ours, and the page runs/index.html.

python -m tools.report --table --all
python -m tools.report --recipes
python -m tools.report --device cpu      # curves, scores by label, worst and best images, comparisons of two runs

The page and runs/*/pictures.json contain images of the dataset: git ignores them, and they must not be published.
"""

import base64
import contextlib
import functools
import io
import json
import shlex
import textwrap
import time
from pathlib import Path

from common import ArgumentParser, UserError, check_target, print_message, printable, read_json, run_main, write_text

import numpy as np
from PIL import Image

import options
from checkpoint import load, load_model
from data import find_data_of, find_pairs, reversed_sides
from device import select_device
from images import mask_image, read_image, read_mask
from labels import HEX_COLOURS, NAMES, NUM_CLASSES
from register import is_running, make_name, read_metrics, scored_weights
from views import parse_whole

NOT_COMPARED = options.NEUTRAL | {"name", "recipe", "overwrite"}
RECORDS = ("release", "cycles")  # the runs of the repository that are folders
EXPERIMENTS = "experiments.jsonl"  # its others: each line is a name and the content of that run's files
TEMPLATE = Path(__file__).with_name("page.html")
PICTURED = 6  # number of runs whose images are on the page: each takes about 300 kB
EACH = 6  # images per group
SIDE = 192  # of an image on the page
FORMAT = 4  # of pictures.json
ERROR_COLOUR = (213, 94, 0)  # vermillion: distinguishable from grey for colour-blind readers


def number(value):
    """`value` if it is a finite int or float, else ValueError: a run's files may contain anything."""
    if type(value) not in (int, float) or not -1e300 < value < 1e300:  # math.isfinite overflows
        raise ValueError(f"{textwrap.shorten(repr(value), 40)} is not a finite number")
    return value


def read_folder(folder):
    """{name: content} of a run's files, as in a line of EXPERIMENTS."""
    best = folder / "best.json"
    files = {"args.json": read_json(folder / "args.json"), "metrics.jsonl": read_metrics(folder)}
    return files | {"best.json": read_json(best) if best.is_file() else None}


def read_run(folder, files):
    """A run as a dict for JSON, of which `row` has its figures, None if no epoch was scored.

    `files`: what `read_folder` returns. Raises any exception if they are damaged.
    """
    record, lines, usual = files["args.json"], [], ("epoch", "loss", "lr")
    args, pairs, path = record["args"], record.get("pairs") or {}, folder / "best.pt"
    for line in files["metrics.jsonl"]:
        more = {"val_loss", "official", "train_official", "batch32", "minutes"} & line.keys()
        lines.append({key: number(line[key]) for key in (*usual, *sorted(more))})
    phases, changed = options.parse_sizes(args["sizes"], args["epochs"]), changed_settings(args)
    run = {"name": folder.name, "folder": str(folder), "lines": lines, "phases": phases, "row": None}
    run["own"] = folder.name not in RECORDS and folder.parent.name != EXPERIMENTS
    run |= {"epochs": sum(length for _, length in phases), "running": is_running(folder)}
    run["changed"] = {key: str(value) for key, value in changed.items()}
    run["settings"] = {key: str(value) for key, value in args.items() if key not in NOT_COMPARED}
    facts = [record.get("device_name") or record.get("device"), record.get("amp")]
    facts += [f"{name} {value}" for name, value in record["versions"].items() if value]
    commit = record["commit"][:12] + "+" * record["commit"].endswith("+")  # +: files differed from it
    run["origin"] = f"Started {record.get('started', '-')}, commit {commit}, on {', '.join(filter(None, facts))}."
    run["best"] = check_best(files["best.json"]) if files["best.json"] is not None else None
    if scored := [line for line in lines if "official" in line]:
        row = {key: max(scored, key=lambda line: line["official"])[key] for key in ("official", "batch32", "epoch")}
        row |= {"epochs": lines[-1]["epoch"], "minutes": lines[-1]["minutes"], "images": pairs.get("validation") or 0}
        row |= {"lr": args["lr"], "dice": args["dice"], "parameters": record.get("parameters") or 0}
        row = {key: number(value) for key, value in row.items()}
        row |= {"name": folder.name, "model": args["model"], "recipe": args["recipe"], "line": make_line(args)}
        row |= {"date": str(record.get("started", "-"))[:10], "synthetic": bool(pairs.get("drawn"))}
        row["lmsa"] = ("no", "yes")[args["lmsa"]] if args["model"] == "microsegformer" else "-"
        row["weights"] = ("yes" if load(path).get("validated") else "all pairs") if path.is_file() else "-"
        run["row"] = row
    run["remark"] = remark(folder, args, run)
    json.dumps(run, allow_nan=False)  # ValueError if not valid JSON
    return run


def remark(folder, args, run):
    """A line about a run that can be resumed or runs, or has no score; else None."""
    done, row = run["lines"][-1]["epoch"] if run["lines"] else 0, run["row"] or {"official": 0}
    stale = 0 < args["patience"] <= done - row.get("epoch", done) and done % args["val_every"] == 0
    if done >= run["epochs"] or 0 < args.get("target", 0) <= row["official"] or stale:
        return None if run["row"] else f"without score: {folder.name}, {done} epochs on all pairs"
    if not (folder / "last.pt").is_file():
        return None
    state = "running" if run["running"] else f"make resume NAME={make_name(folder)}"
    return f"unfinished: {folder.name}, {done} of {run['epochs']} epochs, {state}"


def check_best(content):
    """The scores by label and image in best.json's content; an exception if it is damaged."""
    best = {key: content[key] for key in ("labels", "images_with_label", "confusion", "image_scores")}
    rows = [best["labels"], best["images_with_label"], *best["confusion"], *best["image_scores"].values()]
    # In EXPERIMENTS an image has only its mean.
    if len(best["confusion"]) != NUM_CLASSES or any(len(row) not in (1, NUM_CLASSES) for row in rows):
        raise ValueError(f"best.json is not about {NUM_CLASSES} labels")
    for value in (value for row in rows for value in row if value is not None):  # F of an absent label is None
        number(value)
    return best


@functools.cache
def settings_of(recipe=None):
    """{argument: value} of a training with a recipe; the defaults if there is no such recipe."""
    return vars(options.parse(["--recipe", recipe] if recipe in options.load_recipes() else [])[0])


def changed_settings(args):
    """{setting: value} of a run that differ from the current recipe; one that no longer exists only if it was set."""
    usual, own = settings_of(args["recipe"]), settings_of() | args  # a run older than a flag used the flag's default
    changed = (k for k, v in own.items() if k not in NOT_COMPARED and (v not in (usual[k], None) if k in usual else v))
    return {"from" if key == "start_from" else key: own[key] for key in changed}


def make_line(args):
    """The make command that repeats a run with these arguments."""
    settings = {"recipe": args["recipe"]} if args["recipe"] in options.load_recipes() else {}
    settings |= changed_settings(args)
    return " ".join(["make train", *(f"{key.upper()}={shlex.quote(str(value))}" for key, value in settings.items())])


def survey(runs, experiments=True):
    """(`read_run` of each run: real faces first, then by score, unscored ones last; [(name, reason) if unreadable]).

    The only place that catches what reading the files of others can raise: anything, from RecursionError to KeyError.
    UserError if there is no such folder.
    """
    if not Path(runs).is_dir():
        raise UserError(f"no folder {runs}; RUNS= names the folder of all runs")
    path, found, unreadable = Path(runs, EXPERIMENTS), [], []
    sources = [(folder.parent.name, folder.parent) for folder in sorted(Path(runs).glob("*/args.json"))]
    if experiments and path.is_file():
        sources += [(f"line {i} of {path}", line) for i, line in enumerate(path.read_bytes().splitlines(), 1)]
    for name, source in sources:
        try:
            files = read_folder(source) if isinstance(source, Path) else json.loads(source)
            folder = source if isinstance(source, Path) else path / Path(files["name"]).name  # which cannot exist
            found.append(read_run(folder, files))
        except Exception as error:  # noqa: BLE001
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150)
            unreadable.append((name, f"damaged or of another version ({reason})"))
    found.sort(key=lambda run: (row["synthetic"], -row["official"]) if (row := run["row"]) else (2,))
    return found, unreadable


LEGEND = """official: F over the labels present in an image, then over the images; one view per image
batch32: the reference's figure, F of the pooled pixels of 32 images; epoch: the best one / the last
weights: "all" were trained on all pairs, the score is of another training, "-" were not kept;
settings: recipe and changes, shortened; `make report` shows all;
`make runs ALL=1` adds the experiments of docs/experiments.md"""
WIDTH = 100  # of a line


def leaderboard(runs):
    """The table of `make runs` as text: the scored ones of `runs`."""
    table = f"{'run':<20}official batch32   epoch params  minutes weights settings"
    for run, row in ((run, run["row"]) for run in runs if run["row"]):
        line = f"{row['name']:<20}{row['official']:>8.4f}{row['batch32']:>8.4f}{row['epoch']:>5}/{row['epochs']:<3}"
        line += f"{row['parameters'] / 1000:>6.0f}k{row['minutes']:>8.1f} {row['weights'].split()[0]:<8}"
        line += f"{'synthetic faces; ' * row['synthetic']}{row['recipe'] or 'defaults'}"
        line = printable(line + "".join(f" {key}={value}" for key, value in run["changed"].items()))
        table += "\n" + (line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}...")
    return table


def recipe_table(runs):
    """The table of `make recipes` as text: the reference's score and those of our best run with these settings."""
    lines = [f"{'recipe':<32} reference   batch32  official  about"]
    rows = [run["row"] for run in runs if run["row"] and run["changed"].keys() <= {"seed", "from"}]
    for name, recipe in options.load_recipes().items():
        best = next((row for row in rows if row["recipe"] == name and not row["synthetic"]), {})
        scores = recipe.get("reference"), best.get("batch32"), best.get("official")
        figures = "".join(f"{score:>10.4f}" if score else f"{'-':>10}" for score in scores)
        lines.append(f"{name:<32}{figures}  {recipe.get('about', '')}")
    return "\n".join(lines)


def image_score(row):
    """The official score of an image from its F by label, None for absent labels."""
    return float(np.mean([f for f in row if f is not None]))


def panels(pixels, true, predicted):
    """Data URIs of image, mask, prediction and errors, from uint8 (H, W, 3), (H, W) and (H, W)."""
    grey = 110 + 0.55 * pixels.mean(2, keepdims=True)
    errors = np.where((true != predicted)[..., None], np.array(ERROR_COLOUR, float), grey).astype(np.uint8)
    uris = []
    for content in (pixels, true, predicted, errors):
        photo, file = content.ndim == 3, io.BytesIO()
        image, kind = (Image.fromarray(content), "jpeg") if photo else (mask_image(content), "png")
        image = image.resize((SIDE, SIDE), Image.BOX if photo else Image.NEAREST)
        image.save(file, kind, quality=82, optimize=True)
        uris.append(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
    return uris


def find_pictures(folder, device="auto", data=None):
    """pictures.json of a run, drawn if it is missing, damaged or of other weights; None without weights or data.

    `data`: the data folder with the images; default that of the run.
    """
    weights = scored_weights(folder)
    if not weights.is_file():
        return None
    version = [FORMAT, weights.stat().st_mtime_ns, weights.stat().st_size]
    with contextlib.suppress(UserError, LookupError, TypeError):
        content = read_json(folder / "pictures.json")
        if content["version"] == version:
            return content
    try:
        content = {"version": version} | draw_pictures(weights, select_device(device), data)
        write_text(folder / "pictures.json", json.dumps(content))
        return content
    except UserError as error:
        print_message(f"no images of {folder.name}: {error}")
        return None


def draw_pictures(weights, device, data):
    """The content of pictures.json but its version: a scored run's images, parsed with its weights.

    Images whose mask has left and right reversed form their own group: their scores are errors of the mask.
    UserError without the pairs.
    """
    rows = check_best(read_json(weights.with_name("best.json")))["image_scores"]
    scores = {name: image_score(row) for name, row in rows.items()}
    data = find_data_of(weights, data)
    pairs = {image.stem: (image, mask) for image, mask in find_pairs(data)}
    if not pairs.keys() >= scores.keys():
        raise UserError(f"{data} contains other pairs than the run was scored on")
    order = sorted(scores, key=scores.get)
    flawed = [name for name in order if reversed_sides(read_mask(pairs[name][1]))]
    sound = [name for name in order if name not in flawed]
    groups = {"lowest": sound[:EACH], "highest": sound[::-1][:EACH], "reversed": flawed[:EACH]}
    model, info = load_model(weights, device)
    content = {"images": len(order), "reversed": len(flawed), "pictures": []}
    for group, name in ((group, name) for group, names in groups.items() for name in names):
        pixels, true = (read(path) for read, path in zip((read_image, read_mask), pairs[name], strict=True))
        predicted = parse_whole(model, pixels, info["size"])
        lowest = sorted((f, NAMES[i]) for i, f in enumerate(rows[name]) if f is not None)[:3]
        picture = {"group": group, "name": name, "score": scores[name], "lowest": [[label, f] for f, label in lowest]}
        content["pictures"].append(picture | {"panels": panels(pixels, true, predicted)})
    alone = float(np.mean([scores[name] for name in sound])) if sound else 0.0
    return content | {"seen": not info.get("validated"), "score_without_reversed": alone}


def write_page(runs, device="auto", data=None):
    """Write runs/index.html, with images of the best runs; returns its path."""
    found, unreadable = survey(runs)
    left = PICTURED
    for run in found:
        run["pictures"] = find_pictures(Path(run["folder"]), device, data) if run["best"] and left else None
        left -= bool(run["pictures"])
    content = {"runs": found, "unreadable": unreadable, "labels": NAMES, "colours": HEX_COLOURS}
    content["written"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    path = Path(runs, "index.html")
    check_target(path, b"<!doctype html>.*<title>Runs")
    write_text(path, fill_template(TEMPLATE.read_text(encoding="utf-8"), content))
    return path


def fill_template(template, data):
    """The template with `data` as JSON in place of <!--DATA-->; without "<", no text in it can end the script."""
    return template.replace("<!--DATA-->", json.dumps(data).replace("<", "\\u003c"), 1)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    parser.add_argument("--data", help="folder with train/; default that of each training, else ./data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.switch("--table", help="print the leaderboard instead")
    parser.switch("--all", help="with --table: the experiments of the repository too")
    parser.switch("--recipes", help="print the recipes instead")
    args = parser.parse_args()
    options.load_recipes()  # an error in it is no error of the runs
    if not (args.table or args.recipes):
        page = write_page(args.runs, args.device, args.data)
        print(f"{page}: open it in a browser; never publish it (dataset's images)")
        return
    runs, unreadable = survey(args.runs, args.all or args.recipes)
    for name, reason in unreadable:
        print_message(f"skipped {name}: {reason}")
    if args.recipes:
        print(recipe_table(runs))
        return
    for title, own in (("your runs", True), ("records of the repository", False)):
        if group := [run for run in runs if run["row"] and run["own"] == own]:
            print(f"{title}\n{leaderboard(group)}\n")
    print("\n".join([*(printable(run["remark"]) for run in runs if run["remark"]), LEGEND]))


if __name__ == "__main__":
    run_main(main)
