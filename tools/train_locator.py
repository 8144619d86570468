"""Train the Locator of photo.py, which proposes where faces are in a photo, on scenes made of the pairs.

python -m tools.train_locator --data data --overwrite                 # runs/release/locator.pt, on the training pairs
python -m tools.train_locator --start a.pt --steps 200 --output b.pt  # from other weights

As in CenterNet (arXiv 1904.07850) the targets are a heat map of face centres, and around each centre the side and the
roll of the portrait. Portraits are cut out by their masks and pasted at any size, roll and place, among some whose
faces are spoilt.
"""

import math
import time
from dataclasses import replace
from pathlib import Path

from common import ArgumentParser, UserError, duration, make_folder, natural, positive, run_main, show_progress

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import checkpoint
import register
from augment import PRESETS, Strength, colour, degrade, draw
from data import find_data, load_pairs, split
from device import select_device
from labels import NAMES
from photo import CANVAS, CENTRE, PORTRAIT_SIDES, STRIDE, UNIT, Locator, load_locator
from views import to_input

BATCH = 16
LEARNING_RATE = 2e-3
QUALITY = replace(
    Strength(**PRESETS["robust"]), contrast=0.4, saturation=0.6, gamma=0.3, defocus=0.3, grain=0.2, jpeg=0.3
)


