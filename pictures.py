"""A run's worst and best held-out images as image, truth, prediction and error map, kept in runs/NAME/pictures.json.

`make report` and trainings draw them. The file holds pictures of the dataset, which no repository may: git ignores it.
"""

import base64
import contextlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from atomic import write_text
from checkpoint import load_model, validated
from data import DRAWN
from errors import UserError
from images import read_image, read_mask
from labels import NAMES, PALETTE
from rundir import read_json
from sides import reversed_sides
from views import label_map, log_probabilities

# Where best.pt comes from a training on all pairs.
SEEN = "The predictions are of the weights handed in, whose training included these images; the scores are not."
FORMAT = 2  # of pictures.json
EACH = 6
SIDE = 192  # of the embedded pictures
WRONG = (213, 94, 0)  # vermillion, which the colour-blind tell from grey


def image_score(row):
    """The official score of one image from its F by label, None where a label is absent: a row of best.json."""
    return float(np.mean([f for f in row if f is not None]))


def extremes(scores):
    """Names of the worst images, worst first, and of the best, best first: EACH of them, less where there are few."""
    order = sorted(scores, key=lambda name: image_score(scores[name]))
    each = min(EACH, (len(order) + 1) // 2)
    return order[:each], order[len(order) - min(each, len(order) - each) :][::-1]


def uri(image, **how):
    """A PIL image as a data URI."""
    file = io.BytesIO()
    image.save(file, **how)
    return f"data:image/{how['format'].lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def small_mask(mask):
    """Labels (H, W) as a small palette PNG."""
    image = Image.fromarray(mask).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    image.putpalette(PALETTE)
    return uri(image, format="PNG", optimize=True)


def error_map(pixels, wrong):
    """The image (H, W, 3) in faint grey, its wrong pixels (H, W) bool in one colour: float values 0..255."""
    grey = 110 + pixels.mean(2, keepdims=True) * 0.55
    return np.where(wrong[..., None], np.array(WRONG, float), grey)


def panels(pixels, true, predicted):
    """Data URIs of image, truth, prediction and error map, from uint8 (H, W, 3), (H, W) and (H, W)."""
    photos = [
        uri(Image.fromarray(p.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BOX), format="JPEG", quality=82)
        for p in (pixels, error_map(pixels, true != predicted))
    ]
    return [photos[0], small_mask(true), small_mask(predicted), photos[1]]


def find_pairs_of(args, names):
    """{name: [image, mask]} of the named training pairs in the run's data folder, ./data or the drawn faces.

    UserError where none of them holds all names.
    """
    folders = [Path(args["data"])] if args.get("data") else []
    folders += [folder for folder in (Path("data"), DRAWN) if folder not in folders]
    for folder in folders:
        found = {}
        for kind in ("images", "masks"):
            for path in (folder / "train" / kind).glob("*"):
                found.setdefault(path.stem, []).append(path)
        if all(len(found.get(name, ())) == 2 for name in names):
            return {name: found[name] for name in names}
    raise UserError(f"no pictures: none of {', '.join(map(str, folders))} holds the images this run was scored on")


def fingerprint(folder):
    """What the pictures depend on: this file's format, time and size of best.pt. UserError where there is none."""
    try:
        stat = (folder / "best.pt").stat()
    except OSError:
        raise UserError("no pictures: the folder holds no weights (best.pt)") from None
    return [FORMAT, stat.st_mtime_ns, stat.st_size]


def read_pictures(folder):
    """The pictures drawn last, and whether best.pt was trained on their images too.

    A picture is {"name", "score", "weakest": [[label, F], ...], "worst", "reversed", "panels"}: `reversed` tells that
    the true mask has left and right reversed, `panels` are four data URIs. UserError where there are none, or where
    best.pt is another by now.
    """
    current = fingerprint(folder)
    try:
        held = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        held = None
    if not isinstance(held, dict) or held.get("of") != current:
        raise UserError("no pictures of these weights yet: `make report` draws those of the best runs")
    return held["pictures"], held["seen"]


def draw_pictures(folder, device=None):
    """Draw the pictures of a run with its best.pt unless they are drawn already. UserError where that cannot be."""
    current = fingerprint(folder)
    with contextlib.suppress(UserError):
        read_pictures(folder)
        return
    if not (folder / "best.json").is_file():
        raise UserError("no pictures: the run has no scores by image (best.json)")
    scores = read_json(folder / "best.json")["image_scores"]
    worst, best = extremes(scores)
    pairs = find_pairs_of(read_json(folder / "args.json")["args"], worst + best)
    device = device or torch.device("cpu")
    model, info = load_model(folder / "best.pt", device)
    pictures = []
    for name in worst + best:
        pixels, true = read_image(pairs[name][0]), read_mask(pairs[name][1])
        log_p = log_probabilities([model], torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device), info["size"])
        predicted = label_map(log_p, *true.shape)[0].cpu().numpy()
        weakest = sorted((f, NAMES[i]) for i, f in enumerate(scores[name]) if f is not None)[:3]
        pictures.append({
            "name": name, "score": image_score(scores[name]), "weakest": [[label, f] for f, label in weakest],
            "worst": name in worst, "reversed": bool(reversed_sides(true)), "panels": panels(pixels, true, predicted),
        })  # fmt: skip
    held = {"of": current, "seen": not validated(info), "pictures": pictures}
    write_text(folder / "pictures.json", json.dumps(held))
