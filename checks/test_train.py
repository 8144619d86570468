"""Training: what is resumed equals what was never interrupted, several processes equal one, mistakes are told."""

import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

import checkpoint
import distributed
from checks.same import difference
from data import find_pairs, split
from errors import UserError
from images import read_mask
from launch import check_processes
from losses import training_loss
from metrics import confusion, official_score
from options import parse
from predict import mask_of
from rundir import in_force
from synth import make_dataset
from train import set_up, show_run
from train import train as run_training

# Two sizes, both optimisers, EMA, dropout, mixing: everything that has a state or draws a number.
FLAGS = [
    *("--sizes", "32:2,64:1", "--batch", "4", "--optimiser", "muon", "--ema", "0.9", "--augment", "advanced"),
    *("--lr", "1e-3", "--warmup", "1", "--threads", "1", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    make_dataset(root / "data", train=20, dev=0, test=0, workers=1)
    os.symlink(root / "data", root / "again")
    assert "Traceback" not in train(root, "--name", "whole", *FLAGS).stderr  # a page that failed is only told
    return root


def command(place, *args):
    return [sys.executable, "train.py", "--runs", str(place / "runs"), "--data", str(place / "data"),
            "--cache", str(place / "cache"), *map(str, args)]  # fmt: skip


def train(place, *args, ok=True):
    done = subprocess.run(command(place, *args), capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def state(place, name):
    return checkpoint.load(place / "runs" / name / "last.pt")


def metrics(place, name, *keys):
    lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[key] for key in keys] for line in lines]


def test_a_training_leaves_the_page_of_its_run(place):
    page = (place / "runs/index.html").read_text()
    section = page[page.index('id="run:whole"') :]
    assert 'http-equiv="refresh"' not in page and "Unreadable" not in page
    assert section.count("<figure>") == len(split(20)[1]) and 'class="line training"' in section
    assert all(len(row) == 2 for row in metrics(place, "whole", "official", "train_official"))


def test_a_page_that_fails_is_told_and_stops_no_training(tmp_path, monkeypatch, capsys):
    run = types.SimpleNamespace(folder=tmp_path / "none" / "a", device=None)
    show_run(run)
    assert capsys.readouterr().err.startswith(f"{tmp_path}/none/index.html: no folder")
    monkeypatch.setattr("train.write_page", lambda runs: 1 / 0)
    show_run(run)
    assert "ZeroDivisionError" in capsys.readouterr().err


def start_and_signal(place, name, number, *flags):
    """Start a run that saves at every step, send the signal as soon as it has saved, and wait for its end."""
    process = subprocess.Popen(
        command(place, "--name", name, *FLAGS, "--save-minutes", 0, *flags), stdout=subprocess.PIPE, text=True
    )
    begun, saved = (place / "runs" / name / file for file in ("args.json", "last.pt"))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if begun.exists() and saved.stat().st_mtime_ns > begun.stat().st_mtime_ns:
            break
        time.sleep(0.005)
    process.send_signal(number)
    return process, process.communicate(timeout=60)[0]


def same_run(place, name):
    assert difference(place / "runs" / name, place / "runs/whole") == ""


def test_killed_and_resumed_equals_uninterrupted(place):
    process, _ = start_and_signal(place, "killed", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert state(place, "killed")["progress"]["epoch"] < 3
    train(place, "--resume", "killed")
    same_run(place, "killed")


def test_ctrl_c_saves_and_tells_how_to_go_on(place):
    process, out = start_and_signal(place, "stopped", signal.SIGINT)
    assert process.returncode == 130 and out.splitlines()[-1].endswith(f"make resume NAME={place}/runs/stopped")
    train(place, "--resume", "stopped")
    same_run(place, "stopped")


def test_two_processes_equal_one(place):
    flags = [*FLAGS, "--model", "microunet", "--dropout", "0", "--sizes", "64:2"]
    train(place, "--name", "one", *flags)
    done = subprocess.run(
        [sys.executable, "launch.py", "--nproc", "2", *command(place, "--name", "two", *flags)[2:]],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (torch.tensor(metrics(place, name, "loss", "val_loss")) for name in ("one", "two"))
    assert torch.allclose(one, two, rtol=1e-2) and not torch.equal(one[0], one[1])
    assert torch.allclose(one[0], two[0], rtol=1e-3)  # before rounding has had time to grow


def test_score_of_training_is_the_score_of_the_predicted_masks(place):
    model, info = checkpoint.load_model(place / "runs/whole/best.pt")
    confusions = []
    for index in split(20)[1]:
        image, mask = find_pairs(place / "data")[index]
        predicted = mask_of([model], image, info["size"], (False, (1.0,)), torch.device("cpu"))[1]
        confusions.append(confusion(predicted, read_mask(mask)))
    assert official_score(np.stack(confusions)) == pytest.approx(info["official"], abs=1e-4)


def test_new_run_from_another_s_weights(place):
    train(place, "--name", "from", "--from", "whole", *FLAGS, "--sizes", "32:1", "--lr", "1e-9", "--ema", "0")
    started, given = state(place, "from")["state_dict"], checkpoint.load(place / "runs/whole/best.pt")["state_dict"]
    assert torch.allclose(started["classifier.weight"], given["classifier.weight"], atol=1e-5)


def test_bf16_autocast_trains(place):
    train(place, "--name", "bf16", *FLAGS, "--sizes", "32:1", "--amp", "bf16")
    assert metrics(place, "bf16", "loss")[0][0] == pytest.approx(metrics(place, "whole", "loss")[0][0], rel=0.05)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--name", "whole"], "exists"),
        (["--name", "../x"], "plain folder name"),
        (["--resume", "nobody"], "no run nobody"),
        (["--resume", "whole", "--dropout", "0.5"], "--dropout 0.5 differs"),
        (["--resume", "whole", "--model", "microunet"], "--model microunet differs"),
        (["--name", "x", "--recipe", "nothing"], "no recipe"),
        (["--name", "x", "--lr", "-1"], "--lr -1"),
        (["--name", "x", "--sizes", "100"], "--sizes 100"),
        (["--name", "x", "--from", "nobody"], "no run nobody"),
        (["--name", "x", "--model", "microunet", "--from", "whole"], "give MODEL=microsegformer"),
        (["--name", "x", "--data", "nowhere"], "no data folder nowhere"),
        (["--name", "x", "--model-args", "{"], "not JSON"),
        (["--name", "x", "--mixup", "2"], "probability"),
        (["--name", "x", "--ce", "0", "--dice", "0"], "no loss"),
        (["--name", "x", "--val-split", "0.001"], "--val-split"),
        (["--name", "x", "--val-split", "0", "--target", "0.8"], "--target is a score"),
        (["--name", "x", "--patience", "3", "--val-every", "4"], "before its first score"),
        (["--name", "x", "--model", "microsegformer", "--dropout", "0.8"], "dropout below 0.8"),
    ],
)
def test_mistakes_are_told_and_leave_no_run(place, args, told):
    with pytest.raises(UserError, match=re.escape(told)):
        set_up(in_force(*parse(command(place, *args)[2:])))
    assert not (place / "runs/x").exists()


def test_a_mistake_is_one_line_and_status_2(place):
    done = train(place, "--name", "whole", ok=False)
    assert done.returncode == 2 and "exists" in done.stderr and done.stderr.count("\n") == 1


def test_processes_without_a_gpu_each_are_refused():
    for device in ("mps", "cuda", "cuda:1"):
        with pytest.raises(UserError, match="NPROC=1"):
            check_processes(torch.cuda.device_count() + 2, device)
    check_processes(2, "cpu")


def test_a_first_process_that_does_not_come_is_not_awaited_for_ever(monkeypatch):
    monkeypatch.setattr(distributed, "MEET", 0.3)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as first:
        monkeypatch.setenv("MASTER_PORT", str(first.getsockname()[1]))
        assert distributed.first_is_there()
    assert not distributed.first_is_there()


def test_a_mistake_of_several_processes_is_told_once(place):
    done = subprocess.run(
        [sys.executable, "launch.py", "--nproc", "2", *command(place, "--name", "whole", *FLAGS)[2:]],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "exists" in done.stderr and done.stderr.count("\n") == 1


def test_full_disk_is_told_and_leaves_no_torn_checkpoint(place):
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({8 << 20}, {8 << 20}));"
    script = f"{limit} import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script, *command(place, "--name", "full", *FLAGS)[1:]], capture_output=True, text=True
    )
    assert done.returncode == 2 and "cannot write" in done.stderr and done.stderr.count("\n") == 1
    left = {path.name for path in (place / "runs/full").iterdir()}
    assert left <= {".lock", "args.json", "metrics.jsonl", "best.pt", "best.json"}


