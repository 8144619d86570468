"""From images to label maps, averaged over one or several views: mirrored, rescaled.

One model applied to several views is still one model by the challenge's rules.
"""

import contextlib
import functools
import itertools
import math
from typing import NamedTuple

from common import UserError

import torch
import torch.nn.functional as F

from labels import FLIP
from model import upsample

MAX_WEIGHTS = 1 << 24  # of `area` in one dimension: images longer than that are averaged over whole pixels
VIEW_PIXELS = 1 << 18  # pixels a CPU processes at once: more would leave its cache


class Views(NamedTuple):
    """The views to average: every scale, and its mirror image if `flip`."""

    flip: bool = False
    scales: tuple = (1.0,)


ONE_VIEW = Views()


def parse_views(text):
    """Views of "" or "none", "flip", "scales", "flip,scales", or numbers as in "flip,1,1.5"; else UserError."""
    if not isinstance(text, str):
        raise UserError(f"views must be text such as flip,scales, not {text!r}")
    names, scales = {"": [], "none": [], "flip": [], "scales": [0.75, 1.0, 1.25]}, []
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        try:
            scales += names[part] if part in names else [float(part)]
        except ValueError:
            raise UserError(f"--views {text}: {part!r} is not flip, scales or a number") from None
    if not all(0.25 <= scale <= 4 for scale in scales):
        raise UserError(f"--views {text}: scales must be from 0.25 to 4")
    return Views("flip" in parts, tuple(dict.fromkeys(scales)) or (1.0,))


def check_size(size):
    """UserError unless `size` is a valid side for the network's input, or 0."""
    if size and (size % 32 or not 32 <= size <= 2048):
        raise UserError(f"--size {size}: use a multiple of 32 from 32 to 2048, or 0 for the checkpoint's own")


def input_size(height, width, size, scale=1.0):
    """(height, width) of the network's input: about (size * scale)^2 pixels, sides of 32s, the image's aspect ratio.

    At most 256, or its inverse: with one side at 32, the other would grow without bound.
    """
    aspect = min(max(math.sqrt(height / width), 1 / 16), 16)
    return tuple(max(32, round(size * scale * side / 32) * 32) for side in (aspect, 1 / aspect))


def to_device(tensor, device):
    """Copy a CPU tensor to the device; to a GPU from pinned memory, so that neither waits for the other."""
    if device.type != "cuda":
        return tensor.to(device)
    with contextlib.suppress(RuntimeError):  # without pinned memory left, the copy waits
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def area(x, size):
    """Resize maps (B, C, H, W) to `size` = (h, w): the exact average over each new pixel's area."""
    if max(old * new for old, new in zip(x.shape[2:], size, strict=True)) > MAX_WEIGHTS:
        return F.interpolate(x, tuple(size), mode="area")
    down, across = (area_weights(old, new, x.device) for old, new in zip(x.shape[2:], size, strict=True))
    return down @ (x @ across.T)


@functools.lru_cache(64)  # a folder of photos has ever new sizes
def area_weights(old, new, device):
    """(new, old): the fraction of each new pixel that each old one covers."""
    edges, pixels = torch.arange(new + 1, dtype=torch.float64) * old / new, torch.arange(old)
    covered = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return to_device((covered.clamp_min(0) * new / old).float(), device)


def resize(images, height, width):
    """Resize uint8 images (B, 3, H, W) to float (B, 3, height, width), values 0..1: area average down, bilinear up."""
    images, (old_height, old_width) = images.float() / 255, images.shape[2:]
    if not (old_height % height or old_width % width):
        return F.adaptive_avg_pool2d(images, (height, width))  # an exact average for whole factors, and fast
    shrinks = height * width < old_height * old_width
    return area(images, (height, width)) if shrinks else F.interpolate(images, (height, width), mode="bilinear")


def predict_logits(model, images):
    """Logits (B, 19, h, w) on the model's own grid of images (B, 3, H, W); a CPU processes a few images at a time."""
    if images.device.type != "cpu":
        return model(images, full_size=False)
    count = max(1, round(VIEW_PIXELS / (images.shape[2] * images.shape[3])))
    return torch.cat([model(chunk, full_size=False) for chunk in images.split(count)])


@torch.inference_mode()
def log_probabilities(models, images, size, views):
    """Log of the probabilities averaged over views and models: (B, 19, h, w) on the logit grid of the finest view.

    images: uint8 (B, 3, H, W) on the models' device. size: side of the square images the models were trained on.
    """
    average, mirrors = None, (False, True) if views.flip else (False,)
    # From the finest view down: coarser ones are upsampled to its grid.
    for scale in sorted(views.scales, reverse=True):
        view = resize(images, *input_size(*images.shape[2:], size, scale))
        for mirrored, model in itertools.product(mirrors, models):
            p = predict_logits(model, view.flip(3) if mirrored else view).float().softmax(1)
            p = p[:, FLIP].flip(3) if mirrored else p
            if average is None:
                average = p
            else:
                average += p if p.shape == average.shape else upsample(p, average.shape[2:])
    return average.div_(len(views.scales) * len(mirrors) * len(models)).clamp_min_(1e-9).log_()


def to_input(pixels, device):
    """uint8 pixels (B, H, W, 3), numpy, as the tensor (B, 3, H, W) on the device that the networks take."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)


def parse_whole(model, pixels, size, views=ONE_VIEW):
    """Labels (H, W) of uint8 pixels (H, W, 3), both numpy, parsed as one portrait on the network's device."""
    images = to_input(pixels[None], next(model.parameters()).device)
    return label_map(log_probabilities([model], images, size, views), *pixels.shape[:2])[0].cpu().numpy()


@torch.inference_mode()
def label_map(log_p, height, width):
    """uint8 labels (B, height, width): argmax of log_p (B, 19, h, w), which is upsampled first."""
    # In channels-last memory a CPU resizes twice and compares four times as fast.
    log_p = log_p.contiguous(memory_format=torch.channels_last)
    chunks = log_p.split(1 if log_p.device.type == "cpu" else len(log_p))
    return torch.cat([upsample(chunk, (height, width)).max(1).indices.byte() for chunk in chunks])
