"""The locator: training targets and the search are inverse to each other, and its training finds pasted portraits."""

import math

from common import UserError

import numpy as np
import pytest
import torch

import locate
from data import Pairs
from tools.synth import draw_face


@pytest.fixture(scope="module")
def scenes():
    """Scenes of three synthetic faces."""
    images, masks = zip(*(map(np.asarray, draw_face(seed, 512)) for seed in (3, 4, 5)), strict=True)
    pairs = Pairs(np.stack(images), np.stack(masks), np.zeros(3, bool), list("abc"))
    return locate.Scenes(pairs, [0, 1, 2], 0)


def test_search_inverts_the_training_targets(scenes, monkeypatch):
    faces = [(40.3, 60.7, 64.0, 0.5), (130.0, 120.2, 100.0, -2.8)]
    monkeypatch.setattr(scenes, "scene", lambda: (np.zeros((192, 192, 3), np.uint8), faces))
    _, targets = scenes.batch(1)
    outputs = iter([torch.cat([targets[:, :1].clamp(1e-6, 1 - 1e-6).logit(), targets[:, 1:]], 1)])
    nothing = torch.full((1, 6, 1, 1), -9.0)
    pixels = np.zeros((384, 384, 3), np.uint8)  # the search sees it reduced
    monkeypatch.setattr(locate, "MAX_PIXELS", 192 * 192)
    found = locate.find_candidates(lambda images: next(outputs, nothing), pixels, "cpu")
    found = found[found[:, 2].argsort()]
    for (heat, x, y, side, roll), (fx, fy, true_side, true_roll) in zip(found, faces, strict=True):
        below = (locate.CENTRE - 0.5) * 2 * true_side  # from the portrait's centre to the face's
        assert heat > 0.99 and abs(side - 2 * true_side) < 0.1 and abs(math.radians(roll) - true_roll) < 1e-3
        assert (
            abs(x - 2 * fx - below * math.sin(true_roll)) < 0.1 and abs(y - 2 * fy + below * math.cos(true_roll)) < 0.1
        )


def test_pasted_portraits_lie_where_the_scene_says(scenes, monkeypatch):
    monkeypatch.setattr(scenes, "chance", lambda probability: False)  # upright unless rolled, not mirrored
    canvas, faces = locate.Image.new("RGB", (192, 192)), []
    while not faces or not (40 < faces[0][0] < 150 and 40 < faces[0][1] < 150 and faces[0][2] < 80):
        canvas, faces = locate.Image.new("RGB", (192, 192)), []
        scenes.paste(canvas, faces)
    x, y, side, _ = faces[0]
    rows, columns = np.nonzero(np.asarray(canvas).any(2))
    assert math.dist((columns.mean(), rows.mean()), (x, y)) < 0.25 * side
    assert 0.4 * side < max(np.ptp(columns), np.ptp(rows)) < 1.5 * side


def test_training_lowers_the_loss(scenes):
    torch.manual_seed(0)
    locator, (images, targets) = locate.Locator(width=16, blocks=1), scenes.batch(4)
    before = locate.locator_loss(locator(images), targets).item()
    locate.train(locator, scenes, 20)
    with torch.no_grad():
        assert locate.locator_loss(locator(images), targets).item() < 0.9 * before


def test_missing_or_damaged_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="make locator"):
        locate.load_locator(path=tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match="damaged"):
        locate.load_locator(path=tmp_path / "bad.pt")