class Scenes(IterableDataset):
    """Training images: portraits pasted onto clutter of their own parts, among portraits whose faces are spoilt."""

    def __init__(self, pairs, indices, seed):
        self.rng, self.portraits = np.random.default_rng(seed), []
        for index in indices:  # PIL RGBA 256 x 256, opaque where the mask is not background; the mask
            image, mask = Image.fromarray(pairs.images[index]).reduce(2), pairs.masks[index][::2, ::2]
            image.putalpha(Image.fromarray(mask > 0).convert("L"))  # last: reducing makes what is transparent black
            self.portraits.append((image, mask))

    def chance(self, probability):
        return self.rng.random() < probability

    def patch(self, width, height):
        """A piece of some portrait around its face (hair, cloth, background), stretched to width x height: RGBA."""
        rng = self.rng
        portrait, _ = self.portraits[rng.integers(len(self.portraits))]
        detail = self.chance(0.35)  # one eye, ear, nostril, pattern: too close to be a face
        side = rng.uniform(10, 50) if detail else rng.uniform(24, 80)
        x, y = rng.uniform(0, 256 - side, 2)
        if not detail and 60 - side < x < 190 and 80 - side < y < 210:
            x = rng.choice([0, 256 - side])
        # Some are repeated, for fine texture.
        across, down = rng.integers(4, 40, 2).tolist() if self.chance(0.3) else (width, height)
        piece = portrait.crop((x, y, x + side, y + side)).transpose(Image.Transpose(rng.integers(7)))
        piece = np.asarray(piece.convert("RGB").resize((across, down), Image.Resampling.BILINEAR))
        repeats = -(-height // down), -(-width // across), 1
        return Image.fromarray(np.tile(piece, repeats)[:height, :width]).convert("RGBA")

    def blob(self, width, height):
        """A patch in the shape of an ellipse or a rectangle, perhaps turned: RGBA."""
        piece, shape = self.patch(width, height), Image.new("L", (width, height), 0)
        pen = ImageDraw.Draw(shape)
        (pen.ellipse if self.chance(0.5) else pen.rectangle)((0, 0, width - 1, height - 1), fill=255)
        piece.putalpha(shape)
        return piece.rotate(self.rng.uniform(0, 90), Image.Resampling.BILINEAR) if self.chance(0.5) else piece

    def doodle(self):
        """A letter, arc, line, ring or dot, turned, as signs, jewellery and buttons are: RGBA."""
        rng, size = self.rng, int(self.rng.integers(8, 70))
        image = Image.new("RGBA", (size, size), (*rng.integers(0, 256, 3).tolist(), 0))
        pen, box = ImageDraw.Draw(image), (1, 1, size - 2, int(rng.integers(4, size - 1)))
        kind, wide, ink = rng.integers(5), int(rng.integers(1, 7)), (*rng.integers(0, 256, 3).tolist(), 255)
        if kind == 0:
            pen.text((1, 0), chr(rng.integers(33, 127)) * int(rng.integers(1, 4)), fill=ink, font_size=size * 0.8)
        elif kind == 1:
            pen.arc(box, *rng.uniform(0, 360, 2).tolist(), fill=ink, width=wide)
        elif kind == 2:
            pen.line(box, fill=ink, width=wide)
        else:
            pen.ellipse(box, fill=ink if kind == 3 else None, outline=ink, width=wide)
        return image.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR)

    def background(self):
        """A canvas of one patch or colour, with blobs and doodles at random places."""
        rng, canvas = self.rng, self.patch(CANVAS, CANVAS)
        if self.chance(0.3):
            canvas.paste(tuple(rng.integers(0, 256, 3).tolist()), (0, 0, CANVAS, CANVAS))
        sizes = np.exp(rng.uniform(math.log(8), math.log(CANVAS), (rng.integers(0, 14), 2))).astype(int).tolist()
        pieces = [self.blob(*size) for size in sizes] + [self.doodle() for _ in range(rng.integers(0, 6))]
        for piece in pieces:
            canvas.paste(piece, tuple(rng.integers(-20, CANVAS - 5, 2).tolist()), piece)
        return canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3))) if self.chance(0.4) else canvas

    def spoil(self, portrait, mask):
        """A portrait RGBA without a face: its parts in disorder, hidden, or in a foreign skin like an animal's."""
        rng, kind = self.rng, self.rng.random()
        if kind < 0.3:
            side = int(rng.integers(30, 44))
            places = [(64 + side * i, 80 + side * j) for i in range(128 // side) for j in range(128 // side)]
            spoilt = portrait.copy()
            for (x, y), place in zip(places, rng.permutation(places).tolist(), strict=True):
                spoilt.paste(portrait.crop((x, y, x + side, y + side)), place)
            return spoilt
        eyes, others = ("l_eye", "r_eye", "eye_g"), ("nose", "mouth", "u_lip", "l_lip", "l_brow", "r_brow")
        chosen = [name for name in eyes + others if self.chance(0.6)]
        if kind < 0.6:
            chosen += eyes
            inside, outside = portrait.filter(ImageFilter.GaussianBlur(rng.uniform(8, 20))), portrait
        else:
            inside, outside = portrait, self.patch(256, 256)
        shape = Image.fromarray(np.isin(mask, [NAMES.index(name) for name in chosen])).convert("L")
        shape = shape.filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.GaussianBlur(3))
        spoilt = Image.composite(inside, outside, shape)
        spoilt.putalpha(portrait.getchannel("A"))
        return spoilt

    def turn(self, portrait):
        """The portrait as if the head were turned to a side: one half of the face narrower, the other wider."""
        by, eye = self.rng.uniform(-0.7, 0.7), 0.26  # of half the side
        knots = [-1, -eye * (1 + by), 0, eye * (1 - by), 1]
        places = np.interp(np.linspace(-1, 1, 256), knots, [-1, -eye, 0, eye, 1])
        return Image.fromarray(np.asarray(portrait)[:, ((places + 1) * 127.5).round().astype(int)])

    def paste(self, canvas, taken, spoilt=False):
        """Paste a portrait and append its (x, y, side, roll in radians, spoilt) to `taken`, if there is a place."""
        rng = self.rng
        side, (x, y) = round(np.exp(rng.uniform(*np.log(PORTRAIT_SIDES)))), rng.uniform(0, CANVAS, 2)
        if any(math.hypot(x - a, y - b) < 0.33 * (side + other) for a, b, other, *_ in taken):
            return
        roll = rng.normal(0, 0.25) if self.chance(0.5) else rng.uniform(-np.pi, np.pi)
        image, mask = self.portraits[rng.integers(len(self.portraits))]
        if spoilt:
            image = self.spoil(image, mask)
        elif self.chance(0.3):
            image = self.turn(image)
        if self.chance(0.25):  # a hand, cap, microphone or mask before the face
            piece = self.blob(*rng.integers(25, 120, 2).tolist())
            image = image.copy()
            image.paste(piece, tuple(rng.integers(20, 200, 2).tolist()), piece)
        kind, stretch = rng.random(), np.exp(rng.normal(0, 0.08)) * rng.choice([1, 1, rng.uniform(0.6, 1)])
        if kind < 0.3:  # with its own background: resizing makes what is transparent black
            image = image.convert("RGB").convert("RGBA")
        image = image.resize((max(8, round(side * stretch)), side), Image.Resampling.BILINEAR, reducing_gap=3)
        if self.chance(0.5):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if kind < 0.3:  # the border fades, so that squares are no sign of a face
            fade, margin = Image.new("L", image.size, 0), round(side * rng.uniform(0, 0.1))
            fade.paste(255, (margin, margin, image.width - margin, image.height - margin))
            image.putalpha(fade.filter(ImageFilter.GaussianBlur(margin / 2)))
        elif kind < 0.5:
            image = self.extend(image)
        below = CENTRE * side - image.height / 2  # from the middle of the image to the face's centre
        image = image.rotate(-math.degrees(roll), Image.Resampling.BILINEAR, expand=True)
        left, top = x + below * math.sin(roll) - image.width / 2, y - below * math.cos(roll) - image.height / 2
        canvas.paste(image, (round(left), round(top)), image)
        taken.append((x, y, side, roll, spoilt))

    def extend(self, image):
        """The portrait with a body, half its height, below its neck."""
        width, height = image.size
        whole, shape = Image.new("RGBA", (width, height * 3 // 2)), Image.new("L", image.size, 0)
        ImageDraw.Draw(shape).ellipse((0, 0, width, height * 2), fill=255)
        whole.paste(self.patch(width, height), (0, round(height * 0.92)), shape)
        whole.alpha_composite(image)
        return whole

    def scene(self):
        """(uint8 (CANVAS, CANVAS, 3), [(x, y, side, roll), ...])."""
        canvas, taken = self.background(), []
        for _ in range(self.rng.integers(0, 8)):
            self.paste(canvas, taken, self.chance(0.3))
        return np.array(canvas.convert("RGB")), [place for *place, spoilt in taken if not spoilt]

    def batch(self, count):
        """Images (B, 3, CANVAS, CANVAS) 0..1; targets (B, 6, cells, cells) as Locator gives them, heat 0..1."""
        scenes = [self.scene() for _ in range(count)]
        images = to_input(np.stack([pixels for pixels, _ in scenes]), "cpu").float() / 255
        params = draw(count, QUALITY, [int(self.rng.integers(2**31))])
        params["reduce"] = params["reduce"].clamp(min=0.4)  # what is smaller shows no face
        images = degrade(colour(images, params), params)
        middle = np.arange(CANVAS // STRIDE) + 0.5
        targets = np.zeros((count, 6, len(middle), len(middle)), np.float32)
        for target, (_, faces) in zip(targets, scenes, strict=True):
            for x, y, side, roll in faces:
                x, y, width = x / STRIDE, y / STRIDE, max(0.5, side / STRIDE * 0.07)
                dx, dy = x - middle, (y - middle)[:, None]
                heat = np.exp(-(dx**2 + dy**2) / (2 * width**2))
                heat[int(y), int(x)] = 1
                values = heat, dx, dy, math.log(side / UNIT), math.cos(roll), math.sin(roll)
                nearer = heat > target[0]
                target[:, nearer] = np.stack(np.broadcast_arrays(*values))[:, nearer]
        return images, torch.from_numpy(targets)

    def __iter__(self):
        while True:
            yield self.batch(BATCH)


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
    """Train a Locator for `steps` batches: AdamW, one-cycle cosine."""
    locator.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(locator.parameters(), LEARNING_RATE, weight_decay=1e-2)
    # With 0.1 it would divide by zero for 10 steps.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.11)
    begin, mean = time.monotonic(), 0.0
    batches = iter(DataLoader(scenes, batch_size=None, num_workers=1))
    for step in range(steps):
        images, targets = next(batches)
        loss = locator_loss(locator(images.contiguous(memory_format=torch.channels_last)), targets)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(locator.parameters(), 10)
        optimiser.step()
        schedule.step()
        mean += (loss.item() - mean) / min(step + 1, 100)
        show_progress(f"loss {mean:.3f}, step", step + 1, steps, time.monotonic() - begin)
    print(f"loss {mean:.3f} after {steps} steps, {duration(time.monotonic() - begin)}")
    locator.eval()


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with train/; default ./data, else synthetic faces")
    parser.add_argument("--cache", default="build/cache", help="folder of the decoded copies")
    parser.add_argument("--output", "--out", type=Path, default=register.RELEASE / "locator.pt", help="file to write")
    parser.add_argument("--start", "--from", type=Path, help="weights to start from")
    parser.add_argument("--steps", type=positive, default=2400, help=f"batches of {BATCH} images")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--threads", type=natural, default=0, help="CPU threads; 0: torch's default")
    parser.switch("--overwrite", help="replace the file")
    args = parser.parse_args()
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} exists: OVERWRITE=1 replaces it, or give another OUT (--out)")
    make_folder(args.output.parent)
    select_device("cpu", args.threads)
    torch.manual_seed(args.seed)
    pairs = load_pairs(find_data(args.data), args.cache)
    locator = load_locator(path=args.start) if args.start else Locator()
    train(locator, Scenes(pairs, split(len(pairs.names))[0], args.seed), args.steps)
    checkpoint.save(args.output, {name: value.half() for name, value in locator.state_dict().items()})
    count = sum(p.numel() for p in locator.parameters())
    print(f"{args.output}: {count:,} parameters, {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main(main)
