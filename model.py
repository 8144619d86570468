"""The networks: MicroSegFormer (the reference) and MicroUNet, each from an image to 19 logits per pixel.

Both take float images (B, 3, H, W) with values 0..1 and return logits (B, 19, H, W).
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from dropout import Dropout, attention, dropout
from errors import UserError
from labels import NUM_CLASSES


def standardise(image):
    """Images (B, 3, H, W) with values 0..1 to the same shape with values -2..2."""
    return (image - 0.5) * 4


def upsample(x, size):
    """Bilinear resizing of (B, C, h, w) to `size` = (H, W), pixel centres aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def channel_map(x, weight, bias=None):
    """A 1x1 convolution of (B, C, H, W) as one matrix product; for one thread torch takes a much slower way."""
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def pointwise(x, conv):
    """`channel_map` with the weights of a 1x1 convolution."""
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # in the channels-last order that its gradient shall have
    return channel_map(x, weight, conv.bias)


def channel_means(x):
    """(B, C) of (B, C, H, W); the gradient of mean would be written out for every pixel."""
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


def tokens(x):
    """(B, C, H, W) to (B, H*W, C); a view when x is channels-last."""
    return x.flatten(2).transpose(1, 2)


def grid(x, height, width):
    """(B, H*W, C) to (B, C, H, W) in channels-last memory; a view."""
    return x.transpose(1, 2).unflatten(2, (height, width))


class Attention(nn.Module):
    """SegFormer's efficient self-attention, one head (arXiv 2105.15203, section 3.1).

    Keys and values come from the map shrunk `ratio` times by a strided convolution.
    """

    def __init__(self, dim, ratio=1, dropout=0.0):
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, ratio, ratio) if ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if ratio > 1 else None
        self.dropout = dropout

    def forward(self, x, height, width):
        """x (B, N, C) with N = height * width; the same shape comes back."""
        source = x if self.reduce is None else self.norm(tokens(self.reduce(grid(x, height, width))))
        k, v = self.kv(source).chunk(2, dim=-1)  # (B, M, C) each
        out = attention(self.q(x), k, v, self.dropout if self.training else 0.0)
        return dropout(self.proj(out), self.dropout, self.training)


class TransformerBlock(nn.Module):
    """Pre-norm residual attention and MLP (GELU)."""

    def __init__(self, dim, ratio=1, mlp_ratio=2, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, ratio, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim * mlp_ratio),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(dim * mlp_ratio, dim),
            Dropout(dropout),
        )

    def forward(self, x, height, width):
        x = x + self.attention(self.norm1(x), height, width)
        return x + self.mlp(self.norm2(x))


