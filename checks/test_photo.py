"""Photos: faces found in composed images and a real one, windows cropped and pasted, masks described and cut out.

Most images are masks of synthetic faces in the labels' colours, and `Oracle` reads the labels from the colours: an
error is then one of the search or the arithmetic, never of a network.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import photo
from labels import COLOURS, NAMES
from photo import FACE_SCORE, LAYOUT, label_regions, match_layout, overlap, parse_photos, paste
from predict import FaceParser
from tools.synth import draw_face
from views import ONE_VIEW, label_map, log_probabilities

ASTRONAUT = Path(__file__).parents[1] / "docs/astronaut.jpg"
WINDOWS = [(30, 60, 230, 230), (420, 260, 400, 400), (860, 20, 200, 200)]


class Oracle:
    """A network that reads the labels from the palette's colours."""

    def __call__(self, view, full_size=False):
        distance = view[:, None, :, ::2, ::2] - torch.tensor(COLOURS)[:, :, None, None] / 255
        return -60 * distance.square().sum(2)


@pytest.fixture(scope="module")
def faces():
    """Masks of three synthetic faces, uint8 (3, 512, 512)."""
    return np.stack([np.asarray(draw_face(seed, 512)[1]) for seed in (3, 4, 5)])


@pytest.fixture(scope="module")
def group(faces):
    """The three masks at WINDOWS, as labels (700, 1100)."""
    canvas = Image.new("L", (1100, 700))
    for mask, (left, top, side, _) in zip(faces, WINDOWS, strict=True):
        canvas.paste(Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST), (left, top))
    return np.asarray(canvas)


def painted(mask):
    return np.array(COLOURS, np.uint8)[mask]


def parse(mask, **settings):
    return parse_photos([Oracle()], [painted(mask)], 128, ONE_VIEW, "cpu", **settings)[0]


def test_paste_clips_windows_at_the_edges():
    labels = np.full((4, 4), 1, np.uint8)
    mask, owner = paste(6, 8, [(labels, (-2, -1, 4, 4)), (labels * 2, (4, 1, 4, 4))])
    assert (mask[:3, :2] == 1).all() and (mask[1:5, 4:] == 2).all() and (mask > 0).sum() == 3 * 2 + 4 * 4
    assert np.array_equal(owner, mask.astype(int) - 1)


def test_paste_gives_an_overlap_to_the_nearer_centre_relative_to_the_sides():
    large, small = np.full((8, 8), 1, np.uint8), np.full((4, 4), 2, np.uint8)
    mask, _ = paste(8, 10, [(large, (0, 0, 8, 8)), (small, (6, 2, 4, 4))])
    assert mask[4].tolist() == [1] * 7 + [2] * 3


def test_match_layout_recovers_scale_and_shift():
    usual = torch.cat([torch.tensor(list(LAYOUT.values())), torch.ones(8, 1)], 1)
    moved = usual * torch.tensor([0.4, 0.4, 0.4, 1]) + torch.tensor([0.3, 0.1, 0, 0])
    upside_down = torch.cat([usual[:, :1], 1 - usual[:, 1:2], usual[:, 2:]], 1)
    parts = torch.stack([usual, moved, upside_down])
    parts[:, 7] = 0  # no glasses
    scores, windows = match_layout(parts)
    assert torch.allclose(scores[:2], torch.ones(2), atol=1e-3) and scores[2] < FACE_SCORE / 2
    assert torch.allclose(windows[:2], torch.tensor([[0, 0, 1], [0.3, 0.1, 0.4]]), atol=1e-3)


