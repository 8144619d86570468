"""Submission, its checker, the course zip, sweeps and export. The networks are untrained, the images noise."""

import contextlib
import io
import json
import pickle
import re
import shlex
import shutil
import stat
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from common import UserError, check_target

import numpy as np
import pypdf
import pytest
import torch
from PIL import Image

import checkpoint
import register
from checks.conftest import cases, encoded, saved, untrained, write
from checks.references import TINY
from images import mask_image
from labels import PALETTE
from model import build
from options import parse
from tools import check_submission, course_report, export, package, report_zip, sweep
from tools.check_submission import judge, read_zip
from tools.package import make_submission, write_zip
from tools.synth import make_dataset

ROOT = Path(__file__).parent.parent
IMAGES, WEIGHTS, CKPT = "data/test/images", "runs/a/best.pt", "solution/ckpt.pth"
LABELS = np.zeros((512, 512), np.uint8)


def mask_bytes(labels, palette=PALETTE):
    image = mask_image(labels)
    image.putpalette(palette)
    return encoded(image)


def pdf(path, pages, width=594.96):
    writer = pypdf.PdfWriter()
    for _ in range(pages):
        writer.add_blank_page(width, 841.92)
    writer.write(path)
    return path


def faults(place, entries=None, phase="test", run=0):
    """The failed checks of judged.zip, written with these entries first, as text, one per line."""
    if entries is not None:
        write_zip(place / "judged.zip", entries)
    findings = judge(place / "judged.zip", place / IMAGES, phase, run)
    return "\n".join(f"{check}: {detail}" for status, check, detail in findings if status == "FAIL")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/test/images, a run runs/a in half precision whose masks vary, and its submission."""
    root = tmp_path_factory.mktemp("submission")
    rng, run = np.random.default_rng(0), root / "runs" / "a"
    grids = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((512, 512)) for _ in range(3)]
    write({f"{name}.jpg": encoded(image, "JPEG") for name, image in zip("abc", grids, strict=True)}, root / IMAGES)
    record = b'{"args": {}, "versions": {"torch": "2.13.0", "numpy": "2.4.6"}}'
    lines = b'{"official": 0.71236, "batch32": 0.60004}\n{"official": 0.7, "batch32": 0.6}\n'
    write({"args.json": record, "metrics.jsonl": lines}, run)
    model = build("microsegformer")
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    checkpoint.save(run / "best.pt", {"model": "microsegformer", "model_args": {}, "size": 64, "state_dict": state})
    flags = "--name", run, "--data", root / "data", "--views=flip", "--run=1"
    subprocess.run([sys.executable, "-m", "tools.package", *flags], check=True)
    return root


@pytest.fixture(scope="module")
def sound(place):
    """The content of the submission, {name: bytes}."""
    return read_zip(place / "runs" / "a" / "submission-test.zip")[0]


def test_submission_contains_the_required_files_and_no_unused_module(place, sound):
    command = [sys.executable, "-c", "import sys, tools.run; print(*sys.modules)"]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {f"{name}.py" for name in loaded if (ROOT / f"{name}.py").is_file()} == set(package.MODULES)
    masks = {f"masks/{name}.png" for name in "abc"}
    assert sound.keys() == masks | {f"solution/{name}" for name in (*check_submission.FILES, *package.MODULES)}
    assert torch.load(io.BytesIO(sound[CKPT]), weights_only=True)["views"] == "flip"
    make_submission(place / WEIGHTS, place / IMAGES, "test", place / "plain.zip", "none", run=0)
    assert torch.load(io.BytesIO(read_zip(place / "plain.zip")[0][CKPT]), weights_only=True)["views"] == ""
    assert all(len(np.unique(Image.open(io.BytesIO(sound[name])))) > 2 for name in masks)


def test_dev_contains_only_masks_and_a_failed_check_keeps_the_old_zip(place, sound, tmp_path, monkeypatch):
    target, flags = tmp_path / "dev.zip", (place / WEIGHTS, place / IMAGES, "dev", tmp_path / "dev.zip", "flip")
    write_zip(target, {"masks/old.png": b""})
    old = target.read_bytes()
    with monkeypatch.context() as context:
        context.setattr(package, "judge", lambda *_: [("FAIL", "run", "")])
        with pytest.raises(UserError, match="was not written, because a check failed"):
            make_submission(*flags)
    assert target.read_bytes() == old
    make_submission(*flags)
    write_zip(tmp_path / "again.zip", {k: v for k, v in reversed(sound.items()) if k.startswith("masks/")})
    assert target.read_bytes() == (tmp_path / "again.zip").read_bytes()


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


UNSAFE = ("../masks/a.png", "masks/../../a.png", "/masks/a.png", "masks\\a.png", "C:/masks/a.png", "masks/./a.png")
FAULTS = {
    **{f"members: {p} has an absolute path, a backslash, . or ..": (p, b"") for p in (*UNSAFE, "a//b")},
    "members: solution/run.py/x lies in a file": ("solution/run.py/x", b""),
    "folders: a.png does not belong at the top": ("a.png", b""),
    "masks: masks/b.png is missing": ("masks/b.png", None),
    "masks: masks/d.png belongs to no image": ("masks/d.png", b""),
    "masks: masks/a.png has mode RGB": ("masks/a.png", encoded(mask_image(LABELS).convert("RGB"))),
    "masks: masks/a.png is 256 x 256, but": ("masks/a.png", mask_bytes(LABELS[:256, :256])),
    "masks: masks/a.png contains label 19": ("masks/a.png", mask_bytes(LABELS + 19)),
    "masks: masks/a.png has another palette": ("masks/a.png", mask_bytes(LABELS + 2, palette=PALETTE[::-1])),
    "masks: masks/a.png is not a readable": ("masks/a.png", mask_bytes(LABELS)[:200]),
    "solution: solution/requirements.txt is missing": ("solution/requirements.txt", None),
    "checkpoint: ckpt.pth is damaged": (CKPT, saved({"state_dict": {"a": torch.zeros(1)}})[:-99]),
    "checkpoint: ckpt.pth is damaged or": (CKPT, saved({"state_dict": Hostile()})),
    "checkpoint: ckpt.pth is damaged or contains": (CKPT, pickle.dumps({"state_dict": Hostile()}, 2)),
    'checkpoint: ckpt.pth has no "state_dict"': (CKPT, saved({"weights": {}})),
    "checkpoint: ckpt.pth contains weights": (CKPT, saved({"state_dict": {"a": torch.tensor(np.nan)}})),
    "checkpoint: ckpt.pth has 3,": ("solution/a.py", b"1" * 2**22),  # two bytes of other files are a parameter
}


@cases("fault", FAULTS)
def test_exactly_the_fault_is_reported(place, sound, capsys, fault):
    changed = sound | dict([FAULTS[fault]])
    text = faults(place, {name: data for name, data in changed.items() if data is not None})  # None removes the file
    assert text.startswith(fault) and "\n" not in text and "executed" not in capsys.readouterr().out


def test_missing_folders_are_reported_and_the_exit_status_tells_faults_from_no_zip(place, sound, command):
    nested = faults(place, {f"mine/{name}": data for name, data in sound.items()})
    assert "folders: everything is inside mine/: zip its contents" in nested
    found = faults(place, {})
    assert "folders: no folder masks/" in found and "folders: no folder solution/" in found
    for name, status in ("none", 2), ("runs/a/args.json", 2), ("judged.zip", 1), ("runs/a/submission-test.zip", 0):
        assert command(check_submission.main, "--zip", place / name, "--data", place / "data")[0] == status


MANY = torch.zeros(5_000_000)
OTHERS = [  # what ckpt.pth contains beside 1,800,000 weights
    *[({"more": [{"x": MANY}]}, True), ({"more": [0.5] * 2**19}, True)],
    *[({"state_dict": {"bn.running_mean": x}}, x is MANY) for x in (MANY, MANY[:21_085].clone())],
    *[({"state_dict": {"x": MANY[:n].clone()}}, n == 21_085) for n in (21_084, 21_085)],
    ({"state_dict": dict.fromkeys("xy", MANY[:20_000].clone())}, False),  # the same weights twice
]


@cases(("more", "fails"), OTHERS, ids=range(len(OTHERS)))
def test_parameters_of_other_networks_are_counted_without_buffers(place, sound, more, fails):
    state = {"w": torch.zeros(1_800_000)} | more.get("state_dict", {})
    text = faults(place, sound | {CKPT: saved(more | {"state_dict": state})})
    assert re.match(r"checkpoint: ckpt.pth has [\d,]+ parameters", text) if fails else text == ""


def test_links_duplicates_other_compression_and_macos_files(place, sound):
    write_zip(place / "judged.zip", sound | {"__MACOSX/masks/._a.png": b"x"})
    link = zipfile.ZipInfo("solution/link")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(place / "judged.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(link, "/etc/passwd")
        archive.writestr("masks/a.png", b"")
        archive.writestr("solution/b", b"", zipfile.ZIP_BZIP2)
    expected = ("link is a link", "masks/a.png occurs twice", "b is a link, or not compressed by deflate")
    assert all(text in line for text, line in zip(expected, faults(place).splitlines(), strict=True))


def test_images_that_would_share_a_mask_are_refused(place, tmp_path):
    images = write(dict.fromkeys(["t.jpg", "t.jpeg"], encoded(Image.new("RGB", (8, 8)))), tmp_path)
    write_zip(place / "judged.zip", {"masks/t.png": b""})
    with pytest.raises(UserError, match="two images of one name"):
        judge(place / "judged.zip", images, "dev")


def test_bombs_are_not_unpacked(place, sound, tmp_path, monkeypatch):
    monkeypatch.setattr(check_submission, "MAX_BYTES", 2**25)
    text = faults(place, sound | {"solution/zeros": bytes(2**25)})
    assert text.startswith("members: more than 10,000 files or 33,554,432 bytes unpacked")
    lie = (place / "judged.zip").read_bytes().replace((2**25).to_bytes(4, "little"), (999).to_bytes(4, "little"))
    (place / "judged.zip").write_bytes(lie)
    with pytest.raises(UserError, match="is not a readable zip: Bad CRC-32"):
        faults(place)
    write_zip(tmp_path / "ckpt.pth", {"archive/data.pkl": bytes(2**25 + 1)})
    text = faults(place, sound | {CKPT: (tmp_path / "ckpt.pth").read_bytes()})
    assert text.startswith("checkpoint: ckpt.pth is damaged") and "33,554,432 bytes" in text


def test_run_py_runs_alone_and_its_masks_are_compared(place, sound, monkeypatch):
    copy = b"import sys, shutil, pathlib\nshutil.copy(pathlib.Path(sys.argv[2]).stem, sys.argv[4])\n"
    files = sound | {f"solution/{name}": sound[f"masks/{name}.png"] for name in "ab"} | {"solution/run.py": copy}
    labels = np.array(Image.open(io.BytesIO(sound["masks/c.png"])))
    labels[3, :7] = (labels[3, :7] + 1) % 19
    files["solution/c"] = mask_bytes(labels)
    assert faults(place, files, run=2) == "run: c.jpg: run.py and masks/ differ in 7 of 262,144 pixels"
    text = faults(place, {name: data for name, data in sound.items() if name != "solution/labels.py"}, run=1)
    assert "ended with status 1" in text and "No module named 'labels'" in text
    monkeypatch.setattr(check_submission, "TIME_LIMIT", 0.01)
    assert "timed out after 0.01 seconds" in faults(place, run=1)


def test_course_zip_is_complete_and_its_readme_reproduces_the_masks(place, sound, tmp_path, monkeypatch, command):
    monkeypatch.chdir(place)
    flags = ["--name", "a", "--data", "data", "--report", pdf(place / "report.pdf", 5), "--matric", "a12345678b"]
    assert command(report_zip.main, *flags, "--out", tmp_path)[0] == 0
    with zipfile.ZipFile(tmp_path / "A12345678B.zip") as archive:
        archive.extractall(tmp_path)
    assert (tmp_path / "checkpoint/ckpt.pth").read_bytes() == sound[CKPT]
    text = (tmp_path / "Readme.txt").read_text()
    assert all(fact in text for fact in ("measure: unknown, since", "masks average: flip", "1,747,923", "numpy 2.4.6"))
    for path in re.findall(r"^  ([\w/.]+\w)[:,]", text, re.M):
        assert (tmp_path / path).exists(), path
    command = shlex.split(re.search(r"^  python (-m tools.run .*)", text, re.M)[1].replace("DATA", str(place / "data")))
    subprocess.run([sys.executable, *command], cwd=tmp_path / "code", check=True)
    for name in ("a.png", "b.png", "c.png"):
        again = (tmp_path / "masks-again" / name).read_bytes()
        assert again == (tmp_path / "masks" / name).read_bytes() == sound[f"masks/{name}"]


def test_course_zip_states_the_score_of_the_twin_of_weights_trained_on_all_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(report_zip, "score", lambda weights, *_: (np.array([0.5]), ""))
    for name in ("best", "validated"):
        untrained(tmp_path / f"{name}.pt", validated=name == "validated")
    text = report_zip.describe_score(tmp_path / "best.pt", "", None)
    assert text.startswith("0.5000") and "without these" in text


@cases("script", [package, report_zip])
def test_a_run_on_real_faces_gets_no_masks_of_synthetic_ones(place, tmp_path, monkeypatch, refused, script):
    monkeypatch.chdir(tmp_path)
    flags = [] if script is package else ["--matric", "A12345678B", "--report", pdf(tmp_path / "report.pdf", 1)]
    assert "no data/ folder" in refused(script.main, "--name", place / "runs" / "a", *flags)


@cases(("pages", "width", "error"), [(5, 594.96, ""), (6, 594.96, "has 6 pages"), (1, 612, "page 1 .* 612 x 842")])
def test_report_must_have_at_most_five_a4_pages(tmp_path, pages, width, error):
    path = pdf(tmp_path / "a.pdf", pages, width)
    with pytest.raises(UserError, match=error) if error else contextlib.nullcontext():
        assert course_report.count_pages(path) == pages
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read"):
        course_report.count_pages(path)


def test_course_zip_refuses_other_weights_and_a_wrong_number(place, sound, tmp_path):
    own = checkpoint.load(place / WEIGHTS)["state_dict"]
    other = {"state_dict": own | {"classifier.bias": own["classifier.bias"] + 1}}
    for part, changed in ("weights", {CKPT: saved(other)}), ("masks", {"masks/a.png": sound["masks/c.png"]}):
        write_zip(tmp_path / "other.zip", sound | changed)
        with pytest.raises(UserError, match=f"has other {part}; make it again"):
            report_zip.read_submission(tmp_path / "other.zip", place / IMAGES, own, "make it again")
    with pytest.raises(UserError, match="a letter, eight digits and a letter"):
        course_report.matriculation("12345678B")


def test_sweep_expands_every_combination():
    runs = dict(sweep.expand(["--dice=0.5 1", "--name=my run", "--sizes=64:1,96:2 128", "--overwrite"]))
    assert list(runs) == ["dice0.5-sizes64_1+96_2", "dice0.5-sizes128", "dice1-sizes64_1+96_2", "dice1-sizes128"]
    assert runs["dice1-sizes128"] == ["--dice=1", "--name=my run", "--sizes=128", "--overwrite"]
    assert list(sweep.expand(["--dice=1 1"])) == [("dice1", ["--dice=1"])]
    for flags, error in (["--dice=1"], "several values"), (["--dice", "1 2"], 'write it after "="'):
        with pytest.raises(UserError, match=error):
            dict(sweep.expand(flags))


def test_sweep_trains_as_its_first_run_does_and_continues(tmp_path, monkeypatch, command):
    started, flags = [], (sweep.main, f"--runs={tmp_path}", "--dice=1 2 3")

    def start(line):
        started.append(" ".join(line[3:]))
        args = vars(parse(line[2:])[0]) | {"amp": "bf16", "threads": 3}
        write({"args.json": json.dumps({"args": args}).encode()}, tmp_path / line[-1].partition("=")[2])
        return SimpleNamespace(wait=lambda: int("--dice=2" in line))  # which fails: the third does not start

    monkeypatch.setattr(subprocess, "Popen", start)
    assert [command(*flags)[0] for _ in range(2)] == [1, 1]
    assert started == [
        *["--dice=1 --name=sweep-dice1", "--dice=2 --amp=bf16 --threads=3 --name=sweep-dice2"],
        *["--dice=1 --resume=sweep-dice1", "--dice=2 --resume=sweep-dice2"],
    ]


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoint of an untrained network: its folder."""
    folder = write({"args.json": b"{}", "metrics.jsonl": b"{}"}, tmp_path / "runs" / "a")
    untrained(folder / "best.pt")
    return folder


