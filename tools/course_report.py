"""A draft of the course report on one run, runs/NAME/report.html, for its author to check and complete; printed as PDF.

python -m tools.course_report --name a --author "A. Author" --matric A12345678B
python -m tools.course_report --name a --pdf       # print the draft, at most five A4 pages; needs Chromium

All figures come from the runs' files. The draft shows images of the dataset: hand it in, but do not publish it.
"""

import os
import re
import shutil
import subprocess
import tempfile
from html import escape
from pathlib import Path
from string import Template

from common import ArgumentParser, UserError, atomic, check_target, duration, require_packages, run_main, write_text

import numpy as np
import torch

import checkpoint
from data import find_data_of, load_pairs
from evaluate import evaluate, f_scores, held_out
from labels import HEX_COLOURS, NAMES
from model import PARAM_LIMIT, build, count_parameters
from options import from_record, network_arguments, strength
from register import find_run, make_name, run_arguments, scored_weights
from tools import report
from tools.check_params import parameter_table
from tools.check_submission import read_zip
from views import parse_views

ROWS = 14  # experiments that fit on five pages
SETTINGS = ("weight_decay", "decay_all", "clip", "dropout", "ema", "keep", "focal", "smoothing", "class_weights")
SETTINGS += ("restart_period", "restart_growth", "exchange_sides", "fix_sides")
MAX_PAGES = 5
PAGE = Path(__file__).with_name("draft.html")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


def matriculation(text):
    """argparse type: a matriculation number, returned in capitals."""
    if not re.fullmatch("[A-Z][0-9]{8}[A-Z]", text.upper()):
        raise UserError(f"--matric {text}: not a letter, eight digits and a letter, such as A12345678B")
    return text.upper()


def count_pages(path):
    """Number of pages of a PDF. UserError if it is unreadable, has more than MAX_PAGES, or one that is not A4."""
    require_packages("pypdf")
    import pypdf

    try:
        sizes = [sorted((page.mediabox.width, page.mediabox.height)) for page in pypdf.PdfReader(path).pages]
    except Exception as error:  # a damaged file makes the reader raise anything
        raise UserError(f"cannot read {path} ({error}); export the report as PDF again") from None
    if not 1 <= len(sizes) <= MAX_PAGES:
        raise UserError(f"{path} has {len(sizes)} pages; 1 to {MAX_PAGES} are allowed")
    for number, (short, long) in enumerate(sizes, 1):
        if abs(short - 595) > 3 or abs(long - 842) > 3:
            raise UserError(f"page {number} of {path} has {short:.0f} x {long:.0f} points; A4 has 595 x 842")
    return len(sizes)


def sent_views(folder):
    """The views that the run's Codabench zip averages, as text; "" without a zip."""
    path = folder / "submission-test.zip"
    data = read_zip(path)[0].get("solution/ckpt.pth") if path.is_file() else None
    return str(checkpoint.parse(data, path).get("views", "")) if data else ""


def score(weights, views, data):
    """Official scores (N,) of the images that a checkpoint held out, from these views, on the CPU.

    Also returns why they may not be scores of unseen images, or "". UserError without the pairs.
    """
    model, info = checkpoint.load_model(weights)
    pairs = load_pairs(data)
    indices = held_out(info, weights, pairs.keys())
    device, views = torch.device("cpu"), parse_views(views)
    confusions, _ = evaluate(model, pairs, indices, info["size"], device, views=views)
    return np.nanmean(f_scores(confusions), 1), checkpoint.doubt(info, pairs.keys(indices))


def experiments(run, runs):
    """Rows of the scored runs on the same kind of faces: this run, own runs, then the repository's records."""
    rows = []
    for other in sorted(runs, key=lambda other: (other is not run, not other["own"])):
        if (row := other["row"]) and row["synthetic"] == run["row"]["synthetic"]:
            changes = [row["recipe"] or "no recipe", *(f"{key} {value}" for key, value in other["changed"].items())]
            figures = f"{row['parameters']:,}", row["epochs"], f"{row['official']:.4f}"
            rows.append([row["name"], "own" if other["own"] else "repository", ", ".join(changes), *figures])
    return rows


