"""Drawn faces: the same for the same seed, sides and shares as in CelebAMask-HQ, and a dataset that can be resumed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import synth
from errors import run_main
from labels import NUM_CLASSES, PALETTE, SIDES

SMALL = ("--train", "3", "--dev", "1", "--test", "2", "--size", "64")


@pytest.fixture(scope="module")
def faces():
    """60 faces as (image, mask) of Pillow."""
    return [synth.draw_face(seed, 128) for seed in range(60)]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs synth.py with these flags; returns (exit status, stdout, stderr)."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["synth.py", "--workers", "1", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            run_main(synth.main)
        return stop.value.code or 0, *capsys.readouterr()

    return run


def files(root):
    return {path.relative_to(root): path for path in sorted(root.rglob("*")) if path.is_file()}


def test_same_seed_same_face():
    first, again, other = synth.draw_face(3, 96), synth.draw_face(3, 96), synth.draw_face(4, 96)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))
    assert all(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True))


def test_format(faces):
    for image, mask in faces:
        assert (image.mode, image.size, mask.mode, mask.size) == ("RGB", (128, 128), "P", (128, 128))
        assert mask.getpalette()[: len(PALETTE)] == PALETTE
        assert np.max(mask) < NUM_CLASSES


def test_persons_left_is_at_the_images_right(faces):
    seen = dict.fromkeys(SIDES, 0)
    for _, mask in faces:
        mask = np.asarray(mask)
        for left, right in SIDES:
            if (mask == left).any() and (mask == right).any():
                assert np.nonzero(mask == left)[1].mean() > np.nonzero(mask == right)[1].mean()
                seen[left, right] += 1
    assert min(seen.values()) > 10


def test_shares_and_rates(faces):
    counts = np.array([np.bincount(np.ravel(mask), minlength=NUM_CLASSES) for _, mask in faces])
    share, rate = 100 * counts.sum(0) / counts.sum(), 100 * (counts > 0).mean(0)
    # label: bounds of the share of pixels and of the share of images, about the figures of CelebAMask-HQ
    for label, low, high, seldom, often in (
        (0, 22, 38, 100, 100), (1, 19, 30, 100, 100), (2, 1.4, 2.6, 100, 100), (4, 0.1, 0.4, 90, 100),
        (6, 0.2, 0.7, 90, 100), (8, 0.2, 0.9, 35, 70), (10, 0.15, 0.5, 40, 75), (12, 0.4, 0.9, 97, 100),
        (13, 23, 40, 90, 100), (17, 2.5, 6, 95, 100), (18, 2, 5, 42, 78),
    ):  # fmt: skip
        assert low <= share[label] <= high, (label, share[label])
        assert seldom <= rate[label] <= often, (label, rate[label])


def test_image_and_mask_agree(faces):
    """The image changes more along the borders of the mask than along the same borders moved by 6 pixels."""
    on, off = [], []
    for image, mask in faces:
        step = abs(np.diff(np.asarray(image.convert("L"), np.float32), axis=1))
        border = np.diff(np.asarray(mask).astype(int), axis=1) != 0
        on.append(step[border].mean())
        off.append(step[np.roll(border, 6, axis=0)].mean())
    assert np.mean(on) > 1.5 * np.mean(off)


def test_dataset_and_resume(command, tmp_path):
    root = tmp_path / "faces"
    assert command("--out", root, *SMALL)[0] == 0
    made = files(root)
    assert {path.stem for path in made if path.parts[:2] == ("train", "images")} == {
        path.stem for path in made if path.parts[:2] == ("train", "masks")
    }
    assert len(made) == 3 + 3 + 1 + 2 + 1
    with Image.open(root / "train/masks/train_00000.png") as mask:
        assert (mask.mode, mask.size) == ("P", (64, 64))

    lost = root / "train/masks/train_00001.png"
    content, times = lost.read_bytes(), {path: path.stat().st_mtime_ns for path in made.values()}
    assert command("--out", root, *SMALL)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in files(root).values()} == times
    lost.unlink()
    status, out, _ = command("--out", root, *SMALL)
    assert status == 0
    assert "1 faces drawn, 5 kept" in out
    assert lost.read_bytes() == content


def test_processes_draw_the_same(tmp_path):
    script = Path(synth.__file__)
    subprocess.run([sys.executable, script, "--out", tmp_path / "two", "--workers", "2", *SMALL], check=True)
    synth.make_dataset(tmp_path / "one", train=3, dev=1, test=2, size=64, workers=1)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert [(name, path.read_bytes()) for name, path in one.items()] == [(n, p.read_bytes()) for n, p in two.items()]


def test_mistakes(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_text("not ours")
    command("--out", tmp_path / "drawn", *SMALL)
    for flags, word in (
        (("--out", tmp_path / "file/faces"), "file"),
        (("--out", tmp_path / "mine"), "mine"),
        (("--out", tmp_path / "drawn", *SMALL, "--seed", 1), "--seed"),
        (("--out", tmp_path / "new", "--train", -1), "must not be negative"),
        (("--out", tmp_path / "new", "--size", 5), "--size 32"),
    ):
        status, _, error = command(*flags)
        assert status == 2
        assert error.count("\n") == 1
        assert word in error
    assert command("--colour", "red")[0] == 2
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.jpg"]
