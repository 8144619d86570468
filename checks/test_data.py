"""Training pairs: found, split as the reference does, decoded once, reversed masks repaired."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

from common import UserError

import numpy as np
import pytest
import torch
from PIL import Image

from checks.conftest import cases, encoded, write
from checks.test_data_tools import TURNED
from data import (
    SYNTHETIC,
    Batches,
    _build_cache,
    find_data,
    find_data_of,
    find_pairs,
    load_pairs,
    reversed_sides,
    split,
    swap_sides,
)
from images import image_hash, mask_image, read_image

FACE = np.zeros((512, 512), np.uint8)  # eyes and nose
FACE[200:260, 150:200], FACE[200:260, 300:350], FACE[280:330, 230:270] = 5, 4, 2


@pytest.fixture
def data(tmp_path):
    """A data folder of three pairs; the sides of the last mask are reversed."""
    for number, mask in enumerate((FACE, FACE, swap_sides(FACE))):
        image = Image.effect_noise((512, 512), 90).convert("RGB")
        files = {f"images/{number}.jpg": encoded(image, "JPEG"), f"masks/{number}.png": encoded(mask_image(mask))}
        write(files, tmp_path / "data/train")
    return tmp_path / "data"


def load(data):
    return load_pairs(data, data.parent / "cache")


def test_split_equals_the_reference():
    np.random.seed(42)
    order = np.random.permutation(900)
    train, validation = split(900)
    assert train.tolist() == order[:810].tolist() and validation.tolist() == order[810:].tolist()
    with pytest.raises(UserError, match="no images are left"):
        split(4, 0.5, hashes=["same"] * 4)


def test_cache_is_built_again_only_if_files_change_or_it_is_truncated(data, monkeypatch):
    path = load(data).path
    content, built = path.read_bytes(), path.stat().st_mtime_ns
    load(data)
    _build_cache(path, find_pairs(data))  # after another process, for which it waited
    assert path.stat().st_mtime_ns == built
    os.truncate(path, len(content) // 2)
    assert load(data).path.read_bytes() == content
    mask_image(np.full((512, 512), 3, np.uint8)).save(find_pairs(data)[0][1])
    assert (load(data).masks[0] == 3).all()
    monkeypatch.setattr("data._digest", Mock(side_effect=["before", "after"]))
    with pytest.raises(UserError, match="changed while they were read"):
        load(data)


@cases("start", [0, 3 * 512**2, 4 * 512**2])  # an image, a mask, the flag of a reversed mask
def test_a_damaged_cache_is_not_trusted(data, start):
    whole = np.memmap(load(data).path, np.uint8, "r+")
    whole[start] ^= 1
    whole.flush()
    with pytest.raises(UserError, match="is damaged; delete it"):
        load(data).batch(np.arange(3))


@cases("fix_sides", [True, False])
def test_batches_have_the_pixels_of_the_files_and_reversed_masks_are_repaired_unless_disabled(data, fix_sides):
    pairs = load(data)
    assert pairs.reversed.tolist() == [False, False, True]
    batches = Batches(pairs, np.array([2, 0]), torch.device("cpu"), fix_sides)
    images, masks = batches.read(np.array([0, 1]))
    assert np.array_equal(masks[0], FACE if fix_sides else swap_sides(FACE)) and np.array_equal(masks[1], FACE)
    for image, number in zip(images.permute(0, 2, 3, 1), "20", strict=True):
        assert np.array_equal(image, read_image(data / f"train/images/{number}.jpg"))


# Left eyes, brows and ears are 4, 6 and 8: in the third mask they disagree, in the fifth the centroids are equal.
@cases("mask", ["5 0 4", "4 1 7", "8 7 4 5 6 9", "0 1 13", "4 5 4", "4 0 5", "8 6 4 5 7 9", "4 0 5 4"])
def test_reversed_sides(mask):
    assert reversed_sides(np.array([mask.split()], np.uint8)) == (mask in ("4 0 5", "8 6 4 5 7 9", "4 0 5 4"))


FAULTS = {
    "no partner": lambda image, mask: mask.unlink(),
    "share a partner": lambda image, mask: shutil.copy(image, image.with_suffix(".webp")),
    "share": lambda image, mask: shutil.copy(mask, mask.with_suffix(".webp")),
    "EXIF orientation": lambda image, mask: Image.open(image).save(image, exif=TURNED),
    "cannot read image": lambda image, mask: image.write_bytes(image.read_bytes()[:3000]),
    "label 200": lambda image, mask: mask_image(np.full((512, 512), 200, np.uint8)).save(mask),
    "512 x 100": lambda image, mask: mask_image(np.zeros((100, 512), np.uint8)).save(mask),
    "mode RGB": lambda image, mask: Image.new("RGB", (512, 512), "pink").save(mask),
}


@cases("error", FAULTS)
def test_faulty_pairs_are_refused_and_leave_no_cache(data, error):
    FAULTS[error](*find_pairs(data)[0])
    with pytest.raises(UserError, match=error):
        load(data)
    assert not list(data.parent.glob("cache/*"))


def test_a_run_on_synthetic_faces_is_evaluated_on_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("data", SYNTHETIC, "runs/a"):
        Path(folder).mkdir(parents=True)
    for drawn, expected in ((True, SYNTHETIC), (False, Path("data"))):
        Path("runs/a/args.json").write_text(json.dumps({"args": {"data": None}, "pairs": {"drawn": drawn}}))
        assert find_data_of("runs/a/best.pt") == expected
    shutil.rmtree(SYNTHETIC)
    monkeypatch.setattr("subprocess.run", draw := Mock(return_value=Mock(returncode=0)))
    assert find_data(str(SYNTHETIC)) == SYNTHETIC and "tools.synth" in draw.call_args[0][0]


def test_hash_of_an_image_stays_that_of_older_checkpoints():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    planes = b"".join(pixels[..., channel].tobytes() for channel in range(3))
    assert image_hash(pixels) == hashlib.sha256(planes).digest()[:16]
