"""Masks of any photo: find the faces with the parsing network, parse each as a portrait, paste the results.

python predict.py --input group.jpg --output masks --json --cutout hair,hat

The network was trained on portraits cropped as in CelebA-HQ (arXiv 1710.10196): square, the eyes level and at fixed
places. It still parses a face of half that size anywhere in its input, so a coarse pyramid of windows is enough. The
eyes, brows, nose and lips found in a window are matched with their usual layout by scale and shift: the agreement is
the window's score, and the match tells where the portrait would have been cropped. A second look there decides.
"""

import math
from dataclasses import dataclass

from common import UserError

import numpy as np
import torch
from PIL import Image

from labels import NAMES
from model import upsample
from views import ONE_VIEW, label_map, log_probabilities

# Medians of 900 training masks: x and y of a part's centre, and the root of its area, as fractions of the side.
LAYOUT = {
    "l_eye": (0.623, 0.480, 0.048),
    "r_eye": (0.380, 0.480, 0.047),
    "l_brow": (0.628, 0.417, 0.064),
    "r_brow": (0.372, 0.418, 0.064),
    "nose": (0.501, 0.579, 0.143),
    "u_lip": (0.501, 0.728, 0.063),
    "l_lip": (0.501, 0.769, 0.081),
    "eye_g": (0.502, 0.490, 0.230),  # replaces the eyes that glasses hide
}
PARTS = tuple(NAMES.index(name) for name in LAYOUT)
PLACE_TOLERANCE = 0.06  # of a part's centre, as a fraction of the side
SIZE_TOLERANCE = 0.7  # of the logarithm of a part's size
FACE_SCORE = 0.5  # minimum score of a face
CANDIDATE_SCORE = 0.02  # minimum score of a window that gets a second look
HINT_SCORE = 0.28  # minimum score of a photo without a face that is parsed as a portrait all the same
WINDOW_STEP = 0.6  # between neighbouring windows, as a fraction of the side
MIN_SIDE = 48  # pixels of the smallest portrait searched for
LEVELS = 3  # window sizes, each half of the one before; the first is the photo's shorter side
MAX_FACES = 64
SEARCH_SIDE = 384  # network input for the search: larger inputs find as many faces in twice the time
BATCH = 4
PORTRAIT_OVERLAP = 0.5  # minimum IoU of a photo and the portrait found in it to parse the photo as that portrait
MAX_PIXELS = 1 << 22  # parsed at once: larger windows are reduced, which bounds memory
FEATHER = 0.1  # width of the transition from a portrait's parse to its surroundings, as a fraction of its side

GROUPS = {"head": tuple(name for name in NAMES if name not in ("background", "neck_l", "neck", "cloth"))}


def measure(log_p):
    """Centre, size and certainty of PARTS in log-probabilities (B, 19, h, w): (B, 8, 4).

    x, y of the centre and the root of the area, as fractions of the sides, over the pixels where the part is the most
    likely label, and their mean probability; all 0 if there are none.
    """
    top, labels = log_p.max(1)
    wanted = torch.tensor(PARTS, device=log_p.device)
    found = (labels[:, None] == wanted[:, None, None]).float()  # (B, 8, h, w)
    height, width = labels.shape[1:]
    count = found.sum((2, 3))
    divisor = count.clamp_min(1)
    x = (found.sum(2) * (torch.arange(width, device=log_p.device) + 0.5)).sum(2) / divisor / width
    y = (found.sum(3) * (torch.arange(height, device=log_p.device) + 0.5)).sum(2) / divisor / height
    certainty = (found * top.exp()[:, None]).sum((2, 3)) / divisor
    return torch.stack([x, y, (count / (height * width)).sqrt(), certainty], 2)


def match_layout(parts):
    """Match the parts (B, 8, 4) of `measure` with LAYOUT: (scores (B,), windows (B, 3)).

    Score, 0..1: mean over eyes, brows, nose and lips of the agreement with the usual place and size after the best
    scale and shift, times the certainty. Window: left, top and side of the portrait, in the parts' unit of length.
    """
    layout = torch.tensor(list(LAYOUT.values()), device=parts.device)
    place, extent = parts[..., :2], parts[..., 2]
    present = (extent > 0).float()
    weight = present
    # Least squares, repeated twice with less weight on the parts that did not agree.
    for _ in range(3):
        fraction = (weight / weight.sum(1, keepdim=True).clamp_min(1e-6))[..., None]
        layout_middle, middle = (fraction * layout[:, :2]).sum(1, keepdim=True), (fraction * place).sum(1, keepdim=True)
        wanted, actual = layout[:, :2] - layout_middle, place - middle
        scale = (fraction * wanted * actual).sum((1, 2)) / (fraction * wanted**2).sum((1, 2)).clamp_min(1e-6)
        scale = scale.clamp_min(1e-3)[:, None]
        error = (actual / scale[..., None] - wanted).square().sum(2) / PLACE_TOLERANCE**2
        error = error + (extent.clamp_min(1e-6) / scale / layout[:, 2]).log().square() / SIZE_TOLERANCE**2
        agreement = present * torch.exp(-error / 2)
        weight = present * agreement.clamp_min(1e-3)
    corner = middle[:, 0] - scale * layout_middle[:, 0]
    known = agreement * parts[..., 3]
    eyes = torch.maximum(known[:, :2], known[:, 7:])
    return torch.cat([eyes, known[:, 2:7]], 1).mean(1), torch.cat([corner, scale], 1)


