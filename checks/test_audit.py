"""audit.py and sides.py: each fault is found, and only it; reversed masks are told from sound ones.

    make test
    python -m pytest checks/test_audit.py

The data folders are drawn here, two pairs and one image.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import audit
from labels import PALETTE
from sides import reversed_sides, swap_sides

SOUND = np.zeros((512, 512), np.uint8)
SOUND[200:260, 150:200], SOUND[200:260, 300:350] = 5, 4
SOUND[300:400, 200:300] = 1


def save_image(path, seed, mode="RGB", size=512):
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(grid).resize((size, size)).convert(mode).save(path)


def save_mask(path, labels=SOUND):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(labels)
    mask.putpalette(PALETTE)
    mask.save(path)


@pytest.fixture
def data(tmp_path):
    """Two sound pairs and one dev image."""
    for seed, name in enumerate("ab"):
        save_image(tmp_path / f"train/images/{name}.jpg", seed)
        save_mask(tmp_path / f"train/masks/{name}.png")
    save_image(tmp_path / "dev/images/d.jpg", 2)
    return tmp_path


def found(data):
    return {check: names for check, names in audit.audit(data, workers=1)[0].items() if names}


def run(*arguments):
    return subprocess.run([sys.executable, Path(audit.__file__), *arguments], capture_output=True, text=True)


def test_sound_data_is_clean_with_status_0(data):
    done = run("--data", data)
    assert (done.returncode, done.stderr) == (0, "")


def test_list_names_every_fault_with_status_1(data):
    for name in "pqr":
        save_mask(data / f"train/masks/{name}.png")
    done = run("--data", data, "--list")
    assert done.returncode == 1
    assert [line for line in done.stdout.splitlines() if line.startswith("mask without image: ")] == [
        f"mask without image: train/masks/{name}.png" for name in "pqr"
    ]


@pytest.mark.parametrize("lost", [None, "train/masks"], ids=["no folder", "empty folder"])
def test_nothing_to_audit_is_status_2(lost, tmp_path):
    if lost:
        save_image(tmp_path / "train/images/a.jpg", 0)
        (tmp_path / lost).mkdir()
    done = run("--data", tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_image_without_mask(data):
    save_image(data / "train/images/c.jpg", 9)
    assert found(data) == {"image without mask": ["train/images/c.jpg"]}


def test_damaged_file_is_unreadable(data):
    path = data / "train/images/a.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    assert found(data) == {"unreadable": ["train/images/a.jpg"]}


def test_wrong_size_of_image_and_mask(data):
    save_image(data / "dev/images/d.jpg", 2, size=256)
    save_mask(data / "train/masks/a.png", SOUND[:, :500].copy())
    assert found(data) == {"not 512 x 512": ["dev/images/d.jpg", "train/masks/a.png"]}


def test_grey_image(data):
    save_image(data / "train/images/b.jpg", 1, mode="L")
    assert found(data) == {"image not RGB": ["train/images/b.jpg"]}


def test_colour_mask(data):
    Image.open(data / "train/masks/b.png").convert("RGB").save(data / "train/masks/b.png")
    assert found(data) == {"mask not P or L": ["train/masks/b.png"]}


def test_label_above_18(data):
    Image.fromarray(np.full((512, 512), 19, np.uint8)).save(data / "train/masks/b.png")
    assert found(data) == {"label above 18": ["train/masks/b.png"]}


def test_same_pixels_in_another_split_and_format(data):
    Image.open(data / "train/images/a.jpg").save(data / "dev/images/copy.png")
    assert found(data) == {"same picture twice": ["dev/images/copy.png = train/images/a.jpg"]}


def test_name_used_twice(data):
    save_image(data / "train/images/a.png", 9)
    assert found(data) == {"name used twice": ["train/images/a.jpg", "train/images/a.png"]}


def test_file_of_another_type(data):
    (data / "train/masks/notes.txt").write_text("")
    assert found(data) == {"file of another type": ["train/masks/notes.txt"]}


def test_reversed_mask_and_its_remark(data):
    save_mask(data / "train/masks/b.png", swap_sides(SOUND))
    done = run("--data", data)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        0,
        f"{data}: 5 files, 2 masks counted, 0 faults; "
        "masks with sides reversed, here 1, are no faults: training repairs them",
    )


def test_shares_of_labels(data):
    save_mask(data / "train/masks/b.png", np.zeros((512, 512), np.uint8))
    faults, pixels, files = audit.audit(data, workers=1)
    skin = next(line for line in audit.report(faults, pixels, files, data).splitlines() if line.startswith(" 1 skin"))
    # 100 x 100 pixels in one of two masks.
    assert skin.split()[2:] == [f"{100 * 10000 / 512**2 / 2:.2f}", "50.0"]


def strip(*labels):
    return np.array([labels], np.uint8)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (strip(5, 0, 4), False),
        (strip(4, 0, 5), True),
        (strip(8, 6, 4, 5, 7, 9), True),
        (strip(8, 7, 4, 5, 6, 9), False),
        (strip(4, 1, 0), False),
        (strip(4, 1, 7), False),
        (strip(0, 1, 13), False),
        (strip(4, 5, 4), False),
        (strip(4, 0, 5, 4), True),
    ],
    ids=["sound", "eyes", "all", "pairs disagree", "one eye", "no pair", "no sides", "centroids equal", "mean decides"],
)
def test_reversed_sides(mask, expected):
    assert reversed_sides(mask) is expected


def test_mirrored_mask_is_reversed_until_swapped():
    mirrored = SOUND[:, ::-1]
    assert (reversed_sides(mirrored), reversed_sides(swap_sides(mirrored))) == (True, False)


def test_swap_exchanges_the_six_labels_and_no_other():
    swapped = [0, 1, 2, 3, 5, 4, 7, 6, 9, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert swap_sides(np.arange(19, dtype=np.uint8)).tolist() == swapped


def test_swap_refuses_a_label_above_18():
    with pytest.raises(IndexError):
        swap_sides(strip(0, 19))
