"""Attacks from outside: renamed, edited, damaged and oversized files, and what is typed at a prompt."""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import UserError, run_main

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import evaluate
import options
import predict
import register
import train
from checks.test_data_tools import LABELS, challenge, encoded, jpeg, run_prepare, write
from checks.test_report import save_weights, write_run
from checks.test_serve import ask
from checks.test_submission import saved
from checks.test_train import full, set_up, train_here
from data import find_pairs, load_pairs
from images import mask_image, read_mask
from tools import check_params as params
from tools import check_submission, course_report, export, package, prepare, report, serve
from tools import run as tools_run
from tools.synth import make_dataset

TINY = {"widths": [4, 4, 8, 8, 8], "depths": [0, 1, 1, 1, 1], "decoder": [4, 4, 8, 8]}
FLAGS = (
    f"--model=microunet --model-args={json.dumps(TINY, separators=(',', ':'))} --sizes=32:1 --batch=2 --val-split=.3"
)
cases = pytest.mark.parametrize


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/, ten pairs, and a finished training runs/whole."""
    root = tmp_path_factory.mktemp("attacks")
    make_dataset(root / "data", train=10, dev=1, test=1, workers=1)
    train_here(root, f"--name=whole {FLAGS}")
    return root


@pytest.fixture
def copy(place, tmp_path):
    """A copy of `place` to attack."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    return tmp_path


def command(main, *flags):
    """Exit status of a script's main with these flags."""
    sys.argv = ["script", *map(str, flags)]
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return ended.value.code or 0


def raiser(error):
    def fail(*_, **__):
        raise error

    return fail


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(path, **changes):
    """Change the arguments in an args.json."""
    record = json.loads(path.read_text())
    record["args"] |= changes
    path.write_text(json.dumps(record))


def rotate(data):
    """Give each pair the name of the next."""
    for kind in ("images", "masks"):
        paths = sorted((data / "train" / kind).iterdir())
        for path, content in zip(paths, [p.read_bytes() for p in paths[1:] + paths[:1]], strict=True):
            path.write_bytes(content)


def test_renamed_pairs_are_recognised(copy):
    content = checkpoint.load(copy / "runs/whole/best.pt")
    rotate(copy / "data")
    pairs = load_pairs(copy / "data", copy / "cache")
    held = pairs.keys(evaluate.held_out(content, copy / "runs/whole/best.pt", pairs.keys()))
    assert [known for _, known in held] == [known for _, known in content["held_out"]]
    with pytest.raises(UserError, match="would be too high"):
        set_up(copy, f"--name=x --from=whole {FLAGS}")


def test_copies_of_a_pair_stay_on_one_side(copy, capsys):
    for path in list((copy / "data/train").rglob("*.*g")):
        shutil.copy(path, path.with_stem("copy-" + path.stem))
    run = set_up(copy, f"--name=twice {FLAGS}")
    trained, held = ({known for _, known in run.names[key]} for key in ("trained_on", "held_out"))
    assert not trained & held and len(trained | held) == 10 and "held out too" in capsys.readouterr().err


@cases("change", ["unnamed", "names", "submitted"])
def test_unknown_provenance_is_reported(place, tmp_path, capsys, change):
    content = checkpoint.load(place / "runs/whole/best.pt")
    if change == "submitted":
        package.write_solution(tmp_path / "solution", content, "")
        assert checkpoint.doubt(checkpoint.load(tmp_path / "solution/ckpt.pth"), content["held_out"]) == ""
    for key in ("trained_on", "held_out"):
        content[key] = [name for name, _ in content[key]] if change == "names" else []
    checkpoint.save(tmp_path / "a.pt", content)
    command(evaluate.main, *f"--weights={tmp_path}/a.pt --data={place}/data --cache={place}/cache --device=cpu".split())
    assert {"names": "without hashes"}.get(change, "does not name the pairs") in capsys.readouterr().err


@cases("kind", ["images", "masks"])
def test_two_files_of_one_name_are_refused(copy, kind):
    path = min((copy / "data/train" / kind).iterdir())
    shutil.copy(path, path.with_suffix(".webp"))
    with pytest.raises(UserError, match="share a partner"):
        load_pairs(copy / "data", copy / "cache")
    assert "name of another file" in prepare.audit(copy / "data", workers=1)