class LMSA(nn.Module):
    """Lightweight multi-scale attention: a depthwise-separable branch, gated by channel, added to its input.

    25,984 parameters at 128 channels.
    """

    def __init__(self, dim, reduction=4):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.gate = nn.Sequential(
            nn.Linear(dim, dim // reduction, bias=False),
            nn.ReLU(),
            nn.Linear(dim // reduction, dim, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        gate = self.gate(channel_means(x))[:, :, None, None]
        return torch.addcmul(x, gate, self.norm(pointwise(self.depthwise(x), self.pointwise)))


class MicroSegFormer(nn.Module):
    """The reference: a SegFormer of four stages with an all-MLP decoder (arXiv 2105.15203) and LMSA.

    1,747,923 parameters, 1,721,939 without LMSA. `dropout` is scaled by 0.5, 0.75, 1, 1.25 from stage to stage.
    Image sides must be multiples of 32.
    """

    WIDTHS, DEPTHS, RATIOS, EMBED = (32, 64, 128, 192), (1, 2, 2, 2), (8, 4, 2, 1), 128
    stride = 4

    def __init__(self, *, lmsa=True, dropout=0.15):
        super().__init__()
        if dropout * 1.25 >= 1:
            raise ValueError("the last stage would drop everything: give a dropout below 0.8")
        self.embeddings, self.embedding_norms = nn.ModuleList(), nn.ModuleList()
        self.stages, self.norms = nn.ModuleList(), nn.ModuleList()
        previous = 3
        for stage, (width, depth, ratio) in enumerate(zip(self.WIDTHS, self.DEPTHS, self.RATIOS, strict=True)):
            kernel, stride = (7, 4) if stage == 0 else (3, 2)
            self.embeddings.append(nn.Conv2d(previous, width, kernel, stride, kernel // 2))
            self.embedding_norms.append(nn.LayerNorm(width))
            rate = dropout * (0.5 + 0.25 * stage)
            self.stages.append(nn.ModuleList(TransformerBlock(width, ratio, dropout=rate) for _ in range(depth)))
            self.norms.append(nn.LayerNorm(width))
            previous = width
        self.decode = nn.ModuleList(nn.Linear(width, self.EMBED) for width in self.WIDTHS)
        self.fuse = nn.Linear(4 * self.EMBED, self.EMBED)
        self.mix = nn.Linear(self.EMBED, self.EMBED)
        self.lmsa = LMSA(self.EMBED) if lmsa else nn.Identity()
        self.classifier = nn.Conv2d(self.EMBED, NUM_CLASSES, 1)
        self.apply(_init_transformer)

    def features(self, image):
        """Four maps (B, C, H/s, W/s), s = 4, 8, 16, 32, of image (B, 3, H, W)."""
        x, maps = standardise(image), []
        for embed, embed_norm, blocks, norm in zip(
            self.embeddings, self.embedding_norms, self.stages, self.norms, strict=True
        ):
            x = embed(x)
            height, width = x.shape[2:]
            x = embed_norm(tokens(x))
            for block in blocks:
                x = block(x, height, width)
            x = grid(norm(x), height, width)
            maps.append(x)
        return maps

    def forward(self, image, full_size=True):
        """Image (B, 3, H, W) to logits (B, 19, H, W), or (B, 19, H/4, W/4) with full_size=False.

        A bilinear sample's weights add up to 1, so Linear maps and bilinear resizing commute: each stage's Linear
        and its slice of the fusion act as one map at the stage's own resolution, and the classifier acts before
        the last upsampling. `checks/plain_segformer.py` is the literal evaluation this equals.
        """
        maps = self.features(image)
        fused = None
        for x, linear, weight in zip(maps, self.decode, self.fuse.weight.chunk(4, dim=1), strict=True):
            bias = weight @ linear.bias
            if fused is None:
                fused = channel_map(x, weight @ linear.weight, bias + self.fuse.bias)
            else:
                fused = upsample(channel_map(x, weight @ linear.weight, bias), fused.shape[2:]).add_(fused)
        mixed = channel_map(F.gelu(fused), self.mix.weight, self.mix.bias)
        logits = pointwise(self.lmsa(mixed), self.classifier)
        return upsample(logits, image.shape[2:]) if full_size else logits


def _init_transformer(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ConvNorm(nn.Sequential):
    """3x3 (or `kernel`) convolution without bias, batch norm, and ReLU where `act`."""

    def __init__(self, inputs, outputs, kernel=3, stride=1, dilation=1, act=True):
        padding = dilation * (kernel // 2)
        layers = [
            nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*layers, *([nn.ReLU(inplace=True)] if act else []))


class JoinNorm(ConvNorm):
    """ConvNorm of two maps laid one upon the other: the sum of each one's convolution, so none is copied."""

    def forward(self, x, y):
        conv, norm, relu = self
        own, other = conv.weight.split([x.shape[1], y.shape[1]], 1)
        joined = F.conv2d(x, own, padding=conv.padding)
        joined += F.conv2d(y, other, padding=conv.padding)
        return relu(norm(joined))


class Gate(nn.Module):
    """Squeeze-and-excitation (arXiv 1709.01507): a factor 0..1 for every channel, (B, C, 1, 1), from its mean."""

    def __init__(self, dim, reduction=4):
        super().__init__()
        self.down = nn.Linear(dim, dim // reduction)
        self.up = nn.Linear(dim // reduction, dim)

    def forward(self, x):
        return self.up(F.relu(self.down(channel_means(x)))).sigmoid()[:, :, None, None]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a gate beside an identity (arXiv 1512.03385)."""

    def __init__(self, dim, dilation=1):
        super().__init__()
        self.conv1 = ConvNorm(dim, dim, dilation=dilation)
        self.conv2 = ConvNorm(dim, dim, act=False)
        self.gate = Gate(dim)

    def forward(self, x):
        y = self.conv2(self.conv1(x))
        return torch.addcmul(x, y, self.gate(y)).relu_()


class MicroUNet(nn.Module):
    """The successor: a residual U-Net (arXiv 1505.04597) with logits at stride 2.

    Encoder stages at strides 2, 4, 8, 16, 32 of `widths` channels and `depths` residual blocks; attention blocks at
    stride 32; a decoder that rises level by level, each a 3x3 convolution over the upsampled map and the skip.
    Two channels of coordinates (-1..1) stand beside RGB, since portraits are aligned.
    Image sides must be multiples of 32.
    """

    stride = 2

    def __init__(
        self,
        *,
        widths=(32, 48, 64, 96, 96),
        depths=(0, 2, 3, 4, 1),
        dilations=(1, 2, 4, 1),
        decoder=(32, 48, 64, 96),
        attention=1,
        lmsa=(),
        coordinates=True,
        dropout=0.0,
    ):
        super().__init__()
        if len(decoder) != len(widths) - 1 or not set(lmsa) <= set(range(len(decoder))):
            raise ValueError("the decoder has a width for each level but the last, and lmsa names some of these levels")
        self.coordinates = coordinates
        previous = 5 if coordinates else 3
        self.encoder = nn.ModuleList()
        for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            rates = [dilations[i % len(dilations)] if level == 3 else 1 for i in range(depth)]
            blocks = [ResidualBlock(width, rate) for rate in rates]
            self.encoder.append(nn.Sequential(ConvNorm(previous, width, 5 if level == 0 else 3, 2), *blocks))
            previous = width
        self.attention = nn.ModuleList(TransformerBlock(previous, dropout=dropout) for _ in range(attention))
        self.attention.apply(_init_transformer)
        self.decoder = nn.ModuleList()
        for level in reversed(range(len(decoder))):
            width = decoder[level]
            gate = LMSA(width) if level in lmsa else nn.Identity()
            self.decoder.append(nn.Sequential(JoinNorm(previous + widths[level], width), gate))
            previous = width
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(previous, NUM_CLASSES, 1)

    def forward(self, image, full_size=True):
        """Image (B, 3, H, W) to logits (B, 19, H, W), or (B, 19, H/2, W/2) with full_size=False."""
        x = standardise(image)
        if self.coordinates:
            x = torch.cat([x, coordinates(image)], 1)
        x = x.contiguous(memory_format=torch.channels_last)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        height, width = x.shape[2:]
        if self.attention:
            sequence = tokens(x)
            for block in self.attention:
                sequence = block(sequence, height, width)
            x = grid(sequence, height, width)
        for (join, gate), skip in zip(self.decoder, skips[-2::-1], strict=True):
            x = gate(join(upsample(x, skip.shape[2:]), skip))
        logits = pointwise(self.dropout(x), self.classifier)
        return upsample(logits, image.shape[2:]) if full_size else logits


def coordinates(image):
    """Two channels (B, 2, H, W), x and y of each pixel's centre from -1 to 1, for image (B, 3, H, W)."""
    batch, _, height, width = image.shape
    x, y = ((2 * torch.arange(n, device=image.device, dtype=image.dtype) + 1) / n - 1 for n in (width, height))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)]).expand(batch, 2, height, width)


MODELS = {"microsegformer": MicroSegFormer, "microunet": MicroUNet}


def build(name, **arguments):
    """The network called `name` (a key of MODELS); UserError where it does not take these constructor arguments."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of empty layers, which are refused below
            model = MODELS[name](**arguments)
        if not all(p.numel() for p in model.parameters()):
            raise ValueError("a layer would be empty")
        return model
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{name} cannot be made with the arguments {arguments}: {error}") from None


def must_have_lmsa(name):
    """UserError where the network called `name` has no switch for LMSA."""
    if name != "microsegformer":
        raise UserError(f"--lmsa is MicroSegFormer's; {name} has it where --model-args names levels")
