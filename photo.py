"""The mask of any picture: taken as one portrait, or the portraits in it found, parsed one by one and pasted back."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from errors import UserError
from faces import LEAST, cut, find_faces, fit, measure
from model import upsample
from views import label_map, log_probabilities

MOST_PIXELS = 2**22  # parsed or decided at once; of larger windows every second pixel, or third: memory stays bounded
TIGHT = 0.5  # a picture that overlaps so much with the portrait it holds is taken as that portrait
SEARCH_SIDE = 384  # of the windows that are searched: a network of larger ones finds as many faces in half the time
FEATHER = 0.1  # share of a portrait's side over which its parse passes into that of its surroundings


@dataclass
class Parsed:
    """A picture's labels, and whose they are."""

    mask: np.ndarray  # uint8 (H, W)
    owner: np.ndarray  # int8 (H, W), index into faces, -1 where no face is near
    faces: list  # [(score, or None where it was not judged, window (left, top, width, height)), ...], left to right
    missed: bool = False  # a face was looked for in vain: the whole picture stands for it


def overlap(a, b):
    """Intersection over union of two windows (left, top, width, height)."""
    width, height = (max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    both = width * height
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def coarseness(height, width):
    """The whole number by which each side is divided so that about MOST_PIXELS are left."""
    return max(1, math.ceil(math.sqrt(height * width / MOST_PIXELS)))


def parse_window(models, pixels, window, size, views, device):
    """Log-probabilities (1, 19, h, w), on the logits' grid, of a window (left, top, width, height) as a portrait."""
    factor = coarseness(*window[2:])
    if factor > 1:
        pixels = np.asarray(Image.fromarray(pixels).reduce(factor))
        window = [-(-value // factor) for value in window]
    images = torch.from_numpy(np.array(cut(pixels, window))).permute(2, 0, 1)[None].to(device)
    return log_probabilities(models, images, size, views)


def decide(log_p, height, width):
    """Labels (height, width) uint8 of log-probabilities (1, 19, h, w)."""
    factor = coarseness(height, width)
    labels = label_map(log_p, -(-height // factor), -(-width // factor))[0].cpu().numpy()
    return labels.repeat(factor, 0).repeat(factor, 1)[:height, :width] if factor > 1 else labels


def surround(inner, outer):
    """Log-probabilities of a portrait (1, 19, h, w) set into those of the window of 1.5 times its side around it.

    The result (1, 19, 3h/2, 3w/2) is as fine as the portrait's; h and w are multiples of 4. Hair and cloth go on where
    a portrait ends, and the smaller view of them is good enough.
    """
    height, width = inner.shape[2:]
    joined = upsample(outer, (height * 3 // 2, width * 3 // 2))
    y, x = ((torch.arange(n, device=inner.device) + 0.5) / n for n in (height, width))
    edge = torch.minimum(torch.minimum(y, 1 - y)[:, None], torch.minimum(x, 1 - x))
    top, left = height // 4, width // 4
    joined[:, :, top : top + height, left : left + width].lerp_(inner, (edge / FEATHER).clamp(max=1))
    return joined


def around(window):
    """The window of 1.5 times the side about a square one, whose side is made a multiple of 4, and that one."""
    left, top, side, _ = window
    side = max(4, round(side / 4) * 4)
    return (left - side // 4, top - side // 4, side * 3 // 2, side * 3 // 2), (left, top, side, side)


def paste(height, width, portraits):
    """Label maps [(labels (h, w), window), ...] on one mask, uint8 (height, width), and each pixel's owner among them.

    Where windows overlap a pixel is the one's to whose middle it is nearer, measured in that one's sides. Elsewhere
    the label is background and the owner -1.
    """
    mask, owner = np.zeros((height, width), np.uint8), np.full((height, width), -1, np.int8)
    nearest = np.full((height, width), np.inf, np.float32)
    for index, (labels, (left, top, across, down)) in enumerate(portraits):
        y, x = np.arange(max(0, top), min(height, top + down)), np.arange(max(0, left), min(width, left + across))
        if not len(y) or not len(x):
            continue
        place = np.s_[y[0] : y[-1] + 1, x[0] : x[-1] + 1]
        far_y, far_x = (abs((v + 0.5 - start) / side - 0.5) for v, start, side in ((y, top, down), (x, left, across)))
        far = np.hypot(far_y[:, None], far_x).astype(np.float32)
        nearer = far < nearest[place]
        nearest[place][nearer] = far[nearer]
        mask[place][nearer] = labels[y[0] - top : y[-1] + 1 - top, x[0] - left : x[-1] + 1 - left][nearer]
        owner[place][nearer] = index
    return mask, owner


def parse_photo(models, pixels, size, views, device, whole=False, box=None):
    """The Parsed labels of uint8 pixels (H, W, 3).

    A picture that is one portrait already, as those of the training are, is parsed as a whole; so is any with `whole`,
    and one in which no face is found. Of others the portraits found in them are parsed. `box` (left, top, width,
    height) is parsed as the portrait instead, and nothing beside it; UserError where it does not meet the picture.
    `size` is the side the models were trained on.
    """
    height, width = pixels.shape[:2]
    everything = (0, 0, width, height)
    if box:
        if not overlap(box, everything):
            raise UserError(f"the box {box} lies beside the picture of {width} x {height} pixels")
        if max(box[2:]) > 2 * max(height, width):
            raise UserError(f"the box {box} is far larger than the picture of {width} x {height} pixels")
        labels = decide(parse_window(models, pixels, box, size, views, device), box[3], box[2])
        return Parsed(*paste(height, width, [(labels, box)]), [(None, box)])
    log_p = parse_window(models, pixels, everything, size, views, device)
    # Shares of the picture's sides become pixels, of which a portrait has as many across as down.
    units = torch.tensor([width, height, math.sqrt(width * height), 1], device=log_p.device)
    scores, (window,) = fit(measure(log_p) * units)
    left, top, side = window.tolist()
    tight = overlap((left, top, side, side), everything) >= TIGHT
    clear = tight and scores.item() >= LEAST
    faces = [] if whole or clear else find_faces(models, pixels, min(size, SEARCH_SIDE), device)
    # A second look may find that very portrait in a picture of a face hard to see.
    portrait = clear or (tight and faces and overlap(faces[0][1], everything) >= TIGHT)
    if portrait or not faces:
        found = [(scores.item() if portrait else None, everything)]
        labels, owner = decide(log_p, height, width), np.zeros((height, width), np.int8)
        return Parsed(labels, owner, found, missed=not (whole or portrait))

    def portraits():
        for _, window in faces:
            outer, inner = around(window)
            both = [parse_window(models, pixels, w, size, views, device) for w in (inner, outer)]
            yield decide(surround(*both), *outer[2:]), outer

    faces.sort(key=lambda face: face[1])
    return Parsed(*paste(height, width, portraits()), [(score, around(window)[1]) for score, window in faces])
