"""Masks of image files of every kind, and the files, images and checkpoints that are refused."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

from common import UserError

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import checkpoint
import ensemble_tta
import predict
from checks.conftest import cases, untrained
from checks.test_data_tools import TURNED, jpeg
from images import read_image, read_mask
from labels import NAMES, PALETTE
from predict import parse_labels
from views import Views, label_map, log_probabilities


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of checkpoints of untrained networks: a.pt and b.pt for 64 pixels, late.pt for 96."""
    folder = tmp_path_factory.mktemp("weights")
    for name, size in (("a", 64), ("b", 64), ("late", 96)):
        untrained(folder / f"{name}.pt", size=size)
    return folder


@pytest.fixture
def run(weights, tmp_path, monkeypatch, command):
    """Call predict.py or ensemble_tta.py in a folder that contains a.png: (exit status, stderr)."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((40, 30), 90).convert("RGB").save("a.png")

    def call(flags, script=predict, checkpoints="a"):
        paths = [weights / f"{name}.pt" for name in checkpoints]
        return command(script.main, "--output=out", *flags.split(), "--weights", *paths)[::2]

    return call


@cases("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "F"])
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (16, 1))
    Image.fromarray(grey).convert(mode).save(tmp_path / "a.tif")
    pixels = read_image(tmp_path / "a.tif")
    assert pixels.shape == (16, 32, 3) and pixels.dtype == np.uint8
    assert abs(pixels[..., 0].astype(int) - grey).max() <= (255 if mode == "1" else 1)


def test_files_of_a_prediction_agree(run, tmp_path):
    status, warning = run("--input=a.png --json --cutout=head --overlay")
    assert status == 0 and "no face found" in warning
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "a-overlay.png", "a-cutout.png", "a.json"}
    image, cutout = (Image.open(tmp_path / "out" / name) for name in ("a.png", "a-cutout.png"))
    assert (image.mode, image.size) == ("P", (40, 30)) and image.getpalette()[: len(PALETTE)] == PALETTE
    mask = np.asarray(image)
    assert np.array_equal(np.asarray(cutout)[..., 3] > 0, np.isin(mask, parse_labels("head")))
    record, counts = json.loads((tmp_path / "out/a.json").read_text()), np.bincount(mask.ravel(), minlength=19)
    assert {k: v["area"] for k, v in record["labels"].items()} == {NAMES[i]: n for i, n in enumerate(counts) if n}


def test_ten_to_sixteen_bits_are_scaled_by_what_they_use(tmp_path):
    for bits in (10, 12, 14, 16):
        grey = np.linspace(0, 2**bits - 1, 512).astype(np.uint16).reshape(16, 32)
        Image.fromarray(grey).save(tmp_path / "a.png")
        assert abs(read_image(tmp_path / "a.png")[..., 0] - grey / (2**bits - 1) * 255).max() < 1, bits
    Image.fromarray(np.float32([[0, 0.5, 1, np.inf, -np.inf, np.nan]])).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 128, 255, 255, 0, 0]


def test_colours_are_converted_to_srgb_and_the_orientation_is_applied(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # sRGB with red and blue exchanged
    exchanged = profile.replace(b"rXYZ", b"bxyz", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"bxyz", b"bXYZ", 1)
    colours = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    turned = Image.fromarray(np.rot90(colours, 2).copy())
    for icc, expected in ((profile, colours), (exchanged, colours[..., ::-1]), (b"damaged", colours)):
        turned.save(tmp_path / "a.png", icc_profile=icc, exif=TURNED)
        assert abs(read_image(tmp_path / "a.png").astype(int) - expected).max() <= 1


def test_a_jpeg_may_lack_its_end_mark_but_no_pixels(tmp_path):
    Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[:-2])
    assert np.array_equal(read_image(tmp_path / "b.jpg"), read_image(tmp_path / "a.jpg"))
    (tmp_path / "b.jpg").write_bytes(whole[:-200])
    with pytest.raises(UserError, match="truncated"):
        read_image(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").write_bytes(whole.replace(b"\xff\xc4\x00\x1f\x00", b"\xff\xc4\x00\x1f\xff", 1))  # a table
    with pytest.raises(UserError, match="broken data stream"):
        read_image(tmp_path / "b.jpg")


def test_crop_shows_only_the_cut_out_which_keeps_the_images_opacity(run, tmp_path):
    rgba = np.zeros((30, 40, 4), np.uint8)
    rgba[5:20, 8:30, 3] = 200
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert set(np.unique(read_image("a.png")[::29])) == {255}  # what is transparent is white
    assert run("--input=a.png --whole --crop --cutout=background,head,neck,neck_l,cloth")[0] == 0
    alpha = np.asarray(Image.open(tmp_path / "out/a-cutout.png"))[..., 3]
    assert alpha.shape == (15, 22) and (alpha == 200).all()


def test_what_was_found_is_said_of_each_image(run, weights, command):
    out = command(predict.main, "--input=a.png", "--output=out", "--whole", "--weights", weights / "a.pt")[1]
    assert "a.png: not searched, 0.0 s" in re.sub(r"\d+\.\d s", "0.0 s", out)


def test_skip_leaves_finished_files(run, tmp_path):
    (tmp_path / "b.png").mkdir()  # no image
    mask = tmp_path / "out/a.png"
    assert run("--input=. --whole")[0] == 0
    whole = mask.read_bytes()
    mask.write_bytes(whole + b"kept")
    assert run("--input=. --whole --skip")[0] == 0 and mask.read_bytes() == whole + b"kept"
    assert run("--input=. --whole --skip --json")[0] == 0 and mask.read_bytes() == whole


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf8_is_no_obstacle(run, tmp_path):
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    assert run("--input=. --whole --json")[0] == 0
    assert json.loads((tmp_path / "out/\udcff.json").read_text())["image"] == "\N{REPLACEMENT CHARACTER}.png"


FAILURES = "0.png: out of memory", "name too long", "bad.jpg", "convert it to JPEG"


def test_unreadable_images_are_named_and_the_others_parsed_until_the_disk_is_full(run, tmp_path, monkeypatch):
    for name in ("0.png", "bad.jpg", "phone.heic"):
        (tmp_path / name).write_bytes(b"no image")
    shutil.copy("a.png", f"{'a' * 245}.png")  # its -overlay.png has too long a name
    read = predict.read_picture
    monkeypatch.setattr(predict, "read_picture", lambda p: np.empty(1 << 50) if p.name == "0.png" else read(p))
    status, error = run("--input=. --whole --overlay")
    for line, text in zip(error.splitlines(), FAILURES, strict=True):
        assert text in line
    assert status == 2 and {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "a-overlay.png"}
    monkeypatch.setattr(predict, "write_results", Mock(side_effect=UserError("cannot write: No space left on device")))
    assert run("--input=. --whole")[1].splitlines()[1:] == ["error: cannot write: No space left on device"]


@cases(
    ("flags", "error"),
    [
        ("--input=a.png --box=1,2,3", "x,y,w,h"),
        ("--input=a.png --box=50,0,9,9", "40 x 30"),
        ("--input=a.png --box=0,0,9,9 --whole", "not allowed with"),
        ("--input=a.png --cutout=heir", "no label heir"),
        ("--input=a.png --size=100", "--size 100"),
        ("--input=a.png --crop", "add --cutout"),
        ("--input=a.png --output=.", "would replace it"),
        ("--input=a.png --output=a-overlay.png", "in the place of a folder"),
        ("--input=. --overlay", "would both become a-overlay.png"),
        ("--input=nowhere", "nowhere"),
    ],
)
def test_invalid_arguments_are_one_line_and_status_2(run, tmp_path, flags, error):
    content = (tmp_path / "a-overlay.png").write_bytes((tmp_path / "a.png").read_bytes())
    status, printed = run(flags)
    assert status == 2 and error in printed and printed.count("\n") == 1
    assert (tmp_path / "a.png").stat().st_size == content


def test_ensemble_averages_predictions_and_warns_that_it_may_not_be_submitted(run, weights, tmp_path):
    status, warning = run("--input=a.png --whole --views=flip", ensemble_tta, "ab")
    assert status == 0 and "forbids" in warning
    networks = [checkpoint.load_model(weights / f"{name}.pt")[0] for name in "ab"]
    pixels = torch.from_numpy(read_image("a.png")).permute(2, 0, 1)[None]
    log_p = log_probabilities(networks, pixels, 64, Views(flip=True))
    assert torch.allclose(log_p.exp().sum(1), torch.tensor(1.0))
    assert np.array_equal(read_mask(tmp_path / "out/a.png"), label_map(log_p, 30, 40)[0].numpy())
    status, error = run("--input=a.png --whole", ensemble_tta, ("a", "late"))
    assert status == 2 and "sizes [64, 96]: choose one with --size" in error


def test_face_parser_takes_paths_images_arrays_and_lists(run, weights, monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", threads := Mock())
    assert predict.FaceParser(weights / "a.pt", device="cpu", size=96, threads=3).size == 96
    threads.assert_called_once_with(3)
    parser = predict.FaceParser(weights / "a.pt", device="cpu", views="flip")
    with Image.open("a.png") as image:
        masks = [parser(given, whole=True).mask for given in ("a.png", image, np.array(image))]
    assert masks[0].shape == (30, 40) and all(np.array_equal(mask, masks[0]) for mask in masks)
    for box, whole in ((1, 2, 3), False), ((1, 2, 3, 0), False), ((1.0, 2, 3, 4), False), ((1, 2, 3, 4), True):
        with pytest.raises(UserError, match="in whole pixels, without whole=True"):
            parser("a.png", box=box, whole=whole)
    assert np.array_equal(parser("a.png", box=np.array([4, 4, 20, 20])).mask, parser("a.png", box=(4, 4, 20, 20)).mask)
    images = list(np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8))
    for settings in ({"whole": True}, {"box": (4, 4, 20, 20)}, {}):
        settings["cutout"] = list(range(10))  # half of the labels, whose probabilities differ between images
        for image, parsed in zip(images, parser(images, **settings), strict=True):
            assert abs(parser(image, **settings).alpha.astype(int) - parsed.alpha).max() <= 1
    assert parser([]) == [] and parser.names[17] == "neck"
    damaged = Image.open(io.BytesIO(jpeg(0, 64)[:-200]))
    for wrong, error in (np.zeros((30, 40, 3)), "uint8"), ([images[0], images[1][1:]], "one size"), (damaged, "trunc"):
        with pytest.raises(UserError, match=error):
            parser(wrong)


def test_as_a_library_predict_changes_nothing_of_its_host():
    script = (
        "import warnings, torch; before = warnings.filters[:]; import predict; assert warnings.filters == before\n"
        "predict.FaceParser(device='cpu')('docs/astronaut.jpg', whole=True); assert warnings.filters == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    blocked = "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\nimport predict"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr
