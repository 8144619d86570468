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

SKINS = np.array([(250, 222, 202), (238, 196, 168), (222, 170, 132), (190, 134, 94), (142, 92, 62), (88, 56, 42)])
HAIRS = np.array([(20, 17, 18), (48, 32, 26), (84, 54, 36), (150, 80, 40), (214, 176, 118), (200, 198, 196)])
LOW = 280  # below the image's lower edge in every pose


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


class Face:
    """A random person, painted part by part, back to front, on an image and a mask of twice the final size.

    Coordinates are pixels of a 512 px portrait: origin between eyes and mouth, x to the image's right, y down.
    """

    def __init__(self, rng, size):
        self.rng, self.scale = rng, 2 * size / 512
        self.yaw, self.pitch, roll = rng.normal(0, (0.27, 0.08, 0.06)).clip(-0.6, 0.6)
        self.turn = rng.normal(1, 0.03) * np.array([(np.cos(roll), np.sin(roll)), (-np.sin(roll), np.cos(roll))])
        self.skin = rng.choice(SKINS, p=[0.25, 0.25, 0.2, 0.14, 0.1, 0.06]) * rng.uniform(0.9, 1.1)
        self.hair = rng.choice(HAIRS, p=[0.24, 0.22, 0.2, 0.12, 0.16, 0.06]) * rng.uniform(0.8, 1.2)
        self.curl = rng.uniform(3, 7) if rng.random() < 0.4 else rng.uniform(0, 2)
        self.short_hair, self.hat = rng.random(2) < (0.35, 0.053)
        colours = rng.uniform(20, 235) + rng.normal(0, 22, 3) + rng.normal(0, 30, (*rng.integers(2, 8, 2), 1))
        backdrop = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
        self.image = backdrop.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
        self.mask = Image.new("L", self.image.size)
        self.draw_image, self.draw_mask = ImageDraw.Draw(self.image, "RGBA"), ImageDraw.Draw(self.mask)

    def paint(self, label, colour, points, depth=0, alpha=255):
        """Fill a polygon (n, 2) on the image and, unless `label` is None, on the mask; near parts have more depth."""
        # A turn of the head moves near points one way and far points the other; the face itself is curved.
        depth = depth - np.minimum(abs(points[:, :1]), 150) ** 2 / 400
        points = points * (np.cos(self.yaw), 1) + depth * (np.sin(self.yaw), np.sin(self.pitch))
        corners = ((points @ self.turn + (256, 290)) * self.scale).ravel().tolist()
        self.draw_image.polygon(corners, (*np.clip(colour, 0, 255).astype(int).tolist(), int(alpha)))
        if label:
            self.draw_mask.polygon(corners, NAMES.index(label))

    def shade(self, colour, alpha, x, y, rx, ry, depth=0):
        """Paint a soft ellipse on the image only; `alpha` is its opacity at the centre."""
        for scale in np.linspace(1, 0.35, 6):
            self.paint(None, colour, ellipse(x, y, rx * scale, ry * scale), depth, alpha / 6)

    def paint_body(self):
        """Paint clothes, then the hair that falls over them, then the neck."""
        rng, neckline = self.rng, LOW
        wide, slope, grey = rng.uniform((84, 125, 60), (112, 180, 240))
        if rng.random() < 0.6:
            neckline = rng.uniform(205, 255)
            torso = [(0, slope), (wide, slope - 20), (wide + 70, slope + 12), (300, slope + 60), (300, LOW)]
            self.paint("cloth", rng.uniform(15, 240) + rng.normal(0, 45, 3), outline(torso), -90)
        limits = ((155, 140, -60), (190, 150, 0)) if self.short_hair else ((165, 140, 130), (270, 280, 450))
        hair, low, end = rng.uniform(*limits)
        top = -210 if self.hat else -105 - hair - rng.uniform(0, 60)
        contour = outline([(0, top), (hair * 0.7, top + 25), (hair, -90), (low, end - 40), (low * 0.8, end)])
        self.paint("hair", self.hair, contour + rng.normal(0, self.curl, contour.shape), -60)
        neck = [(0, 60), (wide - 8, 60), (wide, slope - 10), (wide * 0.6, neckline - 10), (0, neckline)]
        self.paint("neck", self.skin * 0.92, outline(neck), -80)
        if rng.random() < 0.045:
            self.paint("neck_l", [grey] * 3, ellipse(0, 140, wide, 66), -75)
            self.paint("neck", self.skin * 0.92, ellipse(0, 134, wide, 66), -75)
        self.shade((30, 12, 10), 150, 0, 140, wide, 74, -70)

    def paint_head(self):
        rng, skin = self.rng, self.skin
        cheek, jaw, chin, wide, tip = rng.normal((141, 1, 178, 41, 55), (4, 0.06, 6, 4, 4))
        ear = outline([(0, -44), (24, -30), (20, 12), (0, 42)]) * rng.normal(1.1, 0.1) + (cheek + 3, 0)
        high, sweep, blush = rng.uniform(-198, -112), rng.normal(0, 0.25), rng.uniform(0, 80)
        face = [(0, high), (60, high + 6), (cheek - 16, high + 20), (cheek - 1, -68), (cheek, 5)]
        face = outline([*face, (cheek * jaw - 13, 72), (95 * jaw, 128), (48 * jaw, chin - 11), (0, chin)])
        face[:, 1] += sweep * face[:, 0] * (-80 - face[:, 1]).clip(0) / 100  # hair parted on one side
        nose = outline([(0, -49), (11, -46), (15, -10), (23, 16), (wide, 34), (wide - 9, tip - 5), (0, tip)])
        for side, label in ((-1, "r_ear"), (1, "l_ear")):
            if self.short_hair or rng.random() < 0.35:  # long hair can hide an ear
                self.paint(label, skin * 0.9, ear * (side, 1), -80)
        self.paint("skin", skin, face, -30)
        self.paint(None, (40, 15, 10), nose + (5, 5), 8, 50)
        self.paint("nose", skin * 1.03, nose, 15)
        for side in (-1, 1):
            self.shade((225, 70, 70), blush, side * 76, 42, 46, 36, -15)
            self.shade((60, 25, 15), 70, side * 56, -54, 48, 34)
            self.paint(None, skin * 0.4, ellipse(side * wide * 0.45, tip - 9, 8, 4), 20, 200)

    def paint_eyes(self):
        """Paint glasses, then eyes and brows, which are visible and labelled through the lenses."""
        rng, x = self.rng, np.linspace(-1, 1, 16)
        wide, slant, gaze, lift = rng.normal((25, 2, 0, -77), (1.5, 3, 3, 5))
        high, low, thick, arch, lash = rng.uniform((6, 5, 4, 2, 1), (13, 9, 10, 13, 4))
        bow, iris = 1 - x**2, rng.uniform((60, 40, 20), (110, 120, 150))
        line, half = lift - arch * np.sin((x + 1) * 1.9) - 3 * x, thick * (1.06 - x.clip(0) ** 1.5)
        if rng.random() < 0.058:
            rx, ry, rim, tint, grey = rng.uniform((46, 30, 3, 0.3, 0), (58, 44, 8, 1.1, 110))
            self.paint("eye_g", [grey] * 3, band([-142, 142], [-50, -50], [-46, -46]), -10)
            for x_lens in (-63, 63):
                self.paint("eye_g", [grey] * 3, ellipse(x_lens, -38, rx, ry), 10)
                self.paint("eye_g", self.skin * tint, ellipse(x_lens, -38, rx - rim, ry - rim), 10)
        for side, eye, brow in ((-1, "r_eye", "r_brow"), (1, "l_eye", "l_brow")):
            across, corner = side * 61 + wide * x, -45 - side * slant * x
            top, bottom = corner - high * bow**0.8, corner + low * bow
            self.paint(eye, (238, 234, 230), band(across, top, bottom))
            for radius, colour in ((10.5, iris), (4.6, (12, 10, 10))):
                disc = ellipse(side * 61 + gaze, -47, radius, radius)
                disc[:, 1] = disc[:, 1].clip(*(np.interp(disc[:, 0], across, lid) for lid in (top, bottom)))
                self.paint(None, colour, disc)
            self.paint(None, (30, 18, 16), band(across, top - lash * bow, top + 1))
            self.paint(brow, self.hair * 0.65, band(side * (64 + 41 * x), line - half, line + half))

    def paint_mouth(self):
        rng, x = self.rng, np.linspace(-1, 1, 24)
        wide, gap, smile, high, low, teeth = rng.uniform((46, 3, -3, 9, 14, 0), (62, 32, 18, 18, 27, 0.95))
        gap = gap if rng.random() < 0.58 else 0
        bow, across, red = 1 - x**2, wide * x, rng.uniform(0.2, 0.45 if self.short_hair else 1)
        middle = 93 - gap * 0.4 - smile * x**2
        floor = middle + gap * bow
        top = middle - high * bow**0.6 + 4 * np.exp(-((x / 0.18) ** 2))
        lips = (1 - red) * self.skin + red * np.array((180, 50, 60))
        self.paint("u_lip", lips * 0.88, band(across, top, middle), 8)
        self.paint("l_lip", lips, band(across, floor, floor + low * bow**0.7), 8)
        self.paint(None, lips * 0.5, band(across, middle - 1, middle + 1), 8)
        if gap:
            self.paint("mouth", (70, 22, 24), band(across, middle, floor), 8)
            self.paint(None, (236, 230, 220), band(across, middle, middle + teeth * gap * bow), 8)

    def paint_accessories(self):
        rng, colour = self.rng, self.rng.uniform(20, 235, 3)
        if rng.random() < (0.05 if self.short_hair else 0.36):
            rx, ry = rng.uniform((6, 8), (14, 34))
            for x in (-148, 148):
                if x * self.yaw < 22:  # else the cheek hides the earring
                    self.paint("ear_r", colour, ellipse(x, 40 + ry, rx, ry), -80)
        if self.hat:
            edge, high, brim = rng.uniform((-145, -340, 178), (-118, -280, 245))
            dome = [(0, high), (60, high + 4), (132, high + 50), (172, edge - 50), (176, edge + 20), (0, edge + 30)]
            self.paint("hat", colour, outline(dome), -45)
            self.paint("hat", colour * 0.8, ellipse(0, edge + 10, brim, 24), -30)


