"""Photos: faces found in composed images and a real one, windows cropped and pasted, masks described and cut out.

Most images are masks of synthetic faces in the labels' colours, and `oracle` reads the labels from the colours: an
error is then one of the search or the arithmetic, never of a network.
"""

import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import photo
from checks.conftest import cases
from labels import COLOURS, NAMES
from photo import FACE_SCORE, LAYOUT, Window, find_candidates, match_layout, overlap, parse_photos, paste
from predict import FaceParser, cut_out, describe, label_regions, parse_labels
from tools.synth import draw_face
from views import ONE_VIEW, label_map, log_probabilities

WINDOWS = [(30, 60, 230, 230), (420, 260, 400, 400), (860, 20, 200, 200)]


def oracle(view, full_size=False):
    """A network that reads the labels from the palette's colours."""
    distance = view[:, None, :, ::2, ::2] - torch.tensor(COLOURS)[:, :, None, None] / 255
    return -60 * distance.square().sum(2)


@pytest.fixture(scope="module")
def faces():
    """Masks of three synthetic faces, uint8 (3, 512, 512)."""
    return np.stack([np.asarray(draw_face(seed, 512)[1]) for seed in (0, 4, 6)])


@pytest.fixture(scope="module")
def group(faces):
    """The three masks at WINDOWS, as labels (700, 1100)."""
    canvas = Image.new("L", (1100, 700))
    for mask, (left, top, side, _) in zip(faces, WINDOWS, strict=True):
        canvas.paste(Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST), (left, top))
    return np.asarray(canvas)


def painted(mask):
    return np.array(COLOURS, np.uint8)[mask]


@pytest.fixture(autouse=True)
def candidates(monkeypatch):
    """Let `locator=` be what the network would find: rows of heat, x, y, side, roll. It knows no painted faces."""

    def known(locator, levels):
        rows = torch.tensor(locator, dtype=torch.float32).view(-1, 5)
        return rows[:, 0], rows[:, 1:]

    monkeypatch.setattr(photo, "find_candidates", known)


def near(windows, roll=0, heat=0.9, factor=1.1):
    """Candidates beside the true portraits: a tenth too large, shifted by a tenth, and turned by 7 degrees."""
    return [(heat, x + 0.6 * side, y + 0.4 * side, factor * side, roll + 7) for x, y, side, _ in windows]


def parser(locator=(), size=256):
    return SimpleNamespace(models=[oracle], size=size, views=ONE_VIEW, device="cpu", locator=locator)


def parse(mask, locator=(), **settings):
    return parse_photos(parser(locator), [painted(mask)], **settings)[0]


def log_labels(labels):
    """Log-probabilities (1, 19, h, w) of certain labels (h, w)."""
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), len(NAMES))
    return one_hot.permute(2, 0, 1)[None].float().clamp_min(1e-6).log()


def test_paste_clips_windows_and_gives_an_overlap_to_the_nearer_centre_relative_to_the_portraits():
    log_p, windows = log_labels(np.full((4, 4), 1, np.uint8)), [Window(-2, -1, 4, 4), Window(4, 1, 4, 4)]
    parsed = paste(6, 8, [(None, window, window, log_p) for window in windows])
    assert (parsed.mask[:3, :2] == 1).all() and (parsed.mask[1:5, 4:] == 1).all() and parsed.mask.sum() == 3 * 2 + 4 * 4
    assert np.array_equal(parsed.owner >= 0, parsed.mask > 0) and (parsed.owner[1:5, 4:] == 1).all()
    assert [face.box for face in parsed.faces] == [(0, 0, 2, 3), (4, 1, 4, 4)]
    portraits = [(Window(2, 2, 4, 4), Window(0, 0, 8, 8), label) for label in (0, 1)]  # background gives way
    portraits.append((Window(6, 2, 4, 4), Window(6, 2, 4, 4), 2))
    parsed = paste(8, 10, [(None, w, around, log_labels(np.full((8, 8), n, np.uint8))) for w, around, n in portraits])
    assert parsed.mask[4].tolist() == [1] * 6 + [2] * 4


