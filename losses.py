"""Training losses: CE (or focal), Dice and Lovasz, on hard or soft labels, in one pass over the log-probabilities.

python train.py --ce 1.0 --dice 1.5
python train.py --focal 2 --dice 1 --dice-over all
"""

import torch
import torch.nn.functional as F

from labels import NUM_CLASSES
from model import upsample


def label_sums(values, labels):
    """Sum of values (B, H, W) over the pixels of each label of labels (B, H, W): (B, 19)."""
    sums = values.new_zeros(len(values), NUM_CLASSES)
    return sums.scatter_add(1, labels.flatten(1), values.flatten(1))


def segmentation_loss(
    logits, target, *, ce=1.0, dice=1.0, focal=0.0, class_weights=None, smoothing=0.0, dice_over="present", lovasz=0.0
):
    """ce * cross-entropy + dice * Dice + lovasz * Lovasz-softmax, a scalar.

    logits (B, 19, H, W); target int64 labels (B, H, W) or shares (B, 19, H, W) that add up to 1.

    - `focal` > 0 multiplies each pixel's cross-entropy by (1 - p)^focal, p the true label's probability
      (arXiv 1708.02002); for soft labels each label's own term.
    - `class_weights` (19,) weigh the labels' terms; the mean is over pixels, not over weights, so that shares of a
      batch on several processes average to the whole.
    - `smoothing` gives that share of each pixel's target to all labels alike (arXiv 1512.00567); Dice keeps the
      labels as they are.
    - `dice_over`: "present" averages 1 - Dice over the labels of each image's own target, which is what the
      official score rewards; "all" over all 19 with the usual smoothing by one pixel, so that an absent label counts
      1 - 1/(1 + its predicted pixels). Small parts are a few cells of a small grid: there a pixel of smoothing hides
      them, so "present" goes without.
    - `lovasz` weighs `lovasz_softmax`, on the likeliest label where the target is soft.
    """
    log_p = F.log_softmax(logits, 1)
    p = log_p.exp()
    hard = target.dim() == 3
    loss = logits.new_zeros(())
    if ce:
        loss = ce * _cross_entropy(log_p, p, target, hard, focal, class_weights, smoothing)
    if dice:
        predicted = p.sum((2, 3))
        if hard:
            intersection = label_sums(p.gather(1, target[:, None])[:, 0], target)
            true = label_sums(torch.ones_like(target, dtype=p.dtype), target)
        else:
            intersection, true = (p * target).sum((2, 3)), target.sum((2, 3))
        loss = loss + dice * _dice(intersection, predicted, true, dice_over)
    if lovasz:
        loss = loss + lovasz * lovasz_softmax(p, target if hard else target.argmax(1))
    return loss


def _dice(intersection, predicted, true, over):
    """The Dice loss from sums over pixels (B, 19) of p * target, p and target."""
    smooth = 1.0 if over == "all" else 1e-5
    terms = 1 - (2 * intersection + smooth) / (predicted + true + smooth)
    if over == "present":
        present = (true > 0).to(terms.dtype)
        terms = (terms * present).sum(1) / present.sum(1)
    return terms.mean()


def loss_and_gradient(
    logits, target, *, ce=1.0, dice=1.0, dice_over="present", focal=0.0, class_weights=None, smoothing=0.0, lovasz=0.0
):
    """`segmentation_loss` and its gradient by the logits (B, 19, H, W); CE with Dice alone in half the passes.

    The derivative of the softmax is p * (slope - the sum over labels of p * slope), slope being Dice's gradient by p.
    """
    if focal or smoothing or lovasz or class_weights is not None:
        with torch.enable_grad():
            x = logits.detach().requires_grad_()
            loss = segmentation_loss(
                x, target, ce=ce, dice=dice, focal=focal, class_weights=class_weights, smoothing=smoothing,
                dice_over=dice_over, lovasz=lovasz,
            )  # fmt: skip
        return loss.detach(), torch.autograd.grad(loss, x)[0]
    hard, p = target.dim() == 3, logits.softmax(1)
    of_ce = ce / (p.numel() / p.shape[1])
    if hard:
        p_true = p.gather(1, target[:, None])
        cross_entropy = -of_ce * p_true.clamp_min(TINY).log().sum()
        intersection, true = (label_sums(x[:, 0], target) for x in (p_true, torch.ones_like(p_true)))
    else:
        cross_entropy = -of_ce * (p.clamp_min(TINY).log_() * target).sum()
        intersection, true = (p * target).sum((2, 3)), target.sum((2, 3))
    with torch.enable_grad():
        sums = [x.requires_grad_() for x in (intersection, p.sum((2, 3)))]
        dice_loss = dice * _dice(*sums, true, dice_over)
    by_intersection, by_predicted = torch.autograd.grad(dice_loss, sums)
    if hard:
        own = by_intersection.gather(1, target.flatten(1)).view_as(p_true) * p_true - of_ce
        shift = torch.einsum("bchw,bc->bhw", p, by_predicted)[:, None] + own
        gradient = (by_predicted[:, :, None, None] - shift).mul_(p).scatter_add_(1, target[:, None], own)
    else:
        slope = torch.addcmul(by_predicted[:, :, None, None], by_intersection[:, :, None, None], target)
        gradient = torch._softmax_backward_data(slope, p, 1, p.dtype).add_(p - target, alpha=of_ce)
    return cross_entropy + dice_loss.detach(), gradient