def draft(folder, author, matric, views="", data=None):
    """The report as HTML, with the score of these views: draft.html, completed.

    UserError if the run was not scored or this version builds another network.
    """
    runs = report.survey(folder.parent)[0]
    run = next((run for run in runs if run["folder"] == str(folder) and run["row"] and run["best"]), None)
    if not run:
        why = "if it was trained on all pairs, report on the run that scores it, and give report-zip REPORT=FILE"
        raise UserError(f"{folder} has no scores, or its files are damaged; {why}")
    row, args = run["row"], from_record(run_arguments(folder), folder / "args.json")
    model = build(args.model, **network_arguments(args))
    count, rows = count_parameters(model), experiments(run, runs)
    if row["parameters"] not in (0, count):
        raise UserError(f"{folder} needs another version of {args.model}; check out its commit: {run['origin']}")
    scores = [report.image_score(f) for f in run["best"]["image_scores"].values()]
    if views:
        weights = scored_weights(folder)
        scores, doubt = score(weights, views, find_data_of(weights, data))
        if doubt:
            raise UserError(f"{weights} {doubt}")
    seen = "The weights were trained on all pairs, these images included; the score is of a training without them."
    start = f"one that starts from the weights of {args.start_from} (describe theirs)"
    augmentation = (f"{k} {v:g}" for k, v in vars(strength(args)).items() if v and not k.endswith("alpha"))
    texts = vars(args) | row | {"total": run["epochs"], "time": duration(60 * row["minutes"]), "origin": run["origin"]}
    texts |= {"author": author or "Author: ________", "matric": matric or "matriculation number: ________"}
    texts |= {"count": f"{count:,}", "limit": f"{PARAM_LIMIT:,}", "modules": parameter_table(model)}
    texts |= {"score": f"{np.mean(scores):.4f}", "error": f"{np.std(scores) / len(scores) ** 0.5:.4f}"}
    texts |= {"images": len(scores), "source": f"the views {views}, averaged" if views else "one view per image"}
    texts |= {"seen": seen if row["weights"] == "all pairs" else "", "held": f"{args.val_split:.0%}"}
    texts |= {"faces": "synthetic faces, which say nothing about real ones" if row["synthetic"] else "CelebAMask-HQ"}
    texts |= {"start": start if args.start_from else "from scratch", "runs": len(rows), "changes": rows[0][2]}
    muon = "Muon for the matrices of hidden layers and AdamW for all other parameters"
    texts |= {"optimiser": muon if args.optimiser == "muon" else "AdamW"}
    texts |= {"augmentation": ", ".join(augmentation) or "none"}
    texts |= {"over": "the labels present in the image" if args.dice_over == "present" else "all labels"}
    texts |= {"phases": ", then ".join(f"{length} at {size} pixels" for size, length in run["phases"])}
    texts |= {"settings": ", ".join(f"{key} {getattr(args, key) or 'none'}" for key in SETTINGS)}
    texts = {key: escape(str(text)) for key, text in texts.items()}
    charts = re.search('<script id="charts">(.*?)</script>', report.TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)[1]
    content = {"runs": [run], "labels": NAMES, "colours": HEX_COLOURS, "experiments": rows[:ROWS]}
    content["pictures"] = (report.find_pictures(folder, data=data) or {"pictures": []})["pictures"]
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(texts, charts=charts)
    return report.fill_template(page, content)


def browse(*flags):
    """(stdout, stderr) of Chromium without a window, on a temporary profile. UserError if it is missing or fails."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        raise UserError(f"no Chromium: print {flags[-1]} in any browser as report.pdf beside it, A4, no headers")
    with tempfile.TemporaryDirectory() as profile:
        unsafe = ["--no-sandbox"] if os.geteuid() == 0 else []  # the sandbox does not work as root
        command = [browser, "--headless", *unsafe, "--disable-gpu", f"--user-data-dir={profile}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"{browser} failed: {done.stderr.strip()[-300:]}")
    return done.stdout, done.stderr


def make_draft(folder, author=None, matric=None, data=None):
    """Write report.html, with the score of the views in the run's Codabench zip."""
    write_text(folder / "report.html", draft(folder, author, matric, sent_views(folder), data))


def print_draft(folder, overwrite=False):
    """Print report.html as report.pdf; returns its number of pages. UserError without Chromium or pypdf.

    Also if report.pdf is no print of report.html, unless `overwrite` is true.
    """
    require_packages("pypdf")
    source, target = folder / "report.html", folder / "report.pdf"
    if not overwrite:
        check_target(target, b"%PDF.*Title .Face parsing report")
    with atomic(target) as temporary:
        browse("--no-pdf-header-footer", f"--print-to-pdf={temporary.resolve()}", source.resolve().as_uri())
    return count_pages(target)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", required=True, help="run to report on")
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    parser.add_argument("--data", help="folder with train/; default that of the training, else ./data")
    parser.add_argument("--author", help="name on the report")
    parser.add_argument("--matric", type=matriculation, help="matriculation number on the report")
    parser.switch("--overwrite", help="replace an existing draft, or with --pdf a report.pdf of another kind")
    parser.switch("--pdf", help="print the existing draft instead")
    args = parser.parse_args()
    folder = find_run(args.name, args.runs)
    source, name = folder / "report.html", make_name(folder)
    if args.pdf and (args.author or args.matric):
        raise UserError(f"AUTHOR= and MATRIC= are for the draft, `make report NAME={name}`; this prints it as it is")
    if not args.pdf:
        if source.is_file() and not args.overwrite:
            raise UserError(f"{source} exists: rename it to keep it, or replace it with OVERWRITE=1")
        make_draft(folder, args.author, args.matric, args.data)
        print(f"{source}: check and complete it, then: make report-pdf NAME={name}")
        return
    if not source.is_file():
        raise UserError(f'no {source}; `make report NAME={name} AUTHOR="A. Author" MATRIC=A12345678B` creates it')
    pages = print_draft(folder, args.overwrite)
    print(f"{folder}/report.pdf: {pages} pages; next: make report-zip NAME={name} MATRIC=A12345678B")


if __name__ == "__main__":
    run_main(main)
