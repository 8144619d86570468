"""Create the zip for the course: report, predicted masks, all code, checkpoint, and a Readme.txt that explains them.

python -m tools.report_zip --matric A12345678B --name a                     # build/A12345678B.zip, runs/a/report.pdf
python -m tools.report_zip --matric A12345678B --report report.pdf --out .  # of the release
python -m tools.report_zip                       # a first look: build/report-zip.zip with a draft, and what to fill in

Masks and checkpoint are those in the run's Codabench zip (tools/package.py), which is created first if missing.
"""

import io
import re
from pathlib import Path
from string import Template

from common import ArgumentParser, UserError, atomic, check_target, make_folder, print_message, read_json, run_main

import torch

import checkpoint
import register
from data import find_data_of
from images import image_files
from model import PARAM_LIMIT, count_parameters
from tools.check_submission import check_masks, check_run, judge, read_zip, show
from tools.course_report import MAX_PAGES, count_pages, make_draft, matriculation, score
from tools.package import CODE_OF_RUN, ROOT, ZIP, make_submission, write_zip

README = Path(__file__).with_name("Readme.txt")
CODE = "*.py *.toml *.md Makefile LICENSE requirements.txt tools/* checks/* checks/reference/* docs/*"


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


def describe_score(own, views, data):
    """The official score of a run's weights with these views, or why it is unknown, as text."""
    for weights in (own, own.with_name("validated.pt")):
        if weights.is_file() and checkpoint.load(weights).get("validated"):
            scores, doubt = score(weights, views, data)
            about = f"the official score on the {len(scores)} pairs held out, from the views below"
            if weights != own:
                about += "; it is of a training without these pairs, the weights handed in are of one on all pairs"
            return f"{scores.mean():.4f}, {about}" + (f" ({weights.name} {doubt})" if doubt else "")
    return "unknown, since the weights were trained on all pairs"


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--matric", type=matriculation, help="matriculation number, A12345678B; none: a first look")
    parser.add_argument("--report", type=Path, help=f"PDF, at most {MAX_PAGES} A4 pages; default the run's report.pdf")
    parser.add_argument("--name", help="run to hand in; default the release")
    parser.add_argument("--data", help="folder with train/ and test/; default that of the training, else ./data")
    parser.add_argument("--out", default="build", type=Path, help="folder for the zip")
    args = parser.parse_args()
    weights = register.find_weights(args.name)
    folder, name, data = weights.parent, register.make_name(weights.parent), find_data_of(weights, args.data)
    report, draft = args.report or folder / "report.pdf", folder / "report.html"
    images, submission = data / "test" / "images", folder / "submission-test.zip"
    target = args.out / f"{args.matric or 'report-zip'}.zip"
    check_target(target, ZIP)
    if not report.is_file() and (args.report or args.matric):
        raise UserError(f"no {report}: `make report-pdf NAME={name}` prints the draft of `make report`; or REPORT=FILE")
    if not args.report and draft.is_file() and report.is_file() and draft.stat().st_mtime > report.stat().st_mtime:
        raise UserError(f"{draft} is newer than {report}: print it again, `make report-pdf NAME={name}`")
    if not submission.is_file():
        make_submission(weights, images, "test", submission)
    if not report.is_file():
        if not draft.is_file():
            make_draft(folder, None, None, data)
        report = draft
    pages = f"report of {count_pages(report)} pages" if report != draft else "report.html, to be printed as PDF"
    page = draft.read_text(encoding="utf-8", errors="replace") if not args.report and draft.is_file() else ""
    if args.matric and "________" in page:
        again = f'make report NAME={name} AUTHOR="A. Author" MATRIC={args.matric} OVERWRITE=1'
        raise UserError(f"{draft} has blanks: edit and print it, or `{again}`")
    content = checkpoint.load(weights)
    remedy = f"`make submit NAME={name}` (and VIEWS=) creates a new one"
    sent, views = read_submission(submission, images, content["state_dict"], remedy)
    masks = {name: data for name, data in sent.items() if name.startswith("masks/")}
    known = describe_score(weights, views, data)
    stated = re.search(r"official score\) is (0\.\d+)", page)
    if stated and known.startswith("0.") and abs(float(stated[1]) - float(known[:6])) > 0.0005:
        print_message(f"{draft} states {stated[1]}, but the masks handed in have {known[:6]}: correct it")
    parameters = count_parameters(checkpoint.restore(content, folder))
    versions = ", ".join(f"{name} {v}" for name, v in read_json(folder / "args.json")["versions"].items() if v)
    facts = {"matric": args.matric or "matriculation number: ________", "views": views or "one per image"}
    facts |= {"score": known, "parameters": f"{parameters:,}", "limit": f"{PARAM_LIMIT:,}", "versions": versions}
    readme = Template(README.read_text(encoding="utf-8")).substitute(facts, report=report.name, count=len(masks))
    files = {report.name: report, "run/args.json": folder / "args.json", "run/metrics.jsonl": folder / "metrics.jsonl"}
    code = (path for pattern in CODE.split() for path in ROOT.glob(pattern) if path.is_file())
    files |= {f"code/{path.relative_to(ROOT)}": path for path in code}
    entries = masks | {name: path.read_bytes() for name, path in files.items()}
    entries |= {"Readme.txt": readme.encode(), "checkpoint/ckpt.pth": sent["solution/ckpt.pth"]}
    make_folder(args.out)
    with atomic(target) as temporary:
        write_zip(temporary, entries)
    print(f"{target}: {pages}, {len(masks)} masks, {len(files)} other files")
    if not args.matric:
        remedy = f"`make report-pdf NAME={name}`, and `make report-zip NAME={name} MATRIC=A12345678B`"
        blanks = "author, matriculation number and " * ("________" in page or not page)
        print(f"to hand in: fill in {blanks}your own text in {draft}, then {remedy}")


if __name__ == "__main__":
    run_main(main)
