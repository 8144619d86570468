"""The course report's draft: its figures are the run's, its tables add up, it prints on five pages at most."""

import dataclasses
import json
import re

import pytest
import torch

import report
import report_pdf
from ablations import ablations
from checks.test_report import BROWSER, write_run
from course_report import write_draft
from diagram import diagram, parts
from errors import UserError
from model import build
from parameters import count_parameters
from records import read_run, read_runs
from report_zip import MAX_PAGES, count_pages, printed_report

NETWORKS = [
    ("microsegformer", {}),
    ("microsegformer", {"lmsa": False}),
    ("microunet", {}),
    ("microunet", {"lmsa": (0, 2), "attention": 0, "coordinates": False}),
]


@pytest.mark.parametrize(("name", "arguments"), NETWORKS)
def test_parts_are_those_of_the_network(name, arguments):
    model = build(name, **arguments)
    found = parts(model)
    assert sum(part.parameters for part in found) == count_parameters(model)
    assert "other" not in {part.name for part in found}
    # Channels and strides as data flows through the stages.
    shapes = []
    stages = [*model.encoder, *model.decoder] if name == "microunet" else model.embeddings
    for stage in stages:
        stage.register_forward_hook(lambda module, args, out: shapes.append((out.shape[1], 64 // out.shape[2])))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 64, 64))
    told = [(p.channels, p.stride) for p in found if p.name.split()[0] in ("encoder", "decoder", "stage")]
    assert told[: len(shapes)] == shapes
    for part in found:
        assert part.name in diagram(model) or part.name == "total"


@pytest.fixture
def runs(tmp_path):
    flags = ("--model", "microunet", "--patience", "0")
    for name, scores, *more in (
        ("base", [0.1, 0.70]),
        ("seed", [0.1, 0.72], "--seed", "7"),
        ("dice", [0.1, 0.75], "--dice", "2"),
        ("lr", [0.1, 0.60], "--lr", "0.1"),
        ("both", [0.1, 0.65], "--dice", "2", "--lr", "0.1"),
        ("long", [0.1, 0.2, 0.9], "--lr", "0.1"),
    ):
        folder = write_run(tmp_path, name, scores, *flags, *more)
        record = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(record | {"parameters": 1_758_835}))
    return tmp_path


def test_ablations_compare_runs_of_one_budget_with_seeds_as_one(runs):
    scored, _, _ = read_runs(runs)
    for name in ("dice", "long"):  # that one stands alone in its budget, so it gets the others'
        base, rows = ablations(read_run(runs / name), scored)
        assert sorted(run.name for run in base) == ["base", "seed"]
        assert [(change, [run.name for run in members]) for change, members in rows] == [
            ({"dice": 2.0}, ["dice"]), ({"dice": 2.0, "lr": 0.1}, ["both"]), ({"lr": 0.1}, ["lr"]),
        ]  # fmt: skip


def test_the_drafts_figures_are_the_runs(runs):
    scored, _, _ = read_runs(runs)
    run = read_run(runs / "dice")
    html = write_draft(run, scored, "A & B", "A12345678B").read_text()
    assert "<b>0.7500</b>validation F-measure" in html and "<b>1,758,835</b>parameters" in html
    assert "A &amp; B · A12345678B" in html
    plain = [re.sub(r"<[^>]*>", "|", row) for row in re.findall(r"<tr>.*?</tr>", html)]
    cells = {tuple(filter(None, row.split("|"))) for row in plain}
    assert ("the base", "2", "0.7100", "1,758,835") in cells
    assert ("dice 2.0", "1", "0.7500", "+0.0400", "1,758,835") in cells
    assert ("encoder 4", "3×3 conv, stride 2; 4 residual blocks", "96", "1/16", "739,488", "42.0%") in cells
    assert ("skin", str(run.best["images_with_label"][1]), f"{run.best['labels'][1]:.3f}") in cells
    assert "1 × cross-entropy + 2 × Dice loss" in html and "learning rate 0.0008" in html


def test_an_edited_draft_is_not_replaced_unawares(runs):
    run = read_run(runs / "dice")
    path = write_draft(run, [run], None, None)
    write_draft(run, [run], "Ada", None)
    path.write_text(path.read_text().replace("Ada", "Ada Lovelace"))
    with pytest.raises(UserError, match="has been edited"):
        write_draft(run, [run], "Ada", None)
    assert "Lovelace" in path.read_text()
    write_draft(run, [run], "Ada", None, overwrite=True)
    assert "Lovelace" not in path.read_text()


def test_drawn_faces_and_weights_beyond_the_records_are_told(runs):
    run = read_run(runs / "dice")
    drawn = dataclasses.replace(run, record={**run.record, "pairs": {"drawn": True}})
    content = {"model": "microunet", "model_args": {}, "size": 64, "state_dict": {}, "official": None}
    torch.save(content, run.folder / "best.pt")
    html = write_draft(drawn, [run], None, None).read_text()
    assert "faces drawn by synth.py" in html and "same training on all pairs" in html
    assert "No two finished runs" in html  # the others' faces are real


def test_another_students_report_is_refused(runs):
    run = read_run(runs / "dice")
    write_draft(run, [run], None, "A12345678B")
    (run.folder / "report.pdf").touch()
    assert printed_report(run.folder, "A12345678B")
    with pytest.raises(UserError, match="names A12345678B, not B12345678C"):
        printed_report(run.folder, "B12345678C")


def test_a_network_of_another_version_is_refused(runs):
    run = read_run(runs / "dice")
    other = dataclasses.replace(run, record={**run.record, "parameters": 1})
    with pytest.raises(UserError, match="check out its commit 000000000000"):
        write_draft(other, [run], None, None)


def call(monkeypatch, module, *flags):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, flags)])
    return module.main()


def test_without_a_browser_it_says_how_to_print(runs, monkeypatch):
    monkeypatch.setattr(report_pdf, "BROWSERS", ("no-such-browser",))
    call(monkeypatch, report, "--runs", runs, "--name", "dice")
    with pytest.raises(UserError, match=r"open .*dice/report.html in a browser and print it to .*report.pdf"):
        call(monkeypatch, report_pdf, "--runs", runs, "--name", "dice")
    with pytest.raises(UserError, match=f"no .*base/report.html; `make report NAME={runs}/base AUTHOR"):
        call(monkeypatch, report_pdf, "--runs", runs, "--name", "base")


@pytest.mark.skipif(not BROWSER, reason="no Chromium")
def test_it_prints_on_few_pages_and_the_zip_takes_the_fresh_print(runs, monkeypatch):
    folder = runs / "dice"
    with pytest.raises(UserError, match="no .*report.pdf"):
        printed_report(folder)
    call(monkeypatch, report, "--runs", runs, "--name", "dice")
    call(monkeypatch, report_pdf, "--runs", runs, "--name", "dice")
    assert 2 <= count_pages(printed_report(folder)) <= MAX_PAGES
    draft = folder / "report.html"
    draft.write_text(draft.read_text().replace("</body>", "<p style='height: 3000mm'>long</p></body>"))
    with pytest.raises(UserError, match="newer than .*report.pdf"):
        printed_report(folder)
    with pytest.raises(UserError, match=r"has \d+ pages, 5 are allowed"):
        call(monkeypatch, report_pdf, "--runs", runs, "--name", "dice")
