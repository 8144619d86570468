"""One page of all runs, runs/index.html, and of one run a draft of the course's technical report.

python report.py
python report.py --name a --author "A. Author" --matric A12345678B     # runs/a/report.html too

Trainings rewrite the page after each validation. It holds pictures of the dataset: never publish it; git ignores it.
"""

import argparse
import sys
import time
from pathlib import Path
from urllib.parse import quote

from atomic import write_text
from course_report import write_draft
from errors import ArgumentParser, UserError, matriculation, run_main
from labels import HEX_COLOURS, NAMES
from pictures import SEEN, draw_pictures, read_pictures
from records import changed, read_run, read_runs, sentence, shown
from rundir import find_run, make_name
from svg import confusion_matrix, curves, label_bars, text

TEMPLATE = Path(__file__).with_name("page.html")
WITH_PICTURES = 4  # runs, the best ones: their pictures make most of the page's bytes
REFRESH = 30  # seconds
COLUMNS = (
    ("run", "name", "word"), ("official", "official", ".4f"), ("batch of 32", "batch32", ".4f"),
    ("best epoch", "epoch", "d"), ("epochs", "epochs", "d"), ("parameters", "parameters", ",d"), ("LR", "lr", "g"),
    ("Dice", "dice", "g"), ("LMSA", "lmsa", "word"), ("minutes", "minutes", ".1f"), ("model", "model", "word"),
    ("recipe", "recipe", "word"),
)  # fmt: skip


def anchor(run):
    """The fragment of a run's section, for its id; `quote` it in a link."""
    return f"run:{run.name}"


def board(runs):
    """The leaderboard as a table that a click on a heading sorts."""
    heads = ""
    for title, key, form in COLUMNS:
        kind = ' class="word name"' if key == "name" else ' class="word"' if form == "word" else ""
        first = ' data-first="up"' if form == "word" else ""
        heads += f'<th{kind}{first} scope="col"><button type="button">{title}</button></th>'
    rows = ""
    for run in runs:
        cells = ""
        for _, key, form in COLUMNS:
            value = run.row[key]
            told = "" if value is None else shown(value) if form == "word" else format(value, form)
            content, kind = text(told or "–"), ' class="word"' if form == "word" else ""
            if key == "name":
                content, kind = f'<a href="#{quote(anchor(run), safe=":")}">{content}</a>', ' class="word name"'
            cells += f'<td{kind} data-v="{text(told if form == "word" else value if told else "")}">{content}</td>'
        rows += f"<tr>{cells}</tr>"
    return f'<div class="scroll"><table id="board"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def choice(runs):
    """Two lists to choose runs from; the page's script lays their charts over each other."""
    lists = ""
    for kind, chosen in (("a", runs[0]), ("b", runs[1])):
        options = "".join(
            f'<option value="{text(anchor(run))}"{" selected" if run is chosen else ""}>{text(run.name)}</option>'
            for run in runs
        )
        lists += f'<label class="key {kind}"><select class="pick">{options}</select></label>'
    note = "Dashed: training. Bars: the first run filled, the second in outline, and its gain or loss by label."
    return (
        "<h2>Two runs over each other</h2>"
        f'<div class="keys">{lists}</div><p class="note">{note}</p><div id="over" class="charts"></div>'
    )


def gallery(run):
    """The six worst and six best validation images, or one line that says why there are none."""
    try:
        pictures, seen = read_pictures(run.folder)
    except UserError as error:
        return f'<p class="note">{text(sentence(error))}</p>'
    heads = "".join(f"<span>{head}</span>" for head in ("image", "truth", "prediction", "errors"))
    halves = ""
    for worst in (True, False):
        halves += f'<div><h3>{"Worst" if worst else "Best"} validation images</h3><div class="four">{heads}</div>'
        for picture in (p for p in pictures if p["worst"] == worst):
            weakest = ", ".join(f"{name} {f:.2f}" for name, f in picture["weakest"])
            images = "".join(
                f'<img src="{uri}" alt="{alt}" loading="lazy">'
                for uri, alt in zip(picture["panels"], ("image", "truth", "prediction", "errors"), strict=True)
            )
            halves += (
                f'<figure><div class="four">{images}</div><figcaption><b>{picture["score"]:.3f}</b> lowest: {weakest}'
                f"{' (left and right reversed in the truth)' if picture['reversed'] else ''} "
                f'<span class="note">{text(picture["name"])}</span></figcaption></figure>'
            )
        halves += "</div>"
    note = f'<p class="note">{SEEN}</p>' if seen else ""
    return f'{note}<div class="both">{halves}</div>'


def settings(run):
    """What differs from the defaults, all arguments, and where the run comes from."""
    differs, record = changed(run), run.record
    chips = " ".join(f"<code>{text(key)} {text(shown(value))}</code>" for key, value in differs.items())
    everything = "<br>".join(
        f"<b>{text(key)}</b> {text(shown(value))}" if key in differs else f"{text(key)} {text(shown(value))}"
        for key, value in run.args.items()
    )
    versions = ", ".join(f"{key} {value}" for key, value in record.get("versions", {}).items() if value)
    recipe = f" (recipe {text(run.args['recipe'])})" if run.args.get("recipe") else ""
    again = f"<p>Again: <code>{text(run.row['line'])}</code></p>" if run.row else ""
    return (
        f'<h3>Differs from the defaults{recipe}</h3><p class="chips">{chips or "nothing"}</p>{again}'
        f'<details><summary>All arguments</summary><p class="args">{everything}</p></details>'
        f'<p class="note">Started {text(record.get("started", "?"))}, commit {text(record.get("commit", "?")[:12])}, '
        f"{text(versions)}</p>"
    )


