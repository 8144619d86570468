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
    """Contour (36, 2) of an ellipse; the first 18 points are its lower half."""
    t = np.linspace(0, 2 * np.pi, 36)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1)


def draw_face(seed, size=512):
    """Draw a random person, determined by `seed` (an int or a sequence of ints), part by part from back to front.

    Returns (image, mask), both size x size: RGB, and mode P with labels 0..18 and the challenge's palette.
    """
    rng = np.random.default_rng(seed)
    roll, scale = rng.normal((0, 1), (0.06, 0.03))
    turn = scale * np.array([(np.cos(roll), np.sin(roll)), (-np.sin(roll), np.cos(roll))])
    skin = np.array((250, 205, 172)) * rng.uniform(0.45, 1) * rng.uniform(0.9, 1.1)
    hair = np.array((200, 140, 80)) * rng.uniform(0.1, 1) * rng.uniform(0.8, 1.2)
    colour, lips = rng.uniform(20, 235, 3), skin * (0.85, 0.55, 0.55)
    short_hair, hat, dressed, necklace, glasses, opened = rng.random(6) < (0.35, 0.053, 0.6, 0.045, 0.058, 0.58)
    backdrop = rng.uniform(20, 235) + rng.normal(0, 22, 3) + rng.normal(0, 30, (*rng.integers(2, 8, 2), 1))
    backdrop = Image.fromarray(backdrop.clip(0, 255).astype(np.uint8))
    image = backdrop.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)  # reduced at the end
    mask, centre = Image.new("L", image.size), rng.normal((256, 290), (12, 8))

    def paint(label, colour, points):
        """Fill a polygon on image and mask: pixels (n, 2) of a 512 px portrait from a point between eyes and mouth."""
        corners = ((points @ turn + centre) * (2 * size / 512)).ravel().tolist()
        ImageDraw.Draw(image).polygon(corners, tuple(np.clip(colour, 0, 255).astype(int).tolist()))
        ImageDraw.Draw(mask).polygon(corners, NAMES.index(label))

    wide, slope, neckline = rng.uniform((84, 125, 205), (112, 180, 255))
    if dressed:
        torso = [(0, slope), (wide, slope - 20), (wide + 70, slope + 12), (300, slope + 60), (300, 280)]
        paint("cloth", rng.uniform(15, 240) + rng.normal(0, 45, 3), outline(torso))
    limits = ((155, 140, -60), (190, 150, 0)) if short_hair else ((165, 140, 130), (270, 280, 450))
    width, low, end = rng.uniform(*limits)
    top = -210 if hat else -105 - width - rng.uniform(0, 60)
    locks = [(0, top), (width * 0.7, top + 25), (width, -90), (low, end - 40), (low * 0.8, end)]
    paint("hair", hair, outline(locks))
    neckline = neckline if dressed else 280  # below the image in every pose
    neck = [(0, 60), (wide - 8, 60), (wide, slope - 10), (wide * 0.6, neckline - 10), (0, neckline)]
    paint("neck", skin * 0.9, outline(neck))
    if necklace:
        paint("neck_l", colour, ellipse(0, 140, wide, 66))
        paint("neck", skin * 0.9, ellipse(0, 134, wide, 66))
    cheek, jaw, chin, wide, tip = rng.normal((141, 1, 178, 41, 55), (4, 0.06, 6, 4, 4))
    high, ear = rng.uniform((-198, 38), (-112, 54))
    for side, label in ((-1, "r_ear"), (1, "l_ear")):
        if short_hair or rng.random() < 0.25:  # long hair can hide an ear
            paint(label, skin * 0.9, ellipse(side * (cheek + 3), 0, 25, ear))
    face = [(0, high), (60, high + 6), (cheek - 16, high + 20), (cheek - 1, -68), (cheek, 5)]
    face += [(cheek * jaw - 13, 72), (95 * jaw, 128), (48 * jaw, chin - 11), (0, chin)]
    paint("skin", skin, outline(face))
    nose = [(0, -49), (11, -46), (15, -10), (23, 16), (wide, 34), (wide - 9, tip - 5), (0, tip)]
    paint("nose", skin * 0.94, outline(nose))
    wide, open_, thick, lift = rng.uniform((22, 5, 5, -85), (28, 9, 10, -69))
    for side, eye, brow in ((-1, "r_eye", "r_brow"), (1, "l_eye", "l_brow")):
        if glasses:  # eyes and brows are visible and labelled through the lenses
            paint("eye_g", colour, ellipse(side * 63, -38, 58, 34))
        paint(eye, (238, 234, 230), ellipse(side * 61, -45, wide, open_))
        paint(eye, hair, ellipse(side * 61, -45, open_, open_))
        paint(brow, hair * 0.65, ellipse(side * 64, lift, 41, thick))
    wide, high, low, gap = rng.uniform((46, 9, 17, 3), (62, 16, 27, 16))
    gap *= opened
    paint("l_lip", lips, ellipse(0, 93, wide, low + 0.85 * gap)[:18])
    paint("u_lip", lips * 0.85, ellipse(0, 93, wide, high + 0.85 * gap)[18:])
    if opened:
        paint("mouth", (70, 22, 24), ellipse(0, 93, wide * 0.85, gap))
    if rng.random() < (0.05 if short_hair else 0.36):
        rx, ry = rng.uniform((6, 8), (14, 34))
        for x in (-148, 148):
            paint("ear_r", colour, ellipse(x, 40 + ry, rx, ry))
    if hat:
        edge, high = rng.uniform((-145, -340), (-118, -280))
        dome = [(0, high), (60, high + 4), (132, high + 50), (172, edge - 50), (176, edge + 20), (0, edge + 30)]
        paint("hat", colour, outline(dome))

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


def make_dataset(out, train=200, dev=8, test=8, size=512):
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
    return sum(in_parallel(write_face, tasks, "generating"))


def main():
    parser = ArgumentParser(description="Generate synthetic faces with exact masks.")
    parser.add_argument("--out", default=str(SYNTHETIC), help="folder of the data set")
    parser.add_argument("--train", type=positive, default=200, help="number of image-mask pairs")
    parser.add_argument("--size", type=positive, default=512, help="side of images and masks in pixels")
    args = parser.parse_args()
    print(f"{args.out}: {make_dataset(**vars(args))} new faces")


if __name__ == "__main__":
    run_main(main)
