"""The official score, by hand and against the formula written plainly."""

import subprocess
import sys

import numpy as np
import pytest

from images import write_mask
from metrics import batch_score, by_label, confusion, f_scores, official_score


def plain_score(pred, true):
    """The formula of the task, label by label."""
    scores = []
    for label in np.unique(true):
        tp = np.sum((pred == label) & (true == label))
        fp = np.sum((pred == label) & (true != label))
        fn = np.sum((pred != label) & (true == label))
        precision, recall = tp / (tp + fp + 1e-7), tp / (tp + fn + 1e-7)
        scores.append(2 * precision * recall / (precision + recall + 1e-7))
    return np.mean(scores)


def test_score_by_hand():
    true = np.array([[0, 0, 1, 1]], np.uint8)
    pred = np.array([[0, 1, 1, 5]], np.uint8)  # F: 2/3 for 0; 1/2 for 1; 5 is not in the truth
    assert official_score(confusion(pred, true)[None]) == pytest.approx((2 / 3 + 1 / 2) / 2, abs=1e-6)


def test_equals_the_plain_formula_on_random_masks():
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 19, (40, 30)), rng.integers(0, rng.integers(2, 20), (40, 30))) for _ in range(20)]
    confusions = np.stack([confusion(p.astype(np.uint8), t.astype(np.uint8)) for p, t in pairs])
    assert official_score(confusions) == pytest.approx(np.mean([plain_score(p, t) for p, t in pairs]), abs=1e-12)


def test_batch_score_pools_the_pixels():
    masks = [np.full((2, 2), label, np.uint8) for label in (0, 0, 1)]
    preds = [np.zeros((2, 2), np.uint8)] * 3
    confusions = np.stack([confusion(p, t) for p, t in zip(preds, masks, strict=True)])
    assert batch_score(confusions, batch=3) == pytest.approx((0.8 + 0) / 2, abs=1e-6)  # P 8/12, R 1: F 0.8
    assert official_score(confusions) == pytest.approx(2 / 3, abs=1e-6)


def test_labels_count_the_images_that_have_them():
    confusions = np.stack(
        [confusion(np.uint8([[0, 1]]), np.uint8([[0, 1]])), confusion(np.uint8([[0]]), np.uint8([[0]]))]
    )
    f, images = by_label(confusions)
    assert images[:3].tolist() == [2, 1, 0] and np.isnan(f[2]) and np.isnan(f_scores(confusions)[1, 1])


def test_different_shapes_are_a_programming_error():
    with pytest.raises(ValueError, match="shapes"):
        confusion(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8))


def run(*args):
    return subprocess.run([sys.executable, "metrics.py", *map(str, args)], capture_output=True, text=True)


def test_command_line(tmp_path):
    for name in ("pred", "true"):
        (tmp_path / name).mkdir()
        write_mask(tmp_path / name / "a.png", np.uint8([[0, 13]]))
    assert "official score 1.0000" in run(tmp_path / "pred", tmp_path / "true").stdout
    write_mask(tmp_path / "pred" / "b.png", np.uint8([[0]]))
    missing = run(tmp_path / "pred", tmp_path / "true")
    assert missing.returncode == 2 and "b.png" in missing.stderr and missing.stderr.count("\n") == 1
    write_mask(tmp_path / "true" / "b.png", np.uint8([[200]]))
    wrong = run(tmp_path / "pred", tmp_path / "true")
    assert wrong.returncode == 2 and "label 200" in wrong.stderr
