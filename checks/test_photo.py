"""Any photo: faces found in drawn pictures and a real one, windows cut and pasted, numbers and cut-outs of a mask.

Most pictures here are masks of drawn faces in their label colours, and `Seer` knows the label of every colour: what is
wrong then is the search or the arithmetic, never a network.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import photo
import predict
from errors import UserError, run_main
from faces import LEAST, USUAL, cut, distinct, find_faces, fit, measure
from images import read_image, read_mask, write_mask
from labels import COLOURS, NAMES
from model import build
from photo import decide, overlap, parse_photo, paste, surround
from regions import by_label, cut_out, describe, parse_labels
from synth import draw_face
from views import label_map, log_probabilities

ONE_VIEW = (False, (1.0,))
HERE = Path(__file__).parents[1]
ASTRONAUT = HERE / "docs/astronaut.jpg"


class Seer:
    """A network that reads the labels off the palette's colours."""

    def __call__(self, view, full_size=False):
        apart = view[:, None, :, ::2, ::2] - torch.tensor(COLOURS)[:, :, None, None] / 255
        return -60 * apart.square().sum(2)


@pytest.fixture(scope="module")
def drawn():
    """Masks of three drawn faces, uint8 (3, 512, 512)."""
    return np.stack([np.asarray(draw_face(seed, 512)[1]) for seed in (3, 4, 5)])


def painted(mask):
    return np.array(COLOURS, np.uint8)[mask]


def composed(masks, windows, height=700, width=1100):
    """A picture of masks (N, 512, 512) shrunk to windows on a blank ground, as labels (height, width)."""
    canvas = np.zeros((height, width), np.uint8)
    for mask, (left, top, side, _) in zip(masks, windows, strict=True):
        small = Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST)
        canvas[top : top + side, left : left + side] = small
    return canvas


WINDOWS = [(30, 60, 230, 230), (420, 260, 400, 400), (860, 20, 200, 200)]


def test_overlap_of_windows():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (5, 0, 10, 10)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 10, 10), (10, 0, 10, 10)) == overlap((0, 0, 4, 4), (-9, -9, 5, 5)) == 0
    assert overlap((0, 0, 4, 4), (1, 1, 2, 1)) == pytest.approx(2 / 16)


def test_a_cut_repeats_the_edge():
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    assert np.array_equal(cut(pixels, (1, 2, 3, 2)), pixels[2:4, 1:4])
    assert np.array_equal(cut(pixels, (-2, 1, 9, 2)), np.pad(pixels[1:3], ((0, 0), (2, 2), (0, 0)), "edge"))
    assert (cut(pixels, (20, 30, 2, 2)) == pixels[-1, -1]).all()


def test_paste_clips_and_gives_a_pixel_to_the_nearer_middle():
    one, two = np.full((4, 4), 1, np.uint8), np.full((4, 4), 2, np.uint8)
    mask, owner = paste(6, 8, [(one, (-2, -1, 4, 4)), (two, (4, 1, 4, 4))])
    assert (mask[:3, :2] == 1).all() and (mask[1:5, 4:] == 2).all()
    assert (mask > 0).sum() == 3 * 2 + 4 * 4 and np.array_equal(owner, mask.astype(int) - 1)
    mask, owner = paste(4, 6, [(one, (0, 0, 4, 4)), (two, (2, 0, 4, 4))])
    assert np.array_equal(mask, np.tile([1, 1, 1, 2, 2, 2], (4, 1)))
    # The same border measured in sides: that between a large and a small one lies nearer to the small one's middle.
    mask, _ = paste(8, 12, [(np.full((8, 8), 1, np.uint8), (0, 0, 8, 8)), (two, (6, 2, 4, 4))])
    assert mask[4].tolist() == [1] * 7 + [2] * 3 + [0] * 2


