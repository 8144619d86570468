"""Where the faces of a picture are, found with the parsing network itself.

python predict.py --input group.jpg --output masks --json

The network was trained on portraits cut as in CelebA-HQ (arXiv 1710.10196): square, the eyes level and at fixed places.
It still parses a face of half that size anywhere in its view, so a coarse pyramid of windows is enough. Eyes, brows,
nose and lips of a window's parse are laid over their usual arrangement, by scale and shift: how well they agree is
the window's score, and the fit says where the portrait would have been cut. The second look, there, decides.
"""

import math

import numpy as np
import torch
from PIL import Image

from labels import NAMES
from views import log_probabilities

# Medians of 900 training masks: x and y of a part's centre, and the root of its area, as shares of the picture's side.
USUAL = {
    "l_eye": (0.623, 0.480, 0.048),
    "r_eye": (0.380, 0.480, 0.047),
    "l_brow": (0.628, 0.417, 0.064),
    "r_brow": (0.372, 0.418, 0.064),
    "nose": (0.501, 0.579, 0.143),
    "u_lip": (0.501, 0.728, 0.063),
    "l_lip": (0.501, 0.769, 0.081),
    "eye_g": (0.502, 0.490, 0.230),  # stands in for the eyes that it hides
}
PARTS = tuple(NAMES.index(name) for name in USUAL)
PLACE_TOLERANCE = 0.06  # of a part's centre, as a share of the side
SIZE_TOLERANCE = 0.7  # of the logarithm of a part's size
LEAST = 0.5  # score of a face
HOPEFUL = 0.1  # score of a window worth a second look
STEP = 0.6  # from window to window, as a share of the side
SMALLEST = 48  # pixels of the smallest portrait looked for
DEPTH = 3  # sizes of windows, each half of the one before, beginning with the picture's shorter side
MOST = 64  # faces of a picture
BATCH = 4


def measure(log_p):
    """Place, extent and certainty of PARTS in label probabilities (B, 19, h, w): (B, 8, 4).

    x and y of the centre and the root of the area, as shares of the sides, over the pixels where the part is the
    likeliest label, and their mean probability; all 0 where there are none.
    """
    top, labels = log_p.max(1)
    wanted = torch.tensor(PARTS, device=log_p.device)
    there = (labels[:, None] == wanted[:, None, None]).float()  # (B, 8, h, w)
    height, width = labels.shape[1:]
    count = there.sum((2, 3))
    some = count.clamp_min(1)
    x = (there.sum(2) * (torch.arange(width, device=log_p.device) + 0.5)).sum(2) / some / width
    y = (there.sum(3) * (torch.arange(height, device=log_p.device) + 0.5)).sum(2) / some / height
    sure = (there * top.exp()[:, None]).sum((2, 3)) / some
    return torch.stack([x, y, (count / (height * width)).sqrt(), sure], 2)


def fit(parts):
    """How much of a face the parts (B, 8, 4) of `measure` are, and where the portrait would have been cut.

    Returns scores (B,), 0 to 1: the mean over eyes, brows, nose and lips of how near each is to its usual place and
    size after the best scale and shift, times its certainty. And windows (B, 3): left, top and side of the portrait, in
    the parts' unit of length.
    """
    usual = torch.tensor(list(USUAL.values()), device=parts.device)
    place, extent = parts[..., :2], parts[..., 2]
    present = (extent > 0).float()
    weight = present
    # Least squares, and twice more with less weight on what did not agree.
    for _ in range(3):
        share = (weight / weight.sum(1, keepdim=True).clamp_min(1e-6))[..., None]
        usual_middle, middle = (share * usual[:, :2]).sum(1, keepdim=True), (share * place).sum(1, keepdim=True)
        arms, here = usual[:, :2] - usual_middle, place - middle
        scale = (share * arms * here).sum((1, 2)) / (share * arms**2).sum((1, 2)).clamp_min(1e-6)
        scale = scale.clamp_min(1e-3)[:, None]
        off = (here / scale[..., None] - arms).square().sum(2) / PLACE_TOLERANCE**2
        off = off + (extent.clamp_min(1e-6) / scale / usual[:, 2]).log().square() / SIZE_TOLERANCE**2
        agreement = present * torch.exp(-off / 2)
        weight = present * agreement.clamp_min(1e-3)
    corner = middle[:, 0] - scale * usual_middle[:, 0]
    known = agreement * parts[..., 3]
    eyes = torch.maximum(known[:, :2], known[:, 7:])
    return torch.cat([eyes, known[:, 2:7]], 1).mean(1), torch.cat([corner, scale], 1)


