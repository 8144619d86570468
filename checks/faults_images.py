"""Bad images and masks: each is handled rightly or refused by one line that names it, and the others are done."""

import io
import os
import shutil
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

from checks.attempt import run
from labels import COLOURS, PALETTE

SIDE = 512


def attack(ledger, place, short):
    predict_images(ledger, place)
    train_on_masks(ledger, place, short)
    offer_conversion(ledger, place)
    if not short:
        mutate(ledger, place)


def photo(width=40, height=30):
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray((np.dstack([columns, rows, rows + columns]) % 256).astype(np.uint8))


def saved(image, kind="PNG", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def png(width, height, *, colour=2, depth=8, data=b""):
    """The bytes of a PNG that claims any size and holds any data."""
    head = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def good_images():
    """{name: (bytes, size of the mask)} of what must be handled."""
    image, grey = photo(), photo().convert("L")
    see_through = Image.merge("RGBA", [*image.split(), grey])
    palette = image.quantize(8)
    frames = [image, ImageOps.mirror(image)]
    names = {
        "plain.png": saved(image), "plain.jpg": saved(image, "JPEG"), "plain.webp": saved(image, "WEBP"),
        "plain.bmp": saved(image, "BMP"), "plain.gif": saved(image, "GIF"), "plain.tif": saved(image, "TIFF"),
        "one-pixel.png": saved(photo(1, 1)), "tall.png": saved(photo(1, 5000)), "wide.png": saved(photo(5000, 1)),
        "grey.jpg": saved(grey, "JPEG"), "grey-alpha.png": saved(see_through.convert("LA")),
        "bilevel.png": saved(grey.convert("1")), "alpha.png": saved(see_through),
        "clear.png": saved(Image.new("RGBA", (40, 30))), "palette-clear.png": saved(palette, transparency=3),
        "palette-alpha.png": saved(palette, transparency=bytes(range(8))),
        "rgb-key.png": saved(image, transparency=(0, 0, 0)),
        "cmyk.jpg": saved(image.convert("CMYK"), "JPEG"), "cmyk.tif": saved(image.convert("CMYK"), "TIFF"),
        "ycbcr.tif": saved(image.convert("YCbCr"), "TIFF"), "lab.tif": saved(image.convert("LAB"), "TIFF"),
        "deep.png": saved(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)),
        "deep-rgb.png": png(40, 30, depth=16, data=zlib.compress(bytes(30 * (1 + 40 * 6)))),
        "int32.tif": saved(grey.convert("I"), "TIFF"), "float.tif": saved(grey.convert("F"), "TIFF"),
        "float-odd.tif": saved(Image.fromarray(np.float32([[np.nan, np.inf], [-np.inf, 1e30]])), "TIFF"),
        "animated.gif": saved(image, "GIF", save_all=True, append_images=frames[1:]),
        "animated.png": saved(image, save_all=True, append_images=frames[1:]),
        "animated.webp": saved(image, "WEBP", save_all=True, append_images=frames[1:]),
        "exif.jpg": saved(image, "JPEG", exif=rotated()), "progressive.jpg": saved(image, "JPEG", progressive=True),
        "really-a-jpeg.png": saved(image, "JPEG"), "really-a-png.jpg": saved(image), "UPPER.PNG": saved(image),
        "exif-torn.jpg": saved(image, "JPEG", exif=rotated().tobytes()[:-9]),
        "large.png": saved(Image.new("L", (3000, 2000), 90)),
        "with space.png": saved(image), "Gesicht-äöü-脸-🙂.png": saved(image), "new\nline.png": saved(image),
        "-dash.png": saved(image), "quote\"'.png": saved(image), "$(touch x).png": saved(image),
        "two.dots.png": saved(image), "escape\x1b[31m.png": saved(image), "bytes-\udcff.png": saved(image),
    }  # fmt: skip
    sizes = {
        "one-pixel.png": (1, 1), "tall.png": (1, 5000), "wide.png": (5000, 1), "exif.jpg": (30, 40),
        "exif-torn.jpg": None, "float-odd.tif": (2, 2), "large.png": (3000, 2000),
    }  # fmt: skip
    return {name: (data, sizes.get(name, (40, 30))) for name, data in names.items()}


