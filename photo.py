"""Masks of any photo: find the faces, parse each as a portrait, paste the results.

python predict.py --input group.jpg --output masks --json --cutout hair,hat

The network was trained on portraits cropped as in CelebA-HQ (arXiv 1710.10196): square, the eyes level and at fixed
places. A small second network, the Locator, proposes where in the photo such portraits are, at any size and roll
(tools/train_locator.py trains it). It sees portraits of 24 to 176 pixels; further looks at the photo, each reduced four
times, find the larger ones, and each candidate is seen again upright, in two sizes. Then it is parsed, and the eyes,
brows, nose and lips found there are matched with their usual layout by scale, shift and rotation, which gives the exact
portrait. The mean of this agreement and of the Locator's certainty is the score of a face, which is parsed once more
there, and around it until its hair and clothes end.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from common import UserError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn

import checkpoint
import register
from labels import NAMES
from model import upsample
from views import ONE_VIEW, label_map, log_probabilities, to_input

STRIDE = 8  # of the locator
UNIT = 64  # pixels: the portrait side whose logarithm is 0
PORTRAIT_SIDES = 24, 176  # pixels of the portraits in the locator's training
HALVINGS = 2  # from one look to the next
AGAIN = 96, 128  # portrait sides in the second looks
CANVAS = 192  # side of the second looks, and of the training images
LOOKS = 16  # second looks at once
CENTRE = 0.56  # height of a face's centre (the bridge of the nose to the lips) in its portrait, from the top
FIRST_PIXELS = 1_600_000  # of the first look: larger photos are reduced
HEAT = 0.25  # minimum of a candidate, also on average with the looks at it alone
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
PART_IDS = tuple(NAMES.index(name) for name in LAYOUT)
FACE_LABELS = list(range(1, 13))  # skin to lower lip
PLACE_TOLERANCE = 0.06  # of a part's centre, as a fraction of the side
SIZE_TOLERANCE = 0.7  # of the logarithm of a part's size
FACE_SCORE = 0.47  # minimum score of a face
FAR = 0.2, 0.5, 30  # shift in sides, logarithm of the scale and degrees of a match that is far from what was proposed
CERTAIN = 0.5  # minimum heat of a place that is parsed level too, if no face was found there as it is turned
LEVEL = 5  # degrees of roll that are taken for none: the network was trained on turned portraits
LIKENESS = 0.3  # minimum IoU of face and usual face to parse a photo as a portrait; at least 0.37 in the data set
TURNED_LIKENESS = 0.5  # the same for a portrait that lies on its side or upside down: a profile has 0.4
SEARCH_SIDE = 384  # network input for candidates: fewer faces are confirmed at 256 than at 384 or 512
BATCH = 4
PORTRAIT = 0.48, 16.5  # minimum IoU of a photo and the portrait found in it, and its most degrees of roll, to parse all
MAX_PIXELS = 1 << 22  # parsed at once: larger windows are reduced, which bounds memory
SMALL_INPUT = 384  # least network input for the surroundings of a portrait, in which a larger one finds more clutter
SMALL = 96  # pixels: portraits of at most this side gain nothing from a larger input either
FEATHER = 0.1  # width of the transition from a parse to its surroundings, as a fraction of its side
GROWTH = 1.5, 1.5  # from a portrait to the window around it, and to the next; in larger ones the network errs
BUST = 0.46, 0.08, 1.4  # half width, centre and power, in the largest window, of what ends all that reaches beyond it
BEYOND = np.float32(99)  # all distances
REACH = 0.02  # minimum fraction of a window's border that must be labelled to parse a larger one


class Block(nn.Module):
    """Residual depthwise 7 x 7 and two pointwise convolutions, as in ConvNeXt (arXiv 2201.03545) with batch norm."""

    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.expand, self.project = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        return x + self.project(F.relu(self.expand(self.norm(self.depthwise(x)))))


class Locator(nn.Module):
    """Images (B, 3, H, W), values 0..1, sides multiples of 8, to (B, 6, H/8, W/8).

    Channels: logit of a face centre; its x and y from the middle of the cell, in cells; logarithm of the portrait's
    side over UNIT; cosine and sine of the roll, of any length.
    """

    def __init__(self, width=64, blocks=6):
        super().__init__()
        layers = []
        for inputs, outputs in ((3, width // 4), (width // 4, width // 2), (width // 2, width)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, *(Block(width) for _ in range(blocks)), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, 6, 1)
        nn.init.constant_(self.head.bias[:1], -4.0)  # few cells are centres

    def forward(self, images):
        return self.head(self.body(images * 4 - 2))


def load_locator(device="cpu", path=register.RELEASE / "locator.pt"):
    """The trained Locator, ready for inference. UserError if the file is missing or damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name: value.float() for name, value in state.items()}
    except Exception as error:  # noqa: BLE001 - foreign bytes make the unpickler raise anything
        why = f"is missing, damaged or of another network ({type(error).__name__})"
        remedy = "`make locator` trains one, WHOLE=1 (--whole) needs none"
        raise UserError(f"{path}, a network that finds faces, {why}; {remedy}") from None
    locator = Locator()
    checkpoint.load_state(locator, state, path)
    return locator.to(device, memory_format=torch.channels_last).eval()


