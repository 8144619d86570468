"""The official score and the losses by hand, whole and in chunks; views."""

import json

from common import UserError

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from checks.conftest import cases, encoded, write
from data import Pairs, split
from evaluate import batch_score, confusion, evaluate, held_out, label_scores, main, official_score, record_views
from images import mask_image
from labels import FLIP
from losses import segmentation_loss, soft_labels, training_loss
from model import build, upsample
from register import find_weights
from views import Views, input_size, log_probabilities, parse_views, resize


@cases(("shape", "labels", "right"), [((1, 1), 19, 0), ((40, 30), 19, 0.5), ((1, 9), 19, 0.5), ((3, 40), 5, 1)])
def test_score_is_the_mean_f_over_the_labels_in_the_truth(shape, labels, right):
    rng = np.random.default_rng(0)
    true, other = rng.integers(0, labels, (2, *shape), np.uint8)
    pred = np.where(rng.random(shape) < right, true, other)
    f = [2 * np.sum((pred == k) & (true == k)) / np.sum((pred == k) * 1 + (true == k)) for k in np.unique(true)]
    assert official_score(confusion(pred, true)[None]) == pytest.approx(np.mean(f), abs=1e-5)


def test_batch_and_label_scores_by_hand():
    # Two images of label 0 and one of label 1, all predicted as 0.
    confusions = np.stack([confusion(np.zeros((2, 2), np.uint8), np.full((2, 2), k, np.uint8)) for k in (0, 0, 1)])
    assert batch_score(confusions, batch=3) == pytest.approx((0.8 + 0) / 2, abs=1e-6)  # precision 8/12, recall 1
    f, images = label_scores(confusions)
    assert f[:2] == pytest.approx([1, 0], abs=1e-6) and np.isnan(f[2]) and images[:3].tolist() == [2, 1, 0]


@cases("scale", [0.5, 2])  # logits coarser and finer than the masks
def test_perfect_network_scores_1(scale):
    masks = np.zeros((3, 64, 64), np.uint8)
    masks[:, 10:40, 10:40], masks[:, 44:60, 44:60] = 1, 4
    resized = F.interpolate(torch.from_numpy(masks)[None], scale_factor=scale)[0]
    batches = iter((20.0 * F.one_hot(resized.long(), 19).permute(0, 3, 1, 2)).split(2))
    oracle = torch.nn.Identity()
    oracle.forward = lambda images, full_size: next(batches)
    images, names = np.zeros((3, 64, 64, 3), np.uint8), list("abc")
    pairs = Pairs(images, masks, np.ones(3, bool), names, "", None, hashes=[], verified={0, 1, 2})
    confusions, loss = evaluate(oracle, pairs, np.arange(3), 64, torch.device("cpu"), batch=2)
    assert official_score(confusions) > 0.98 and loss < 0.2 and oracle.training


def test_weights_are_scored_on_the_pairs_their_training_held_out():
    keys = [(f"name {i}", f"hash {i}") for i in range(40)]
    for content, expected in [
        ({"held_out": [keys[7], ("name 5", "gone"), ("renamed", "hash 3")], "trained_on": keys[1:2]}, [7, 3]),
        ({"held_out": ["name 9", "name 8"], "trained_on": ["name 1"]}, [9, 8]),  # of an older version
        ({"held_out": [], "trained_on": keys[2:]}, [0, 1]),
        ({"held_out": [], "trained_on": keys}, split(40)[1].tolist()),
        ({}, split(40)[1].tolist()),
    ]:
        assert held_out(content, "best.pt", keys).tolist() == expected


OTHER = ({"b": [[0]]}, 2, "are not in"), ({"a": [[200]]}, 2, "label 200"), ({"a": [[0, 0]]}, 2, "a.png")


@cases(("true", "status", "text"), [({"a": [[0]], "b": [[1]]}, 0, "1 of the 2 masks"), *OTHER])
def test_a_folder_of_masks_is_scored_if_the_truth_has_them_all(tmp_path, command, true, status, text):
    for kind, masks in (("pred", {"a": [[0]]}), ("true", true)):
        write({f"{kind}/{n}.png": encoded(mask_image(np.uint8(rows))) for n, rows in masks.items()}, tmp_path)
    ended, out, said = command(main, f"--masks={tmp_path}/pred", f"--truth={tmp_path}/true")
    assert ended == status and text in said and ("official score 1.0000" in out) == (status == 0)


def test_a_run_comes_before_a_file_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write({"a": b"", "b": b"", "runs/a/args.json": b"", "runs/a/best.pt": b""}, tmp_path))
    assert [str(find_weights(name)) for name in "ab"] == ["runs/a/best.pt", "b"]


