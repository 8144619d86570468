"""The ONNX file gives torch's labels and says what they are; the release is the run in half precision."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import register
from checks.conftest import cases, untrained, write
from checks.references import TINY
from tools import export


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoint of an untrained network: its folder."""
    folder = write({"args.json": b"{}", "metrics.jsonl": b"{}"}, tmp_path / "runs" / "a")
    untrained(folder / "best.pt")
    return folder


@cases(("arguments", "logits"), [(["microsegformer"], True), (["microunet", TINY], False)])
def test_onnx_file_gives_the_labels_of_torch_or_is_not_written(
    run, tmp_path, monkeypatch, command, refused, arguments, logits
):
    onnx = pytest.importorskip("onnx")
    untrained(run / "best.pt", *arguments, size=128)
    path, other = tmp_path / "parser.onnx", tmp_path / "other.onnx"
    flags = export.main, "--name", run, f"--logits={int(logits)}", "--out"
    status, out, _ = command(*flags, path)
    assert status == 0 and "of pixels of astronaut.jpg have torch's label" in out
    model = onnx.load(path)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["labels"])[17] == "neck" and "uint8 RGB" in facts["input"] and "128 x 128" in facts["input"]
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert [output.name for output in model.graph.output] == ["logits" if logits else "labels"]
    untrained(run / "best.pt", *arguments, size=128)  # of which this file is none
    monkeypatch.setattr(export, "convert", lambda *_: SimpleNamespace(save=partial(shutil.copy, path)))
    assert "nothing written" in refused(*flags, other) and not other.exists()


def test_missing_packages_and_flags_are_one_line(run, tmp_path, monkeypatch, refused):
    assert "OUT=parser.onnx" in refused(export.main, "--name", run)
    monkeypatch.setattr(export, "PACKAGES", ("onnx_that_is_missing",))
    error = refused(export.main, "--name", run, "--out", tmp_path / "a.onnx")
    assert "that_is_missing not installed: " in error and "-m pip install -r tools/requirements.txt" in error


def test_release_is_the_run_in_half_precision(run, tmp_path, monkeypatch, command):
    made, flags = tmp_path / "release", (export.main, "--release", "--runs", run.parent, "--name")
    write({"best.json": b"of the previous release"}, made)
    monkeypatch.setattr(register, "RELEASE", made)
    state = checkpoint.load(run / "best.pt")["state_dict"]
    assert command(*flags, "a")[0] == 0
    assert {path.name for path in made.iterdir()} == {"best.pt", "args.json", "metrics.jsonl", "LICENCE.txt"}
    half = checkpoint.load(made / "best.pt")["state_dict"]
    assert {value.dtype for value in half.values()} == {torch.float16, torch.int64}
    assert all(torch.allclose(half[key].float(), value.float(), 1e-3, 1e-7) for key, value in state.items())
    (tmp_path / "all.pt").write_bytes((run / "best.pt").read_bytes())
    again = [made], ["a"], ["a", "--overwrite", "--weights", tmp_path / "all.pt"]
    assert [command(*flags, *more)[0] for more in again] == [2, 2, 0]
    assert (made / "validated.pt").read_bytes() == (made / "best.pt").read_bytes()
