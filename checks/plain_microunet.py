"""MicroUNet evaluated literally, for checks and the benchmark: same weights, same function, no economies."""

import torch
import torch.nn.functional as F

from model import grid, standardise, tokens


def residual(block, x):
    y = block.conv2(block.conv1(x))
    squeezed = F.adaptive_avg_pool2d(y, 1).flatten(1)
    factor = block.gate.up(F.relu(block.gate.down(squeezed))).sigmoid()
    return F.relu(x + y * factor[:, :, None, None])


def plain_forward(model, image):
    """Logits (B, 19, H, W) of image (B, 3, H, W) with values 0..1."""
    count, _, height, width = image.shape
    across = torch.eye(2, 3, dtype=image.dtype).expand(count, 2, 3)
    places = F.affine_grid(across, (count, 1, height, width), align_corners=False).permute(0, 3, 1, 2)
    x, skips = torch.cat([standardise(image), places], 1), []
    for down, *blocks in model.encoder:
        x = down(x)
        for block in blocks:
            x = residual(block, x)
        skips.append(x)
    height, width = x.shape[2:]
    for block in model.attention:
        x = grid(block(tokens(x), height, width), height, width)
    for (join, gate), skip in zip(model.decoder, skips[-2::-1], strict=True):
        conv, norm, relu = join
        raised = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        x = gate(relu(norm(conv(torch.cat([raised, skip], 1)))))
    full = F.interpolate(x, size=image.shape[2:], mode="bilinear", align_corners=False)
    return model.classifier(full)
