"""tools/prepare.py and tools/synth.py, on tiny data sets made here."""

import io
import itertools

from common import UserError

import numpy as np
import pytest
from PIL import Image

from checks.conftest import cases, contents, encoded, write
from data import SYNTHETIC_MARKER, reversed_sides, swap_sides
from images import mask_image, read_mask
from labels import COLOURS, NAMES, NUM_CLASSES, PALETTE
from tools import prepare, synth
from tools.package import write_zip

SIZE = 32
TURNED = Image.Exif()
TURNED[0x0112] = 3
LABELS = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) // 8 % NUM_CLASSES).astype(np.uint8)
MASK = np.zeros((512, 512), np.uint8)
MASK[200:260, 150:200], MASK[200:260, 300:350], MASK[300:400, 200:300] = 5, 4, 1


def jpeg(seed=0, size=SIZE):
    grid = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))
    return encoded(grid.resize((size, size)), "JPEG")


def challenge():
    names = ("train/images/a.jpg", "train/images/b.jpg", "test/images/t.jpg", "val/images/v.jpg")
    masks = dict.fromkeys(("train/masks/a.png", "train/masks/b.png"), encoded(mask_image(LABELS)))
    return masks | {name: jpeg(seed) for seed, name in enumerate(names)}


def release():
    """Three portraits: skin on the left half, hair on the upper half and over the skin."""
    skin, hair = np.zeros((2, 64, 64), np.uint8)
    skin[:, :32] = hair[:32] = 255
    files = {f"CelebA-HQ-img/{number}.jpg": jpeg(number, 64) for number in (0, 1, 2000)}
    for number, (part, pixels) in itertools.product((0, 1, 2000), {"hair": hair, "skin": skin}.items()):
        name = f"CelebAMask-HQ-mask-anno/{number // 2000}/{number:05d}_{part}.png"
        files[name] = encoded(Image.fromarray(pixels).convert("RGB"))
    return files


def pack(files, path):
    """Write {name: bytes} to a folder or zip, which is returned."""
    write_zip(path, files) if path.suffix == ".zip" else write(files, path)
    return path


def run_prepare(raw, out, count=None):
    return prepare.prepare(raw, out, count, SIZE)[1]


@cases("raw", ["folder", "raw.zip", "windows.zip"])
def test_prepare_challenge(raw, tmp_path):
    files = {f"./top/{name}": content for name, content in challenge().items()}
    files |= {"__MACOSX/top/train/images/._a.jpg": b"", "top/train/images/.hidden.jpg": b""}
    if raw == "windows.zip":
        files = {name.replace("/", "\\"): content for name, content in files.items()}
    run_prepare(pack(files, tmp_path / raw), tmp_path / "out")
    # Images of the right size are copied byte for byte.
    made = {name: content for name, content in contents(tmp_path / "out").items() if not name.startswith(".")}
    assert made == {name.replace("val/", "dev/"): data for name, data in challenge().items()}


