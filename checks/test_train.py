"""Training: rates, single steps and Muon by hand or against torch's optimisers, starts, refusals, faults."""

import copy
import itertools
import json
import math
import pkgutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

from common import UserError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import device
import evaluate
import register
import train
from checks.conftest import FLAGS, cases, set_up, train_here, write
from checks.references import difference, metrics
from options import load_recipes, parse
from train import COEFFICIENTS, Muon, orthogonalise


@pytest.fixture
def start(place):
    """A function that sets up a training, two steps an epoch, with further flags."""
    usual = "--batch=2 --val-split=0.5 --sizes=32:9 --augment=none --warmup=0 --schedule=constant --dropout=0"
    return lambda flags: set_up(place, f"{usual} {'' if 'microunet' in flags else '--no-lmsa'} {flags}")


def take_step(run, epoch=0, step=0):
    """(images, target, status) of a step, always on the same pair."""
    batch = train.load_batch(run, epoch, np.zeros(9, int), step)
    return *batch, train.train_step(run, epoch, step, *batch)


def rates(epochs, phases, schedule="cosine", warmup=2, period=4, growth=2):
    args = SimpleNamespace(lr=1.0, schedule=schedule, warmup=warmup, restart_period=period, restart_growth=growth)
    return [pytest.approx(train.learning_rate(args, phases, epoch), abs=1e-3) for epoch in epochs]


def test_learning_rates_by_hand():
    assert rates([1, 2, 6, 10], [(64, 10)]) == [0.5, 1, 0.5, 0]
    # After the warm-up, 6 epochs at 64 pixels cost as much as 1.5 epochs at 128: half of the way.
    assert rates([8], [(64, 8), (128, 1.5)]) == [0.5]
    assert rates([2, 4, 5.999, 6, 6.001, 10, 13.999, 14], [(64, 30)], "restarts") == [1, 0.5, 0, 0, 1, 0.5, 0, 0]
    assert rates([2.1, 2.101], [(64, 30)], "restarts", 0, 0.7, 1) == [0, 1]  # 3 * 0.7 is rounded
    assert rates([29], [(64, 30)], "constant") == [1]
    assert rates([0.5, 1, 2], [(64, 2)], warmup=5) == [0.5, 1, 0]  # at most half of the run


@cases("name", sorted(load_recipes()))
def test_recipe_parses_and_flags_override_it(name):
    args, given = parse([f"--recipe={name}", "--lr=0.5"])
    assert args.lr == 0.5 and {"lr", "recipe"} <= given


def test_arguments_of_a_recipes_network_are_kept_for_that_network_only():
    narrow = json.loads(parse(["--recipe=search"])[0].model_args)
    assert narrow["widths"][0] == 16
    own = ["--model=microunet", '--model-args={"attention": 0}']
    for flags, expected in [([], narrow), (own, narrow | {"attention": 0}), (["--model=microsegformer"], {})]:
        assert json.loads(parse(["--recipe=search", *flags])[0].model_args) == expected


