"""Prediction: views, sizes, modes, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import views
from ensemble_tta import average_weights
from errors import UserError
from images import read_image
from labels import FLIP, PALETTE
from model import build
from views import input_size, label_map, log_probabilities, parse_views, resize


def run(script, *args):
    return subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two checkpoints of an untrained network that looks at 64 pixels."""
    folder = tmp_path_factory.mktemp("weights")
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        model = build("microunet")
        content = {"model": "microunet", "model_args": {}, "size": 64, "state_dict": model.state_dict()}
        checkpoint.save(folder / f"{name}.pt", content)
    return folder


def test_views_by_name_and_number():
    assert parse_views("") == (False, (1.0,))
    assert parse_views("flip") == (True, (1.0,))
    assert parse_views("flip,scales") == (True, (0.75, 1.0, 1.25))
    assert parse_views("1, 1.5") == (False, (1.0, 1.5))
    for wrong in ("flop", "0", "nan", "99"):
        with pytest.raises(UserError, match="--views"):
            parse_views(wrong)


def test_flipped_view_makes_the_mask_of_a_mirrored_image_the_mirrored_mask(weights):
    model, _ = checkpoint.load_model(weights / "a.pt")
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    here, there = (log_probabilities([model], x, 64, (True, (1.0,))) for x in (images, images.flip(3)))
    assert torch.allclose(here, there[:, FLIP].flip(3), atol=1e-4)


def test_probabilities_add_up_to_one(weights):
    models = [checkpoint.load_model(weights / f"{name}.pt")[0] for name in "ab"]
    images = torch.randint(0, 256, (1, 3, 80, 64), dtype=torch.uint8)
    log_p = log_probabilities(models, images, 64, parse_views("flip,scales"))
    assert torch.allclose(log_p.exp().sum(1), torch.ones(()), atol=1e-4)
    assert label_map(log_p, 80, 64).shape == (1, 80, 64)


@pytest.mark.parametrize("model", ["microsegformer", "microunet"])
def test_images_a_few_at_a_time_give_the_logits_of_all_at_once(model, monkeypatch):
    network, images = build(model).eval(), torch.rand(5, 3, 64, 96)
    with torch.inference_mode():
        whole = network(images, full_size=False)
        monkeypatch.setattr(views, "PART_PIXELS", 2 * 64 * 96)
        parts = views.logits(network, images)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_labels_are_the_likeliest_of_the_upsampled_maps(monkeypatch):
    log_p = torch.randn(3, 19, 20, 24)
    full = torch.nn.functional.interpolate(log_p, size=(90, 70), mode="bilinear", align_corners=False)
    assert torch.equal(label_map(log_p, 90, 70), full.argmax(1).byte())
    monkeypatch.setattr(views, "WHOLE_PIXELS", 1)
    assert torch.equal(label_map(log_p, 90, 70), full.argmax(1).byte())


def test_input_keeps_the_shape_of_the_picture():
    assert input_size(512, 512, 256) == (256, 256)
    assert input_size(512, 512, 256, 1.25) == (320, 320)
    assert input_size(200, 800, 256) == (128, 512)
    assert input_size(1, 5000, 256)[0] == 32


def test_resize_averages_areas():
    images = torch.randint(0, 256, (1, 3, 12, 12), dtype=torch.uint8)
    wanted = images.float().div(255).view(1, 3, 4, 3, 4, 3).mean((3, 5))
    assert torch.allclose(resize(images, 4, 4), wanted, atol=1e-6)
    assert torch.allclose(resize(images, 12, 12), images.float() / 255)
    assert resize(images, 5, 7).shape == (1, 3, 5, 7) and resize(images, 24, 30).shape == (1, 3, 24, 30)


MODES = ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (16, 1))
    image = Image.fromarray(grey)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32))
    else:
        image = image.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.tif" if mode in ("F", "I;16") else "a.png")
    image.save(path)
    pixels = read_image(path)
    assert pixels.shape == (16, 32, 3) and pixels.dtype == np.uint8
    tolerance = 255 if mode == "1" else 12
    assert abs(pixels[..., 0].astype(int) - grey).max() <= tolerance and pixels[:, -1].min() > 200


