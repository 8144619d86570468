"""Checkpoints: written whole or not at all, read without running code.

`best.pt` holds what inference needs (`state_dict`, `model`, `model_args`, `size`); `last.pt` adds what a resume needs.
"""

import textwrap
import zipfile
from pathlib import Path

import torch

from atomic import atomic
from errors import UserError
from model import MODELS, build

NEEDED = {"state_dict": dict, "model": str, "model_args": dict, "size": int}


def save(path, content):
    """Write a dict of tensors, numbers, strings and containers of them, atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch's zip writer reports a failed write (full disk) as a RuntimeError.
            raise OSError(f"{error}".split("\n")[0]) from None


def load(path):
    """The dict stored by `save`. UserError where it is missing, truncated, or holds anything but plain data."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        # torch.save writes zips; its older format is not ours, and its reader is less robust.
        content = torch.load(path, map_location="cpu", weights_only=True) if zipfile.is_zipfile(path) else None
    except Exception as error:  # noqa: BLE001 - foreign bytes make the unpickler raise anything
        raise UserError(f"{path} is damaged or holds more than plain tensors ({type(error).__name__})") from None
    if content is None:
        raise UserError(f"{path} is damaged or no checkpoint")
    if not isinstance(content, dict) or not content.keys() >= NEEDED.keys():
        raise UserError(f"{path} is no checkpoint of this project: it lacks one of {', '.join(sorted(NEEDED))}")
    for key, kind in NEEDED.items():
        if not isinstance(content[key], kind):
            raise UserError(f"{path} is damaged: its {key} is no {kind.__name__}")
    if not all(isinstance(value, torch.Tensor) for value in content["state_dict"].values()):
        raise UserError(f"{path} is damaged: its state_dict holds more than tensors")
    if content["size"] % 32 or not 32 <= content["size"] <= 2048:
        raise UserError(f"{path} is damaged: its size {content['size']} is no multiple of 32 from 32 to 2048")
    return content


def load_state(model, state, source):
    """Load a state_dict into a model; UserError naming `source` where names or shapes differ."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = textwrap.shorten(str(error).split("\n")[1] if "\n" in str(error) else str(error), 150)
        raise UserError(f"{source} is of another network: {first}") from None
    if not finite(model):
        raise UserError(f"{source} holds weights that are no finite numbers")


def finite(model):
    """Whether all weights and statistics of a network are finite numbers."""
    return all(bool(v.isfinite().all()) for v in model.state_dict().values() if v.is_floating_point())


def must_be_finite(model, average):
    """UserError where a training's networks (the average may be None) hold infinities or what is no number."""
    if not (finite(model) and (average is None or finite(average))):
        raise UserError("the weights are no longer finite; the last save is whole: try a lower --lr")


def restore(content, source, device="cpu"):
    """The network of a loaded checkpoint, in evaluation mode and float32; UserError naming `source` where foreign."""
    if content["model"] not in MODELS:
        raise UserError(f"{source} holds an unknown network {content['model']!r}; known: {', '.join(MODELS)}")
    try:
        model = build(content["model"], **content["model_args"])
    except Exception as error:  # noqa: BLE001 - a foreign file's arguments make a constructor raise anything
        raise UserError(f"{source} does not fit this version's {content['model']}: {error}") from None
    load_state(model, content["state_dict"], source)
    return model.to(device, memory_format=torch.channels_last).eval()


def restore_training(state, source, model, average, optimiser, scaler):
    """Give the networks, optimiser and scaler their state of a last.pt; its progress. UserError where it is foreign."""
    try:
        load_state(model, state["state_dict"], source)
        if average:
            load_state(average, state["average"], source)
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        return dict(state["progress"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source} is of another run or version ({error}); start anew with OVERWRITE=1") from None


def validated(content):
    """Whether pairs were held out of a checkpoint's training, by which it was scored."""
    return content.get("validated", content.get("official") is not None)


def load_model(path, device="cpu"):
    """The network of a checkpoint file, ready for inference, and the checkpoint's other entries."""
    content = load(path)
    model = restore(content, path, device)
    return model, {key: value for key, value in content.items() if key != "state_dict"}
