"""Image files: read them as pixels or labels, write palette PNGs."""

import hashlib
import io
import math
import re
import struct
import zlib
from pathlib import Path

from common import UserError, check_target

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from labels import COLOURS, NUM_CLASSES, PALETTE

_MASK = rb"\x89PNG.*PLTE" + re.escape(bytes(PALETTE))  # how our masks begin
# Pillow cannot read the last two; listed, so that such files are an error instead of being skipped.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif")
# What Pillow's decoders raise for damaged bytes.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, struct.error, zlib.error),
    Image.DecompressionBombError,
)


def require_file(path):
    """UserError unless `path` is a regular file or a link to one."""
    if not Path(path).is_file():
        raise UserError(f"cannot read {path}: not a file")


def read_image(path):
    """Read an image file as uint8 RGB (H, W, 3) in sRGB, upright by its EXIF orientation; the first frame if animated.

    16-bit and float greys are scaled to 0..255, transparency is blended over white. UserError if unreadable.
    """
    return read_picture(path)[0]


def read_picture(path):
    """(`read_image`, opacity uint8 (H, W), or None if the file is opaque)."""
    require_file(path)
    return decode_picture(path, f"image {path}")


def open_image(source, **settings):
    """Image.open, where a small file that claims huge dimensions (a decompression bomb) is an error, not a warning."""
    image = Image.open(source, **settings)
    if image.format == "EPS":  # Pillow would start Ghostscript, whatever the file's name
        raise UnidentifiedImageError
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError
    return image


def decode_picture(source, name):
    """`read_picture` of a path or a binary stream; `name` is what the error calls it."""
    try:
        with open_image(source) as image:
            try:
                return picture_pixels(image)
            except OSError:
                if image.format != "JPEG" or not image.fp:  # which Pillow closes after the last byte
                    raise
                return _unended_jpeg(image.fp)
    except UnidentifiedImageError:
        raise UserError(f"cannot read {name}: not an image, or of an unknown format; convert it to JPEG") from None
    except Image.DecompressionBombError:
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        raise UserError(f"cannot read {name}: more than {limit:.0f} megapixels; reduce it") from None
    except DECODE_ERRORS as error:
        raise UserError(f"cannot read {name}: {error}") from None


def _unended_jpeg(file):
    """`picture_pixels` of a JPEG that lacks only its end mark; OSError if they depend on what follows the file."""
    file.seek(0)
    data = file.read()
    ends = [io.BytesIO(data + filler * 99 + b"\xff\xd9") for filler in (b"\x00", b"\x55")]
    first, second = (picture_pixels(Image.open(end)) for end in ends)
    if not np.array_equal(first[0], second[0]):
        raise OSError("the file is truncated")
    return first


