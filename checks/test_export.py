"""The ONNX file gives torch's labels and says what they are; the release is the run in half precision."""

import json
import sys

from common import UserError, run_main

import pytest
import torch

import checkpoint
import register
from model import build
from tools import export
from tools.synth import make_dataset


def exit_status(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        run_main(export.main)
    return ended.value.code or 0


@pytest.fixture
def untrained(tmp_path):
    """A run with the checkpoint of an untrained network: its folder."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    for name in ("args.json", "metrics.jsonl"):
        (folder / name).write_text("{}")
    content = {"model": "microunet", "model_args": {}, "size": 64, "state_dict": build("microunet").state_dict()}
    checkpoint.save(folder / "best.pt", content)
    return folder


@pytest.mark.parametrize(("name", "arguments"), [("microsegformer", {}), ("microunet", {"depths": (1,) * 5})])
def test_onnx_file_gives_the_labels_of_torch(untrained, tmp_path, monkeypatch, capsys, name, arguments):
    onnx = pytest.importorskip("onnx")
    content = {"model": name, "model_args": arguments, "size": 128, "state_dict": build(name, **arguments).state_dict()}
    checkpoint.save(untrained / "best.pt", content)
    path = tmp_path / "parser.onnx"
    assert exit_status(monkeypatch, "--name", untrained, "--out", path) == 0
    assert "of pixels of astronaut.jpg have torch's label" in capsys.readouterr().out
    model = onnx.load(path)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["labels"])[17] == "neck" and "uint8 RGB" in facts["input"] and "128 x 128" in facts["input"]
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert [output.name for output in model.graph.output] == ["labels"]


def test_int8_file_is_a_third_of_the_size(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx")
    make_dataset(tmp_path / "data", train=4, dev=1, test=1)
    path = tmp_path / "parser.onnx"
    assert exit_status(monkeypatch, "--int8", f"--data={tmp_path}/data", f"--out={path}") == 0
    assert path.stat().st_size < 3e6 and "have torch's label" in capsys.readouterr().out


def test_a_file_with_other_labels_is_not_written(untrained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx")
    right = export.convert
    monkeypatch.setattr(export, "convert", lambda model, *rest: right(build("microunet").eval(), *rest))
    assert exit_status(monkeypatch, "--name", untrained, "--out", tmp_path / "parser.onnx") == 2
    assert "nothing written" in capsys.readouterr().err and not (tmp_path / "parser.onnx").exists()


def test_missing_packages_and_flags_are_one_line(untrained, tmp_path, monkeypatch, capsys):
    assert exit_status(monkeypatch, "--name", untrained) == 2 and "OUT=parser.onnx" in capsys.readouterr().err
    monkeypatch.setattr(export, "PACKAGES", ("onnx_that_is_missing",))
    with pytest.raises(UserError, match="_that_is_missing not installed: .* -m pip install -r tools/requirements.txt"):
        export.write_onnx(untrained / "best.pt", tmp_path / "a.onnx")


def test_release_is_the_run_in_half_precision(untrained, tmp_path, monkeypatch):
    made = tmp_path / "release"
    made.mkdir()
    (made / "best.json").write_text("of the previous release")
    monkeypatch.setattr(register, "RELEASE", made)
    state = checkpoint.load(untrained / "best.pt")["state_dict"]
    assert exit_status(monkeypatch, "--release", "--name", "a", "--runs", untrained.parent) == 0
    assert {path.name for path in made.iterdir()} == {"best.pt", "args.json", "metrics.jsonl", "LICENCE.txt"}
    half = checkpoint.load(made / "best.pt")["state_dict"]
    assert {value.dtype for value in half.values()} == {torch.float16, torch.int64}
    assert all(torch.allclose(half[key].float(), value.float(), 1e-3, 1e-7) for key, value in state.items())
    assert exit_status(monkeypatch, "--release", "--name", made) == 2
    (tmp_path / "all.pt").write_bytes((untrained / "best.pt").read_bytes())
    for flags, status in (([], 2), (["--overwrite", "--weights", tmp_path / "all.pt"], 0)):
        assert exit_status(monkeypatch, "--release", "--name", "a", "--runs", untrained.parent, *flags) == status
    assert (made / "validated.pt").read_bytes() == (made / "best.pt").read_bytes()
