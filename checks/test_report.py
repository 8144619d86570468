"""The page of all runs: what it tells is what the folders hold, one damaged folder does not stop it, and a real
browser shows and sorts it."""

import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

import checkpoint
import pictures
import report
import rundir
from errors import UserError
from labels import COLOURS, NUM_CLASSES
from metrics import by_label, confusion, f_scores
from model import build
from options import parse
from report_pdf import find_browser, run_browser
from svg import confusion_matrix, curves, label_bars, ticks
from synth import make_dataset

BROWSER = find_browser()
NASTY = """<b>"O'Neil" & co #1%"""


def write_run(runs, name, scores, *flags):
    """A run of as many epochs as scores, with all its records but no weights."""
    folder = runs / name
    folder.mkdir(parents=True)
    args, _ = parse(["--name", name, "--runs", str(runs), "--sizes", f"32:1,64:{len(scores) - 1}", *flags])
    record = {"args": vars(args), "parameters": 1_747_923, "commit": "0" * 40, "versions": {"python": "3"}}
    (folder / "args.json").write_text(json.dumps(record))
    rng = np.random.default_rng(len(name))
    truth = rng.integers(0, NUM_CLASSES, (4, 20, 20))
    truth[truth == 3] = 1
    guess = np.where(rng.random(truth.shape) < 0.7, truth, 1)
    confusions = np.stack([confusion(g, t) for g, t in zip(guess, truth, strict=True)])
    lines = [
        {"epoch": i, "size": 64, "lr": 1e-3, "loss": 3.0 / i, "val_loss": 2.0 / i, "official": score,
         "batch32": score / 2, "train_official": score + 0.01, "minutes": i / 2, "labels": []}
        for i, score in enumerate(scores, 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    f, images = by_label(confusions)
    best = {
        "epoch": 1, "official": max(scores), "batch32": 0.5, "labels": rundir.plain(f),
        "images_with_label": images.tolist(), "confusion": confusions.sum(0).tolist(),
        "image_scores": {f"image{i}": rundir.plain(row) for i, row in enumerate(f_scores(confusions))},
    }  # fmt: skip
    (folder / "best.json").write_text(json.dumps(best))
    return folder


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path, "low", [0.2, 0.5, 0.4], "--lr", "2e-3")
    write_run(tmp_path, "high", [0.3, 0.9], "--lr", "1e-3", "--dice", "1")
    write_run(tmp_path, NASTY, [0.6, 0.7], "--lr", "3e-3")
    return tmp_path


def test_one_damaged_run_is_named_and_the_others_are_shown(runs):
    damages = {
        "args.json": ["", "[]", '{"args": {}}', '{"args": {"sizes": "64", "epochs": 9, "lr": "fast"}}'],
        "metrics.jsonl": ['{"epoch": 1}', '{"epoch": 1, "lr": 1, "loss": NaN}', '{"epoch": 1, "lr": 1, "loss": []}'],
        "best.json": ["{", "{}", '{"confusion": [[1]], "labels": [], "images_with_label": []}'],
    }  # fmt: skip
    names = []
    for file, contents in damages.items():
        for i, content in enumerate(contents):
            names.append(f"bad-{file}-{i}")
            (write_run(runs, names[-1], [0.1, 0.2]) / file).write_text(content)
    html = report.page(runs)
    unreadable = re.search(r"Unreadable: (.*)</p>", html)[1]
    assert all(name in unreadable for name in names)
    assert html.count('<details class="run"') == 3 and "low" not in unreadable


def test_runs_stand_by_score_and_names_are_escaped(runs):
    html = report.page(runs)
    values = re.findall(r'<td class="word name" data-v="([^"]*)"', html)
    assert [report.text("high"), report.text(NASTY), "low"] == values
    assert NASTY not in html and "<b>&quot;" not in html


def test_settings_that_differ_from_the_defaults_are_named(runs):
    html = report.page(runs)
    section = re.search(r'id="run:high".*?All arguments', html, re.S)[0]
    *chips, again = re.findall(r"<code>(.*?)</code>", section)
    assert chips == ["sizes 32:1,64:1", "lr 0.001", "dice 1.0"]
    assert again == "make train ARGS=&quot;--sizes 32:1,64:1 --lr 0.001 --dice 1.0&quot;"


def test_the_page_reloads_itself_while_a_training_holds_a_run(runs):
    assert "refresh" not in report.page(runs).split("<style>")[0]
    rundir._lock(runs / "low")
    html = report.page(runs)
    assert '<meta http-equiv="refresh" content="30"' in html.split("<style>")[0]
    assert 'data-seconds="30">In training: low.' in html
    rundir.close_run()
    assert not rundir.in_training(runs / "low")


def test_curves_hold_the_records_points_where_the_axes_say():
    lines = [{"epoch": i, "loss": 4.0 / i, "lr": 1e-3, "official": i / 10} for i in (1, 2, 4)]
    drawn = curves(lines, [(64, 2), (128, 2)], "a")
    place, points = re.search(
        r'data-key="official".*?class="line validation" d="M([^"]*)" transform="([^"]*)"', drawn
    ).groups()[::-1]
    assert points == "1 0.1L2 0.2L4 0.4"
    x0, y0, across, up = (float(n) for n in re.findall(r"-?[\d.]+(?:e-?\d+)?", place))
    box = re.search(r'data-key="official" data-x="0 4" data-y="0.1 0.4" data-box="(\S+) (\S+) (\S+) (\S+)"', drawn)
    left, top, width, height = map(float, box.groups())
    assert (x0 + 4 * across, y0 + 0.4 * up) == pytest.approx((left + width, top), abs=0.1)
    assert (x0, y0 + 0.1 * up) == pytest.approx((left, top + height), abs=0.1)
    assert "64 px" in drawn and "128 px" in drawn


def test_ticks_are_round_and_inside():
    assert ticks(0.6986, 0.8408) == [0.7, 0.75, 0.8]
    assert ticks(0, 200, 8) == [0, 50, 100, 150, 200]


def test_bars_are_as_long_as_f_in_the_labels_colours():
    f = [None if i == 3 else i / 20 for i in range(NUM_CLASSES)]
    drawn = label_bars(f, range(NUM_CLASSES), "a")
    bars = re.findall(r'class="bar" fill="#(\w{6})"[^>]* width="([\d.]+)"', drawn)
    assert [colour for colour, _ in bars] == [bytes(COLOURS[i]).hex() for i in range(NUM_CLASSES) if i != 3]
    assert float(bars[-1][1]) / float(bars[1][1]) == pytest.approx(18, rel=1e-3)


def test_confusion_matrix_is_in_percent_of_the_row():
    counts = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    counts[1, 1], counts[1, 13] = 75, 25
    drawn = confusion_matrix(counts, "a")
    assert re.findall(r">(\d+)</text>", drawn) == ["75", "25"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run with weights and its data: what a training of no effect would leave."""
    root = tmp_path_factory.mktemp("drawn")
    make_dataset(root / "data", train=4, dev=0, test=0, workers=1)
    folder = write_run(root / "runs", "a", [0.5, 0.6], "--data", str(root / "data"), "--model", "microunet")
    best = json.loads((folder / "best.json").read_text())
    names = sorted(p.stem for p in (root / "data/train/images").iterdir())
    best["image_scores"] = dict(zip(names, best["image_scores"].values(), strict=True))
    (folder / "best.json").write_text(json.dumps(best))
    model = build("microunet")
    content = {"model": "microunet", "model_args": {}, "size": 64, "state_dict": model.state_dict()}
    checkpoint.save(folder / "best.pt", content)
    return folder


def test_pictures_are_the_worst_and_best_and_of_these_weights(drawn):
    pictures.draw_pictures(drawn)
    held, seen = pictures.read_pictures(drawn)
    scores = json.loads((drawn / "best.json").read_text())["image_scores"]
    order = sorted(scores, key=lambda name: np.mean([f for f in scores[name] if f is not None]))
    assert [p["name"] for p in held] == [*order[:2], *order[:1:-1]]
    assert [p["worst"] for p in held] == [True, True, False, False]
    assert all(len(p["panels"]) == 4 for p in held)
    html = report.page(drawn.parent)
    assert html.count("<figure><div") == 4 and held[0]["panels"][0] in html
    assert seen and pictures.SEEN in html  # these weights name no score of their own
    checkpoint.save(drawn / "best.pt", checkpoint.load(drawn / "best.pt") | {"official": 0.5})
    with pytest.raises(UserError, match="no pictures of these weights yet"):
        pictures.read_pictures(drawn)
    pictures.draw_pictures(drawn)
    assert pictures.SEEN not in report.page(drawn.parent)


def test_missing_weights_and_data_are_said_in_a_line(drawn, runs):
    assert "no weights (best.pt)" in report.page(runs)
    (runs / "high/best.pt").write_bytes((drawn / "best.pt").read_bytes())
    with pytest.raises(UserError, match="images this run was scored on"):
        pictures.draw_pictures(runs / "high")


def test_error_map_colours_wrong_pixels_alone():
    pixels = np.full((4, 4, 3), 100, np.uint8)
    wrong = np.zeros((4, 4), bool)
    wrong[1, 2] = True
    drawn = pictures.error_map(pixels, wrong)
    assert drawn[1, 2].tolist() == list(pictures.WRONG)
    assert (drawn[~wrong] == drawn[0, 0]).all() and np.ptp(drawn[0, 0]) == 0


def test_git_ignores_what_shows_pictures_of_the_dataset():
    files = ["runs/index.html", *(f"runs/a/{name}" for name in ("pictures.json", "report.html", "report.pdf"))]
    if subprocess.run(["git", "rev-parse"], capture_output=True).returncode:
        pytest.skip("no git checkout")
    ignored = subprocess.run(["git", "check-ignore", *files], capture_output=True, text=True).stdout.split()
    assert ignored == files


def in_browser(page, script, *flags):
    """(DOM after the page and then `script` have run, what the console said)."""
    copy = page.with_name("driven.html")
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    dom, log = run_browser(
        BROWSER, "--enable-logging=stderr", "--virtual-time-budget=3000", *flags, "--dump-dom", copy.as_uri()
    )
    return dom, [line for line in log.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(not BROWSER, reason="no Chromium")
def test_a_click_sorts_and_two_runs_are_laid_over_each_other(runs):
    page = report.write_page(runs)
    script = """
      const click = name => [...document.querySelectorAll("th button")].find(b => b.textContent === name).click();
      const order = () => all(board.tBodies[0], "tr").map(r => r.cells[6].dataset.v).join(" ");
      const seen = [order()];
      click("LR"); seen.push(order()); click("LR"); seen.push(order());
      picks[1].value = "run:low"; picks[1].dispatchEvent(new Event("change"));
      seen.push(over.querySelectorAll("path.line.a").length, over.querySelectorAll("path.line.b").length);
      seen.push(over.querySelectorAll("rect.bar.b").length, over.querySelectorAll("rect.bar").length);
      seen.push(document.documentElement.scrollWidth <= innerWidth);
      document.body.dataset.seen = seen.join(" | ");"""
    dom, console = in_browser(page, script)
    assert console == []
    seen = re.search(r'data-seen="([^"]*)"', dom)[1].split(" | ")
    assert seen[:3] == ["0.001 0.003 0.002", "0.003 0.002 0.001", "0.001 0.002 0.003"]
    assert seen[3:] == ["5", "5", "18", "36", "true"]


@pytest.mark.skipif(not BROWSER, reason="no Chromium")
def test_the_page_fits_a_phone_and_a_broken_script_would_be_seen(runs):
    page = report.write_page(runs)
    frame = runs / "phone.html"
    frame.write_text(f'<body><iframe width="390" height="800" src="{page.name}"></iframe></body>')
    script = """onload = () => { const inner = document.querySelector("iframe").contentDocument.documentElement;
      document.body.dataset.seen = [inner.clientWidth > 360, inner.scrollWidth - inner.clientWidth,
        inner.querySelectorAll("#over svg").length].join(" "); nonsense(); }"""
    dom, console = in_browser(frame, script, "--allow-file-access-from-files")
    assert 'data-seen="true 0 2"' in dom
    assert len(console) == 1 and "nonsense is not defined" in console[0]


@pytest.mark.skipif(not BROWSER, reason="no Chromium")
def test_the_page_is_drawn(runs):
    page, shot = report.write_page(runs), runs / "shot.png"
    run_browser(BROWSER, "--window-size=1280,1600", f"--screenshot={shot}", page.as_uri())
    colours = {colour for _, colour in Image.open(shot).convert("RGB").getcolors(2**24)}
    # The lines of both runs, and labels' colours.
    assert {(0, 114, 178), (213, 94, 0), COLOURS[13], COLOURS[17]} <= colours
