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
from statistics import pstdev

from common import ArgumentParser, UserError, atomic, check_target, duration, require_packages, run_main, write_text

import numpy as np
import torch

from checkpoint import doubt, load, load_model
from data import find_data_of, load_pairs
from evaluate import evaluate, f_scores, held_out
from labels import HEX_COLOURS, NAMES
from model import PARAM_LIMIT, build, count_parameters
from options import from_record, network_arguments, strength
from register import find_run, make_name, run_arguments
from tools.check_params import parameter_table
from tools.check_submission import read_zip
from tools.leaderboard import survey
from tools.report import TEMPLATE, fill_template, find_scripts, image_score, read_pictures, scored_weights, write_page
from views import parse_views

EXPERIMENTS = 14  # rows that fit on five pages
SETTINGS = ("weight_decay", "decay_all", "clip", "dropout", "ema", "keep", "focal", "smoothing", "class_weights")
SETTINGS += ("restart_period", "restart_growth", "exchange_sides", "fix_sides")
MAX_PAGES = 5
TITLE = "Face parsing report"  # by which our PDF is known
SHOW = 'document.getElementById("results").append(curves(DATA.runs), bars(DATA.runs));'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
STYLE = """@page { size: A4; margin: 17mm 20mm; }
body { font: 10pt/1.3 Arial, "Liberation Sans", sans-serif; color: #111; margin: 0 auto; max-width: 170mm; }
h1, h2 { font-size: 12pt; margin: 9pt 0 3pt; break-after: avoid; }
p { margin: 0 0 5pt; }
table { border-collapse: collapse; margin: 3pt 0 6pt; }
td, th { padding: 1pt 9pt 1pt 0; text-align: left; vertical-align: top; }
th { border-bottom: 0.8pt solid #444; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 4mm; break-inside: avoid; }
.images { display: grid; grid-template-columns: repeat(8, 1fr); gap: 0.7mm; margin-bottom: 5pt; break-inside: avoid; }
.images img, svg { width: 100%; display: block; }
@media print { .screen { display: none; } }"""


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
    content = read_zip(path)[0].get("solution/ckpt.pth") if path.is_file() else None
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content or b"")
        return str(load(file.name).get("views", "")) if content else ""


def score(weights, views, data):
    """Official scores (N,) of the images that a checkpoint held out, from these views, on the CPU.

    Also returns why they may not be scores of unseen images, or "". UserError without the pairs.
    """
    model, info = load_model(weights)
    pairs = load_pairs(data)
    indices = held_out(info, weights, pairs.keys())
    device, views = torch.device("cpu"), parse_views(views)
    confusions, _ = evaluate(model, pairs, indices, info["size"], device, views=views)
    return np.nanmean(f_scores(confusions), 1), doubt(info, pairs.keys(indices))


def settings(run, args):
    """The training in sentences, as HTML; `args` are its arguments, with current defaults for those it lacks."""
    row, phases = run["row"], ", then ".join(f"{n} at {size} pixels" for size, n in run["phases"])
    over = {"present": "the labels present in the image", "all": "all labels"}[args.dice_over]
    augmentation = ", ".join(f"{k} {v:g}" for k, v in vars(strength(args)).items() if v and not k.endswith("alpha"))
    changed = "".join(f", {key} {value}" for key, value in run["changed"].items())
    others = ", ".join(f"{key} {getattr(args, key) or 'none'}" for key in SETTINGS)
    optimiser = {"adamw": "AdamW", "muon": "Muon, and AdamW for all but the matrices of hidden layers"}[args.optimiser]
    return f"""<p>The network was trained for {row["epochs"]} of {run["epochs"]} epochs ({phases}) in batches of
{args.batch}, which took {duration(60 * row["minutes"])}. The optimiser is {optimiser}, with a learning
rate of up to {args.lr:g}: {args.warmup:g} epochs of linear warm-up, then the schedule "{args.schedule}". The weights of
epoch {row["epoch"]}, the best on the validation images, are kept, which favours the score slightly. The loss is
{args.ce:g} times the cross-entropy plus {args.dice:g} times a Dice loss averaged over {over}.</p>
<p>Random augmentation: {augmentation or "none"}. Other settings: {escape(others)}.</p>
<p>{escape(f"Recipe: {args.recipe or 'none'}{changed}; seed {args.seed}. {run['origin']}")}</p>"""


def experiments(run, runs):
    """Table of the scored runs on the same kind of faces: this run, own runs, then the repository's records."""
    rows = [other for other in runs if other["row"] and other["row"]["synthetic"] == run["row"]["synthetic"]]
    rows.sort(key=lambda other: (other is not run, not other["own"]))
    body = ""
    for other in rows[:EXPERIMENTS]:
        row, changes = other["row"], [f"{key} {value}" for key, value in other["changed"].items()]
        source = "own" if other["own"] else "repository"
        figures = f"{row['parameters']:,}", row["epochs"], f"{row['official']:.4f}"
        cells = row["name"], source, ", ".join([row["recipe"] or "no recipe", *changes]), *figures
        body += "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
    return f"""<p>{min(len(rows), EXPERIMENTS)} of {len(rows)} scored runs, each with one view per image. A
difference matters if it exceeds two paired standard errors (see "compare two runs" in runs/index.html) and 0.003, which
seeds alone can change. Runs of the source "repository" are its records, not trained for this report.</p>
<table><tr><th>run<th>source<th>recipe and changes<th>parameters<th>epochs<th>official{body}</table>"""


