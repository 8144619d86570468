"""Generate synthetic faces with exact masks, to try everything without CelebAMask-HQ.

python -m tools.synth                                 # build/synthetic-faces: 200 training pairs, 8 dev, 8 test images
python -m tools.synth --out /tmp/faces --train 20 --size 128

Each part is painted on image and mask as the same polygon, so the two agree exactly. Label rates and sizes follow
CelebAMask-HQ (Lee et al., arXiv 1907.11922). The same command resumes an interrupted run.
"""

from pathlib import Path

from common import ArgumentParser, UserError, atomic, in_parallel, make_folder, positive, run_main, write_text

import numpy as np
from PIL import Image, ImageDraw

from data import SYNTHETIC, SYNTHETIC_MARKER
from images import mask_image
from labels import NAMES


def outline(half):
    """Smooth contour of a half at x >= 0, listed from top to bottom, and its mirror image; (n, 2)."""
    half = np.array(half, float)
    points = np.concatenate([half, half[half[:, 0] > 0][::-1] * (-1, 1)])
    for _ in range(3):  # Chaikin's corner cutting
        ahead = np.roll(points, -1, 0)
        points = np.stack([0.8 * points + 0.2 * ahead, 0.2 * points + 0.8 * ahead], 1).reshape(-1, 2)
    return points


def ellipse(x, y, rx, ry):
    t = np.linspace(0, 2 * np.pi, 36)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1)


def band(x, top, bottom):
    """The area between two curves over x."""
    return np.stack([[*x, *x[::-1]], [*top, *bottom[::-1]]], 1)


