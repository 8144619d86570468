"""Augmentation of a batch on the training device: one affine resampling, colour, low quality, MixUp, CutMix.

Random numbers are drawn on the CPU for the whole global batch from (seed, epoch, step), so that a run does not depend
on restarts, on the number of processes or (apart from noise) on the device. The tensor work runs on the batch's device.

python train.py --augment advanced
python train.py --augment basic --rotate 25 --cutmix 0.3
"""

import functools
import io
import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from device import constant
from labels import FLIP
from losses import soft_labels
from views import area, resize, to_device

Probability = Annotated[float, "probability"]
Factor = Annotated[float, "factor 1 +- this"]
Alpha = Annotated[float, "both parameters of the Beta distribution"]


@dataclass(frozen=True)
class Strength:
    """How strong each change is; 0 disables it. Each field is a flag, with the text of its type as the help."""

    flip: Probability = 0.0
    rotate: Annotated[float, "degrees, uniform in +-"] = 0.0
    scale: Annotated[float, "natural logarithm of the factor, uniform in +-"] = 0.0
    shift: Annotated[float, "fraction of the side, uniform in +-, each axis"] = 0.0
    brightness: Factor = 0.0
    contrast: Factor = 0.0  # around the image's mean grey
    saturation: Factor = 0.0  # around each pixel's grey
    mixup: Probability = 0.0  # arXiv 1710.09412
    cutmix: Probability = 0.0  # arXiv 1905.04899
    mixup_alpha: Alpha = 0.2
    cutmix_alpha: Alpha = 1.0
    grey: Probability = 0.0
    gamma: Annotated[float, "probability of a gamma exp(-0.9)..exp(0.9)"] = 0.0
    dark: Annotated[float, "probability of darkening to 0.2..0.7"] = 0.0
    reduce: Annotated[float, "probability of reducing the side to 1/16..2/3 and enlarging it again"] = 0.0
    defocus: Annotated[float, "probability of a Gaussian blur, sigma up to 1/128 of the side, if not reduced"] = 0.0
    grain: Annotated[float, "probability of Gaussian noise, standard deviation 0..0.13"] = 0.0
    jpeg: Annotated[float, "probability of JPEG's loss at a quality of 5..50"] = 0.0
    empty: Annotated[float, "probability of one colour, labelled background, around the image"] = 0.0


_BASIC = dict(flip=0.5, rotate=15, scale=0.1, shift=0.05, brightness=0.2, contrast=0.2, saturation=0.1)
_STRONG = dict(flip=0.5, rotate=15, scale=0.2, shift=0.1, brightness=0.3, contrast=0.3, saturation=0.3)
PRESETS = {
    "none": {},
    "basic": _BASIC,
    "strong": _STRONG,
    "robust": _STRONG
    | dict(rotate=20, scale=0.3, grey=0.1, gamma=0.15, dark=0.1, reduce=0.35, defocus=0.25, grain=0.15, jpeg=0.15)
    | dict(empty=0.25),
    "advanced": _BASIC | dict(mixup=0.3, cutmix=0.3),
}


