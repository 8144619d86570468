"""Scores of a network on held-out pairs, as the challenge counts: labels as they are, at 512 x 512."""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F

from augment import soft_labels
from labels import NUM_CLASSES
from losses import segmentation_loss
from metrics import confusion
from views import label_map, resize


@torch.no_grad()
def evaluate(model, pairs, indices, size, device, *, batch=4, share=(0, 1), autocast=contextlib.nullcontext):
    """Confusions (N, 19, 19) int64 of a network on pairs[indices] seen at `size`, and the mean CE + Dice loss.

    With `share` = (rank, processes), each process fills its own rows and leaves the others 0, so that a sum over the
    processes is the whole. Reversed masks stay as they are.
    """
    was_training = model.training
    model.eval()
    rank, processes = share
    confusions = np.zeros((len(indices), NUM_CLASSES, NUM_CLASSES), np.int64)
    losses = np.zeros(len(indices))
    rows = np.arange(len(indices))[rank::processes]
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        images, masks = pairs.batch(indices[chosen], fix_sides=False)
        with autocast():
            logits = model(resize(torch.from_numpy(images).to(device), size, size), full_size=False)
        logits = logits.float()
        # Halved down to the next finer grid, then averaged to the logits' own, which need not divide the mask.
        stride = 1 << (masks.shape[-1] // logits.shape[-1]).bit_length() - 1
        target = soft_labels(torch.from_numpy(masks).to(device), stride)
        target = F.interpolate(target, size=logits.shape[2:], mode="area")
        for row, one, share_of_label, mask in zip(chosen, logits, target, masks, strict=True):
            losses[row] = segmentation_loss(one[None], share_of_label[None]).item()
            confusions[row] = confusion(label_map(one[None], *mask.shape)[0].cpu().numpy(), mask)
    model.train(was_training)
    return confusions, losses