def draw_face(seed, size=512):
    """Draw a random person, determined by `seed` (an int or a sequence of ints), part by part from back to front.

    Returns (image, mask), both size x size: RGB, and mode P with labels 0..18 and the challenge's palette.
    """
    rng = np.random.default_rng(seed)
    yaw, pitch, roll = rng.normal(0, (0.27, 0.08, 0.06)).clip(-0.6, 0.6)
    turn = rng.normal(1, 0.03) * np.array([(np.cos(roll), np.sin(roll)), (-np.sin(roll), np.cos(roll))])
    skin = np.array((250, 205, 172)) * rng.uniform(0.45, 1) * rng.uniform(0.9, 1.1)
    hair = np.array((200, 140, 80)) * rng.uniform(0.1, 1) * rng.uniform(0.8, 1.2)
    curl = rng.uniform(3, 7) if rng.random() < 0.4 else rng.uniform(0, 2)
    short_hair, hat = rng.random(2) < (0.35, 0.053)
    colours = rng.uniform(20, 235) + rng.normal(0, 22, 3) + rng.normal(0, 30, (*rng.integers(2, 8, 2), 1))
    backdrop = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
    image = backdrop.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)  # reduced at the end
    mask = Image.new("L", image.size)

    def paint(label, colour, points, depth=0):
        """Fill a polygon (n, 2) on the image and, unless `label` is None, on the mask; near parts have more depth.

        Points are pixels of a 512 px portrait: origin between eyes and mouth, x to the image's right, y down.
        """
        # A turn of the head moves near points one way and far points the other; the face itself is curved.
        depth = depth - np.minimum(abs(points[:, :1]), 150) ** 2 / 400
        points = points * (np.cos(yaw), 1) + depth * (np.sin(yaw), np.sin(pitch))
        corners = ((points @ turn + (256, 290)) * (2 * size / 512)).ravel().tolist()
        ImageDraw.Draw(image).polygon(corners, tuple(np.clip(colour, 0, 255).astype(int).tolist()))
        if label:
            ImageDraw.Draw(mask).polygon(corners, NAMES.index(label))

    # Clothes, the hair that falls over them, neck, necklace.
    wide, slope, grey = rng.uniform((84, 125, 60), (112, 180, 240))
    neckline = 280  # below the image in every pose
    if rng.random() < 0.6:
        neckline = rng.uniform(205, 255)
        torso = [(0, slope), (wide, slope - 20), (wide + 70, slope + 12), (300, slope + 60), (300, 280)]
        paint("cloth", rng.uniform(15, 240) + rng.normal(0, 45, 3), outline(torso), -90)
    limits = ((155, 140, -60), (190, 150, 0)) if short_hair else ((165, 140, 130), (270, 280, 450))
    width, low, end = rng.uniform(*limits)
    top = -210 if hat else -105 - width - rng.uniform(0, 60)
    contour = outline([(0, top), (width * 0.7, top + 25), (width, -90), (low, end - 40), (low * 0.8, end)])
    paint("hair", hair, contour + rng.normal(0, curl, contour.shape), -60)
    neck = [(0, 60), (wide - 8, 60), (wide, slope - 10), (wide * 0.6, neckline - 10), (0, neckline)]
    paint("neck", skin * 0.9, outline(neck), -80)
    if rng.random() < 0.045:
        paint("neck_l", [grey] * 3, ellipse(0, 140, wide, 66), -75)
        paint("neck", skin * 0.9, ellipse(0, 134, wide, 66), -75)

    # Ears, face, nose.
    cheek, jaw, chin, wide, tip = rng.normal((141, 1, 178, 41, 55), (4, 0.06, 6, 4, 4))
    ear = outline([(0, -44), (24, -30), (20, 12), (0, 42)]) * rng.normal(1.1, 0.1) + (cheek + 3, 0)
    high, sweep, red = rng.uniform(-198, -112), rng.normal(0, 0.25), rng.uniform(0, 40)
    face = [(0, high), (60, high + 6), (cheek - 16, high + 20), (cheek - 1, -68), (cheek, 5)]
    face = outline([*face, (cheek * jaw - 13, 72), (95 * jaw, 128), (48 * jaw, chin - 11), (0, chin)])
    face[:, 1] += sweep * face[:, 0] * (-80 - face[:, 1]).clip(0) / 100  # hair parted on one side
    nose = outline([(0, -49), (11, -46), (15, -10), (23, 16), (wide, 34), (wide - 9, tip - 5), (0, tip)])
    for side, label in ((-1, "r_ear"), (1, "l_ear")):
        if short_hair or rng.random() < 0.35:  # long hair can hide an ear
            paint(label, skin * 0.9, ear * (side, 1), -80)
    paint("skin", skin, face, -30)
    paint("nose", skin * 0.94 + (red, 0, 0), nose, 15)

    # Glasses, then eyes and brows, which are visible and labelled through the lenses.
    x = np.linspace(-1, 1, 16)
    wide, slant, gaze, lift = rng.normal((25, 2, 0, -77), (1.5, 3, 3, 5))
    high, low, thick, arch, lash = rng.uniform((6, 5, 4, 2, 1), (13, 9, 10, 13, 4))
    bow, iris = 1 - x**2, rng.uniform((60, 40, 20), (110, 120, 150))
    line, half = lift - arch * np.sin((x + 1) * 1.9) - 3 * x, thick * (1.06 - x.clip(0) ** 1.5)
    if rng.random() < 0.058:
        rx, ry, rim, tint, grey = rng.uniform((46, 30, 3, 0.3, 0), (58, 44, 8, 1.1, 110))
        paint("eye_g", [grey] * 3, band([-142, 142], [-50, -50], [-46, -46]), -10)
        for x_lens in (-63, 63):
            paint("eye_g", [grey] * 3, ellipse(x_lens, -38, rx, ry), 10)
            paint("eye_g", skin * tint, ellipse(x_lens, -38, rx - rim, ry - rim), 10)
    for side, eye, brow in ((-1, "r_eye", "r_brow"), (1, "l_eye", "l_brow")):
        across, corner = side * 61 + wide * x, -45 - side * slant * x
        top, bottom = corner - high * bow**0.8, corner + low * bow
        paint(eye, (238, 234, 230), band(across, top, bottom))
        paint(None, iris, ellipse(side * 61 + gaze, -45, min(high, low), min(high, low)))
        paint(None, (30, 18, 16), band(across, top - lash * bow, top + 1))
        paint(brow, hair * 0.65, band(side * (64 + 41 * x), line - half, line + half))

    # Lips, and teeth in an open mouth.
    x = np.linspace(-1, 1, 24)
    wide, gap, smile, high, low, teeth = rng.uniform((46, 3, -3, 9, 14, 0), (62, 32, 18, 18, 27, 0.95))
    gap = gap if rng.random() < 0.58 else 0
    bow, across, red = 1 - x**2, wide * x, rng.uniform(0.2, 0.45 if short_hair else 1)
    middle = 93 - gap * 0.4 - smile * x**2
    floor = middle + gap * bow
    top = middle - high * bow**0.6 + 4 * np.exp(-((x / 0.18) ** 2))
    lips = (1 - red) * skin + red * np.array((180, 50, 60))
    paint("u_lip", lips * 0.85, band(across, top, middle), 8)
    paint("l_lip", lips, band(across, floor, floor + low * bow**0.7), 8)
    if gap:
        paint("mouth", (70, 22, 24), band(across, middle, floor), 8)
        paint(None, (236, 230, 220), band(across, middle, middle + teeth * gap * bow), 8)

    # Earrings, hat.
    colour = rng.uniform(20, 235, 3)
    if rng.random() < (0.05 if short_hair else 0.36):
        rx, ry = rng.uniform((6, 8), (14, 34))
        for x in (-148, 148):
            if x * yaw < 22:  # else the cheek hides the earring
                paint("ear_r", colour, ellipse(x, 40 + ry, rx, ry), -80)
    if hat:
        edge, high, brim = rng.uniform((-145, -340, 178), (-118, -280, 245))
        dome = [(0, high), (60, high + 4), (132, high + 50), (172, edge - 50), (176, edge + 20), (0, edge + 30)]
        paint("hat", colour, outline(dome), -45)
        paint("hat", colour * 0.8, ellipse(0, edge + 10, brim, 24), -30)

    pixels = np.asarray(image.reduce(2)) + rng.normal(0, rng.uniform(1, 6), (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask_image(np.asarray(mask)[1::2, 1::2])


def write_face(task):
    """Write one face unless its files exist; runs in a worker process. Returns True if written."""
    out, split, index, number, size = task
    paths = [out / split / "images" / f"{split}_{number:05d}.jpg"]
    if split == "train":
        paths.append(out / split / "masks" / f"{split}_{number:05d}.png")
    if all(path.exists() for path in paths):
        return False
    for path, image in zip(paths, draw_face((0, index, number), size), strict=False):
        with atomic(path) as temporary:
            image.save(temporary, "PNG" if path.suffix == ".png" else "JPEG", quality=90)
    return True


def make_dataset(out, train=200, dev=8, test=8, size=512, workers=None):
    """Write out/{train,dev,test}/images, out/train/masks and the marker file; existing files are kept.

    Returns the number of faces written. UserError if `out` contains other files or faces of another size.
    """
    out, marker = Path(out), Path(out, SYNTHETIC_MARKER)
    note = f"Faces of {size} px drawn by tools/synth.py: no real person, no image of CelebAMask-HQ.\n"
    make_folder(out)
    # The marker is the first visible file, so two processes can write the same data set at once.
    if any(out.glob("[!.]*")) and not (marker.exists() and marker.read_text() == note):
        raise UserError(f"{out} contains other files or faces of another --size; choose another --out")
    write_text(marker, note)
    for folder in ("train/images", "train/masks", "dev/images", "test/images"):
        make_folder(out / folder)
    splits = enumerate((("train", train), ("dev", dev), ("test", test)))
    tasks = [(out, split, index, number, size) for index, (split, count) in splits for number in range(count)]
    return sum(in_parallel(write_face, tasks, workers, "generating"))


def main():
    parser = ArgumentParser(description="Generate synthetic faces with exact masks.")
    parser.add_argument("--out", default=str(SYNTHETIC), help="folder of the data set")
    parser.add_argument("--train", type=positive, default=200, help="number of image-mask pairs")
    parser.add_argument("--size", type=positive, default=512, help="side of images and masks in pixels")
    args = parser.parse_args()
    print(f"{args.out}: {make_dataset(**vars(args))} new faces")


if __name__ == "__main__":
    run_main(main)
