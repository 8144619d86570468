"""Where faces may be in a photo: a small fully convolutional network, its training from the pairs, and the search.

python locate.py --data data                 # trains runs/release/locator.pt on the training pairs, 20 minutes
python locate.py --steps 200 --output a.pt   # a quick look

Like CenterNet (arXiv 1904.07850) the network gives a heat map of face centres, and for each centre the side and the
roll of the portrait around it. It sees portraits of 24 to 176 pixels; two further looks at the photo, each reduced four
times, find the larger ones. It is trained on portraits cut out by their masks and pasted at any size, roll and place.
The parser then confirms what it found (photo.py), so that a false alarm costs only time.
"""

import io
import math
import time
from pathlib import Path

from common import ArgumentParser, UserError, positive, run_main, show_progress

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageStat
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import checkpoint
import register
from data import find_data, load_pairs, split
from views import to_input

STRIDE = 8
UNIT = 64  # pixels: the portrait side whose logarithm is 0
SIDES = 24, 176  # pixels of the portraits in training
LEVEL = 4  # reduction from one look to the next
CENTRE = 0.56  # height of a face's centre (the bridge of the nose to the lips) in its portrait, from the top
MAX_PIXELS = 1_600_000  # of the first look: larger photos are reduced
HEAT = 0.25  # minimum of a candidate
CANVAS = 192  # side of the training images
BATCH = 16
LEARNING_RATE = 2e-3


class Block(nn.Module):
    """Residual depthwise 7 x 7 and two pointwise convolutions, as in ConvNeXt (arXiv 2201.03545) with batch norm."""

    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.expand, self.project = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # a CPU trains depthwise convolutions faster in float32
            y = self.depthwise(x.float())
        return x + self.project(F.relu(self.expand(self.norm(y))))


class Locator(nn.Module):
    """Images (B, 3, H, W), values 0..1, sides multiples of 8, to (B, 6, H/8, W/8).

    Channels: logit of a face centre; its x and y from the middle of the cell, in cells; logarithm of the portrait's
    side over UNIT; cosine and sine of the roll, of any length.
    """

    def __init__(self, width=64, blocks=4):
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


def load_locator(device="cpu", path=None):
    """The trained Locator, ready for inference. UserError if the file is missing or damaged."""
    path = path or register.RELEASE / "locator.pt"
    if not Path(path).is_file():
        raise UserError(f"no {path}, which finds faces: `make locator` trains it; --whole needs no search")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}): restore it or train it with `make locator`"
        ) from None
    locator = Locator()
    checkpoint.load_state(locator, {name: value.float() for name, value in state.items()}, path)
    return locator.to(device, memory_format=torch.channels_last).eval()


@torch.inference_mode()
def find_candidates(locator, pixels, device):
    """Candidates for faces in uint8 pixels (H, W, 3), unsorted: float64 (N, 5).

    Columns: heat 0..1, x and y of the portrait's centre and its side in pixels, roll in degrees (clockwise, -180..180).
    """
    height, width = pixels.shape[:2]
    scale = min(1, math.sqrt(MAX_PIXELS / (height * width)))
    found = []
    while True:
        size = [max(STRIDE, round(length * scale / STRIDE) * STRIDE) for length in (width, height)]
        image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
        images = to_input(np.array(image)[None], device).float() / 255
        output = locator(images.contiguous(memory_format=torch.channels_last))[0].float()
        heat = output[0].sigmoid()
        peaks = (heat == F.max_pool2d(heat[None], 3, 1, 1)[0]) & (heat > HEAT)
        rows, columns = peaks.nonzero(as_tuple=True)
        values = output[:, rows, columns]
        x, y = ((place + 0.5 + shift) * STRIDE for place, shift in ((columns, values[1]), (rows, values[2])))
        side, roll = UNIT * values[3].exp(), torch.atan2(values[5], values[4])
        # From the face's centre to the portrait's, which lies above it.
        x, y = (
            x + (CENTRE - 0.5) * side * roll.sin(),
            y - (CENTRE - 0.5) * side * roll.cos(),
        )
        x, y, side = x * (width / size[0]), y * (height / size[1]), side * (width / size[0])
        found.append(torch.stack([heat[rows, columns], x, y, side, roll.rad2deg()], 1).double().cpu())
        if max(size) <= SIDES[0] * 2:
            break
        scale /= LEVEL
    return torch.cat(found).numpy()


