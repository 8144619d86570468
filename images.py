"""Images and masks: read files of any kind, write palette PNGs, resize tensors."""

import io
import struct
import warnings
import zlib
from pathlib import Path

from common import UserError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from labels import COLOURS, NUM_CLASSES, PALETTE

# Pillow cannot read the last two; listed, so that such files are an error instead of being skipped.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif")
# A small file can claim huge dimensions (a decompression bomb): an error, not a warning.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Pillow warns about damaged metadata in lines of its own source; the pixels are still readable.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
# What Pillow's decoders raise for damaged bytes.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
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


def decode_picture(source, name):
    """`read_picture` of a path or a binary stream; `name` is what the error calls it."""
    try:
        with Image.open(source) as image:
            try:
                return _picture(image)
            except OSError:
                if image.format != "JPEG":
                    raise
        return _unended_jpeg(source)
    except UnidentifiedImageError:
        raise UserError(f"cannot read {name}: not an image, or of an unknown format; convert it to JPEG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        raise UserError(f"cannot read {name}: more than {limit:.0f} megapixels; reduce it") from None
    except DECODE_ERRORS as error:
        raise UserError(f"cannot read {name}: {error}") from None


def _unended_jpeg(source):
    """`_picture` of a JPEG that lacks only its end mark; OSError if the pixels depend on what follows the file."""
    if hasattr(source, "seek"):
        source.seek(0)
        data = source.read()
    else:
        data = Path(source).read_bytes()
    ends = [io.BytesIO(data + filler * 99 + b"\xff\xd9") for filler in (b"\x00", b"\x55")]
    first, second = (_picture(Image.open(end)) for end in ends)
    if not np.array_equal(first[0], second[0]):
        raise OSError("the file is truncated")
    return first


def rgb_pixels(image):
    """A PIL image of any mode as uint8 RGB (H, W, 3); one of DECODE_ERRORS if damaged."""
    return _picture(image)[0]


def _picture(image):
    """(uint8 sRGB (H, W, 3), opacity uint8 (H, W) or None) of a PIL image."""
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


def _scale_grey(values):
    """Integer or float greys (H, W) as uint8 RGB. The maximum decides the range: 8 to 16 bits, 0..1, or itself."""
    limits = (1, 255) if values.dtype.kind == "f" else (255, 1023, 4095, 16383, 65535)
    values = np.nan_to_num(values.astype(np.float64))
    top = values.max(initial=0)
    white = next((limit for limit in limits if top <= limit), top)
    grey = (values * (255 / white)).round().clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, 2)


def read_mask(path):
    """Read a mask file as uint8 labels (H, W). UserError if unreadable, not single-channel, or above 18."""
    require_file(path)
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                raise UserError(f"{path} is a JPEG, which destroys labels; a mask must be a PNG")
            if image.mode in ("RGB", "RGBA") and labels_from_colours(image) is not None:
                remedy = "`make data RAW=FOLDER DATA=NEW` converts a data folder"
                raise UserError(f"{path} contains the labels' colours, not labels; {remedy}")
            if image.mode not in ("P", "L"):
                raise UserError(f"{path} has mode {image.mode}; a mask has one channel (mode P or L)")
            mask = np.array(image)
    except DECODE_ERRORS as error:
        raise UserError(f"cannot read mask {path}: {error}") from None
    if mask.max(initial=0) >= NUM_CLASSES:
        raise UserError(f"{path} contains label {mask.max()}; labels are 0 to {NUM_CLASSES - 1}")
    return mask


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


def overlay(pixels, mask, opacity=0.5):
    """Blend the mask's colours over pixels (H, W, 3), background unchanged: uint8 (H, W, 3)."""
    tint = np.where(mask[..., None] > 0, np.array(COLOURS, np.uint8)[mask], pixels)
    return np.array(Image.blend(Image.fromarray(pixels), Image.fromarray(tint), opacity))


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


def area(x, size):
    """Resize maps (B, C, H, W) to `size` = (h, w) by averaging over each pixel's area."""
    if x.device.type == "mps":  # MPS supports integer factors only
        return F.interpolate(x.cpu(), tuple(size), mode="area").to(x.device)
    return F.interpolate(x, tuple(size), mode="area")


def resize(images, height, width):
    """Resize uint8 images (B, 3, H, W) to float (B, 3, height, width), values 0..1: area average down, bilinear up."""
    (down_y, rest_y), (down_x, rest_x) = divmod(images.shape[2], height), divmod(images.shape[3], width)
    if rest_y or rest_x or not down_y or not down_x:
        shrinks = height * width < images.shape[2] * images.shape[3]
        images = images.float() / 255
        return area(images, (height, width)) if shrinks else F.interpolate(images, (height, width), mode="bilinear")
    if down_y == down_x == 1:
        return images.float().div_(255)
    # Sum integer factors as integers, several times faster than pooling floats.
    counts = torch.int16 if 255 * down_y * down_x < 2**15 else torch.int32
    rows = images[:, :, ::down_y].to(counts)
    for i in range(1, down_y):
        rows += images[:, :, i::down_y]
    cells = rows[..., ::down_x].clone()
    for i in range(1, down_x):
        cells += rows[..., i::down_x]
    return cells.float().div_(255 * down_y * down_x)


def soft_labels(masks, stride=1, others=None, lam=None):
    """uint8 masks (B, H, W) to the fraction of each label in every stride x stride cell: (B, 19, H/stride, W/stride).

    With `lam` (B,) 0..1, `others` (B, H, W) are blended in with weight 1 - lam.
    """
    count, height, width = masks.shape
    soft = torch.zeros(count, NUM_CLASSES, height // stride, width // stride, device=masks.device)
    whole = torch.full((count,), 1 / stride**2, device=masks.device)
    for part, weight in [(masks, whole)] if lam is None else [(masks, whole * lam), (others, whole * (1 - lam))]:
        weight = weight[:, None, None, None].expand_as(soft[:, :1])
        for dy in range(stride):
            for dx in range(stride):
                soft.scatter_add_(1, part[:, None, dy::stride, dx::stride].long(), weight)
    return soft