def test_fit_undoes_scale_and_shift_and_wants_the_parts_in_order():
    usual = torch.tensor(list(USUAL.values()))
    parts = torch.cat([usual, torch.ones(8, 1)], 1)
    parts[7] = 0  # no glasses
    moved = parts * torch.tensor([0.4, 0.4, 0.4, 1]) + torch.tensor([0.3, 0.1, 0, 0])
    moved[7] = 0
    scores, windows = fit(torch.stack([parts, moved]))
    assert torch.allclose(scores, torch.ones(2), atol=1e-3)
    assert torch.allclose(windows, torch.tensor([[0, 0, 1], [0.3, 0.1, 0.4]]), atol=1e-3)
    unsure, upside_down, dark, empty = parts.clone(), parts.clone(), parts.clone(), torch.zeros(8, 4)
    unsure[:, 3] = 0.5
    upside_down[:7, 1] = 1 - parts[:7, 1]
    dark[:2], dark[7, :3], dark[7, 3] = 0, usual[7], 1  # glasses instead of eyes
    scores, _ = fit(torch.stack([unsure, upside_down, dark, empty]))
    assert scores[0] == pytest.approx(0.5, abs=1e-3) and scores[1] < LEAST / 2 and scores[2] > 0.99 and scores[3] == 0


def test_the_true_window_scores_best(drawn):
    size, best = 128, None
    canvas = painted(composed(drawn[:1], [(200, 150, 300, 300)]))
    for left, top, side in ((200, 150, 300), (350, 150, 300), (200, 300, 300), (290, 220, 120), (600, 100, 300)):
        view = Image.fromarray(cut(canvas, (left, top, side, side))).resize((size, size), Image.Resampling.BOX)
        images = torch.from_numpy(np.array(view)).permute(2, 0, 1)[None]
        score = fit(measure(log_probabilities([Seer()], images, size)))[0].item()
        best = best or score
        assert score <= best
    assert best > LEAST


def test_a_group_is_found_and_parsed(drawn):
    true = composed(drawn, WINDOWS)
    parsed = parse_photo([Seer()], painted(true), 128, ONE_VIEW, "cpu")
    assert len(parsed.faces) == 3 and not parsed.missed
    for index, window in enumerate(WINDOWS):
        left, top, side, _ = window
        assert overlap(parsed.faces[index][1], window) > 0.6
        place = np.s_[top : top + side, left : left + side]
        assert (parsed.mask[place] == true[place]).mean() > 0.8
        middle = np.s_[top + side // 3 : top + side * 2 // 3, left + side // 3 : left + side * 2 // 3]
        assert (parsed.owner[middle] == index).all()


def test_of_one_face_the_best_window_is_kept():
    best, beside, within = (0.9, (0, 0, 100, 100)), (0.6, (40, 5, 90, 90)), (0.7, (40, 30, 40, 40))
    assert distinct([beside, within, best]) == [best, beside]
    assert distinct([(0.5, (10, 10, 100, 100)), best]) == [best]


def test_a_face_is_found_beyond_the_edge(drawn):
    whole = composed(drawn[:1], [(300, 100, 400, 400)])
    true = whole[:, 360:]  # a part of the hair is gone
    found = find_faces([Seer()], painted(true), 128, "cpu")
    assert overlap(found[0][1], (-60, 100, 400, 400)) > 0.6


def test_a_portrait_is_parsed_as_before(drawn):
    for mask in drawn:
        pixels = painted(mask)
        parsed = parse_photo([Seer()], pixels, 128, ONE_VIEW, "cpu")
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        wanted = label_map(log_probabilities([Seer()], images, 128), 512, 512)[0].numpy()
        assert np.array_equal(parsed.mask, wanted) and parsed.faces[0][1] == (0, 0, 512, 512) and not parsed.missed
        assert np.array_equal(parse_photo([Seer()], pixels, 128, ONE_VIEW, "cpu", whole=True).mask, wanted)


def test_without_a_face_the_picture_is_taken_as_a_whole():
    parsed = parse_photo([Seer()], painted(np.full((200, 320), 18, np.uint8)), 128, ONE_VIEW, "cpu")
    assert parsed.missed and parsed.mask.shape == (200, 320) and (parsed.mask == 18).all()
    assert parsed.faces == [(None, (0, 0, 320, 200))]


def test_a_box_is_parsed_and_nothing_beside_it(drawn):
    true = composed(drawn, WINDOWS)
    box = (410, 240, 420, 450)
    parsed = parse_photo([Seer()], painted(true), 128, ONE_VIEW, "cpu", box=box)
    inside = np.s_[240:690, 410:830]
    assert (parsed.mask[inside] == true[inside]).mean() > 0.9
    assert (parsed.owner == 0).sum() == 420 * 450 and not parsed.mask[parsed.owner < 0].any()
    with pytest.raises(UserError, match="1100 x 700"):
        parse_photo([Seer()], painted(true), 128, ONE_VIEW, "cpu", box=(1100, 0, 50, 50))


def test_surroundings_end_where_the_portrait_is_sure():
    inner, outer = torch.zeros(1, 2, 40, 40), torch.ones(1, 2, 40, 40)
    joined = surround(inner, outer)
    assert joined.shape == (1, 2, 60, 60) and (joined[:, :, :10] == 1).all() and (joined[:, :, :, 50:] == 1).all()
    assert (joined[:, :, 14:46, 14:46] == 0).all() and 0 < joined[0, 0, 11, 30] < 1


def test_large_pictures_are_decided_coarsely(drawn, monkeypatch):
    fine = parse_photo([Seer()], painted(drawn[0])[:501, :499], 128, ONE_VIEW, "cpu", whole=True).mask
    monkeypatch.setattr(photo, "MOST_PIXELS", 200 * 200)
    coarse = parse_photo([Seer()], painted(drawn[0])[:501, :499], 128, ONE_VIEW, "cpu", whole=True).mask
    assert coarse.shape == fine.shape == (501, 499) and (coarse == fine).mean() > 0.95
    assert decide(torch.zeros(1, 19, 8, 8), 301, 202).shape == (301, 202)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_read_upright(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    # How the camera holds an upright picture, by EXIF 2.3, tag 0x0112: what the stored first row and column show.
    stored = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels), 7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)