def picture_pixels(image):
    """(uint8 sRGB (H, W, 3), opacity uint8 (H, W) or None) of a PIL image of any mode; a DECODE_ERRORS if damaged."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scale_grey(np.asarray(image)), None
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        opacity = image.convert("RGBA").getchannel("A")
        colours = Image.new("RGB", image.size, "white")
        colours.paste(_to_srgb(image.convert("RGBA").convert("RGB"), image), mask=opacity)
        return np.array(colours), np.array(opacity)
    return np.array(_to_srgb(image.convert("RGB") if image.mode in ("P", "1") else image, image).convert("RGB")), None


def _to_srgb(image, source):
    """A PIL image converted to sRGB from the ICC profile of `source`; as it is without a valid one."""
    if profile := source.info.get("icc_profile"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image


def image_hash(image):
    """16 bytes that identify uint8 pixels (H, W, 3), plane by plane, whatever their file and its name."""
    return hashlib.sha256(image.transpose(2, 0, 1).tobytes()).digest()[:16]


def is_turned(source):
    """True if an image, a path or stream, has an EXIF orientation other than upright: its mask may not have it."""
    with open_image(source) as image:
        return image.getexif().get(0x0112, 1) in range(2, 9)


def _scale_grey(values):
    """Integer or float greys (H, W) as uint8 RGB. The maximum decides the range: 8 to 16 bits, 0..1, or itself."""
    limits = (1, 255) if values.dtype.kind == "f" else (255, 1023, 4095, 16383, 65535)
    values = values.astype(np.float64)
    top = values[np.isfinite(values)].max(initial=0)
    values = np.nan_to_num(values, posinf=top, neginf=0)
    white = next((limit for limit in limits if top <= limit), top)
    grey = (values * (255 / white)).round().clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, 2)


def read_mask(path):
    """Read a mask file as uint8 labels (H, W). UserError if it is unreadable or no mask (`mask_labels`)."""
    require_file(path)
    try:
        with open_image(path) as image:
            return mask_labels(image, path)
    except DECODE_ERRORS as error:
        raise UserError(f"cannot read mask {path}: {error}") from None


def mask_labels(image, name):
    """Labels (H, W) uint8 of a PIL image: its values (mode L or P) or the labels' colours. UserError otherwise."""
    if image.format != "JPEG":  # which destroys labels
        if image.mode in ("L", "P"):
            return palette_labels(image, name)
        if image.mode in ("RGB", "RGBA") and (labels := labels_from_colours(image)) is not None:
            return labels
    kind = f"{image.format} of mode {image.mode}"
    raise UserError(f"{name}, {kind}, is no PNG of labels or their colours; replace it or leave it out")


def palette_labels(image, name):
    """Labels (H, W) uint8 of a PIL image of mode L or P: those of the palette's colours, since optimisers reorder it.

    Without a palette (also if all black, or the greys 0, 1, 2 ...) its values. UserError for other colours and values.
    """
    mask, palette = np.array(image), image.getpalette() or []
    colours = list(zip(*[iter(palette)] * 3, strict=True))
    table = np.full(256, 255, np.uint8)  # label of each value
    if not any(palette) or colours == [(i, i, i) for i in range(len(colours))]:
        table[:NUM_CLASSES] = range(NUM_CLASSES)
    for value, colour in enumerate(colours):
        label = COLOURS.index(colour) if colour in COLOURS else -1
        if label == value or (label >= 0 and colours.count(colour) == 1):
            table[value] = label
    labels = table[mask]
    if labels.max(initial=0) >= NUM_CLASSES:
        what = "colours of no label in its palette"
        if mask.max() >= NUM_CLASSES:
            what = f"label {mask.max()}; labels are 0 to {NUM_CLASSES - 1}"
        raise UserError(f"{name} contains {what}: label these pixels, or leave out the pair")
    return labels


def labels_from_colours(image):
    """Labels (H, W) uint8 of a PIL image in the palette's colours; None if it contains another colour."""
    codes = np.array(COLOURS) @ (1 << 16, 1 << 8, 1)
    order = np.argsort(codes)
    pixels = np.asarray(image.convert("RGB")).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    labels = order[np.searchsorted(codes[order], pixels).clip(max=NUM_CLASSES - 1)]
    return labels.astype(np.uint8) if (codes[labels] == pixels).all() else None


def mask_image(mask):
    """Labels (H, W) uint8 as a PIL image of mode P with the challenge's palette."""
    image = Image.fromarray(mask)
    image.putpalette(PALETTE)
    return image


def check_mask_target(path):
    """UserError if writing a mask to `path` would replace anything but a predicted mask."""
    if Path(path).is_file() and Path(path).resolve().parts[-3:-1] == ("train", "masks"):
        raise UserError(f"{path} is a true mask to train on; choose another OUT (--out)")
    check_target(path, _MASK)


def image_files(path):
    """[path] if it is a file, else the image files in the folder, sorted. UserError if there are none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no such file or folder: {path}")
    named = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    files = sorted(p for p in named if not p.is_dir())
    if not files:
        raise UserError(f"no images in {path} (looked for {' '.join(IMAGE_SUFFIXES)})")
    return files
