"""Create the zip for the course: report, predicted masks, all code, checkpoint, and a Readme.txt that explains them.

python -m tools.report_zip --matric A12345678B --name a                     # build/A12345678B.zip, runs/a/report.pdf
python -m tools.report_zip --matric A12345678B --report report.pdf --out .  # of the release or the best run

Masks and checkpoint are those in the run's Codabench zip (tools/package.py), which is created first if missing.
"""

import io
import re
from pathlib import Path

from common import ArgumentParser, UserError, atomic, check_target, make_folder, read_json, require_packages, run_main

import torch

import checkpoint
import register
from data import find_data_of, load_pairs
from evaluate import evaluate, held_out, official_score
from images import image_files
from model import PARAM_LIMIT, count_parameters
from tools.check_submission import check_masks, check_run, judge, read_zip, show
from tools.package import CODE_OF_RUN, ROOT, ZIP, make_submission, report_replacement, write_zip
from views import parse_views

MAX_PAGES = 5
CODE = "*.py *.toml *.md Makefile LICENSE requirements.txt tools/* checks/* checks/reference/* docs/*"


def matriculation(text):
    """argparse type: a matriculation number, returned in capitals."""
    if not re.fullmatch("[A-Z][0-9]{8}[A-Z]", text.upper()):
        raise UserError(f"--matric {text}: not a letter, eight digits and a letter, such as A12345678B")
    return text.upper()


def count_pages(path):
    """Number of pages of a PDF. UserError if it is unreadable, has more than MAX_PAGES, or one that is not A4."""
    require_packages("pypdf")
    import pypdf

    try:
        sizes = [sorted((page.mediabox.width, page.mediabox.height)) for page in pypdf.PdfReader(path).pages]
    except Exception as error:  # a damaged file makes the reader raise anything
        raise UserError(f"cannot read {path} ({error}); export the report as PDF again") from None
    if not 1 <= len(sizes) <= MAX_PAGES:
        raise UserError(f"{path} has {len(sizes)} pages; 1 to {MAX_PAGES} are allowed")
    for number, (short, long) in enumerate(sizes, 1):
        if abs(short - 595) > 3 or abs(long - 842) > 3:
            raise UserError(f"page {number} of {path} has {short:.0f} x {long:.0f} points; A4 has 595 x 842")
    return len(sizes)


def read_submission(path, images, own, remedy):
    """({name: bytes}, views) of a Codabench zip. UserError if a check fails, or its weights or masks are others."""
    if not show(judge(path, images, "test")):
        raise UserError(f"{path} has the faults above; {remedy}")
    files, _ = read_zip(path)
    content = torch.load(io.BytesIO(files["solution/ckpt.pth"]), map_location="cpu", weights_only=True)
    sent = content["state_dict"]
    if sent.keys() != own.keys() or not all(sent[k].dtype == v.dtype and sent[k].equal(v) for k, v in own.items()):
        raise UserError(f"{path} has other weights; {remedy}")
    # The images may have been replaced since, under the same names: our code, not the zip's, repeats two masks.
    paths = image_files(images)
    code = {f"solution/{file.name}": file.read_bytes() for file in CODE_OF_RUN}
    alone = code | {"solution/ckpt.pth": files["solution/ckpt.pth"]}
    if not show(check_run(alone, check_masks(files, paths)[0], paths, 2)):
        raise UserError(f"{path} has other masks; {remedy}")
    return files, content.get("views", "")


def describe_score(weights, content, data, views):
    """The official score of a loaded checkpoint with these views, or why it is unknown, as text."""
    if checkpoint.is_validated(content):
        pairs, model, device = load_pairs(data), checkpoint.restore(content, weights), torch.device("cpu")
        indices = held_out(content, weights, pairs.keys())
        doubt = checkpoint.doubt(content, pairs.keys(indices))
        score = official_score(evaluate(model, pairs, indices, content["size"], device, views=parse_views(views))[0])
        unsure = f" ({weights.name} {doubt})" if doubt else ""
        return f"{score:.4f}, the official score on the {len(indices)} pairs held out, from the views below{unsure}"
    best = register.best_score(weights.parent)
    known = f"the run in run/ has {best:.4f}, from one view per image" if best >= 0 else "not measured"
    return f"unknown, since the weights were trained on all pairs; {known}"