def crop(pixels, window):
    """Pixels (height, width, 3) of a window (left, top, width, height); the edge repeats beyond the photo."""
    left, top, width, height = window
    if 0 <= left <= pixels.shape[1] - width and 0 <= top <= pixels.shape[0] - height:
        return pixels[top : top + height, left : left + width]
    rows = np.arange(top, top + height).clip(0, pixels.shape[0] - 1)
    columns = np.arange(left, left + width).clip(0, pixels.shape[1] - 1)
    return pixels[np.ix_(rows, columns)]


def pyramid(height, width):
    """Square windows (left, top, side, side) to search, from the largest size to the smallest.

    The first, of the longer side, is for a face cut off by the photo's edges.
    """
    short, long = min(height, width), max(height, width)
    windows = [((width - long) // 2, (height - long) // 2, long, long)] if short < long <= 2 * short else []
    for side in (short >> level for level in range(LEVELS)):
        if (side < 2 * MIN_SIDE and windows) or side < MIN_SIDE:
            break
        tops, lefts = (
            np.linspace(0, length - side, math.ceil((length - side) / (WINDOW_STEP * side)) + 1).round().astype(int)
            for length in (height, width)
        )
        windows += [(left, top, side, side) for top in tops.tolist() for left in lefts.tolist()]
    return windows


def score_windows(models, pixels, windows, size, device):
    """Parse square windows: [(score, window of the matched portrait (left, top, side, side)), ...]."""
    found = []
    for start in range(0, len(windows), BATCH):
        chunk = windows[start : start + BATCH]
        crops = [Image.fromarray(crop(pixels, window)) for window in chunk]
        # Area average down, bilinear up, like all other input of the network.
        kinds = [Image.Resampling.BOX if view.width > size else Image.Resampling.BILINEAR for view in crops]
        crops = [np.asarray(view.resize((size, size), kind)) for view, kind in zip(crops, kinds, strict=True)]
        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).to(device)
        scores, portraits = match_layout(measure(log_probabilities(models, images, size, ONE_VIEW)))
        for (left, top, side, _), score, (x, y, scale) in zip(chunk, scores.tolist(), portraits.tolist(), strict=True):
            own = round(scale * side)
            found.append((score, (round(left + x * side), round(top + y * side), own, own)))
    return [(score, window) for score, window in found if window[2] >= MIN_SIDE]


def distinct(found):
    """Of [(score, window), ...] the best first, without those whose centre lies in the face of a better one."""
    kept = []
    for score, (left, top, side, _) in sorted(found, key=lambda item: -item[0]):
        # A face is the inner half of a portrait.
        if all(
            max(abs(left - x + (side - other) / 2), abs(top - y + (side - other) / 2)) > max(side, other) / 4
            for _, (x, y, other, _) in kept
        ):
            kept.append((score, (left, top, side, side)))
    return kept


def find_faces(models, pixels, size, device):
    """The faces in uint8 pixels (H, W, 3): [(score, window (left, top, side, side)), ...], the best first.

    A window is where a portrait like those of the training would be cropped, and may reach beyond the photo. `size` is
    the side of the square images given to the network.
    """
    height, width = pixels.shape[:2]
    # Reduce a large photo to the resolution that the smallest windows need.
    factor = max(1, (min(height, width) >> LEVELS - 1) // size)
    small = np.asarray(Image.fromarray(pixels).reduce(factor)) if factor > 1 else pixels
    found = score_windows(models, small, pyramid(*small.shape[:2]), size, device)
    for minimum in (CANDIDATE_SCORE, FACE_SCORE / 2):
        candidates = distinct([item for item in found if item[0] >= minimum])[:MAX_FACES]
        found = score_windows(models, small, [window for _, window in candidates], size, device)
    faces = distinct([item for item in found if item[0] >= FACE_SCORE])
    return [(score, tuple(factor * value for value in window)) for score, window in faces]


@dataclass(kw_only=True)
class Parsed:
    """The label map of a photo, and the face each pixel belongs to."""

    mask: np.ndarray  # uint8 (H, W)
    owner: np.ndarray  # int8 (H, W), index into faces, -1 far from any face
    faces: list  # [(score, or None if it was not computed, window (left, top, width, height)), ...], left to right
    missed: bool = False  # no face was found


def parse_photos(models, photos, size, views, device, whole=False, box=None):
    """Parse photos of one size, a list of uint8 pixels (H, W, 3), in one batch: [Parsed, ...].

    A photo that is one portrait, like those of the training, or any photo with `whole`, is parsed as one portrait;
    otherwise each face found is parsed. Without a face, a photo with a hint of one is parsed as one portrait, any other
    becomes background. `box` (left, top, width, height) is parsed as the only portrait instead; UserError if it lies
    outside the photos. `size` is the side the models were trained on.
    """
    if not photos:
        return []
    height, width = photos[0].shape[:2]
    everything = (0, 0, width, height)
    if box and (not overlap(box, everything) or max(box[2:]) > 2 * max(height, width)):
        raise UserError(f"the box {box} lies outside the image of {width} x {height} pixels, or is far larger")
    batch = parse_window(models, photos, box or everything, size, views, device).split(1)
    if box:
        pasted = [paste(height, width, [(labels_at(log_p, box[3], box[2]), box)]) for log_p in batch]
        return [Parsed(mask=mask, owner=owner, faces=[(None, box)]) for mask, owner in pasted]
    settings = models, size, views, device, whole
    return [_parse_photo(pixels, log_p, *settings) for pixels, log_p in zip(photos, batch, strict=True)]


def _parse_photo(pixels, log_p, models, size, views, device, whole):
    """Parsed of one photo; `log_p` are its log-probabilities as one portrait."""
    height, width = pixels.shape[:2]
    everything = (0, 0, width, height)
    # Convert fractions of the sides to pixels; a portrait is square in pixels.
    units = torch.tensor([width, height, math.sqrt(width * height), 1], device=log_p.device)
    scores, (window,) = match_layout(measure(log_p) * units)
    left, top, side = window.tolist()
    fills = overlap((left, top, side, side), everything) >= PORTRAIT_OVERLAP
    clear = fills and scores.item() >= FACE_SCORE
    faces = [] if whole or clear else find_faces(models, pixels, min(size, SEARCH_SIDE), device)
    # The search may confirm a portrait in which the face is hard to see.
    portrait = clear or (fills and faces and overlap(faces[0][1], everything) >= PORTRAIT_OVERLAP)
    if portrait or not faces:
        background = not whole and scores.item() < HINT_SCORE
        return Parsed(
            mask=np.zeros((height, width), np.uint8) if background else labels_at(log_p, height, width),
            owner=np.zeros((height, width), np.int8),
            faces=[(scores.item() if portrait else None, everything)],
            missed=not (whole or portrait),
        )

    def portraits():
        for _, window in faces:
            outer, inner = enlarge(window)
            both = [parse_window(models, [pixels], w, size, views, device) for w in (inner, outer)]
            yield labels_at(surround(*both), *outer[2:]), outer

    faces.sort(key=lambda face: face[1])
    mask, owner = paste(height, width, portraits())
    return Parsed(mask=mask, owner=owner, faces=[(score, enlarge(window)[1]) for score, window in faces])


def overlap(a, b):
    """Intersection over union of two windows (left, top, width, height)."""
    width, height = (max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    both = width * height
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def reduction(height, width):
    """The integer factor that reduces height x width to about MAX_PIXELS."""
    return max(1, math.ceil(math.sqrt(height * width / MAX_PIXELS)))


def parse_window(models, photos, window, size, views, device):
    """Log-probabilities (B, 19, h, w), on the logit grid, of a window (left, top, width, height) of B photos."""
    factor = reduction(*window[2:])
    if factor > 1:
        photos = [np.asarray(Image.fromarray(pixels).reduce(factor)) for pixels in photos]
        window = [-(-value // factor) for value in window]
    images = np.stack([crop(pixels, window) for pixels in photos])
    return log_probabilities(models, torch.from_numpy(images).permute(0, 3, 1, 2).to(device), size, views)


def labels_at(log_p, height, width):
    """Labels (height, width) uint8 of log-probabilities (1, 19, h, w)."""
    factor = reduction(height, width)
    labels = label_map(log_p, -(-height // factor), -(-width // factor))[0].cpu().numpy()
    return labels.repeat(factor, 0).repeat(factor, 1)[:height, :width] if factor > 1 else labels


def enlarge(window):
    """(outer, inner): the square window with its side rounded to a multiple of 4, and one of 1.5 times that side."""
    left, top, side, _ = window
    side = max(4, round(side / 4) * 4)
    return (left - side // 4, top - side // 4, side * 3 // 2, side * 3 // 2), (left, top, side, side)


def surround(inner, outer):
    """Blend log-probabilities of a portrait (1, 19, h, w) into those of the window of 1.5 times its side around it.

    Returns (1, 19, 3h/2, 3w/2); h and w are multiples of 4. Hair and cloth continue where a portrait ends.
    """
    height, width = inner.shape[2:]
    joined = upsample(outer, (height * 3 // 2, width * 3 // 2))
    y, x = ((torch.arange(n, device=inner.device) + 0.5) / n for n in (height, width))
    edge = torch.minimum(torch.minimum(y, 1 - y)[:, None], torch.minimum(x, 1 - x))
    top, left = height // 4, width // 4
    joined[:, :, top : top + height, left : left + width].lerp_(inner, (edge / FEATHER).clamp(max=1))
    return joined


def paste(height, width, portraits):
    """(mask uint8, owner int8), both (height, width), of label maps [(labels (h, w), window), ...].

    In an overlap a pixel belongs to the window whose centre is nearer, relative to its side. Outside all windows the
    label is background and the owner -1.
    """
    mask, owner = np.zeros((height, width), np.uint8), np.full((height, width), -1, np.int8)
    nearest = np.full((height, width), np.inf, np.float32)
    for index, (labels, (left, top, across, down)) in enumerate(portraits):
        y, x = np.arange(max(0, top), min(height, top + down)), np.arange(max(0, left), min(width, left + across))
        if not len(y) or not len(x):
            continue
        place = np.s_[y[0] : y[-1] + 1, x[0] : x[-1] + 1]
        far_y, far_x = (abs((v + 0.5 - start) / side - 0.5) for v, start, side in ((y, top, down), (x, left, across)))
        distance = np.hypot(far_y[:, None], far_x).astype(np.float32)
        nearer = distance < nearest[place]
        nearest[place][nearer] = distance[nearer]
        mask[place][nearer] = labels[y[0] - top : y[-1] + 1 - top, x[0] - left : x[-1] + 1 - left][nearer]
        owner[place][nearer] = index
    return mask, owner


def parse_labels(text):
    """Sorted label ids of names and GROUPS, as "hair,hat" or "head". UserError if one is unknown."""
    chosen = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part not in GROUPS and part not in NAMES:
            raise UserError(f"--cutout {text}: no label {part}; choose from {', '.join((*GROUPS, *NAMES))}")
        chosen.update(NAMES.index(name) for name in GROUPS.get(part, (part,)))
    if not chosen:
        raise UserError("--cutout names no label; use for example --cutout hair,hat or --cutout head")
    return sorted(chosen)


def cut_out(pixels, mask, labels):
    """RGBA (H, W, 4) uint8 of pixels (H, W, 3): the labels opaque, everything else transparent black."""
    kept = np.isin(mask, labels)[..., None]
    return np.concatenate([pixels * kept, kept * np.uint8(255)], 2)


def label_regions(mask, left=0, top=0):
    """{name: {"area", "box", "centroid"}} of the labels in mask (H, W), whose corner lies at (left, top).

    Area in pixels; box as left, top, width, height; centroid as the mean x, y of the pixels' indices. 255 is no label.
    """
    regions = {}
    for label, name in enumerate(NAMES):
        found = mask == label
        rows, columns = found.sum(1), found.sum(0)
        if not (area := int(rows.sum())):
            continue
        (y0, y1), (x0, x1) = ((int(n[0]), int(n[-1])) for n in map(np.flatnonzero, (rows, columns)))
        x, y = (float(n @ np.arange(len(n)) / area) for n in (columns, rows))
        regions[name] = {
            "area": area,
            "box": [left + x0, top + y0, x1 - x0 + 1, y1 - y0 + 1],
            "centroid": [round(left + x, 2), round(top + y, 2)],
        }
    return regions


def describe(parsed):
    """A Parsed as numbers for JSON: the regions of the whole photo, and of each face from left to right.

    `face_found` is null with `box`, or with `whole` unless the photo is clearly a portrait.
    """
    height, width = parsed.mask.shape
    found = [] if parsed.missed else parsed.faces
    searched = parsed.missed or any(score is not None for score, _ in found)
    faces = []
    for index, (score, window) in enumerate(found):
        own = parsed.owner == index
        rows, columns = (np.flatnonzero(own.any(axis)) for axis in (1, 0))
        labels = {}
        if len(rows):
            place = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            masked = np.where(own[place] & (parsed.mask[place] > 0), parsed.mask[place], 255)
            labels = label_regions(masked, int(columns[0]), int(rows[0]))
        score = None if score is None else round(score, 3)
        faces.append({"window": list(map(int, window)), "score": score, "labels": labels})
    face_found = bool(found) if searched else None
    whole = {"width": width, "height": height, "face_found": face_found, "labels": label_regions(parsed.mask)}
    return {**whole, "faces": faces}
