"""Submission, its checker, the course zip and sweeps. The network is untrained, the images are noise."""

import io
import pickle
import re
import shlex
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

from common import UserError, run_main

import numpy as np
import pypdf
import pytest
import torch
from PIL import Image

import checkpoint
import register
from data import Pairs
from evaluate import confusion, official_score
from images import mask_image
from labels import PALETTE
from model import PARAM_LIMIT, build
from predict import FaceParser
from tools import check_submission, course_report, package, report_zip, sweep
from tools.check_submission import judge, read_zip
from tools.package import make_submission, write_zip

ROOT = Path(__file__).parent.parent
IMAGES, WEIGHTS, CKPT = "data/test/images", "runs/a/best.pt", "solution/ckpt.pth"
LABELS = np.zeros((512, 512), np.uint8)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def mask_bytes(labels, mode="P", palette=PALETTE):
    image, file = mask_image(labels), io.BytesIO()
    image.putpalette(palette)
    image.convert(mode).save(file, format="PNG")
    return file.getvalue()


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


def exit_status(monkeypatch, main, *flags):
    monkeypatch.setattr(sys, "argv", ["x", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return ended.value.code or 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/test/images, a run runs/a in half precision whose masks vary, and its submission."""
    root = tmp_path_factory.mktemp("submission")
    images, run = root / IMAGES, root / "runs" / "a"
    images.mkdir(parents=True)
    run.mkdir(parents=True)
    for seed, name in enumerate("abc"):
        grid = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(grid).resize((512, 512)).save(images / f"{name}.jpg")
    model = build("microsegformer")
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    checkpoint.save(run / "best.pt", {"model": "microsegformer", "model_args": {}, "size": 64, "state_dict": state})
    (run / "args.json").write_text('{"args": {}, "versions": {"torch": "2.13.0", "numpy": "2.4.6"}}')
    (run / "metrics.jsonl").write_text('{"official": 0.71236, "batch32": 0.60004}\n{"official": 0.7, "batch32": 0.6}\n')
    make_submission(run / "best.pt", images, "test", run / "submission-test.zip", "flip", run=1)
    return root


@pytest.fixture(scope="module")
def sound(place):
    """The content of the submission, {name: bytes}."""
    return read_zip(place / "runs" / "a" / "submission-test.zip")[0]


def test_submission_contains_the_required_files_and_no_unused_module(sound):
    command = [sys.executable, "-c", "import sys, tools.run; print(*sys.modules)"]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {f"{name}.py" for name in loaded if (ROOT / f"{name}.py").is_file()} == set(package.MODULES)
    masks = {f"masks/{name}.png" for name in "abc"}
    assert sound.keys() == masks | {f"solution/{name}" for name in (*check_submission.FILES, *package.MODULES)}
    assert torch.load(io.BytesIO(sound[CKPT]), weights_only=True)["views"] == "flip"
    assert all(len(np.unique(Image.open(io.BytesIO(sound[name])))) > 2 for name in masks)


def test_same_content_gives_the_same_bytes_and_dev_contains_only_masks(place, sound, tmp_path):
    run, target = place / "runs" / "a", tmp_path / "again.zip"
    make_submission(run / "best.pt", place / IMAGES, "test", target, "flip", run=0)
    assert target.read_bytes() == (run / "submission-test.zip").read_bytes()
    make_submission(run / "best.pt", place / IMAGES, "dev", place / "judged.zip", "flip", run=1)
    assert read_zip(place / "judged.zip")[0] == {k: v for k, v in sound.items() if k.startswith("masks/")}
    assert faults(place, phase="dev") == ""


def test_failed_check_keeps_the_old_zip(place, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept.zip"
    write_zip(kept, {"masks/old.png": b""})
    old = kept.read_bytes()
    monkeypatch.setattr(check_submission, "TIME_LIMIT", 0.01)
    with pytest.raises(UserError, match="was not written, because a check failed"):
        make_submission(place / WEIGHTS, place / IMAGES, "test", kept, run=1)
    assert kept.read_bytes() == old
    assert "timed out after 0.01 seconds" in capsys.readouterr().out


def test_too_many_parameters_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "PARAM_LIMIT", 1_747_923)
    with pytest.raises(UserError, match="has 1,747,923 parameters; .* fewer than 1,747,923"):
        make_submission(place / WEIGHTS, place / IMAGES, "test", tmp_path / "big.zip")


def test_default_weights_are_named(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(package, "make_submission", lambda weights, images, phase, target, *rest: print(target))
    for name in ("none", "a"):
        monkeypatch.setattr(register, "RELEASE", place / "runs" / name)
        assert exit_status(monkeypatch, package.main, "--data", "data") == 0
    lines, target = capsys.readouterr().out.splitlines(), "runs/a/submission-test.zip"
    assert [line.replace(f"{place}/", "") for line in lines] == ["weights: runs/a/best.pt (no NAME given)", target] * 2


UNSAFE = ("../masks/a.png", "masks/../../a.png", "/masks/a.png", "masks\\a.png", "C:/masks/a.png")
MISFIT = {"model": "microunet", "model_args": {}, "state_dict": {"a": torch.zeros(1)}}
FAULTS = {
    **{f"members: {path} has an absolute path, a backslash or ..": (path, b"") for path in UNSAFE},
    "folders: a.png does not belong at the top": ("a.png", b""),
    "masks: masks/b.png is missing": ("masks/b.png", None),
    "masks: masks/d.png belongs to no image": ("masks/d.png", b""),
    "masks: masks/a.png has mode RGB": ("masks/a.png", mask_bytes(LABELS, "RGB")),
    "masks: masks/a.png is 256 x 256, but": ("masks/a.png", mask_bytes(LABELS[:256, :256])),
    "masks: masks/a.png contains label 19": ("masks/a.png", mask_bytes(LABELS + 19)),
    "masks: masks/a.png has another palette": ("masks/a.png", mask_bytes(LABELS + 2, palette=PALETTE[::-1])),
    "masks: masks/a.png is not a readable": ("masks/a.png", mask_bytes(LABELS)[:200]),
    "solution: solution/requirements.txt is missing": ("solution/requirements.txt", None),
    "checkpoint: ckpt.pth is damaged": (CKPT, saved(MISFIT)[:-99]),
    'checkpoint: ckpt.pth has no "state_dict"': (CKPT, saved({"weights": {}})),
    "checkpoint: ckpt.pth does not fit": (CKPT, saved(MISFIT)),
    "checkpoint: ckpt.pth contains weights": (CKPT, saved({"state_dict": {"a": torch.tensor(np.nan)}})),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_exactly_the_fault_is_reported(place, sound, fault):
    changed = sound | dict([FAULTS[fault]])
    text = faults(place, {name: data for name, data in changed.items() if data is not None})  # None removes the file
    assert text.startswith(fault) and "\n" not in text


def test_missing_folders_are_reported(place, sound):
    assert "folders: no folder solution/" in faults(place, {k: v for k, v in sound.items() if k.startswith("masks/")})
    nested = faults(place, {f"mine/{name}": data for name, data in sound.items()})
    assert "folders: everything is inside mine/: zip its contents" in nested
    assert "folders: no folder masks/" in faults(place, {})


@pytest.mark.parametrize("count", [PARAM_LIMIT - 1, PARAM_LIMIT])
@pytest.mark.parametrize("more", [{}, {"model": "another", "model_args": {}}, {"model": {"w": 1}, "model_args": 0}])
def test_parameters_of_other_networks_are_counted_without_buffers(place, sound, count, more):
    state = {"w": torch.zeros(count), "bn.running_mean": torch.zeros(9), "bn.num_batches_tracked": torch.tensor(0)}
    text = faults(place, sound | {CKPT: saved({"state_dict": state, **more})})
    assert text.startswith("checkpoint: ckpt.pth has 1,821,085 parameters") if count == PARAM_LIMIT else text == ""


@pytest.mark.parametrize("write", [saved, lambda content: pickle.dumps(content, 2)])
def test_code_in_a_checkpoint_is_not_executed(place, sound, tmp_path, write):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    text = faults(place, sound | {CKPT: write({"state_dict": Hostile()})})
    assert text.startswith("checkpoint: ckpt.pth is damaged or contains") and not (tmp_path / "executed").exists()


def test_links_duplicates_other_compression_and_macos_files(place, sound):
    write_zip(place / "judged.zip", sound | {"__MACOSX/masks/._a.png": b"x"})
    with zipfile.ZipFile(place / "judged.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        link = zipfile.ZipInfo("solution/link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("masks/a.png", b"")
        archive.writestr("solution/b", b"", zipfile.ZIP_BZIP2)
    expected = ("link is a link", "masks/a.png occurs twice", "b is a link, or not compressed by deflate")
    assert all(text in line for text, line in zip(expected, faults(place).splitlines(), strict=True))


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


def test_run_py_runs_alone_and_its_masks_are_compared(place, sound):
    copy = b"import sys, shutil, pathlib\nshutil.copy(pathlib.Path(sys.argv[2]).stem, sys.argv[4])\n"
    files = sound | {f"solution/{name}": sound[f"masks/{name}.png"] for name in "ab"} | {"solution/run.py": copy}
    labels = np.array(Image.open(io.BytesIO(sound["masks/c.png"])))
    labels[3, :7] = (labels[3, :7] + 1) % 19
    files["solution/c"] = mask_bytes(labels)
    assert faults(place, files, run=1) == ""
    assert faults(place, files, run=2) == "run: c.jpg: run.py and masks/ differ in 7 of 262,144 pixels"
    text = faults(place, {name: data for name, data in sound.items() if name != "solution/labels.py"}, run=1)
    assert "ended with status 1" in text and "No module named 'labels'" in text


@pytest.mark.parametrize("name, status", [("none", 2), ("text", 2), ("empty", 1), ("runs/a/submission-test", 0)])
def test_exit_status(place, monkeypatch, name, status):
    (place / "text.zip").write_text("not a zip")
    write_zip(place / "empty.zip", {})
    flags = ("--zip", place / f"{name}.zip", "--data", place / "data")
    assert exit_status(monkeypatch, check_submission.main, *flags) == status


def test_course_zip_contains_everything_and_its_readme_reproduces_the_masks(place, sound, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    flags = ["--name", "a", "--data", "data", "--report", pdf(place / "report.pdf", 5), "--matric", "a12345678b"]
    assert exit_status(monkeypatch, report_zip.main, *flags, "--out", tmp_path) == 0
    with zipfile.ZipFile(tmp_path / "A12345678B.zip") as archive:
        archive.extractall(tmp_path)
    assert (tmp_path / "checkpoint/ckpt.pth").read_bytes() == sound[CKPT]
    text = (tmp_path / "Readme.txt").read_text()
    assert all(fact in text for fact in ("run in run/ has 0.7124", "masks average: flip", "1,747,923", "numpy 2.4.6"))
    for path in re.findall(r"^  ([\w/.]+\w)[:,]", text, re.M):
        assert (tmp_path / path).exists(), path
    command = shlex.split(re.search(r"^  python (-m tools.run .*)", text, re.M)[1].replace("DATA", str(place / "data")))
    subprocess.run([sys.executable, *command], cwd=tmp_path / "code", check=True)
    for name in ("a.png", "b.png", "c.png"):
        again = (tmp_path / "masks-again" / name).read_bytes()
        assert again == (tmp_path / "masks" / name).read_bytes() == sound[f"masks/{name}"]


def test_readme_gives_the_score_of_the_weights_and_views_handed_in(place, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images, masks = (
        rng.integers(0, top, shape, np.uint8) for top, shape in ((256, (10, 3, 64, 64)), (19, (10, 64, 64)))
    )
    pairs = Pairs(images, masks, np.zeros(10, bool), list("abcdefghij"))
    monkeypatch.setattr(course_report, "load_pairs", lambda data: pairs)
    weights = tmp_path / "best.pt"
    content = checkpoint.load(place / WEIGHTS) | {"validated": True, "held_out": ["d", "b"]}
    checkpoint.save(weights, content)
    parser = FaceParser(weights, views="flip", device="cpu")
    own = [confusion(parser(images[i].transpose(1, 2, 0), whole=True).mask, masks[i]) for i in (3, 1)]
    text = report_zip.describe_score(weights, content, "data", "flip")
    assert text.startswith(f"{official_score(np.stack(own)):.4f}, the official score on the 2 pairs")


@pytest.mark.parametrize("script", [package, report_zip])
def test_a_run_on_real_faces_gets_no_masks_of_synthetic_ones(place, tmp_path, monkeypatch, capsys, script):
    monkeypatch.chdir(tmp_path)
    flags = [] if script is package else ["--matric", "A12345678B", "--report", pdf(tmp_path / "report.pdf", 1)]
    assert exit_status(monkeypatch, script.main, "--name", place / "runs" / "a", *flags) == 2
    assert "no data/ folder" in capsys.readouterr().err


def test_report_must_have_at_most_five_a4_pages(tmp_path):
    assert course_report.count_pages(pdf(tmp_path / "a.pdf", 5)) == 5
    (tmp_path / "cut.pdf").write_bytes((tmp_path / "a.pdf").read_bytes()[:100])
    for path, message in (
        (pdf(tmp_path / "long.pdf", 6), "has 6 pages"),
        (pdf(tmp_path / "letter.pdf", 1, 612), "page 1 of .* has 612 x 842"),
        (tmp_path / "cut.pdf", "cannot read"),
    ):
        with pytest.raises(UserError, match=message):
            course_report.count_pages(path)


def test_course_zip_refuses_other_weights_and_a_wrong_number(place, sound, tmp_path):
    own = checkpoint.load(place / WEIGHTS)["state_dict"]
    other = {"state_dict": own | {"classifier.bias": own["classifier.bias"] + 1}, "model": "other"}
    write_zip(tmp_path / "other.zip", sound | {CKPT: saved(other)})
    with pytest.raises(UserError, match="has other weights; make it again"):
        report_zip.read_submission(tmp_path / "other.zip", place / IMAGES, own, "make it again")
    write_zip(tmp_path / "swapped.zip", sound | {"masks/a.png": sound["masks/c.png"]})
    with pytest.raises(UserError, match="has other masks; make it again"):
        report_zip.read_submission(tmp_path / "swapped.zip", place / IMAGES, own, "make it again")
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