def draw_face(seed, size=512):
    """Draw one face, determined by `seed` (an int or a sequence of ints) and `size`.

    Returns (image, mask), both size x size: RGB, and mode P with labels 0..18 and the challenge's palette.
    """
    rng = np.random.default_rng(seed)
    face = Face(rng, size)
    face.paint_body()
    face.paint_head()
    face.paint_eyes()
    face.paint_mouth()
    face.paint_accessories()
    mask = np.asarray(face.mask)[1::2, 1::2]
    x = np.linspace(-1, 1, size, dtype=np.float32)
    y, (across, down, edges, contrast) = x[:, None], rng.uniform((-0.25, -0.25, 0.05, 0.06), (0.25, 0.25, 0.3, 0.16))
    light = 1 + across * x + down * y - edges * (mask > 0) * (1.8 * x**2 + y**2)
    strands = rng.standard_normal((40, 60) if face.curl > 2 else (5, rng.integers(90, 200)), np.float32)
    texture = np.asarray(Image.fromarray(strands).resize((size, size), Image.Resampling.BICUBIC))
    light += contrast * texture * np.isin(mask, (NAMES.index("hair"), NAMES.index("cloth")))
    pixels = np.asarray(face.image.reduce(2)) * light[..., None] + rng.normal(0, rng.uniform(1, 6), (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask_image(mask)


def write_face(task):
    """Write one face unless its files exist; runs in a worker process. Returns True if written."""
    root, split, number, seed, size = task
    paths = [root / split / "images" / f"{split}_{number:05d}.jpg"]
    if split == "train":
        paths.append(root / split / "masks" / f"{split}_{number:05d}.png")
    if all(path.exists() for path in paths):
        return False
    for path, image in zip(paths, draw_face(seed, size), strict=False):
        with atomic(path) as temporary:
            image.save(temporary, "PNG" if path.suffix == ".png" else "JPEG", quality=90)
    return True


def make_dataset(root, train=200, dev=8, test=8, size=512, seed=0, workers=None):
    """Write root/{train,dev,test}/images, root/train/masks and the marker file; existing files are kept.

    Returns the number of faces written. UserError if a number is out of range or `root` contains other files.
    """
    if min(train, dev, test, seed) < 0 or not 32 <= size <= 4096:
        raise UserError("--train, --dev, --test and --seed must be >= 0 and --size 32 to 4096")
    root, marker = Path(root), Path(root, SYNTHETIC_MARKER)
    note = f"Faces drawn by tools/synth.py (seed {seed}, {size} px): no real person, no image of CelebAMask-HQ.\n"
    make_folder(root)
    # The marker is the first visible file, so two processes can write the same data set at once.
    visible = any(not path.name.startswith(".") for path in root.iterdir())
    if visible and (not marker.exists() or marker.read_text() != note):
        raise UserError(f"{root} contains other files or faces of another --seed or --size; choose another --out")
    write_text(marker, note)
    tasks = []
    for index, (split, count) in enumerate((("train", train), ("dev", dev), ("test", test))):
        make_folder(root / split / "images")
        tasks += [(root, split, number, (seed, index, number), size) for number in range(count)]
    make_folder(root / "train" / "masks")
    return sum(in_parallel(write_face, tasks, workers, "drawing"))


def main():
    parser = ArgumentParser(description="Generate synthetic faces with exact masks.")
    parser.add_argument("--out", default=str(SYNTHETIC), help="folder of the data set")
    parser.add_argument("--train", type=int, default=200, help="number of image-mask pairs")
    parser.add_argument("--dev", type=int, default=8, help="number of images without masks")
    parser.add_argument("--test", type=int, default=8, help="number of images without masks")
    parser.add_argument("--size", type=int, default=512, help="side of images and masks in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other faces")
    parser.add_argument("--workers", type=positive, help="processes; default one per core")
    args = parser.parse_args()
    written = make_dataset(args.out, args.train, args.dev, args.test, args.size, args.seed, args.workers)
    print(f"{args.out}: {written} faces written, {args.train + args.dev + args.test - written} kept")


if __name__ == "__main__":
    run_main(main)