# The least probability whose logarithm is taken: a pixel's cross-entropy ends at 87.
TINY = torch.finfo(torch.float32).tiny


class _InParts(torch.autograd.Function):
    """The loss of a few images at a time, each part's gradient taken at once, so that no map of all images is kept."""

    @staticmethod
    def forward(ctx, logits, target, settings):
        count, (height, width) = len(logits), target.shape[-2:]
        step = max(1, PART_PIXELS[logits.device.type == "cpu"] // (height * width))
        gradient, total = torch.empty_like(logits), 0
        for start in range(0, count, step):
            part = slice(start, start + step)
            share = len(target[part]) / count
            x = logits[part].detach().contiguous().requires_grad_()
            with torch.enable_grad():
                full = x if x.shape[-2:] == (height, width) else upsample(x, (height, width))
            loss, slope = loss_and_gradient(full.detach(), target[part], **settings)
            if full is not x:  # in channels-last memory, where resizing's gradient is four times as fast
                slope = torch.autograd.grad(full, x, slope.contiguous(memory_format=torch.channels_last))[0]
            gradient[part] = slope.mul_(share)
            total = total + loss * share
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, share):
        return ctx.saved_tensors[0] * share, None, None


# Pixels of a part: as few as fill a processor's cache, or on a GPU as many as hide the time a launch takes.
PART_PIXELS = {True: 1 << 15, False: 1 << 21}


def training_loss(logits, target, **settings):
    """`segmentation_loss` of logits (B, 19, h, w) brought to the size of the target, the same value and gradient.

    The 19 maps at the target's size and their gradients exist for a few images at a time only.
    """
    return _InParts.apply(logits, target, settings)


def lovasz_softmax(p, labels):
    """The convex surrogate of 1 - Jaccard over the labels present in each image, a scalar (arXiv 1705.08790).

    p (B, 19, H, W) probabilities; labels int64 (B, H, W).
    """
    true = F.one_hot(labels.flatten(1), NUM_CLASSES).transpose(1, 2).to(p.dtype)  # (B, 19, N)
    errors, order = (true - p.flatten(2)).abs().sort(2, descending=True)
    true = true.gather(2, order)
    total = true.sum(2, keepdim=True)
    jaccard = 1 - (total - true.cumsum(2)) / (total + (1 - true).cumsum(2))
    gradient = torch.cat([jaccard[..., :1], jaccard.diff(dim=2)], 2)
    present = (total[..., 0] > 0).to(p.dtype)
    return (((errors * gradient).sum(2) * present).sum(1) / present.sum(1)).mean()


def _cross_entropy(log_p, p, target, hard, focal, class_weights, smoothing):
    if hard:
        terms = log_p.gather(1, target[:, None])
        if focal:
            terms = terms * _modulation(p.gather(1, target[:, None]), focal)
        if class_weights is not None:
            terms = terms * class_weights[target][:, None]
    else:
        terms = _weigh(log_p, p, focal, class_weights) * target
    loss = -terms.sum() / target[:, :1].numel() if not hard else -terms.mean()
    if smoothing:
        loss = torch.lerp(loss, -_weigh(log_p, p, focal, class_weights).mean(), smoothing)
    return loss


def _modulation(p, focal):
    """The focal factor (1 - p)^focal, bounded away from 0, where an exponent below 1 has no finite slope."""
    return (1 - p).clamp_min(1e-6) ** focal


def _weigh(log_p, p, focal, class_weights):
    """Every label's log-probability at every pixel, with its focal and class weight."""
    terms = log_p * _modulation(p, focal) if focal else log_p
    return terms if class_weights is None else terms * class_weights[:, None, None]