def test_numbers_of_a_mask_are_its_pixels():
    mask = np.zeros((20, 30), np.uint8)
    mask[3:7, 5:15], mask[10, 29] = NAMES.index("hair"), NAMES.index("nose")
    numbers = by_label(mask)
    assert numbers["hair"] == {"area": 40, "box": [5, 3, 10, 4], "centroid": [9.5, 4.5]}
    assert numbers["nose"] == {"area": 1, "box": [29, 10, 1, 1], "centroid": [29, 10]}
    assert numbers.keys() == {"background", "nose", "hair"} and sum(n["area"] for n in numbers.values()) == 600


def test_described_faces_add_up_to_the_mask(drawn):
    parsed = parse_photo([Seer()], painted(composed(drawn, WINDOWS)), 128, ONE_VIEW, "cpu")
    told = json.loads(json.dumps(describe(parsed)))
    counts = np.bincount(parsed.mask.ravel(), minlength=19)
    assert {name: told["labels"].get(name, {"area": 0})["area"] for name in NAMES} == dict(
        zip(NAMES, counts, strict=True)
    )
    for label, name in enumerate(NAMES[1:], 1):
        assert sum(face["labels"].get(name, {"area": 0})["area"] for face in told["faces"]) == counts[label]
    assert (told["width"], told["height"], len(told["faces"]), told["face_found"]) == (1100, 700, 3, True)
    left, top, side, _ = WINDOWS[0]
    x, y = told["faces"][0]["labels"]["nose"]["centroid"]
    assert left < x < left + side and top < y < top + side


def test_cut_out_is_clear_where_the_mask_is_not(drawn):
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    labels = parse_labels("hair, hat")
    assert labels == [13, 14]
    rgba, inside = cut_out(pixels, drawn[0], labels), np.isin(drawn[0], labels)
    assert np.array_equal(rgba[..., 3], inside * np.uint8(255)) and 0 < inside.sum() < inside.size
    assert np.array_equal(rgba[inside, :3], pixels[inside]) and not rgba[~inside].any()
    assert {NAMES[label] for label in range(19)} - {NAMES[label] for label in parse_labels("head")} == {
        "background", "neck", "neck_l", "cloth"
    }  # fmt: skip
    for wrong in ("heir", "", "hair;hat"):
        with pytest.raises(UserError, match="--cutout"):
            parse_labels(wrong)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "a.pt"
    content = {"model": "microunet", "model_args": {}, "size": 64, "state_dict": build("microunet").state_dict()}
    checkpoint.save(path, content)
    return path


