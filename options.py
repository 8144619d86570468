"""The flags of a training, their ranges, and the recipes that set them.

make recipes                                       # list the recipes
python train.py --recipe lmsa_gpu_aug --dice 2     # a recipe; further flags override it
"""

import argparse
import contextlib
import json
import tomllib
from pathlib import Path

from common import ArgumentParser, UserError, did_you_mean

from augment import PRESETS, Strength
from model import MODELS

RECIPES = Path(__file__).with_name("recipes.toml")
# Arguments that do not change what is trained; a resumed run may change them. Older runs have a train_score.
NEUTRAL = {"device", "threads", "nproc", "amp", "compile", "val_batch", "data", "cache", "runs", "resume"}
NEUTRAL |= {"save_minutes", "train_score"}


def build_parser():
    """The argument parser; every default of a training is here."""
    parser = ArgumentParser(prog="train.py", description="Train a face parser; one run is one folder.")
    switch = {"action": argparse.BooleanOptionalAction}

    run = parser.add_argument_group("run")
    run.add_argument("--name", help="folder of the run below --runs; default: the recipe's name and a number")
    run.add_argument("--runs", default="runs", help="folder of all runs")
    run.add_argument("--recipe", help="named settings from recipes.toml; further flags override them")
    run.add_argument("--resume", metavar="NAME", help="continue this run exactly where it stopped")
    run.add_argument("--from", dest="start_from", metavar="RUN", help="start from the weights of a run or checkpoint")
    run.add_argument("--overwrite", **switch, default=False, help="deletes and replaces this run, its report and zip")

    data = parser.add_argument_group("data")
    data.add_argument("--data", help="folder with train/images and train/masks; default ./data, else synthetic faces")
    data.add_argument("--cache", default="build/cache", help="cache folder")
    data.add_argument("--val-split", type=float, default=0.1, help="fraction held out for validation; 0: train on all")
    data.add_argument("--seed", type=int, default=42, help="random seed of weights, order and augmentation")
    data.add_argument("--split-seed", type=int, default=42, help="random seed of the split")
    data.add_argument("--fix-sides", **switch, default=True, help="repair training masks with left and right reversed")

    net = parser.add_argument_group("network")
    net.add_argument("--model", choices=sorted(MODELS), default="microsegformer", help="network")
    net.add_argument("--lmsa", **switch, default=True, help="LMSA in MicroSegFormer")
    net.add_argument("--dropout", type=float, default=0.15, help="dropout rate")
    net.add_argument("--model-args", default="{}", help="further constructor arguments as JSON")

    length = parser.add_argument_group("length and learning rate")
    length.add_argument("--epochs", type=int, default=200, help="epochs, unless --sizes gives them")
    length.add_argument("--sizes", default="512", help="image side, or sides with epochs: 128:36,256:12")
    length.add_argument("--batch", type=int, default=32, help="images per step, over all processes")
    length.add_argument("--lr", type=float, default=8e-4, help="highest learning rate")
    length.add_argument("--warmup", type=float, default=5, help="epochs of linear warm-up; at most half of the run")
    schedules = ("cosine", "restarts", "constant")
    length.add_argument("--schedule", choices=schedules, default="cosine", help="after warm-up")
    length.add_argument("--restart-period", type=float, default=30, help="epochs until the first warm restart")
    length.add_argument("--restart-growth", type=float, default=2, help="length of each period relative to the last")
    length.add_argument("--patience", type=int, default=30, help="stop after this many epochs without gain; 0: never")
    length.add_argument("--target", type=float, default=0.0, help="stop at this official score; 0: never")

    optim = parser.add_argument_group("optimiser")
    text = "muon: orthogonalised steps for matrices, AdamW for all other parameters"
    optim.add_argument("--optimiser", choices=("adamw", "muon"), default="adamw", help=text)
    optim.add_argument("--weight-decay", type=float, default=1e-4, help="decoupled, as in AdamW")
    optim.add_argument("--decay-all", **switch, default=True, help="decay biases and norms too, not only matrices")
    optim.add_argument("--clip", type=float, default=1.0, help="maximum gradient norm; 0 disables clipping")
    optim.add_argument("--ema", type=float, default=0.0, help="decay of the weights' moving average; 0 disables it")
    text = "fraction of the --from weights mixed into the last epoch's"
    optim.add_argument("--keep", type=float, default=0.0, help=text)

    loss = parser.add_argument_group("loss")
    loss.add_argument("--ce", type=float, default=1.0, help="weight of the cross-entropy")
    loss.add_argument("--dice", type=float, default=1.5, help="weight of the Dice loss")
    loss.add_argument("--focal", type=float, default=0.0, help="focal exponent in the cross-entropy; 0 disables it")
    loss.add_argument("--class-weights", choices=("", "balanced"), default="", help="balanced: 1/sqrt(frequency)")
    loss.add_argument("--smoothing", type=float, default=0.0, help="label smoothing in the cross-entropy")
    text = "average Dice over the labels present in the image, or over all 19"
    loss.add_argument("--dice-over", choices=("present", "all"), default="present", help=text)
    loss.add_argument("--loss-grid", choices=("image", "logits"), default="image", help="resolution of the loss")

    change = parser.add_argument_group("augmentation", "The defaults are the preset's.")
    change.add_argument("--augment", choices=sorted(PRESETS), default="basic", help="preset of the strengths below")
    for name, kind in Strength.__annotations__.items():
        change.add_argument(flag(name), type=float, help=kind.__metadata__[0])
    text = "exchange left and right labels in mirrored masks"
    change.add_argument("--exchange-sides", **switch, default=True, help=text)

    score = parser.add_argument_group("validation")
    score.add_argument("--val-every", type=int, default=1, help="epochs between validations")
    score.add_argument("--val-batch", type=int, default=0, help="images per step of validation; 0: 32 on a GPU, else 4")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    machine.add_argument("--nproc", type=int, default=1, help="processes, each on a GPU of its own")
    machine.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision")
    machine.add_argument("--compile", **switch, default=False, help="torch.compile the network")
    machine.add_argument("--threads", type=int, default=0, help="CPU threads; 0: what is fastest at the start")
    machine.add_argument("--save-minutes", type=float, default=5, help="minutes between saves within an epoch")
    return parser