@cases("raw", ["folder", "raw.zip"])
def test_prepare_release_paints_in_label_order(raw, tmp_path):
    run_prepare(pack(release(), tmp_path / raw), tmp_path / "out")
    skin, hair = NAMES.index("skin"), NAMES.index("hair")
    with Image.open(tmp_path / "out/train/images/02000.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIZE, SIZE))
    with Image.open(tmp_path / "out/train/masks/02000.png") as mask:
        assert mask.getpalette()[: len(PALETTE)] == PALETTE
        assert np.array_equal(mask, np.kron([[hair, hair], [skin, 0]], np.ones((SIZE // 2, SIZE // 2))))
    run_prepare(tmp_path / raw, tmp_path / "two", count=2)
    assert [p.name for p in sorted((tmp_path / "two/train/images").iterdir())] == ["00000.jpg", "00001.jpg"]


def with_palette(palette):
    image = mask_image(LABELS)
    image.putpalette(palette)
    return image


FORMS = {  # of a mask; of the last ones colours or labels are wrong
    "labels": Image.fromarray(LABELS),
    "colours": Image.fromarray(np.array(COLOURS, np.uint8)[LABELS]),
    "large": mask_image(LABELS.repeat(2, 0).repeat(2, 1)),
    "optimised": mask_image(LABELS).remap_palette([18, *range(18)]),
    "black": with_palette([0] * 57),
    "grey": with_palette([value for value in range(256) for _ in range(3)]),
    "colours of no label": with_palette([0, 0, 0, 128, 0, 0, 0, 128, 0, *[9] * 48]),
    "255.*leave out the pair": mask_image(np.where(LABELS == 3, 255, LABELS).astype(np.uint8)),
}


@cases("form", FORMS)
def test_masks_are_read_by_their_palette(form, tmp_path):
    raw = write(challenge() | {"train/masks/a.png": encoded(FORMS[form])}, tmp_path / "raw")
    if " " in form:
        with pytest.raises(UserError, match=form):
            read_mask(raw / "train/masks/a.png")
        return
    run_prepare(raw, tmp_path / "out")
    with Image.open(tmp_path / "out/train/masks/a.png") as image:
        assert image.mode == "P" and np.array_equal(image, LABELS)


@cases("raw", ["folder", "raw.zip"])
def test_prepare_resumes_but_not_from_another_raw(raw, tmp_path):
    raw = pack(challenge(), tmp_path / raw)
    out = raw / "out" if raw.is_dir() else tmp_path / "out"  # not read again
    assert run_prepare(raw, out) == 6
    (out / "train/masks/b.png").rename(out / "train/masks/.b.png.a1b2c3d4.tmp")
    assert (run_prepare(raw, out), run_prepare(raw, out), len(list(out.rglob("*.*g")))) == (1, 0, 6)
    pack(challenge() | {"train/images/b.jpg": jpeg(7)}, raw)
    with pytest.raises(UserError, match="another RAW"):
        run_prepare(raw, out)


REFUSED = {
    "cannot read train/images/a.jpg": {"train/images/a.jpg": b""},
    "cannot read train/masks/a.png": {"train/masks/a.png": encoded(mask_image(LABELS))[:-60]},
    "cannot read test/images/t.jpg": {"test/images/t.jpg": encoded(Image.new("L", (100, 100)))},
    "b.png, PNG of mode RGB, is no PNG of labels": {
        "train/masks/b.png": encoded(Image.new("RGB", (SIZE, SIZE), (1, 2, 3)))
    },
    "b.png contains label 19": {"train/masks/b.png": encoded(Image.new("L", (SIZE, SIZE), 19))},
    "b.png, PNG of mode I;16, is no": {"train/masks/b.png": encoded(Image.new("I;16", (SIZE, SIZE), 1))},
    "b.png, JPEG of mode RGB, is no": {"train/masks/b.png": jpeg()},
    "1 training images without a mask, such as c": {"train/images/c.jpg": jpeg()},
    "1 training masks without an image, such as c": {"train/masks/c.png": b""},
    "train/images/a.jpg and train/images/a.png are the same": {"train/images/a.png": b""},
    "must contain either": {"CelebA-HQ-img/0.jpg": b""},
    "b/train/images/x.jpg and .* are of two": {"b/train/images/x.jpg": b"", "b/train/masks/x.png": b""},
    "00000_nostril.png is not NUMBER_PART": {"CelebAMask-HQ-mask-anno/0/00000_nostril.png": b""},
    "differ in size": {"CelebAMask-HQ-mask-anno/0/00000_nose.png": encoded(Image.new("L", (9, 9)))},
    "not the same picture": {"train/masks/a.png": encoded(Image.new("L", (SIZE, SIZE // 2)))},
    "EXIF orientation": {"train/images/a.jpg": encoded(Image.new("RGB", (SIZE, SIZE)), exif=TURNED)},
}


@cases("reason", REFUSED)
def test_prepare_refuses(reason, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)  # Pillow refuses twice as many
    base = release() if "mask-anno" in str(REFUSED[reason]) else challenge()
    with pytest.raises(UserError, match=reason):
        run_prepare(pack(base | REFUSED[reason], tmp_path / "raw.zip"), tmp_path / "out")


@pytest.fixture
def data(tmp_path):
    """Two pairs and one dev image without faults."""
    mask = encoded(mask_image(MASK))
    files = {f"train/masks/{name}.png": mask for name in "ab"}
    files |= {f"train/images/{name}.jpg": jpeg(seed, 512) for seed, name in enumerate("ab")}
    return write(files | {"dev/images/d.jpg": jpeg(2, 512)}, tmp_path)


AUDITED = [
    ("train/images/c.jpg", jpeg(9, 512), "image without mask"),
    ("train/masks/c.png", encoded(mask_image(MASK)), "mask without image"),
    ("train/images/a.webp", jpeg(9, 512), "name of another file"),
    ("train/images/b.jpg", encoded(Image.open(io.BytesIO(jpeg(1, 512))), exif=TURNED), "EXIF orientation"),
    ("train/masks/b.png", encoded(mask_image(MASK[:, :500].copy())), "not 512 x 512"),
    ("train/masks/b.png", jpeg(1, 512), "file, JPEG of mode RGB, is no PNG of labels or their colours"),
    ("train/masks/b.png", encoded(mask_image(swap_sides(MASK))), prepare.REVERSED),
    ("dev/images/copy.png", encoded(Image.open(io.BytesIO(jpeg(1, 512)))), "same pixels as {}/train/images/b.jpg"),
]


@cases(("name", "content", "fault"), AUDITED, ids=range(len(AUDITED)))
def test_audit_finds_one_fault(name, content, fault, command, data):
    assert prepare.audit(data) == {}
    write({name: content}, data)
    assert prepare.audit(data) == {fault.format(data): [data / name]}
    status, out, _ = command(prepare.main, "--check", "--data", data, "--list=1")
    assert status == int(fault != prepare.REVERSED) and f"{fault.format(data)} (1): {data / name}" in out


@pytest.fixture(scope="module")
def faces():
    return [synth.draw_face(seed, 128) for seed in range(150)]


def test_synth_format_and_seed(faces):
    assert len({image.tobytes() for image, _ in faces}) == len(faces)
    assert [image.tobytes() for image in faces[0]] == [image.tobytes() for image in synth.draw_face(0, 128)]
    for image, mask in faces:
        assert (image.mode, image.size, mask.mode, mask.size) == ("RGB", (128, 128), "P", (128, 128))
        assert mask.getpalette()[: len(PALETTE)] == PALETTE and np.max(mask) < NUM_CLASSES
        assert reversed_sides(np.asarray(mask)[:, ::-1])  # the person's left is at the image's right


def test_synth_label_rates(faces):
    # % of pixels and of masks in the challenge's masks
    pixels = (28.7, 25.4, 2.1, 0.3, 0.2, 0.2, 0.4, 0.4, 0.5, 0.4, 0.3, 0.4, 0.7, 31.3, 1.1, 0.2, 0.01, 4.1, 3.3)
    present = (100, 100, 100, 6, 97, 97, 97, 96, 53, 48, 57, 100, 100, 97, 5, 23, 4, 98, 60)
    counts = np.array([np.bincount(np.ravel(mask), minlength=NUM_CLASSES) for _, mask in faces])
    assert (counts.sum(0) > 0).all()
    assert (abs(100 * (counts > 0).mean(0) - present) < 15).all()
    ratio, common = 100 * counts.sum(0) / counts.sum() / pixels, np.array(present) > 40
    assert (ratio[common] > 0.6).all() and (ratio[common] < 1.6).all()


def test_synth_image_and_mask_agree(faces):
    """The image changes more along the borders of the mask than along the same borders moved by 6 pixels."""
    steps = np.stack([abs(np.diff(np.float32(image.convert("L")), axis=1)) for image, _ in faces])
    borders = np.diff(np.stack([np.asarray(mask) for _, mask in faces]).astype(int), axis=2) != 0
    assert steps[borders].mean() > 1.5 * steps[np.roll(borders, 6, axis=1)].mean()


def test_synth_resumes(command, tmp_path):
    root, flags = tmp_path / "faces", (synth.main, "--out", tmp_path / "faces", "--train=3", "--size=64")
    assert "19 new faces" in command(*flags)[1]
    made = contents(root)
    assert len(made) == 2 * 3 + 8 + 8 + 1 and SYNTHETIC_MARKER in made
    (root / "train/masks/train_00001.png").unlink()
    assert "1 new faces" in command(*flags)[1] and contents(root) == made
    synth.make_dataset(tmp_path / "again", 3, size=64)
    assert contents(tmp_path / "again") == made


def test_mistakes_are_refused(refused, tmp_path):
    raw, other = write(challenge(), tmp_path / "raw"), write({"train/images/mine.jpg": b""}, tmp_path / "other")
    text, new, faces = write({"text.zip": b"no zip"}, tmp_path) / "text.zip", tmp_path / "new", tmp_path / "faces"
    synth.make_dataset(faces, 1, 1, 1, size=64)
    for tool, flags, reason in (
        (prepare, ("--raw", tmp_path / "missing", "--data", new), "No such file"),
        (prepare, ("--raw", text, "--data", new), "cannot read"),
        (prepare, ("--raw", raw, "--data", tmp_path), "lies in the output"),
        (prepare, ("--raw", raw, "--data", other), "1 files not from"),
        (prepare, ("--check", "--data", tmp_path / "missing"), "no data folder"),
        (prepare, ("--check", "--data", raw / "test"), "no such file or folder"),
        (synth, ("--out", text / "faces"), "place of a folder"),
        (synth, ("--out", other), "other files"),
        (synth, ("--out", faces, "--size=128"), "another --size"),
        (synth, ("--out", new, "--size=0"), "not an integer from 1"),
    ):
        assert reason in refused(tool.main, *flags)
    assert not new.exists()
