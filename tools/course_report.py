"""A draft of the course report on one run, runs/NAME/report.html, for its author to check and complete; printed as PDF.

python -m tools.course_report --name a --author "A. Author" --matric A12345678B
python -m tools.course_report --name a --pdf       # print the draft, at most five A4 pages; needs Chromium

All figures come from the runs' files. The draft shows images of the dataset: hand it in, but do not publish it.
"""

import os
import shutil
import subprocess
import tempfile
from argparse import Namespace
from html import escape
from pathlib import Path
from statistics import pstdev

from common import ArgumentParser, UserError, atomic, duration, read_json, require_packages, run_main, write_text

from labels import HEX_COLOURS, NAMES
from model import PARAM_LIMIT, build, count_parameters
from options import from_record, network_arguments, strength
from register import find_run, make_name
from tools.check_params import parameter_table
from tools.leaderboard import changed_settings
from tools.report import TEMPLATE, fill_template, find_scripts, image_score, read_pictures, read_runs, write_page
from tools.report_zip import count_pages, matriculation

EXPERIMENTS = 14  # rows that fit on five pages
SETTINGS = (
    "recipe sizes batch optimiser lr schedule warmup weight_decay clip ema dropout ce dice dice_over augment seed"
)
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


def settings(run, args):
    """The training as HTML; `args` are its arguments, with today's defaults for those it lacks."""
    values = vars(args) | {"from": args.start_from}
    keys = dict.fromkeys([*SETTINGS.split(), *changed_settings(values | {"recipe": None}), *run["changed"]])
    changes = ", ".join(f"{k} {v:g}" for k, v in vars(strength(args)).items() if v and not k.endswith("alpha"))
    row, yes = run["row"], ("no", "yes")
    return f"""<p>{escape(", ".join(f"{key} {values[key]}" for key in keys))}.</p>
<p>Augmentation: {changes or "none"}. Mirrored masks exchange left and right: {yes[args.exchange_sides]}; training masks
with left and right reversed are repaired: {yes[args.fix_sides]}. {row["epochs"]} epochs in
{duration(60 * row["minutes"])}. The weights of epoch {row["epoch"]}, the best on the validation images, are kept: this
favours the score slightly.
{escape(run["origin"])}</p>"""


def experiments(run, runs, folder):
    """Table of the scored runs on the same kind of faces: this run, own runs, then the repository's records."""
    # Git tracks the repository's records; outside a checkout the sources are unknown.
    command = ["git", "ls-files", "*/args.json"]
    git = subprocess.run(command, cwd=folder, capture_output=True, text=True) if shutil.which("git") else None
    tracked = {Path(line).parent.name for line in git.stdout.splitlines()} if git and not git.returncode else None
    rows = [other for other in runs if other["row"] and other["row"]["synthetic"] == run["row"]["synthetic"]]
    rows.sort(key=lambda other: (other is not run, other["name"] in (tracked or ())))
    body = ""
    for other in rows[:EXPERIMENTS]:
        row, changes = other["row"], [f"{key} {value}" for key, value in other["changed"].items()]
        source = "unknown" if tracked is None else "repository" if row["name"] in tracked else "own"
        figures = f"{row['parameters']:,}", row["epochs"], f"{row['official']:.4f}"
        cells = row["name"], source, ", ".join([row["recipe"] or "no recipe", *changes]), *figures
        body += "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
    return f"""<p>{min(len(rows), EXPERIMENTS)} of {len(rows)} scored runs. Differences below 0.004 say nothing: seeds
alone differ by up to 0.003. Runs of the source "repository" are its records, not trained for this report.</p>
<table><tr><th>run<th>source<th>recipe and changes<th>parameters<th>epochs<th>official{body}</table>"""


def examples(folder):
    """Images with the lowest and highest scores and with reversed masks, as HTML, or why there are none."""
    content = read_pictures(folder)
    if not content:
        return "<p>No images: weights (best.pt) or data are missing.</p>"
    body = ""
    titles = {"lowest": "Lowest but for reversed masks", "highest": "Highest", "reversed": "Reversed masks"}
    for group, title in titles.items():
        chosen = [picture for picture in content["pictures"] if picture["group"] == group][:4]
        images = "".join(f'<img src="{escape(uri)}" alt="">' for picture in chosen for uri in picture["panels"])
        scores = ", ".join(f"{picture['score']:.3f}" for picture in chosen) or "none"
        body += f'<p>{title}: {scores}</p><div class="images">{images}</div>'
    return f"""<p>Image, mask, prediction (colours: see 4), errors (orange).</p>{body}
<p>{content["reversed"]} of {content["images"]} masks have left and right reversed, which no network can predict.
Without these the official score is {content["score_without_reversed"]:.4f}.</p>"""