def pyramid(pixels, device):
    """A photo's uint8 pixels (H, W, 3) as float images (1, 3, h, w), values 0..1, and its width over the first's.

    The first has at most about FIRST_PIXELS, each other half the sides of the one before.
    """
    height, width = pixels.shape[:2]
    scale = max(1, math.sqrt(height * width / FIRST_PIXELS))
    size = max(1, round(width / scale)), max(1, round(height / scale))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
    levels = [to_input(np.array(image)[None], device).float() / 255]
    while max(levels[-1].shape[2:]) > PORTRAIT_SIDES[0] and min(levels[-1].shape[2:]) > 1:
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels, width / size[0]


def sample(levels, places, size, factor=1):
    """Upright squares around places (N, 4), `factor` times their sides: float (N, 3, size, size), values 0..1.

    A place is x, y and side in pixels of levels[0] and the clockwise roll in degrees. The photo's edge is repeated.
    """
    along = ((torch.arange(size, device=places.device) + 0.5) / size - 0.5).expand(size, size) * factor
    views = places.new_empty(len(places), 3, size, size)
    reduction = (places[:, 2] * factor / size).log2().floor().clamp(0, len(levels) - 1)  # never coarser than the view
    for k, image in enumerate(levels):
        chosen = reduction == k
        points = to_photo(places[chosen, None, None], along, along.T) / 2**k
        grid = points / points.new_tensor(image.shape[:1:-1]) * 2 - 1
        # One tall grid, since a batch would need as many copies of the image.
        tall = F.grid_sample(image, grid.view(1, -1, size, 2), padding_mode="border", align_corners=False)
        views[chosen] = tall[0].unflatten(1, (-1, size)).transpose(0, 1)
    return views


def to_photo(places, u, v):
    """x, y (..., 2) of the points u, v from the middle of places (..., 4), in their sides and upright axes."""
    x, y, side, roll = places.unbind(-1)
    cos, sin = side * roll.deg2rad().cos(), side * roll.deg2rad().sin()
    return torch.stack([x + cos * u - sin * v, y + sin * u + cos * v], -1)


def read_places(values, rows, columns):
    """Places (N, 4) in pixels of an image, where the Locator's outputs at these cells (N,) are `values` (N, 6)."""
    _, dx, dy, size, cos, sin = values.unbind(1)
    side, roll = UNIT * size.exp(), torch.atan2(sin, cos)
    # From the face's centre to the portrait's, which lies above it.
    x = (columns + 0.5 + dx) * STRIDE + (CENTRE - 0.5) * side * roll.sin()
    y = (rows + 0.5 + dy) * STRIDE - (CENTRE - 0.5) * side * roll.cos()
    return torch.stack([x, y, side, roll.rad2deg()], 1)