def draw(count, strength, seed):
    """Random parameters for a global batch of `count` images: a dict of float32 tensors, first axis the image.

    `seed`: a sequence of integers >= 0, here (seed, epoch, step). `theta` (count, 2, 3) maps output to input
    coordinates in -1..1, as F.affine_grid expects; `box` (count, 4) is CutMix's x0, y0, x1, y1 as fractions;
    `surround` (count, 4) is the colour around the image, 0..1, or -1 for its reflection, and the angle (radians) of the
    square that it surrounds: a turned picture has lost its corners.
    """
    rng = np.random.default_rng(seed)

    def around(amount):
        return rng.uniform(-amount, amount, count)

    flip = rng.random(count) < strength.flip
    angle = np.radians(around(strength.rotate))
    zoom = np.exp(around(strength.scale))  # > 1 enlarges the face
    shift_x, shift_y = around(2 * strength.shift), around(2 * strength.shift)
    mirror = np.where(flip, -1.0, 1.0)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    theta = np.stack([mirror * cos, -mirror * sin, mirror * shift_x, sin, cos, shift_y], 1).reshape(count, 2, 3)

    kind = rng.random(count)
    mixup = kind < strength.mixup
    cutmix = ~mixup & (kind < strength.mixup + strength.cutmix)
    lam = np.where(mixup, rng.beta(strength.mixup_alpha, strength.mixup_alpha, count), 1.0)
    side = np.where(cutmix, np.sqrt(1 - rng.beta(strength.cutmix_alpha, strength.cutmix_alpha, count)), 0.0) / 2
    centre = rng.random((count, 2))
    box = np.concatenate([centre - side[:, None], centre + side[:, None]], 1).clip(0, 1)

    params = {
        "flip": flip,
        "theta": theta,
        "brightness": 1 + around(strength.brightness),
        "contrast": 1 + around(strength.contrast),
        "saturation": 1 + around(strength.saturation),
        "noise_seed": rng.integers(0, 2**24, count),
        "lam": lam,
        "box": box,
    }

    def chance(probability, low, high, otherwise):
        return np.where(rng.random(count) < probability, rng.uniform(low, high, count), otherwise)

    params["saturation"] *= chance(strength.grey, 0, 0, 1)  # low == high: a certain value
    params["brightness"] *= chance(strength.dark, 0.2, 0.7, 1)
    params["gamma"] = np.exp(chance(strength.gamma, -0.9, 0.9, 0))
    params["reduce"] = np.exp(chance(strength.reduce, math.log(1 / 16), math.log(2 / 3), 0))
    params["bicubic"] = rng.random(count) < 0.5
    params["defocus"] = chance(strength.defocus, 0, 1 / 128, 0) * (params["reduce"] == 1)
    params["grain"] = chance(strength.grain, 0, 0.13, 0)
    params["jpeg"] = np.exp(chance(strength.jpeg, math.log(5), math.log(50), -math.inf))  # 0: none
    # Half are black, as the corners of a turned picture usually are.
    colours = rng.uniform(0, 1, (count, 3)) * (rng.random(count) < 0.5)[:, None]
    colours = np.where((rng.random(count) < strength.empty)[:, None], colours, -1)
    roll = rng.uniform(-math.pi / 4, math.pi / 4, count) * (rng.random(count) < 0.5)
    params["surround"] = np.concatenate([colours, roll[:, None]], 1)
    return {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in params.items()}


def slice_batch(params, start, stop):
    """The parameters of the images from `start` to `stop` of the global batch."""
    return {name: value[start:stop] for name, value in params.items()}


def send(params, device):
    """The parameters on the device, in one copy."""
    if device.type == "cpu":
        return params
    columns = [value.flatten(1) if value.dim() > 1 else value[:, None] for value in params.values()]
    parts = to_device(torch.cat(columns, 1), device).split([column.shape[1] for column in columns], 1)
    return {name: part.view(value.shape) for (name, value), part in zip(params.items(), parts, strict=True)}


