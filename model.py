"""The networks: MicroSegFormer (the reference) and MicroUNet, each from an image to 19 logits per pixel.

Both take float images (B, 3, H, W) with values 0..1, sides multiples of 32, and return logits (B, 19, H, W).
"""

import inspect
import warnings

from common import UserError

import torch
import torch.nn.functional as F
from torch import nn

from labels import NUM_CLASSES

# A submission must have fewer parameters than this, frozen ones included.
PARAM_LIMIT = 1_821_085
MAX_SIZE, MAX_TENSORS = 100_000_000, 2_000  # parameters, and tensors of them, of any network that is built


def standardise(image):
    """Scale images (B, 3, H, W) from 0..1 to -2..2."""
    return (image - 0.5) * 4


def upsample(x, size):
    """Resize (B, C, h, w) bilinearly to `size` = (H, W), pixel centres aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def channel_map(x, weight, bias=None):
    """1x1 convolution of (B, C, H, W) as one matrix product; with one thread torch's own is much slower."""
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def channel_means(x):
    """(B, C) means of (B, C, H, W); the gradient of torch's mean would be stored for every pixel."""
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


def tokens(x):
    """(B, C, H, W) to (B, H*W, C); a view if x is channels-last."""
    return x.flatten(2).transpose(1, 2)


def grid(x, height, width):
    """(B, H*W, C) to (B, C, H, W) in channels-last memory; a view."""
    return x.transpose(1, 2).unflatten(2, (height, width))


class Attention(nn.Module):
    """SegFormer's efficient self-attention with one head (arXiv 2105.15203, section 3.1).

    Keys and values come from the map reduced `ratio` times by a strided convolution.
    """

    def __init__(self, dim, ratio=1, dropout=0.0):
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, ratio, ratio) if ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if ratio > 1 else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, height, width):
        """x (B, N, C) with N = height * width to (B, N, C)."""
        source = x if self.reduce is None else self.norm(tokens(self.reduce(grid(x, height, width))))
        k, v = self.kv(source).chunk(2, dim=-1)  # (B, M, C) each
        heads = (part.unsqueeze(1) for part in (self.q(x), k, v))  # one head: (B, 1, N, C)
        out = F.scaled_dot_product_attention(*heads, dropout_p=self.dropout.p if self.training else 0.0).squeeze(1)
        return self.dropout(self.proj(out))


class TransformerBlock(nn.Module):
    """Pre-norm residual attention and MLP (GELU)."""

    def __init__(self, dim, ratio=1, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, ratio, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x, height, width):
        x = x + self.attention(self.norm1(x), height, width)
        return x + self.mlp(self.norm2(x))


class LMSA(nn.Module):
    """Lightweight multi-scale attention: x + gate * branch, the branch depthwise-separable, the gate per channel.

    The gate comes from the branch's global average. 25,984 parameters at 128 channels.
    """

    FOLDS = {"norm": "pointwise"}  # for `fold_batch_norm`

    def __init__(self, dim):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.gate = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False), nn.ReLU(), nn.Linear(dim // 4, dim, bias=False), nn.Sigmoid()
        )

    def forward(self, x):
        branch = self.norm(self.pointwise(self.depthwise(x)))
        gate = self.gate(channel_means(branch))[:, :, None, None]
        return torch.addcmul(x, gate, branch)


