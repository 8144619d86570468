"""The losses equal the plain formulas, for hard and soft labels, whole and in chunks."""

import pytest
import torch
import torch.nn.functional as F

import losses
from checks.conftest import cases
from losses import segmentation_loss, soft_labels, training_loss
from model import upsample

WEIGHTS = torch.linspace(0.1, 2, 19)
SETTINGS = [{}, {"focal": 2.0}, {"smoothing": 0.1}, {"dice_over": "all"}, {"dice": 0}, {"class_weights": WEIGHTS}]


@pytest.fixture
def batch():
    """Logits (3, 19, 16, 16) and labels (3, 16, 16)."""
    masks = torch.randint(0, 7, (3, 16, 16))
    masks[0, :8] = 18
    return torch.randn(3, 19, 16, 16), masks


@cases("over", ["present", "all"])
def test_dice_equals_the_formula(batch, over):
    logits, masks = batch
    p, images, smooth = logits.softmax(1), [], over == "all"
    for i in range(3):
        truths = {label: (masks[i] == label).float() for label in (range(19) if smooth else masks[i].unique())}
        terms = [(2 * (p[i, k] * t).sum() + smooth) / (p[i, k].sum() + t.sum() + smooth) for k, t in truths.items()]
        images.append(1 - torch.stack(terms).mean())
    expected = 0.7 * F.cross_entropy(*batch) + 1.5 * torch.stack(images).mean()
    assert torch.isclose(segmentation_loss(*batch, ce=0.7, dice=1.5, dice_over=over), expected, atol=1e-5)


def test_variants_of_cross_entropy_equal_the_formulas(batch):
    logits, masks = batch
    p = logits.softmax(1).gather(1, masks[:, None])
    for settings, expected in (
        ({"smoothing": 0.1}, F.cross_entropy(logits, masks, label_smoothing=0.1)),
        ({"class_weights": WEIGHTS}, F.cross_entropy(logits, masks, WEIGHTS) * WEIGHTS[masks].mean()),
        ({"focal": 2.0}, -((1 - p) ** 2 * p.log()).mean()),
    ):
        for target in (masks, soft_labels(masks.byte())):
            assert torch.isclose(segmentation_loss(logits, target, dice=0, **settings), expected, atol=1e-5)


@cases("pixels", [1, 2 * 16 * 16, 1 << 20])  # one image per chunk; two and one; all three
@cases("side", [4, 16])
@cases("settings", SETTINGS, ids=range(6))
def test_chunked_loss_and_gradient_equal_the_whole(batch, monkeypatch, settings, side, pixels):
    monkeypatch.setattr(losses, "CPU_PIXELS", pixels)
    logits, results = torch.randn(3, 19, side, side, requires_grad=True), []
    for target in (batch[1], soft_labels(batch[1].byte())):  # one-hot soft labels give the loss of hard ones
        whole = segmentation_loss(upsample(logits, (16, 16)), target, **settings)
        results += [
            (x, torch.autograd.grad(3 * x, logits)[0]) for x in (whole, training_loss(logits, target, **settings))
        ]
    for loss, gradient in results[1:]:
        assert torch.isclose(loss, results[0][0], atol=1e-5)
        assert torch.allclose(gradient, results[0][1], atol=1e-6)