def test_group_is_found_and_parsed(group):
    parsed = parse(group)
    assert len(parsed.faces) == 3 and not parsed.missed
    for index, window in enumerate(WINDOWS):
        left, top, side, _ = window
        inside, middle = (np.s_[top + m : top + side - m, left + m : left + side - m] for m in (0, side // 3))
        assert overlap(parsed.faces[index][1], window) > 0.6
        assert (parsed.mask[inside] == group[inside]).mean() > 0.8 and (parsed.owner[middle] == index).all()


def test_face_beyond_the_edge_is_found(group):
    found = photo.find_faces([Oracle()], painted(group[:, 480:840]), 128, "cpu")
    assert overlap(found[0][1], (-60, 260, 400, 400)) > 0.6


def test_portrait_is_parsed_as_a_whole(faces):
    images = torch.from_numpy(painted(faces[0])).permute(2, 0, 1)[None]
    expected = label_map(log_probabilities([Oracle()], images, 128, ONE_VIEW), 512, 512)[0].numpy()
    parsed = parse(faces[0])
    assert np.array_equal(parsed.mask, expected) and parsed.faces[0][1] == (0, 0, 512, 512) and not parsed.missed


def test_photo_without_a_face_is_background_unless_whole():
    cloth = np.full((200, 320), 18, np.uint8)
    parsed = parse(cloth)
    assert parsed.missed and not parsed.mask.any() and parsed.faces == [(None, (0, 0, 320, 200))]
    assert (parse(cloth, whole=True).mask == 18).all()


def test_box_is_the_only_portrait(group):
    parsed, inside = parse(group, box=(410, 240, 420, 450)), np.s_[240:690, 410:830]
    assert (parsed.mask[inside] == group[inside]).mean() > 0.9
    assert (parsed.owner == 0).sum() == 420 * 450 and not parsed.mask[parsed.owner < 0].any()


def test_large_photos_are_parsed_coarsely(faces, monkeypatch):
    fine = parse(faces[0][:501, :499], whole=True).mask
    monkeypatch.setattr(photo, "MAX_PIXELS", 200 * 200)
    coarse = parse(faces[0][:501, :499], whole=True).mask
    assert coarse.shape == fine.shape == (501, 499) and (coarse == fine).mean() > 0.95


def test_label_regions_by_hand():
    mask = np.full((20, 30), 255, np.uint8)
    mask[3:7, 5:15] = NAMES.index("hair")
    assert label_regions(mask) == {"hair": {"area": 40, "box": [5, 3, 10, 4], "centroid": [9.5, 4.5]}}


def test_described_faces_add_up_to_the_mask(group):
    parsed = parse(group)
    record = json.loads(json.dumps(photo.describe(parsed)))
    assert (record["width"], record["height"], len(record["faces"]), record["face_found"]) == (1100, 700, 3, True)
    for label, name in enumerate(NAMES[1:], 1):
        areas = [part["labels"].get(name, {"area": 0})["area"] for part in (record, *record["faces"])]
        assert areas[0] == sum(areas[1:]) == (parsed.mask == label).sum()


def test_cut_out_is_transparent_outside_the_labels(faces):
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    rgba = photo.cut_out(pixels, faces[0], photo.parse_labels("hair, hat"))
    inside = np.isin(faces[0], [13, 14])
    assert np.array_equal(rgba[..., 3], inside * np.uint8(255)) and 0 < inside.sum() < inside.size
    assert np.array_equal(rgba[inside, :3], pixels[inside]) and not rgba[~inside].any()


def test_release_finds_and_parses_the_astronaut():
    parsed = FaceParser(device="cpu")(ASTRONAUT)
    ((score, window),) = parsed.faces
    assert score > FACE_SCORE and overlap(window, (136, 17, 176, 176)) > 0.6
    regions = label_regions(parsed.mask)
    parts = {"l_eye": (247, 103), "r_eye": (203, 100), "l_brow": (250, 92), "r_brow": (202, 89)}
    for name, place in (parts | {"nose": (224, 117), "u_lip": (223, 141), "l_lip": (223, 150)}).items():
        assert np.hypot(*np.subtract(regions[name]["centroid"], place)) < 12, name
    hair = parsed.mask == NAMES.index("hair")
    assert hair.any() and not hair[:, :130].any() and not hair[190:].any()  # neither the flag nor the helmet