class Scenes(IterableDataset):
    """Training images: portraits pasted onto clutter made of parts of portraits without a face, and their faces."""

    def __init__(self, pairs, indices, seed):
        self.rng, self.pairs, self.indices = np.random.default_rng(seed), pairs, indices
        self.portraits = []  # PIL RGBA 256 x 256, opaque where the mask is not background
        for index in indices:
            opaque = Image.fromarray((pairs.masks[index] > 0).astype(np.uint8) * 255)
            image = Image.fromarray(pairs.images[index])
            image.putalpha(opaque)
            self.portraits.append(image.reduce(2))

    def chance(self, probability):
        return self.rng.random() < probability

    def patch(self, width, height):
        """A piece of some portrait around its face (hair, cloth, background), stretched to width x height."""
        rng = self.rng
        portrait = self.portraits[rng.integers(len(self.portraits))].convert("RGB")
        if self.chance(0.35):  # or one eye, ear, nostril, pattern: too close to be a face
            side = rng.uniform(10, 50)
            x, y = rng.uniform(0, 256 - side, 2)
        else:
            side = rng.uniform(24, 80)
            x, y = rng.uniform(0, 256 - side, 2)
            if 60 - side < x < 190 and 80 - side < y < 210:
                x = rng.choice([0, 256 - side])
        across, down = width, height
        if self.chance(0.3):  # repeated, for fine texture
            across, down = rng.integers(4, 40, 2).tolist()
        piece = portrait.resize((across, down), Image.Resampling.BILINEAR, (x, y, x + side, y + side), reducing_gap=2)
        piece = np.asarray(piece.transpose(Image.Transpose(rng.integers(7))).resize((across, down)))
        repeats = -(-height // down), -(-width // across), 1
        return Image.fromarray(np.tile(piece, repeats)[:height, :width])

    def background(self):
        """A canvas of one patch, or of several at random places."""
        rng = self.rng
        canvas = self.patch(CANVAS, CANVAS)
        if self.chance(0.3):
            canvas.paste(tuple(rng.integers(0, 256, 3).tolist()), (0, 0, CANVAS, CANVAS))
        for _ in range(rng.integers(0, 14)):
            width, height = np.exp(rng.uniform(np.log(8), np.log(CANVAS), 2)).astype(int).tolist()
            piece = self.patch(width, height)
            shape = Image.new("L", piece.size, 0)
            draw = ImageDraw.Draw(shape)
            (draw.ellipse if self.chance(0.5) else draw.rectangle)((0, 0, width - 1, height - 1), fill=255)
            if self.chance(0.5):
                piece, shape = (part.rotate(rng.uniform(0, 90), Image.Resampling.BILINEAR) for part in (piece, shape))
            canvas.paste(piece, tuple(rng.integers(-20, CANVAS - 5, 2).tolist()), shape)
        for _ in range(rng.integers(0, 6)):
            canvas = self.doodle(canvas)
        return canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3))) if self.chance(0.4) else canvas

    def doodle(self, canvas):
        """Draw a letter, arc, ring, line or dot, turned, as signs, jewellery and buttons are."""
        rng = self.rng
        size = int(rng.integers(8, 70))
        shape = Image.new("L", (size, size))
        draw, box, wide = (
            ImageDraw.Draw(shape),
            (1, 1, size - 2, int(rng.integers(4, size - 1))),
            int(rng.integers(1, 7)),
        )
        kind = rng.integers(5)
        if kind == 0:
            draw.text((1, 0), chr(rng.integers(33, 127)) * int(rng.integers(1, 4)), fill=255, font_size=size * 0.8)
        elif kind == 1:
            draw.arc(box, *rng.uniform(0, 360, 2).tolist(), fill=255, width=wide)
        elif kind == 2:
            draw.line(box, fill=255, width=wide)
        else:
            draw.ellipse(box, fill=255 if kind == 3 else None, outline=255, width=wide)
        shape = shape.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR)
        canvas.paste(tuple(rng.integers(0, 256, 3).tolist()), tuple(rng.integers(0, CANVAS - 8, 2).tolist()), shape)
        return canvas

    def paste(self, canvas, faces):
        """Paste a portrait and append its (x, y, side, roll in radians) to `faces`, if there is a place for it."""
        rng = self.rng
        portrait = self.portraits[rng.integers(len(self.portraits))]
        side = round(np.exp(rng.uniform(*np.log(SIDES))))
        roll = rng.normal(0, 0.25) if self.chance(0.5) else rng.uniform(-np.pi, np.pi)
        x, y = rng.uniform(0, CANVAS, 2)
        if any(math.hypot(x - a, y - b) < 0.35 * (side + other) for a, b, other, _ in faces):
            return
        stretch = np.exp(rng.normal(0, 0.08)) * rng.choice([1, 1, rng.uniform(0.6, 1)])  # as if turned
        image = portrait.resize((max(8, round(side * stretch)), side), Image.Resampling.BILINEAR, reducing_gap=3)
        if self.chance(0.5):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        kind = rng.random()
        if kind < 0.3:  # with its own background; the border fades, so that squares are no sign of a face
            fade = Image.new("L", image.size, 0)
            margin = round(side * rng.uniform(0, 0.1))
            fade.paste(255, (margin, margin, image.width - margin, image.height - margin))
            image.putalpha(fade.filter(ImageFilter.GaussianBlur(margin / 2)))
        elif kind < 0.5:  # the body goes on
            body = self.patch(image.width, side)
            image = _extend(image, body)
        size = image.size
        image = image.rotate(-math.degrees(roll), Image.Resampling.BILINEAR, expand=True)
        # From the face's centre to that of the pasted image.
        below = (CENTRE * side) - size[1] / 2
        left, top = x + below * math.sin(roll) - image.width / 2, y - below * math.cos(roll) - image.height / 2
        canvas.paste(image, (round(left), round(top)), image)
        faces.append((x, y, side, roll))

    def scene(self):
        """(uint8 (CANVAS, CANVAS, 3), [(x, y, side, roll), ...])."""
        rng, faces = self.rng, []
        canvas = self.background()
        for _ in range(rng.integers(0, 7)):
            self.paste(canvas, faces)
        for _ in range(rng.integers(0, 3)):  # hands, glasses, microphones before the faces
            width, height = rng.integers(4, 30, 2).tolist()
            canvas.paste(self.patch(width, height), tuple(rng.integers(0, CANVAS, 2).tolist()))
        if self.chance(0.3):  # low resolution
            small = round(CANVAS / rng.uniform(1, 2.5))
            canvas = canvas.resize((small, small), Image.Resampling.BOX).resize(canvas.size, Image.Resampling.BICUBIC)
        if self.chance(0.2):
            canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
        if self.chance(0.3):
            file = io.BytesIO()
            canvas.save(file, format="JPEG", quality=int(rng.integers(15, 70)))
            canvas = Image.open(file)
        return self.colour(canvas), faces

    def colour(self, image):
        """Change saturation, contrast, gamma and tint of a PIL image, and add noise: uint8 (CANVAS, CANVAS, 3)."""
        rng = self.rng
        saturation = 0 if self.chance(0.12) else rng.uniform(0.3, 1.5)
        image = ImageEnhance.Color(image).enhance(saturation)
        gamma, contrast = np.exp(rng.uniform(-0.6, 0.6)), rng.uniform(0.5, 1.3)
        mean = ImageStat.Stat(image.convert("L")).mean[0] / 255
        light = rng.uniform(0.5, 1.3) * rng.uniform(0.88, 1.12, (3, 1))
        curve = ((np.arange(256) / 255) ** gamma - mean**gamma) * contrast + mean**gamma
        image = image.point((curve * light * 255).clip(0, 255).round().astype(int).ravel().tolist())
        if not self.chance(0.3):
            return np.asarray(image)
        noise = rng.standard_normal((CANVAS, CANVAS, 3), np.float32) * rng.uniform(2, 20)
        return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)

    def batch(self, count):
        """Images (B, 3, CANVAS, CANVAS) 0..1; targets (B, 6, cells, cells) as Locator gives them, heat 0..1."""
        scenes = [self.scene() for _ in range(count)]
        images = torch.from_numpy(np.stack([pixels for pixels, _ in scenes])).permute(0, 3, 1, 2).float() / 255
        cells = CANVAS // STRIDE
        targets = np.zeros((count, 6, cells, cells), np.float32)
        middle = np.arange(cells) + 0.5
        for target, (_, faces) in zip(targets, scenes, strict=True):
            for x, y, side, roll in faces:
                x, y = x / STRIDE, y / STRIDE
                dx, dy = np.broadcast_arrays(x - middle, (y - middle)[:, None])
                width = max(0.5, side / STRIDE * 0.07)
                heat = np.exp(-(dx**2 + dy**2) / (2 * width**2))
                heat[min(int(y), cells - 1), min(int(x), cells - 1)] = 1
                nearer = heat > target[0]
                fixed = (np.full_like(dx, value) for value in (math.log(side / UNIT), math.cos(roll), math.sin(roll)))
                values = heat, dx, dy, *fixed
                target[:, nearer] = np.stack(values)[:, nearer]
        return images, torch.from_numpy(targets)

    def __iter__(self):
        while True:
            yield self.batch(BATCH)


