"""What a mask says besides its picture: each label's area, box and centroid as numbers, and labels cut out.

python predict.py --input photo.jpg --output masks --json --cutout hair,hat
"""

import numpy as np

from errors import UserError
from labels import NAMES

NOT_HEAD = ("background", "neck_l", "neck", "cloth")
GROUPS = {"head": tuple(name for name in NAMES if name not in NOT_HEAD)}


def parse_labels(text):
    """Label ids of names of labels and GROUPS, as "hair,hat" or "head", sorted; UserError where one is unknown."""
    chosen = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part not in GROUPS and part not in NAMES:
            raise UserError(f"--cutout {text}: no label {part}; there are {', '.join((*GROUPS, *NAMES))}")
        chosen.update(NAMES.index(name) for name in GROUPS.get(part, (part,)))
    if not chosen:
        raise UserError("--cutout names no label; as in --cutout hair,hat or --cutout head")
    return sorted(chosen)


def cut_out(pixels, mask, labels):
    """RGBA (H, W, 4) uint8 of pixels (H, W, 3): the labels opaque, all else transparent black."""
    kept = np.isin(mask, labels)[..., None]
    return np.concatenate([pixels * kept, kept * np.uint8(255)], 2)


def by_label(mask, left=0, top=0):
    """{name: {"area", "box", "centroid"}} of the labels in mask (H, W), whose corner lies at (left, top).

    Area in pixels, box as left, top, width, height; the centroid is the mean x, y of the pixels' indices. Values
    of 255 are no label.
    """
    found = {}
    for label, name in enumerate(NAMES):
        there = mask == label
        rows, columns = there.sum(1), there.sum(0)
        if not (area := int(rows.sum())):
            continue
        (y0, y1), (x0, x1) = ((int(n[0]), int(n[-1])) for n in map(np.flatnonzero, (rows, columns)))
        x, y = (float(n @ np.arange(len(n)) / area) for n in (columns, rows))
        found[name] = {
            "area": area,
            "box": [left + x0, top + y0, x1 - x0 + 1, y1 - y0 + 1],
            "centroid": [round(left + x, 2), round(top + y, 2)],
        }
    return found


def describe(parsed):
    """A photo.Parsed as plain numbers for JSON: the picture's labels, and each face's own, from left to right.

    `face_found` is None where none was looked for.
    """
    height, width = parsed.mask.shape
    faces = []
    found = [] if parsed.missed else parsed.faces
    searched = parsed.missed or any(score is not None for score, _ in found)
    for index, (score, window) in enumerate(found):
        own = parsed.owner == index
        rows, columns = (np.flatnonzero(own.any(axis)) for axis in (1, 0))
        labels = {}
        if len(rows):
            place = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            masked = np.where(own[place] & (parsed.mask[place] > 0), parsed.mask[place], 255)
            labels = by_label(masked, int(columns[0]), int(rows[0]))
        score = None if score is None else round(score, 3)
        faces.append({"window": list(map(int, window)), "score": score, "labels": labels})
    return {
        "width": width, "height": height, "face_found": bool(found) if searched else None,
        "labels": by_label(parsed.mask), "faces": faces,
    }  # fmt: skip
