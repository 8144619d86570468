"""How a training's weights move: optimiser and its groups, mixed precision, the moving average."""

import torch

from device import computes_bf16
from labels import NUM_CLASSES
from muon import Muon


def make_optimiser(model, args, device):
    """AdamW, or Muon for the hidden layers' matrices and AdamW for the rest; decay on matrices only, or on all."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    settings = {"lr": args.lr, "fused": device.type != "mps", "weight_decay": args.weight_decay}
    rest = {"params": vectors, "weight_decay": args.weight_decay if args.decay_all else 0.0}
    if args.optimiser == "adamw":
        return torch.optim.AdamW([{"params": matrices}, rest], **settings)
    # The first layer and depthwise filters see few channels, the classifier has labels for rows: no hidden matrices.
    hidden = [p for p in matrices if p.shape[1] > 5 and p.shape[0] != NUM_CLASSES]
    others = [p for p in matrices if all(p is not h for h in hidden)]
    return Muon([{"params": hidden, "orthogonal": True}, {"params": others}, rest], **settings)


def precision(amp, device):
    """A function that makes the autocast context, and the gradient scaler (does nothing unless fp16).

    "auto" takes bf16 where the processor has instructions for it, which double its rate, and else fp16 on CUDA.
    """
    if amp == "auto":
        if device.type == "cuda":
            able = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            able = device.type == "cpu" and computes_bf16()
        amp = "bf16" if able else "fp16" if device.type == "cuda" else "off"
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    return autocast, torch.amp.GradScaler(device.type, enabled=amp == "fp16")


@torch.no_grad()
def update_average(kept, new, decay, step):
    """Move the average's tensors towards the model's; the decay warms up from 0 over the first steps."""
    torch._foreach_lerp_(kept, new, 1 - min(decay, (1 + step) / (10 + step)))