@pytest.fixture
def run(untrained, monkeypatch, capsys):
    """predict.py's main() with these arguments: its exit status and what it says on stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["predict.py", "--weights", str(untrained), *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            run_main(predict.main)
        return ended.value.code, capsys.readouterr().err

    return call


def test_files_asked_for_are_written(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    asked = ("--input", tmp_path / "a.png", "--output", tmp_path / "out", "--json", "--cutout", "head", "--overlay")
    status, said = run(*asked)
    assert status == 0 and "no face found" in said and said.count("\n") == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "a-overlay.png", "a-cutout.png", "a.json"}
    told = json.loads((tmp_path / "out/a.json").read_text())
    with Image.open(tmp_path / "out/a.png") as mask, Image.open(tmp_path / "out/a-cutout.png") as rgba:
        counts = np.bincount(np.asarray(mask).ravel(), minlength=19)
        assert np.array_equal(np.asarray(rgba)[..., 3] > 0, np.isin(np.asarray(mask), parse_labels("head")))
    assert told["image"] == "a.png" and told["face_found"] is False and told["faces"] == []
    assert {name: n["area"] for name, n in told["labels"].items()} == {NAMES[i]: n for i, n in enumerate(counts) if n}
    assert run(*asked, "--whole") == (0, "")
    told = json.loads((tmp_path / "out/a.json").read_text())
    assert told["face_found"] is None and len(told["faces"]) == 1  # none was looked for


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--box", "1,2,3"), "x,y,w,h"),
        (("--box", "1,2,3,0"), "no area"),
        (("--box", "50,0,9,9"), "40 x 30"),
        (("--box", "0,0,9,9", "--whole"), "not allowed with"),
        (("--cutout", "heir"), "no label heir"),
        (("--output", "."), "would replace it"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("a.png")
    status, said = run("--input", "a.png", "--output", "out", *flags)
    assert status == 2 and told in said and said.count("\n") == 1
    with Image.open("a.png") as image:
        assert image.mode == "RGB"  # not replaced by its mask


def test_the_release_finds_and_parses_the_astronaut(tmp_path):
    model, info = checkpoint.load_model(HERE / "runs/release/best.pt")
    pixels = read_image(ASTRONAUT)
    parsed = parse_photo([model], pixels, info["size"], ONE_VIEW, "cpu")
    write_mask(tmp_path / "mask.png", parsed.mask)
    ((score, window),) = parsed.faces
    assert score > LEAST and overlap(window, (136, 17, 176, 176)) > 0.6
    numbers = by_label(parsed.mask)
    for name, (x, y) in {
        "l_eye": (247, 103), "r_eye": (203, 100), "l_brow": (250, 92), "r_brow": (202, 89), "nose": (224, 117),
        "u_lip": (223, 141), "l_lip": (223, 150), "hair": (226, 66),
    }.items():  # fmt: skip
        assert np.hypot(numbers[name]["centroid"][0] - x, numbers[name]["centroid"][1] - y) < 12, name
    hair = parsed.mask == NAMES.index("hair")
    assert not hair[:, :130].any() and not hair[190:].any()  # neither the flag nor the helmet


@pytest.mark.skipif(not Path("data/train/masks").is_dir(), reason="needs the real masks")
def test_usual_places_are_those_of_the_training_masks():
    measured = {name: [] for name in USUAL}
    for path in sorted(Path("data/train/masks").glob("*.png"))[:300]:
        numbers = by_label(read_mask(path))
        for name in numbers.keys() & USUAL.keys():
            x, y = numbers[name]["centroid"]
            measured[name].append(((x + 0.5) / 512, (y + 0.5) / 512, numbers[name]["area"] ** 0.5 / 512))
    for name, values in measured.items():
        assert np.median(values, 0) == pytest.approx(USUAL[name], abs=0.05 if name == "eye_g" else 0.01), name