def warp(images, masks, theta, size, surround=None):
    """Flip, rotate, scale and shift in one resampling.

    uint8 images (B, 3, S, S), uint8 masks (B, M, M), S and M >= size, theta (B, 2, 3) -> float images (B, 3, size,
    size), values 0..1, and uint8 masks (B, size, size). Images are sampled bilinearly from twice the size, so that the
    identity is the area average of prediction; masks at full resolution, to the nearest pixel. Outside the image lies
    its reflection, or the colour in `surround` (B, 4), if not negative, which is background; so is then all outside
    the square turned by the angle in `surround`.
    """
    points = F.affine_grid(theta, (len(images), 1, size, size), align_corners=False)  # (B, size, size, 2)
    double = 2 * size if size < images.shape[-1] else size
    # Where `double` exceeds the image, `resize` would interpolate, and the identity would not be the area average.
    source = area(images / 255, (double, double)) if images.shape[-1] % double else resize(images, double, double)
    reflected = {"padding_mode": "reflection", "align_corners": False}
    warped = F.grid_sample(source, points, **reflected)
    labels = F.grid_sample(masks[:, None].float(), points, "nearest", **reflected)[:, 0].byte()
    if surround is None:
        return warped, labels
    tint, roll = surround[:, :3, None, None], surround[:, 3, None, None]
    x, y = points.unbind(3)
    turned = torch.stack([roll.cos() * x + roll.sin() * y, roll.cos() * y - roll.sin() * x], 3)
    empty = torch.maximum(points.abs(), turned.abs()).gt(1).any(3) & (tint[:, 0] >= 0)  # (B, size, size)
    return torch.where(empty[:, None], tint, warped), labels.masked_fill_(empty, 0)


def exchange(masks, flip):
    """uint8 masks (B, H, W) with left and right labels exchanged where flip (B,) is not 0."""
    swapped = constant(tuple(FLIP), masks.device, torch.uint8)[masks.long()]
    return torch.where(flip[:, None, None] > 0, swapped, masks)


def colour(images, params):
    """Change saturation, contrast and brightness of float images (B, 3, H, W); values 0..1 may leave that range."""
    luma = constant((0.299, 0.587, 0.114), images.device)  # ITU-R BT.601
    saturation, contrast, brightness = (
        params[name][:, None, None] for name in ("saturation", "contrast", "brightness")
    )
    # All three together are one affine map of each pixel's RGB.
    grey = luma.expand(3, 3)  # gives every channel the pixel's grey
    matrix = brightness * contrast * torch.lerp(grey, torch.eye(3, device=images.device), saturation)  # (B, 3, 3)
    mean = (images.mean((2, 3)) @ luma)[:, None, None]
    return torch.baddbmm(brightness * (1 - contrast) * mean, matrix, images.flatten(2)).view_as(images)


def degrade(images, params):
    """Gamma, low resolution or blur, noise, and JPEG's loss, as the parameters on the CPU say.

    Float images (B, 3, S, S), values 0..1 afterwards, are changed in place, one at a time, because the radii and sizes
    differ; those without a change are skipped.
    """
    side = images.shape[-1]
    images.clamp_(0, 1)
    names = "gamma", "reduce", "bicubic", "defocus", "grain", "noise_seed", "jpeg"
    for i, own in enumerate(zip(*(params[name].tolist() for name in names), strict=True)):
        gamma, fraction, bicubic, defocus, grain, seed, quality = own
        image = original = images[i]
        if gamma != 1:
            image = image**gamma
        if fraction < 1:
            small = area(image[None], [max(1, round(fraction * side))] * 2)
            image = F.interpolate(small, side, mode="bicubic" if bicubic else "bilinear")[0].clamp_(0, 1)
        if defocus:
            image = blur(image, defocus * side)
        if grain:
            generator = torch.Generator(image.device).manual_seed(int(seed))
            image = image + grain * torch.randn(image.shape, generator=generator, device=image.device)
        if quality:
            image = jpeg(image[None].clamp(0, 1), quality)[0]
        if image is not original:
            original.copy_(image.clamp_(0, 1))
    return images


@functools.cache
def jpeg_tables(device):
    """The 8 x 8 DCT (64, 1, 8, 8), steps at quality 50 (2, 1, 64, 1, 1), RGB to YCbCr and back (3, 3)."""
    k = torch.arange(8)
    dct = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) * torch.where(k > 0, 0.5, 0.125**0.5)[:, None]
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=50)
    steps = torch.tensor(list(Image.open(file).quantization.values()), dtype=torch.float32)
    basis = (dct[:, None, :, None] * dct[:, None]).view(64, 1, 8, 8)
    ycc = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    return basis.to(device), steps.view(2, 1, 64, 1, 1).to(device), ycc.to(device), ycc.inverse().to(device)