def test_views_are_parsed():
    assert parse_views("") == parse_views("none") == Views(False, (1.0,))
    assert parse_views("flip, 1.5") == Views(True, (1.5,))
    assert parse_views("flip,scales") == Views(True, (0.75, 1.0, 1.25))
    for text in ("flop", "0", "nan", "99"):
        with pytest.raises(UserError, match="--views"):
            parse_views(text)


def test_flipped_view_of_a_mirrored_image_is_mirrored():
    network, images = build("microunet").eval(), torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    log_p, mirrored = (log_probabilities([network], x, 64, Views(flip=True)) for x in (images, images.flip(3)))
    assert torch.allclose(log_p, mirrored[:, FLIP].flip(3), atol=1e-4)


def test_input_has_the_aspect_ratio_of_the_image():
    assert input_size(512, 512, 256, 1.25) == (320, 320) and input_size(200, 800, 256) == (128, 512)
    assert input_size(10**6, 1, 512) == (8192, 32)
    widths, image = [], torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    network = lambda x, full_size: widths.append(x.shape[3]) or torch.zeros(1, 19, 8, 8)  # noqa: E731
    log_probabilities([network], image, 64, Views(scales=(0.5, 2.0)))
    assert widths == [128, 32]


@cases("size", [(4, 4), (12, 12), (5, 7), (24, 30)])
def test_resize_averages_down_and_interpolates_up(size):
    images = torch.randint(0, 256, (1, 3, 12, 12), dtype=torch.uint8)
    expected = F.interpolate(images.float() / 255, size, mode="bilinear")
    if size[0] <= 12:  # the average over each new pixel's area
        expected = F.avg_pool2d(images.double().repeat_interleave(size[0], 2).repeat_interleave(size[1], 3) / 255, 12)
    assert torch.allclose(resize(images, *size), expected.float(), atol=1e-6)


def test_scores_of_views_are_kept_with_the_run(tmp_path):
    confusions, path = np.eye(19, dtype=np.int64)[None], tmp_path / "best.json"
    path.write_text('{"official": 0.5, "image_scores": {"a": []}}')
    record_views(path, "flip", {"a"}, confusions)
    record_views(path, "none", {"a"}, confusions)
    kept = json.loads(path.read_text())
    assert kept["official"] == 0.5 and kept["views"].keys() == {"flip", "none"}
    assert kept["views"]["flip"] == {"official": pytest.approx(1), "batch32": pytest.approx(1)}
    for damaged in path.read_text(), "[]", '{"image_scores": null}':
        path.write_text(damaged)
        with pytest.raises(UserError, match="no scores of these 2 images"):
            record_views(path, "flip", {"a", "b"}, confusions)


def plain_loss(logits, masks, ce=1.0, dice=1.0, focal=0.0, class_weights=None, smoothing=0.0, dice_over="present"):
    """The formulas of `segmentation_loss`, for labels (B, H, W)."""
    p, true = logits.softmax(1), F.one_hot(masks, 19).permute(0, 3, 1, 2)
    terms = -((1 - p) ** focal) * p.log() * (torch.ones(19) if class_weights is None else class_weights)[:, None, None]
    entropy = (terms * torch.lerp(true.float(), torch.tensor(1 / 19), smoothing)).sum(1).mean()
    smooth = dice_over == "all"
    f = (2 * (p * true).sum((2, 3)) + smooth) / ((p + true).sum((2, 3)) + smooth)
    images = [one if smooth else one[mask.unique()] for one, mask in zip(f, masks, strict=True)]
    return ce * entropy + dice * (1 - torch.stack([image.mean() for image in images]).mean())


SETTINGS = [{"ce": 0.7, "dice": 1.5}, {"focal": 2.0}, {"smoothing": 0.1}, {"dice_over": "all"}, {"dice": 0}]


@cases("pixels", [1, 2 * 16 * 16, 1 << 20])  # one image per chunk; two and one; all three
@cases("side", [4, 16])
@cases("settings", [*SETTINGS, {"class_weights": torch.linspace(0.1, 2, 19)}], ids=range(6))
def test_loss_and_gradient_equal_the_formulas_whole_and_in_chunks(monkeypatch, settings, side, pixels):
    monkeypatch.setattr(losses, "CPU_PIXELS", pixels)
    masks, logits = torch.randint(0, 7, (3, 16, 16)), torch.randn(3, 19, side, side, requires_grad=True)
    masks[0, :8] = 18
    expected = plain_loss(upsample(logits, (16, 16)), masks, **settings)
    for target in (masks, soft_labels(masks.byte())):
        whole = segmentation_loss(upsample(logits, (16, 16)), target, **settings)
        for loss in (whole, training_loss(logits, target, **settings)):
            assert torch.isclose(loss, expected, atol=1e-5)
            gradients = (torch.autograd.grad(3 * x, logits, retain_graph=True)[0] for x in (loss, expected))
            assert torch.allclose(*gradients, atol=1e-6)
