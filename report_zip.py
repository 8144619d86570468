"""The zip for the course: the report, the masks handed in, all code, the checkpoint and a Readme.txt about them.

python report_zip.py --matric A12345678B --name a                         # build/A12345678B.zip with runs/a/report.pdf
python report_zip.py --matric A12345678B --report report.pdf --out .      # of the release or the best run

Masks and checkpoint are those of the run's Codabench zip (package.py), which is made first where there is none.
"""

import argparse
import contextlib
import io
import re
import shlex
import subprocess
import zipfile
import zlib
from pathlib import Path

import torch

import checkpoint
from atomic import atomic
from check_submission import judge, show
from data import resolve
from errors import ArgumentParser, UserError, matriculation, run_main
from package import make_submission, write_zip
from parameters import PARAM_LIMIT, count_parameters
from rundir import beyond_records, data_of, find_weights, make_name, read_json, read_metrics

HERE = Path(__file__).parent
MAX_PAGES = 5
OBJECT = re.compile(rb"\b(\d{1,9})\s+\d+\s+obj\b")
REFERENCE = re.compile(rb"\b(\d{1,9})\s+\d+\s+R\b")


def pdf_objects(data):
    """({number: bytes} of a PDF's objects, the bytes outside of streams); of an object's versions the last counts.

    Objects inside object streams (ISO 32000-1, section 7.5.7) are unpacked; streams of other filters are passed over.
    """
    objects, outside, at = {}, [], 0
    while found := OBJECT.search(data, at):
        number, start = int(found[1]), found.end()
        end = data.find(b"endobj", start)
        end = len(data) if end < 0 else end
        stream = re.compile(rb">>\s*stream\r?\n").search(data, start, end)
        body = data[start : stream.start() + 2 if stream else end]
        outside += [data[at : found.start()], body]
        objects[number], at = body, end
        if stream:
            # The length may be wrong or stand elsewhere, and the bytes may hold any word: only then is it searched.
            length = re.search(rb"/Length\s+(\d{1,15})\b(?!\s+\d+\s+R)", body)
            close = stream.end() + int(length[1]) if length else -1
            if close < 0 or not data[close : close + 12].lstrip().startswith(b"endstream"):
                close = data.find(b"endstream", stream.end())
            at = close = len(data) if close < 0 else close
            if re.search(rb"/Type\s*/ObjStm\b", body):
                objects |= unpack_objects(body, data[stream.end() : close])
    return objects, b"\n".join([*outside, data[at:]])


def unpack_objects(body, packed):
    """{number: bytes} of one object stream; {} where it is packed in a way not known here."""
    count, first = re.search(rb"/N\s+(\d{1,9})", body), re.search(rb"/First\s+(\d{1,15})", body)
    if not count or not first or re.search(rb"/Predictor\s+(?!1\b)\d", body):
        return {}
    if b"/Filter" in body:
        if re.findall(rb"/\w+Decode\b", body) != [b"/FlateDecode"]:
            return {}
        try:
            packed = zlib.decompressobj().decompress(packed, 2**26)
        except zlib.error:
            return {}
    first = int(first[1])
    numbers = [int(text) for text in re.findall(rb"\d{1,15}", packed[:first])][: 2 * int(count[1])]
    starts = [first + offset for offset in numbers[1::2]]
    return {
        number: packed[start:end]
        for number, start, end in zip(numbers[::2], starts, [*starts[1:], len(packed)], strict=False)
    }


