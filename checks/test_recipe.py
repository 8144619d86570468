"""The training recipe: single steps against values by hand or torch's own optimisers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from options import parse
from tools.synth import make_dataset


@pytest.fixture
def start(tmp_path_factory, monkeypatch):
    """A function that sets up a training, two steps an epoch, with further flags."""
    monkeypatch.setattr("train.catch_signals", lambda rank: [])
    if not (root := tmp_path_factory.getbasetemp() / "recipe").exists():
        make_dataset(root / "data", train=6, dev=0, test=0, workers=1)
    usual = f"--runs={root}/runs --data={root}/data --cache={root}/cache --val-split=0.2 --device=cpu --threads=1 "
    usual += "--amp=off --batch=2 --sizes=32:9 --augment=none --warmup=0 --schedule=constant --dropout=0 --no-lmsa "
    return lambda flags: train.Training(parse((usual + flags).split())[0])


def take_step(run, epoch=0, step=0):
    """(images, target, status) of a step, always on the same pair."""
    batch = train.load_batch(run, epoch, np.zeros(9, int), step)
    return *batch, train.train_step(run, epoch, step, *batch)


def test_ema_moves_by_its_decay_which_warms_up(start):
    run = start("--ema=0.2")
    for step, decay in enumerate([0.1, 2 / 11, 0.2]):  # (1 + step) / (10 + step), at most 0.2
        kept, new = (next(model.parameters()) for model in (run.average, run.model))
        old, _ = kept.clone(), take_step(run, *divmod(step, 2))
        assert torch.allclose(kept, decay * old + (1 - decay) * new, atol=1e-6)


def test_every_group_takes_the_rate_of_the_schedule(start):
    run = start("--optimiser=muon --lr=0.01 --schedule=cosine --warmup=1 --sizes=32:4")
    for step, rate in enumerate([0.5, 1, 0.9330, 0.75, 0.5, 0.25, 0.0670, 0]):  # after the first epoch, half a cosine
        take_step(run, *divmod(step, 2))
        assert [group["lr"] for group in run.optimiser.param_groups] == pytest.approx([0.01 * rate] * 3, abs=1e-6)


@pytest.mark.parametrize("clip", [0, 0.5, 1])
def test_clipping_bounds_the_norm_of_a_step(start, clip):
    run = start(f"--clip={clip} --lr=1 --ce=50")
    run.optimiser, old = torch.optim.SGD(run.model.parameters()), [p.detach().clone() for p in run.model.parameters()]
    norm = float(take_step(run)[2][1])
    moved = sum((p.detach() - v).square().sum() for p, v in zip(run.model.parameters(), old, strict=True))
    assert norm > 2 and float(moved) ** 0.5 == pytest.approx(clip or norm, rel=1e-3)


def test_amp_sets_the_precision_inside_the_network(start):
    for amp, dtype in (("bf16", torch.bfloat16), ("off", torch.float32)):
        run, seen = start(f"--amp={amp}"), []
        run.model.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.dtype))
        take_step(run)
        assert seen == [dtype]


def test_class_weights_are_inverse_roots_of_frequencies_with_mean_1(start):
    run = start("--class-weights=balanced --dice=0 --lr=1e-12")
    frequency = np.bincount(run.pairs.masks[run.batches.indices].ravel(), minlength=19) / 5 / 512**2
    by_hand = frequency.clip(1e-4) ** -0.5 / (frequency @ frequency.clip(1e-4) ** -0.5)
    images, target, status = take_step(run)
    expected = F.cross_entropy(run.model(images), target, torch.tensor(by_hand).float(), reduction="none").mean()
    assert float(status[0]) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("flags", "kept"), [("--decay-all", 0.95), ("--no-decay-all", 1), ("--optimiser=muon", 0.95)])
def test_decay_shrinks_biases_and_norms_only_if_asked(start, monkeypatch, flags, kept):
    monkeypatch.setattr("train.training_loss", lambda logits, target, **settings: 0 * logits.sum())
    run = start(f"--lr=0.1 --weight-decay=0.5 {flags}")
    old, _ = [p.detach().clone() for p in run.model.parameters()], take_step(run)
    for p, v in zip(run.model.parameters(), old, strict=True):
        assert torch.allclose(p, v * (0.95 if p.dim() > 1 else kept))


def test_patience_counts_epochs_since_the_last_gain(start, monkeypatch):
    scores = iter([0.2, 0.1, 0.5, 0.5, 0.4, 0.9])
    monkeypatch.setattr("train.official_score", lambda confusions: next(scores))
    train.train(run := start("--patience=2"))
    assert (run.progress["epoch"], run.progress["best_epoch"]) == (5, 3)


def test_steps_use_the_network_compiled_for_each_size(start, monkeypatch):
    calls = []
    forward = lambda model: lambda *args, **more: calls.append("step") or model(*args, **more)  # noqa: E731
    monkeypatch.setattr("torch.compile", lambda model, **settings: calls.append(settings) or forward(model))
    take_step(start("--no-compile"))
    take_step(start("--compile"))
    assert calls == [{"dynamic": False}, "step"]


def test_augmentation_depends_on_seed_epoch_and_step_alone(start):
    one, again, other = (start(f"--augment=basic --seed={seed}") for seed in (1, 1, 2))
    images = [take_step(*which)[0] for which in [(one,), (again,), (other,), (one, 1), (one, 0, 1)]]
    assert [torch.equal(images[0], changed) for changed in images[1:]] == [True, False, False, False]
