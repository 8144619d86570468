"""Images in, masks out: any picture to RGB pixels, label maps to palette PNGs."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from errors import UserError
from labels import COLOURS, NUM_CLASSES, PALETTE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
# Pillow alone cannot read these; they are named when they are met, not passed over.
FOREIGN_SUFFIXES = (".heic", ".heif")
# A small file can claim huge dimensions (a decompression bomb): refused rather than warned about.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Of damaged metadata Pillow warns in two lines of its own sources; the pixels are read all the same.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
# What Pillow's decoders raise for damaged bytes.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def must_be_file(path):
    """UserError for a folder, a pipe (which one would wait for), a link in a loop, and what is not there."""
    if not Path(path).is_file():
        raise UserError(f"cannot read {path}: it is no file or a link to none")


def read_image(path):
    """An image file of any mode as uint8 RGB (H, W, 3), upright as its EXIF says, its first frame where animated.

    16-bit and float greys are brought to 0..255, transparency is laid over white. UserError where it cannot be read.
    """
    must_be_file(path)
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                return _deep_grey(np.asarray(image))
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except UNREADABLE as error:
        remedy = "; save it as JPEG first" if Path(path).suffix.lower() in FOREIGN_SUFFIXES else ""
        raise UserError(f"cannot read image {path}: {error}{remedy}") from None


def _deep_grey(values):
    """Greys of more than 8 bits, integers or floats, as uint8 RGB.

    Their largest value tells the range: up to 255 as it is (floats up to 1 are 0..1), up to 65535 of 16 bits, if they
    are integers, and else up to itself.
    """
    floats, values = values.dtype.kind == "f", np.nan_to_num(values.astype(np.float64))
    top = values.max(initial=0)
    if top <= 255:
        white = 1 if floats and top <= 1 else 255
    elif floats or top > 65535:
        white = top
    else:
        white = 65535
    grey = (values * (255 / white)).round().clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, 2)


def read_mask(path):
    """A mask file as uint8 labels (H, W). UserError where it is unreadable, not of one channel, or above 18."""
    must_be_file(path)
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                raise UserError(f"{path} is a JPEG, whose labels are lost; a mask must be a PNG")
            if image.mode in ("RGB", "RGBA") and by_colour(image) is not None:
                folder = Path(path).parent.parent.parent  # above train/masks
                raise UserError(
                    f"{path} holds the labels' colours, not labels; `make data RAW={folder} DATA={folder}-labels` "
                    "makes labels of them"
                )
            if image.mode not in ("P", "L"):
                raise UserError(f"{path} is a picture of mode {image.mode}, not a mask of one channel (P or L)")
            mask = np.array(image)
    except UNREADABLE as error:
        raise UserError(f"cannot read mask {path}: {error}") from None
    if mask.max(initial=0) >= NUM_CLASSES:
        raise UserError(f"{path} holds label {mask.max()}; labels are 0 to {NUM_CLASSES - 1}")
    return mask


def by_colour(image):
    """Labels (H, W) uint8 of an image in the palette's colours; None where there is another colour."""
    codes = np.array(COLOURS) @ (1 << 16, 1 << 8, 1)
    order = np.argsort(codes)
    pixels = np.asarray(image.convert("RGB")).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    labels = order[np.searchsorted(codes[order], pixels).clip(max=NUM_CLASSES - 1)]
    return labels.astype(np.uint8) if (codes[labels] == pixels).all() else None


def write_mask(path, mask):
    """Labels (H, W) uint8 as a PNG of mode P in the challenge's palette."""
    image = Image.fromarray(mask)
    image.putpalette(PALETTE)
    image.save(path, format="PNG")


def overlay(pixels, mask, opacity=0.5):
    """The mask's colours over the image, background left clear: uint8 (H, W, 3) of pixels (H, W, 3) and mask (H, W)."""
    tint = np.where(mask[..., None] > 0, np.array(COLOURS, np.uint8)[mask], pixels)
    return np.array(Image.blend(Image.fromarray(pixels), Image.fromarray(tint), opacity))


def image_files(path):
    """[path] of a file, or the image files of a folder by name. UserError where there is none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no file or folder {path}")
    # Links that lead nowhere and folders of such a name are named when they are read, not passed over.
    known = IMAGE_SUFFIXES + FOREIGN_SUFFIXES
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in known and not p.name.startswith("."))
    if not files:
        raise UserError(f"no images in {path} (looked for {' '.join(IMAGE_SUFFIXES)})")
    return files
