"""The locator: training targets and the search are inverse to each other, and its training finds pasted portraits."""

import math
from types import SimpleNamespace

from common import UserError

import numpy as np
import pytest
import torch

import photo
import register
from checks.conftest import cases
from tools import train_locator
from tools.synth import draw_face, make_dataset


@pytest.fixture(scope="module")
def scenes():
    """Scenes of three synthetic faces."""
    images, masks = zip(*(map(np.asarray, draw_face(seed, 512)) for seed in (3, 4, 5)), strict=True)
    return train_locator.Scenes(SimpleNamespace(images=images, masks=masks), [0, 1, 2], 0)


@cases("look", [0, 1])  # the second sees the photo reduced four times
def test_search_inverts_the_training_targets(scenes, monkeypatch, look):
    faces = [(40.3, 60.7, 64.0, 0.5), (130.0, 120.2, 100.0, -2.8)]
    monkeypatch.setattr(scenes, "scene", lambda: (np.zeros((192, 192, 3), np.uint8), faces))
    _, targets = scenes.batch(1)
    nothing = torch.full((1, 6, 1, 1), -9.0)
    outputs = iter([nothing] * look + [torch.cat([targets[:, :1].clamp(1e-6, 1 - 1e-6).logit(), targets[:, 1:]], 1)])
    monkeypatch.setattr(photo, "FIRST_PIXELS", 192 * 192)
    monkeypatch.setattr(photo, "AGAIN", ())
    levels, scale = photo.pyramid(np.zeros((384, 384, 3), np.uint8), "cpu")
    heats, places = photo.find_candidates(lambda images: next(outputs, nothing), levels)
    assert scale == 2 and (heats > 0.99).all()
    for (x, y, side, roll), (fx, fy, true_side, true_roll) in zip(sorted(places.tolist()), faces, strict=True):
        x, y, side = (value / 4**look for value in (x, y, side))
        below = (photo.CENTRE - 0.5) * true_side  # from the portrait's centre to the face's
        assert abs(side - true_side) < 0.05 and abs(math.radians(roll) - true_roll) < 1e-3
        assert math.dist((x, y), (fx + below * math.sin(true_roll), fy - below * math.cos(true_roll))) < 0.1


def test_a_candidate_is_seen_again_upright_and_the_looks_are_averaged(monkeypatch):
    pixels = np.zeros((300, 300, 3), np.uint8)
    pixels[:, 150:] = 255  # above, for a portrait that is turned clockwise by 90 degrees
    place, side, roll = torch.tensor([[150.0, 150, 96, 90]]), 1.2 * 64, 0.3

    def see(images):
        assert (images[:, :, :90] > 0.99).all() and (images[:, :, 102:] < 0.01).all()
        output = torch.full((1, 6, 24, 24), -20.0)  # a portrait 8 pixels to the right, larger, and turned farther
        below = (photo.CENTRE - 0.5) * side
        x, y = 104 - below * math.sin(roll), 96 + below * math.cos(roll)
        shift = x / 8 - 12.5, y / 8 - 12.5
        output[0, :, 12, 12] = torch.tensor([20, *shift, math.log(1.2), math.cos(roll), math.sin(roll)])
        return output

    monkeypatch.setattr(photo, "AGAIN", (64,))
    heats, places = photo.refine(see, photo.pyramid(pixels, "cpu")[0], torch.tensor([0.5]), place)
    expected = [150, 150 + 2 / 3 * 96 * 8 / 64, 96 * (1 + 0.2 * 2 / 3), 90 + math.degrees(roll) * 2 / 3]
    corner = photo.sample([torch.ones(1, 3, 40, 40)], torch.tensor([[0.0, 0, 30, 45]]), 16)
    assert torch.allclose(corner, torch.tensor(1.0))  # the edge is repeated
    assert abs(heats.item() - 0.75) < 1e-6 and torch.allclose(places, torch.tensor([expected]), atol=0.01)


@cases(("heat", "count"), [(0.95, 1), (0.6, 0)])
def test_candidates_keep_their_heat_on_average_with_second_looks(heat, count):
    first = torch.zeros(1, 6, 6, 6)
    first[0, 0], first[0, 0, 3, 3] = -20, math.log(heat / (1 - heat))
    outputs, nothing = iter([first]), torch.full((1, 6, 24, 24), -20.0)
    levels, _ = photo.pyramid(np.zeros((48, 48, 3), np.uint8), "cpu")
    heats, places = photo.find_candidates(lambda images: next(outputs, nothing), levels)
    assert len(heats) == len(places) == count


def test_a_large_candidate_hides_no_small_one():
    large, small, twin = (0.9, (50, 50, 400, 0)), (0.8, (20, 60, 40, 0)), (0.7, (24, 62, 44, 0))
    assert photo.distinct([small, twin, large]) == [large]
    assert photo.distinct([small, twin, large], 3) == [large, small]


def test_pasted_portraits_lie_where_the_scene_says(scenes, monkeypatch):
    monkeypatch.setattr(scenes, "chance", lambda probability: False)  # upright unless rolled, not mirrored
    assert all(np.array_equal(np.asarray(image)[..., 3] > 0, mask > 0) for image, mask in scenes.portraits)
    upper = train_locator.Image.new("RGBA", (256, 256))  # opaque in its upper half
    upper.paste("white", (0, 0, 256, 128))
    monkeypatch.setattr(scenes, "portraits", [(upper, None)])
    faces = []
    while not faces or not (40 < faces[0][0] < 150 and 40 < faces[0][1] < 150 and faces[0][2] < 80):
        canvas, faces = train_locator.Image.new("RGB", (192, 192)), []
        scenes.paste(canvas, faces)
    x, y, side, roll, _ = faces[0]
    rows, columns = np.nonzero(np.asarray(canvas).any(2))
    above = (photo.CENTRE - 0.25) * side  # from the face's centre to that of the upper half
    assert math.dist((columns.mean(), rows.mean()), (x + above * math.sin(roll), y - above * math.cos(roll))) < 2
    assert 0.4 * side < max(np.ptp(columns), np.ptp(rows)) < 1.5 * side


def test_training_lowers_the_loss(scenes):
    torch.manual_seed(0)
    locator, (images, targets) = photo.Locator(width=16, blocks=1), scenes.batch(4)
    before = train_locator.locator_loss(locator(images), targets).item()
    train_locator.train(locator, [(images, targets)] * 30, 30)
    assert locator.body[1].num_batches_tracked >= 30 and not locator.training
    with torch.no_grad():
        assert train_locator.locator_loss(locator(images), targets).item() < 0.8 * before


def test_the_command_trains_from_weights_and_replaces_none_unless_asked(tmp_path, command, refused):
    make_dataset(tmp_path / "data", train=6, dev=1, test=1)
    path = tmp_path / "new/a.pt"
    data = f"--data={tmp_path}/data", f"--cache={tmp_path}"
    flags = train_locator.main, *data, "--steps=1", "--threads=1", f"--out={path}"
    for more in ([], ["--overwrite", f"--from={path}"]):
        assert command(*flags, *more)[0] == 0
        assert photo.load_locator(path=path)(torch.zeros(1, 3, 64, 64)).shape == (1, 6, 8, 8)
    assert "OVERWRITE=1" in refused(*flags)


def test_damaged_weights_are_named(tmp_path):
    for content in (b"no weights", (register.RELEASE / "best.pt").read_bytes()):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(UserError, match="damaged or of another network .*make locator"):
            photo.load_locator(path=tmp_path / "bad.pt")
