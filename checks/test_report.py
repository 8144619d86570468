"""Leaderboard, page of all runs, course report and progress lines: their figures are those of the runs' files."""

import html
import io
import json
import re
import shlex
import shutil
import subprocess
import zipfile
from types import SimpleNamespace

from common import UserError, printable, show_line, show_progress

import numpy as np
import pytest

import evaluate
import register
import train
from checks.conftest import cases, untrained
from data import swap_sides
from images import mask_image, read_mask
from labels import NUM_CLASSES
from options import parse
from tools import course_report, report, report_zip
from tools.package import make_submission
from tools.report import EXPERIMENTS, LEGEND, leaderboard, make_line, read_folder, recipe_table, survey

HELD_OUT = {"validated": True, "trained_on": [("another", "hash")]}
LOADS_NOTHING = "default-src 'none'; img-src data:;"
NASTY = """<b>"O'Neil" & co\n#1%<!--<script>\x1b]0;\x07"""
needs_browser = pytest.mark.skipif(not any(map(shutil.which, course_report.BROWSERS)), reason="no Chromium")


def write_run(runs, name, scores, *flags, names=("p", "q", "r", "s"), **record):
    """A run with one validated epoch per score and all its files except weights."""
    (folder := runs / name).mkdir(parents=True)
    args, _ = parse(["--name", name, "--sizes", f"32:1,64:{len(scores)}", "--patience", "0", *flags])
    record = {"parameters": 1_747_923, "commit": "0" * 40, "versions": {"python": "3"}, "args": vars(args)} | record
    (folder / "args.json").write_text(json.dumps(record))
    lines = [
        dict(epoch=i, lr=1e-3, loss=3 / i, val_loss=2 / i, official=score, batch32=score / 2, minutes=i)
        for i, score in enumerate([*scores, scores[-1] / 2], 1)
    ]
    train.write_metrics(folder, lines)
    shape = len(names), NUM_CLASSES, NUM_CLASSES
    confusions = np.random.default_rng(len(name)).integers(1, 9, shape) + 99 * np.eye(NUM_CLASSES, dtype=int)
    confusions[:, 3] = 0  # no truth has label 3
    own = SimpleNamespace(folder=folder, pairs=SimpleNamespace(names=names), val_indices=range(len(names)))
    train.write_best(own, lines[0], confusions)
    return folder


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path, "low", [0.2, 0.5, 0.4], "--recipe", "lmsa_dice1_5_warm_restart", "--lr", "2e-3")
    write_run(tmp_path, "high", [0.3, 0.9], "--lr", "1e-3", "--dice", "1", started="2026-01-31T00:00:00Z")
    write_run(tmp_path, NASTY, [0.6, 0.7], "--lr", "3e-3", "--recipe", "cpu")
    write_run(tmp_path, "synthetic", [0.95], pairs={"drawn": True})
    return tmp_path


def image_scores(folder):
    """{image: its official score} of a run."""
    rows = json.loads((folder / "best.json").read_text())["image_scores"]
    return {name: np.mean([f for f in row if f is not None]) for name, row in rows.items()}


def data_in(page):
    return json.loads(re.search('id="data">(.*?)</script>', page)[1])


def page_data(runs):
    return data_in(report.write_page(runs).read_text())