def test_unknown_flag_is_an_error(place):
    done = train(place, "--dcie", "2", ok=False)
    assert done.returncode == 2 and "--dcie" in done.stderr


def test_loss_that_is_no_number_stops_and_keeps_the_last_save(place, monkeypatch):
    t = set_up(in_force(*parse(command(place, "--name", "nan", *FLAGS, "--save-minutes", "0")[2:])))
    calls = iter([1.0, 1.0, float("nan")])
    real = training_loss
    monkeypatch.setattr("train.training_loss", lambda *args, **more: real(*args, **more) * next(calls))
    with pytest.raises(UserError, match="loss is nan in epoch 1, step 3"):
        run_training(t)
    kept = state(place, "nan")
    assert kept["progress"]["step"] == 2 and all(v.isfinite().all() for v in kept["state_dict"].values())
    assert not (place / "runs/nan/best.pt").exists()


def test_second_training_of_a_name_is_refused(place):
    process, _ = (
        subprocess.Popen(command(place, "--name", "busy", *FLAGS, "--sizes", "64:50"), stdout=subprocess.PIPE),
        None,
    )
    try:
        while not (place / "runs/busy/args.json").exists() and process.poll() is None:
            time.sleep(0.01)
        done = train(place, "--resume", "busy", ok=False)
        assert done.returncode == 2 and "another training" in done.stderr
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_batch_norm_over_processes_is_that_of_torch_where_there_is_one(tmp_path, dtype, tolerance):
    norm = torch.nn.BatchNorm2d(8)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    ours = distributed.synchronise_batch_norm(copy.deepcopy(norm))
    x = (3 * torch.randn(4, 8, 16, 16) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    slope = torch.randn_like(x)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        results = []
        for module in (norm, ours):
            source = x.clone().requires_grad_()
            y = module(source)
            y.backward(slope)
            results.append([y, source.grad, module.weight.grad, module.bias.grad, *module.state_dict().values()])
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