MASKS = {  # image, palette, error
    "optimised": (mask_image(LABELS).remap_palette([18, *range(18)]), None, None),
    "black": (mask_image(LABELS), [0] * 57, None),
    "grey": (mask_image(LABELS), [value for value in range(256) for _ in range(3)], None),
    "foreign": (mask_image(LABELS), [0, 0, 0, 128, 0, 0, 0, 128, 0, *[9] * 48], "colours of no label"),
    "ignore": (mask_image(np.where(LABELS == 3, 255, LABELS).astype(np.uint8)), None, "255.*leave out the pair"),
}


@cases("mask", MASKS)
def test_masks_are_read_by_their_palette(tmp_path, mask):
    image, palette, error = MASKS[mask]
    if palette:
        image.putpalette(palette)
    path = write({"train/masks/a.png": encoded(image)}, tmp_path) / "train/masks/a.png"
    faults = prepare.inspect(path)[0]
    if error:
        with pytest.raises(UserError, match=error):
            read_mask(path)
        assert faults[0].startswith("file contains ")
    else:
        assert np.array_equal(read_mask(path), LABELS) and faults == ["not 512 x 512"]


TURNED = Image.Exif()
TURNED[0x0112] = 3
SHAPES = [((40, 30), (30, 40), {}), ((64, 64), (64, 32), {}), ((32, 32), (32, 32), {"exif": TURNED})]


@cases(("size", "mask_size", "more"), SHAPES)
def test_a_mask_of_another_shape_is_refused(tmp_path, size, mask_size, more):
    write({"raw/train/masks/a.png": encoded(Image.new("L", mask_size)), "raw/train/images/a.jpg": b""}, tmp_path)
    Image.new("RGB", size).save(tmp_path / "raw/train/images/a.jpg", **more)
    with pytest.raises(UserError, match="EXIF orientation" if more else "not the same picture"):
        run_prepare(tmp_path / "raw", tmp_path / "out")


def test_a_turned_training_image_is_refused(copy):
    path = find_pairs(copy / "data")[0][0]
    Image.open(path).save(path, exif=TURNED)
    with pytest.raises(UserError, match="EXIF orientation"):
        load_pairs(copy / "data", copy / "cache", workers=1)
    assert prepare.audit(copy / "data", workers=1)["EXIF orientation"] == [path]


@cases("raw", ["folder", "raw.zip"])
def test_data_of_another_raw_is_refused(tmp_path, raw):
    run_prepare(write(challenge(), tmp_path / raw), tmp_path / "out")
    assert run_prepare(tmp_path / raw, tmp_path / "out") == 0
    write(challenge() | {"train/images/b.jpg": jpeg(7)}, tmp_path / raw)
    with pytest.raises(UserError, match="another RAW"):
        run_prepare(tmp_path / raw, tmp_path / "out")


EDITS = [
    *[("epochs", "9 epochs"), ("lr", None), ("lr", True), ("lr", [1]), ("batch", {}), ("seed", "x"), ("schedule", 1)],
    *[("model_args", [1]), ("augment", None), ("lmsa", "maybe"), ("split_seed", 9), ("amp", {}), ("flip", "often")],
]


@cases(("key", "value"), EDITS)
def test_an_edited_record_is_one_line(copy, capsys, key, value):
    edit(copy / "runs/whole/args.json", **{key: value})
    assert command(train.main, *full(copy, "--resume=whole")) == 2 and capsys.readouterr().err.count("\n") == 1


@cases("text", ["[a]\nlike = 'b'\n[b]\nlike = 'a'", "[a]\nset = 5", "[a]\nlike = 5", "[a]\nreference = 'x'"])
def test_recipes_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, text):
    (tmp_path / "recipes.toml").write_text(text)
    monkeypatch.setattr(options, "RECIPES", tmp_path / "recipes.toml")
    with pytest.raises(UserError, match="recipes.toml: "):
        options.parse(["--recipe=a"])