def test_match_layout_recovers_scale_rotation_and_shift():
    usual = torch.cat([torch.tensor(list(LAYOUT.values())), torch.ones(8, 1)], 1)
    moved = usual * torch.tensor([0.4, 0.4, 0.4, 1]) + torch.tensor([0.3, 0.1, 0, 0])
    turned = torch.stack([1 - usual[:, 1], usual[:, 0], usual[:, 2], usual[:, 3]], 1)  # clockwise by 90 degrees
    mirrored = torch.cat([1 - usual[:, :1], usual[:, 1:]], 1)  # left and right are exchanged
    parts = torch.stack([usual, moved, turned, mirrored])
    parts[:, 7] = 0  # no glasses
    scores, portraits = match_layout(parts)
    assert torch.allclose(scores[:3], torch.ones(3), atol=1e-3) and scores[3] < FACE_SCORE
    expected = [[0.5, 0.5, 1, 0], [0.5, 0.3, 0.4, 0], [0.5, 0.5, 1, 90]]
    assert torch.allclose(portraits[:3], torch.tensor(expected), atol=1e-3)
    wrong = parts[:1].repeat(2, 1, 1)
    wrong[0, 4, 0], wrong[1, 4, 2] = 0.7, 1  # the nose beside the face, or as large as it: it counts for nothing
    scores, portraits = match_layout(wrong)
    assert torch.allclose(scores, torch.tensor(6 / 7), atol=0.02)
    assert torch.allclose(portraits, torch.tensor(expected[0]), atol=0.02)


