"""prepare.py: both forms of download become one layout; faulty ones are refused by name.

    make test
    python -m pytest checks/test_prepare.py

The downloads are drawn here, 32 x 32 and tiny.
"""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
from errors import UserError
from labels import COLOURS, NAMES, PALETTE

SIZE = 32
LABELS = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) // 8 % 19).astype(np.uint8)


def jpeg(size=SIZE, seed=0, mode="RGB"):
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))
    buffer = io.BytesIO()
    noise.resize((size, size)).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def mask_png(labels=LABELS):
    mask = Image.fromarray(labels)
    mask.putpalette(PALETTE)
    return png(mask)


def challenge():
    return {
        "train/images/a.jpg": jpeg(seed=1),
        "train/images/b.jpg": jpeg(seed=2),
        "train/masks/a.png": mask_png(),
        "train/masks/b.png": mask_png(LABELS[::-1].copy()),
        "test/images/t.jpg": jpeg(seed=3),
        "val/images/v.jpg": jpeg(seed=4),
    }


def release(numbers=(0, 1, 2000)):
    """Three portraits: skin on the left half, hair on the upper half, over it."""
    skin, hair = np.zeros((2, 64, 64), np.uint8)
    skin[:, :32] = hair[:32] = 255
    files = {}
    for number in numbers:
        files[f"CelebA-HQ-img/{number}.jpg"] = jpeg(2 * SIZE, number)
        for part, pixels in (("hair", hair), ("skin", skin)):
            name = f"CelebAMask-HQ-mask-anno/{number // 2000}/{number:05d}_{part}.png"
            files[name] = png(Image.fromarray(pixels).convert("RGB"))
    return files


def folder_of(files, folder):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def zip_of(files, path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def run(raw, out, **options):
    return prepare.prepare(raw, out, workers=1, **{"size": SIZE, **options})


def refusal(files, tmp_path, **options):
    with pytest.raises(UserError) as error:
        run(folder_of(files, tmp_path / "raw"), tmp_path / "out", **options)
    return str(error.value)


def labels_in(path):
    with Image.open(path) as mask:
        assert mask.mode == "P"
        return np.array(mask)


def listing(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_zip_with_prefix_gives_the_layout(tmp_path):
    files = {f"CE7454/data/{name}": data for name, data in challenge().items()}
    extra = {"__MACOSX/CE7454/data/train/images/._a.jpg": b"", "CE7454/data/train/images/.DS_Store": b""}
    run(zip_of(files | extra, tmp_path / "c.zip"), tmp_path / "out")
    names = ("train/images/a.jpg", "train/images/b.jpg", "train/masks/a.png", "train/masks/b.png")
    assert listing(tmp_path / "out") == {*names, "test/images/t.jpg", "dev/images/v.jpg"}


def test_images_of_the_right_size_are_copied_byte_for_byte(tmp_path):
    run(folder_of(challenge(), tmp_path / "raw"), tmp_path / "out")
    assert (tmp_path / "out/train/images/a.jpg").read_bytes() == challenge()["train/images/a.jpg"]


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(LABELS),
        Image.fromarray(np.array(COLOURS, np.uint8)[LABELS]),
        Image.open(io.BytesIO(mask_png())),
        Image.open(io.BytesIO(mask_png())).remap_palette([*range(18, -1, -1)]),
    ],
    ids=["L", "RGB", "P", "P with its palette reordered"],
)
def test_masks_of_every_mode_keep_their_labels(mask, tmp_path):
    files = challenge() | {"train/masks/a.png": png(mask)}
    run(folder_of(files, tmp_path / "raw"), tmp_path / "out")
    assert np.array_equal(labels_in(tmp_path / "out/train/masks/a.png"), LABELS)


def test_masks_carry_the_palette(tmp_path):
    run(folder_of(challenge(), tmp_path / "raw"), tmp_path / "out")
    with Image.open(tmp_path / "out/train/masks/a.png") as mask:
        assert mask.getpalette()[: len(PALETTE)] == PALETTE