def _extend(image, body):
    """The portrait RGBA with half its height of `body` below its neck."""
    width, height = image.size
    whole = Image.new("RGBA", (width, height * 3 // 2))
    shape = Image.new("L", body.size, 0)
    ImageDraw.Draw(shape).ellipse((0, 0, width, height * 2), fill=255)
    whole.paste(body, (0, round(height * 0.92)), shape.crop((0, 0, *body.size)))
    whole.alpha_composite(image)
    return whole


def locator_loss(output, target):
    """CenterNet's loss of outputs and targets (B, 6, h, w): focal loss of the heat, smooth L1 near the centres."""
    heat, wanted = output[:, 0], target[:, 0]
    p, centres = heat.sigmoid(), (wanted == 1).float()
    count = centres.sum().clamp_min(1)
    missed = (centres * (1 - p) ** 2 * -F.logsigmoid(heat)).sum()
    false = ((1 - centres) * (1 - wanted) ** 4 * p**2 * -F.logsigmoid(-heat)).sum()
    near = (wanted > 0.3).float()[:, None] * wanted[:, None]
    error = F.smooth_l1_loss(output[:, 1:], target[:, 1:], reduction="none", beta=0.1).sum(1, keepdim=True)
    return (missed + false) / count + (near * error).sum() / near.sum().clamp_min(1)


def train(locator, scenes, steps):
    """Train a Locator for `steps` batches: AdamW, one-cycle cosine, bfloat16."""
    locator.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(locator.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    begin, mean = time.monotonic(), 0.0
    batches = iter(DataLoader(scenes, batch_size=None, num_workers=1))
    for step in range(steps):
        images, targets = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            output = locator(images.contiguous(memory_format=torch.channels_last))
        loss = locator_loss(output.float(), targets)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(locator.parameters(), 10)
        optimiser.step()
        schedule.step()
        mean += (loss.item() - mean) / min(step + 1, 100)
        if step % 100 == 99:
            print(f"step {step + 1}  loss {mean:.3f}  {time.monotonic() - begin:.0f} s", flush=True)
        show_progress("training", step + 1, steps, time.monotonic() - begin)
    locator.eval()


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with train/; default ./data, else synthetic faces")
    parser.add_argument("--cache", default="build/cache", help="folder of the decoded copies")
    parser.add_argument("--output", "--out", type=Path, default=register.RELEASE / "locator.pt", help="file to write")
    parser.add_argument("--start", "--from", type=Path, help="weights to start from")
    parser.add_argument("--steps", type=positive, default=2400, help=f"batches of {BATCH} images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    args = parser.parse_args()
    checkpoint.select_device("cpu", args.threads)
    torch.manual_seed(args.seed)
    pairs = load_pairs(find_data(args.data), args.cache)
    locator = load_locator(path=args.start) if args.start else Locator()
    train(locator, Scenes(pairs, split(len(pairs.names))[0], args.seed), args.steps)
    checkpoint.save(args.output, {name: value.half() for name, value in locator.state_dict().items()})
    count = sum(p.numel() for p in locator.parameters())
    print(f"{args.output}: {count:,} parameters, {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main(main)
