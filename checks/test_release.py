"""From a run to the release: offsets folded into the classifier, half precision, records beside the weights."""

import json

import numpy as np
import pytest
import torch

import checkpoint
import decode
import release
from data import Pairs
from errors import UserError
from evaluate import evaluate
from metrics import official_score
from model import build
from views import label_map, log_probabilities


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 3, 512, 512), dtype=np.uint8)
    masks = np.zeros((4, 512, 512), np.uint8)
    masks[:, 100:300, 100:300], masks[:, 320:330, 320:330] = 1, 15
    return Pairs(images, masks, np.zeros(4, bool), list("abcd"))


def known(masks, doubt):
    """Log-probabilities (1, 19, 32, 32) that know the truth but for label 15, which they hold less likely by `doubt`
    than skin."""
    log_p = []
    for mask in masks:
        one = torch.zeros(19, 32, 32).scatter_(0, torch.from_numpy(mask[None, ::8, ::8]).long(), 8.0)
        rare = one[15] > 0
        one[1][rare], one[15][rare] = 8.0, 8.0 - doubt
        log_p.append(one.log_softmax(0)[None])
    return log_p


def test_fitted_offsets_raise_the_rare_label(pairs):
    masks = pairs.masks[:2, ::2, ::2]
    log_p = known(masks, 0.3)
    offsets = decode.fit(log_p, masks)
    assert offsets[15] - offsets[1] > 0.3
    assert decode.score(log_p, masks, offsets) > decode.score(log_p, masks, np.zeros(19)) + 0.15
    gain, gains = decode.cross_validated(log_p, masks, 2)
    assert gain == pytest.approx(np.mean(gains)) and gain > 0.15


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
    release.main()
    made = tmp_path / "release"
    assert {path.name for path in made.iterdir()} == {"best.pt", "args.json", "metrics.jsonl", "LICENCE.txt"}
    assert (made / "best.pt").stat().st_size < 4e6
    halved, _ = checkpoint.load_model(made / "best.pt")
    for kept, was in zip(halved.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.allclose(kept, was, rtol=1e-3, atol=1e-7)
    monkeypatch.setattr("sys.argv", ["release.py", "--name", str(made)])
    with pytest.raises(UserError, match="is the release already"):
        release.main()


def test_a_perfect_network_has_the_score_1(pairs):
    class Perfect(torch.nn.Module):
        def forward(self, images, full_size):
            return torch.nn.functional.one_hot(self.masks[: len(images)].long(), 19).permute(0, 3, 1, 2).float() * 20

    model = Perfect()
    model.masks = torch.from_numpy(pairs.masks[:, ::2, ::2])
    confusions, losses = evaluate(model, pairs, np.arange(4), 512, torch.device("cpu"))
    assert official_score(confusions) > 0.98 and losses.max() < 0.2
