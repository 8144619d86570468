"""The draft of the course's technical report on one run: runs/NAME/report.html, A4, Arial 10, at most five pages.

python report.py --name a --author "A. Author" --matric A12345678B
python report_pdf.py --name a

Every figure in it is read from the runs' folders or computed from the network. It is a draft: its author checks it,
adds to it, and prints it. An edited draft is not replaced unless asked.
"""

import argparse
import hashlib
import math
from pathlib import Path

import numpy as np

from ablations import ablations, mean_score
from atomic import write_text
from diagram import diagram, parts, several
from errors import UserError
from labels import NAMES
from leaderboard import settings_of
from model import MicroSegFormer, build
from options import model_arguments, strength
from parameters import PARAM_LIMIT, count_parameters
from pictures import SEEN, image_score, read_pictures
from records import sentence, shown
from rundir import beyond_records, faces_drawn
from svg import curves, text

TEMPLATE = Path(__file__).with_name("course_report.html")
MOST_ABLATIONS = 12
EXAMPLES = 4  # worst and best images each, two to a row


def table(heads, rows, total=None, words=1):
    """An HTML table of cells as text; the first `words` columns stand left, a row of sums may close it."""

    def row(cells, tag="td", kind=""):
        word = [' class="word"' if i < words else "" for i in range(len(cells))]
        inside = "".join(f"<{tag}{kind}>{text(cell)}</{tag}>" for cell, kind in zip(cells, word, strict=True))
        return f"<tr{kind}>{inside}</tr>"

    body = "".join(map(row, rows)) + (row(total, kind=' class="total"') if total else "")
    return f"<table><thead>{row(heads, 'th')}</thead><tbody>{body}</tbody></table>"


def sizes_text(phases):
    """The sizes of a training in words."""
    return ", then ".join(f"{length} epochs at {size} × {size}" for size, length in phases)


def task(run):
    """What is to be done, on how many images."""
    count = len(run.best["image_scores"])
    trained, data = run.record.get("pairs", {}).get("training"), "the pairs of the CelebAMask-HQ challenge"
    if faces_drawn(run.record):
        data = "<b>faces drawn by synth.py, no photographs</b> (these scores say nothing about real faces)"
    pairs = f"{trained} pairs of image and mask are trained on and {count}" if trained else f"{count} pairs"
    return f"""<p>Face parsing gives every pixel of a 512 × 512 portrait one of {len(NAMES)} labels: background, skin,
nose, eyes, brows, ears, lips, hair and so on, left and right being the person's own. The data are {data};
no other data, no pretrained weights and no ensemble of models are used. {pairs}
({run.args["val_split"]:.0%}, drawn with seed {run.args["split_seed"]}) are held out for validation. The network must
have fewer than {PARAM_LIMIT:,} parameters. A prediction is scored by the F-measure of the labels present in an image's
true mask, averaged over these labels, then over the images: the official score.</p>"""


def network(model):
    """The network in words, as a drawing and as a table."""
    found, total = parts(model), count_parameters(model)
    if isinstance(model, MicroSegFormer):
        branch = "a gated depthwise-separable branch (LMSA) and " if count_parameters(model.lmsa) else ""
        words = f"""MicroSegFormer is a SegFormer (arXiv 2105.15203) made small: four stages of overlapping patch
embeddings and pre-norm transformer blocks with one head, whose keys and values come from a map shrunk by a strided
convolution. A Linear map of each stage, resized to stride {model.stride} and fused, feeds {branch}the classifier.
Bilinear resizing and Linear maps commute, so that each stage's maps act at its own resolution and the classifier acts
before the last upsampling: the same function for fewer multiply-adds."""
    else:
        dilation = max(module.dilation[0] for module in model.modules() if hasattr(module, "dilation"))
        words = f"""MicroUNet is a residual U-Net (arXiv 1505.04597, 1512.03385) whose logits lie at stride
{model.stride}. A residual block is two 3 × 3 convolutions with batch norm and a squeeze-and-excitation gate (arXiv
1709.01507) beside an identity."""
        if dilation > 1:
            words += f" Convolutions dilated by up to {dilation} see further."
        if len(model.attention):
            words += " Self-attention at the lowest resolution lets distant parts of a face inform each other."
        if model.coordinates:
            words += " Two channels of coordinates stand beside the colours, since portraits are aligned."
        words += " The decoder rises level by level, each a convolution over the upsampled map and the encoder's map."
    rows = [
        (p.name, p.what, p.channels or "", f"1/{p.stride}" if p.stride else "", f"{p.parameters:,}",
         f"{p.parameters / total:.1%}")
        for p in found
    ]  # fmt: skip
    heads = ("module", "what it holds", "channels", "size", "parameters", "share")
    return f"""<p>{words}</p><figure class="drawing">{diagram(model)}<figcaption>Figure 1. The network.</figcaption>
</figure><figure><figcaption>Table 1. Parameters by module, {PARAM_LIMIT - total:,} below the limit.</figcaption>
{table(heads, rows, ("total", "", "", "", f"{total:,}", ""), words=2)}</figure>"""


