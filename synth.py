"""Draw a synthetic face-parsing dataset: cartoon faces with exact masks, for when CelebAMask-HQ is not at hand.

python synth.py                                        # data-synth/: 200 train pairs, 8 dev, 8 test images
python synth.py --out data-tiny --train 20 --size 128

The parts of a face (cartoon.py) are painted on image and mask alike, so the two agree by construction. How often a
label occurs and how large it is follow CelebAMask-HQ (Lee et al., arXiv 1907.11922). A stopped run goes on where it
ended, and no folder is touched that synth.py did not make.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from atomic import atomic, write_text
from cartoon import ID, draw_person, parts, rgba
from errors import ArgumentParser, UserError, run_main
from labels import PALETTE
from parallel import in_parallel

MARKER = "SYNTHETIC.txt"  # stands in every folder drawn here


def backdrop(rng, who, size):
    """RGB background: a gradient of two colours with blobs and panels, more or less out of focus."""
    ends = rng.uniform(10, 245, (2, 1)) + rng.normal(0, 22, (2, 3))
    if rng.random() < 0.3:
        ends[0] = (who.hair, who.skin)[rng.integers(2)]
    mix = np.add.outer(*(rng.uniform(-0.7, 0.7, (2, 1)) * np.linspace(-1, 1, 64))) / 2 + 0.5
    canvas = Image.fromarray((ends[0] + (ends[1] - ends[0]) * mix[..., None]).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(rng.integers(0, 12)):
        x, y, w, h = rng.uniform((-10, -10, 3, 3), (64, 64, 24, 40))
        paint = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        paint((x, y, x + w, y + h), rgba(rng.uniform(10, 245) + rng.normal(0, 30, 3), 1, rng.uniform(30, 200)))
    return canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.6, 4))).resize((size, size), Image.Resampling.BICUBIC)


def noise(rng, rows, columns, size):
    """Smooth noise of about unit strength, float32 (size, size), from a grid of rows x columns."""
    grid = Image.fromarray(rng.standard_normal((rows, columns), np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def draw_face(seed, size=512):
    """One face and its mask, the same for the same seed (an int, or several) and size.

    Returns (image, mask): RGB, and mode P with labels 0..18 and the dataset's palette, both size x size pixels.
    """
    rng = np.random.default_rng(seed)
    who = draw_person(rng)
    pitch, roll, zoom = rng.normal(0, 0.08), rng.normal(0, 0.06), rng.normal(1, 0.03)
    turn = zoom * np.array([(np.cos(roll), -np.sin(roll)), (np.sin(roll), np.cos(roll))])
    centre = (256, 290) + rng.normal(0, 3, 2)

    # Twice the size, so that reduce(2) smooths the image's edges; the mask keeps every second pixel.
    canvas = backdrop(rng, who, size).resize((2 * size, 2 * size), Image.Resampling.NEAREST)
    labels = Image.new("L", canvas.size)
    draw, draw_label = ImageDraw.Draw(canvas, "RGBA"), ImageDraw.Draw(labels)
    for label, depth, colour, points in parts(rng, who):
        # A turn of the head moves near parts one way and far ones the other; the face is curved, too.
        depth = depth - np.minimum(abs(points[:, :1]), 150) ** 2 / 400
        points = points * (np.cos(who.yaw), 1) + depth * (np.sin(who.yaw), np.sin(pitch))
        corners = ((points @ turn.T + centre) * (2 * size / 512)).ravel().tolist()
        draw.polygon(corners, fill=colour)
        if label is not None:
            draw_label.polygon(corners, fill=label)
    mask = np.asarray(labels)[1::2, 1::2]
    image = canvas.reduce(2)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 1.2) * size / 512))

    x = np.linspace(-1, 1, size, dtype=np.float32)
    y, (across, down) = x[:, None], rng.uniform(-0.25, 0.25, 2).astype(np.float32)
    shade = 1 + across * x + down * y + 0.05 * noise(rng, 6, 6, size)
    shade -= (mask > 0) * np.float32(rng.uniform(0.05, 0.3)) * (1.8 * x**2 + y**2)
    strands = (40, 60) if who.curl > 3 else (5, rng.integers(90, 200))
    weave = rng.choice([3, 12, 80], 2)
    for label, grid, depth in (("hair", strands, rng.uniform(0.06, 0.16)), ("cloth", weave, rng.uniform(0, 0.12))):
        shade += (mask == ID[label]) * np.float32(depth) * noise(rng, *grid, size)
    pixels = np.asarray(image) * (shade[..., None] * rng.uniform(0.94, 1.06, 3).astype(np.float32))
    pixels += np.float32(rng.uniform(1, 6)) * rng.standard_normal((size, size, 1), np.float32)
    mask = Image.fromarray(mask)
    mask.putpalette(PALETTE)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def write_face(job):
    """Draw one face unless its files are there; `job` is (seed, size, image path, mask path or None)."""
    seed, size, image_path, mask_path = job
    if image_path.exists() and (mask_path is None or mask_path.exists()):
        return 0
    image, mask = draw_face(seed, size)
    if mask_path:
        with atomic(mask_path) as path:
            mask.save(path, format="PNG")
    with atomic(image_path) as path:
        image.save(path, format="JPEG", quality=90)
    return 1


def make_dataset(root, train=200, dev=8, test=8, size=512, seed=0, workers=2):
    """Write root/train/{images,masks}, root/dev/images, root/test/images and the marker, root/SYNTHETIC.txt.

    Files that are there are kept, so a stopped run goes on and a dataset can grow. Returns the number of faces drawn.
    Raises UserError for a number out of range and a folder that holds something else or cannot be written.
    """
    if min(train, dev, test, seed) < 0 or not 1 <= workers <= 61 or not 32 <= size <= 4096:
        raise UserError("numbers of images and --seed must not be negative, --workers is 1 to 61, --size 32 to 4096")
    root, marker, jobs = Path(root), Path(root, MARKER), []
    note = f"Faces drawn by synth.py (seed {seed}, {size} px): no real person and no image of CelebAMask-HQ.\n"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # The marker is the first file: one that appears after this look is another process drawing the same.
        if any(path.suffix != ".tmp" for path in root.iterdir()) and not marker.exists():
            raise UserError(f"{root} holds files that synth.py did not draw; choose another --out")
        if not marker.exists():
            write_text(marker, note)
        elif marker.read_bytes() != note.encode():
            raise UserError(f"{root} was drawn with another --seed or --size; choose another --out or delete it")
        for place, (split, count) in enumerate((("train", train), ("dev", dev), ("test", test))):
            for kind in ("images", "masks") if split == "train" else ("images",):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                name = f"{split}_{i:05d}"
                mask = root / split / "masks" / f"{name}.png" if split == "train" else None
                jobs.append(((seed, place, i), size, root / split / "images" / f"{name}.jpg", mask))
    except OSError as error:
        raise UserError(f"cannot use {error.filename} as a folder ({error.strerror}); choose another --out") from None
    return sum(map(write_face, jobs) if workers == 1 else in_parallel(write_face, jobs, workers, "drawing"))


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="data-synth", help="folder of the dataset")
    parser.add_argument("--train", type=int, default=200, help="number of image-mask pairs")
    parser.add_argument("--dev", type=int, default=8, help="number of images without masks")
    parser.add_argument("--test", type=int, default=8, help="number of images without masks")
    parser.add_argument("--size", type=int, default=512, help="side of images and masks in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other faces")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    start = time.perf_counter()
    drawn = make_dataset(args.out, args.train, args.dev, args.test, args.size, args.seed, args.workers)
    kept = args.train + args.dev + args.test - drawn
    print(f"{args.out}: {drawn} faces drawn, {kept} kept, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_main(main)
