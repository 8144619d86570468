"""Augmentation moves image and mask together, exchanges left and right, and depends on its seed alone."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from augment import PRESETS, Strength, augment, blur, colour, degrade, draw, jpeg, mix, warp
from checks.conftest import cases, encoded
from images import read_image
from labels import COLOURS, FLIP
from losses import soft_labels
from views import resize

COLOUR_TABLE = torch.tensor(COLOURS, dtype=torch.uint8)
LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


def painted(count=4, side=64):
    """Images whose pixels have the colour of their label, and the masks of smooth blobs."""
    coarse = torch.randint(0, 19, (count, 1, 4, 4)).float()
    masks = F.interpolate(coarse, size=(side, side))[:, 0].byte()
    return COLOUR_TABLE[masks.long()].permute(0, 3, 1, 2).contiguous(), masks


@cases("exchange", [True, False])
def test_flip_mirrors_the_image_and_exchanges_sides(exchange):
    images, masks = painted()
    flipped, labels = augment(images, masks, draw(4, Strength(flip=1.0), (0, 0, 0)), 64, exchange_sides=exchange)
    assert torch.allclose(flipped, images.flip(3).float() / 255, atol=1e-5)
    assert [0, 1, 2, 3, 5, 4, 7, 6, 9, 8, *range(10, 19)] == FLIP
    mirrored = masks.flip(2)
    assert torch.equal(labels, torch.tensor(FLIP)[mirrored.long()] if exchange else mirrored.long())


@cases("size", [24, 64, 80, 128])
def test_no_augmentation_equals_the_resizing_of_prediction(size):
    images, masks = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8), torch.zeros(2, 128, 128).byte()
    params = draw(2, Strength(empty=1), (0,))
    params["surround"][:, 3] = 0
    warped, _ = warp(images, masks, params["theta"], size, params["surround"])
    assert torch.allclose(warped, resize(images, size, size), atol=1e-5)


def test_warp_samples_the_reflected_or_surrounded_image():
    images, masks = painted(8, side=128)
    params = draw(8, Strength(flip=0.5, rotate=180, scale=1.5, shift=0.6, empty=0.5), (3, 2, 1))
    points = F.affine_grid(params["theta"], (8, 1, 64, 64), align_corners=False)
    tint, roll = params["surround"][:, :3], params["surround"][:, 3]
    turn = torch.exp(-1j * roll.double())[:, None, None]
    turned = torch.view_as_real(torch.view_as_complex(points.double()) * turn)
    empty = ((points.abs() > 1) | (turned.abs() > 1)).any(3) & (tint[:, 0] >= 0)[:, None, None]
    assert (tint[:, 0] < 0).any() and (tint[:, 0] > 0).any() and 0.05 < empty.float().mean() < 0.5
    assert (roll == 0).any() and (roll[tint[:, 0] >= 0].abs() > 0.1).any()
    reflected = 1 - ((points.double() + 1) % 4 / 2 - 1).abs()  # 0..1 from the left and from the top
    x, y = (reflected * 128).long().clamp(max=127).unbind(3)
    nearest = masks[torch.arange(8)[:, None, None], y, x] * ~empty
    expected = F.grid_sample(images.float() / 255, points, padding_mode="reflection", align_corners=False)
    expected = torch.where(empty[:, None], tint[:, :, None, None], expected)
    warped, labels = warp(images, masks, params["theta"], 64, params["surround"])
    # Far outside the image, rounding moves a point by a fraction of a pixel.
    assert torch.allclose(warped, expected, atol=1e-3)
    assert (labels != nearest).float().mean() < 1e-3
    assert torch.equal(augment(images, masks, params, 64, exchange_sides=False)[1], labels.long())


def test_faces_are_turned_enlarged_and_shifted_by_the_strength_both_ways_without_shear():
    theta = draw(999, Strength(flip=0.5, rotate=20, scale=0.3, shift=0.1), (0,))["theta"]
    square = theta[:, :, :2] @ theta[:, :, :2].mT
    assert torch.allclose(square, square[:, :1, :1] * torch.eye(2), atol=1e-6)
    turn, zoom = torch.atan2(theta[:, 1, 0], theta[:, 1, 1]).rad2deg(), square[:, 0, 0].log() / 2
    for found, limit in ((turn, 20), (zoom, 0.3), (theta[:, :, 2] / 2, 0.1)):
        assert [found.min(), found.max()] == [pytest.approx(-limit, rel=0.05), pytest.approx(limit, rel=0.05)]


def test_colour_equals_its_three_steps():
    images = torch.rand(4, 3, 32, 32)
    params = draw(4, Strength(brightness=0.3, contrast=0.3, saturation=0.3), (3, 2, 1))
    saturation, contrast, brightness = (params[k].view(4, 1, 1, 1) for k in ("saturation", "contrast", "brightness"))
    grey = (images * LUMA).sum(1, keepdim=True)
    expected = torch.lerp(grey, images, saturation)
    expected = torch.lerp(grey.mean((2, 3), keepdim=True), expected, contrast) * brightness
    assert torch.allclose(colour(images, params), expected, atol=1e-5)


def test_each_preset_changes_no_less_than_the_weaker_one_and_every_preset_mirrors():
    order = [vars(Strength(**PRESETS[name])) for name in ("none", "basic", "strong", "robust")]
    for weak, strong in itertools.pairwise(order):
        assert strong["flip"] == 0.5 and weak != strong and all(weak[name] <= strong[name] for name in weak)
    mixing = {"mixup": 0.3, "cutmix": 0.3}
    assert PRESETS["advanced"] == PRESETS["basic"] | mixing
    assert {name for name, value in order[-1].items() if not value} == {"mixup", "cutmix"}


@cases("quality", [5, 10])
def test_jpeg_loses_what_a_file_loses(quality):
    pixels = read_image("docs/astronaut.jpg")[:256, :256]
    file = io.BytesIO(encoded(Image.fromarray(pixels), "JPEG", quality=quality))
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    original = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    ours = jpeg(original, quality).clamp(0, 1) * 255
    assert (ours - expected).abs().mean() < 0.1 * (original * 255 - expected).abs().mean()


def test_low_quality_changes_neither_the_other_images_nor_the_other_numbers():
    low = dict(grey=0.2, gamma=0.2, dark=0.2, reduce=0.4, defocus=0.4, grain=0.2, jpeg=0.2)
    plain, params = (draw(64, Strength(**PRESETS["basic"] | change), (1, 2, 3)) for change in ({}, low))
    changed = {name for name in plain if not torch.equal(plain[name], params[name])}
    assert changed == {"saturation", "brightness", "gamma", "reduce", "defocus", "grain", "jpeg"}
    assert (params["brightness"] <= 1.2).all() and (params["brightness"] < 0.5).any()
    assert not ((params["reduce"] < 1) & (params["defocus"] > 0)).any()
    images = torch.rand(64, 3, 64, 64)
    same = (degrade(images.clone(), params) == images).flatten(1).all(1)
    untouched = (params["gamma"] == 1) & (params["reduce"] == 1)
    untouched &= (params["defocus"] == 0) & (params["grain"] == 0) & (params["jpeg"] == 0)
    assert same[untouched].all() and 0 < untouched.sum() < 40


def test_a_reduced_image_keeps_only_its_cells():
    images = torch.rand(1, 3, 64, 64)
    params = draw(1, Strength(), (0,)) | {"reduce": torch.tensor([0.125]), "bicubic": torch.tensor([0.0])}
    expected = F.interpolate(F.avg_pool2d(images, 8), 64, mode="bilinear")
    assert torch.allclose(degrade(images.clone(), params), expected, atol=1e-6)
    dark = draw(1, Strength(), (0,)) | {"gamma": torch.tensor([3.0])}
    assert torch.allclose(degrade(images.clone(), dark), images * images * images, atol=1e-6)
    assert torch.allclose(blur(torch.full((3, 16, 16), 0.5), 2.0), torch.tensor(0.5))
    along = torch.arange(-16.0, 17)
    profile = blur((along == 0).float().expand(3, 33, 33), 2.0)[0, 16]  # of a vertical line
    assert (profile * along**2).sum().sqrt() == pytest.approx(2, abs=0.1)


RANGES = dict(dark=("brightness", 0.2, 0.7), reduce=("reduce", 1 / 16, 2 / 3), defocus=("defocus", 0, 1 / 128))
RANGES |= dict(gamma=("gamma", math.exp(-0.9), math.exp(0.9)), grain=("grain", 0, 0.13), jpeg=("jpeg", 5, 50))


@cases("name", RANGES)
def test_low_quality_spans_the_ranges_in_the_help(name):
    key, low, high = RANGES[name]
    found = draw(999, Strength(**{name: 1}), (0,))[key]
    assert [found.min(), found.max()] == [pytest.approx(value, rel=0.03, abs=0.01 * high) for value in (low, high)]


@cases("stride", [1, 2, 4])
def test_soft_labels_are_fractions_of_cells(stride):
    masks = torch.randint(0, 19, (2, 8, 8), dtype=torch.uint8)
    one_hot = F.one_hot(masks.long(), 19).permute(0, 3, 1, 2).float()
    assert torch.allclose(soft_labels(masks, stride), F.avg_pool2d(one_hot, stride), atol=1e-6)


@cases("count", [1, 5])
@cases("strength", [Strength(mixup=1.0, mixup_alpha=1.0), Strength(cutmix=1.0)])
def test_labels_are_mixed_as_the_images_are(count, strength):
    images, masks = painted(count)
    params = draw(count, strength, (0, 0, 1))
    mixed, target = mix(images.float() / 255, masks, params, params, 1)
    soft = target if target.dim() == 4 else soft_labels(target.byte())
    assert torch.allclose(torch.einsum("blhw,lc->bchw", soft, COLOUR_TABLE.float() / 255), mixed, atol=1e-5)
    assert count == 1 or not torch.allclose(mixed, images.float() / 255, atol=1e-3)


def test_cutmix_takes_a_box_of_the_fraction_drawn():
    boxes = draw(99, Strength(cutmix=1, cutmix_alpha=1000), (0,))["box"]  # such fractions are close to a half
    assert (boxes[:, 2:] - boxes[:, :2]).max() == pytest.approx(0.5**0.5, abs=0.03)
