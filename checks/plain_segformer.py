"""MicroSegFormer evaluated literally, as the paper's figure draws it, for checks and the benchmark.

Same weights, same function, no algebra: every Linear where the drawing has it, attention with materialised weights,
the classifier on 128 channels at full resolution.
"""

import torch
import torch.nn.functional as F

from model import grid, standardise, tokens


def attention(module, x, height, width):
    source = x
    if module.reduce is not None:
        source = module.norm(tokens(module.reduce(grid(x, height, width))))
    q = module.q(x)
    k, v = module.kv(source).chunk(2, dim=-1)
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    weights = F.dropout(weights, module.dropout, module.training)
    return F.dropout(module.proj(weights @ v), module.dropout, module.training)


def plain_forward(model, image):
    """Logits (B, 19, H, W) of image (B, 3, H, W) with values 0..1."""
    x, maps = standardise(image), []
    stages = zip(model.embeddings, model.embedding_norms, model.stages, model.norms, strict=True)
    for embed, embed_norm, blocks, norm in stages:
        x = embed(x)
        height, width = x.shape[2:]
        x = embed_norm(tokens(x))
        for block in blocks:
            x = x + attention(block.attention, block.norm1(x), height, width)
            x = x + block.mlp(block.norm2(x))
        x = grid(norm(x), height, width)
        maps.append(x)
    size = maps[0].shape[2:]
    raised = []
    for x, linear in zip(maps, model.decode, strict=True):
        embedded = grid(linear(tokens(x)), *x.shape[2:])
        raised.append(F.interpolate(embedded, size=size, mode="bilinear", align_corners=False))
    fused = model.mix(F.gelu(model.fuse(tokens(torch.cat(raised, 1)))))
    refined = model.lmsa(grid(fused, *size))
    full = F.interpolate(refined, size=image.shape[2:], mode="bilinear", align_corners=False)
    return model.classifier(full)