def test_second_ctrl_c_ends_at_once_but_no_repeat_of_the_first():
    script = "import signal, time, train; signal.signal(signal.SIGUSR1, lambda *_: print(flush=True))\n"
    script += "train.catch_signals(); print(flush=True); time.sleep(60)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        process.stdout.readline()  # it is ready
        process.send_signal(signal.SIGUSR1)  # which other code handles
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert b"SIGINT: stopping after this step" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(2.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130


def test_ema_moves_by_its_decay_which_warms_up(start):
    run = start("--ema=0.2 --lmsa")
    for step, decay in enumerate([0.1, 2 / 11, 0.2]):  # (1 + step) / (10 + step), at most 0.2
        old, _ = copy.deepcopy(run.average.state_dict()), take_step(run, *divmod(step, 2))
        kept, new = run.average.state_dict(), run.model.state_dict()
        for key in (next(iter(kept)), "lmsa.norm.running_mean"):
            assert torch.allclose(kept[key], decay * old[key] + (1 - decay) * new[key], atol=1e-6)


def test_every_group_takes_the_rate_of_the_schedule(start):
    run = start("--optimiser=muon --lr=0.01 --schedule=cosine --warmup=1 --sizes=32:4")
    for step, rate in enumerate([0.5, 1, 0.9330, 0.75, 0.5, 0.25, 0.0670, 0]):  # after the first epoch, half a cosine
        take_step(run, *divmod(step, 2))
        assert [group["lr"] for group in run.optimiser.param_groups] == pytest.approx([0.01 * rate] * 3, abs=1e-6)


@cases("clip", [0, 0.5])
def test_clipping_bounds_the_norm_of_a_step(start, clip):
    run = start(f"--clip={clip} --lr=1 --ce=50")
    run.optimiser, old = torch.optim.SGD(run.model.parameters()), [p.detach().clone() for p in run.model.parameters()]
    norm = float(take_step(run)[2][1])
    moved = sum((p.detach() - v).square().sum() for p, v in zip(run.model.parameters(), old, strict=True))
    assert norm > 2 and float(moved) ** 0.5 == pytest.approx(clip or norm, rel=1e-3)


@cases(("amp", "dtype"), [("bf16", torch.bfloat16), ("off", torch.float32)])
def test_amp_sets_the_precision_inside_the_network(start, amp, dtype):
    run, seen = start(f"--amp={amp}"), []
    run.model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    take_step(run)
    assert seen == [dtype]


@cases("threads", [1, 2])
@cases("dtype", [torch.bfloat16, None])
def test_the_fastest_threads_and_precision_are_kept(monkeypatch, threads, dtype):
    now, args, weight = [2], parse([])[0], torch.ones(1, requires_grad=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    monkeypatch.setattr("device.amp_dtype", lambda amp, device: torch.bfloat16)

    def forward(image, full_size):
        time.sleep(0.03 * (now[-1] != threads) + 0.03 * (torch.is_autocast_enabled("cpu") != bool(dtype)))
        return weight

    model = nn.Identity()
    model.forward = forward
    assert device.choose_speed(args, model, torch.device("cpu"), size=32) is dtype
    assert (now[-1], args.threads, args.amp) == (threads, threads, "bf16" if dtype else "off")


def test_class_weights_are_inverse_roots_of_frequencies_with_mean_1(start):
    run = start("--class-weights=balanced --dice=0 --lr=1e-12")
    frequency = np.bincount(run.pairs.masks[run.batches.indices].ravel(), minlength=19) / 5 / 512**2
    by_hand = frequency.clip(1e-4) ** -0.5 / (frequency @ frequency.clip(1e-4) ** -0.5)
    images, target, status = take_step(run)
    expected = F.cross_entropy(run.model(images), target, torch.tensor(by_hand).float(), reduction="none").mean()
    assert float(status[0]) == pytest.approx(expected.item(), rel=1e-4)


@cases(("flags", "kept"), [("--decay-all", 0.95), ("--no-decay-all", 1), ("--optimiser=muon", 0.95)])
def test_decay_shrinks_biases_and_norms_only_if_asked(start, monkeypatch, flags, kept):
    monkeypatch.setattr("train.training_loss", lambda logits, target, **settings: 0 * logits.sum())
    run = start(f"--lr=0.1 --weight-decay=0.5 {flags}")
    old, _ = [p.detach().clone() for p in run.model.parameters()], take_step(run)
    for p, v in zip(run.model.parameters(), old, strict=True):
        assert torch.allclose(p, v * (0.95 if p.dim() > 1 else kept))


ENDS = [("", [0.2, 0.1, 0.5, 0.5, 0.4], (5, 3)), ("--val-every=3", [0.2, 0.1], (6, 3)), ("--target=.2", [0.2], (1, 1))]
ENDS += [("--val-every=4", [0.1, 0.2, 0.3], (9, 9))]  # the last epoch is always scored


@cases(("flags", "scores", "end"), ENDS)
def test_patience_counts_epochs_since_the_last_gain(start, monkeypatch, flags, scores, end):
    scores = iter(scores)
    monkeypatch.setattr("train.official_score", lambda confusions: next(scores))
    train.train(run := start(f"--patience=2 --sizes=32:8,64:1 {flags}"))
    assert (run.progress["epoch"], run.progress["best_epoch"]) == end
    assert checkpoint.load(run.folder / "best.pt")["size"] == (64 if end[1] == 9 else 32)
    assert start("--no-fix-sides").batches.fix_sides is False


def test_steps_use_the_network_compiled_for_each_size(start, monkeypatch):
    calls = []
    forward = lambda model: lambda *args, **more: calls.append("step") or model(*args, **more)  # noqa: E731
    monkeypatch.setattr("torch.compile", lambda model, **settings: calls.append(settings) or forward(model))
    take_step(start("--no-compile"))
    take_step(start("--compile"))
    assert calls == [{"dynamic": False}, "step"]


@cases("network", ["--no-lmsa", "--model=microunet"])
def test_augmentation_and_dropout_depend_on_seed_epoch_and_step_alone(start, network):
    one, again, other = (start(f"--augment=basic --lr=1e-9 --seed={seed} {network}") for seed in (1, 1, 2))
    images = [take_step(*which)[0] for which in [(one,), (again,), (other,), (one, 1), (one, 0, 1)]]
    assert [torch.equal(images[0], changed) for changed in images[1:]] == [True, False, False, False]
    plain = start(f"--dropout=0.5 --lr=1e-9 {network}")
    assert len({round(float(take_step(plain, *at)[2][0]), 4) for at in ((0, 0), (0, 1), (1, 0))}) == 3


def test_an_epoch_takes_each_training_pair_at_most_once_in_a_new_order(start, monkeypatch):
    run, read = start("--sizes=32:3 --lr=1e-9"), []
    real = run.batches.read
    monkeypatch.setattr(run.batches, "read", lambda places: read.extend(run.batches.indices[places]) or real(places))
    train.train(run)
    epochs = [tuple(read[start : start + 4]) for start in (0, 4, 8)]
    assert [len({*epoch} - {*run.val_indices}) for epoch in epochs] == [4, 4, 4] and len(set(epochs)) == 3
    losses = [line["loss"] for line in metrics(run.folder)]  # of an epoch, not of all so far
    assert max(losses) < 1.2 * min(losses)


@cases("flags", ["--dice-over=all", "--smoothing=0.1", "--focal=2", "--loss-grid=logits", "--no-exchange-sides"])
def test_flags_of_the_loss_and_of_its_target_change_it(start, flags):
    assert take_step(start(f"--flip=1 {flags}"))[2][0] != take_step(start("--flip=1"))[2][0]


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@cases("shape", [(12, 40), (40, 12), (16, 16)])
def test_orthogonalise_equals_the_plain_iteration(shape):
    matrix, (a, b, c) = normal(*shape).double(), COEFFICIENTS
    x = matrix / matrix.norm()
    for _ in range(5):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    result, _ = orthogonalise([matrix.float(), torch.ones(12, 3)])
    assert torch.allclose(result, x.float(), atol=1e-4) and 0.6 < torch.linalg.svdvals(result)[0] < 1.3


@cases("shape", [(4, 2, 3, 3), (4, 18)])
def test_steps_of_muon_by_hand(shape):
    hidden, bias, plain = (nn.Parameter(torch.ones(s)) for s in (shape, (4,), (4,)))
    muon = Muon([{"params": [hidden], "orthogonal": True}, {"params": [bias]}], lr=0.1, weight_decay=0.5)
    adamw, momentum = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.5), 0
    for gradient in (normal(*shape), normal(*shape).roll(1)):
        old, bias.grad, plain.grad, hidden.grad = hidden.detach().clone(), normal(4), normal(4), gradient
        momentum = 0.95 * momentum + 0.05 * gradient
        step = orthogonalise([(0.05 * gradient + 0.95 * momentum).flatten(1)])[0].view(shape)  # Nesterov's
        muon.step()
        adamw.step()
        assert torch.allclose(hidden, 0.95 * old - 0.1 * 0.2 * 18**0.5 * step, atol=1e-4)
    assert torch.equal(bias, plain)


def test_hidden_matrices_alone_take_muons_step():
    hidden = nn.Conv2d(8, 19, 1), nn.Linear(19, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), *hidden, nn.Conv2d(8, 19, 1))
    model.ends = "0", "4"
    groups = train.make_optimiser(model, parse(["--optimiser=muon"])[0], torch.device("cpu")).param_groups
    orthogonal = {id(p): "orthogonal" in group for group in groups for p in group["params"]}
    assert [name for name, p in model.named_parameters() if orthogonal[id(p)]] == ["2.weight", "3.weight"]