@cases("arguments", [["microsegformer"], ["microunet", TINY]])
def test_onnx_file_gives_the_labels_of_torch_or_is_not_written(run, tmp_path, monkeypatch, command, refused, arguments):
    onnx = pytest.importorskip("onnx")
    untrained(run / "best.pt", *arguments, size=128)
    path, other = tmp_path / "parser.onnx", tmp_path / "other.onnx"
    flags = export.main, "--name", run, "--out"
    status, out, _ = command(*flags, path)
    assert status == 0 and "of pixels of astronaut.jpg have torch's label" in out
    model = onnx.load(path)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["labels"])[17] == "neck" and "uint8 RGB" in facts["input"] and "128 x 128" in facts["input"]
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert [output.name for output in model.graph.output] == ["labels"]
    untrained(run / "best.pt", *arguments, size=128)  # of which this file is none
    monkeypatch.setattr(export, "convert", lambda *_: SimpleNamespace(save=partial(shutil.copy, path)))
    assert "nothing written" in refused(*flags, other) and not other.exists()


def test_int8_file_is_a_third_of_the_size(tmp_path, command):
    pytest.importorskip("onnx")
    make_dataset(tmp_path / "data", train=4, dev=1, test=1)
    path = tmp_path / "parser.onnx"
    status, out, _ = command(export.main, "--int8", f"--data={tmp_path}/data", f"--out={path}")
    assert status == 0 and path.stat().st_size < 3e6 and "have torch's label" in out
    check_target(path, export.OURS)  # may be replaced


