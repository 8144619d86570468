"""Baselines: both networks evaluated layer by layer, and the comparison of two run folders."""

import json

import torch
import torch.nn.functional as F

import checkpoint
from model import LMSA, MicroSegFormer, grid, standardise, tokens, upsample


def plain_forward(model, image):
    """Logits (B, 19, H, W) of image (B, 3, H, W), values 0..1, with the model's weights and no economies.

    Every layer stands where the papers draw it, attention has explicit weights, and the classifier acts at full size.
    """
    features = segformer_features if isinstance(model, MicroSegFormer) else unet_features
    return model.classifier(upsample(features(model, image), image.shape[2:]))


def attention(module, x, height, width):
    source = x if module.reduce is None else module.norm(tokens(module.reduce(grid(x, height, width))))
    q = module.q(x)
    k, v = module.kv(source).chunk(2, dim=-1)
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return module.dropout(module.proj(module.dropout(weights) @ v))


def transformer(blocks, x, height, width):
    for block in blocks:
        x = x + attention(block.attention, block.norm1(x), height, width)
        x = x + block.mlp(block.norm2(x))
    return x


def refine(module, x):
    if not isinstance(module, LMSA):
        return x
    branch = module.norm(module.pointwise(module.depthwise(x)))
    return x + module.gate(branch.mean((2, 3)))[:, :, None, None] * branch


def segformer_features(model, image):
    x, maps = standardise(image), []
    stages = zip(model.embeddings, model.embedding_norms, model.stages, model.norms, strict=True)
    for embed, embed_norm, blocks, norm in stages:
        x = embed(x)
        height, width = x.shape[2:]
        x = grid(norm(transformer(blocks, embed_norm(tokens(x)), height, width)), height, width)
        maps.append(x)
    size = maps[0].shape[2:]
    decoded = [grid(linear(tokens(x)), *x.shape[2:]) for x, linear in zip(maps, model.decode, strict=True)]
    joined = torch.cat([upsample(x, size) for x in decoded], 1)
    return refine(model.lmsa, grid(model.mix(F.gelu(model.fuse(tokens(joined)))), *size))


def residual(module, x):
    y = module.conv2(module.conv1(x))
    factor = module.gate.up(F.relu(module.gate.down(y.mean((2, 3))))).sigmoid()
    return F.relu(x + y * factor[:, :, None, None])


def join(module, x, y):
    conv, norm, relu = module
    return relu(norm(conv(torch.cat([upsample(x, y.shape[2:]), y], 1))))


def unet_features(model, image):
    count, _, height, width = image.shape
    identity = torch.eye(2, 3, dtype=image.dtype).expand(count, 2, 3)
    places = F.affine_grid(identity, (count, 1, height, width), align_corners=False).permute(0, 3, 1, 2)
    x, skips = torch.cat([standardise(image), places], 1), []
    for down, *blocks in model.encoder:
        x = down(x)
        for block in blocks:
            x = residual(block, x)
        skips.append(x)
    height, width = x.shape[2:]
    x = grid(transformer(model.attention, tokens(x), height, width), height, width)
    for (module,), skip in zip(model.decoder, skips[-2::-1], strict=True):
        x = join(module, x, skip)
    return x


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
    if metrics(folder) != metrics(other):
        return "metrics.jsonl differs"
    if not equal(checkpoint.load(folder / "last.pt"), checkpoint.load(other / "last.pt")):
        return "last.pt differs"
    for name in ("best.pt", "best.json"):
        if (folder / name).read_bytes() != (other / name).read_bytes():
            return f"{name} differs"
    extra = {path.name for path in folder.iterdir()} ^ {path.name for path in other.iterdir()}
    return f"files differ: {', '.join(sorted(extra))}" if extra else ""