def loss(args):
    """The loss in words."""
    terms = []
    if args.ce:
        kind = f"focal cross-entropy (exponent {args.focal:g}, arXiv 1708.02002)" if args.focal else "cross-entropy"
        kind += f" with label smoothing {args.smoothing:g}" if args.smoothing else ""
        kind += " with class weights" if args.class_weights else ""
        terms.append(f"{args.ce:g} × {kind}")
    if args.dice:
        over = {"present": "the labels present in each image, as the score does", "all": "all labels"}[args.dice_over]
        terms.append(f"{args.dice:g} × Dice loss (averaged over {over})")
    if args.lovasz:
        terms.append(f"{args.lovasz:g} × Lovász-softmax (arXiv 1705.08790)")
    grid = {"image": "the image's own size", "logits": "the logits' grid, against each label's share of a cell"}
    return f"<p>The loss is {' + '.join(terms)}, at {grid[args.loss_grid]}.</p>"


def augmentation(args):
    """What is changed in a training image, and how strongly."""
    s, words = strength(args), []
    if s.flip:
        sides = "left and right labels exchanged" if s.exchange_sides else "labels left as they were"
        words.append(f"mirroring (probability {s.flip:g}, {sides})")
    amounts = {
        "rotation": f"±{s.rotate:g}°" if s.rotate else "",
        "scaling": f"up to a factor of {math.exp(s.scale):.2f}" if s.scale else "",
        "shifts": f"±{s.shift:.0%} of the side" if s.shift else "",
        **{name: f"±{value:.0%}" for name in ("brightness", "contrast", "saturation") if (value := getattr(s, name))},
    }
    words += [f"{name} {amount}" for name, amount in amounts.items() if amount]
    names = {
        "blur": "Gaussian blur",
        "noise": "noise",
        "mixup": "MixUp (arXiv 1710.09412)",
        "cutmix": "CutMix (1905.04899)",
    }
    words += [f"{about} (probability {value:g})" for name, about in names.items() if (value := getattr(s, name))]
    told = f"Training images are changed by {', '.join(words)}." if words else "Training images are not changed."
    if args.fix_sides:
        told += " Training masks whose left and right are reversed as a whole are repaired; scoring leaves them."
    if args.repeat_rare:
        told += f" Images with labels rarer than {args.repeat_rare:.0%} are drawn more often."
    return f"<p>{told}</p>"


def training(run, args):
    """Optimiser, schedule, sizes and machine."""
    kinds = {"cosine": "a cosine over the compute spent", "restarts": "warm restarts", "constant": "that rate"}
    optimiser = {"adamw": "AdamW", "muon": "Muon for hidden matrices, AdamW for the rest"}[args.optimiser]
    extras = [f"weight decay {args.weight_decay:g} {'everywhere' if args.decay_all else 'on matrices only'}"]
    extras += [f"gradients clipped at norm {args.clip:g}"] if args.clip else []
    extras += [f"dropout {args.dropout:g}"] if args.dropout else []
    extras += [f"a moving average of the weights (decay {args.ema:g}), which is scored and kept"] if args.ema else []
    machine = run.record["versions"]
    processor = f"a processor ({several(args.threads or machine.get('cpus', 0), 'thread')})"
    kind = run.record.get("device", "cuda" if machine.get("gpu") else "cpu")  # older records name no device
    where = {"cuda": machine.get("gpu"), "mps": "an Apple GPU"}.get(kind) or processor
    whole = ""
    if beyond_records(run.folder):
        whole = " The weights handed in come from the same training on all pairs, which leaves none to measure them on."
    begun = f" The weights start from those of {text(args.start_from)}." if args.start_from else ""
    return f"""<p>{sizes_text(run.phases)}, in batches of {args.batch}; {optimiser}; learning rate {args.lr:g} after
{args.warmup:g} epoch{"s" * (args.warmup != 1)} of linear warm-up, then {kinds[args.schedule]};
{", ".join(extras)}.{begun}
{run.lines[-1]["epoch"]} epochs took {run.lines[-1]["minutes"]:.0f} minutes on {text(where)}. Epoch {run.row["epoch"]},
the best on the validation images, is kept.{whole}</p>"""