def count_pages(path):
    """Number of pages of a PDF: the leaves of its page tree (ISO 32000-1, section 7.7.3).

    UserError where the file is missing, no PDF, or of a kind whose pages cannot be counted here (encrypted, damaged).
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the report {path}: {error.strerror}") from None
    if b"%PDF-" not in data[:1024]:
        raise UserError(f"{path} is no PDF; export the report as one")
    uncounted = UserError(f"cannot count the pages of {path} (damaged, encrypted or unusual); export it as PDF anew")
    objects, outside = pdf_objects(data)
    roots = re.findall(rb"/Root\s+(\d{1,9})\s+\d+\s+R", outside)
    catalog = objects.get(int(roots[-1]), b"") if roots else b""
    top = re.search(rb"/Pages\s+(\d{1,9})\s+\d+\s+R", catalog)
    waiting, seen, pages = [int(top[1])] if top else [], set(), 0
    while waiting:
        number = waiting.pop()
        node = objects.get(number)
        if node is None or number in seen:
            raise uncounted
        seen.add(number)
        if re.search(rb"/Type\s*/Pages\b", node):
            kids = re.search(rb"/Kids\s*\[(.*?)\]", node, re.S)
            if not kids and (elsewhere := re.search(rb"/Kids\s+(\d{1,9})\s+\d+\s+R", node)):
                kids = re.search(rb"\[(.*?)\]", objects.get(int(elsewhere[1]), b""), re.S)
            if not kids:
                raise uncounted
            waiting += [int(kid) for kid in REFERENCE.findall(kids[1])]
        elif re.search(rb"/Type\s*/Page\b", node):
            pages += 1
        else:
            raise uncounted
    if not pages:
        raise uncounted
    return pages


def code_files():
    """The project's files as sorted paths relative to it: scripts, settings, checks, and whatever else git tracks.

    Runs are left out: the zip holds its checkpoint once.
    """
    patterns = (
        "*.py",
        "*.toml",
        "*.md",
        "*.html",
        "Makefile",
        "LICENSE",
        "requirements.txt",
        "checks/*.py",
        "checks/*.txt",
    )
    files = {path.relative_to(HERE) for pattern in patterns for path in HERE.glob(pattern)}
    with contextlib.suppress(FileNotFoundError):  # no git on this machine
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=HERE, capture_output=True, text=True).stdout
        files |= {Path(name) for name in listed.split("\0") if name}
    return sorted(p for p in files if p.parts[0] != "runs" and p.parts[0][0] != "." and (HERE / p).is_file())


def readme(matric, report, folder, parameters, masks):
    """Readme.txt of the course zip; every figure is read from the run's folder."""
    record, metrics = read_json(folder / "args.json"), read_metrics(folder)
    scored = [line for line in metrics if "official" in line]
    best = max(scored, key=lambda line: line["official"]) if scored else None
    figures = "not measured: trained on all pairs, none held out"
    if best:
        figures = f"""{best["official"]:.4f}, the official score (mean over images of the mean F of the labels present);
  {best["batch32"]:.4f} by the batch-of-32 formula; epoch {best["epoch"]} of {metrics[-1]["epoch"]}"""
    if beyond_records(folder):
        figures += """
  That is the run of run/, which left the validation pairs out; the weights here come from the same training on all"""
    versions = record.get("versions", {})
    libraries = ", ".join(f"{name} {versions.get(name, '?')}" for name in ("torch", "numpy", "pillow"))
    command = shlex.join(["python", "train.py", *record.get("command", ["train.py"])[1:]])
    return f"""Face parsing on CelebAMask-HQ, 19 labels: {matric}

Validation F-measure: {figures}
Parameters: {parameters:,} (fewer than {PARAM_LIMIT:,} are allowed)

What each file is
  {report}: the report
  masks/: the {masks} predicted masks of the test images, PNG of mode P, pixel values are label ids
  checkpoint/ckpt.pth: the network's arguments and weights, its input size and the views averaged
  run/args.json, run/metrics.jsonl: settings and versions of the training, and its scores epoch by epoch
  code/: all code; code/README.md says which script does what
  code/solution.py: from images to masks; code/train.py: the training; code/model.py: the networks

Third-party libraries
  Python {versions.get("python", "?")}, {libraries}: all that training and prediction use

How to reproduce the masks, with the test images in IMAGES (an absolute path)
  cd code
  python -m pip install -r requirements.txt
  python solution.py --input IMAGES --output ../masks-again --weights ../checkpoint/ckpt.pth

How the network was trained (commit {record.get("commit", "unknown")})
  {command}

Data
  The images of CelebAMask-HQ (Lee et al., CVPR 2020) are for non-commercial research only; the same holds for weights
  trained on them and for these masks. None of the images is in this zip but as a figure of the report.
"""


