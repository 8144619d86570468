"""From an image to a label map through one or several views: mirrored, rescaled, averaged.

One model seen through several views is still one model, as the challenge counts.
"""

import math

import torch
import torch.nn.functional as F

from errors import UserError
from labels import FLIP
from model import upsample

SCALES = (0.75, 1.0, 1.25)
WHOLE_PIXELS = 1 << 22  # of a picture whose 19 maps are held at once, 300 MB
PART_PIXELS = 1 << 18  # of the images that a processor is given at once: more leave its cache


def area(x, size):
    """Maps (B, C, H, W) averaged over the area of each pixel of `size` = (h, w)."""
    if x.device.type == "mps":  # where torch has it for whole factors only
        return F.interpolate(x.cpu(), tuple(size), mode="area").to(x.device)
    return F.interpolate(x, tuple(size), mode="area")


def resize(images, height, width):
    """uint8 images (B, 3, H, W) to float (B, 3, height, width), values 0..1: area averages down, bilinear up."""
    (down_y, rest_y), (down_x, rest_x) = divmod(images.shape[2], height), divmod(images.shape[3], width)
    if rest_y or rest_x or not down_y or not down_x:
        shrinks = height * width < images.shape[2] * images.shape[3]
        return (area if shrinks else upsample)(images.float() / 255, (height, width))
    if down_y == down_x == 1:
        return images.float().div_(255)
    # Whole factors are summed as integers, several times faster than pooling floats.
    counts = torch.int16 if 255 * down_y * down_x < 2**15 else torch.int32
    rows = images[:, :, ::down_y].to(counts)
    for i in range(1, down_y):
        rows += images[:, :, i::down_y]
    cells = rows[..., ::down_x].clone()
    for i in range(1, down_x):
        cells += rows[..., i::down_x]
    return cells.float().div_(255 * down_y * down_x)


def parse_views(text):
    """(flip, scales) of "", "flip", "scales", "flip,scales" or scales as numbers, as "flip,1,1.5"; UserError else."""
    flip, scales = False, []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part == "flip":
            flip = True
        elif part == "scales":
            scales += SCALES
        else:
            try:
                scales.append(float(part))
            except ValueError:
                raise UserError(f"--views {text}: {part!r} is neither flip, scales nor a number") from None
            if not 0.25 <= scales[-1] <= 4:
                raise UserError(f"--views {text}: scales are from 0.25 to 4")
    return flip, tuple(dict.fromkeys(scales)) or (1.0,)


def check_size(size):
    """UserError where a network cannot be given images of this side."""
    if size % 32 or not 32 <= size <= 2048:
        raise UserError(f"--size {size}: give a multiple of 32 from 32 to 2048, or 0 for the checkpoint's own")


def input_size(height, width, size, scale=1.0):
    """Height and width the network sees a picture at: its own shape, size * size * scale**2 pixels, multiples of 32."""
    shape = math.sqrt(height / width)
    return tuple(max(32, round(size * scale * side / 32) * 32) for side in (shape, 1 / shape))


def logits(model, images):
    """Logits (B, 19, h, w) on the model's own grid of images (B, 3, H, W), on a processor a few images at a time."""
    if images.device.type != "cpu":
        return model(images, full_size=False)
    count = max(1, round(PART_PIXELS / (images.shape[2] * images.shape[3])))
    return torch.cat([model(part, full_size=False) for part in images.split(count)])


@torch.inference_mode()
def log_probabilities(models, images, size, views=(False, (1.0,))):
    """Logarithm of the probabilities averaged over views and models: (B, 19, h, w) on the finest view's logit grid.

    images are uint8 (B, 3, H, W) on the models' device; `size` is the side of the square the models were trained on.
    """
    flip, scales = views
    average, count = None, 0
    # From the finest view down, so that coarser ones are brought to the finest grid.
    for scale in sorted(scales, reverse=True):
        view = resize(images, *input_size(*images.shape[2:], size, scale))
        for mirrored in (False, True) if flip else (False,):
            for model in models:
                if len(scales) == len(models) == 1 and not flip:
                    return logits(model, view).float().log_softmax(1)
                p = _probabilities(model, view, mirrored)
                if average is None:
                    average = p
                elif p.shape != average.shape:
                    average += upsample(p, average.shape[2:])
                else:
                    average += p
                del p  # before the next view takes its memory
                count += 1
    return average.div_(count).clamp_min_(1e-9).log_()


def _probabilities(model, view, mirrored):
    """Probabilities (B, 19, h, w) of images (B, 3, H, W), seen mirrored and mirrored back."""
    p = logits(model, view.flip(3) if mirrored else view).float().softmax(1)
    return p[:, FLIP].flip(3) if mirrored else p


@torch.inference_mode()
def label_map(log_p, height, width):
    """uint8 labels (B, height, width): the likeliest of (B, 19, h, w), upsampled before the choice is made."""
    if height * width > WHOLE_PIXELS:
        # Label by label: 19 maps of a camera's photo at once would fill a laptop's memory.
        best = torch.full((len(log_p), height, width), -math.inf, device=log_p.device)
        labels = torch.zeros(best.shape, dtype=torch.uint8, device=log_p.device)
        for label, one in enumerate(log_p.unbind(1)):
            one = upsample(one[:, None], (height, width))[:, 0]
            labels[one > best] = label
            best = torch.maximum(best, one)
        return labels
    # Channels-last, where a processor resizes twice and compares four times as fast.
    log_p = log_p.contiguous(memory_format=torch.channels_last)
    return torch.cat(
        [
            upsample(part, (height, width)).max(1).indices.byte()
            for part in log_p.split(1 if log_p.device.type == "cpu" else len(log_p))
        ]
    )