def results(run, count):
    """Scores, curves and the table of labels."""
    best = run.best
    rows = [
        (name, images, "–" if f is None else f"{f:.3f}")
        for name, images, f in zip(NAMES, best["images_with_label"], best["labels"], strict=True)
    ]
    grey = "; grey: the first image size" if len(run.phases) > 1 else ""
    return f"""<p>On the validation images the network of <b>{count}</b> parameters reaches an F-measure of
<b>{best["official"]:.4f}</b> (official score). Pooling the pixels of batches of 32 images instead gives
{best["batch32"]:.4f}.</p><div class="side"><figure>{curves(run.lines, run.phases, run.name)}
<figcaption>Figure 2. Loss, official score and learning rate by epoch{grey}.</figcaption></figure>
<figure><figcaption>Table 2. F by label, over the images that have it.</figcaption>
{table(("label", "images", "F"), rows)}</figure></div>"""


def ablation_section(run, runs):
    """What changes of settings gained or lost under one budget."""
    found = ablations(run, runs)
    if not found:
        return "<p>No two finished runs of one budget differ in their settings.</p>"
    base, rows = found
    # Where not all fit, single changes tell more than several at once, large effects more than small ones.
    order = sorted(rows, key=lambda row: (len(row[0]), -abs(mean_score(row[1]) - mean_score(base))))
    kept = [row for row in rows if row in order[:MOST_ABLATIONS]]
    cells = []
    for differs, members in [({}, base), *kept]:
        change = ", ".join(f"{key} {shown(value)}" for key, value in differs.items()) or "the base"
        gain = f"{mean_score(members) - mean_score(base):+.4f}" if differs else ""
        count = members[0].record.get("parameters")
        cells.append((change, len(members), f"{mean_score(members):.4f}", gain, f"{count:,}" if count else "–"))
    args, scores = base[0].args, [member.row["official"] for member in base]
    left = f" {len(kept)} of {len(rows)} are shown." if len(kept) < len(rows) else ""
    noise = f" Its {len(base)} runs differ by up to {max(scores) - min(scores):.4f}." if len(base) > 1 else ""
    return f"""<p>The runs below share one budget, {sizes_text(base[0].phases)}, and differ from a base
({args["model"]}, learning rate {args["lr"]:g}, batch {args["batch"]}, Dice {args["dice"]:g}) in what is named.
{noise}</p><figure><figcaption>Table 3. Official validation score by setting, seeds averaged.{left}</figcaption>
{table(("setting", "runs", "official", "gain", "parameters"), cells)}</figure>"""


def examples(run):
    """The worst and best validation images, as many as fit, or why there are none."""
    try:
        pictures, seen = read_pictures(run.folder)
    except UserError as error:
        return f"<p>{text(sentence(error))}</p>"
    told = ""
    for worst in (True, False):
        chosen = [p for p in pictures if p["worst"] == worst][:EXAMPLES]
        images = ["".join(f'<img src="{uri}" alt="">' for uri in p["panels"]) for p in chosen]
        rows = ["<i></i>".join(images[i : i + 2]) for i in range(0, len(images), 2)]
        told += "".join(f'<div class="eight">{row}</div>' for row in rows)
        scores = ", ".join(f"{p['score']:.3f}{'*' if p['reversed'] else ''}" for p in chosen)
        told += f"<figcaption>{'Lowest' if worst else 'Highest'} scores: {scores}.</figcaption>"
    star = " * left and right are reversed in the true mask." if any(p["reversed"] for p in pictures) else ""
    star += f" {SEEN}" if seen else ""
    return f"""<figure>{told}<figcaption>Figure 3. Validation images: image, truth, prediction, errors (orange).{star}
</figcaption></figure>"""