def distinct(found, ratio=math.inf):
    """Of [(score, (x, y, side, ...)), ...] the best first, without those close to a better one.

    Close: a centre lies in the other's face, the inner half of the portrait, and the sides differ by at most `ratio`.
    """
    kept = []
    for score, place in sorted(found, key=lambda item: -item[0]):
        for _, other in kept:
            small, large = sorted([place[2], other[2]])
            if math.dist(place[:2], other[:2]) <= large / 4 and large <= ratio * small:
                break
        else:
            kept.append((score, place))
    return kept


@torch.inference_mode()
def find_candidates(locator, levels):
    """Candidates for faces in the `levels` of a photo: heats (N,), 0..1, and places (N, 4) as `sample` takes them."""
    found = []
    for k in range(0, len(levels), HALVINGS):
        output = locator(levels[k].contiguous(memory_format=torch.channels_last))[0]
        heat = output[0].sigmoid()
        rows, columns = ((heat == F.max_pool2d(heat[None], 3, 1, 1)[0]) & (heat > HEAT)).nonzero(as_tuple=True)
        places = read_places(output[:, rows, columns].T, rows, columns)
        places[:, :3] *= 2**k
        found += zip(heat[rows, columns].tolist(), places.tolist(), strict=True)
    found = distinct(found, 3)  # a large place without a face must not hide small ones with one
    heats, places = ([item[i] for item in found] for i in (0, 1))
    heats, places = refine(locator, levels, levels[0].new_tensor(heats), levels[0].new_tensor(places).view(-1, 4))
    return heats[heats > HEAT], places[heats > HEAT]