@pytest.mark.parametrize(
    ("values", "brightest"),
    [(np.uint16([0, 1]), 1), (np.uint16([0, 300]), 1), (np.float32([0, 1]), 255), (np.float32([0, 300]), 255)],
)
def test_the_range_of_deep_greys_is_told_by_their_largest(tmp_path, values, brightest):
    Image.fromarray(values[None]).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [0, brightest]


def test_exif_orientation_is_followed(tmp_path):
    image = Image.new("RGB", (20, 10), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (20, 10, 3)


def test_masks_have_the_picture_s_size_and_the_palette(weights, tmp_path):
    (tmp_path / "in").mkdir()
    for name, size in (("wide", (90, 40)), ("tiny", (1, 1))):
        Image.new("RGB", size, "red").save(tmp_path / "in" / f"{name}.png")
    done = run(
        "predict.py",
        "--input",
        tmp_path / "in",
        "--output",
        tmp_path / "out",
        "--weights",
        weights / "a.pt",
        "--overlay",
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "wide.png") as mask:
        assert (mask.mode, mask.size) == ("P", (90, 40)) and mask.getpalette()[: len(PALETTE)] == PALETTE
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "wide.png", "wide-overlay.png", "tiny.png", "tiny-overlay.png"
    }  # fmt: skip


def test_a_bad_image_is_named_and_the_others_are_done(weights, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "phone.heic").write_bytes(b"no image to Pillow")
    asked = ("--input", tmp_path / "in", "--output", tmp_path / "out", "--whole")
    done = run("predict.py", *asked, "--weights", weights / "a.pt")
    assert done.returncode == 2 and "bad.jpg" in done.stderr and done.stderr.count("\n") == 2
    assert "save it as JPEG" in done.stderr.splitlines()[1]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "damaged"),
        (b"\x80\x04junk", "damaged"),
        ("truncated", "damaged"),
        ({"weights": 1}, "lacks"),
        ({"model": "other", "model_args": {}, "state_dict": {}, "size": 64}, "unknown network"),
        ({"model": "microunet", "model_args": {"wings": 2}, "state_dict": {}, "size": 64}, "does not fit"),
        ({"model": "microsegformer", "model_args": {}, "state_dict": {}, "size": 64}, "another network"),
    ],
)
def test_bad_checkpoints_are_refused(weights, tmp_path, content, told):
    path = tmp_path / "bad.pt"
    if content == "truncated":
        path.write_bytes((weights / "a.pt").read_bytes()[:100_000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=told):
        checkpoint.load_model(path)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"state_dict": Trap(), "model": "microunet", "model_args": {}}, tmp_path / "trap.pt")
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


def test_files_that_would_take_one_name_are_refused(weights, tmp_path):
    for name in ("a.png", "a-overlay.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    arguments = ("predict.py", "--input", tmp_path, "--output", tmp_path / "out", "--weights", weights / "a.pt")
    done = run(*arguments, "--overlay")
    assert done.returncode == 2 and "would both become a-overlay.png" in done.stderr
    assert not (tmp_path / "out").exists()


def test_averaged_weights_are_the_mean(weights):
    content = average_weights([weights / "a.pt", weights / "b.pt"])
    parts = [checkpoint.load(weights / f"{name}.pt")["state_dict"]["classifier.weight"] for name in "ab"]
    assert torch.allclose(content["state_dict"]["classifier.weight"], (parts[0] + parts[1]) / 2)


def test_an_average_is_for_the_largest_size_and_knows_whether_all_were_validated(weights, tmp_path):
    content = checkpoint.load(weights / "a.pt")
    checkpoint.save(tmp_path / "late.pt", {**content, "size": 96, "validated": True})
    late = tmp_path / "late.pt"
    for paths in ([late, weights / "a.pt"], [weights / "a.pt", late]):
        assert average_weights(paths)["size"] == 96
    assert average_weights([late, late])["validated"] and not average_weights([late, weights / "a.pt"])["validated"]
    done = run("ensemble_tta.py", "--input", "x", "--output", tmp_path, "--weights", weights / "a.pt", late)
    assert done.returncode == 2 and "give one with --size" in done.stderr


def test_an_ensemble_says_it_may_not_be_submitted(weights, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    done = run(
        "ensemble_tta.py", "--input", tmp_path / "a.png", "--output", tmp_path / "out", "--views", "flip",
        "--weights", weights / "a.pt", weights / "b.pt",
    )  # fmt: skip
    assert done.returncode == 0 and "forbids" in done.stderr and (tmp_path / "out/a.png").is_file()