def test_leaderboard_has_real_faces_by_best_score_then_synthetic_ones(runs):
    untrained(runs / "low/best.pt", validated=True)
    untrained(runs / "high/best.pt", validated=False)
    with open(runs / "high/metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "offi')  # a crash while writing
    rows = [row.split() for row in leaderboard(survey(runs)[0]).replace(printable(NASTY), "nasty").splitlines()[1:]]
    assert [row[0] for row in rows] == ["high", "nasty", "low", "synthetic"]
    assert " ".join(rows[0][1:7]) == "0.9000 0.4500 2/3 1748k 3.0 all"
    assert "sizes=32:1,64:2" in rows[0]
    assert (rows[1][6], rows[2][6], rows[3][7:9]) == ("-", "yes", ["synthetic", "faces;"])


@pytest.fixture
def experiments(runs):
    """`runs`, of which "high" and the one of a nasty name are lines of EXPERIMENTS, after a damaged one."""
    lines = ["[" * 100_000]
    for folder in (runs / "high", runs / NASTY):
        lines.append(json.dumps(read_folder(folder) | {"name": folder.name}))
        shutil.rmtree(folder)
    (runs / EXPERIMENTS).write_text("\n".join(lines))
    return runs


def test_experiments_are_listed_like_runs_after_those_of_the_user(experiments, command, refused):
    (experiments / "low").rename(experiments / "high")  # another run of that name
    for flags, expected in (["--all"], ["high", "synthetic", "records", "high", "nasty"]), ([], ["high", "synthetic"]):
        _, out, error = command(report.main, "--table", "--runs", experiments, *flags)
        text = out.replace(printable(NASTY), "nasty")
        assert re.findall("^(your runs|records|low|high|nasty|synthetic)", text, re.M) == ["your runs", *expected]
        assert ("skipped line 1 of" in error) == bool(flags)
    long = [run | {"changed": {"model_args": "x" * 99}} for run in survey(experiments)[0]]
    assert max(map(len, f"{leaderboard(long)}\n{LEGEND}".splitlines())) <= 100
    (experiments / "high/best.pt").write_text("of the other run")
    assert [run["name"] for run in page_data(experiments)["runs"]] == ["high", NASTY, "synthetic"]  # own: damaged
    assert "no folder" in refused(report.main, "--table", f"--runs={experiments}/typo")


def test_unfinished_runs_are_listed_with_the_command_that_resumes_them(tmp_path):
    for name, *flags in [("cut",), ("met", "--target", "0.5"), ("stale", "--patience", "2"), ("gone",), ("busy",)]:
        folder = write_run(tmp_path, name, [0.5, 0.6, 0.3], *flags, "--sizes", "64:9")
        (folder / "last.pt").touch() if name != "gone" else None
    write_run(tmp_path, "done", [0.5])
    (write_run(tmp_path, "whole", [0.5]) / "metrics.jsonl").write_text('{"epoch": 2, "lr": 1, "loss": 1}')
    register.lock(tmp_path / "busy")
    assert [run["remark"] for run in survey(tmp_path)[0] if run["remark"]] == [
        "unfinished: busy, 4 of 9 epochs, running",
        f"unfinished: cut, 4 of 9 epochs, make resume NAME={tmp_path}/cut",
        "without score: whole, 2 epochs on all pairs",
    ]


def test_recipes_show_our_best_run_of_the_current_settings(tmp_path):
    args = vars(parse(["--recipe", "cpu"])[0])
    for name, score, changes in [("a", 0.7, {}), ("b", 0.75, {"seed": 7}), ("other", 0.9, {"lr": 0.5})]:
        write_run(tmp_path, name, [score], args=args | changes)
    write_run(tmp_path, "synthetic", [0.99], args=args, pairs={"drawn": True})
    rows = {line.split()[0]: line.split()[1:4] for line in recipe_table(survey(tmp_path)[0]).splitlines()}
    assert rows["cpu"] == ["-", "0.3750", "0.7500"] and rows["lmsa_v1"] == ["0.6819", "-", "-"]


def test_the_make_line_repeats_a_run():
    given = ["--recipe", "search", "--name", "a", "--lr", "0.5", "--no-fix-sides", "--model-args", '{"attention": 0}']
    line = make_line(vars(parse([*given, "--data", "d"])[0]) | {"lovasz": 1.0, "repeat_rare": 0.0})
    settings = [word.split("=", 1) for word in shlex.split(line.removeprefix("make train "))]
    assert settings[0] == ["RECIPE", "search"] and settings.pop() == ["LOVASZ", "1.0"]  # a removed flag that was set
    again = parse([f"--{name.lower().replace('_', '-')}={value}" for name, value in settings])[0]
    assert vars(again) == vars(parse(given)[0]) | {"name": None}
    assert make_line({"recipe": "gone", "lr": 0.5, "start_from": "a b"}) == "make train FROM='a b' LR=0.5"


LINE = dict(epoch=1, lr=1, loss=1, official=0.5, batch32=0.5, minutes=1)
CHANGES = {"loss": [1]}, {"loss": float("nan")}, {"minutes": int("9" * 400)}
DAMAGES = [
    *[("args.json", text) for text in ("[]", "[" * 100_000, '{"args": {"sizes": "64", "epochs": 9, "lr": "fast"}}')],
    *[("args.json", change) for change in ({"pairs": {"validation": [1]}}, {"parameters": "<b>"}, {"commit": 5})],
    *[("metrics.jsonl", json.dumps(LINE | change)) for change in CHANGES],
    ("best.json", '{"confusion": [[1]], "labels": [], "images_with_label": [], "image_scores": {}}'),
]


def test_damaged_runs_are_named_and_the_others_shown(runs, command, refused):
    for i, (file, content) in enumerate(DAMAGES):
        path = write_run(runs, f"bad-{i:02}", [0.1]) / file
        whole = isinstance(content, str)
        path.write_text(content if whole else json.dumps(json.loads(path.read_text()) | content))
    (write_run(runs, "cut", [0.1]) / "metrics.jsonl").write_text("[" * 100_000)  # as if cut off
    data = page_data(runs)
    page = (runs / "index.html").read_text()
    assert LOADS_NOTHING in page and not re.search("<b>&?[\"']|<!--<", page)  # no name becomes markup
    assert [name for name, _ in data["unreadable"]] == [f"bad-{i:02}" for i in range(len(DAMAGES))]
    assert [run["name"] for run in data["runs"]] == ["high", NASTY, "low", "synthetic", "cut"]
    status, out, error = command(report.main, "--table", f"--runs={runs}")
    assert status == 0 and "high" in out and error.count("skipped bad-") == len(DAMAGES)
    refused(train.main, f"--runs={runs}", "--resume=bad-01")


@pytest.fixture(scope="module")
def scored(place, tmp_path_factory):
    """A run with weights and ten synthetic pairs, one of them with left and right reversed in its mask."""
    root = tmp_path_factory.mktemp("scored")
    shutil.copytree(place / "data", root / "data")
    paths = sorted((root / "data/train/masks").iterdir())
    flags = "--data", str(root / "data"), "--model", "microunet"
    folder = write_run(root / "runs", "a", [0.5], *flags, names=[p.stem for p in paths], parameters=1_758_835)
    mask_image(swap_sides(read_mask(paths[2]))).save(paths[2])
    untrained(folder / "best.pt", **HELD_OUT)
    return folder


def test_images_are_ranked_and_reversed_masks_listed_apart(scored):
    data = page_data(scored.parent)["runs"][0]["pictures"]
    scores = image_scores(scored)
    flawed = sorted(scores)[2]
    order = sorted(scores.keys() - {flawed}, key=scores.get)
    groups = [[p["name"] for p in data["pictures"] if p["group"] == key] for key in ("lowest", "highest", "reversed")]
    assert groups == [order[:6], order[:2:-1], [flawed]]
    assert (data["reversed"], data["images"], data["seen"]) == (1, 10, False)
    assert data["score_without_reversed"] == pytest.approx(np.mean([scores[name] for name in order]))


def test_images_are_predicted_again_only_if_the_weights_change(scored, monkeypatch, command):
    untrained(scored / "best.pt", **HELD_OUT)
    assert not report.find_pictures(scored)["seen"]
    (scored / "best.pt").rename(scored / "validated.pt")  # as in the release
    untrained(scored / "best.pt", validated=False)
    assert not report.find_pictures(scored)["seen"]
    (scored / "validated.pt").unlink()
    assert report.find_pictures(scored)["seen"]
    status, out, _ = command(report.main, "--runs", scored.parent, "--device", "cpu")
    assert status == 0 and out.startswith(f"{scored.parent}/index.html: ")
    monkeypatch.setattr(report, "draw_pictures", None)
    assert page_data(scored.parent)["runs"][0]["pictures"]


def test_missing_data_leaves_out_the_images_with_a_warning(scored, runs, capsys):
    (runs / "high/best.pt").write_bytes((scored / "best.pt").read_bytes())
    assert page_data(runs)["runs"][0]["pictures"] is None
    assert re.search("no images of high: (no data/ folder|data contains other pairs)", capsys.readouterr().err)


def test_git_ignores_images_of_the_dataset_and_committed_runs_are_readable():
    if subprocess.run(["git", "ls-files", "--error-unmatch", "runs/release/args.json"], capture_output=True).returncode:
        pytest.skip("no git checkout")
    files = ["runs/index.html", *(f"runs/a/{name}" for name in ("pictures.json", "report.html", "report.pdf"))]
    assert subprocess.run(["git", "check-ignore", *files], capture_output=True, text=True).stdout.split() == files
    found, unreadable = survey("runs")
    assert not unreadable and {run["name"]: run for run in found}["release"]["row"]["weights"] == "all pairs"


def in_browser(path, script):
    """(what `script` returns on the loaded page, lines of the console)."""
    copy = path.with_name("driven.html")
    end = f"<script>document.title = JSON.stringify((() => {{ {script} }})());</script></body>"
    copy.write_text(path.read_text().replace("</body>", end))
    flags = "--enable-logging=stderr", "--virtual-time-budget=3000", "--allow-file-access-from-files", "--dump-dom"
    dom, log = course_report.browse(*flags, copy.as_uri())
    title = html.unescape(re.search("<title>(.*?)</title>", dom)[1])
    return json.loads(title), [line for line in log.splitlines() if "CONSOLE" in line]


@needs_browser
def test_the_page_sorts_filters_and_compares(runs):
    script = """
      const all = selector => [...document.querySelectorAll(selector)];
      const names = () => all("#board tbody .name").map(cell => cell.textContent[0]).join("");
      const click = name => all("#board button").find(button => button.textContent === name).click();
      const seen = [names()];
      for (const head of ["LR", "LR", "official"]) { click(head); seen.push(names()); }
      $("#filter").value = "CPU"; $("#filter").dispatchEvent(new Event("input")); seen.push(names());
      picks[1].value = 2; picks[1].dispatchEvent(new Event("change"));
      seen.push(all("#compared .panel").map(panel => panel.dataset.range), all("#compared .bar").length);
      seen.push($("#differences").textContent);
      return seen;"""
    seen, console = in_browser(report.write_page(runs), script)
    assert console == []
    assert seen[:5] == ["h<ls", "<lhs", "shl<", "sh<l", "<"]
    assert seen[5:7] == [["0 3", "0.2 1", "0 0.001"], 36]
    gains = np.subtract(*(list(image_scores(runs / name).values()) for name in ("low", "high")))
    gain = f"{gains.mean():+.4f} ± {gains.std(ddof=1) / 2:.4f} (4 images)".replace("-", "\u2212")
    assert seen[7].startswith(f"official score0.90000.5000difference ± paired standard error{gain}")
    assert "lr0.0010.002" in seen[7]


@needs_browser
@cases("width", [420, 1300])
def test_the_page_fits_a_phone_and_its_table_a_screen(runs, width):
    frame = report.write_page(runs).with_name("frame.html")
    frame.write_text(f'<body><iframe style="border: 0" width="{width}" height="800" src="index.html"></iframe></body>')
    script = """onload = () => { const page = document.querySelector("iframe").contentDocument;
      const [whole, table] = [page.documentElement, page.querySelector(".scroll")];
      document.title = JSON.stringify([whole.scrollWidth, table.scrollWidth - table.clientWidth,
        page.querySelectorAll("svg").length]); }"""
    (whole, hidden, charts), console = in_browser(frame, script)
    assert console == [] and whole <= width and charts == 5 and (hidden == 0 or width == 420)


def test_the_draft_states_the_figures_of_the_run(scored):
    untrained(scored / "best.pt", validated=False)
    page = course_report.draft(scored, "A & B", "A12345678B")
    own = np.mean(list(image_scores(scored).values()))
    assert f"(official score) is {own:.4f}</b> on 10 images" in page and page.count(f"{own:.4f}") == 1
    assert "1,758,835 parameters</b>" in page and "1.5 times a Dice loss averaged over the labels present" in page
    assert "A &amp; B · A12345678B" in page and "None" not in page.split("<script")[0] and LOADS_NOTHING in page
    *modules, total = [int(n.replace(",", "")) for n in re.search("<pre>(.*?)<", page, re.DOTALL)[1].split()[1::2]]
    assert sum(modules) == total == 1_758_835
    assert "trained on all pairs" in page and [row[:2] for row in data_in(page)["experiments"]] == [["a", "own"]]


def test_the_draft_marks_the_repositorys_records_and_synthetic_faces(experiments):
    page = course_report.draft(experiments / "low", None, None)
    sources = [row[:2] for row in data_in(page)["experiments"]]
    assert sources == [["low", "own"], ["high", "repository"], [NASTY, "repository"]]
    assert "say nothing about real ones" in course_report.draft(experiments / "synthetic", None, None)


def test_a_draft_is_replaced_only_if_asked(runs, command, refused):
    flags, path = (course_report.main, "--runs", runs, "--name=high", "--author=Ada"), runs / "high/report.html"
    assert command(*flags)[0] == 0
    path.write_text(path.read_text().replace("Ada", "Ada Lovelace"))
    assert "exists: rename it" in refused(*flags) and "Lovelace" in path.read_text()
    assert command(*flags, "--overwrite")[0] == 0 and "Lovelace" not in path.read_text()


def test_the_course_zip_without_a_number_has_a_draft_with_its_own_score(scored, tmp_path, monkeypatch, command):
    flags = report_zip.main, "--name", scored, "--out", tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(course_report, "BROWSERS", ())
    monkeypatch.setattr(report_zip, "check_run", lambda *_: [])
    untrained(scored / "best.pt", **HELD_OUT)
    test = scored.parent.parent / "data/test/images"
    make_submission(scored / "best.pt", test, "test", scored / "submission-test.zip", "flip", run=0)
    assert "to hand in: fill in author" in command(*flags)[1]
    with zipfile.ZipFile(tmp_path / "report-zip.zip") as archive:
        page, readme = (archive.read(name).decode() for name in ("report.html", "Readme.txt"))
    stated = re.search(r"score\) is (\S+)</b>.*from the views flip, averaged", page, re.DOTALL)[1]
    assert stated == re.search("F-measure: (.*), the official score", readme)[1]
    views = "--views=flip", f"--data={test.parents[1]}", "--device=cpu"
    assert f"official score {stated} " in command(evaluate.main, f"--weights={scored}/best.pt", *views)[1]
    (scored / "report.html").write_text(page.replace(stated, "0.9999"))
    assert f"states 0.9999, but the masks handed in have {stated}" in command(*flags)[2]


@cases(("user", "count"), [(0, 1), (1000, 0)])
def test_chromium_keeps_its_sandbox(monkeypatch, user, count):
    monkeypatch.setattr("os.geteuid", lambda: user)
    monkeypatch.setattr(course_report.shutil, "which", lambda name: "echo")
    assert course_report.browse("x")[0].count("--no-sandbox") == count


def test_a_network_of_another_version_is_refused(tmp_path):
    with pytest.raises(UserError, match="check out its commit: .* 0000"):
        course_report.draft(write_run(tmp_path, "a", [0.5], parameters=1), None, None)


def test_a_pdf_of_the_user_is_replaced_only_if_asked(scored, monkeypatch):
    pytest.importorskip("pypdf")
    monkeypatch.setattr(course_report, "BROWSERS", ())
    (scored / "report.html").write_text("draft")
    ours = b"%PDF-1.4\n<</Title (Face parsing report)\n"
    for content, flag, error in (b"mine", False, "move it away"), (b"mine", True, "no Chr"), (ours, False, "no Chr"):
        (scored / "report.pdf").write_bytes(content)
        with pytest.raises(UserError, match=error):
            course_report.print_draft(scored, overwrite=flag)
        assert (scored / "report.pdf").read_bytes() == content
    (scored / "report.pdf").unlink()


@needs_browser
def test_the_draft_prints_on_few_pages(scored, monkeypatch):
    pytest.importorskip("pypdf")
    for flags in ([], ["--pdf"]):
        monkeypatch.setattr("sys.argv", ["", "--runs", str(scored.parent), "--name", "a", *flags, "--overwrite"])
        course_report.main()
    assert 2 <= course_report.print_draft(scored) <= 5  # our own is replaced
    monkeypatch.setattr(course_report, "BROWSERS", ())
    with pytest.raises(UserError, match="no Chromium.*a/report.html"):
        course_report.main()


LINES = {True: f"\r{'x' * 19}\r{'y' * 19}\r{' ' * 19}\r", False: f"{'x' * 50}\n"}


@cases("terminal", LINES)
def test_progress_lines_overwrite_a_terminal_and_are_one_a_minute_elsewhere(monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("common._printed", -1e9)
    monkeypatch.setattr("sys.stderr", stream)
    show_line("x" * 50, stream)
    show_line("y" * 50, stream)
    show_progress("predicting", 1, 1, 1)  # the last item clears the line
    assert stream.getvalue() == LINES[terminal]