def test_missing_packages_and_flags_are_one_line(run, tmp_path, monkeypatch, refused):
    assert "OUT=parser.onnx" in refused(export.main, "--name", run)
    monkeypatch.setattr(export, "PACKAGES", ("onnx_that_is_missing",))
    error = refused(export.main, "--name", run, "--out", tmp_path / "a.onnx")
    assert "that_is_missing not installed: " in error and "-m pip install -r tools/requirements.txt" in error


def test_release_is_the_run_in_half_precision(run, tmp_path, monkeypatch, command):
    made, flags = tmp_path / "release", (export.main, "--release", "--name")
    write({"best.json": b"of the previous release"}, made)
    monkeypatch.setattr(register, "RELEASE", made)
    state = checkpoint.load(run / "best.pt")["state_dict"]
    assert command(*flags, run)[0] == 0
    assert {path.name for path in made.iterdir()} == {"best.pt", "args.json", "metrics.jsonl", "LICENCE.txt"}
    half = checkpoint.load(made / "best.pt")["state_dict"]
    assert {value.dtype for value in half.values()} == {torch.float16, torch.int64}
    assert all(torch.allclose(half[key].float(), value.float(), 1e-3, 1e-7) for key, value in state.items())
    (tmp_path / "all.pt").write_bytes((run / "best.pt").read_bytes())
    again = [made], [run], [run, "--overwrite", "--weights", tmp_path / "all.pt"]
    assert [command(*flags, *more)[0] for more in again] == [2, 2, 0]
    assert (made / "validated.pt").read_bytes() == (made / "best.pt").read_bytes()
