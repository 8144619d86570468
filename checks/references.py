"""Baselines: MicroSegFormer as the papers draw it, a tiny network to train, and the comparison of two run folders."""

import json

import torch
import torch.nn.functional as F

import checkpoint
from model import grid, tokens, upsample

TINY = {"widths": [4, 4, 8, 8, 8], "depths": [0, 1, 1, 1, 1], "decoder": [4, 4, 8, 8]}  # arguments of a MicroUNet


def plain_attention(q, k, v, dropout_p):
    """F.scaled_dot_product_attention with explicit weights."""
    return F.dropout((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1), dropout_p) @ v


def plain_forward(model, image):
    """Logits (B, 19, H, W) of image (B, 3, H, W), values 0..1, with a MicroSegFormer's weights.

    Each stage's Linear acts at the stage's size, the fusion on the joined maps, and the classifier at full size.
    """
    maps = model.features(image)
    size = maps[0].shape[2:]
    decoded = [grid(linear(tokens(x)), *x.shape[2:]) for x, linear in zip(maps, model.decode, strict=True)]
    joined = torch.cat([upsample(x, size) for x in decoded], 1)
    mixed = grid(model.mix(F.gelu(model.fuse(tokens(joined)))), *size)
    return model.classifier(upsample(model.lmsa(mixed), image.shape[2:]))


def equal(a, b):
    """True if two states of last.pt are bit-identical, apart from the seconds they took."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def metrics(folder):
    """The lines of metrics.jsonl without the times; ValueError if one is cut off."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("minutes", "images_per_s")} for line in lines]


def difference(folder, other):
    """What differs between the folders of two finished runs, apart from times; "" if nothing does."""
    found = ["metrics.jsonl"] * (metrics(folder) != metrics(other))
    found += ["last.pt"] * (not equal(*(checkpoint.load(path / "last.pt") for path in (folder, other))))
    found += [n for n in ("best.pt", "best.json") if (folder / n).read_bytes() != (other / n).read_bytes()]
    return ", ".join([*found, *sorted({p.name for p in folder.iterdir()} ^ {p.name for p in other.iterdir()})])