def bad_images():
    """{name: bytes} of what must be refused and named."""
    whole, jpeg = saved(photo()), saved(photo(), "JPEG")
    tiff = saved(photo(), "TIFF")
    return {
        "empty.png": b"", "text.jpg": b"This is no image.\n", "page.png": b"<html><body>404</body></html>",
        "cut.png": whole[: len(whole) // 2], "cut.jpg": jpeg[: len(jpeg) // 2], "cut.tif": tiff[: len(tiff) // 2],
        "header.png": whole[:20], "header.jpg": jpeg[:3], "cut.webp": saved(photo(), "WEBP")[:60],
        "bomb.png": png(50_000, 50_000, data=zlib.compress(bytes(1000))),
        "bomb.gif": b"GIF89a" + struct.pack("<2H", 65535, 65535) + b"\0\0\0," + struct.pack("<4H", 0, 0, 65535, 65535)
        + b"\0\x02\x02\x4c\x01\0;",
        "none.png": png(0, 0), "no-data.png": png(40, 30), "wrong-data.png": png(40, 30, data=b"nonsense"),
        "checksum.png": whole.replace(b"IDAT", b"IDAX"),
        "zip.png": b"PK\x03\x04" + bytes(100), "script.png": b"#!/bin/sh\ntouch x\n", "bad\nname.png": b"",
        "bad-\udcff.png": b"", "bad\x1b[31m.png": b"",
    }  # fmt: skip


def predict_images(ledger, place):
    """predict.py on a folder of all of them: masks for the good ones, a line for each bad one, status 2."""
    good, bad, folder, out = good_images(), bad_images(), place.root / "pictures", place.root / "their masks"
    folder.mkdir()
    for i, (name, data) in enumerate([*((n, d) for n, (d, _) in good.items()), *bad.items()]):
        (folder / f"{i:02}{name}").write_bytes(data)  # numbers: no two share a stem
    stems = {name: f"{i:02}{name}".rpartition(".")[0] for i, name in enumerate(good)}
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "nowhere.jpg").symlink_to("nothing.jpg")
    os.mkfifo(folder / "pipe.png")
    attempt = run("predict.py", "--whole", "--weights", place.weights, "--input", folder, "--output", out)
    lines = attempt.err.splitlines()
    common = attempt.trouble() or ("" if attempt.status == 2 else f"status {attempt.status}")
    for name, (_, size) in good.items():
        path = out / f"{stems[name]}.png"
        problem = common
        if not problem and not path.is_file():
            problem = f"no mask: {[line for line in lines if name.split('.')[0] in line]}"
        if not problem:
            with Image.open(path) as mask:
                if mask.mode != "P" or size not in (None, mask.size) or mask.getpalette()[: len(PALETTE)] != PALETTE:
                    problem = f"a mask of mode {mask.mode} and size {mask.size}, not {size}"
        ledger.add("images", "handled", problem and f"{name!r}: {problem}")
    for name in [*bad, "folder.png", "loop.png", "nowhere.jpg", "pipe.png"]:
        shown = "".join(c if c.isprintable() else "?" for c in " ".join(name.split()))
        told = [line for line in lines if shown in line and line.startswith("error:")]
        problem = common or ("" if len(told) == 1 else f"told in {len(told)} lines: {told}")
        ledger.add("images", "refused", problem and f"{name!r}: {problem}")
    extra = len(lines) - len(bad) - 4
    ledger.add("images", "refused", common or (f"{extra} lines too many: {lines}" if extra else ""))
    shutil.rmtree(folder)