def proven(submission, weights, images):
    """The files {name: bytes} of a Codabench zip that has no fault and holds the weights of a checkpoint.

    UserError for any other zip: masks and weights handed in twice must agree.
    """
    remedy = f"`make submit WEIGHTS={weights}` makes one"
    findings = judge(submission, images, "test")
    if any(finding.status == "FAIL" for finding in findings):
        show(findings)
        raise UserError(f"{submission} has the faults above; {remedy}")
    with zipfile.ZipFile(submission) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    sent = torch.load(io.BytesIO(held["solution/ckpt.pth"]), map_location="cpu", weights_only=True)["state_dict"]
    own = checkpoint.load(weights)["state_dict"]
    if sent.keys() != own.keys() or any(
        sent[name].dtype != own[name].dtype or not torch.equal(sent[name], own[name]) for name in own
    ):
        raise UserError(f"{submission} holds other weights than {weights}; {remedy}")
    return held


def printed_report(folder, matric=None):
    """The run's report.pdf; UserError where it is not printed, older than its draft, or another student's."""
    report, draft = folder / "report.pdf", folder / "report.html"
    name = make_name(folder)
    steps = f"`make report NAME={name} AUTHOR= MATRIC=` drafts it, `make report-pdf NAME={name}` prints it"
    if not report.is_file():
        raise UserError(f"no {report}: {steps}; REPORT= takes any other PDF")
    if draft.is_file() and draft.stat().st_mtime > report.stat().st_mtime:
        raise UserError(f"{draft} is newer than {report}: `make report-pdf NAME={name}` prints it anew")
    named = set(re.findall(r"\b[A-Z][0-9]{8}[A-Z]\b", draft.read_text(encoding="utf-8"))) if draft.is_file() else set()
    if matric and named and matric not in named:
        raise UserError(f"{draft} names {', '.join(sorted(named))}, not {matric}: {steps}")
    return report


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--matric", required=True, type=matriculation, help="matriculation number, as A12345678B")
    parser.add_argument("--report", type=Path, help=f"PDF of at most {MAX_PAGES} pages; default the run's report.pdf")
    parser.add_argument("--name", help="run to hand in; default the release, else the best run")
    parser.add_argument("--data", help="folder with test/images; default ./data, else drawn faces")
    parser.add_argument("--submission", type=Path, help="its Codabench zip; default submission-test.zip beside it")
    parser.add_argument("--out", default="build", type=Path, help="folder for the zip")
    args = parser.parse_args()
    weights = find_weights(args.name)
    folder = weights.parent
    report = args.report or printed_report(folder, args.matric)
    pages = count_pages(report)
    if pages > MAX_PAGES:
        raise UserError(f"{report} has {pages} pages; at most {MAX_PAGES} are allowed")
    for name in ("args.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: choose a trained run with --name")
    images = resolve(data_of(weights, args.data)) / "test" / "images"
    submission = args.submission or folder / "submission-test.zip"
    if not args.submission and not submission.is_file() and make_submission(weights, images, "test", submission):
        return 1
    held = proven(submission, weights, images)

    model, _ = checkpoint.load_model(weights)
    entries = {name: content for name, content in held.items() if name.startswith("masks/") and name.endswith(".png")}
    masks = len(entries)
    text = readme(args.matric, report.name, folder, count_parameters(model), masks)
    entries |= {
        report.name: report.read_bytes(),
        "Readme.txt": text.encode(),
        "checkpoint/ckpt.pth": held["solution/ckpt.pth"],
        "run/args.json": (folder / "args.json").read_bytes(),
        "run/metrics.jsonl": (folder / "metrics.jsonl").read_bytes(),
    }
    entries |= {f"code/{path.as_posix()}": (HERE / path).read_bytes() for path in code_files()}
    target = args.out / f"{args.matric}.zip"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {args.out}: {error.strerror}; see --out") from None
    with atomic(target) as temporary:
        write_zip(temporary, entries)
    print(f"{target}: report of {pages} pages, {masks} masks, {len(entries) - masks} other files")
    return 0


if __name__ == "__main__":
    run_main(main)