def test_evaluation_equals_the_score_of_training(place, command):
    flags = f"--weights={place}/runs/whole", f"--cache={place}/cache", "--device=cpu", "--threads=1"
    official = max(line["official"] for line in metrics(place / "runs/whole"))
    tables = [command(evaluate.main, *flags, *more)[1] for more in ([], ["--views=flip"], ["--size=96"])]
    assert f"official score {official:.4f}" in tables[0] and len(set(tables)) == 3


def test_last_epoch_keeps_a_fraction_of_the_first_weights(place):
    set_up(place, f"--name=kept {FLAGS} --from=whole --keep=0.25 --sizes=32:1 --lr=1e-2 --patience=0")
    register._locks.clear()
    train_here(place, "--resume=kept")
    names = "whole/best.pt", "kept/best.pt", "kept/last.pt"
    first, best, last = (torch.load(place / "runs" / name) for name in names)
    for name, value in best["state_dict"].items():
        if value.is_floating_point():
            assert torch.allclose(value, 0.25 * first["state_dict"][name] + 0.75 * last["average"][name], atol=1e-6)


def test_weights_that_have_seen_the_held_out_pairs_are_refused(place):
    content, path = checkpoint.load(place / "runs/whole/best.pt"), place / "other.pt"
    named = [(name, "other pixels") for name, _ in content["held_out"]]
    for change in {"trained_on": []}, {"trained_on": named, "held_out": []}:
        checkpoint.save(path, content | change)
        with pytest.raises(UserError, match="would be too high"):
            set_up(place, f"--name=x --from={path} {FLAGS}")
    checkpoint.save(path, content | {"trained_on": [("x", "y")]})
    run = set_up(place, f"--name=after-other --from={path} {FLAGS}")
    assert ("x", "y") in run.pair_keys["trained_on"]
    assert len(content["held_out"]) == 3 and sorted(content["trained_on"] + content["held_out"]) == run.pairs.keys()
    register._locks.clear()
    assert ("x", "y") in set_up(place, "--resume=after-other").pair_keys["trained_on"]


