"""Augmentation keeps image and mask together and exchanges left and right."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from augment import PRESETS, Strength, augment, colour, draw, mix, slice_batch, soft_labels, warp
from labels import COLOURS, FLIP
from views import resize

COLOUR_TABLE = torch.tensor(COLOURS, dtype=torch.uint8)


def painted(count=4, side=64, seed=0):
    """Masks of smooth blobs, and images in which every label is painted in its colour."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 19, (count, 1, 4, 4), generator=generator).float()
    masks = F.interpolate(coarse, size=(side, side))[:, 0].byte()
    return COLOUR_TABLE[masks.long()].permute(0, 3, 1, 2).contiguous(), masks


def flips(count, **more):
    return draw(count, Strength(flip=1.0, **more), (0, 0, 0))


def test_flip_mirrors_and_exchanges_sides():
    images, masks = painted()
    flipped, labels = warp(images, masks, flips(4), 64)
    assert torch.allclose(flipped, images.flip(3).float() / 255, atol=1e-5)
    assert torch.equal(labels, torch.tensor(FLIP, dtype=torch.uint8)[masks.flip(2).long()])


def test_flip_without_exchange_is_the_reference_s_mistake():
    images, masks = painted()
    assert torch.equal(warp(images, masks, flips(4), 64, exchange_sides=False)[1], masks.flip(2))


def test_flipping_twice_is_the_identity():
    images, masks = painted()
    once_images, once = warp(images, masks, flips(4), 64)
    twice_images, twice = warp((once_images * 255).round().byte(), once, flips(4), 64)
    assert torch.equal(twice, masks) and torch.allclose(twice_images, images.float() / 255, atol=1e-5)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_nothing_drawn_is_the_area_average_that_prediction_uses(size):
    images, masks = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8), torch.zeros(2, 128, 128).byte()
    warped, _ = warp(images, masks, draw(2, Strength(), (0,)), size)
    assert torch.allclose(warped, resize(images, size, size), atol=1e-5)


def test_image_and_mask_move_together():
    images, masks = painted(count=8, side=256)
    strength = Strength(flip=0.0, rotate=25, scale=0.3, shift=0.15)
    moved, labels = warp(images, masks, draw(8, strength, (1, 2, 3)), 256)
    expected = COLOUR_TABLE[labels.long()].permute(0, 3, 1, 2).float() / 255
    wrong = (moved - expected).abs().amax(1) > 0.02
    # Away from edges every pixel has its own label's colour.
    ones = torch.ones(1, 1, 3, 3)
    same = (F.unfold(labels[:, None].float(), 3, padding=1).view(8, 9, 256, 256) == labels[:, None]).all(1)
    inner = F.conv2d(same[:, None].float(), ones, padding=1)[:, 0] == 9
    assert inner[:, 4:-4, 4:-4].float().mean() > 0.7 and not (wrong & inner)[:, 4:-4, 4:-4].any()


def test_warp_equals_the_plain_resampling():
    images, masks = painted(count=4, side=128)
    drawn = draw(4, Strength(flip=0.5, rotate=180, scale=1.5, shift=0.6), (3, 2, 1))
    points = F.affine_grid(drawn["theta"], (4, 1, 64, 64), align_corners=False)
    plain = F.grid_sample(images.float() / 255, points, padding_mode="reflection", align_corners=False)
    nearest = F.grid_sample(
        masks[:, None].float(), points, mode="nearest", padding_mode="reflection", align_corners=False
    )[:, 0].byte()
    warped, labels = warp(images, masks, drawn, 64, exchange_sides=False)
    assert torch.allclose(warped, plain, atol=1e-3)  # far outside, rounding of the place is a share of a pixel
    assert (labels != nearest).float().mean() < 1e-3