def write_readme(matric, folder, content, score, views, report, count):
    """The text of Readme.txt; `content` is the checkpoint, `count` the number of masks."""
    versions = read_json(folder / "args.json")["versions"]
    return f"""Face parsing on CelebAMask-HQ, 19 labels: {matric}

Validation F-measure: {score}
Views that the masks average: {views or "one per image"}
Parameters: {count_parameters(checkpoint.restore(content, folder)):,} (fewer than {PARAM_LIMIT:,} are allowed)

Files
  {report}: the report
  masks/: the {count} predicted masks of the test images, PNG of mode P; pixel values are label ids
  checkpoint/ckpt.pth: weights and arguments of the network, its input size, and the views to average
  run/args.json, run/metrics.jsonl: command, settings and commit of the training, and its scores by epoch
  code/: all code; code/README.md describes it

Third-party libraries are in code/requirements.txt; the training's versions and machine:
  {", ".join(f"{name} {version}" for name, version in versions.items())}

How to reproduce the masks, in code/, with the test images in DATA/test/images (an absolute path):
  python -m pip install -r requirements.txt
  python -m tools.run --input DATA/test/images --output ../masks-again --weights ../checkpoint/ckpt.pth
Masks of other photos: python predict.py --input PHOTOS --output MASKS --weights ../checkpoint/ckpt.pth

CelebAMask-HQ (Lee et al., CVPR 2020), weights trained on it and these masks are for non-commercial research only.
"""


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--matric", required=True, type=matriculation, help="matriculation number, such as A12345678B")
    parser.add_argument("--report", type=Path, help=f"PDF, at most {MAX_PAGES} A4 pages; default the run's report.pdf")
    parser.add_argument("--name", help="run to hand in; default the release, else the best run")
    parser.add_argument("--data", help="folder with train/ and test/; default that of the training, else ./data")
    parser.add_argument("--out", default="build", type=Path, help="folder for the zip")
    args = parser.parse_args()
    weights = register.find_weights(args.name)
    folder, name = weights.parent, register.make_name(weights.parent)
    report, draft = args.report or folder / "report.pdf", folder / "report.html"
    if not report.is_file():
        raise UserError(f"no {report}: `make report NAME={name}`, then `make report-pdf NAME={name}`; or REPORT=FILE")
    if not args.report and draft.is_file():
        if draft.stat().st_mtime > report.stat().st_mtime:
            raise UserError(f"{draft} is newer than {report}: print it again, `make report-pdf NAME={name}`")
        if "________" in draft.read_text(encoding="utf-8"):
            remedy = f"edit and print it, or `make report OVERWRITE=1 AUTHOR= MATRIC= NAME={name}`"
            raise UserError(f"{draft} has blanks: {remedy}")
    pages = count_pages(report)
    check_target(args.out / f"{args.matric}.zip", ZIP)
    data = find_data_of(weights, args.data)
    images = data / "test" / "images"
    submission = folder / "submission-test.zip"
    if not submission.is_file():
        print(f"no {submission} yet: making it, with one view per image", flush=True)
        if make_submission(weights, images, "test", submission):
            return 1
    content = checkpoint.load(weights)
    remedy = f"`make submit NAME={name}` (and VIEWS=) creates a new one"
    sent, views = read_submission(submission, images, content["state_dict"], remedy)
    masks = {name: data for name, data in sent.items() if name.startswith("masks/")}
    score = describe_score(weights, content, data, views)
    readme = write_readme(args.matric, folder, content, score, views, report.name, len(masks))
    files = {report.name: report, "run/args.json": folder / "args.json", "run/metrics.jsonl": folder / "metrics.jsonl"}
    code = (path for pattern in CODE.split() for path in ROOT.glob(pattern) if path.is_file())
    files |= {f"code/{path.relative_to(ROOT)}": path for path in code}
    entries = masks | {name: path.read_bytes() for name, path in files.items()}
    entries |= {"Readme.txt": readme.encode(), "checkpoint/ckpt.pth": sent["solution/ckpt.pth"]}
    make_folder(args.out)
    report_replacement(args.out / f"{args.matric}.zip")
    with atomic(args.out / f"{args.matric}.zip") as temporary:
        write_zip(temporary, entries)
    print(f"{args.out / args.matric}.zip: report of {pages} pages, {len(masks)} masks, {len(files)} other files")
    return 0


if __name__ == "__main__":
    run_main(main)