def flag(name):
    """The flag of an argument, such as --val-split."""
    return "--from" if name == "start_from" else f"--{name.replace('_', '-')}"


def load_recipes():
    """The recipes as {name: table}. UserError if the file is not TOML or a flag does not stand under `set`."""
    try:
        recipes = tomllib.loads(RECIPES.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"cannot read recipes.toml: {error}") from None
    kinds = {"about": str, "like": str, "reference": (int, float), "set": dict}
    for name, table in recipes.items():
        if not isinstance(table, dict) or not all(isinstance(v, kinds.get(k, ())) for k, v in table.items()):
            raise UserError(f"recipes.toml: a recipe has {', '.join(kinds)}, flags stand under `set`; mend {name}")
    return recipes


def recipe_layers(name):
    """A recipe's settings as lists of flags, so that argparse checks them: those of the recipe it is `like` first."""
    recipes, layers = load_recipes(), []
    while name:
        if name not in recipes:
            similar = did_you_mean(recipes, name, count=1)
            raise UserError(f"no recipe {name!r} in recipes.toml: {similar or '`make recipes` lists them'}")
        table = recipes.pop(name)  # a recipe that is `like` itself is missing the second time
        own = table.get("set", {}).items()
        layers.insert(0, [f"--{key}={json.dumps(v) if isinstance(v, dict) else v}" for key, v in own])
        name = table.get("like")
    return layers


def parse(argv):
    """(arguments of a training, names of those given by flag or recipe). UserError for any invalid value."""
    parser = build_parser()
    unset = dict.fromkeys(vars(parser.parse_args([])))

    def given(flags):  # argparse sets no defaults over existing attributes
        found, _ = parser.parse_known_args(flags, argparse.Namespace(**unset))
        return {name: value for name, value in vars(found).items() if value is not None}

    own = given(argv)
    flags, names, model, model_args = [], set(), None, {}
    for layer in [*(recipe_layers(own["recipe"]) if "recipe" in own else []), list(argv)]:
        settings = given(layer)
        if settings.get("model", model) != model:
            model, model_args = settings["model"], {}  # arguments add up while the network stays the same
        model_args |= json_object(settings.get("model_args", "{}"))
        flags, names = flags + layer, names | settings.keys()
    args = parser.parse_args([*flags, f"--model-args={json.dumps(model_args)}"])
    if "epochs" in own and ":" in args.sizes:
        raise UserError(f"--epochs has no effect with --sizes {args.sizes}, which gives the epochs; change --sizes")
    if "lmsa" in own and args.model != "microsegformer":
        raise UserError(f"--lmsa is for microsegformer; {args.model} has no LMSA")
    check(args)
    return args, names


