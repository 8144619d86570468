"""Face search and parsing measured: on photos whose faces are known, and on held-out portraits made harder.

python -m checks.photos --photos FOLDER            # FOLDER/images and FOLDER/faces.json: recall, precision, cuts, time
python -m checks.photos --data data --count 30     # official score of portraits: grey, blurred, tilted, small, ...
python -m checks.photos --same data/dev/images     # in how many images predict and submit differ

faces.json: {image: {"faces": [{"box": [left, top, right, bottom], "roll": degrees, ...}, ...]}, ...}, the box from
forehead to chin. A face is found if the centroid of a predicted nose (without one, the centre of the window) lies in
its box; each prediction counts once, and those that match no face are false. A straight cut is a horizontal or vertical
border between labels and background inside the photo, longer than a fifth of the portrait's side.
"""

import io
import json
import time
from pathlib import Path

from common import ArgumentParser, positive, print_message, run_main

import numpy as np
from PIL import Image, ImageFilter, ImageOps

import checkpoint
import register
from data import find_data, load_pairs
from evaluate import confusion, held_out, official_score
from images import image_files, read_image
from labels import NAMES
from photo import Window, parse_face, paste
from predict import FaceParser
from views import parse_whole

BACKGROUND, WIDTH, HEIGHT = "docs/astronaut.jpg", 1024, 768
STRAIGHT = 0.2  # of the portrait's side
TILTS = 20, 35, 50, 90, 135, 180
PASTED = 256, 128, 80, 48


def nose(face):
    """x, y of a Face's nose in the photo; without one, of its window's centre."""
    rows, columns = np.nonzero(face.mask == NAMES.index("nose"))
    if len(rows):
        return face.box[0] + columns.mean(), face.box[1] + rows.mean()
    left, top, width, height = face.window
    return left + width / 2, top + height / 2


def match(faces, truth):
    """For each true face, whether it was found, and the number of false faces."""
    points, found = [nose(face) for face in faces], []
    for face in truth:
        x0, y0, x1, y1 = face["box"]
        hits = [i for i, (x, y) in enumerate(points) if x0 <= x <= x1 and y0 <= y <= y1]
        found.append(bool(hits))
        points = [point for i, point in enumerate(points) if i not in hits[:1]]
    return found, len(points)


def longest_line(labelled):
    """The longest horizontal line of pixels (H, W) bool that differ from those below."""
    best = run = np.zeros(len(labelled) - 1, int)
    for column in (labelled[1:] != labelled[:-1]).T:
        run = (run + 1) * column
        best = np.maximum(best, run)
    return best.max(initial=0)


def is_cut(face, mask):
    """True if the labels of a face end in a straight line inside the photo."""
    left, top, width, height = face.box
    around = mask[max(0, top - 1) : top + height + 1, max(0, left - 1) : left + width + 1] > 0
    return max(longest_line(around), longest_line(around.T)) > STRAIGHT * face.window[2]


def measure_photos(parser, folder):
    found, false, cut, seconds = [], 0, [], []
    for name, photo in json.loads((folder / "faces.json").read_text()).items():
        pixels, begin = read_image(folder / "images" / name), time.monotonic()
        parsed = parser(pixels)
        seconds.append(time.monotonic() - begin)
        faces = [] if parsed.missed else parsed.faces
        hits, wrong = match(faces, photo["faces"])
        cuts = [is_cut(face, parsed.mask) for face in faces]
        found, false, cut = found + hits, false + wrong, cut + cuts
        details = f"{sum(hits)} of {len(hits)} faces, {wrong} false, {sum(cuts)} cut, {seconds[-1]:.1f} s"
        print(f"{name}: {details}", flush=True)
    precision = sum(found) / max(1, sum(found) + false)
    print(f"{len(seconds)} photos: recall {np.mean(found):.3f} of {len(found)} faces, precision {precision:.3f}")
    print(f"straight cuts {np.mean(cut or [0]):.2f} of {len(cut)}")
    print(f"seconds for a photo: median {np.median(seconds):.1f}, at most {max(seconds):.1f}")


