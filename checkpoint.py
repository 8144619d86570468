"""Checkpoint files: save and load them safely, and rebuild the network.

A checkpoint is a dict. `best.pt` contains what inference needs (`state_dict`, `model`, `model_args`, `size`);
`last.pt` adds the optimiser state that resuming needs. With --ema, best.pt has the averaged weights, last.pt the plain
ones. Both list the pairs that the weights were `trained_on` and those `held_out` as (name, hash of the image's pixels).
"""

import io
import textwrap
import zipfile
from pathlib import Path

from common import UserError, atomic

import torch

from model import build, fold_batch_norm

REQUIRED = {"state_dict": dict, "model": str, "model_args": dict, "size": int}


def save(path, content):
    """Write a dict of tensors, numbers, strings and containers of these, atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch's zip writer reports a full disk
            raise OSError(f"{error}".split("\n")[0]) from None


def load(path):
    """Read a checkpoint without running code from it. UserError if missing, damaged or not a checkpoint of ours."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    return parse(path.read_bytes(), path)


def parse(data, path):
    """`load` the bytes of a checkpoint, which are named `path` in errors."""
    try:
        # Only the zip format: the reader of torch's older format is less robust.
        whole = zipfile.is_zipfile(io.BytesIO(data))
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) if whole else {}
        list(leaves(content))
        fits = all(isinstance(content[key], kind) for key, kind in REQUIRED.items())
        fits = fits and all(isinstance(value, torch.Tensor) for value in content["state_dict"].values())
        fits = fits and all(isinstance(name, str) for name in content["model_args"])
        if not (fits and content["size"] in range(32, 2049, 32)):
            raise ValueError("an entry of another kind")
    except Exception as error:  # noqa: BLE001 - foreign bytes make the unpickler raise anything
        why = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(f"{path} is damaged or not a checkpoint of this project ({why})") from None
    return content


def leaves(content):
    """Everything in nested dicts, lists, tuples and sets that is none of these.

    ValueError or RuntimeError for a tensor that claims more values than it has in memory, such as one of stride 0.
    """
    waiting, known = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError("a tensor claims more values than it contains")
        if not isinstance(value, (dict, list, tuple, set)):
            yield value
        elif id(value) not in known:  # a container may contain itself
            known.add(id(value))
            waiting += [*value, *value.values()] if isinstance(value, dict) else value


def load_state(model, state, source):
    """Load a state_dict into a model. UserError naming `source` if it does not fit or is not finite."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = textwrap.shorten(str(error).split("\n")[1] if "\n" in str(error) else str(error), 150)
        raise UserError(f"{source} does not fit this network: {first}") from None
    if not is_finite(model):
        raise UserError(f"{source} contains weights that are not finite")


def is_finite(model):
    """True if all weights and statistics of a network are finite."""
    return bool(torch.stack([v.isfinite().all() for v in model.state_dict().values() if v.is_floating_point()]).all())


def restore(content, source, device="cpu"):
    """Build the network of a loaded checkpoint, float32, in evaluation mode. UserError if it does not fit."""
    try:
        model = build(content["model"], **content["model_args"])
    except UserError as error:
        raise UserError(f"{source} does not fit this version: {error}") from None
    load_state(model, content["state_dict"], source)
    return model.to(device, memory_format=torch.channels_last).eval()


def load_model(path, device="cpu"):
    """(network ready for inference, dict of the checkpoint's other entries) of a checkpoint file."""
    content = load(path)
    model = fold_batch_norm(restore(content, path, device))
    return model, {key: value for key, value in content.items() if key != "state_dict"}


def pairs_in(content, key):
    """[(name, hash of the image), ...] of the pairs under `key` of a loaded checkpoint. UserError if it has others.

    The hash is "" in checkpoints of older versions, which had only names.
    """
    try:
        pairs = ((entry, "") if isinstance(entry, str) else entry for entry in content.get(key, ()))
        return [(str(name), str(known)) for name, known in pairs]
    except (TypeError, ValueError):
        raise UserError(f"the checkpoint is damaged: its {key} contains no pairs") from None


def seen(content, keys):
    """For each pair, (name, hash of the image), whether the weights of a loaded checkpoint were trained on it.

    A name counts too, unless the training held the image out. Without any pairs it counts as trained on all.
    """
    used, held = pairs_in(content, "trained_on"), {known for _, known in pairs_in(content, "held_out")}
    names, hashes = {name for name, _ in used}, {known for _, known in used}
    return [not used or known in hashes or (name in names and known not in held) for name, known in keys]


def doubt(content, keys):
    """Why a score on these pairs, (name, hash) each, may not be one of unseen images; "" if it is one."""
    if not content.get("trained_on"):
        return "does not name the pairs it was trained on: its score may not be of unseen images"
    return "was trained on these pairs: its score is not of unseen images" if any(seen(content, keys)) else ""
