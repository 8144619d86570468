"""Training losses: cross-entropy (or focal) and Dice, on hard or soft labels."""

import torch
import torch.nn.functional as F

from labels import NUM_CLASSES

# Pixels processed at once by `training_loss`: few stay in a CPU's cache, many hide a GPU's launch time.
CPU_PIXELS, GPU_PIXELS = 1 << 15, 1 << 21


def segmentation_loss(
    logits, target, *, ce=1.0, dice=1.0, focal=0.0, class_weights=None, smoothing=0.0, dice_over="present"
):
    """ce * cross-entropy + dice * Dice, a scalar.

    logits (B, 19, H, W); target: int64 labels (B, H, W), or soft labels (B, 19, H, W) that add up to 1.

    - `focal` > 0 multiplies each pixel's cross-entropy by (1 - p)^focal, p being the true label's probability
      (arXiv 1708.02002); for soft labels each label's own term.
    - `class_weights` (19,) weight the labels' terms; the mean is over pixels, not over weights.
    - `smoothing` gives that fraction of each pixel's target to all labels equally (arXiv 1512.00567), in the
      cross-entropy only.
    - `dice_over`: "present" averages 1 - Dice over the labels in each image's target, as the official score does;
      "all" averages over all 19, with 1 added to numerator and denominator, which gives absent labels a value.
    """
    log_p = F.log_softmax(logits, 1)
    p = log_p.exp()
    loss = 0.0
    if ce:
        loss = ce * _cross_entropy(log_p, p, target, focal, class_weights, smoothing)
    if dice:
        loss = loss + dice * _dice(p, target, dice_over)
    return loss


def _dice(p, target, over):
    """1 - Dice, averaged over labels and images, of probabilities (B, 19, H, W)."""
    if target.dim() == 3 and p.device.type == "cpu":
        labels, zeros = target.flatten(1), p.new_zeros(len(p), NUM_CLASSES)
        intersection = zeros.scatter_add(1, labels, p.gather(1, target[:, None]).flatten(1))
        true = zeros.scatter_add(1, labels, torch.ones_like(labels, dtype=p.dtype))
    else:
        if target.dim() == 3:  # on a GPU so many additions to 19 bins would wait for each other
            target = (target[:, None] == torch.arange(NUM_CLASSES, device=p.device)[:, None, None]).to(p.dtype)
        intersection, true = (p * target).sum((2, 3)), target.sum((2, 3))
    smooth = 1.0 if over == "all" else 1e-5
    terms = 1 - (2 * intersection + smooth) / (p.sum((2, 3)) + true + smooth)
    if over == "present":  # soft labels of absent parts must be exactly 0
        present = (true > 0).to(terms.dtype)
        terms = (terms * present).sum(1) / present.sum(1)
    return terms.mean()


def _cross_entropy(log_p, p, target, focal, class_weights, smoothing):
    terms = log_p  # of every label at every pixel
    if focal:  # bounded away from 0, where an exponent below 1 has no finite slope
        terms = terms * (1 - p).clamp_min(1e-6) ** focal
    if class_weights is not None:
        terms = terms * class_weights[:, None, None]
    hard = target.dim() == 3
    loss = -terms.gather(1, target[:, None]).mean() if hard else -(terms * target).sum() / target[:, 0].numel()
    return torch.lerp(loss, -terms.mean(), smoothing) if smoothing else loss


def soft_labels(masks, stride=1, others=None, lam=None):
    """uint8 masks (B, H, W) to the fraction of each label in every stride x stride cell: (B, 19, H/stride, W/stride).

    With `lam` (B,) 0..1, `others` (B, H, W) are blended in with weight 1 - lam.
    """
    count, height, width = masks.shape
    soft = torch.zeros(count, NUM_CLASSES, height // stride, width // stride, device=masks.device)
    whole = torch.full((count,), 1 / stride**2, device=masks.device)
    for part, weight in [(masks, whole)] if lam is None else [(masks, whole * lam), (others, whole * (1 - lam))]:
        cells = F.pixel_unshuffle(part[:, None], stride).long()  # (B, stride^2, H/stride, W/stride)
        soft.scatter_add_(1, cells, weight[:, None, None, None].expand_as(cells))
    return soft


def training_loss(logits, target, **settings):
    """`segmentation_loss` of logits (B, 19, h, w) upsampled to the target's size: same value, same gradient.

    It is computed for a few images at a time, so that the 19 full-size maps of all images never exist together.
    """
    return _Chunked.apply(logits, target, settings)


class _Chunked(torch.autograd.Function):
    """The loss of a few images at a time; the gradient of each chunk is computed at once."""

    @staticmethod
    def forward(ctx, logits, target, settings):
        count, size = len(logits), target.shape[-2:]
        step = max(1, (CPU_PIXELS if logits.device.type == "cpu" else GPU_PIXELS) // (size[0] * size[1]))
        gradient, total = torch.empty_like(logits), 0
        for start in range(0, count, step):
            chunk = slice(start, start + step)
            fraction = len(target[chunk]) / count
            x = logits[chunk].detach().requires_grad_()
            with torch.enable_grad():
                full = x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear")
                loss = segmentation_loss(full, target[chunk], **settings) * fraction
            gradient[chunk] = torch.autograd.grad(loss, x)[0]
            total = total + loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, slope):
        return ctx.saved_tensors[0] * slope, None, None
