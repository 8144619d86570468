"""What the benchmark times of the networks: training steps and inference, literally and as they are here; views."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from augment import PRESETS, Strength, augment, draw
from checks.bench_measure import interleaved, median, status
from checks.plain_segformer import plain_forward
from device import keep_memory
from labels import FLIP, NUM_CLASSES
from losses import training_loss
from model import build, upsample
from muon import Muon
from options import recipe_flags
from views import input_size, label_map, log_probabilities, logits, parse_views, resize


def pictures(batch):
    """uint8 images (B, 3, 512, 512) and masks (B, 512, 512) of regions about as large as a face's."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, NUM_CLASSES, (batch, 1, 16, 16), generator=generator)
    masks = F.interpolate(small.float(), scale_factor=32)[:, 0].byte()
    return torch.randint(0, 256, (batch, 3, 512, 512), dtype=torch.uint8, generator=generator), masks


def plain_augment(images, masks, drawn, size):
    """The same changes in the plain way: resampled through affine_grid, colours one after another."""
    x, y = F.interpolate(images.float() / 255, (size, size)), F.interpolate(masks[:, None].float(), (size, size))
    where = F.affine_grid(drawn["theta"], x.shape, align_corners=False)
    x = F.grid_sample(x, where, padding_mode="reflection", align_corners=False)
    y = F.grid_sample(y, where, mode="nearest", padding_mode="reflection", align_corners=False)[:, 0].long()
    y = torch.where(drawn["flip"][:, None, None] > 0, torch.tensor(FLIP)[y], y)
    brightness, contrast, saturation = (drawn[k][:, None, None, None] for k in ("brightness", "contrast", "saturation"))
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    x = (x * luma).sum(1, keepdim=True).lerp(x, saturation)
    x = (x * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True).lerp(x, contrast) * brightness
    return x.clamp(0, 1), y


def plain_loss(logits, target, dice=1.5):
    """CE + Dice as it is mostly written: a one-hot tensor at full size."""
    p, true = logits.softmax(1), F.one_hot(target, NUM_CLASSES).permute(0, 3, 1, 2).float()
    overlap, total = (p * true).sum((2, 3)), (p + true).sum((2, 3))
    return F.cross_entropy(logits, target) + dice * (1 - (2 * overlap + 1) / (total + 1)).mean()


def network(kind, name):
    torch.manual_seed(0)
    model = build(name)
    if kind == "literal":
        return model
    keep_memory()
    return model.to(memory_format=torch.channels_last)


def training(kind, name, batch, size, stride=1, muon=False):
    """A function that takes one training step; kind is literal, float32 or bf16."""
    model, strength = network(kind, name), Strength(**PRESETS["basic"])
    images, masks = pictures(batch)
    if muon:
        parts = [[p for p in model.parameters() if (p.dim() > 1 and p.shape[1] > 5) == many] for many in (True, False)]
        optimiser = Muon([{"params": parts[0], "orthogonal": True}, {"params": parts[1]}], lr=1e-4, fused=True)
    else:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=kind != "literal" or None)

    def step():
        drawn = draw(batch, strength, (0, 0))
        if kind == "literal":
            x, target = plain_augment(images, masks, drawn, size)
            loss = plain_loss(plain_forward(model, x), target)
        else:
            x, target = augment(images, masks, drawn, size, stride)
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
                logits = model(x, full_size=False)
            loss = training_loss(logits.float(), target, ce=1.0, dice=1.5)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    return step


def evaluated(kind, model, images):
    """The logits of images, at the size that the network gives."""
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        return plain_forward(model, images) if kind == "literal" else logits(model, images).float()


def inference(kind, name, batch, size):
    """A function that gives the uint8 labels (B, size, size) of stored images."""
    model, images = network(kind, name).eval(), pictures(batch)[0]

    @torch.inference_mode()
    def run():
        values = evaluated(kind, model, resize(images, size, size))
        return values.argmax(1).byte() if kind == "literal" else label_map(values, size, size)

    return run


WHAT = {"training": training, "inference": inference}


def repeated(what, kind, keep=False, **arguments):
    """Median seconds of a training step or an inference, after one that does not count, and MiB before the first.

    `keep` has the literal network keep its memory too.
    """
    if keep:
        keep_memory()
    run, before = WHAT[what](kind, **arguments), status("VmHWM")
    return median(interleaved({kind: run}, 3)[kind]), before


def profile(what, kind, **arguments):
    """The five operators that take most of the second step or inference, with their shares of its time."""
    run = WHAT[what](kind, **arguments)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return [(e.key.removeprefix("aten::"), e.self_cpu_time_total / total) for e in events[:5]]


@torch.inference_mode()
def differences(name, batch, size):
    """How far float32 and bf16 are from the literal logits, and the share of pixels whose label is the same."""
    images = resize(pictures(batch)[0], size, size)
    literal, *ours = (
        upsample(evaluated(kind, network(kind, name).eval(), images), (size, size))
        for kind in ("literal", "float32", "bf16")
    )
    scale, labels = float(literal.abs().max()), literal.argmax(1)
    return [(float((x - literal).abs().max()) / scale, float((x.argmax(1) == labels).float().mean())) for x in ours]


def limit(repeats, side, settings):
    """Seconds of sgemm, a training step and an inference of MicroUNet in turn, and their multiply-adds.

    settings: batch and size of each; the training is the release's: Muon, loss at the logits' grid.
    """
    matrix = torch.randn(side, side)
    half = matrix.bfloat16()
    train = {kind: training(kind, "microunet", **settings, stride=2, muon=True) for kind in ("float32", "bf16")}
    infer = inference("float32", "microunet", **settings)
    work = {"sgemm": lambda: matrix @ matrix, "bf16 gemm": lambda: half @ half, "inference": infer}
    work |= {f"training {kind}": step for kind, step in train.items()}
    counts = {}
    for name, function in work.items():
        with FlopCounterMode(display=False) as counter:
            function()
        counts[name] = counter.get_total_flops() / 2
    return interleaved(work, repeats), counts


def release_size():
    """Batch and size of the release recipe's last epochs."""
    flags = dict(flag.removeprefix("--").split("=") for flag in recipe_flags("release") if "=" in flag)
    return {"batch": int(flags["batch"]), "size": int(flags["sizes"].split(",")[-1].split(":")[0])}


def views(repeats, size, listed):
    """Seconds {views: [of each round]} of MicroUNet's averaged views of one image, and their pixels over one view's."""
    model, image = network("float32", "microunet").eval(), pictures(1)[0]
    seconds = interleaved(
        {text: lambda text=text: log_probabilities([model], image, size, parse_views(text)) for text in listed}, repeats
    )
    pixels = {}
    for text in listed:
        flip, scales = parse_views(text)
        pixels[text] = sum(np.prod(input_size(512, 512, size, s)) for s in scales) * (1 + flip) / size**2
    return seconds, pixels


def view_peak(size, text):
    """One image through these views, for the peak memory of the process."""
    model, image = network("float32", "microunet").eval(), pictures(1)[0]
    log_probabilities([model], image, size, parse_views(text))