MISTAKES = [
    *[("--name=whole --data=nowhere", "exists"), ("--name=a/x", "plain folder name"), ("--name=.x", "plain folder")],
    *[("--name=x --amp=fp16", "fp16"), ("--name=x --threads=-1", "--threads -1"), ("--name=x --dcie=2", "--dcie")],
    *[("--name=x --recipe=finish --sizes=32:1", "add FROM="), ("--name=x --keep=0.5 --sizes=32:1", "add FROM=")],
    *[("--name=x --from=whole --keep=0.5", "--patience"), ("--name=x --recipe=nothing", "no recipe")],
    *[("--resume=nobody", "no run nobody"), ("--resume=whole --dropout=0.5", "--dropout 0.5 differs")],
    *[("--name=x --sizes=100", "--sizes 100"), ("--name=x --sizes=32:1 --epochs=3", "--epochs")],
    *[("--name=x --from=whole", "MODEL=microunet"), ("--name=x --data=nowhere", "nowhere")],
    ("--name=x --model=microunet --from=whole --val-split=.5", "would be too high"),
    ("--name=x --model=microunet --from=whole --val-split=0", "does not fit"),
    *[("--name=x --model=microunet --no-lmsa", "--lmsa"), ("--name=x --ce=0 --dice=0", "no loss")],
    *[("--name=x --val-split=0.001", "--val-split"), ("--name=x --val-split=0 --target=0.8", "--target")],
    *[("--name=x --mixup=0.6 --cutmix=0.6", "--mixup and"), ("--name=x --class-weights=1,2", "--class-weights")],
    ("--name=x --model=microunet --batch=1 --sizes=32:1", "one 32-pixel image"),
    ('--name=x --model=microunet --model-args={"dilations":[65]}', "dilations from 1 to 64"),
    *[("--name=x --lr=nan", "--lr nan"), ("--resume=whole --name=x", "--name x differs")],
    *[("--name=x --sizes=64:x", "--sizes"), ("--name=x --sizes=64:1,96", "--sizes"), ("--model-args=[", "JSON")],
]