def distinct(found):
    """Of [(score, window), ...] the best first, none of which has its middle in the face of a better one."""
    kept = []
    for score, (left, top, side, _) in sorted(found, key=lambda one: -one[0]):
        # A face is the inner half of a portrait.
        if all(
            max(abs(left - x + (side - other) / 2), abs(top - y + (side - other) / 2)) > max(side, other) / 4
            for _, (x, y, other, _) in kept
        ):
            kept.append((score, (left, top, side, side)))
    return kept


def cut(pixels, window):
    """Pixels (height, width, 3) of a window (left, top, width, height); beyond the edge those of the edge repeat."""
    left, top, width, height = window
    if 0 <= left <= pixels.shape[1] - width and 0 <= top <= pixels.shape[0] - height:
        return pixels[top : top + height, left : left + width]
    rows = np.arange(top, top + height).clip(0, pixels.shape[0] - 1)
    columns = np.arange(left, left + width).clip(0, pixels.shape[1] - 1)
    return pixels[np.ix_(rows, columns)]


def pyramid(height, width):
    """Windows (left, top, side, side) to look at first, from the largest size to the smallest.

    The first, of the longer side, is for a face cut off by the picture's edges.
    """
    short, long = min(height, width), max(height, width)
    windows = [((width - long) // 2, (height - long) // 2, long, long)] if short < long <= 2 * short else []
    for side in (short >> level for level in range(DEPTH)):
        if side < 2 * SMALLEST and windows or side < SMALLEST:
            break
        tops, lefts = (
            np.linspace(0, length - side, math.ceil((length - side) / (STEP * side)) + 1).round().astype(int).tolist()
            for length in (height, width)
        )
        windows += [(left, top, side, side) for top in tops for left in lefts]
    return windows


def look(models, pixels, windows, size, device):
    """What the parses of square windows tell: [(score, portrait's window (left, top, side, side)), ...]."""
    found = []
    for start in range(0, len(windows), BATCH):
        part = windows[start : start + BATCH]
        views = [Image.fromarray(cut(pixels, window)) for window in part]
        # Area averages down, bilinear up, as the network's other images.
        kinds = [Image.Resampling.BOX if view.width > size else Image.Resampling.BILINEAR for view in views]
        views = [np.asarray(view.resize((size, size), kind)) for view, kind in zip(views, kinds, strict=True)]
        images = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).to(device)
        scores, portraits = fit(measure(log_probabilities(models, images, size)))
        for (left, top, side, _), score, (x, y, share) in zip(part, scores.tolist(), portraits.tolist(), strict=True):
            own = round(share * side)
            found.append((score, (round(left + x * side), round(top + y * side), own, own)))
    return [(score, window) for score, window in found if window[2] >= SMALLEST]


def find_faces(models, pixels, size, device):
    """The faces in uint8 pixels (H, W, 3): [(score, window (left, top, side, side)), ...], the best first.

    A window is where a portrait like those of the training would be cut, and may reach beyond the picture. `size` is
    the side of the square the models were trained on.
    """
    height, width = pixels.shape[:2]
    # Of a large picture no more is kept than the smallest windows can show.
    factor = max(1, (min(height, width) >> DEPTH - 1) // size)
    small = np.asarray(Image.fromarray(pixels).reduce(factor)) if factor > 1 else pixels
    found = look(models, small, pyramid(*small.shape[:2]), size, device)
    for least in (HOPEFUL, LEAST / 2):
        hopeful = distinct([one for one in found if one[0] >= least])[:MOST]
        found = look(models, small, [window for _, window in hopeful], size, device)
    faces = distinct([one for one in found if one[0] >= LEAST])
    return [(score, tuple(factor * value for value in window)) for score, window in faces]