@cases("scale", [1, 1.183])  # the faces are found in the whole photo, or in a reduced one
def test_group_is_found_parsed_and_described(group, monkeypatch, scale):
    monkeypatch.setattr(photo, "FIRST_PIXELS", group.size / scale**2)
    reduced = np.array(WINDOWS) / scale
    parsed = parse(group, near(reduced) + near(reduced, roll=3))  # each face once
    assert not parsed.missed
    for index, (face, window) in enumerate(zip(parsed.faces, WINDOWS, strict=True)):
        assert parsed.faces.index(face) == index
        left, top, side, _ = window
        inside, middle = (np.s_[top + m : top + side - m, left + m : left + side - m] for m in (0, side // 3))
        assert overlap(face.window, window) > 0.6 and abs(face.angle) < 9
        assert (parsed.mask[inside] == group[inside]).mean() > 0.8 and (parsed.owner[middle] == index).all()
        assert face.mask.any(0)[[0, -1]].all() and face.mask.any(1)[[0, -1]].all()
    record = json.loads(json.dumps(describe(parsed)))
    assert (record["width"], record["height"], len(record["faces"]), record["face_found"]) == (1100, 700, 3, True)
    for (left, top, side, _), part in zip(WINDOWS, record["faces"], strict=True):
        x, y = part["labels"]["nose"]["centroid"]
        assert left < x < left + side and top < y < top + side
    for label, name in enumerate(NAMES[1:], 1):
        areas = [part["labels"].get(name, {"area": 0})["area"] for part in (record, *record["faces"])]
        assert areas[0] == sum(areas[1:]) == (parsed.mask == label).sum()


@cases("roll", [-150, 60, 180])
@cases("pixels", [1 << 22, 200 * 200])
def test_tilted_face_is_found_and_parsed(faces, monkeypatch, roll, pixels):
    monkeypatch.setattr(photo, "MAX_PIXELS", pixels)
    canvas = Image.new("L", (700, 600))
    canvas.paste(Image.fromarray(faces[2]).resize((300, 300), Image.Resampling.NEAREST), (200, 150))
    canvas = np.asarray(canvas.rotate(-roll, center=(350, 300)))  # clockwise by `roll`
    parsed = parse(canvas, near([(200, 150, 300, 300)], roll))
    (face,) = parsed.faces
    assert abs((face.angle - roll + 180) % 360 - 180) < 5 and overlap(face.window, (200, 150, 300, 300)) > 0.8
    assert (parsed.mask == canvas).mean() > 0.95


def test_a_face_is_found_if_its_roll_was_misjudged_but_not_far_from_the_candidate(group):
    parsed = parse(group, near(WINDOWS, roll=50, heat=0.6))
    assert len(parsed.faces) == 3 and all(abs(face.angle) < 9 for face in parsed.faces)
    assert parse(group, near(WINDOWS, factor=3, heat=0.5)).missed


@cases(("side", "size"), [(93, 384), (101, 512)])
def test_windows_around_a_portrait_are_concentric_and_small_ones_parsed_coarsely(faces, monkeypatch, side, size):
    parse_window, seen = photo.parse_window, []
    monkeypatch.setattr(photo, "parse_window", lambda *args: seen.append(args[2:]) or parse_window(*args))
    photo.parse_face(parser(size=512), painted(faces[0]), photo.square(150.4, 149.7, side, 0))
    assert len({(w.left + w.width / 2, w.top + w.height / 2) for w, _ in seen}) == 1 < len(seen)
    assert seen[0][1] == size


def test_a_face_without_a_pixel_of_its_own_is_none(group, monkeypatch):
    monkeypatch.setattr(photo, "confine", lambda log_p, *_: log_p - 999 * (torch.arange(19) > 0)[:, None, None])
    parsed = parse(group, near(WINDOWS))
    assert parsed.missed and not parsed.faces and describe(parsed)["face_found"] is False


def test_hair_is_parsed_until_it_ends(faces):
    canvas = np.zeros((900, 900), np.uint8)
    canvas[300:812, 200:712] = faces[2]
    canvas[250:820, 330:580][canvas[250:820, 330:580] == 0] = NAMES.index("hair")  # beyond the portrait's lower edge
    canvas[812:890, 330:580] = NAMES.index("hair")
    parsed = parse(canvas, near([(200, 300, 512, 512)]))
    assert (parsed.mask[830:880, 340:570] == NAMES.index("hair")).mean() > 0.95


def test_portrait_is_parsed_as_a_whole(faces):
    images = torch.from_numpy(painted(faces[0])).permute(2, 0, 1)[None]
    expected = label_map(log_probabilities([oracle], images, 256, ONE_VIEW), 512, 512)[0].numpy()
    parsed = parse(faces[0], near([(0, 0, 512, 512)]))
    assert np.array_equal(parsed.mask, expected) and parsed.faces[0].window == (0, 0, 512, 512) and not parsed.missed
    for side, whole in ((380, True), (350, False)):  # IoU of 0.55 and 0.47
        canvas, place = np.zeros((512, 512), np.uint8), ((512 - side) // 2, (512 - side) // 2, side, side)
        canvas[place[1] :, place[0] :][:side, :side] = Image.fromarray(faces[0]).resize((side, side), 0)
        assert (parse(canvas, near([place])).faces[0].window == (0, 0, 512, 512)) == whole


def test_a_portrait_fades_into_its_surroundings_at_each_edge_alike():
    inner, outer = (torch.rand(1, 19, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    blended = photo.blend(inner, outer, 1.5)
    for axis in (2, 3):
        assert torch.allclose(photo.blend(inner.flip(axis), outer.flip(axis), 1.5), blended.flip(axis), atol=1e-6)


@cases("turns", range(4))
@cases("pixels", [1 << 22, 300 * 300])  # parsed in full, or reduced, which moves a turned one by up to a reduced pixel
def test_portrait_that_is_not_found_is_parsed_at_its_roll(faces, monkeypatch, pixels, turns):
    monkeypatch.setattr(photo, "MAX_PIXELS", pixels)
    portrait = np.rot90(faces[0][:501, 20:479], -turns)  # clockwise
    parsed = parse(portrait)
    least = 0.93 if turns and pixels < 1 << 22 else 0.95
    assert parsed.missed and parsed.faces[0].angle == 90 * turns and (parsed.mask == portrait).mean() > least


def test_a_strip_is_turned_without_a_square_around_it():
    strip = np.random.default_rng(0).integers(0, 256, (8, 20001, 3), dtype=np.uint8)
    window = Window((20001 - 8) // 2, (8 - 20001) // 2, 8, 20001, 90.0)
    tracemalloc.start()
    assert np.array_equal(photo.crop(strip, window), np.rot90(strip))
    assert tracemalloc.get_traced_memory()[1] < 10 * strip.nbytes
    tracemalloc.stop()


def test_points_of_a_turned_window_are_where_its_cells_are():
    window = Window(-20, 10, 60, 90, 30.0)
    rows, columns, _ = photo._inside(window, np.s_[40:70, 5:25])
    x, y = window.photo_points((columns + 0.5) / 60, (rows + 0.5) / 90)
    assert abs(x - np.arange(5.5, 25)).max() < 1 and abs(y - np.arange(40.5, 70)[:, None]).max() < 1


def test_photo_without_a_face_is_background_unless_whole_or_box_says_where_it_is(group):
    cloth = np.full((200, 320), 18, np.uint8)
    parsed = parse(cloth)
    assert parsed.missed and not parsed.mask.any()
    assert (parse(cloth, whole=True).mask == 18).all() and (parse(cloth, cutout=[0]).alpha == 255).all()
    parsed, inside = parse(group, box=(410, 240, 420, 450)), np.s_[240:690, 410:830]
    assert (parsed.mask[inside] == group[inside]).mean() > 0.9
    assert (parsed.owner == 0).sum() == 420 * 450 and not parsed.mask[parsed.owner < 0].any()


def test_label_regions_by_hand():
    mask = np.full((20, 30), 255, np.uint8)
    mask[3:7, 5:15] = NAMES.index("hair")
    assert label_regions(mask) == {"hair": {"area": 40, "box": [5, 3, 10, 4], "centroid": [9.5, 4.5]}}


def test_cut_out_has_soft_edges(faces):
    labels, pixels = parse_labels("hair, hat"), painted(faces[1])
    parsed = parse(faces[1], cutout=labels)
    inside = np.isin(parsed.mask, labels)
    assert (parsed.alpha[inside] > 0).mean() > 0.99 and (parsed.alpha[~inside] < 255).mean() > 0.99
    assert 0 < ((parsed.alpha > 0) & (parsed.alpha < 255)).mean() < 0.2
    near = torch.nn.functional.max_pool2d(torch.from_numpy(inside)[None].float(), 13, 1, 6)[0].numpy()
    assert not parsed.alpha[near == 0].any()  # nothing far from the labels
    rgba, seen = cut_out(pixels, parsed.alpha), parsed.alpha > 0
    assert np.array_equal(rgba[seen, :3], pixels[seen]) and not rgba[~seen].any()


@cases("roll", [0, 75])
def test_release_finds_and_parses_the_astronaut(monkeypatch, roll):
    monkeypatch.setattr(photo, "find_candidates", find_candidates)
    with Image.open("docs/astronaut.jpg") as image:
        parsed = FaceParser(device="cpu")(image.rotate(-roll, Image.Resampling.BICUBIC))
    (face,) = parsed.faces
    assert face.score > FACE_SCORE and abs(face.angle - roll) < 8
    regions = label_regions(np.asarray(Image.fromarray(parsed.mask).rotate(roll)))
    parts = {"l_eye": (247, 103), "r_eye": (203, 100), "l_brow": (250, 92), "r_brow": (202, 89)}
    for name, place in (parts | {"nose": (224, 117), "u_lip": (223, 141), "l_lip": (223, 150)}).items():
        assert np.hypot(*np.subtract(regions[name]["centroid"], place)) < 12, name


def test_parts_of_a_face_lie_in_its_portrait():
    log_p = torch.full((1, 19, 90, 90), -9.0)
    log_p[:, NAMES.index("cloth")] = -1
    log_p[:, NAMES.index("eye_g"), 40:48, 40:48], log_p[:, NAMES.index("eye_g"), 78:86, 40:48] = 0, 0
    log_p = photo.confine(log_p, False, 0.5)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(1))
    labels = log_p.argmax(1)[0]
    assert (labels[40:48, 40:48] == NAMES.index("eye_g")).all() and (labels[78:86, 40:48] == NAMES.index("cloth")).all()
