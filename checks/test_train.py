"""Training: schedules by hand, a resumed run equals an uninterrupted one, processes equal one, refusals."""

import json
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

from common import UserError

import pytest
import torch

import checkpoint
import evaluate
import register
import train
from checks.references import difference, metrics
from data import load_pairs
from losses import training_loss
from options import load_recipes, parse
from tools.synth import make_dataset
from train import learning_rate

# Two sizes, Muon, EMA, dropout, mixing: everything that has a state or draws random numbers.
FLAGS = "--sizes=32:2,64:1 --batch=2 --optimiser=muon --ema=0.9 --augment=advanced --lr=1e-3 --warmup=1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/ and a finished training runs/whole."""
    root = tmp_path_factory.mktemp("training")
    make_dataset(root / "data", train=12, dev=0, test=0, workers=1)
    train_here(root, f"--name=whole {FLAGS}")
    return root


def full(place, flags):
    return f"--runs={place}/runs --data={place}/data --cache={place}/cache --device=cpu --threads=1 {flags}".split()


def start(place, flags, launcher="", **settings):
    command = [sys.executable, *launcher.split(), "train.py", *full(place, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def set_up(place, flags):
    run = train.Training(train.resumed_args(*parse(full(place, flags))))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return run


def train_here(place, flags):
    """Train in this process, which saves the start of another."""
    train.train(set_up(place, flags))
    register._locks.clear()


def values(place, name, *keys):
    return torch.tensor([[line[key] for key in keys] for line in metrics(place / "runs" / name)])


def rates(epochs, phases, schedule="cosine", warmup=2):
    args = SimpleNamespace(lr=1.0, schedule=schedule, warmup=warmup, restart_period=4, restart_growth=2)
    return [pytest.approx(learning_rate(args, phases, epoch), abs=1e-3) for epoch in epochs]


def test_learning_rates_by_hand():
    assert rates([1, 2, 6, 10], [(64, 10)]) == [0.5, 1, 0.5, 0]
    # After the warm-up, 6 epochs at 64 pixels cost as much as 1.5 epochs at 128: half of the way.
    assert rates([8], [(64, 8), (128, 1.5)]) == [0.5]
    assert rates([2, 4, 5.999, 6, 10, 13.999, 14], [(64, 30)], "restarts") == [1, 0.5, 0, 0, 0.5, 0, 0]
    assert rates([29], [(64, 30)], "constant") == [1]
    assert rates([0.5, 1, 2], [(64, 2)], warmup=5) == [0.5, 1, 0]  # at most half of the run


@pytest.mark.parametrize("name", sorted(load_recipes()))
def test_recipe_parses_and_flags_override_it(name):
    args, given = parse([f"--recipe={name}", "--lr=0.5"])
    assert args.lr == 0.5 and {"lr", "recipe"} <= given


def test_arguments_of_a_recipes_network_are_kept_for_that_network_only():
    narrow = json.loads(parse(["--recipe=search"])[0].model_args)
    assert narrow["widths"][0] == 16
    for flags, expected in [
        (["--model-args={}"], narrow),
        (["--model=microunet", '--model-args={"attention": 0}'], narrow | {"attention": 0}),
        (["--model=microsegformer"], {}),
    ]:
        assert json.loads(parse(["--recipe=search", *flags])[0].model_args) == expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(place, number):
    folder = place / "runs" / number.name
    started, saved = folder / "args.json", folder / "last.pt"
    process = start(place, f"--name={number.name} --save-minutes=0 {FLAGS}")
    while process.poll() is None and not (started.exists() and saved.stat().st_mtime_ns > started.stat().st_mtime_ns):
        time.sleep(0.005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert number == signal.SIGKILL or "make resume" in output
    assert checkpoint.load(saved)["progress"]["epoch"] < 3
    train_here(place, f"--resume={number.name}")
    assert difference(folder, place / "runs/whole") == ""


def test_second_ctrl_c_ends_at_once_but_no_repeat_of_the_first():
    script = "import train, time; train.catch_signals(); print(flush=True); time.sleep(60)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        for stream in (process.stdout, process.stderr):  # once it is ready, and once the first signal is reported
            stream.readline()
            process.send_signal(signal.SIGINT)
        time.sleep(2.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130


def test_two_processes_equal_one(place):
    flags = f"{FLAGS} --no-lmsa --dropout=0 --batch=4 --sizes=32:2 --optimiser=adamw"
    train_here(place, f"--name=one {flags}")
    process = start(place, f"--name=two {flags}", "-m torch.distributed.run --standalone --nproc-per-node=2")
    _, error = process.communicate()
    assert process.returncode == 0, error
    one, two = (values(place, name, "loss", "val_loss") for name in ("one", "two"))
    assert torch.allclose(one, two, rtol=1e-3)


def test_processes_without_a_gpu_each_are_refused():
    with pytest.raises(UserError, match="NPROC=2"):
        train.start_processes(parse(["--nproc=2", "--device=cpu"])[0])


def test_evaluation_equals_the_score_of_training(place, monkeypatch, capsys):
    run, command = f"{place}/runs/whole", "evaluate.py --weights={0} --cache={1}/cache --device=cpu --threads=1"
    monkeypatch.setattr("sys.argv", command.format(run, place).split())
    evaluate.main()
    official = max(line["official"] for line in metrics(place / "runs/whole"))
    assert f"official score {official:.4f}" in capsys.readouterr().out


def test_run_from_weights_starts_with_them(place):
    train_here(place, "--name=from --from=whole --sizes=32:1 --batch=4 --lr=1e-12")
    new, old = (checkpoint.load(place / f"runs/{name}/best.pt")["state_dict"] for name in ("from", "whole"))
    assert torch.allclose(new["classifier.weight"], old["classifier.weight"], atol=1e-6)


def test_last_epoch_keeps_a_fraction_of_the_first_weights(place):
    train_here(place, "--name=kept --from=whole --keep=0.25 --sizes=32:1 --batch=4 --ema=0.9 --lr=1e-2")
    names = "whole/best.pt", "kept/best.pt", "kept/last.pt"
    first, best, last = (torch.load(place / "runs" / name) for name in names)
    for name, value in best["state_dict"].items():
        if value.is_floating_point():
            assert torch.allclose(value, 0.25 * first["state_dict"][name] + 0.75 * last["average"][name], atol=1e-6)


def test_bf16_loss_is_close_to_float32(place):
    train_here(place, f"--name=bf16 {FLAGS} --amp=bf16 --sizes=32:1")
    assert torch.allclose(values(place, "bf16", "loss")[0], values(place, "whole", "loss")[0], rtol=0.05)


def test_weights_that_have_seen_the_held_out_pairs_are_refused(place):
    content, pairs = checkpoint.load(place / "runs/whole/best.pt"), load_pairs(place / "data", place / "cache")
    assert sorted(content["trained_on"] + content["held_out"]) == pairs.keys()
    old = {key: value for key, value in content.items() if key != "trained_on"} | {"validated": False}
    for name, changed in (
        ("old", old),
        ("other", content | {"trained_on": ["x"]}),
        ("all", content | {"trained_on": pairs.names, "held_out": []}),
    ):
        checkpoint.save(place / f"{name}.pt", changed)
        if name != "other":
            with pytest.raises(UserError, match="would be too high"):
                set_up(place, f"--name=x --from={place / name}.pt {FLAGS}")
    run = set_up(place, f"--name=after-other --from={place / 'other'}.pt {FLAGS}")
    assert ("x", None) in checkpoint.load(run.folder / "last.pt")["trained_on"]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--name=whole", "exists"),
        ("--name=../x", "plain folder name"),
        ("--name=.x", "plain folder name"),
        ("--name=x --amp=fp16", "fp16"),
        ("--name=x --threads=-1", "--threads -1"),
        ("--name=x --recipe=finish --sizes=32:1", "add FROM="),
        ("--name=x --keep=0.5 --sizes=32:1", "add FROM="),
        ("--resume=nobody", "no run nobody"),
        ("--resume=whole --dropout=0.5", "--dropout 0.5 differs"),
        ("--resume=whole --name=x", "--name x differs"),
        ("--name=x --recipe=nothing", "no recipe"),
        ("--name=x --lr=-1", "--lr -1"),
        ("--name=x --dcie=2", "--dcie"),
        ("--name=x --sizes=100", "--sizes 100"),
        ("--name=x --sizes=32:1 --epochs=3", "--epochs"),
        ("--name=x --from=nobody", "no run nobody"),
        ("--name=x --from=whole --split-seed=1", "would be too high"),
        ("--name=x --model=microunet --from=whole", "MODEL=microsegformer"),
        ("--name=x --model=microunet --no-lmsa", "--lmsa"),
        ("--name=x --data=nowhere", "nowhere"),
        ("--name=x --model-args={", "no JSON object"),
        ("--name=x --mixup=0.6 --cutmix=0.6", "--mixup and --cutmix"),
        ("--name=x --class-weights=1,2", "--class-weights"),
        ("--name=x --ce=0 --dice=0", "no loss"),
        ("--name=x --val-split=0.001", "--val-split"),
        ("--name=x --val-split=0 --target=0.8", "--target"),
        ("--name=x --patience=3 --val-every=4", "--patience"),
    ],
)
def test_invalid_arguments_are_refused_and_leave_no_run(place, flags, error):
    with pytest.raises(UserError, match=error):
        set_up(place, flags)
    assert not (place / "runs/x").exists()


def test_full_disk_is_one_line_and_keeps_the_last_save(place):
    limits = (20 << 20,) * 2  # last.pt is smaller before the first step and larger after it
    process = start(place, f"--name=full {FLAGS}", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    _, error = process.communicate()
    assert process.returncode == 2 and "cannot write" in error and error.count("\n") == 1
    assert checkpoint.load(place / "runs/full/last.pt")["progress"]["step"] == 0
    assert not list((place / "runs/full").glob(".*.tmp"))


def test_loss_that_is_nan_stops_and_keeps_the_last_save(place, monkeypatch):
    factors = iter([1.0, 1.0, float("nan")])
    monkeypatch.setattr("train.training_loss", lambda *args, **more: training_loss(*args, **more) * next(factors))
    with pytest.raises(UserError, match="nan in epoch 1, step 3"):
        train_here(place, f"--name=nan {FLAGS} --save-minutes=0")
    saved = checkpoint.load(place / "runs/nan/last.pt")
    assert saved["progress"]["step"] == 2 and all(v.isfinite().all() for v in saved["state_dict"].values())


def test_second_training_of_a_run_is_refused(place):
    run = set_up(place, f"--name=busy {FLAGS}")
    assert register.is_running(run.folder)
    with pytest.raises(UserError, match="another training"):
        set_up(place, "--resume=busy")