def limits(run):
    """What the figures themselves say about where the network falls short."""
    best, confusion = run.best, np.array(run.best["confusion"], float)
    seen = [(f, NAMES[i], best["images_with_label"][i]) for i, f in enumerate(best["labels"]) if f is not None]
    lowest = ", ".join(f"{name} ({f:.3f}, in {count} images)" for f, name, count in sorted(seen)[:3])
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    np.fill_diagonal(share, 0)
    true, taken = np.unravel_index(share.argmax(), share.shape)
    scores = [image_score(row) for row in best["image_scores"].values()]
    error = f"{np.std(scores, ddof=1) / math.sqrt(len(scores)):.4f}" if len(scores) > 1 else "unknown size"
    return f"""<p>The lowest labels are {lowest}. The largest confusion: {share[true, taken]:.0%} of the pixels of
{NAMES[true]} are taken for {NAMES[taken]}. With {len(scores)} validation images the score has a standard error of
{error}, and the epoch was chosen on the same images, which favours the figure slightly.</p>"""


def libraries(run):
    """Third-party software the run used."""
    v = {name: text(run.record["versions"].get(name, "?")) for name in ("python", "torch", "numpy", "pillow")}
    return f"""<p>Python {v["python"]}, PyTorch {v["torch"]} (tensors, gradients), NumPy {v["numpy"]} (arrays), Pillow
{v["pillow"]} (image files). Network, losses, augmentation, training and scoring are the project's own code, commit
{text(run.record["commit"][:12])}.</p>"""


def network_of(run):
    """The run's network, untrained, and its arguments with today's defaults for those it does not name.

    UserError where this version of the code builds another network than the run had.
    """
    args = argparse.Namespace(**{**settings_of(), **run.args})
    try:
        model = build(args.model, **model_arguments(args))
    except (TypeError, KeyError) as error:
        raise UserError(f"this version cannot build the network of {run.name}: {error}") from None
    if run.record.get("parameters") not in (None, count_parameters(model)):
        commit = run.record["commit"].rstrip("+")[:12]
        raise UserError(f"{run.name} is of another {args.model} than this version's; check out its commit {commit}")
    return model, args


def draft(run, runs, author, matric):
    """The report as HTML. UserError where the run has no scores yet."""
    if not run.best:
        raise UserError(f"{run.folder} has no best.json: a report wants a run that was scored")
    model, args = network_of(run)
    score, count = f"{run.best['official']:.4f}", f"{count_parameters(model):,}"
    sections = (
        ("Task", task(run)), ("Network", network(model)), ("Loss", loss(args)), ("Augmentation", augmentation(args)),
        ("Training", training(run, args)), ("Results", results(run, count)),
        ("Ablations", ablation_section(run, runs)), ("Examples", examples(run)), ("Limits", limits(run)),
        ("Third-party libraries", libraries(run)),
    )  # fmt: skip
    who = f"{text(author or 'Author: ____________')} · {text(matric or 'matriculation number: ____________')}"
    head = f"""<p class="screen">A draft from the records of run {text(run.name)}: check it, add what you know, then
print it with make report-pdf. It shows pictures of the dataset: hand it in, but do not publish it.</p>
<h1>Face parsing with {count} parameters</h1><p>{who}</p>
<div class="key"><div><b>{score}</b>validation F-measure (official score)</div>
<div><b>{count}</b>parameters (fewer than {PARAM_LIMIT:,} are allowed)</div></div>"""
    body = "\n".join(f"<h2>{i}. {title}</h2>\n{content}" for i, (title, content) in enumerate(sections, 1))
    return TEMPLATE.read_text(encoding="utf-8").replace("<!--BODY-->", head + body, 1)


def write_draft(run, runs, author, matric, overwrite=False):
    """Write runs/NAME/report.html; the path. UserError where the one that is there has been edited since."""
    path, mark = run.folder / "report.html", "<!-- as drafted: "

    def signature(content):
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    if path.is_file() and not overwrite:
        content, _, end = path.read_text(encoding="utf-8", errors="replace").rpartition(mark)
        if not end.startswith(signature(content)):
            raise UserError(f"{path} has been edited; keep it under another name, or replace it with OVERWRITE=1")
    content = draft(run, runs, author, matric)
    write_text(path, f"{content}{mark}{signature(content)} -->\n")
    return path