def labels():
    return (np.indices((SIDE, SIDE)).sum(0) // 64 % 17).astype(np.uint8)


def mask_image(values=None, mode="P"):
    image = Image.fromarray(labels() if values is None else values)
    if mode == "P":
        image.putpalette(PALETTE)
    return image


def bad_masks():
    """{case: (bytes, what is told)} of masks that a training must refuse."""
    high = labels()
    coloured = Image.fromarray(np.uint8(COLOURS)[labels()])
    return {
        "in colours": (saved(coloured), "holds the labels' colours"),
        "in colours with alpha": (saved(coloured.convert("RGBA")), "holds the labels' colours"),
        "in other colours": (saved(photo(SIDE, SIDE)), "mode RGB"),
        "a JPEG": (saved(mask_image(mode="L"), "JPEG"), "is a JPEG"),
        "smaller": (saved(mask_image(labels()[:256, :256])), "256 x 256"),
        "one pixel": (saved(mask_image(labels()[:1, :1])), "1 x 1"),
        "16-bit": (saved(Image.fromarray(labels().astype(np.uint16))), "mode I"),
        "bilevel": (saved(Image.fromarray(labels() > 8)), "mode 1"),
        "with grey and alpha": (saved(mask_image(mode="L").convert("LA")), "mode LA"),
        "of label 19": (saved(mask_image(np.where(high == 3, 19, high).astype(np.uint8))), "label 19"),
        "of label 255": (saved(mask_image(np.full((SIDE, SIDE), 255, np.uint8), "L")), "label 255"),
        "cut": (saved(mask_image())[:300], "cannot read mask"),
        "empty": (b"", "cannot read mask"),
        "no image": (b"nothing", "cannot read mask"),
        "a bomb": (png(40_000, 40_000, colour=0, data=zlib.compress(bytes(99))), "cannot read mask"),
    }


def train_on_masks(ledger, place, short):
    """A bad mask or image among the pairs: the training is refused by a line that names it, the audit finds it."""
    data = place.root / "with-bad-masks"
    shutil.copytree(place.data, data)
    path = sorted((data / "train/masks").iterdir())[1]
    image = sorted((data / "train/images").iterdir())[2]
    kept, kept_image, cases = path.read_bytes(), image.read_bytes(), bad_masks()
    for case in list(cases)[::4] if short else cases:
        content, told = cases[case]
        path.write_bytes(content)
        attempt = run(*place.train("spoilt", data=data, cache=place.root / "spoilt"))
        problem = attempt.not_refused(path.name, told)
        problem = problem or ("a run was begun" if (place.runs / "spoilt").exists() else "")
        audit = run("audit.py", "--data", data)
        problem = problem or audit.trouble() or ("" if audit.status in (1, 2) else f"audit status {audit.status}")
        ledger.add("images", "masks", problem and f"{case}: {problem}")
    path.write_bytes(kept)
    for case, content in {"cut": kept_image[:500], "small": saved(photo(), "JPEG"), "empty": b""}.items():
        image.write_bytes(content)
        attempt = run("data.py", "--data", data, "--cache", place.root / "spoilt")
        ledger.add("images", "masks", attempt.not_refused(image.name) and f"image {case}: {attempt.err}")
    image.write_bytes(kept_image)
    for odd in ("a folder.png", "новый\nname.png"):
        for kind in ("images", "masks"):
            target = data / "train" / kind / odd
            target.mkdir() if "folder" in odd else target.write_bytes(path.read_bytes())
        attempt = run("data.py", "--data", data, "--cache", place.root / "spoilt")
        if "folder" in odd:
            ledger.add("images", "masks", attempt.not_refused("a folder.png"))
            for kind in ("images", "masks"):
                (data / "train" / kind / odd).rmdir()
    attempt = run(*place.train("odd-names", "--sizes", "32:2", data=data, cache=place.root / "spoilt"))
    problem = attempt.not_fine()
    page = problem or (place.runs / "index.html").read_text(encoding="utf-8")
    ledger.add("images", "masks", problem or ("" if "odd-names" in page else "the run with odd names is on no page"))


def offer_conversion(ledger, place):
    """Masks in colours: the command that the refusal names makes labels of them."""
    data = place.root / "coloured"
    shutil.copytree(place.data, data)
    for path in (data / "train/masks").iterdir():
        with Image.open(path) as mask:
            coloured = mask.convert("RGB")
        coloured.save(path)
    attempt = run("data.py", "--data", data, "--cache", place.root / "unused")
    problem = attempt.not_refused(f"make data RAW={data} DATA={data}-labels")
    problem = problem or run("prepare.py", "--raw", data, "--out", f"{data}-labels").not_fine()
    for path in [] if problem else (place.data / "train/masks").iterdir():
        with Image.open(path) as mask, Image.open(f"{data}-labels/train/masks/{path.name}") as converted:
            problem = problem or (
                "" if np.array_equal(np.array(mask), np.array(converted)) else f"{path.name} has other labels"
            )
    ledger.add("images", "colours converted", problem)


def mutate(ledger, place, count=420):
    """Images with random bytes changed: each gives a mask or a line, none a traceback."""
    rng, folder, out = np.random.default_rng(6), place.root / "mutants", place.root / "mutant-masks"
    folder.mkdir()
    Image.init()  # knows which of these this Pillow can write
    kinds = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "AVIF", "DDS", "ICO", "PCX", "SGI", "TGA")
    kinds = [kind for kind in kinds if kind in Image.SAVE]
    sources = [saved(photo(), kind) for kind in kinds] + [saved(photo(), "JPEG", exif=rotated())]
    for i in range(count):
        data = bytearray(sources[i % len(sources)])
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(len(data)) if rng.random() < 0.5 else rng.integers(60)] = rng.integers(256)
        (folder / f"m{i}.png").write_bytes(data[: rng.integers(1, len(data))] if i % 5 == 0 else data)
    attempt = run("predict.py", "--whole", "--weights", place.weights, "--input", folder, "--output", out)
    problem = attempt.trouble() or ("" if attempt.status in (0, 2) else f"status {attempt.status}")
    for path in folder.iterdir():
        masked, told = (out / path.name).is_file(), attempt.err.count(f"{path}: ")
        ledger.add("images", "mutated bytes", problem or ("" if masked + told == 1 else f"{path.name}: {attempt.err}"))