@cases("start", [0, 10 * 3 * 512**2, 10 * 4 * 512**2])  # an image, a mask, a flag
def test_a_damaged_cache_is_not_trusted(copy, start):
    whole = np.memmap(min((copy / "cache").iterdir()), np.uint8, "r+")
    whole[start] ^= 1
    whole.flush()
    with pytest.raises(UserError, match="is damaged; delete it"):
        load_pairs(copy / "data", copy / "cache").batch(np.arange(10))


@cases(("period", "end"), [(10, 10), (10, 30), (0.7, 2.1)])
def test_the_last_step_of_a_warm_restart_takes_no_rate(period, end):
    flags = "--schedule=restarts", "--warmup=0", f"--restart-period={period}", "--restart-growth=1"
    args = options.parse(flags)[0]
    last, first = (train.learning_rate(args, [(64, 31)], end + step) / args.lr for step in (0, 0.01))
    assert last < 1e-6 and first > 0.99


def test_some_masks_of_the_truth_are_not_its_score(tmp_path, capsys):
    write(dict.fromkeys(("true/a.png", "true/b.png", "pred/a.png"), encoded(mask_image(LABELS))), tmp_path)
    for flags, status in (([], 2), (["--partial"], 0)):
        assert command(evaluate.main, f"--masks={tmp_path}/pred", f"--truth={tmp_path}/true", *flags) == status
        assert "1 of the 2 masks" in capsys.readouterr().err


@cases("flags", ["", " --from={}/runs/x/last.pt", " --overwrite"])
def test_a_folder_that_is_no_run_keeps_its_files(copy, flags):
    write({"last.pt": (copy / "runs/whole/last.pt").read_bytes(), "report.docx": b""}, copy / "runs/x")
    before = contents(copy / "runs/x")
    with pytest.raises(UserError, match="is no run"):
        set_up(copy, f"--name=x {FLAGS}" + flags.format(copy))
    assert contents(copy / "runs/x") == before | {".lock": b""}


def test_a_run_is_replaced_once_the_new_one_is_written(copy, monkeypatch):
    folder = copy / "runs/whole"
    before = contents(write({"report.docx": b"mine", "notes.json": b"mine", ".notes.a1b2c3d4.tmp": b"mine"}, folder))
    with monkeypatch.context() as context, pytest.raises(UserError, match="full"):
        context.setattr("train.write_metrics", raiser(UserError("full")))
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


def test_a_release_that_fails_keeps_the_old_one(copy, monkeypatch):
    monkeypatch.setattr(register, "RELEASE", copy / "release")
    export.write_release(copy / "runs/whole/best.pt", copy / "runs/whole")
    before = contents(copy / "release")
    (copy / "runs/whole/args.json").write_text("{}")
    monkeypatch.setattr(export, "write_text", raiser(UserError("full")))
    with pytest.raises(UserError, match="full"):
        export.write_release(copy / "runs/whole/best.pt", copy / "runs/whole", overwrite=True)
    assert contents(copy / "release") == before


def test_the_cache_keeps_other_files_and_a_lock_is_no_link(copy):
    (copy / "cache/notes.tmp").write_text("mine")
    rotate(copy / "data")
    load_pairs(copy / "data", copy / "cache", workers=1)
    (copy / "runs/whole/.lock").unlink()
    (copy / "runs/whole/.lock").symlink_to(copy / "cache/notes.tmp")
    with pytest.raises(OSError, match=".lock"):
        register.lock(copy / "runs/whole")
    assert (copy / "cache/notes.tmp").read_text() == "mine"


@cases("name", ["x.png", "x-overlay.png", "x-cutout.png", "x.json"])
def test_predictions_replace_only_predictions(copy, name):
    Image.new("RGB", (64, 48)).save(copy / "x.jpg")
    before = contents(write({name: encoded(Image.new("RGB", (64, 48)))}, copy / "photos"))
    flags = f"--input={copy}/x.jpg --weights={copy}/runs/whole/best.pt --whole --overlay --cutout=hair --json".split()
    assert [command(predict.main, *flags, f"--output={copy}/{out}") for out in ("o", "o", "photos")] == [0, 0, 2]
    assert contents(copy / "photos") == before