@torch.inference_mode()
def refine(locator, levels, heats, places):
    """Heats (N,) and places (N, 4) averaged with those seen in upright squares around the places, in AGAIN sizes."""
    total, moved = heats[:, None], heats[:, None] * places
    middle = (torch.arange(CANVAS // STRIDE, device=heats.device) + 0.5) * STRIDE - CANVAS / 2
    for side in AGAIN if len(places) else ():
        views = sample(levels, places, CANVAS, CANVAS / side).contiguous(memory_format=torch.channels_last)
        output = torch.cat([locator(part) for part in views.split(LOOKS)])
        near = torch.hypot(middle, middle[:, None] - (CENTRE - 0.5) * side) < side / 5
        heat, cell = (output[:, 0].sigmoid() * near).flatten(1).max(1)
        values = output.flatten(2)[torch.arange(len(cell)), :, cell]
        x, y, seen, roll = read_places(values, cell // len(middle), cell % len(middle)).T
        centre = to_photo(places, (x - CANVAS / 2) / side, (y - CANVAS / 2) / side)
        again = torch.stack([*centre.T, places[:, 2] * seen / side, places[:, 3] + roll], 1)
        total, moved = total + heat[:, None], moved + heat[:, None] * again
    return total[:, 0] / (1 + len(AGAIN)), moved / total


class Window(NamedTuple):
    """A rectangle of a photo in pixels, turned clockwise by `angle` degrees around its centre; may reach beyond it."""

    left: int
    top: int
    width: int
    height: int
    angle: float = 0.0

    def photo_points(self, u, v):
        """x, y in the photo of points u, v (fractions of the sides, 0.5 the centre)."""
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        u, v = (u - 0.5) * self.width, (v - 0.5) * self.height
        return self.left + self.width / 2 + cos * u - sin * v, self.top + self.height / 2 + sin * u + cos * v


def square(x, y, side, angle):
    """The Window around x, y, level if it nearly is, its side a multiple of 8: those around it are concentric."""
    side = max(8, round(side / 8) * 8)
    angle = (angle + 180) % 360 - 180
    return Window(round(x - side / 2), round(y - side / 2), side, side, 0.0 if abs(angle) < LEVEL else angle)


def measure(log_p):
    """Centre, size and certainty of PART_IDS in log-probabilities (B, 19, h, w): (B, 8, 4).

    x, y of the centre and the root of the area, as fractions of the sides, over the pixels where the part is the most
    likely label, and their mean probability; all 0 if there are none.
    """
    top, labels = log_p.max(1)
    found = (labels[:, None] == torch.tensor(PART_IDS, device=log_p.device)[:, None, None]).float()  # (B, 8, h, w)
    y, x = ((torch.arange(n, device=log_p.device) + 0.5) / n for n in labels.shape[1:])
    count, divisor = found.sum((2, 3)), found.sum((2, 3)).clamp_min(1)
    means = [(found * values).sum((2, 3)) / divisor for values in (x, y[:, None], top.exp()[:, None])]
    return torch.stack([*means[:2], (count / labels.shape[1:].numel()).sqrt(), means[2]], 2)


def match_layout(parts):
    """Match the parts (B, 8, 4) of `measure` with LAYOUT: (scores (B,), portraits (B, 4)).

    Score, 0..1: mean over eyes, brows, nose and lips of the agreement with the usual place and size after the best
    scale, rotation and shift (Umeyama 1991), times the certainty. Portrait: x and y of its centre and its side in the
    parts' unit of length, and its roll in degrees, clockwise.
    """
    parts = parts.cpu()  # few numbers and many steps
    layout = torch.tensor(list(LAYOUT.values()))
    place, extent = torch.view_as_complex(parts[..., :2].contiguous()), parts[..., 2]
    usual = torch.complex(layout[:, 0], layout[:, 1])
    weight = present = (extent > 0).float()
    # Least squares, repeated twice with less weight on the parts that did not agree.
    for _ in range(3):
        fraction = weight / weight.sum(1, keepdim=True).clamp_min(1e-6)
        usual_middle, middle = (fraction * usual).sum(1, keepdim=True), (fraction * place).sum(1, keepdim=True)
        wanted, actual = usual - usual_middle, place - middle
        turn = (fraction * wanted.conj() * actual).sum(1) / (fraction * wanted.abs() ** 2).sum(1).clamp_min(1e-6)
        scale = turn.abs().clamp_min(1e-3)[:, None]
        turn = scale * torch.exp(1j * turn.angle()[:, None])
        error = (actual / turn - wanted).abs().square() / PLACE_TOLERANCE**2
        error = error + (extent.clamp_min(1e-6) / scale / layout[:, 2]).log().square() / SIZE_TOLERANCE**2
        agreement = present * torch.exp(-error / 2)
        weight = present * agreement.clamp_min(1e-3)
    centre = middle + turn * (0.5 + 0.5j - usual_middle)
    known = agreement * parts[..., 3]
    eyes = torch.maximum(known[:, :2], known[:, 7:])
    scores = torch.cat([eyes, known[:, 2:7]], 1).mean(1)
    return scores, torch.cat([torch.view_as_real(centre[:, 0]), scale, turn.angle().rad2deg()], 1)


def crop(pixels, window):
    """Pixels (height, width, 3) of a Window; the edge repeats beyond the photo."""
    left, top, width, height, angle = window
    if angle and angle % 90 == 0:  # a long strip needs no square around it
        wide, high = (height, width) if angle % 180 else (width, height)
        level = Window(left - (wide - width) // 2, top - (high - height) // 2, wide, high)
        return np.rot90(crop(pixels, level), angle // 90)
    if angle:
        margin = math.ceil((math.hypot(width, height) - min(width, height)) / 2)
        around = crop(pixels, Window(left - margin, top - margin, width + 2 * margin, height + 2 * margin))
        turned = Image.fromarray(np.ascontiguousarray(around)).rotate(angle, Image.Resampling.BILINEAR)
        return np.asarray(turned)[margin : margin + height, margin : margin + width]
    if 0 <= left <= pixels.shape[1] - width and 0 <= top <= pixels.shape[0] - height:  # a view, for large photos
        return pixels[top : top + height, left : left + width]
    rows = np.arange(top, top + height).clip(0, pixels.shape[0] - 1)
    columns = np.arange(left, left + width).clip(0, pixels.shape[1] - 1)
    return pixels[np.ix_(rows, columns)]


def match_places(models, levels, places, size):
    """Parse the squares at places (N, 4) of a `pyramid`: the scores (N,) and the places (N, 4) of their matches.

    The score is lower for a match far from the square, which is one of chance or of a neighbour.
    """
    found = [places.new_empty(0, 5)]
    for part in places.split(BATCH):
        images = (sample(levels, part, size) * 255).round().byte()
        scores, matches = match_layout(measure(log_probabilities(models, images, size, ONE_VIEW)))
        x, y, scale, roll = matches.to(part.device).T
        far = torch.stack([torch.hypot(x - 0.5, y - 0.5) / FAR[0], scale.log() / FAR[1], roll / FAR[2]])
        scores = scores.to(part.device) * torch.exp(-far.square().sum(0) / 2)
        place = [to_photo(part, x - 0.5, y - 0.5), (part[:, 2] * scale)[:, None], (part[:, 3] + roll)[:, None]]
        found.append(torch.cat([scores[:, None], *place], 1))
    found = torch.cat(found)
    return found[:, 0], found[:, 1:]


def find_faces(face_parser, pixels):
    """The faces in uint8 pixels (H, W, 3): [(score, Window), ...], the best first.

    A window is where a portrait like those of the training would be cropped. The score is the mean of the locator's
    heat and of the parse's match.
    """
    levels, scale = pyramid(pixels, face_parser.device)
    heats, places = find_candidates(face_parser.locator, levels)
    found = []
    for _ in range(2):
        scores, matches = match_places(face_parser.models, levels, places, min(face_parser.size, SEARCH_SIDE))
        scores, matches = (scores + heats) / 2, matches * matches.new_tensor([scale, scale, scale, 1])
        found += zip(scores.tolist(), matches.tolist(), strict=True)
        # The locator errs about the roll of heads that are turned to a side; most are level.
        chosen = (scores < FACE_SCORE) & (heats > CERTAIN)
        heats, places = heats[chosen], places[chosen] * places.new_tensor([1, 1, 1, 0])
    return [(score, square(*place)) for score, place in distinct(found) if score >= FACE_SCORE]


@dataclass(frozen=True, eq=False)
class Face:
    """A face of a photo: its label map (h, w) uint8 inside `box` (left, top, w, h), 0 where the photo is not its own.

    `window` (left, top, width, height) turned clockwise around its centre by `angle` degrees is the face's portrait;
    what surrounds it was parsed too, so `box` may reach beyond it. `score` 0..1 is that of `find_faces`, or None.
    """

    mask: np.ndarray
    box: tuple
    window: tuple
    angle: float
    score: float | None


class Portrait(NamedTuple):
    """A parsed portrait: its score, its Window, the Window parsed around it and its log-probabilities (1, 19, h, w).

    Without log-probabilities nothing of a person is there.
    """

    score: float | None
    window: Window
    around: Window
    log_p: torch.Tensor | None


@dataclass(eq=False)
class Parsed:
    """The label map of a photo, and the face each pixel belongs to."""

    mask: np.ndarray  # uint8 (H, W)
    owner: np.ndarray  # int16 (H, W), index into faces, -1 far from any face
    faces: list  # of Face, left to right
    missed: bool = False  # no face was found
    alpha: np.ndarray | None = None  # uint8 (H, W): 255 times the probability of the labels asked for


def parse_photos(face_parser, photos, whole=False, box=None, cutout=None):
    """Parse photos of one size, a list of uint8 pixels (H, W, 3), with a predict.FaceParser: [Parsed, ...].

    A photo that is one portrait, like those of the training, or any photo with `whole`, is parsed as one portrait;
    otherwise each face found is parsed. Without a face, a photo that has skin where a portrait does is parsed as one,
    any other becomes background. `box` (left, top, width, height) is parsed as the only portrait instead; UserError if
    it does not touch the photos. `cutout`: labels (ids) whose probability becomes `alpha`.
    """
    if not photos:
        return []
    height, width = photos[0].shape[:2]
    window = Window(*(box or (0, 0, width, height)))
    if not overlap(window, (0, 0, width, height)) or max(window[2:4]) > 2 * max(height, width):
        raise UserError(f"box {box}: give one that overlaps the {width} x {height} pixels, at most twice as long")
    if box or whole:
        batch = parse_window(face_parser, photos, window, face_parser.size).split(1)
        return [paste(height, width, [Portrait(None, window, window, log_p)], cutout) for log_p in batch]
    parsed = [paste(height, width, find_portraits(face_parser, pixels, window), cutout) for pixels in photos]
    return [replace(one, missed=not one.faces or one.faces[0].score is None) for one in parsed]


def find_portraits(face_parser, pixels, everything):
    """The Portraits in a photo, from left to right; `everything` is the photo as a Window."""
    faces = find_faces(face_parser, pixels)
    for score, window in faces:
        if overlap(window, everything) >= PORTRAIT[0] and abs(window.angle) <= PORTRAIT[1]:
            log_p = parse_window(face_parser, [pixels], everything, face_parser.size)
            return [Portrait(score, everything, everything, log_p)]
    if faces:
        faces.sort(key=lambda face: face[1].left)
        portraits = (Portrait(score, window, *parse_face(face_parser, pixels, window)) for score, window in faces)
        return (p for p in portraits if p.log_p.argmax(1).any())  # a network for small images may show none there
    height, width = pixels.shape[:2]
    sideways, options = Window((width - height) // 2, (height - width) // 2, height, width), []
    for window, angle in [(everything, 0.0), (sideways, 90.0), (everything, 180.0), (sideways, 270.0)]:
        window = window._replace(angle=angle)
        log_p = parse_window(face_parser, [pixels], window, face_parser.size)
        likeness = portrait_likeness(log_p)
        options.append((likeness * (likeness >= (TURNED_LIKENESS if angle else LIKENESS)), window, log_p))
    likeness, window, log_p = max(options, key=lambda option: option[0])
    return [Portrait(None, window, window, log_p if likeness else None)]


def parse_face(face_parser, pixels, window):
    """Parse a portrait and its surroundings until nothing of the person reaches beyond them, or the photo ends.

    Returns the Window parsed and its log-probabilities (1, 19, h, w).
    """

    def parse(window, least):
        side = min(face_parser.size, max(least, math.ceil(window.width / 32) * 32))
        return parse_window(face_parser, [pixels], window, side)

    log_p, side = parse(window, SMALL_INPUT if window.width <= SMALL else face_parser.size), window.width
    for growth in GROWTH:
        more = round(window.width * growth) - window.width
        window = Window(window.left - more // 2, window.top - more // 2, *[window.width + more] * 2, window.angle)
        around = parse(window, SMALL_INPUT)
        log_p = blend(log_p, around, growth)
        rounded = continues(around, window, *pixels.shape[:2])
        if not rounded:
            break
    return window, confine(log_p, rounded, side / window.width)


def confine(log_p, rounded, portrait):
    """Make background certain in log-probabilities (1, 19, n, n) where labels are not connected to those at the centre.

    If `rounded`, also outside the superellipse BUST, which touches the lower edge: what continues ends in a curve, a
    little pointed, since an ellipse of few pixels has a straight end. Parts of a face lie inside the portrait, whose
    side is this fraction of n.
    """
    along = (torch.arange(log_p.shape[-1], device=log_p.device) + 0.5) / log_p.shape[-1] - 0.5
    log_p[:, FACE_LABELS[1:]] -= 50 * (torch.hypot(along, along[:, None]) > portrait / 2).to(log_p.dtype)
    labels = log_p.argmax(1, keepdim=True)
    allowed = labels > 0
    if rounded:
        half, centre, power = BUST
        across, down = along / half, (along[:, None] - centre) / (0.5 - centre)
        allowed &= across.abs() ** power + down.abs() ** power < 1
    # Grow from the centre in steps of 4 cells.
    coarse = F.max_pool2d(allowed.float(), 4, ceil_mode=True)
    middle = F.max_pool2d((torch.hypot(along, along[:, None]) < 0.1).float()[None, None], 4, ceil_mode=True)
    reached, grown = torch.zeros_like(coarse), coarse * middle
    while not grown.equal(reached):
        reached = grown
        for _ in range(8):
            grown = F.max_pool2d(grown, 3, 1, 1) * coarse
    kept = F.interpolate(reached, scale_factor=4)[..., : len(along), : len(along)] * allowed
    log_p[:, 0] += 50 * (1 - kept[:, 0])
    return log_p.log_softmax(1)


def continues(log_p, window, height, width):
    """True if labels reach the border of a parsed window (log-probabilities (1, 19, n, n)) inside the photo."""
    edges = [log_p[0, :, 0], log_p[0, :, -1], log_p[0, :, :, 0], log_p[0, :, :, -1]]
    labelled = torch.stack(edges, 1).argmax(0).cpu().numpy() > 0  # (4, n)
    count = labelled.shape[1]
    along, start = (np.arange(count) + 0.5) / count, np.zeros(count)
    x, y = window.photo_points(np.stack([along, along, start, start + 1]), np.stack([start, start + 1, along, along]))
    inside = (x > 0) & (x < width) & (y > 0) & (y < height)
    return (labelled & inside).sum() > REACH * 4 * count


def portrait_likeness(log_p):
    """IoU of skin and parts of a face (log-probabilities (1, 19, h, w)) with their usual place in a portrait."""
    face = log_p[0, FACE_LABELS].exp().sum(0)
    y, x = ((torch.arange(n, device=face.device) + 0.5) / n for n in face.shape)
    usual = (torch.hypot((x - 0.5) / 0.22, (y[:, None] - 0.56) / 0.36) < 1).float()  # 0.5 of the mean mask and more
    return (torch.minimum(face, usual).sum() / torch.maximum(face, usual).sum()).item()


def overlap(a, b):
    """Intersection over union of two windows (left, top, width, height, ...), as if both were level."""
    width, height = (max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    both = width * height
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def reduction(height, width):
    """The integer factor that reduces height x width to about MAX_PIXELS."""
    return max(1, math.ceil(math.sqrt(height * width / MAX_PIXELS)))


def parse_window(face_parser, photos, window, size):
    """Log-probabilities (B, 19, h, w), on the logit grid, of a Window of B photos; `size` is the input's side."""
    factor = reduction(window.height, window.width)
    if factor > 1:
        photos = [np.asarray(Image.fromarray(pixels).reduce(factor)) for pixels in photos]
        window = Window(*(-(-value // factor) for value in window[:4]), window.angle)
    images = np.stack([crop(pixels, window) for pixels in photos])
    return log_probabilities(face_parser.models, to_input(images, face_parser.device), size, face_parser.views)


def blend(inner, outer, growth):
    """Blend log-probabilities (1, 19, h, w) of a window into those of the window of `growth` times its sides.

    Returns (1, 19, growth * h, growth * w); h and w are multiples of 4. Hair and cloth continue where a portrait ends.
    """
    height, width = inner.shape[2:]
    joined = upsample(outer, (round(height * growth), round(width * growth)))
    y, x = ((torch.arange(n, device=inner.device) + 0.5) / n for n in (height, width))
    edge = torch.minimum(torch.minimum(y, 1 - y)[:, None], torch.minimum(x, 1 - x))
    top, left = (joined.shape[2] - height) // 2, (joined.shape[3] - width) // 2
    joined[:, :, top : top + height, left : left + width].lerp_(inner, (edge / FEATHER).clamp(max=1))
    return joined


def paste(height, width, portraits, cutout=None):
    """The Parsed of the Portraits in a photo, from left to right.

    In an overlap a pixel belongs to the portrait whose centre is nearer, relative to its side, of those in which it is
    not background, if there are any. Outside all windows the label is background and the owner -1.
    """
    mask, owner = np.zeros((height, width), np.uint8), np.full((height, width), -1, np.int16)
    alpha = np.full((height, width), 255 * (0 in cutout), np.uint8) if cutout else None
    nearest, found = np.full((height, width), np.inf, np.float32), []
    for index, (score, window, around, log_p) in enumerate(portraits):
        corners = np.stack(around.photo_points(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])))
        low, high = np.floor(corners.min(1)).astype(int), np.ceil(corners.max(1)).astype(int)
        (left, top), (right, bottom) = low.clip(0), high.clip(0, [width, height])
        place = np.s_[top : max(top, bottom), left : max(left, right)]
        found.append((score, window, place))
        if log_p is None or not mask[place].size:
            owner[place] = index
            continue
        rows, columns, distance = _inside(around, place)
        inside = (rows >= 0) & (rows < around.height) & (columns >= 0) & (columns < around.width)
        factor = reduction(around.height, around.width)
        grid = -(-around.height // factor), -(-around.width // factor)
        cells = rows.clip(0, around.height - 1) // factor, columns.clip(0, around.width - 1) // factor
        labels = label_map(log_p, *grid)[0].cpu().numpy()[cells]
        distance = distance * np.float32(around.width / window.width) + BEYOND * (labels == 0)
        nearer = inside & (distance < nearest[place])
        nearest[place][nearer] = distance[nearer]
        owner[place][nearer] = index
        mask[place][nearer] = labels[nearer]
        if cutout:
            # Steeper than the probability: 255 from 0.75 on, 0 up to 0.25.
            p = (2 * log_p[:, cutout].exp().sum(1, keepdim=True) - 0.5) * 255
            opacity = upsample(p, grid)[0, 0].clamp(0, 255).round().byte().cpu().numpy()
            alpha[place][nearer] = opacity[cells][nearer]
    faces = []
    for index, (score, window, place) in enumerate(found):
        own = np.where(owner[place] == index, mask[place], 0)
        x0, y0, x1, y1 = own.any() and Image.fromarray(own).getbbox() or (0, 0, 0, 0)
        box = int(place[1].start) + x0, int(place[0].start) + y0, x1 - x0, y1 - y0
        angle, score = round(window.angle, 1), score and round(score, 3)
        faces.append(Face(own[y0:y1, x0:x1], box, window[:4], angle, score))
    if cutout and found:  # a soft edge, but nothing far from the labels
        reach = max(2, max(window.width for _, window, _ in found) // 100)
        near = Image.fromarray(np.isin(mask, cutout)).convert("L").filter(ImageFilter.BoxBlur(reach))
        alpha[np.asarray(near) == 0] = 0
    return Parsed(mask, owner, faces, alpha=alpha)


def _inside(window, place):
    """Row and column in a window, int (h, w) or to be broadcast, of the photo's pixels `place` (two slices), and their
    distance from its centre as a fraction of its side (h, w) float32."""
    angle = math.radians(window.angle)
    y = (np.arange(place[0].start, place[0].stop) + 0.5 - window.top - window.height / 2)[:, None]
    x = np.arange(place[1].start, place[1].stop) + 0.5 - window.left - window.width / 2
    if angle:
        x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    distance = np.hypot(y / window.height, x / window.width, dtype=np.float32, casting="same_kind")
    rows, columns = (np.floor(v + length / 2).astype(int) for v, length in ((y, window.height), (x, window.width)))
    return rows, columns, distance