def section(run, opened, pictured):
    """All of one run, folded away unless `opened`, with its pictures where `pictured`."""
    epochs = sum(length for _, length in run.phases)
    at = run.lines[-1]["epoch"] if run.lines else 0
    about = f"official {run.row['official']:.4f} in epoch {run.row['epoch']}" if run.row else "not scored yet"
    about += f", {'in training: ' if run.training else ''}{at} of {epochs} epochs"
    charts = ""
    if run.lines:
        charts += f'<div class="curves">{curves(run.lines, run.phases, run.name)}</div>'
    if run.best:
        charts += f'<div class="bars">{label_bars(run.best["labels"], run.best["images_with_label"], run.name)}</div>'
        charts += f'<div class="scroll">{confusion_matrix(run.best["confusion"], run.name)}</div>'
    pictures = gallery(run) if pictured else ""
    if run.best and not pictured:
        pictures = f'<p class="note">Pictures are those of the {WITH_PICTURES} best runs that have any.</p>'
    return (
        f'<details class="run" id="{text(anchor(run))}"{" open" if opened else ""}><summary>{text(run.name)} '
        f'<span>{about}</span></summary><div class="charts">{charts}</div>{pictures}'
        f"{settings(run)}</details>"
    )


def legend():
    """The labels' colours with their names beside them."""
    names = (
        f'<span><i style="background:{colour}"></i>{name}</span>'
        for colour, name in zip(HEX_COLOURS, NAMES, strict=True)
    )
    return f'<p class="names">{" ".join(names)}</p><p class="note">Left and right are the person\'s own.</p>'


def page(runs):
    """The whole page of the runs below a folder, as HTML."""
    scored, unscored, unreadable = read_runs(runs)
    live = [run for run in [*scored, *unscored] if run.training]
    parts = ["<h1>Runs</h1>"]
    if live:
        names = ", ".join(text(run.name) for run in live)
        about = f"In training: {names}. This page reloads itself every {REFRESH} seconds."
        parts.append(f'<p class="live" data-seconds="{REFRESH}">{about}</p>')
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    parts.append(
        f'<p class="note"><span id="written" data-at="{now:.0f}">Written {stamp}</span>. Scores are official: F over '
        "the labels present in an image, averaged, then over the validation images. Click a heading to sort, a run to "
        "see it.</p>"
    )
    parts.append(board(scored) if scored else "<p>No run has been scored yet.</p>")
    if unreadable:
        reasons = "; ".join(f"{text(name)} ({text(reason)})" for name, reason in unreadable)
        parts.append(f'<p class="note">Unreadable: {reasons}</p>')
    comparable = [run for run in scored if run.best]
    if len(comparable) > 1:
        parts.append(choice(comparable))
    parts += ["<h2>Each run</h2>", legend()]
    opened = live or scored[:1]
    pictured = [run for run in scored if (run.folder / "pictures.json").is_file()][:WITH_PICTURES] + live
    pictured = pictured or scored[:1]  # whose section then says why there are none
    parts += [section(run, run in opened, run in pictured) for run in [*scored, *unscored]]
    head = f'<noscript><meta http-equiv="refresh" content="{REFRESH}"></noscript>' if live else ""
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("<!--HEAD-->", head, 1).replace("<!--BODY-->", "\n".join(parts), 1)


def write_page(runs):
    """Write runs/index.html; the path."""
    path = Path(runs, "index.html")
    write_text(path, page(runs))
    return path


def redraw(folder, device=None):
    """Draw the pictures of a run where its weights are others by now; what stands in the way is told on stderr."""
    try:
        draw_pictures(folder, device)
    except UserError as error:
        print(f"{folder}: {error}", file=sys.stderr)


def draw_best(runs):
    """Draw the pictures of the best runs that have weights."""
    scored, _, _ = read_runs(runs)
    for run in [run for run in scored if (run.folder / "best.pt").is_file()][:WITH_PICTURES]:
        redraw(run.folder)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    parser.add_argument("--name", help="run to draft the course's report on")
    parser.add_argument("--author", help="name on that report")
    parser.add_argument("--matric", type=matriculation, help="matriculation number on that report")
    parser.add_argument("--overwrite", action="store_true", help="replace a draft that has been edited")
    args = parser.parse_args()
    if not args.name and (args.author or args.matric or args.overwrite):
        raise UserError("AUTHOR, MATRIC and OVERWRITE are of one run's report: name it with NAME= (--name)")
    folder = find_run(args.name, args.runs) if args.name else None
    draw_best(args.runs)
    print(f"{write_page(args.runs)}: open it in a browser; it may hold pictures of the dataset, so do not publish it")
    if folder:
        redraw(folder)
        scored, _, _ = read_runs(args.runs)
        path = write_draft(read_run(folder), scored, args.author, args.matric, args.overwrite)
        print(f"{path}: a draft to check and edit; next: make report-pdf NAME={make_name(folder)}")


if __name__ == "__main__":
    run_main(main)