@cases(("flags", "error"), MISTAKES)
def test_invalid_arguments_are_refused_and_leave_no_run(place, flags, error):
    with pytest.raises(UserError, match=error):
        set_up(place, flags)
    assert not (place / "runs/x").exists()


def test_processes_need_gpus_and_end_as_the_one_that_failed(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for count, name in ((2, "cpu"), (3, "auto")):
        with pytest.raises(UserError, match=f"NPROC={count}"):
            device.start_processes(count, name)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "orig_argv", ["", "-c", "import os; os._exit(3 * int(os.environ['RANK']))"])
    with pytest.raises(SystemExit, match="3"):
        device.start_processes(2)


SPOILT = {"train.training_loss": "loss nan", "train.nn.utils.clip_grad_norm_": "gradient norm nan"}
SPOILT |= {"evaluate.segmentation_loss": "validation loss is nan"}


@cases("target", SPOILT)
def test_a_training_stopped_by_numbers_that_are_not_finite_can_be_resumed(place, monkeypatch, target):
    real, calls, name = pkgutil.resolve_name(target), itertools.count(1), target.rpartition(".")[2]
    with monkeypatch.context() as context, pytest.raises(UserError, match=f"{SPOILT[target]}.*a lower --lr"):
        context.setattr(target, lambda *args, **more: real(*args, **more) * (math.nan if next(calls) == 3 else 1))
        train_here(place, f"--name={name} {FLAGS} --save-minutes=0")
    register._locks.clear()
    # A killed process leaves what it had not finished, or the line of an epoch that last.pt lacks.
    write({".best.pt.a1b2c3d4.tmp": b""}, place / "runs" / name)
    with open(place / "runs" / name / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 9}\n')
    train_here(place, f"--resume={name}")
    assert difference(place / "runs" / name, place / "runs/whole") == ""


@cases("change", [{"model": ["microunet"]}, {"average": None}, {"optimiser": {"state": {}, "param_groups": []}}])
def test_states_of_other_networks_and_trainings_are_refused(copy, change):
    path = copy / "runs/whole/last.pt"
    checkpoint.save(path, checkpoint.load(path) | change)
    with pytest.raises(UserError, match="last.pt"):
        checkpoint.load_model(path)
        set_up(copy, "--resume=whole")


def test_a_resumed_run_takes_the_scale_of_fp16(copy, monkeypatch):
    path, loaded = copy / "runs/whole/last.pt", []
    checkpoint.save(path, checkpoint.load(path) | {"scaler": {"scale": 4.0}})
    monkeypatch.setattr("torch.amp.GradScaler.load_state_dict", lambda scaler, state: loaded.append(state))
    set_up(copy, "--resume=whole")
    assert loaded == [{"scale": 4.0}]


def test_second_training_of_a_run_is_refused(place):
    run = set_up(place, f"--name=busy {FLAGS}")
    assert register.is_running(run.folder)
    with pytest.raises(UserError, match="another training"):
        set_up(place, "--resume=busy")


def test_attacks_cause_no_loss():
    done = subprocess.run([sys.executable, "-m", "checks.faults", "--short"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
