"""What the tests share: a random state to repeat, a short training, scripts called in this process, small files."""

import io
import json
import shutil
import sys

from common import run_main  # before torch

import pytest
import torch

import checkpoint
import register
import train
from checks.references import TINY
from model import build
from options import parse
from tools.synth import make_dataset

# Two sizes, Muon, EMA, dropout, mixing: everything that has a state or draws random numbers.
FLAGS = f"--model=microunet --model-args={json.dumps(TINY, separators=(',', ':'))} --sizes=32:2,64:1 --batch=2 "
FLAGS += "--val-split=.3 --optimiser=muon --ema=0.9 --augment=advanced --lr=1e-3 --warmup=1"
cases = pytest.mark.parametrize


def pytest_runtest_setup():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with data/, ten pairs, and a finished training runs/whole; tests add runs, but change nothing."""
    root = tmp_path_factory.mktemp("place")
    make_dataset(root / "data", train=10, dev=1, test=1)
    train_here(root, f"--name=whole {FLAGS}")
    return root


@pytest.fixture
def copy(place, tmp_path):
    """A copy of `place` to attack."""
    for part in ("data", "cache", "runs/whole"):
        shutil.copytree(place / part, tmp_path / part)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Call a script's main with flags: (exit status, stdout, stderr)."""

    def call(main, *flags):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        monkeypatch.setattr("common._printed", float("inf"))  # no progress lines, however long it takes
        with pytest.raises(SystemExit) as ended:
            run_main(main)
        return ended.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def refused(command):
    """Call a script's main with flags that are a mistake, which must be one line and status 2: that line."""

    def call(main, *flags):
        status, _, error = command(main, *flags)
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return call


def full(place, flags):
    """The flags of a training below `place`."""
    usual = "--device=cpu --threads=1 --amp=off"  # auto measures which is faster
    return f"--runs={place}/runs --data={place}/data --cache={place}/cache {usual} {flags}".split()


def set_up(place, flags):
    """The Training of these flags; it catches no signals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.catch_signals", lambda rank: [])
        return train.Training(train.resumed_args(*parse(full(place, flags))))


def train_here(place, flags):
    """Train in this process, which saves the start of another."""
    train.train(set_up(place, flags))
    register._locks.clear()


def untrained(path, model="microunet", arguments=None, size=64, **content):
    """Save a checkpoint of an untrained network."""
    arguments = arguments or {}
    content |= {"model": model, "model_args": arguments, "size": size}
    checkpoint.save(path, content | {"state_dict": build(model, **arguments).state_dict()})


def saved(content):
    """The bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def encoded(image, kind="PNG", **settings):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def write(files, folder):
    """Write {name: bytes} to a folder, which is returned."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder):
    """{name: bytes} of the files in a folder and its subfolders."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
