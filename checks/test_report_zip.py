"""report_zip.py: pages are counted in every kind of PDF, and Readme.txt says what the run's files say.

make test
python -m pytest checks/test_report_zip.py
"""

import io
import json
import re
import shlex
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import package
import report_zip
from errors import UserError, run_main
from images import read_mask
from model import build

CATALOG = b"<< /Type /Catalog /Pages 2 0 R >>"


def page_tree(count):
    """{number: bytes} of the objects of a PDF of `count` pages, in two branches of one leaf and the others."""
    kids = b" ".join(b"%d 0 R" % (10 + i) for i in range(1, count))
    tree = {
        1: CATALOG,
        10: b"<< /Type /Page /Parent 2 0 R >>",
        2: b"<< /Type /Pages /Kids [10 0 R 3 0 R] /Count %d >>" % count,
    }
    tree[3] = b"<</Type/Pages/Kids[%s]/Count %d/Parent 2 0 R>>" % (kids, count - 1)
    return tree | {10 + i: b"<</Type/Page/Parent 3 0 R>>" for i in range(1, count)}


def plain_pdf(count):
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % item for item in page_tree(count).items())
    # A content stream whose text looks like pages, of a length that only its end tells.
    decoy = b"90 0 obj\n<< /Length 91 0 R >>\nstream\n7 0 obj << /Type /Page >> endobj\nendstream\nendobj\n"
    return b"%PDF-1.4\n" + body + decoy + b"trailer\n<< /Root 1 0 R >>\nstartxref\n0\n%%EOF\n"


def packed_pdf(count, filters=b"/Filter /FlateDecode"):
    """The same tree inside one compressed object stream, as PDF 1.5 writes it."""
    table, content = b"", b""
    for number, body in page_tree(count).items():
        table += b"%d %d " % (number, len(content))
        content += body + b" "
    data = zlib.compress(table + content)
    head = b"<< /Type /ObjStm /N %d /First %d %s /Length %d >>" % (count + 3, len(table), filters, len(data))
    cross = b"60 0 obj\n<< /Type /XRef /Root 1 0 R /Length 0 >>\nstream\n\nendstream\nendobj\n"
    return b"%PDF-1.5\n50 0 obj\n" + head + b"\nstream\n" + data + b"\nendstream\nendobj\n" + cross + b"%%EOF\n"


@pytest.mark.parametrize("make", [plain_pdf, packed_pdf])
@pytest.mark.parametrize("count", [2, 5, 6])
def test_pages_are_counted(tmp_path, make, count):
    (tmp_path / "report.pdf").write_bytes(make(count))
    assert report_zip.count_pages(tmp_path / "report.pdf") == count


