"""Bad numbers: losses that are none, rates that diverge, data of one colour or without labels, sets too small."""

import shutil

import numpy as np
from PIL import Image

import checkpoint
from checks.attempt import run
from checks.faults_disk import copied
from checks.same import difference, metrics
from checks.strikes import at_call, scaled
from images import write_mask

LOWER = "try a lower --lr"


def attack(ledger, place, short):
    inject(ledger, place, short)
    diverge(ledger, place, short)
    odd_data(ledger, place, short)
    small_sets(ledger, place, short)
    refuse_flags(ledger, place, short)


def kept_is_sound(folder):
    """Why what a stopped training has kept is not sound, "" where it is: finite weights, whole lines."""
    for path in folder.glob("*.pt"):
        content = checkpoint.load(path)
        for state in filter(None, (content["state_dict"], content.get("average"))):
            if not all(v.isfinite().all() for v in state.values() if v.is_floating_point()):
                return f"{path.name} holds what is no number"
    text = (folder / "metrics.jsonl").read_text()
    return f"metrics.jsonl: {text}" if "NaN" in text or "Infinity" in text else ""


def spoil_weight():
    """NaN in a weight, as a faulty memory or an operator might leave it."""
    import gc

    import torch
    from torch import nn

    with torch.no_grad():
        for module in gc.get_objects():
            if type(module) is nn.Conv2d:
                module.weight.fill_(torch.nan)


def inject(ledger, place, short):
    """NaN and infinity in the loss, the gradient, the weights, the validation: stops; goes on from the last save."""
    nan, inf = float("nan"), float("inf")
    cases = {
        "NaN loss": (scaled("losses.training_loss", 5, nan), "the loss is nan"),
        "infinite gradient": (scaled("torch.nn.utils.clip_grad_norm_", 5, inf), "the gradient is inf"),
        "infinite loss": (scaled("losses.training_loss", 3, inf), "the loss is inf"),
        "NaN gradient": (scaled("torch.nn.utils.clip_grad_norm_", 4, nan), "the gradient is nan"),
        "NaN in validation": (scaled("evaluate.segmentation_loss", 2, nan), "the validation loss is nan"),
        "NaN weights at an epoch's end": (
            at_call("evaluate.evaluate", 1, spoil_weight, after=True),
            "no longer finite",
        ),
    }
    for number, (case, (prepare, told)) in enumerate(list(cases.items())[: 1 if short else None]):
        folder = place.runs / f"spoilt-{number}"
        problem = run(*place.train(folder.name), prepare=prepare).not_refused(told, LOWER) or kept_is_sound(folder)
        problem = problem or run(*place.resume(folder.name)).not_fine() or difference(folder, place.whole)
        ledger.add("numbers", "no number", problem and f"{case}: {problem}")


def diverge(ledger, place, short):
    """Rates far too high: the training stops by a line or ends, and whatever it has kept is finite."""
    rates = [("100", "muon"), ("100", "adamw"), ("3", "adamw"), ("30", "muon")]
    for number, (lr, optimiser) in enumerate(rates[: 1 if short else None]):
        for clip in ("1", "0")[: 1 if short else None]:
            name = f"diverging-{number}-{clip}"
            flags = ["--lr", lr, "--optimiser", optimiser, "--clip", clip, "--warmup", "0", "--schedule", "constant"]
            attempt = run(*place.train(name, *flags, "--sizes", "32:6"))
            problem = attempt.trouble()
            if not problem and attempt.status:
                problem = attempt.not_refused(LOWER)
            ledger.add("numbers", "diverging rate", problem or kept_is_sound(place.runs / name))


def odd_data(ledger, place, short):
    """Images of one colour, masks of background alone, labels that never occur: the training goes on and ends."""
    data = copied(place, "odd", count=8)
    for i, path in enumerate(sorted((data / "train/images").iterdir())):
        if i % 2:
            Image.new("RGB", (512, 512), "red" if i % 4 == 1 else "black").save(path)
    for path in (data / "train/masks").iterdir():
        write_mask(path, np.zeros((512, 512), np.uint8))
    flags = [
        ("--lovasz", "1", "--class-weights", "balanced"),
        ("--focal", "2", "--repeat-rare", "0.5", "--dice-over", "all"),
        ("--loss-grid", "logits", "--smoothing", "0.1", "--ce", "0"),
    ]
    for number, more in enumerate(flags[: 1 if short else None]):
        name = f"odd-{number}"
        problem = run(*place.train(name, *more, data=data, cache=place.root / "odd-cache")).not_fine()
        problem = problem or kept_is_sound(place.runs / name)
        if not problem and not all(0 <= line["loss"] < 100 for line in metrics(place.runs / name)):
            problem = f"losses {[line['loss'] for line in metrics(place.runs / name)]}"
        ledger.add("numbers", "one colour, no foreground", problem)