def examples(folder):
    """Images with the lowest and highest scores and with reversed masks, as HTML, or why there are none."""
    content = read_pictures(folder)
    if not content:
        return "<p>No images: weights (best.pt) or data are missing.</p>"
    body = ""
    lowest = "Lowest scores (reversed masks apart)"
    titles = {"lowest": lowest, "highest": "Highest scores", "reversed": "Reversed masks"}
    for group, title in titles.items():
        chosen = [picture for picture in content["pictures"] if picture["group"] == group][:4]
        images = "".join(f'<img src="{escape(uri)}" alt="">' for picture in chosen for uri in picture["panels"])
        scores = ", ".join(f"{picture['score']:.3f}" for picture in chosen) or "none"
        body += f'<p>{title}: {scores}</p><div class="images">{images}</div>'
    return f"""<p>Image, mask, prediction (colours: see 4), errors (orange).</p>{body}
<p>{content["reversed"]} of {content["images"]} masks have left and right reversed, which no network can predict.</p>"""


def draft(folder, author, matric, views="", data=None):
    """The report as HTML, with the score of these views.

    UserError if the run was not scored or this version builds another network.
    """
    runs = survey(folder.parent)[0]
    run = next((run for run in runs if run["folder"] == str(folder) and run["row"] and run["best"]), None)
    if not run:
        raise UserError(
            f"{folder} has no scores, or its files are damaged; if it was trained on all pairs, report on the run "
            "that scores it, and give report-zip REPORT=FILE"
        )
    row, args = run["row"], from_record(run_arguments(folder), folder / "args.json")
    model = build(args.model, **network_arguments(args))
    count = count_parameters(model)
    if row["parameters"] not in (0, count):
        raise UserError(
            f"this version builds another {args.model} than {folder}; check out its commit: {run['origin']}"
        )
    scores = [image_score(f) for f in run["best"]["image_scores"].values()]
    if views:
        weights = scored_weights(folder)
        scores = score(weights, views, find_data_of(weights, data))[0].tolist()
    charts = find_scripts(TEMPLATE.read_text(encoding="utf-8"))[0]
    faces = "synthetic faces, which say nothing about real ones" if row["synthetic"] else "CelebAMask-HQ portraits"
    start = f"one that starts from the weights of {args.start_from} (describe theirs)"
    origin = start if args.start_from else "from scratch"
    seen = "The weights were trained on all pairs, these images included; the score is of a training without them."
    source = f"the views {views}, averaged" if views else "one view per image"
    template = f"""<!doctype html><html lang="en"><meta charset="utf-8"><!--POLICY-->
<title>{TITLE}</title><style>{STYLE}</style>
<p class="screen">A draft from the run's files: check and complete it. Do not publish it: it shows the dataset.</p>
<h1>Face parsing with {count:,} parameters</h1>
<p>{escape(author or "Author: ________")} · {escape(matric or "matriculation number: ________")}</p>
<p><b>The validation F-measure (official score) is {np.mean(scores):.4f}</b> on {len(scores)} images, with a standard
error of {pstdev(scores) / len(scores) ** 0.5:.4f}, from {escape(source)}.
{seen if row["weights"] == "all pairs" else ""}</p>
<p><b>The network has {count:,} parameters</b>; fewer than {PARAM_LIMIT:,} are allowed.</p>
<h2>1. Task</h2><p>Every pixel of a 512 x 512 image gets one of {len(NAMES)} labels; left and right are the person's.
The data are {faces}, of which {args.val_split:.0%} are held out for validation (seed {args.split_seed}). There are no
other data and no ensemble; the training is {escape(origin)}. The official score is F averaged over the labels present
in an image, then over the images; masks are scored uncorrected.</p>
<h2>2. Network: {escape(args.model)}, parameters by module</h2><pre>{escape(parameter_table(model))}</pre>
<h2>3. Training</h2>{settings(run, args)}
<h2>4. Results</h2><p>Curves and scores by label are from one view per image.</p><div class="two" id="results"></div>
<h2>5. Examples</h2>{examples(folder)}
<h2>6. Experiments</h2>{experiments(run, runs)}
<script type="application/json" id="data"><!--DATA--></script><script>{charts}</script>
<script>{SHOW}</script></html>
"""
    return fill_template(template, {"runs": [run], "labels": NAMES, "colours": HEX_COLOURS}, [charts, SHOW])


def browse(*flags):
    """(stdout, stderr) of Chromium without a window, on a temporary profile. UserError if it is missing or fails."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        raise UserError("no Chromium or Chrome found: print report.html to report.pdf in any browser, A4, no headers")
    with tempfile.TemporaryDirectory() as profile:
        unsafe = ["--no-sandbox"] if os.geteuid() == 0 else []  # the sandbox does not work as root
        command = [browser, "--headless", *unsafe, "--disable-gpu", f"--user-data-dir={profile}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"{browser} failed: {done.stderr.strip()[-300:]}")
    return done.stdout, done.stderr


def make_draft(folder, author=None, matric=None, data=None):
    """Write report.html, with the score of the views in the run's Codabench zip, and the page of all runs."""
    write_page(folder.parent, folder.name, data=data)
    write_text(folder / "report.html", draft(folder, author, matric, sent_views(folder), data))


def print_draft(folder, overwrite=False):
    """Print report.html as report.pdf; returns its number of pages. UserError without Chromium or pypdf.

    Also if report.pdf is no print of report.html, unless `overwrite` is true.
    """
    require_packages("pypdf")
    source, target = folder / "report.html", folder / "report.pdf"
    if not overwrite:
        check_target(target, b"Title .%b" % TITLE.encode())
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
        raise UserError(f"no {source}; `make report NAME={name} AUTHOR= MATRIC=` creates it")
    print(
        f"{folder}/report.pdf: {print_draft(folder, args.overwrite)} pages; next: make report-zip NAME={name} MATRIC="
    )


if __name__ == "__main__":
    run_main(main)