@pytest.mark.parametrize("data", [jpeg(48), jpeg(mode="L"), png(Image.new("RGBA", (48, 40)))], ids=["big", "L", "RGBA"])
def test_other_images_become_rgb_jpegs_of_the_size(data, tmp_path):
    run(folder_of(challenge() | {"test/images/t.jpg": data}, tmp_path / "raw"), tmp_path / "out")
    with Image.open(tmp_path / "out/test/images/t.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIZE, SIZE))


def test_large_masks_are_resized_without_new_labels(tmp_path):
    files = challenge() | {"train/masks/a.png": mask_png(LABELS.repeat(2, 0).repeat(2, 1))}
    run(folder_of(files, tmp_path / "raw"), tmp_path / "out")
    assert np.array_equal(labels_in(tmp_path / "out/train/masks/a.png"), LABELS)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_release_is_painted_in_order_of_labels(packed, tmp_path):
    raw = zip_of(release(), tmp_path / "r.zip") if packed else folder_of(release(), tmp_path / "raw")
    run(raw, tmp_path / "out")
    skin, hair = NAMES.index("skin"), NAMES.index("hair")
    expected = np.kron([[hair, hair], [skin, 0]], np.ones((SIZE // 2, SIZE // 2), int))
    assert np.array_equal(labels_in(tmp_path / "out/train/masks/02000.png"), expected)


def test_count_takes_the_first_of_the_release(tmp_path):
    run(folder_of(release(), tmp_path / "raw"), tmp_path / "out", count=2)
    assert sorted(os.listdir(tmp_path / "out/train/images")) == ["00000.jpg", "00001.jpg"]


def test_second_run_rewrites_nothing(tmp_path):
    raw, out = folder_of(challenge(), tmp_path / "raw"), tmp_path / "out"
    run(raw, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert run(raw, out)[1] == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_interrupted_run_is_completed(tmp_path):
    raw, out = folder_of(challenge(), tmp_path / "raw"), tmp_path / "out"
    run(raw, out)
    (out / "train/masks/b.png").rename(out / "train/masks/.b.png.123.tmp")
    assert run(raw, out)[1] == 1
    assert sorted(os.listdir(out / "train/masks")) == ["a.png", "b.png"]


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.os, "replace", full)  # forked workers inherit it
    assert "No space left" in refusal(challenge(), tmp_path)
    assert not listing(tmp_path / "out")


@pytest.mark.parametrize("member", ["../evil.jpg", "/tmp/evil.jpg", "train/images/..\\evil.jpg", "C:/evil.jpg"])
def test_hostile_zip_member_is_refused(member, tmp_path):
    raw = zip_of(challenge() | {member: jpeg()}, tmp_path / "c.zip")
    with pytest.raises(UserError, match="points out of it"):
        run(raw, tmp_path / "out")


def test_damaged_zip_member_is_named(tmp_path):
    raw = zip_of(challenge(), tmp_path / "c.zip")
    raw.write_bytes(raw.read_bytes().replace(challenge()["train/images/b.jpg"], b"x" * len(jpeg(seed=2))))
    with pytest.raises(UserError, match=r"cannot read train/images/b\.jpg"):
        run(raw, tmp_path / "out")


@pytest.mark.parametrize("name", ["train/images/a.jpg", "train/masks/a.png", "test/images/t.jpg"])
@pytest.mark.parametrize("keep", [0, 30, -60], ids=["empty", "header only", "cut short"])
def test_damaged_image_is_named(name, keep, tmp_path):
    files = challenge()
    files[name] = files[name][:keep]
    assert f"damaged image {name}" in refusal(files, tmp_path)


def test_decompression_bomb_is_refused(tmp_path):
    bomb = png(Image.new("1", (9500, 9500)))
    assert "damaged image test/images/t.jpg" in refusal(challenge() | {"test/images/t.jpg": bomb}, tmp_path)


def test_huge_member_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_BYTES", 5000)
    bomb = challenge() | {"train/images/a.jpg": b"0" * 6000}
    assert "train/images/a.jpg is larger" in refusal(bomb, tmp_path)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Image.new("RGB", (SIZE, SIZE), (1, 2, 3)), "colours that are no label's"),
        (Image.new("L", (SIZE, SIZE), 19), "label 19"),
        (Image.new("I;16", (SIZE, SIZE), 1), "mode I;16"),
    ],
    ids=["foreign colour", "label 19", "16 bit"],
)
def test_unusable_mask_is_named(mask, reason, tmp_path):
    message = refusal(challenge() | {"train/masks/b.png": png(mask)}, tmp_path)
    assert "train/masks/b.png" in message
    assert reason in message


def test_lossy_mask_is_refused(tmp_path):
    assert "is a JPEG" in refusal(challenge() | {"train/masks/b.png": jpeg(mode="L")}, tmp_path)


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("masks/a.png", "1 training images without a mask (a)"),
        ("images/b.jpg", "1 training masks without an image (b)"),
    ],
)
def test_unpaired_files_are_named(lost, reason, tmp_path):
    files = challenge()
    del files[f"train/{lost}"]
    assert reason in refusal(files, tmp_path)


def test_two_files_of_one_name_are_refused(tmp_path):
    files = challenge() | {"train/images/a.png": png(Image.new("RGB", (SIZE, SIZE)))}
    assert "train/images/a.jpg and train/images/a.png" in refusal(files, tmp_path)


def test_two_candidate_folders_are_refused(tmp_path):
    assert "could be dev/images" in refusal(challenge() | {"dev/images/d.jpg": jpeg()}, tmp_path)


def test_both_forms_at_once_are_refused(tmp_path):
    assert "holds both" in refusal(challenge() | release(), tmp_path)


def test_unknown_part_is_refused(tmp_path):
    files = release() | {"CelebAMask-HQ-mask-anno/0/00000_nostril.png": b""}
    assert "00000_nostril.png" in refusal(files, tmp_path)


def test_parts_of_different_sizes_are_refused(tmp_path):
    files = release() | {"CelebAMask-HQ-mask-anno/0/00000_nose.png": png(Image.new("L", (16, 16)))}
    assert "differ in size" in refusal(files, tmp_path)


def test_other_data_in_the_output_is_not_mixed_with(tmp_path):
    run(folder_of(release(), tmp_path / "release"), tmp_path / "out")
    assert "files not of" in refusal(challenge(), tmp_path)


def test_output_inside_raw_is_not_read_again(tmp_path):
    raw = folder_of(challenge(), tmp_path / "raw")
    run(raw, raw / "out")
    assert run(raw, raw / "out")[1] == 0


def test_raw_inside_the_output_is_refused(tmp_path):
    folder_of(challenge(), tmp_path)
    with pytest.raises(UserError, match="lies in the output"):
        run(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: None, "no such file or folder"),
        (lambda p: p.mkdir(), "is empty"),
        (lambda p: p.write_text("text"), "no readable zip"),
        (lambda p: folder_of({"pictures/a.jpg": jpeg()}, p), "looked for train/images"),
    ],
    ids=["missing", "empty", "not a zip", "neither form"],
)
def test_unusable_raw_is_one_line_and_status_2(make, reason, tmp_path):
    make(tmp_path / "raw")
    script = Path(prepare.__file__)
    command = [sys.executable, script, "--raw", tmp_path / "raw", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert reason in done.stderr