def test_colour_equals_its_plain_steps():
    images = torch.rand(4, 3, 32, 32)
    drawn = draw(4, Strength(brightness=0.3, contrast=0.3, saturation=0.3), (3, 2, 1))
    saturation, contrast, brightness = (drawn[k][:, None, None, None] for k in ("saturation", "contrast", "brightness"))
    grey = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    plain = torch.lerp(grey, images, saturation)
    plain = torch.lerp(grey.mean((2, 3), keepdim=True), plain, contrast) * brightness
    assert torch.allclose(colour(images, drawn), plain.clamp(0, 1), atol=1e-5)


def test_each_image_draws_its_own():
    theta = draw(8, Strength(**PRESETS["strong"]), (1, 0, 0))["theta"]
    assert len({tuple(row.flatten().tolist()) for row in theta}) == 8


def test_same_seed_same_batch_and_other_step_another():
    images, masks = painted()
    strength = Strength(**PRESETS["advanced"])
    first, again, other = (
        augment(images, masks, draw(4, strength, seed), 64)[0] for seed in ((1, 2, 3), (1, 2, 3), (1, 2, 4))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_processes_together_see_the_whole_batch():
    images, masks = painted(count=8)
    drawn = draw(8, Strength(**{**PRESETS["advanced"], "noise": 1.0}), (5, 6, 7))
    whole, target = augment(images, masks, drawn, 64, stride=2)
    for start in (0, 4):
        share = augment(
            images[start : start + 4], masks[start : start + 4], slice_batch(drawn, start, start + 4), 64, stride=2
        )
        assert torch.allclose(share[0], whole[start : start + 4], atol=1e-6)
        assert torch.allclose(share[1], target[start : start + 4], atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_soft_labels_are_shares(stride):
    _, masks = painted()
    shares = soft_labels(masks, stride)
    assert torch.allclose(shares.sum(1), torch.ones(()), atol=1e-6)
    assert shares[1, int(masks[1, 0, 0]), 0, 0] == 1


@pytest.mark.parametrize(
    "strength", [Strength(mixup=1.0, mixup_alpha=1.0), Strength(cutmix=1.0), Strength(mixup=0.5, cutmix=0.5)]
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_mixed_labels_add_up_to_one(strength, count):
    images, masks = painted(count)
    mixed, target = mix(images.float() / 255, masks, draw(count, strength, (3, 3, 3)), 2)
    assert torch.allclose(target.sum(1), torch.ones(()), atol=1e-5) and mixed.shape == images.shape


def test_mixup_blends_labels_as_it_blends_images():
    images, masks = painted(2)
    drawn = draw(2, Strength(mixup=1.0, mixup_alpha=1.0), (0, 0, 1))
    mixed, target = mix(images.float() / 255, masks, drawn, 1)
    painted_target = torch.einsum("blhw,lc->bchw", target, COLOUR_TABLE.float() / 255)
    assert torch.allclose(painted_target, mixed, atol=1e-5) and 0 < drawn["lam"][0] < 1


def test_cutmix_pastes_image_and_mask_alike():
    images, masks = painted(2)
    mixed, labels = mix(images.float() / 255, masks, draw(2, Strength(cutmix=1.0), (0, 0, 1)), 1)
    assert torch.equal((mixed * 255).round().byte(), COLOUR_TABLE[labels].permute(0, 3, 1, 2))
    assert not torch.equal(labels, masks.long())


def test_colour_keeps_the_range_and_grey_stays_grey():
    drawn = draw(4, Strength(brightness=0.3, contrast=0.3, saturation=0.3, blur=1.0), (0, 1, 2))
    grey = torch.rand(4, 1, 32, 32).expand(4, 3, 32, 32)
    changed = colour(grey, drawn)
    assert changed.min() >= 0 and changed.max() <= 1
    assert torch.allclose(changed[:, 0], changed[:, 2], atol=1e-5) and not torch.allclose(changed, grey, atol=0.02)


def test_rotation_stays_within_its_bounds():
    theta = draw(500, Strength(rotate=15), (0, 0, 0))["theta"].numpy()
    angles = np.degrees(np.arctan2(theta[:, 1, 0], theta[:, 1, 1]))
    assert abs(angles).max() <= 15.001 and abs(angles).max() > 14