def from_record(settings, source):
    """The arguments in a run's args.json, read and checked as flags are; defaults for those it lacks.

    UserError naming `source` if a value is invalid.
    """
    parser = build_parser()
    usual = vars(parser.parse_args([]))
    given = [name for name in usual.keys() & settings.keys() if (settings[name], usual[name]) != (None, None)]
    flags = [f"{flag(name)}={settings[name]}" for name in given]
    try:
        args = parser.parse_args(flags)
        check(args)
    except UserError as error:
        raise UserError(f"{source}: {error}; restore it, or start a new run") from None
    return args


def check(args):
    """UserError if a value is out of range, naming its flag."""
    ranges = {
        (0, 1): ("smoothing", "target"),
        (0, 1e6): ("ce", "dice", "warmup", "clip", "patience", "save_minutes"),
        (1, 1e6): ("epochs", "batch", "val_every"),
        (0, 100): ("focal", "weight_decay"),
        (1, 100): ("restart_growth",),
        (1e-12, 100): ("lr",),
        (1e-3, 1e6): ("restart_period",),
        (0, 4096): ("threads", "nproc", "val_batch"),
        (0, 2**32 - 1): ("seed", "split_seed"),
        (0, 0.99): ("dropout", "keep"),
        (0, 0.999): ("val_split",),
        (0, 0.999999): ("ema",),
        (0, 180): ("rotate",),
        (0, 2): ("scale",),
        (1e-3, 100): ("mixup_alpha", "cutmix_alpha"),
    }
    limits = dict.fromkeys(Strength.__annotations__, (0, 1))  # of those that are not above
    limits |= {name: limit for limit, names in ranges.items() for name in names}
    for name, (low, high) in limits.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            raise UserError(f"{flag(name)} {value} is out of range: {low:g} to {high:g}")
    if args.ce == args.dice == 0:
        raise UserError("--ce 0 with --dice 0 leaves no loss; give one of them a weight")
    if args.keep and not (args.start_from or args.resume):
        raise UserError(f"--keep {args.keep} keeps a fraction of the weights of another run; add FROM= with its name")
    if args.keep and (args.patience or args.target):
        raise UserError("--keep acts in the last epoch, before which --patience and --target may stop: give 0 for both")
    if args.target and not args.val_split:
        raise UserError("--target needs validation pairs, but --val-split is 0")
    parse_sizes(args.sizes, args.epochs)
    strength(args)
    network_arguments(args)


def strength(args):
    """The augmentation: the preset's Strength with the individual flags on top. UserError for too much mixing."""
    own = {name: getattr(args, name) for name in Strength.__annotations__}
    chosen = Strength(**PRESETS[args.augment] | {name: value for name, value in own.items() if value is not None})
    if chosen.mixup + chosen.cutmix > 1:
        raise UserError("--mixup and --cutmix are probabilities of alternatives: their sum must be at most 1")
    return chosen


def network_arguments(args):
    """Constructor arguments of the network, as they are saved in each checkpoint."""
    if twice := {"lmsa", "dropout"} & (more := json_object(args.model_args)).keys():
        raise UserError(f"--model-args: {' and '.join(sorted(twice))} have flags of their own, such as --dropout")
    lmsa = {"lmsa": args.lmsa} if args.model == "microsegformer" else {}
    return {**lmsa, "dropout": args.dropout, **more}


def json_object(text):
    """The dict of --model-args. UserError if it is not a JSON object."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(content := json.loads(text), dict):
            return content
    raise UserError(f'--model-args {text} is not a JSON object such as {{"attention": 0}}')


def parse_sizes(text, epochs):
    """[(size, epochs), ...] of "128:36,256:12"; a single size such as "512" runs for `epochs`.

    UserError for anything else; sizes are multiples of 32 from 32 to 512.
    """
    parts = [part.partition(":") for part in str(text).split(",")]
    with contextlib.suppress(ValueError):
        phases = [(int(size), int(length) if colon else epochs) for size, colon, length in parts]
        fits = all(size % 32 == 0 and 32 <= size <= 512 and length > 0 for size, length in phases)
        if fits and (len(parts) == 1 or all(colon for _, colon, _ in parts)):
            return phases
    raise UserError(f"--sizes {text}: give one size from 32 to 512, a multiple of 32, or several as 128:36,256:12")
