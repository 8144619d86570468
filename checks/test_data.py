"""Pairs, split and cache: the reference's split, decoded once, never stale."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from data import Batches, Pairs, find_pairs, load_pairs, repeat_factors, split
from errors import UserError
from images import write_mask
from synth import make_dataset


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    make_dataset(root, train=6, dev=0, test=0, workers=1)
    return root


@pytest.fixture
def data(drawn, tmp_path):
    """A copy that a test may spoil."""
    for kind in ("images", "masks"):
        (tmp_path / "data/train" / kind).mkdir(parents=True)
        for path in (drawn / "train" / kind).iterdir():
            (tmp_path / "data/train" / kind / path.name).write_bytes(path.read_bytes())
    return tmp_path / "data"


def test_split_is_the_reference_s():
    np.random.seed(42)
    order = np.random.permutation(900)
    train, val = split(900)
    assert train.tolist() == order[:810].tolist() and val.tolist() == order[810:].tolist()


def test_split_of_nothing_trains_on_all():
    train, val = split(10, 0)
    assert sorted(train) == list(range(10)) and len(val) == 0


@pytest.mark.parametrize(("count", "share"), [(5, 0.01), (1, 0.9), (10, 1.0), (10, -0.1)])
def test_split_that_leaves_a_side_empty_is_refused(count, share):
    with pytest.raises(UserError, match="--val-split"):
        split(count, share)


def test_cache_holds_what_the_files_hold(data, tmp_path):
    pairs = load_pairs(data, tmp_path / "cache", workers=1)
    assert pairs.images.shape == (6, 3, 512, 512) and pairs.masks.shape == (6, 512, 512)
    for i, (image, mask) in enumerate(find_pairs(data)):
        assert np.array_equal(pairs.images[i], np.asarray(Image.open(image).convert("RGB")).transpose(2, 0, 1))
        assert np.array_equal(pairs.masks[i], np.asarray(Image.open(mask))) and pairs.names[i] == image.stem


def test_cache_is_made_where_the_system_reserves_no_blocks(data, tmp_path, monkeypatch):
    monkeypatch.delattr("os.posix_fallocate")
    held = load_pairs(data, tmp_path / "cache", workers=1)
    assert np.array_equal(held.images[5], np.asarray(Image.open(find_pairs(data)[5][0])).transpose(2, 0, 1))


def test_cache_is_made_once_and_not_used_for_other_files(data, tmp_path):
    load_pairs(data, tmp_path / "cache", workers=1)
    (first,) = (tmp_path / "cache").iterdir()
    made = first.stat().st_mtime_ns
    load_pairs(data, tmp_path / "cache", workers=1)
    assert first.stat().st_mtime_ns == made
    _, mask = find_pairs(data)[0]
    write_mask(mask, np.full((512, 512), 3, np.uint8))
    assert (load_pairs(data, tmp_path / "cache", workers=1).masks[0] == 3).all()


def test_cache_cut_short_is_made_again(data, tmp_path, capfd):
    load_pairs(data, tmp_path / "cache", workers=1)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    load_pairs(data, tmp_path / "cache", workers=1)
    assert path.read_bytes() == whole and "cut short" in capfd.readouterr().err


def test_reversed_masks_are_repaired_for_training_only(data, tmp_path):
    from sides import swap_sides

    _, path = find_pairs(data)[2]
    right = np.asarray(Image.open(path))
    write_mask(path, swap_sides(right))
    pairs = load_pairs(data, tmp_path / "cache", workers=1)
    assert pairs.reversed.tolist() == [False, False, True, False, False, False]
    assert np.array_equal(pairs.batch(np.array([2]))[1][0], right)
    assert np.array_equal(pairs.batch(np.array([2]), fix_sides=False)[1][0], swap_sides(right))


def spoil_lonely(train):
    next((train / "masks").iterdir()).unlink()


def spoil_damaged(train):
    path = sorted((train / "images").iterdir())[0]
    path.write_bytes(path.read_bytes()[:3000])


def spoil_label(train):
    write_mask(sorted((train / "masks").iterdir())[0], np.full((512, 512), 200, np.uint8))


def spoil_size(train):
    write_mask(sorted((train / "masks").iterdir())[0], np.zeros((100, 512), np.uint8))


def spoil_empty(train):
    for path in (train / "images").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_lonely, "lack a partner"),
        (spoil_damaged, "cannot read image"),
        (spoil_label, "label 200"),
        (spoil_size, "512 x 100"),
        (spoil_empty, "no images"),
    ],
)
def test_spoilt_data_is_named_and_leaves_no_cache(data, tmp_path, spoil, told):
    spoil(data / "train")
    with pytest.raises(UserError, match=told):
        load_pairs(data, tmp_path / "cache", workers=1)
    assert not list(tmp_path.glob("cache/*"))


def test_images_of_rare_labels_are_drawn_more_often():
    masks = np.zeros((40, 4, 4), np.uint8)
    masks[0, 0, 0] = 14  # in one image of forty
    masks[:20, 1] = 1
    factors = repeat_factors(masks, np.arange(40), 0.4)
    assert factors[0] == pytest.approx(4) and (factors[1:] == 1).all()
    pairs = Pairs(None, masks, np.zeros(40, bool), [""] * 40)
    batches = Batches(pairs, np.arange(40), torch.device("cpu"), True, 0.4)
    drawn = np.stack([batches.order((0, epoch)) for epoch in range(50)])
    assert drawn.shape == (50, 40) and (drawn == 0).sum(1).mean() == pytest.approx(4 * 40 / 43, abs=0.3)
    assert sorted(Batches(pairs, np.arange(40), torch.device("cpu"), True).order((0, 1))) == list(range(40))