def jpeg(image, quality):
    """What JPEG (ITU-T T.81) at a quality of 1..50 leaves of an image (1, 3, H, W), values 0..1.

    Chroma has half the resolution, as usual; H and W are multiples of 16.
    """
    basis, steps, ycc, rgb = jpeg_tables(image.device)
    steps = (steps * 50 / quality).clamp(min=1)
    planes = (255 * ycc @ image.flatten(2)).view_as(image).transpose(0, 1)  # (3, 1, H, W)
    planes[0] -= 128
    coded = []
    for plane, step in ((planes[:1], steps[0]), (F.avg_pool2d(planes[1:], 2), steps[1])):
        coefficients = (F.conv2d(plane, basis, stride=8) / step).round_().mul_(step)
        coded.append(F.conv_transpose2d(coefficients, basis, stride=8))
    chroma = F.interpolate(coded[1], scale_factor=2, mode="bilinear")
    planes = torch.cat([coded[0] + 128, chroma]).transpose(0, 1).flatten(2)
    return (rgb @ planes / 255).view_as(image)


def blur(image, sigma):
    """Gaussian blur of an image (C, H, W) by `sigma` pixels."""
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=image.device) / sigma) ** 2)
    kernel = (taps / taps.sum()).expand(len(image), 1, -1)
    x = F.pad(image[None], [radius] * 4, mode="replicate")
    x = F.conv2d(x, kernel[:, :, None, :], groups=len(image))
    return F.conv2d(x, kernel[:, :, :, None], groups=len(image))[0]


def mix(images, masks, params, sent, stride):
    """Apply CutMix and MixUp between neighbours (0 with 1, 2 with 3, ...; the batch is shuffled); make the target.

    `sent` are the parameters on the device. Returns images (B, 3, H, W), and labels (B, H, W) int64 if stride is 1 and
    nothing was blended, else soft labels (B, 19, H/stride, W/stride) that add up to 1.
    """
    device, (count, height, width) = images.device, masks.shape
    # The last image of an odd batch is its own partner.
    partner = (torch.arange(count, device=device) ^ 1).clamp_(max=count - 1)
    if bool((params["box"][:, 2] > params["box"][:, 0]).any()):
        box = sent["box"]
        x = (torch.arange(width, device=device) + 0.5) / width
        y = (torch.arange(height, device=device) + 0.5) / height
        inside_x = (x >= box[:, 0, None]) & (x < box[:, 2, None])
        inside_y = (y >= box[:, 1, None]) & (y < box[:, 3, None])
        inside = inside_y[:, :, None] & inside_x[:, None, :]
        images = torch.where(inside[:, None], images[partner], images)
        masks = torch.where(inside, masks[partner], masks)
    if bool((params["lam"] < 1).any()):
        images = torch.lerp(images[partner], images, sent["lam"][:, None, None, None])
        return images, soft_labels(masks, stride, masks[partner], sent["lam"])
    return images, masks.long() if stride == 1 else soft_labels(masks, stride)


def augment(images, masks, params, size, stride=1, exchange_sides=True):
    """A training batch from stored uint8 pairs: float images (B, 3, size, size) 0..1 and targets as `mix` returns.

    `params` stay on the CPU, where they decide what is done; a GPU receives a copy and is never waited for.
    """
    sent, changed = send(params, images.device), []
    # One image at a time stays in a CPU's cache; a GPU processes them together.
    step = 1 if images.device.type == "cpu" else len(images)
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        own, values = slice_batch(params, start, start + step), slice_batch(sent, start, start + step)
        surround = values["surround"] if (own["surround"] >= 0).any() else None
        warped, labels = warp(images[part], masks[part], values["theta"], size, surround)
        if exchange_sides and own["flip"].any():
            labels = exchange(labels, values["flip"])
        changed.append((degrade(colour(warped, values), own), labels))
    return mix(*map(torch.cat, zip(*changed, strict=True)), params, sent, stride)