def test_other_files_are_not_replaced(copy, monkeypatch):
    weights, photo = copy / "runs/whole/last.pt", copy / "data/test/images/test_00000.jpg"
    before = weights.read_bytes(), photo.read_bytes()
    assert command(package.main, f"--weights={weights}", f"--data={copy}/data", f"--zip={weights}", "--run=0") == 2
    assert command(tools_run.main, f"--input={photo}", f"--output={photo}", f"--weights={weights}") == 2
    monkeypatch.setattr(export, "PACKAGES", ())
    assert command(export.main, f"--name={weights}", f"--out={photo}") == 2
    (copy / "runs/index.html").write_text("mine")
    assert command(report.main, f"--runs={copy}/runs", "--device=cpu") == 2
    assert (weights.read_bytes(), photo.read_bytes()) == before and (copy / "runs/index.html").read_text() == "mine"


def test_clean_removes_only_an_environment(tmp_path):
    write({"docs/a": b"", "venv/.ready": b"", "venv/pyvenv.cfg": b"", "mine/.ready": b""}, tmp_path)
    for value, status in (("docs venv", 2), ("mine", 0), ("venv", 0)):
        clean = ["make", "-C", tmp_path, "-f", Path("Makefile").resolve(), "clean", f"VENV={value}"]
        assert subprocess.run(clean).returncode == status
    assert {path.name for path in tmp_path.iterdir()} == {"docs", "mine"}


SCRIPT = "<script>alert(1)</script>"


@cases("key", ["split_seed", "val_split"])
def test_a_record_is_text_in_the_course_report(tmp_path, key):
    folder = write_run(tmp_path, "a", [0.5])
    edit(folder / "args.json", **{key: SCRIPT})
    with contextlib.suppress(UserError):
        assert SCRIPT not in course_report.draft(folder, SCRIPT, SCRIPT)


@cases("change", [{"reversed": SCRIPT}, {"images": "3"}, {"panels": ["http://x/a.png"] * 4}, {"score": []}])
def test_edited_pictures_are_not_shown(tmp_path, change):
    folder = write_run(tmp_path, "a", [0.5])
    save_weights(folder)
    picture = {"group": "", "name": "", "score": 0.5, "lowest": [["nose", 0.1]], "panels": ["data:image/png;,"] * 4}
    content = {"version": report.weights_version(folder), "images": 1, "reversed": 0, "score_without_reversed": 0.5}
    for changed in ({}, change):
        (folder / "pictures.json").write_text(json.dumps(content | {"pictures": [picture | changed]} | changed))
        assert bool(report.read_pictures(folder)) == (not changed)