class MicroSegFormer(nn.Module):
    """The reference: a SegFormer of four stages with an all-MLP decoder (arXiv 2105.15203) and LMSA.

    1,747,923 parameters, 1,721,939 without LMSA. `dropout` is scaled by 0.5, 0.75, 1, 1.25 from stage to stage.
    """

    WIDTHS, DEPTHS, RATIOS, EMBED = (32, 64, 128, 192), (1, 2, 2, 2), (8, 4, 2, 1), 128
    stride = 4  # of the logits computed before the last upsampling
    ends = "embeddings.0", "classifier"  # first and last layer, which Muon leaves to AdamW

    def __init__(self, *, lmsa=True, dropout=0.15):
        super().__init__()
        if not 0 <= dropout * 1.25 < 1:
            raise ValueError("dropout must be from 0 to 0.8, since the last stage scales it by 1.25")
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
        stages = zip(self.embeddings, self.embedding_norms, self.stages, self.norms, strict=True)
        for embed, embed_norm, blocks, norm in stages:
            x = embed(x)
            size, x = x.shape[2:], embed_norm(tokens(x))
            for block in blocks:
                x = block(x, *size)
            x = grid(norm(x), *size)
            maps.append(x)
        return maps

    def forward(self, image, full_size=True):
        """Image (B, 3, H, W) to logits (B, 19, H, W), or (B, 19, H/4, W/4) with full_size=False.

        The weights of a bilinear sample add up to 1, so Linear maps and bilinear resizing commute: each stage's Linear
        and its slice of the fusion act as one map at the stage's own resolution, and the classifier acts before
        the last upsampling. `checks/references.py` has the baseline that this equals.
        """
        fused = None
        for x, linear, weight in zip(self.features(image), self.decode, self.fuse.weight.chunk(4, dim=1), strict=True):
            bias = weight @ linear.bias
            if fused is None:
                fused = channel_map(x, weight @ linear.weight, bias + self.fuse.bias)
            else:
                fused = upsample(channel_map(x, weight @ linear.weight, bias), fused.shape[2:]).add_(fused)
        mixed = channel_map(F.gelu(fused), self.mix.weight, self.mix.bias)
        logits = self.classifier(self.lmsa(mixed))
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
    """Convolution without bias, batch norm, and ReLU unless act=False."""

    FOLDS = {"1": "0"}

    def __init__(self, inputs, outputs, kernel=3, stride=1, dilation=1, act=True):
        padding = dilation * (kernel // 2)
        layers = [nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False), nn.BatchNorm2d(outputs)]
        super().__init__(*layers, *([nn.ReLU(inplace=True)] if act else []))


class Gate(nn.Module):
    """Squeeze-and-excitation (arXiv 1709.01507): a factor 0..1 per channel, (B, C, 1, 1), from the channel means."""

    def __init__(self, dim):
        super().__init__()
        self.down = nn.Linear(dim, dim // 4)
        self.up = nn.Linear(dim // 4, dim)

    def forward(self, x):
        return self.up(F.relu(self.down(channel_means(x)))).sigmoid()[:, :, None, None]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a channel gate and an identity (arXiv 1512.03385)."""

    def __init__(self, dim, dilation=1):
        super().__init__()
        self.conv1 = ConvNorm(dim, dim, dilation=dilation)
        self.conv2 = ConvNorm(dim, dim, act=False)
        self.gate = Gate(dim)

    def forward(self, x):
        y = self.conv2(self.conv1(x))
        return torch.addcmul(x, y, self.gate(y)).relu_()


class JoinNorm(ConvNorm):
    """Upsample x to y's size and apply one ConvNorm to both maps: the sum of their convolutions, without a copy."""

    def forward(self, x, y):
        x = upsample(x, y.shape[2:])
        conv, norm, relu = self
        for_x, for_y = conv.weight.split([x.shape[1], y.shape[1]], 1)
        joined = F.conv2d(x, for_x, padding=conv.padding)
        joined += F.conv2d(y, for_y, conv.bias, padding=conv.padding)
        return relu(norm(joined))


class MicroUNet(nn.Module):
    """A residual U-Net (arXiv 1505.04597) with logits at stride 2.

    Encoder stages at strides 2, 4, 8, 16, 32 of `widths` channels and `depths` residual blocks, those at stride 16 with
    `dilations` in turn; `attention` transformer blocks at stride 32; a decoder that joins the upsampled map with the
    skip, level by level. Two channels of coordinates (-1..1) accompany RGB, since portraits are aligned.
    """

    stride = 2
    ends = "encoder.0.0", "classifier"

    def __init__(
        self,
        *,
        widths=(32, 48, 64, 96, 96),
        depths=(0, 2, 3, 4, 1),
        dilations=(1, 2, 4, 1),
        decoder=(32, 48, 64, 96),
        attention=1,
        dropout=0.0,
    ):
        super().__init__()
        if len(decoder) != len(widths) - 1:
            raise ValueError("decoder needs one width fewer than widths")
        if not (0 <= dropout < 1 and all(1 <= rate <= 64 for rate in dilations)):
            raise ValueError("dropout must be from 0 to 1, and dilations from 1 to 64")
        previous = 5  # RGB and coordinates
        self.encoder = nn.ModuleList()
        for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            rates = (dilations[i % len(dilations)] if level == 3 else 1 for i in range(depth))
            blocks = [ResidualBlock(width, rate) for rate in rates]
            self.encoder.append(nn.Sequential(ConvNorm(previous, width, 5 if level == 0 else 3, 2), *blocks))
            previous = width
        self.attention = nn.ModuleList(TransformerBlock(previous, dropout=dropout) for _ in range(attention))
        self.attention.apply(_init_transformer)
        self.decoder = nn.ModuleList()
        for width, skip in zip(decoder[::-1], widths[-2::-1], strict=True):
            self.decoder.append(nn.Sequential(JoinNorm(previous + skip, width)))  # checkpoints have such names
            previous = width
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(previous, NUM_CLASSES, 1)

    def forward(self, image, full_size=True):
        """Image (B, 3, H, W) to logits (B, 19, H, W), or (B, 19, H/2, W/2) with full_size=False."""
        x = torch.cat([standardise(image), coordinates(image)], 1).contiguous(memory_format=torch.channels_last)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        size, x = x.shape[2:], tokens(x)
        for block in self.attention:
            x = block(x, *size)
        x = grid(x, *size)
        for (join,), skip in zip(self.decoder, skips[-2::-1], strict=True):
            x = join(x, skip)
        logits = self.classifier(self.dropout(x))
        return upsample(logits, image.shape[2:]) if full_size else logits


def coordinates(image):
    """x and y of each pixel's centre from -1 to 1, (B, 2, H, W), for image (B, 3, H, W)."""
    batch, _, height, width = image.shape
    x, y = ((2 * torch.arange(n, device=image.device, dtype=image.dtype) + 1) / n - 1 for n in (width, height))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)]).expand(batch, 2, height, width)


