"""package.py, solution.py and check_submission.py: a packed zip is sound, and every fault of another is named.

    make test
    python -m pytest checks/test_submission.py

The network is untrained and sees 64 pixels; the three images are noise.
"""

import contextlib
import io
import pickle
import stat
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import check_submission
import checkpoint
import package
from check_submission import judge
from errors import UserError, run_main
from labels import PALETTE
from model import build
from parameters import PARAM_LIMIT
from predict import mask_of
from views import parse_views


@contextlib.contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with three images, a half-precision checkpoint whose masks vary, and the zip packed of them."""
    root = tmp_path_factory.mktemp("submission")
    (root / "images").mkdir()
    for seed, name in enumerate("abc"):
        grid = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(grid).resize((512, 512), Image.Resampling.BICUBIC).save(root / "images" / f"{name}.jpg")
    torch.manual_seed(0)
    model = build("microsegformer")
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    checkpoint.save(
        root / "best.pt",
        {
            "model": "microsegformer", "model_args": {}, "size": 64, "epoch": 1,
            "state_dict": {k: t.half() if t.is_floating_point() else t for k, t in model.state_dict().items()},
        },
    )  # fmt: skip
    assert package.make_submission(root / "best.pt", root / "images", "test", root / "sound.zip", "flip", run=1) == 0
    return root


@pytest.fixture(scope="module")
def sound(place):
    """The packed zip's contents, {name: bytes}."""
    with zipfile.ZipFile(place / "sound.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(path, entries):
    package.write_zip(path, entries)
    return path


def failed(findings):
    """Details of all faults as one text."""
    return "\n".join(f"{f.check}: {f.detail}" for f in findings if f.status == "FAIL")


def mask_bytes(labels, mode="P", palette=PALETTE):
    image, file = Image.fromarray(labels), io.BytesIO()
    if palette:
        image.putpalette(palette)
    image.convert(mode).save(file, format="PNG")
    return file.getvalue()


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_packed_masks_are_those_of_predict(place, sound):
    names = {f"masks/{name}.png" for name in "abc"} | {f"solution/{name}" for name in check_submission.FILES}
    assert sound.keys() == names
    model, info = checkpoint.load_model(place / "best.pt")
    for name in "abc":
        with one_thread():
            _, expected = mask_of([model], place / "images" / f"{name}.jpg", info["size"], parse_views("flip"), "cpu")
        with Image.open(io.BytesIO(sound[f"masks/{name}.png"])) as image:
            assert np.array_equal(np.array(image), expected)
        assert len(np.unique(expected)) > 2


def test_packing_again_gives_the_same_bytes_and_dev_holds_masks_alone(place, sound, tmp_path):
    weights, images = place / "best.pt", place / "images"
    assert package.make_submission(weights, images, "test", tmp_path / "again.zip", "flip", run=0) == 0
    assert (tmp_path / "again.zip").read_bytes() == (place / "sound.zip").read_bytes()
    assert package.make_submission(weights, images, "dev", tmp_path / "dev.zip", "flip", run=1) == 0
    with zipfile.ZipFile(tmp_path / "dev.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            name: content for name, content in sound.items() if name.startswith("masks/")
        }


def test_failed_proof_leaves_the_former_zip(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "kept.zip").write_bytes(b"former")
    monkeypatch.setattr(check_submission, "TIME_LIMIT", 0.01)
    assert package.make_submission(place / "best.pt", place / "images", "test", tmp_path / "kept.zip", run=1) == 1
    assert (tmp_path / "kept.zip").read_bytes() == b"former"
    assert "a.jpg: run.py took more than 0.01 s" in capsys.readouterr().out


def test_too_many_parameters_are_not_packed(place, tmp_path):
    arguments = {"widths": (16, 32, 64, 128, 160)}
    content = {"model": "microunet", "model_args": arguments, "size": 64}
    checkpoint.save(tmp_path / "big.pt", {**content, "state_dict": build("microunet", **arguments).state_dict()})
    with pytest.raises(UserError, match="fewer than 1,821,085"):
        package.make_submission(tmp_path / "big.pt", place / "images", "test", tmp_path / "big.zip")
    assert not (tmp_path / "big.zip").exists()


def test_joined_file_holds_what_main_reaches_and_refuses_clashes(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "MODULES", ("low", "high"))
    (tmp_path / "low.py").write_text(
        "import json\nimport os\n\n\ndef run_main(main):\n    main()\n\n\ndef main():\n    print(json)\n\n\n"
        "# why\nWORD = os.sep\n\n\ndef unused():\n    pass\n"
    )
    (tmp_path / "high.py").write_text("from low import WORD, run_main\n\n\ndef main():\n    print(WORD)\n")
    text = package.join_sources(tmp_path)
    assert "import os" in text and "# why\nWORD" in text
    assert "json" not in text and "unused" not in text and "from low" not in text
    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert ran.stdout == "/\n", ran.stderr
    (tmp_path / "high.py").write_text("from low import run_main\n\nWORD = 1\n\n\ndef main():\n    print(WORD)\n")
    with pytest.raises(ValueError, match="two of the joined modules: WORD"):
        package.join_sources(tmp_path)


LABELS = np.zeros((512, 512), np.uint8)
FAULTS = {
    "members: ../masks/a.png leads out": lambda z: z | {"../masks/a.png": b""},
    "members: /masks/a.png has an absolute path": lambda z: z | {"/masks/a.png": b""},
    "folders: all lies one folder too deep, in mine/": lambda z: {f"mine/{k}": v for k, v in z.items()},
    "folders: no folder solution/": lambda z: {k: v for k, v in z.items() if k.startswith("masks/")},
    "folders: folder code/ does not belong": lambda z: z | {"code/a.py": b""},
    "folders: a.png lies at the top": lambda z: z | {"a.png": b""},
    "names: masks/b.png is missing": lambda z: {k: v for k, v in z.items() if k != "masks/b.png"},
    "names: masks/d.png belongs to no image": lambda z: z | {"masks/d.png": z["masks/a.png"]},
    "masks: masks/a.png is of mode RGB": lambda z: z | {"masks/a.png": mask_bytes(LABELS, "RGB")},
    "masks: masks/a.png is of mode L": lambda z: z | {"masks/a.png": mask_bytes(LABELS, "L", None)},
    "masks: masks/a.png is 256 x 256, its image 512 x 512": lambda z: (
        z | {"masks/a.png": mask_bytes(LABELS[:256, :256])}
    ),
    "masks: masks/a.png holds label 19": lambda z: z | {"masks/a.png": mask_bytes(LABELS + 19)},
    "masks: masks/a.png has another palette": lambda z: (
        z | {"masks/a.png": mask_bytes(LABELS + 2, palette=PALETTE[::-1])}
    ),
    "masks: masks/a.png is no readable PNG": lambda z: z | {"masks/a.png": z["masks/a.png"][:200]},
    "solution: solution/run.py is missing": lambda z: {k: v for k, v in z.items() if k != "solution/run.py"},
    "checkpoint: ckpt.pth is damaged": lambda z: z | {"solution/ckpt.pth": z["solution/ckpt.pth"][:-9999]},
    'checkpoint: ckpt.pth has no "state_dict"': lambda z: z | {"solution/ckpt.pth": saved({"weights": {}})},
    "checkpoint: its state_dict does not load": lambda z: (
        z | {"solution/ckpt.pth": saved({"model": "microunet", "model_args": {}, "state_dict": {"a": torch.zeros(1)}})}
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_nothing_else(place, sound, tmp_path, fault):
    text = failed(judge(packed(tmp_path / "bad.zip", FAULTS[fault](sound)), place / "images", "test"))
    assert text.startswith(fault) and "\n" not in text


@pytest.mark.parametrize("count, fine", [(PARAM_LIMIT - 1, True), (PARAM_LIMIT, False)])
def test_foreign_parameters_are_counted_without_buffers(place, sound, tmp_path, count, fine):
    for more in ({}, {"model": "another", "model_args": {}}, {"model": {"w": 1}, "model_args": 0}):
        state = {"w": torch.zeros(count), "bn.running_mean": torch.zeros(9), "bn.num_batches_tracked": torch.tensor(0)}
        entries = sound | {"solution/ckpt.pth": saved({"state_dict": state, **more})}
        text = failed(judge(packed(tmp_path / "foreign.zip", entries), place / "images", "test"))
        assert text == "" if fine else text.startswith("parameters: 1,821,085 (counted by name")


def test_code_in_a_checkpoint_is_not_executed(place, sound, tmp_path):
    marker = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return open, (str(marker), "w")

    for content in (saved({"state_dict": Hostile()}), pickle.dumps({"state_dict": Hostile()})):
        entries = sound | {"solution/ckpt.pth": content}
        text = failed(judge(packed(tmp_path / "code.zip", entries), place / "images", "test"))
        assert text.startswith("checkpoint: ckpt.pth is damaged or holds more than plain tensors")
        assert not marker.exists()


def test_links_duplicates_bombs_and_macos_files(place, sound, tmp_path):
    path = packed(tmp_path / "odd.zip", sound | {"__MACOSX/masks/._a.png": b"x"})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        link = zipfile.ZipInfo("solution/link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("masks/a.png", sound["masks/a.png"])
    findings = judge(path, place / "images", "test")
    link, twin = "members: solution/link is a link or device, not a file", "members: masks/a.png is there twice"
    assert failed(findings) == f"{link}\n{twin}"
    assert any(f.status == "note" and "__MACOSX" in f.detail for f in findings)

    path = packed(tmp_path / "bomb.zip", sound | {"solution/zeros": bytes(2**26)})
    assert "members: solution/zeros claims to grow" in failed(judge(path, place / "images", "test"))
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 2**26), struct.pack("<I", 999)))
    assert "run: solution/zeros cannot be unpacked: " in failed(judge(path, place / "images", "test", run=1))


def test_run_py_is_alone_and_its_masks_are_compared(place, sound, tmp_path):
    copy = b"import sys, shutil, pathlib\nname = pathlib.Path(sys.argv[2]).stem\nshutil.copy(name, sys.argv[4])\n"
    given = {f"solution/{name}": sound[f"masks/{name}.png"] for name in "abc"}
    labels = np.array(Image.open(io.BytesIO(sound["masks/c.png"])))
    labels[3, :7] = (labels[3, :7] + 1) % 19
    given["solution/c"] = mask_bytes(labels)
    path = packed(tmp_path / "copy.zip", sound | given | {"solution/run.py": copy})
    assert failed(judge(path, place / "images", "test")) == ""
    assert failed(judge(path, place / "images", "test", run=1)) == ""
    expected = "run: c.jpg: run.py and masks/ differ in 7 of 262,144 pixels"
    assert failed(judge(path, place / "images", "test", run=2)) == expected
    path = packed(tmp_path / "leans.zip", sound | {"solution/run.py": b"import labels\n"})
    text = failed(judge(path, place / "images", "test", run=1))
    assert "ended with status 1: ModuleNotFoundError: No module named 'labels'" in text


@pytest.mark.parametrize("content, status", [(None, 2), (b"no zip", 2), ("sound", 0), ("short", 1)])
def test_exit_status(place, tmp_path, monkeypatch, capsys, content, status):
    path = tmp_path / "a.zip"
    whole = (place / "sound.zip").read_bytes()
    if content == "short":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("masks/a.png", b"")
    elif content:
        path.write_bytes(whole if content == "sound" else content)
    monkeypatch.setattr(sys, "argv", ["x", "--zip", str(path), "--images", str(place / "images")])
    with pytest.raises(SystemExit) as ended:
        run_main(check_submission.main)
    assert ended.value.code == status
    assert ("error: " in capsys.readouterr().err) is (status == 2)
