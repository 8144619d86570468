"""Attacks from outside: renamed, edited, damaged and oversized files, and what is typed at a prompt."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from unittest.mock import Mock

from common import UserError

import pytest
import torch
from PIL import Image

import checkpoint
import evaluate
import options
import predict
import register
import train
from checks.conftest import FLAGS, cases, contents, encoded, full, set_up, write
from checks.references import TINY
from data import load_pairs
from images import read_image
from model import build
from tools import check_params, export, package, prepare, report
from tools import run as tools_run


def test_renamed_pairs_are_recognised(copy):
    content = checkpoint.load(copy / "runs/whole/best.pt")
    for kind in ("images", "masks"):  # each pair gets the name of the next
        paths = sorted((copy / "data/train" / kind).iterdir())
        for path, data in zip(paths, [p.read_bytes() for p in paths[1:] + paths[:1]], strict=True):
            path.write_bytes(data)
    pairs = load_pairs(copy / "data", copy / "cache")
    held = pairs.keys(evaluate.held_out(content, copy / "runs/whole/best.pt", pairs.keys()))
    assert [known for _, known in held] == [known for _, known in content["held_out"]]
    with pytest.raises(UserError, match="would be too high"):
        set_up(copy, f"--name=x --from=whole {FLAGS}")


def test_copies_of_a_pair_stay_on_one_side(copy, capsys):
    for path in list((copy / "data/train").rglob("*.*g")):
        shutil.copy(path, path.with_stem("copy-" + path.stem))
    run = set_up(copy, f"--name=twice {FLAGS}")
    trained, held = ({known for _, known in run.pair_keys[key]} for key in ("trained_on", "held_out"))
    assert not trained & held and len(trained | held) == 10 and "held out too" in capsys.readouterr().err


def test_unknown_provenance_is_reported(place, tmp_path, command):
    content = checkpoint.load(place / "runs/whole/best.pt")
    package.write_solution(tmp_path / "solution", content, "")
    assert checkpoint.doubt(checkpoint.load(tmp_path / "solution/ckpt.pth"), content["held_out"]) == ""
    checkpoint.save(tmp_path / "a.pt", content | {"trained_on": [], "held_out": []})
    flags = f"--weights={tmp_path}/a.pt", f"--data={place}/data", f"--cache={place}/cache", "--device=cpu"
    assert "does not name the pairs" in command(evaluate.main, *flags)[2]


ARGUMENTS = {"data": 5}, {"epochs": "9 epochs"}, {"lr": None}, {"lr": -1}, {"batch": {}}, {"model_args": [1]}


@cases("change", [{"args": 5}, {"pairs": 5}, {}, *ARGUMENTS, {"split_seed": 9}, {"lovasz": 1.0}])
def test_an_edited_record_or_one_of_settings_that_are_gone_is_one_line(copy, refused, change):
    path = copy / "runs/whole/args.json"
    record = json.loads(path.read_text())
    whole = change if change.keys() & record.keys() else {"args": record["args"] | change}
    path.write_text(json.dumps(record | whole if change else []))
    refused(train.main, *full(copy, "--resume=whole"))


@cases("text", ["[a]\nlike = 'b'\n[b]\nlike = 'a'", "[a]\nset = 5", "[a]\nlike = 5", "[a]\nreference = 'x'"])
def test_recipes_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, text):
    (tmp_path / "recipes.toml").write_text(text)
    monkeypatch.setattr(options, "RECIPES", tmp_path / "recipes.toml")
    with pytest.raises(UserError, match="recipes.toml: "):
        options.parse(["--recipe=a"])


@cases("flags", ["", " --from={}/runs/x/last.pt", " --overwrite"])
def test_a_folder_that_is_no_run_keeps_its_files(copy, flags):
    write({"last.pt": (copy / "runs/whole/last.pt").read_bytes(), "report.docx": b""}, copy / "runs/x")
    before = contents(copy / "runs/x")
    with pytest.raises(UserError, match="is not a run"):
        set_up(copy, f"--name=x {FLAGS}" + flags.format(copy))
    assert contents(copy / "runs/x") == before


def test_a_run_is_replaced_once_the_new_one_is_written(copy, monkeypatch):
    folder = copy / "runs/whole"
    before = contents(write({"report.docx": b"mine", "notes.json": b"mine", ".notes.a1b2c3d4.tmp": b"mine"}, folder))
    with monkeypatch.context() as context, pytest.raises(UserError, match="full"):
        context.setattr("train.write_metrics", Mock(side_effect=UserError("full")))
        set_up(copy, f"--name=whole --overwrite {FLAGS}")
    assert contents(folder) == before
    mine = {"report.docx", "notes.json", ".notes.a1b2c3d4.tmp"}
    for killed in (False, True):
        if killed:  # while the new files replaced the old ones
            (folder / ".args.json.a1b2c3d4.tmp").mkdir()
            (folder / "args.json").rename(folder / ".args.json.a1b2c3d4.tmp/args.json")
        register._locks.clear()
        set_up(copy, f"--name=whole --overwrite --seed=1 {FLAGS}")
        assert {path.name for path in folder.iterdir()} == {".lock", "args.json", "metrics.jsonl", "last.pt"} | mine


def test_the_cache_and_a_lock_keep_other_files(copy):
    (copy / "cache/notes.tmp").write_text("mine")
    load_pairs(copy / "data", copy / "cache").path.unlink()
    load_pairs(copy / "data", copy / "cache")
    (copy / "runs/whole/.lock").unlink()
    (copy / "runs/whole/.lock").symlink_to(copy / "cache/notes.tmp")
    register.lock(copy / "runs/whole")
    assert (copy / "cache/notes.tmp").read_text() == "mine"


@cases("name", ["x.png", "x-overlay.png", "x-cutout.png", "x.json"])
def test_predictions_replace_only_predictions(copy, command, name):
    Image.new("RGB", (64, 48)).save(copy / "x.jpg")
    mine = b'{"image": "x.jpg", "caption": "mine"}' if name == "x.json" else encoded(Image.new("RGB", (64, 48)))
    before = contents(write({name: mine}, copy / "photos"))
    flags = f"--input={copy}/x.jpg --weights={copy}/runs/whole/best.pt --whole --overlay --cutout=hair --json".split()
    outs = [command(predict.main, *flags, f"--output={copy}/{out}")[0] for out in ("o", "o", "photos")]
    assert outs == [0, 0, 2] and contents(copy / "photos") == before
    before = contents(write(before, copy / "o"))  # beside predictions
    assert command(predict.main, *flags, f"--output={copy}/o")[0] == 2 and contents(copy / "o") == before


def test_other_files_are_not_replaced(copy, monkeypatch, refused):
    weights, photo, data = copy / "runs/whole/last.pt", copy / "data/test/images/test_00000.jpg", copy / "data/train"
    page = write({"index.html": b"mine"}, copy / "runs") / "index.html"
    write({"photos/a.png": encoded(Image.new("RGB", (64, 48))), "photos/notes": b"about pytorch"}, copy)
    before, own = contents(copy / "data") | contents(copy / "photos"), weights.read_bytes()
    monkeypatch.setattr(export, "PACKAGES", ())
    for main, *flags in [
        (package.main, f"--data={copy}/data", f"--zip={weights}", "--run=0"),
        *((export.main, f"--out={path}") for path in (photo, copy / "photos/notes")),
        (tools_run.main, f"--input={photo}", f"--output={photo}"),
        *((main, f"--input={data}/images", f"--output={data}/masks") for main in (predict.main, tools_run.main)),
        *((main, f"--input={copy}/photos", f"--output={copy}/photos") for main in (predict.main, tools_run.main)),
    ]:
        refused(main, f"--weights={weights}", *flags)
    assert "move it away" in refused(report.main, f"--runs={copy}/runs", "--device=cpu")
    assert contents(copy / "data") | contents(copy / "photos") == before
    assert (weights.read_bytes(), page.read_bytes()) == (own, b"mine")


class Code:
    def __reduce__(self):
        return open, ("created", "w")


NETWORKS = [
    *[{"depths": [10**6] * 5}, {"depths": [0, 0, 0, 10**7, 0]}, {"attention": 10**9}, {"widths": [10**6] * 5}],
    *[{"dilations": [0]}, {"dilations": [10**9]}, {"dropout": float("nan")}, {"decoder": [9]}, {"wings": 2}],
]
ALTERED = {
    "another kind": [{"size": 65}, {"state_dict": {"a": 1}}, {"model_args": {5: 1}}],
    "is damaged": [{"extra": Code()}],
    "unknown network": [{"model": "other"}],
    "claims more values": [{"state_dict": {"x": torch.zeros(1).expand(10**12)}}],
    "not fit this network": [{"state_dict": {}}],
    "not finite": [{"state_dict": {k: v / 0 for k, v in build("microunet", **TINY).state_dict().items()}}],
    "not fit this version": [{"model_args": TINY | change} for change in NETWORKS],
}


@cases(("error", "change"), [(error, change) for error, changes in ALTERED.items() for change in changes])
def test_altered_checkpoints_are_refused_at_once(place, tmp_path, monkeypatch, error, change):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint.load(place / "runs/whole/best.pt") | change, "a.pt")
    signal.signal(signal.SIGALRM, Mock(side_effect=TimeoutError))
    signal.alarm(20)
    with pytest.raises(UserError, match=error):
        checkpoint.load_model("a.pt")
    signal.alarm(0)
    assert os.listdir() == ["a.pt"]  # no code has run


def test_a_picture_starts_no_program_a_pipe_is_none_and_a_file_of_zeros_takes_no_memory(tmp_path, monkeypatch):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    write({"a.jpg": postscript, "gs": f"#!/bin/sh\ntouch {tmp_path}/started".encode()}, tmp_path)
    (tmp_path / "gs").chmod(0o755)
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").touch()
    os.truncate(tmp_path / "c.jpg", 3 << 30)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    tracemalloc.start()
    for name, error in ("a.jpg", "cannot read"), ("b.jpg", "not a file"), ("c.jpg", "64 MiB"):
        with pytest.raises(UserError, match=error):
            prepare.read(tmp_path, name)
        assert prepare.inspect(tmp_path / name)[0][0].startswith("cannot read") and not (tmp_path / "started").exists()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    write({"d.png": encoded(Image.new("RGB", (10, 10)))}, tmp_path)
    with pytest.raises(UserError, match="more than 0 megapixels"), pytest.warns(Image.DecompressionBombWarning):
        read_image(tmp_path / "d.png")
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


def test_scores_and_counts_are_of_what_was_asked(copy, command, refused):
    name = checkpoint.load(copy / "runs/whole/best.pt")["held_out"][0][0]
    flags = f"--weights={copy}/runs/whole", f"--data={copy}/data", f"--cache={copy}/cache", "--device=cpu"
    assert command(evaluate.main, *flags, "--record")[0] == 0
    assert "error: --record is for" in command(evaluate.main, *flags, "--record", "--size=64")[2]
    for path in (copy / "data/train").glob(f"*/{name}.*"):
        path.unlink()
    shutil.copy(copy / "runs/whole/best.pt", copy / "runs/whole/validated.pt")
    said = command(evaluate.main, *flags)[2]
    assert "1 of the 3 pairs held out" in said and "whole/validated.pt" in said  # the weights that have its scores
    refused(evaluate.main, *flags, "--batch=-4")
    assert "error: --record is for" in command(evaluate.main, *flags, "--record")[2]  # other pairs than the run's
    masks = f"--masks={copy}/data/train/masks", f"--truth={copy}/data/train/masks"
    assert "two folders" in refused(evaluate.main, masks[0])
    assert command(evaluate.main, *masks)[0] == 0 and "--views" in refused(evaluate.main, *masks, "--views=flip")
    refused(check_params.main, "--name=whole", f"--runs={copy}/runs", "--lr=1")
    for arguments in '{"dropout": 0.9}', "[1]", "{":
        with pytest.raises(UserError, match="--model-args"):
            options.parse([f"--model-args={arguments}"])


def test_a_record_names_the_places_of_a_resumed_run(copy):
    path = copy / "runs/whole/args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device_name": "A40"}))
    set_up(copy, "--resume=whole")
    assert json.loads(path.read_text())["device_name"] == f"A40 then {train.device_name(torch.device('cpu'))}"


@cases("change", [{"views": 5}, {"progress": {"epoch": 1.5}}, {"progress": {"seconds": "x"}}])
def test_edited_weights_are_one_line(copy, refused, change):
    source = copy / "runs/whole/last.pt"
    torch.save(checkpoint.load(source) | change, source)
    call = [tools_run.main, f"--input={copy}/data/test/images", f"--output={copy}/out", f"--weights={source}"]
    refused(*[train.main, *full(copy, "--resume=whole")] if "progress" in change else call)


def test_the_environment_of_others_changes_nothing(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    git = ["git", "-C", tmp_path, "-c", "user.email=a", "-c", "user.name=a"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    env = os.environ | {"RANK": "1", "PYTHONIOENCODING": "ascii", "GIT_DIR": f"{tmp_path}/.git"}
    code = "import common, train\ndef main():\n common.print_message(train.environment()['commit'] + '\xf6')\n"
    code += " raise common.UserError('no such \xf6')\ncommon.run_main(main)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (2, b"warning: unknown\\xf6\nerror: no such \\xf6\n")