def draft(folder, author, matric):
    """The report as HTML. UserError if the run was not scored or this version builds another network."""
    runs = read_runs(folder.parent)[0]
    run = next((run for run in runs if run["name"] == folder.name and run["row"] and run["best"]), None)
    if not run:
        raise UserError(
            f"{folder} has no scores, or its files are damaged; if it was trained on all pairs, report on the run "
            "that scores it, and give report-zip REPORT=FILE"
        )
    record, row = read_json(folder / "args.json"), run["row"]
    args = Namespace(**record["args"] | vars(from_record(record["args"], folder / "args.json")))
    model = build(args.model, **network_arguments(args))
    count = count_parameters(model)
    if row["parameters"] not in (0, count):
        raise UserError(f"this version builds another {args.model} than {folder}: check out {record['commit'][:12]}")
    scores = [image_score(f) for f in run["best"]["image_scores"].values()]
    charts = find_scripts(TEMPLATE.read_text(encoding="utf-8"))[0]
    faces = "synthetic faces, which say nothing about real ones" if row["synthetic"] else "CelebAMask-HQ portraits"
    start = f"starting from the weights of {args.start_from} (describe their training)"
    origin = start if args.start_from else "no pretrained weights"
    seen = "The weights were trained on all pairs, these images included; the score is of a training without them."
    template = f"""<!doctype html><html lang="en"><meta charset="utf-8"><!--POLICY-->
<title>Report</title><style>{STYLE}</style>
<p class="screen">A draft from the run's files: check and complete it. Do not publish it: it shows the dataset.</p>
<h1>Face parsing with {count:,} parameters</h1>
<p>{escape(author or "Author: ________")} · {escape(matric or "matriculation number: ________")}</p>
<p><b>Validation F-measure (official score): {row["official"]:.4f}</b>, of the weights of epoch {row["epoch"]}, from one
view per image (not mirrored, not rescaled), on {len(scores)} images; standard error
{pstdev(scores) / len(scores) ** 0.5:.4f}. Pooled over batches of 32 images: {row["batch32"]:.4f}.
{seen if row["weights"] == "all pairs" else ""}</p>
<p><b>Parameters: {count:,}</b> (fewer than {PARAM_LIMIT:,} are allowed).</p>
<h2>1. Task</h2><p>Every pixel of a 512 x 512 image gets one of {len(NAMES)} labels; left and right are the person's.
Data: {faces}; {args.val_split:.0%} of the pairs are held out for validation (seed {args.split_seed}). No other data,
{escape(origin)}; one network. The official score is F averaged over the labels present in an image, then over the
images; masks are scored as they are.</p>
<h2>2. Network: {escape(args.model)}, parameters by module</h2><pre>{escape(parameter_table(model))}</pre>
<h2>3. Training</h2>{settings(run, args)}
<h2>4. Results</h2><div class="two" id="results"></div>
<h2>5. Examples</h2>{examples(folder)}
<h2>6. Experiments</h2>{experiments(run, runs, folder.parent)}
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


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", required=True, help="run to report on")
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    parser.add_argument("--author", help="name on the report")
    parser.add_argument("--matric", type=matriculation, help="matriculation number on the report")
    parser.switch("--overwrite", help="replace an existing draft")
    parser.switch("--pdf", help="print the existing draft instead")
    args = parser.parse_args()
    folder = find_run(args.name, args.runs)
    source, target, name = folder / "report.html", folder / "report.pdf", make_name(folder)
    if args.pdf and (args.author or args.matric):
        raise UserError(f"AUTHOR= and MATRIC= are for the draft, `make report NAME={name}`; this prints it as it is")
    if not args.pdf:
        if source.is_file() and not args.overwrite:
            raise UserError(f"{source} exists: rename it to keep it, or replace it with OVERWRITE=1")
        write_page(folder.parent, folder.name)
        write_text(source, draft(folder, args.author, args.matric))
        print(f"{source}: check and complete it, then: make report-pdf NAME={name}")
        return
    if not source.is_file():
        raise UserError(f"no {source}; `make report NAME={name} AUTHOR= MATRIC=` creates it")
    require_packages("pypdf")
    with atomic(target) as temporary:
        browse("--no-pdf-header-footer", f"--print-to-pdf={temporary.resolve()}", source.resolve().as_uri())
    print(f"{target}: {count_pages(target)} pages; next: make report-zip NAME={name} MATRIC=")


if __name__ == "__main__":
    run_main(main)
