"""The flags of a training and the named recipes that set them.

make recipes                        # lists them
python train.py --recipe lmsa_gpu_aug --dice 2
"""

import argparse
import json
import math
import tomllib
from pathlib import Path

from augment import PRESETS, Strength
from errors import ArgumentParser, UserError
from labels import NUM_CLASSES
from model import MODELS, must_have_lmsa
from schedule import parse_sizes

RECIPES = Path(__file__).with_name("recipes.toml")
# What a resumed run may change: where it runs, not what it computes.
RESUME_MAY_CHANGE = {"device", "threads", "data", "cache", "runs", "resume"}


def build_parser():
    """The argument parser of train.py; every default of a training stands here."""
    parser = ArgumentParser(
        prog="train.py",
        description="Train a face parser; one run is one folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction

    run = parser.add_argument_group("run")
    run.add_argument("--name", help="folder of the run below --runs; default: the recipe's name and a number")
    run.add_argument("--runs", default="runs", help="folder of all runs")
    run.add_argument("--recipe", help="named settings of recipes.toml; further flags override them")
    run.add_argument("--resume", metavar="NAME", help="go on with this run exactly where it stopped")
    run.add_argument("--from", dest="start_from", metavar="RUN", help="start from the weights of a run or checkpoint")
    run.add_argument("--overwrite", action="store_true", help="replace a run of the same name")

    data = parser.add_argument_group("data")
    data.add_argument("--data", help="folder with train/images and train/masks; default ./data, else drawn faces")
    data.add_argument("--cache", default="build/cache", help="folder of the decoded copies")
    data.add_argument("--val-split", type=float, default=0.1, help="share held out for validation; 0 trains on all")
    data.add_argument("--seed", type=int, default=42, help="of the split, the weights, the order and augmentation")
    data.add_argument("--split-seed", type=int, default=42, help="of the split alone")
    data.add_argument("--fix-sides", action=switch, default=True, help="repair left-right reversed training masks")

    data.add_argument(
        "--repeat-rare", type=float, default=0.0, help="draw images with labels rarer than this share more often; 0 not"
    )

    net = parser.add_argument_group("network")
    net.add_argument("--model", choices=sorted(MODELS), default="microsegformer")
    net.add_argument("--lmsa", action=switch, default=True, help="LMSA in MicroSegFormer")
    net.add_argument("--dropout", type=float, default=0.15, help="dropout rate")
    net.add_argument("--model-args", default="{}", help="further constructor arguments as JSON")

    length = parser.add_argument_group("length and learning rate")
    length.add_argument("--epochs", type=int, default=200, help="epochs where --sizes names none")
    length.add_argument("--sizes", default="512", help="image sides, with epochs for several: 128:36,256:12")
    length.add_argument("--batch", type=int, default=32, help="images a step, over all processes")
    length.add_argument("--lr", type=float, default=8e-4, help="highest learning rate")
    length.add_argument("--warmup", type=float, default=5, help="epochs of linear warm-up; at most half of the run")
    length.add_argument("--schedule", choices=("cosine", "restarts", "constant"), default="cosine")
    length.add_argument("--lr-floor", type=float, default=0.0, help="last learning rate as a share of --lr")
    length.add_argument("--restart-period", type=float, default=30, help="epochs to the first warm restart")
    length.add_argument("--restart-growth", type=float, default=2, help="each period is so many times the last")
    length.add_argument("--patience", type=int, default=30, help="stop after so many epochs without gain; 0 never")
    length.add_argument("--target", type=float, default=0.0, help="stop at this official score; 0 never")

    optim = parser.add_argument_group("optimiser")
    optim.add_argument("--optimiser", choices=("adamw", "muon"), default="adamw")
    optim.add_argument("--weight-decay", type=float, default=1e-4)
    optim.add_argument("--decay-all", action=switch, default=True, help="decay biases and norms too, not matrices only")
    optim.add_argument("--clip", type=float, default=1.0, help="highest gradient norm; 0 does not clip")
    optim.add_argument("--ema", type=float, default=0.0, help="decay of the weights' moving average; 0 keeps none")

    loss = parser.add_argument_group("loss")
    loss.add_argument("--ce", type=float, default=1.0, help="weight of the cross-entropy")
    loss.add_argument("--dice", type=float, default=1.5, help="weight of the Dice loss")
    loss.add_argument("--lovasz", type=float, default=0.0, help="weight of the Lovasz-softmax loss")
    loss.add_argument("--focal", type=float, default=0.0, help="focal exponent in the cross-entropy; 0 is plain")
    loss.add_argument("--class-weights", default="", help='"balanced" (1/sqrt(share)) or 19 numbers with commas')
    loss.add_argument("--smoothing", type=float, default=0.0, help="label smoothing in the cross-entropy")
    loss.add_argument("--dice-over", choices=("present", "all"), default="present", help="labels the Dice averages")
    loss.add_argument(
        "--loss-grid", choices=("image", "logits"), default="image", help="loss at the image's size or at the logits'"
    )

    change = parser.add_argument_group("augmentation")
    change.add_argument("--augment", choices=sorted(PRESETS), default="basic", help="preset of the strengths below")
    for name, kind in Strength.__annotations__.items():
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            change.add_argument(flag, action=switch, default=True, help="mirrored masks trade left and right")
        else:
            change.add_argument(flag, type=float, help="default as the preset has it")

    score = parser.add_argument_group("validation")
    score.add_argument("--val-every", type=int, default=1, help="epochs between validations")
    score.add_argument("--keep-every", type=int, default=0, help="keep epoch-NNN.pt every so many epochs; 0 none")
    score.add_argument("--train-score", type=int, default=30, help="training pairs scored as well, for the curves")
    score.add_argument("--val-size", type=int, default=0, help="image side to validate at; 0 is the training's")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    machine.add_argument(
        "--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="autocast; auto: where it is quicker"
    )
    machine.add_argument("--compile", action=switch, default=False, help="torch.compile the network")
    machine.add_argument("--threads", type=int, default=0, help="CPU threads of each process; 0 leaves torch's choice")
    machine.add_argument("--save-minutes", type=float, default=5, help="minutes between saves within an epoch")
    return parser


def load_recipes():
    """The recipes as {name: table}; UserError where the file is not TOML."""
    try:
        return tomllib.loads(RECIPES.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read {RECIPES.name}: {error}") from None


def recipe_flags(name):
    """A recipe's settings as a list of flags, so that they pass the same checks as typed ones.

    Those of the recipe it is `like` come first.
    """
    recipes = load_recipes()
    if name not in recipes:
        raise UserError(f"no recipe {name!r}; `make recipes` lists {', '.join(recipes)}")
    flags = recipe_flags(recipes[name]["like"]) if "like" in recipes[name] else []
    for key, value in recipes[name].get("set", {}).items():
        flag = f"--{key}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{key}")
        else:
            flags.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def parse(argv):
    """Arguments of a training as a namespace, and the set of those that were given by flag or recipe.

    Exits with status 2 at an unknown flag (argparse), UserError at a value out of range.
    """
    parser = build_parser()
    first, _ = parser.parse_known_args(argv)
    given = (recipe_flags(first.recipe) if first.recipe else []) + list(argv)
    args = parser.parse_args(given)
    if args.resume == "":
        raise UserError("name the run to go on with: make resume NAME=a")
    if "--epochs" in {flag.partition("=")[0] for flag in argv} and ":" in args.sizes:
        raise UserError(f"--epochs has no effect, for --sizes {args.sizes} names its epochs; give --sizes instead")
    if {"--lmsa", "--no-lmsa"} & set(argv):
        must_have_lmsa(args.model)
    check(args)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # argparse sets no defaults where a value stands
    return args, {name for name, value in vars(parser.parse_args(given, unset)).items() if value is not None}


def check(args):
    """UserError where a value is out of range, naming its flag."""
    ranges = {
        "epochs": (1, 1e6), "batch": (1, 1e6), "lr": (1e-12, 100), "dropout": (0, 0.99), "ce": (0, 1e6),
        "dice": (0, 1e6), "focal": (0, 100), "smoothing": (0, 1), "ema": (0, 0.999999), "val_every": (1, 1e6),
        "seed": (0, 2**32 - 1), "split_seed": (0, 2**32 - 1), "warmup": (0, 1e6), "clip": (0, 1e6),
        "weight_decay": (0, 100), "restart_period": (1e-3, 1e6), "restart_growth": (1, 100), "patience": (0, 1e6),
        "lr_floor": (0, 1), "threads": (0, 4096), "target": (0, 1), "keep_every": (0, 1e6), "save_minutes": (0, 1e6),
        "lovasz": (0, 1e6), "repeat_rare": (0, 1), "train_score": (0, 1e6), "val_size": (0, 2048),
        "val_split": (0, 0.999),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range: {low:g} to {high:g}")
    if args.ce == args.dice == args.lovasz == 0:
        raise UserError("--ce 0 with --dice 0 leaves no loss; give one of them a weight")
    if args.target and not args.val_split:
        raise UserError("--target is a score, which --val-split 0 leaves no pairs for; give one of them")
    if args.val_split and 0 < args.patience < args.val_every:
        raise UserError(
            f"--patience {args.patience} ends the run before its first score: raise it above --val-every "
            f"{args.val_every}, or give 0 for none"
        )
    if args.val_size % 32:
        raise UserError(f"--val-size {args.val_size}: give a multiple of 32, or 0 for the training's size")
    parse_sizes(args.sizes, args.epochs)
    strength(args)
    class_weights(args)
    model_arguments(args)


def strength(args):
    """The preset's augmentation with the single flags that were given on top."""
    chosen = dict(PRESETS[args.augment])
    chosen.update({name: value for name in Strength.__annotations__ if (value := getattr(args, name)) is not None})
    result = Strength(**chosen)
    for name in ("flip", "blur", "noise", "mixup", "cutmix"):
        if not 0 <= getattr(result, name) <= 1:
            raise UserError(f"--{name} {getattr(result, name)} is no probability from 0 to 1")
    if result.mixup + result.cutmix > 1:
        raise UserError("--mixup and --cutmix are probabilities of which an image draws one: they add up to 1 at most")
    highest = {"rotate": 180, "scale": 2, "shift": 1, "brightness": 1, "contrast": 1, "saturation": 1}
    for name, high in highest.items():
        if not 0 <= getattr(result, name) <= high:
            raise UserError(f"--{name} {getattr(result, name)} is out of range: 0 to {high}")
    for name in ("mixup_alpha", "cutmix_alpha"):
        if not 0 < getattr(result, name) <= 100:
            raise UserError(f"--{name.replace('_', '-')} {getattr(result, name)} is out of range: above 0, to 100")
    return result


def class_weights(args):
    """None, "balanced", or 19 floats."""
    if args.class_weights in ("", "balanced"):
        return args.class_weights or None
    try:
        weights = [float(part) for part in args.class_weights.split(",")]
    except ValueError:
        weights = []
    if len(weights) != NUM_CLASSES or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise UserError(f'--class-weights {args.class_weights}: give "balanced" or {NUM_CLASSES} numbers >= 0')
    return weights


def model_arguments(args):
    """Constructor arguments of the network."""
    own = {"lmsa": args.lmsa} if args.model == "microsegformer" else {}
    return {**own, "dropout": args.dropout, **json_arguments(args.model_args)}


def json_arguments(text):
    """The dict that --model-args holds as JSON; UserError where it is none."""
    try:
        extra = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--model-args {text}: not JSON ({error})") from None
    if not isinstance(extra, dict):
        raise UserError(f'--model-args {text}: give a JSON object, as {{"coordinates": false}}')
    return extra
