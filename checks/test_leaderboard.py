"""The leaderboard reads what runs left."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from errors import UserError
from leaderboard import leaderboard, make_line, markdown, recipe_table, summaries
from options import parse


def write_run(runs, name, scores, **args):
    (runs / name).mkdir(parents=True)
    args = {"lr": 1e-3, "dice": 1.5, "lmsa": True, "model": "microsegformer", "recipe": None, "sizes": "64:2", **args}
    (runs / name / "args.json").write_text(json.dumps({"args": args, "parameters": 1_747_923, "command": ["train.py"]}))
    lines = [
        {"epoch": i, "official": score, "batch32": score - 0.1, "minutes": i * 2.0, "labels": []}
        for i, score in enumerate(scores, 1)
    ]
    (runs / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_stand_by_their_best_score(tmp_path):
    write_run(tmp_path, "late", [0.5, 0.7, 0.6])
    write_run(tmp_path, "early", [0.8, 0.1], lmsa=False)
    write_run(tmp_path, "unscored", [])
    rows = leaderboard(summaries(tmp_path)).splitlines()[1:]
    assert [row.split()[:5] for row in rows] == [
        ["1", "early", "0.8000", "0.7000", "1/2"],
        ["2", "late", "0.7000", "0.6000", "2/3"],
    ]
    assert rows[0].split()[5:] == ["1,747,923", "1.0e-03", "1.5", "no", "4.0"]


def test_scores_on_drawn_faces_are_marked_and_stand_last(tmp_path):
    write_run(tmp_path, "drawn", [0.9])
    write_run(tmp_path, "real", [0.5])
    record = json.loads((tmp_path / "drawn/args.json").read_text()) | {"pairs": {"drawn": True}}
    (tmp_path / "drawn/args.json").write_text(json.dumps(record))
    first, last = leaderboard(summaries(tmp_path)).splitlines()[1:]
    assert "real" in first and "drawn faces" not in first and last.endswith("drawn faces")
    assert "| drawn, drawn faces |" in markdown(summaries(tmp_path))


def test_a_torn_last_line_is_passed_over(tmp_path):
    write_run(tmp_path, "a", [0.5])
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "offi')
    assert summaries(tmp_path)[0]["epochs"] == 1


def test_recipes_show_our_best_run_beside_the_reference(tmp_path):
    args = {key: value for key, value in vars(parse(["--recipe", "cpu"])[0]).items() if key not in ("name", "runs")}
    for name, score, changes in (("a", 0.7, {}), ("b", 0.75, {"seed": 7}), ("changed", 0.9, {"lr": 0.5})):
        write_run(tmp_path, name, [score], **args | changes)
    table = recipe_table({"cpu": {"reference": 0.6, "about": "one"}, "y": {}}, summaries(tmp_path))
    assert table.splitlines()[1].split() == ["cpu", "0.6000", "0.6500", "0.7500", "one"]
    assert table.splitlines()[2].split() == ["y", "-", "-", "-"]


def test_no_runs_folder_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="make train"):
        summaries(tmp_path / "none")


def test_the_make_line_says_what_differs_from_the_recipe():
    args, _ = parse(["--recipe", "lmsa_v1", "--name", "a", "--lr", "0.5", "--no-lmsa", "--data", "d"])
    line = make_line(vars(args))
    assert line == 'make train RECIPE=lmsa_v1 ARGS="--no-lmsa --lr 0.5"'
    again, _ = parse(["--recipe", "lmsa_v1", *shlex.split(shlex.split(line)[3].removeprefix("ARGS="))])
    assert make_line(vars(again)) == line
    line = make_line({"recipe": "search", "model_args": '{"attention": 0}'})
    assert shlex.split(shlex.split(line)[3].removeprefix("ARGS=")).count('{"attention": 0}') == 1
    assert make_line({"recipe": "gone", "lr": 0.5}) == 'make train ARGS="--lr 0.5"'


def test_the_experiments_show_the_runs_that_are_committed():
    listed = subprocess.run(["git", "ls-files", "runs"], capture_output=True, text=True).stdout
    committed = [row for row in summaries("runs") if f"runs/{row['name']}/args.json" in listed]
    assert markdown(committed) in Path("docs/experiments.md").read_text()
