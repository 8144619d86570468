"""From a run to the release: offsets folded into the classifier, half precision, records beside the weights."""

import json
import types

import numpy as np
import pytest
import torch

import checkpoint
import decode
import release
from data import Pairs, split
from errors import UserError
from evaluate import evaluate, unseen
from metrics import confusion, official_score
from model import build
from views import label_map, log_probabilities


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 3, 512, 512), dtype=np.uint8)
    masks = np.zeros((4, 512, 512), np.uint8)
    masks[:, 100:300, 100:300], masks[:, 320:330, 320:330] = 1, 15
    return Pairs(images, masks, np.zeros(4, bool), list("abcd"))


def known(labels, doubt):
    """Log-probabilities (N, 19, P) that know the truth but for label 15, held less likely than skin by `doubt`."""
    logits = torch.zeros(len(labels), 19, labels.shape[1]).scatter_(1, labels[:, None], 8.0)
    rare = labels == 15
    logits[:, 1][rare], logits[:, 15][rare] = 8.0, 8.0 - doubt
    return logits.log_softmax(1)


def test_fitted_offsets_raise_the_rare_label(pairs):
    labels = decode.sampled(torch.from_numpy(pairs.masks[:2]).long())
    log_p = known(labels, 0.3)
    offsets = decode.fit(log_p, labels)
    assert offsets[15] - offsets[1] > 0.3
    assert decode.score(log_p, labels, offsets) > decode.score(log_p, labels, np.zeros(19)) + 0.15
    gain, gains = decode.cross_validated(log_p, labels, 2)
    assert gain == pytest.approx(np.mean(gains)) and gain > 0.15


def test_the_score_of_sampled_pixels_is_the_official_one():
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 19, (2, 3, 500))
    log_p = torch.nn.functional.one_hot(torch.from_numpy(guesses), 19).permute(0, 2, 1).float()
    plain = official_score(np.stack([confusion(*pair) for pair in zip(guesses, labels, strict=True)]))
    assert decode.score(log_p, torch.from_numpy(labels), np.zeros(19)) == pytest.approx(plain)


def test_offsets_in_the_bias_shift_the_probabilities(pairs, tmp_path):
    torch.manual_seed(0)
    model = build("microunet").eval()
    content = {"state_dict": model.state_dict(), "model": "microunet", "model_args": {}, "size": 64}
    offsets = np.linspace(-1, 1, 19)
    checkpoint.save(tmp_path / "a.pt", decode.with_offsets(content, offsets))
    moved, _ = checkpoint.load_model(tmp_path / "a.pt")
    images = torch.from_numpy(pairs.images[:1])
    shifted = log_probabilities([model], images, 64) + torch.tensor(offsets, dtype=torch.float32)[:, None, None]
    assert torch.equal(label_map(log_probabilities([moved], images, 64), 64, 64), label_map(shifted, 64, 64))


def test_the_release_holds_the_run_in_half_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(release, "RELEASE", tmp_path / "release")
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    model = build("microunet")
    checkpoint.save(
        run / "best.pt", {"state_dict": model.state_dict(), "model": "microunet", "model_args": {}, "size": 64}
    )
    for name in ("args.json", "metrics.jsonl"):
        (run / name).write_text(json.dumps({"args": {}}))
    monkeypatch.setattr("sys.argv", ["release.py", "--name", "a", "--runs", str(tmp_path / "runs")])
    made = tmp_path / "release"
    made.mkdir()
    (made / "best.json").write_text("of the former release")
    release.main()
    assert {path.name for path in made.iterdir()} == {"best.pt", "args.json", "metrics.jsonl", "LICENCE.txt"}
    assert (made / "best.pt").stat().st_size < 4e6
    halved, _ = checkpoint.load_model(made / "best.pt")
    for kept, was in zip(halved.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.allclose(kept, was, rtol=1e-3, atol=1e-7)
    monkeypatch.setattr("sys.argv", ["release.py", "--name", str(made)])
    with pytest.raises(UserError, match="is the release already"):
        release.main()


@pytest.mark.parametrize(
    ("flags", "validated", "seed", "told"),
    [
        ({}, True, 7, ""),
        ({"split_seed": 42}, True, 42, "has seen these"),
        ({"val_split": 0.2}, True, None, "has seen these"),
        ({}, False, 7, "without validation"),
    ],
)
def test_a_run_is_scored_on_the_pairs_it_held_out(tmp_path, flags, validated, seed, told):
    (tmp_path / "args.json").write_text(json.dumps({"args": {"val_split": 0.1, "split_seed": 7}}))
    args = types.SimpleNamespace(**({"val_split": None, "split_seed": None} | flags))
    held, remark = unseen(tmp_path / "best.pt", {"validated": validated}, args, 100)
    assert seed is None and len(held) == 20 or held.tolist() == split(100, 0.1, seed)[1].tolist()
    assert told in remark and bool(remark) == bool(told)


def test_weights_without_a_record_are_scored_on_the_reference_s_split(tmp_path):
    args = types.SimpleNamespace(val_split=None, split_seed=None)
    held, _ = unseen(tmp_path / "a.pt", {"validated": True}, args, 100)
    assert held.tolist() == split(100)[1].tolist()


@pytest.mark.parametrize("scale", [0.5, 2])  # logits coarser and finer than the masks
def test_a_perfect_network_has_the_score_1(pairs, scale):
    class Perfect(torch.nn.Module):
        def forward(self, images, full_size):
            return torch.nn.functional.one_hot(self.masks[: len(images)].long(), 19).permute(0, 3, 1, 2).float() * 20

    model = Perfect()
    model.masks = torch.nn.functional.interpolate(torch.from_numpy(pairs.masks)[None], scale_factor=scale)[0]
    confusions, losses = evaluate(model, pairs, np.arange(4), 512, torch.device("cpu"))
    assert official_score(confusions) > 0.98 and losses.max() < 0.2
