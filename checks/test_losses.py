"""The loss equals the plain formulas, on hard and soft labels alike."""

import pytest
import torch
import torch.nn.functional as F

import losses
from augment import soft_labels
from losses import lovasz_softmax, segmentation_loss, training_loss
from model import upsample


@pytest.fixture
def batch():
    torch.manual_seed(0)
    masks = torch.randint(0, 7, (3, 16, 16))
    masks[0, :8] = 18
    return torch.randn(3, 19, 16, 16), masks


def plain_dice(logits, masks, over):
    p, terms = logits.softmax(1), []
    for i in range(len(logits)):
        own = []
        for label in range(19):
            truth = (masks[i] == label).float()
            smooth = 1 if over == "all" else 0
            if over == "all" or truth.any():
                overlap = (p[i, label] * truth).sum()
                own.append(1 - (2 * overlap + smooth) / (p[i, label].sum() + truth.sum() + smooth))
        terms.append(torch.stack(own).mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("over", ["present", "all"])
def test_ce_and_dice_equal_the_plain_formulas(batch, over):
    logits, masks = batch
    wanted = 0.7 * F.cross_entropy(logits, masks) + 1.5 * plain_dice(logits, masks, over)
    assert torch.isclose(segmentation_loss(logits, masks, ce=0.7, dice=1.5, dice_over=over), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"focal": 2.0}, {"smoothing": 0.1}, {"class_weights": torch.rand(19)}, {"dice_over": "all"}, {"dice": 0}],
)
def test_soft_labels_that_are_hard_give_the_same_loss(batch, settings):
    logits, masks = batch
    soft = soft_labels(masks.byte())
    assert torch.isclose(
        segmentation_loss(logits, soft, **settings), segmentation_loss(logits, masks, **settings), atol=1e-5
    )


def test_smoothing_equals_torch(batch):
    logits, masks = batch
    wanted = F.cross_entropy(logits, masks, label_smoothing=0.1)
    assert torch.isclose(segmentation_loss(logits, masks, dice=0, smoothing=0.1), wanted, atol=1e-5)


def test_focal_spares_what_is_sure(batch):
    _, masks = batch
    sure = F.one_hot(masks, 19).permute(0, 3, 1, 2).float() * 6
    plain, focal = (segmentation_loss(sure, masks, dice=0, focal=gamma) for gamma in (0.0, 2.0))
    assert focal < 0.01 * plain


def test_focal_of_a_small_exponent_has_a_slope_where_all_is_sure(batch):
    _, masks = batch
    sure = (F.one_hot(masks, 19).permute(0, 3, 1, 2).float() * 90).requires_grad_()
    segmentation_loss(sure, masks, focal=0.5).backward()
    assert sure.grad.isfinite().all()


def test_shares_of_a_batch_average_to_the_whole(batch):
    logits, masks = batch
    settings = {"class_weights": torch.rand(19), "smoothing": 0.1}
    parts = [segmentation_loss(logits[i : i + 1], masks[i : i + 1], **settings) for i in range(3)]
    assert torch.isclose(torch.stack(parts).mean(), segmentation_loss(logits, masks, **settings), atol=1e-5)


def test_perfect_prediction_costs_nothing(batch):
    _, masks = batch
    assert segmentation_loss(F.one_hot(masks, 19).permute(0, 3, 1, 2).float() * 50, masks) < 1e-4


def test_lovasz_equals_one_minus_jaccard_on_hard_predictions():
    # On hard predictions the surrogate is the loss itself (arXiv 1705.08790, section 2).
    labels = torch.randint(0, 4, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    predicted = labels.roll(1, 2)
    p = F.one_hot(predicted, 19).permute(0, 3, 1, 2).float()
    losses = []
    for one, true in zip(predicted, labels, strict=True):
        both = [((one == k) & (true == k)).sum() / ((one == k) | (true == k)).sum() for k in true.unique()]
        losses.append(1 - torch.stack(both).mean())
    assert torch.isclose(lovasz_softmax(p, labels), torch.stack(losses).mean(), atol=1e-6)


def test_lovasz_joins_the_loss_with_its_weight(batch):
    logits, masks = batch
    wanted = segmentation_loss(logits, masks) + 0.5 * lovasz_softmax(logits.softmax(1), masks)
    assert torch.isclose(segmentation_loss(logits, masks, lovasz=0.5), wanted)
    shares = F.one_hot(masks, 19).permute(0, 3, 1, 2).float()
    assert torch.isclose(segmentation_loss(logits, shares, lovasz=0.5), wanted, atol=1e-5)


@pytest.mark.parametrize("pixels", [16 * 16, 2 * 16 * 16, 1 << 20])  # images of a part: 1; 2 and 1; all 3
@pytest.mark.parametrize("side", [4, 16])
@pytest.mark.parametrize("others", [{}, {"ce": 0}, {"dice": 0}, {"dice_over": "all"}, {"smoothing": 0.1}, {"focal": 2}])
def test_loss_in_parts_equals_the_loss_of_the_whole(batch, monkeypatch, others, side, pixels):
    monkeypatch.setitem(losses.PART_PIXELS, True, pixels)
    masks, settings = batch[1], {"ce": 0.7, "dice": 1.5, **others}
    for target in (masks, soft_labels(masks.byte())):
        logits = torch.randn(3, 19, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
        whole = segmentation_loss(upsample(logits, (16, 16)), target, **settings)
        parts = training_loss(logits, target, **settings)
        assert torch.isclose(parts, whole, atol=1e-6)
        gradients = [torch.autograd.grad(3 * loss, logits)[0] for loss in (parts, whole)]
        assert torch.allclose(*gradients, atol=1e-7)