@torch.no_grad()
def fold_batch_norm(model):
    """Fold each batch norm into the convolution before it, in place; a class's FOLDS is {norm's name: convolution's}.

    These convolutions have no bias. The logits in evaluation mode stay the same up to rounding; the network cannot be
    trained any more.
    """
    for module in list(model.modules()):
        for name, before in getattr(module, "FOLDS", {}).items():
            norm, conv = module.get_submodule(name), module.get_submodule(before)
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            conv.weight *= scale[:, None, None, None]
            conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
            setattr(module, name, nn.Identity())
    return model


MODELS = {"microsegformer": MicroSegFormer, "microunet": MicroUNet}


def build(name, **arguments):
    """Construct the network `name`. UserError if MODELS has none or it does not accept these constructor arguments."""
    if name not in MODELS:
        raise UserError(f"unknown network {name!r}; known: {', '.join(MODELS)}")
    found = []

    def count(module, name, parameter):
        found.append(0 if parameter is None else parameter.numel())
        if len(found) > MAX_TENSORS or sum(found) > MAX_SIZE:
            raise ValueError(f"more than {MAX_TENSORS:,} tensors or {MAX_SIZE:,} parameters")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about empty layers, which are refused below
            # Foreign arguments may ask for gigabytes: count first, on a device without memory.
            hook = nn.modules.module.register_module_parameter_registration_hook(count)
            try:
                with torch.device("meta"):
                    MODELS[name](**arguments)
            finally:
                hook.remove()
            model = MODELS[name](**arguments)
        if not all(p.numel() for p in model.parameters()):
            raise ValueError("a layer would be empty")
        return model
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError) as error:
        known = ", ".join(inspect.signature(MODELS[name]).parameters) or "none"
        given = str(arguments)[:300]
        raise UserError(f"{name} does not accept the arguments {given}: {error}; it has {known}") from None


@torch.no_grad()
def check_logits(model):
    """UserError unless the network gives logits of the image's size, with full_size=False at its `stride`."""
    if not hasattr(model, "stride") or "full_size" not in inspect.signature(model.forward).parameters:
        raise UserError(f"{type(model).__name__} needs an attribute stride and forward(image, full_size=True)")
    if not hasattr(model, "ends"):
        raise UserError(f'{type(model).__name__} needs an attribute ends, its first and last layers: ("conv1", "head")')
    image, training = torch.zeros(1, 3, 64, 64, device=next(model.parameters()).device), model.training
    model.eval()
    for full_size, side in ((True, 64), (False, 64 // model.stride)):
        shape, expected = tuple(model(image, full_size=full_size).shape), (1, NUM_CLASSES, side, side)
        if shape != expected:
            found = f"full_size={full_size} gave logits {shape} of a 64 px image"
            raise UserError(f"{found}, not {expected}; its stride is {model.stride}")
    model.train(training)


def count_parameters(model):
    """Number of parameters as the challenge counts: frozen ones included, buffers not."""
    return sum(p.numel() for p in model.parameters())