def degradations(rng):
    """{name: function of a PIL image}, for portraits of 512 pixels."""

    def jpeg(image):
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=10)
        return Image.open(file).convert("RGB")

    def small(image, side):
        return image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)

    def noisy(image):
        noise = rng.normal(0, 30, (*image.size, 3))
        return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))

    return {
        "as is": lambda image: image,
        "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
        "JPEG 10": jpeg,
        "blur, sigma 4": lambda image: image.filter(ImageFilter.GaussianBlur(4)),
        "from 64 pixels": lambda image: small(image, 64),
        "from 32 pixels": lambda image: small(image, 32),
        "dark, a quarter": lambda image: image.point([value // 4 for value in range(256)] * 3),
        "noise 30": noisy,
    }


def into_photo(image, side, rng):
    """A photo (HEIGHT, WIDTH, 3) without a face but for the portrait, and the portrait's place as slices."""
    with Image.open(BACKGROUND) as photo:
        photo = photo.convert("RGB").crop((0, 240, 512, 512)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    left, top = (int(rng.integers(0, length - side + 1)) for length in (WIDTH, HEIGHT))
    photo.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left, top))
    return np.asarray(photo), np.s_[top : top + side, left : left + side]


def measure_portraits(parser, pairs, count):
    rng, scores, content = np.random.default_rng(0), {}, checkpoint.load(parser.source)
    indices = held_out(content, parser.source, pairs.keys())[:count]
    if doubt := checkpoint.doubt(content, pairs.keys(indices)):
        print_message(f"{parser.source} {doubt}")
    for index in indices:
        portrait, true = Image.fromarray(pairs.images[index]), pairs.masks[index]
        predicted = {name: (parser(np.array(f(portrait))).mask, true) for name, f in degradations(rng).items()}
        for angle in TILTS:
            turned = np.asarray(portrait.rotate(angle, Image.Resampling.BICUBIC))
            predicted[f"tilt {angle}"] = parser(turned).mask, np.asarray(Image.fromarray(true).rotate(angle))
        for side in PASTED:
            photo, place = into_photo(portrait, side, rng)
            mask = Image.fromarray(parser(photo).mask[place]).resize(true.shape, Image.Resampling.NEAREST)
            predicted[f"{side} pixels in {WIDTH} x {HEIGHT}"] = np.asarray(mask), true
        found = Window(85, 85, 344, 344)
        around, log_p = parse_face(parser, np.array(portrait), found)
        predicted["inner two thirds found"] = paste(512, 512, [(None, found, around, log_p)]).mask, true
        for name, (mask, truth) in predicted.items():
            scores.setdefault(name, []).append(confusion(mask, truth))
    for name, confusions in scores.items():
        blank = sum(not predicted[:, 1:].any() for predicted in confusions)
        print(f"{name:<26}{official_score(np.stack(confusions)):.4f}{blank:4d} blank of {len(confusions)}")


def measure_agreement(parser, folder):
    """Count the images of a folder whose masks differ from those that a submission has, of the whole image."""
    files, different = image_files(folder), []
    for path in files:
        pixels = read_image(path)
        whole = parse_whole(parser.models[0], pixels, parser.size, parser.views)
        different += [path.name] * (not np.array_equal(parser(pixels).mask, whole))
    print(f"{folder}: predict and submit differ in {len(different)} of {len(files)}", *different)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", "--name", help="checkpoint or run; default the release")
    parser.add_argument("--photos", type=Path, help="folder with images/ and faces.json")
    parser.add_argument("--same", type=Path, help="folder of portraits: compare predict with submit")
    parser.add_argument("--data", help="folder with train/; default ./data, else synthetic faces")
    parser.add_argument("--cache", default="build/cache", help="cache folder")
    parser.add_argument("--count", type=positive, default=30, help="number of held-out portraits")
    args = parser.parse_args()
    if args.photos:
        measure_photos(FaceParser(args.weights), args.photos)
    elif args.same:
        measure_agreement(FaceParser(args.weights), args.same)
    else:
        face_parser = FaceParser(args.weights or register.RELEASE / "validated.pt")
        measure_portraits(face_parser, load_pairs(find_data(args.data), args.cache), args.count)


if __name__ == "__main__":
    run_main(main)