def test_both_pages_run_their_own_scripts_and_load_nothing(tmp_path):
    folder = write_run(tmp_path, "a", [0.5])
    for page in (course_report.draft(folder, None, None), report.write_page(tmp_path).read_text()):
        scripts = re.findall(r"<script(?! type)[^>]*>(.*?)</script>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
        policy = re.search('<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)[1]
        assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy
        assert len(scripts) == 2 and all(f"'sha256-{value}'" in policy for value in hashes)


@cases(("user", "count"), [(0, 1), (1000, 0)])
def test_chromium_keeps_its_sandbox(monkeypatch, user, count):
    monkeypatch.setattr("os.geteuid", lambda: user)
    monkeypatch.setattr(course_report.shutil, "which", lambda name: "echo")
    assert course_report.browse("x")[0].count("--no-sandbox") == count


LINE = dict(epoch=1, lr=1, loss=1, official=0.5, batch32=0.5, minutes=int("9" * 400))
DAMAGES = [
    *[("args.json", "[" * 100_000), ("metrics.jsonl", "[" * 100_000), ("best.json", "[" * 100_000)],
    ("metrics.jsonl", json.dumps(LINE)),
    ("args.json", json.dumps({"args": vars(options.parse([])[0]), "pairs": {"validation": [1]}})),
]


@cases(("name", "content"), DAMAGES)
def test_one_damaged_run_does_not_stop_the_others(tmp_path, capsys, name, content):
    write_run(tmp_path, "sound", [0.5])
    (write_run(tmp_path, "bad", [0.6]) / name).write_text(content)
    assert command(report.main, "--table", f"--runs={tmp_path}") == 0 and "sound" in capsys.readouterr().out
    report.write_page(tmp_path)
    assert register.best_score(tmp_path / "bad") <= 0.6
    assert command(train.main, f"--runs={tmp_path}", "--resume=bad", f"--data={tmp_path}/none") == 2


def test_names_and_settings_reach_the_terminal_as_text(tmp_path, capsys):
    edit(write_run(tmp_path, "a\x1b[31m\nb", [0.5]) / "args.json", recipe="x\x1b]0;\x07")
    assert command(report.main, "--table", f"--runs={tmp_path}") == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07"} & set(out) and len(out.split("\n\n")[0].splitlines()) == 3  # title, head, run


BOMBS = [
    *[{"depths": [10**6] * 5}, {"depths": [0, 0, 0, 10**7, 0]}, {"attention": 10**9}, {"widths": [10**6] * 5}],
    *[{"dilations": [0]}, {"dilations": [10**9]}, {"dropout": float("nan")}],
]


@cases("arguments", BOMBS)
def test_networks_are_counted_before_they_are_built(place, tmp_path, arguments):
    checkpoint.save(tmp_path / "a.pt", checkpoint.load(place / "runs/whole/best.pt") | {"model_args": TINY | arguments})
    signal.signal(signal.SIGALRM, raiser(TimeoutError()))
    signal.alarm(20)
    with pytest.raises(UserError, match="does not fit this version"):
        checkpoint.load_model(tmp_path / "a.pt")
    signal.alarm(0)


def test_tensors_of_stride_0_are_refused(place, tmp_path):
    content = checkpoint.load(place / "runs/whole/best.pt")
    content["state_dict"]["x"] = torch.zeros(1).expand(10**12)
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="claims more values"):
        checkpoint.load(tmp_path / "a.pt")


def test_a_file_of_zeros_takes_no_memory(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(3 << 30)
    tracemalloc.start()
    with pytest.raises(UserError, match="more than 64 MiB"):
        prepare.read(tmp_path, "a.jpg")
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


def test_pictures_are_decoded_one_at_a_time(monkeypatch):
    running, most = [], []

    def decode(*_):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        raise UserError("no picture")

    monkeypatch.setattr(serve, "decode_picture", decode)
    with serve.make_server(None, 0) as server, ThreadPoolExecutor(50) as pool:
        assert server.request_queue_size >= 50
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answers = list(pool.map(lambda _: ask(server, body=b"x")[0], range(50)))
        server.shutdown()
    assert answers == [415] * 50 and max(most) == 1


STATE, MANY = {"w": torch.zeros(1_000_000)}, torch.zeros(5_000_000)
HIDDEN = [
    *[{"state_dict": STATE | {"w.running_mean": tensor}} for tensor in (MANY, MANY.view(5000, 1000))],
    *[{"state_dict": STATE, "more": [{"x": MANY}]}, {"state_dict": STATE, "more": [0.5] * 1_000_000}],
    *[{"state_dict": STATE, "solution/more.pth": saved(MANY)}, {"state_dict": STATE, "solution/a.py": b"1" * 2**22}],
]


@cases("content", HIDDEN)
def test_every_parameter_is_counted(content):
    files = {name: value for name, value in content.items() if "/" in name}
    files["solution/ckpt.pth"] = saved({key: value for key, value in content.items() if "/" not in key})
    verdicts = {check: (status, detail) for status, check, detail in check_submission.check_solution(files)}
    assert verdicts["checkpoint"][0] == "FAIL" and "parameters" in verdicts["checkpoint"][1]


@cases("script", [predict.main, tools_run.main])
@cases(("source", "out"), [("data/train/images", "data/train/masks"), ("photos", "photos")])
def test_true_masks_and_photos_are_not_replaced(copy, script, source, out):
    write({"photos/a.png": encoded(Image.new("RGB", (64, 48)))}, copy)
    before = contents(copy / out)
    flags = f"--input={copy}/{source}", f"--output={copy}/{out}", f"--weights={copy}/runs/whole/best.pt"
    assert command(script, *flags) == 2 and contents(copy / out) == before


def test_a_picture_starts_no_program_and_a_pipe_is_none(tmp_path, monkeypatch):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    write({"a.jpg": postscript, "gs": f"#!/bin/sh\ntouch {tmp_path}/started".encode()}, tmp_path)
    (tmp_path / "gs").chmod(0o755)
    os.mkfifo(tmp_path / "b.jpg")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(UserError, match="cannot read"):
            prepare.read(tmp_path, name)
        assert prepare.inspect(tmp_path / name)[0][0].startswith("cannot read") and not (tmp_path / "started").exists()


def test_scores_and_counts_are_of_what_was_asked(copy, capsys):
    name = checkpoint.load(copy / "runs/whole/best.pt")["held_out"][0][0]
    flags = f"--weights={copy}/runs/whole", f"--data={copy}/data", f"--cache={copy}/cache", "--device=cpu"
    for path in (copy / "data/train").glob(f"*/{name}.*"):
        path.unlink()
    assert command(evaluate.main, *flags) == 0 and "1 of the 3 pairs held out" in capsys.readouterr().err
    assert command(evaluate.main, *flags, "--batch=-4") == 2
    masks = f"--masks={copy}/data/train/masks", f"--truth={copy}/data/train/masks"
    assert [command(evaluate.main, *masks, *more) for more in ([], ["--views=flip"])] == [0, 2]
    assert command(params.main, "--name=whole", f"--runs={copy}/runs", "--lr=1") == 2
    with pytest.raises(UserError, match="--dropout"):
        options.parse(['--model-args={"dropout": 0.9}'])


def test_a_record_names_the_places_of_a_resumed_run(copy):
    path = copy / "runs/whole/args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device_name": "A40"}))
    assert command(train.main, *full(copy, "--resume=whole")) == 0
    assert json.loads(path.read_text())["device_name"] == f"A40 then {train.device_name(torch.device('cpu'))}"


