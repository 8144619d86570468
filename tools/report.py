"""The page of all runs, runs/index.html: leaderboard, curves, scores by label, worst and best images, comparisons.

python -m tools.report
python -m tools.report --device cpu

The page and runs/*/pictures.json contain images of the dataset: git ignores them, and they must not be published.
"""

import base64
import hashlib
import io
import json
import re
import time
from pathlib import Path

from common import ArgumentParser, UserError, check_target, print_message, read_json, run_main, write_text

import numpy as np
from PIL import Image

from checkpoint import is_validated, load_model
from data import find_data_of, find_pairs, reversed_sides
from device import select_device
from images import mask_image, read_image, read_mask
from labels import HEX_COLOURS, NAMES
from tools.leaderboard import check_best, number, survey
from views import parse_whole

TEMPLATE = Path(__file__).with_name("page.html")
PICTURED = 6  # number of runs whose images are on the page: each takes about 300 kB
EACH = 6  # images per group
SIDE = 192  # of an image on the page
FORMAT = 4  # of pictures.json
ERROR_COLOUR = (213, 94, 0)  # vermillion: distinguishable from grey for colour-blind readers


def image_score(row):
    """The official score of an image from its F by label, None for absent labels."""
    return float(np.mean([f for f in row if f is not None]))


def panels(pixels, true, predicted):
    """Data URIs of image, mask, prediction and errors, from uint8 (H, W, 3), (H, W) and (H, W)."""
    grey = 110 + 0.55 * pixels.mean(2, keepdims=True)
    errors = np.where((true != predicted)[..., None], np.array(ERROR_COLOUR, float), grey).astype(np.uint8)
    uris = []
    for content in (pixels, true, predicted, errors):
        photo, file = content.ndim == 3, io.BytesIO()
        image = Image.fromarray(content) if photo else mask_image(content)
        image = image.resize((SIDE, SIDE), Image.BOX if photo else Image.NEAREST)
        image.save(file, "JPEG", quality=82) if photo else image.save(file, "PNG", optimize=True)
        kind = "jpeg" if photo else "png"
        uris.append(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
    return uris


def read_pictures(folder):
    """pictures.json of a run; None if it is missing, damaged or of other weights."""
    try:
        content = read_json(folder / "pictures.json")
        pictures = content["pictures"]
        figures = [content[key] for key in ("images", "reversed", "score_without_reversed")]
        inside = all(uri.startswith("data:image/") for p in pictures for uri in p["panels"])
        list(map(number, [*figures, *(p["score"] for p in pictures), *(f for p in pictures for _, f in p["lowest"])]))
        return content if inside and content["version"] == weights_version(folder) else None
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return None


def scored_weights(folder):
    """The weights that have the run's scores: the release also has others, trained on all pairs, as best.pt."""
    return folder / ("validated.pt" if (folder / "validated.pt").is_file() else "best.pt")


def weights_version(folder):
    """A list that changes with the weights and with the format of pictures.json; None if there are no weights."""
    path = scored_weights(folder)
    return [FORMAT, path.stat().st_mtime_ns, path.stat().st_size] if path.is_file() else None


def draw_pictures(folder, device, data=None):
    """Predict a scored run's images with its weights; returns the content of pictures.json. UserError without data.

    Images whose mask has left and right reversed form their own group: their scores are errors of the mask.
    """
    version, rows = weights_version(folder), check_best(read_json(folder / "best.json"))["image_scores"]
    scores = {name: image_score(row) for name, row in rows.items()}
    data = find_data_of(scored_weights(folder), data)
    pairs = {image.stem: (image, mask) for image, mask in find_pairs(data)}
    if not pairs.keys() >= scores.keys():
        raise UserError(f"{data} contains other pairs than the run was scored on")
    order = sorted(scores, key=scores.get)
    flawed = [name for name in order if reversed_sides(read_mask(pairs[name][1]))]
    sound = [name for name in order if name not in flawed]
    each = min(EACH, (len(sound) + 1) // 2)
    groups = {"lowest": sound[:each], "highest": sound[each:][::-1][:EACH], "reversed": flawed[:EACH]}
    model, info = load_model(scored_weights(folder), device)
    content = {"version": version, "images": len(order), "reversed": len(flawed), "pictures": []}
    for group, name in ((group, name) for group, names in groups.items() for name in names):
        pixels, true = (read(path) for read, path in zip((read_image, read_mask), pairs[name], strict=True))
        predicted = parse_whole(model, pixels, info["size"])
        lowest = sorted((f, NAMES[i]) for i, f in enumerate(rows[name]) if f is not None)[:3]
        picture = {"group": group, "name": name, "score": scores[name], "lowest": [[label, f] for f, label in lowest]}
        content["pictures"].append(picture | {"panels": panels(pixels, true, predicted)})
    content["seen"] = not is_validated(info)
    content["score_without_reversed"] = float(np.mean([scores[name] for name in sound])) if sound else 0.0
    write_text(folder / "pictures.json", json.dumps(content))
    return content


def write_page(runs, name=None, device="auto", data=None):
    """Write runs/index.html, after predicting missing images of run `name`, else of the best runs; returns its path.

    `data`: the data folder with the images; default that of each run.
    """
    found, unreadable = survey(runs)
    left = PICTURED
    for run in found:
        folder, chosen = Path(run["folder"]), run["folder"] == str(Path(runs, name or ""))
        run["pictures"] = read_pictures(folder)
        if run["best"] and weights_version(folder) and (chosen or not name and left) and not run["pictures"]:
            try:
                run["pictures"] = draw_pictures(folder, select_device(device), data)
            except UserError as error:
                print_message(f"no images of {folder.name}: {error}")
        if run["pictures"] and left:
            left -= 1
        elif not (run["running"] or chosen):
            run["pictures"] = None
    content = {"runs": found, "unreadable": unreadable, "labels": NAMES, "colours": HEX_COLOURS}
    content["written"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    path = Path(runs, "index.html")
    check_target(path, b"<title>Runs")
    template = TEMPLATE.read_text(encoding="utf-8")
    write_text(path, fill_template(template, content, find_scripts(template)))
    return path


def fill_template(template, data, scripts):
    """The template with `data` as JSON in place of <!--DATA-->; without "<", no text in it can end the script.

    <!--POLICY--> becomes a content security policy: these scripts, known by their hashes, and images inside the page.
    """
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    rules = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    page = template.replace("<!--POLICY-->", f'<meta http-equiv="Content-Security-Policy" content="{rules}">', 1)
    return page.replace("<!--DATA-->", json.dumps(data).replace("<", "\\u003c"), 1)


def find_scripts(template):
    """The text of each script in our own template, without its data."""
    return re.findall(r'<script(?: id="charts")?>(.*?)</script>', template, re.DOTALL)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args()
    path = write_page(args.runs, device=args.device)
    print(f"{path}: open it in a browser; never publish it (images of the dataset)")


if __name__ == "__main__":
    run_main(main)