def small_sets(ledger, place, short):
    """Batches larger than the set, sets of one image, splits that leave a side empty."""
    one, two = copied(place, "one", count=1), copied(place, "two", count=2)
    cache = place.root / "small"
    cases = [
        (place.data, ["--batch", "1000"], ""),
        (one, [], "--val-split 0.3 of 1 pairs"),
        (one, ["--val-split", "0"], "one image of 32 pixels"),
        (one, ["--val-split", "0", "--sizes", "64:2"], ""),
        (one, ["--val-split", "0", "--sizes", "32:2", "--model", "microsegformer", "--model-args", "{}"],
         "one image of 32 pixels"),
        (two, ["--val-split", "0.1"], "--val-split 0.1 of 2 pairs"),
        (two, ["--val-split", "0.9"], "--val-split 0.9 of 2 pairs"),
        (two, ["--val-split", "0.5", "--sizes", "64:2", "--train-score", "0"], ""),
        (two, ["--val-split", "nan"], "--val-split"), (two, ["--val-split", "1"], "--val-split"),
    ]  # fmt: skip
    for number, (data, flags, told) in enumerate(cases[::3] if short else cases):
        name = f"small-{number}"
        attempt = run(*place.train(name, *flags, data=data, cache=cache / str(data.name)))
        problem = attempt.not_refused(told) if told else attempt.not_fine() or kept_is_sound(place.runs / name)
        if told and not problem and (place.runs / name).exists():
            problem = "a run was begun"
        ledger.add("numbers", "small sets", problem and f"{flags} of {data.name}: {problem}")
    for data in (one, two):
        shutil.rmtree(data)


def refuse_flags(ledger, place, short):
    """Flags of all scripts with values out of range: one line, before anything is written."""
    train = place.train("flags")
    photo, weights = ["--input", place.data / "test/images", "--output", place.root / "f"], ["--weights", place.weights]
    pairs = ["--data", place.data, "--cache", place.cache]
    flags = [
        (*train, "--lr", "nan"),
        (*train, "--lr", "inf"), (*train, "--ema", "1"), (*train, "--smoothing", "nan"),
        (*train, "--class-weights", ",".join(["nan"] * 19)), (*train, "--class-weights", ",".join(["0"] * 19)),
        (*train, "--model-args", "[" * 99_999), (*train, "--model-args", '{"widths": [0, 0, 0, 0, 0]}'),
        (*train, "--model-args", '{"widths": "x"}'), (*train, "--val-size", "-32"), (*train, "--val-size", "99968"),
        (*train, "--device", "meta"), (*train, "--device", "cuda:99"), (*train, "--device", ""),
        (*train, "--name", "x" * 300), (*train, "--threads", "-1"), (*train, "--train-score", "-1"),
        (*train, "--data", "x" * 5000), (*train, "--from", "x" * 5000), (*train, "--seed", "1e3"),
        ("predict.py", *weights, *photo, "--size", "33"), ("predict.py", *weights, *photo, "--views", "nan"),
        ("predict.py", *weights, *photo, "--device", "meta"), ("predict.py", *weights, "--input", "", "--output", "x"),
        ("predict.py", "--whole", "--weights", "y" * 5000, *photo), ("evaluate.py", *weights, *pairs, "--size", "31"),
        ("evaluate.py", *weights, *pairs, "--val-split", "nan"),
        ("evaluate.py", *weights, *pairs, "--split-seed", "-1"),
        ("decode.py", *weights, *pairs, "--folds", "0"), ("decode.py", *weights, *pairs, "--val-split", "inf"),
        ("check_submission.py", "--data", place.data, "--zip", "z" * 5000),
        ("check_submission.py", "--zip", place.root, "--data", place.data),
        ("parameters.py", "--model-args", "{"), ("parameters.py", "--model-args", "[1]"),
        (*train, "--model-args", '{"decoder": [8]}'), ("parameters.py", "--model-args", '{"wings": 1}'),
        ("synth.py", "--out", place.root / "s", "--size", "-1"), ("synth.py", "--out", "s" * 300),
        ("prepare.py", "--raw", "r" * 5000), ("audit.py", "--data", "d" * 5000), ("launch.py", "--nproc", "-1"),
        ("leaderboard.py", "--runs", place.root / "none"), ("report.py", "--runs", place.root / "none"),
    ]  # fmt: skip
    for command in flags[::6] if short else flags:
        shown = " ".join(str(part)[:60] for part in (command[0], *command[-2:]))
        problem = run(*command).not_refused()
        ledger.add("numbers", "values out of range", problem and f"{shown}: {problem}")