WRONG = [
    *[{"views": 5}, {"model_args": {5: 1}}, {"progress": {"epoch": 1.5}}, {"progress": {"seconds": "x"}}],
    *["[]", '{"args": []}', '{"args": {"data": 5}}', '{"pairs": "x"}', {"state_dict": None}],
    *[{"progress": train.START | {"step": 99}}, {"optimiser": {"state": {0: {"step": torch.tensor(1.0)}}}}],
]


@cases("change", WRONG)
def test_edited_weights_and_records_are_one_line(copy, capsys, change):
    source = copy / "runs/whole/last.pt"
    call = [tools_run.main, f"--input={copy}/data/test/images", f"--output={copy}/out", f"--weights={source}"]
    if isinstance(change, str):
        source.with_name("args.json").write_text(change)
        call = [evaluate.main, f"--weights={source}", "--device=cpu"]
    else:
        content = checkpoint.load(source)
        if "state_dict" in change:  # variances below 0: all logits would be NaN, all masks background
            change = {"state_dict": {k: v - 9 * k.endswith("var") for k, v in content["state_dict"].items()}}
        if "optimiser" in change:
            change = {"optimiser": content["optimiser"] | change["optimiser"]}
        torch.save(content | change, source)
        call = [train.main, *full(copy, "--resume=whole")] if {"progress", "optimiser"} & change.keys() else call
    assert command(*call) == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_environment_of_others_changes_nothing(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    git = ["git", "-C", tmp_path, "-c", "user.email=a", "-c", "user.name=a"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    env = os.environ | {"RANK": "1", "PYTHONIOENCODING": "ascii", "GIT_DIR": f"{tmp_path}/.git"}
    code = "import common, train; common.run_main(lambda: train.print_message(train.environment()['commit'] + '\xf6'))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert done.stderr == b"warning: unknown\\xf6\n"
    done = subprocess.run([sys.executable, "predict.py", "--in=\xf6", "--out=x"], env=env, capture_output=True)
    assert done.returncode == 2 and b"error: no such" in done.stderr