def test_pages_removed_by_a_later_revision_do_not_count(tmp_path):
    revision = b"2 0 obj\n<< /Type /Pages /Kids [10 0 R] /Count 1 >>\nendobj\ntrailer\n<< /Root 1 0 R >>\n%%EOF\n"
    (tmp_path / "report.pdf").write_bytes(plain_pdf(6) + revision)
    assert report_zip.count_pages(tmp_path / "report.pdf") == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read the report"),
        (b"PK\x03\x04 a document", "is no PDF"),
        (b"%PDF-1.4\n", "cannot count the pages"),
        (plain_pdf(3).replace(b"10 0 obj", b"99 0 obj"), "cannot count the pages"),
        (plain_pdf(3).replace(b"[10 0 R 3 0 R]", b"[10 0 R 2 0 R]"), "cannot count the pages"),
        (packed_pdf(3, b"/Filter /LZWDecode"), "cannot count the pages"),
        (packed_pdf(3)[:200], "cannot count the pages"),
    ],
)
def test_reports_that_cannot_be_counted_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "report.pdf").write_bytes(content)
    with pytest.raises(UserError, match=message):
        report_zip.count_pages(tmp_path / "report.pdf")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run, two test images and the run's proven Codabench zip."""
    root = tmp_path_factory.mktemp("course")
    run, images = root / "runs" / "a", root / "data" / "test" / "images"
    run.mkdir(parents=True)
    images.mkdir(parents=True)
    for seed, name in enumerate("ab"):
        grid = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(grid).resize((512, 512)).save(images / f"{name}.jpg")
    torch.manual_seed(0)
    model = build("microsegformer")
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    content = {"model": "microsegformer", "model_args": {}, "size": 64, "state_dict": model.state_dict()}
    checkpoint.save(run / "best.pt", content)
    record = {"command": ["/x/train.py", "--name", "a", "--lr", "8e-4"], "commit": "c0ffee", "args": {}}
    record["versions"] = {"python": "3.11.9", "torch": "2.13.0", "numpy": "2.4.6", "pillow": "13.0.0"}
    (run / "args.json").write_text(json.dumps(record))
    lines = [
        {"epoch": 1, "official": 0.61234, "batch32": 0.5},
        {"epoch": 2, "official": 0.71236, "batch32": 0.60004},
        {"epoch": 3},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert package.make_submission(run / "best.pt", images, "test", run / "submission-test.zip", run=0) == 0
    (root / "report.pdf").write_bytes(packed_pdf(5))
    (root / "long.pdf").write_bytes(packed_pdf(6))
    return root


def status(monkeypatch, place, *flags):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["report_zip.py", "--name", "a", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        run_main(report_zip.main)
    return ended.value.code


def test_course_zip_holds_what_is_asked_and_its_readme_reproduces_the_masks(place, tmp_path, monkeypatch):
    assert status(monkeypatch, place, "--matric", "a12345678b", "--report", "report.pdf") == 0
    with zipfile.ZipFile(place / "build" / "A12345678B.zip") as archive:
        archive.extractall(tmp_path)
    with zipfile.ZipFile(place / "runs" / "a" / "submission-test.zip") as archive:
        for name in ("masks/a.png", "masks/b.png"):
            assert (tmp_path / name).read_bytes() == archive.read(name)
        assert (tmp_path / "checkpoint" / "ckpt.pth").read_bytes() == archive.read("solution/ckpt.pth")
    assert (tmp_path / "report.pdf").read_bytes() == packed_pdf(5)
    assert not list(tmp_path.glob("code/runs/*")) and not list(tmp_path.rglob("*.pt"))

    text = (tmp_path / "Readme.txt").read_text()
    assert "Validation F-measure: 0.7124, the official score" in text
    assert "0.6000 by the batch-of-32 formula; epoch 2 of 3" in text
    assert "Parameters: 1,747,923 (" in text
    assert "Python 3.11.9, torch 2.13.0, numpy 2.4.6, pillow 13.0.0" in text
    assert "python train.py --name a --lr 8e-4" in text and "non-commercial" in text
    for named in re.findall(r"^  ([\w/.]+\w)[:,]", text, re.M):
        assert (tmp_path / named).exists(), named
    command = re.search(r"^  python (solution\.py .*)", text, re.M)[1].replace(
        "IMAGES", str(place / "data/test/images")
    )
    subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path / "code", check=True)
    for name in "ab":
        again = read_mask(tmp_path / "masks-again" / f"{name}.png")
        assert np.array_equal(again, read_mask(tmp_path / "masks" / f"{name}.png")) and len(np.unique(again)) > 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--matric", "12345678B", "--report", "report.pdf"), "a letter, eight digits and a letter"),
        (("--matric", "A12345678B", "--report", "long.pdf"), "long.pdf has 6 pages; at most 5"),
        (("--matric", "A12345678B", "--report", "none.pdf"), "cannot read the report none.pdf"),
    ],
)
def test_mistakes_end_with_status_2_and_no_zip(place, tmp_path, monkeypatch, capsys, flags, message):
    assert status(monkeypatch, place, *flags, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_zip_of_other_weights_is_refused(place, tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(place / "runs" / "a" / "submission-test.zip") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    content = torch.load(io.BytesIO(entries["solution/ckpt.pth"]), weights_only=True)
    content["state_dict"]["classifier.bias"][3] += 1
    file = io.BytesIO()
    torch.save(content, file)
    package.write_zip(tmp_path / "stale.zip", entries | {"solution/ckpt.pth": file.getvalue()})
    flags = ("--matric", "A12345678B", "--report", "report.pdf", "--submission", tmp_path / "stale.zip")
    assert status(monkeypatch, place, *flags, "--out", tmp_path / "out") == 2
    assert "holds other weights than" in capsys.readouterr().err
