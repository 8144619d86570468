"""The losses equal the plain formulas, for hard and soft labels, whole and in chunks."""

import pytest
import torch
import torch.nn.functional as F

import losses
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


def plain_dice(logits, masks, over):
    p, images = logits.softmax(1), []
    for i in range(len(logits)):
        terms = []
        for label in range(19) if over == "all" else masks[i].unique():
            truth, smooth = (masks[i] == label).float(), over == "all"
            intersection = (p[i, label] * truth).sum()
            terms.append(1 - (2 * intersection + smooth) / (p[i, label].sum() + truth.sum() + smooth))
        images.append(torch.stack(terms).mean())
    return torch.stack(images).mean()


@pytest.mark.parametrize("over", ["present", "all"])
def test_ce_and_dice_equal_the_formulas(batch, over):
    expected = 0.7 * F.cross_entropy(*batch) + 1.5 * plain_dice(*batch, over)
    assert torch.isclose(segmentation_loss(*batch, ce=0.7, dice=1.5, dice_over=over), expected, atol=1e-5)


def test_variants_of_cross_entropy_equal_the_formulas(batch):
    logits, masks = batch
    p = logits.softmax(1).gather(1, masks[:, None])
    for settings, expected in (
        ({"smoothing": 0.1}, F.cross_entropy(logits, masks, label_smoothing=0.1)),
        ({"class_weights": WEIGHTS}, F.cross_entropy(logits, masks, WEIGHTS) * WEIGHTS[masks].mean()),
        ({"focal": 2.0}, -((1 - p) ** 2 * p.log()).mean()),
    ):
        assert torch.isclose(segmentation_loss(logits, masks, dice=0, **settings), expected, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_one_hot_soft_labels_give_the_loss_of_hard_ones(batch, settings):
    logits, masks = batch
    hard, soft = (segmentation_loss(logits, t, **settings) for t in (masks, soft_labels(masks.byte())))
    assert torch.isclose(soft, hard, atol=1e-5)


@pytest.mark.parametrize("pixels", [1, 2 * 16 * 16, 1 << 20])  # one image per chunk; two and one; all three
@pytest.mark.parametrize("side", [4, 16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_chunked_loss_and_gradient_equal_the_whole(batch, monkeypatch, settings, side, pixels):
    monkeypatch.setattr(losses, "CPU_PIXELS", pixels)
    for target in (batch[1], soft_labels(batch[1].byte())):
        logits = torch.randn(3, 19, side, side, requires_grad=True)
        whole = segmentation_loss(upsample(logits, (16, 16)), target, **settings)
        chunked = training_loss(logits, target, **settings)
        assert torch.isclose(chunked, whole, atol=1e-6)
        assert torch.allclose(*(torch.autograd.grad(3 * x, logits)[0] for x in (chunked, whole)), atol=1e-7)
