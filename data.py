"""The training pairs: found, decoded once into a memory-mapped cache, split.

python data.py --data data          # build the cache and print what it holds
python data.py --data data-synth --cache build/cache
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from errors import ArgumentParser, UserError, positive, run_main
from images import image_files, must_be_file, read_image, read_mask
from labels import NUM_CLASSES
from parallel import in_parallel
from sides import reversed_sides, swap_sides
from synth import make_dataset

SIZE = 512  # side of every stored image and mask
IMAGE_BYTES, MASK_BYTES = 3 * SIZE * SIZE, SIZE * SIZE
CACHE_VERSION = 1
DRAWN = Path("build/drawn-faces")


@dataclass(frozen=True)
class Pairs:
    """Images (N, 3, 512, 512) and masks (N, 512, 512), both uint8 and memory-mapped, which pairs have left and right
    reversed (N,) bool, the names (N,) they go by, sorted, and a digest of all the files they come from."""

    images: np.ndarray
    masks: np.ndarray
    reversed: np.ndarray
    names: list
    content: str = ""

    def batch(self, indices, fix_sides=True):
        """Copies (B, 3, 512, 512) and (B, 512, 512) of some pairs; reversed masks are repaired by `fix_sides`."""
        images, masks = self.images[indices], self.masks[indices]
        if fix_sides:
            for i in np.flatnonzero(self.reversed[indices]):
                masks[i] = swap_sides(masks[i])
        return images, masks


class Batches:
    """Training batches as uint8 tensors on the device: all pairs resident if they fit, else read from the map."""

    def __init__(self, pairs, indices, device, fix_sides, repeat_rare=0.0):
        self.pairs, self.indices, self.device, self.fix_sides = pairs, indices, device, fix_sides
        self.weights = repeat_factors(pairs.masks, indices, repeat_rare) if repeat_rare else None
        self.resident = None
        # On the CPU the map is memory already; on a GPU the pairs may take a share of what is free.
        needed = len(indices) * (IMAGE_BYTES + MASK_BYTES)
        if device.type == "cuda" and needed < 0.4 * torch.cuda.mem_get_info(device)[0]:
            chunks = [self.read(chunk) for chunk in np.array_split(np.arange(len(indices)), len(indices) // 64 + 1)]
            self.resident = [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def order(self, seed):
        """Positions (N,) of an epoch: a permutation, or draws with repeats where images weigh differently."""
        rng, count = np.random.default_rng(seed), len(self.indices)
        if self.weights is None:
            return rng.permutation(count)
        # Systematic sampling: an image of weight 2.3 comes twice or three times.
        ends = np.cumsum(self.weights[shuffled := rng.permutation(count)]) * count / self.weights.sum()
        return rng.permutation(shuffled[np.searchsorted(ends, np.arange(count) + rng.random())])

    def read(self, positions):
        """Images (B, 3, 512, 512) and masks (B, 512, 512) of the training pairs at these positions (B,)."""
        if self.resident is not None:
            chosen = torch.from_numpy(positions).to(self.device)
            return [part[chosen] for part in self.resident]
        batch = self.pairs.batch(self.indices[positions], self.fix_sides)
        return [torch.from_numpy(part).to(self.device) for part in batch]


def repeat_factors(masks, indices, share):
    """How often each image is drawn (N,) >= 1: sqrt(share / f) for its rarest label, f the share of images that have
    the label (repeat factor sampling, arXiv 1908.03195)."""
    present = np.stack([np.bincount(masks[i].ravel(), minlength=NUM_CLASSES) > 0 for i in indices])
    factors = np.sqrt(share / present.mean(0).clip(1 / len(indices))).clip(1)
    return np.where(present, factors, 1).max(1)


def resolve(data=None):
    """The data folder to use: `data` as given; else ./data; else drawn faces, made on first use and said so."""
    if data is not None:
        if not Path(data).is_dir():
            raise UserError(f"no data folder {data}; `make data RAW=/path/to/download DATA={data}` prepares one")
        return Path(data)
    if Path("data").is_dir():
        return Path("data")
    print(
        f"No data/ folder: using drawn faces in {DRAWN} (synth.py). Scores on them say nothing about real faces; "
        "`make data RAW=/path/to/CelebAMask` prepares the real ones.",
        file=sys.stderr,
    )
    make_dataset(DRAWN)
    return DRAWN


def find_pairs(data):
    """Image and mask paths [(image, mask), ...] of DATA/train, sorted by name; UserError where one lacks its other."""
    for kind in ("images", "masks"):
        if not Path(data, "train", kind).is_dir():
            raise UserError(f"no folder {data}/train/{kind}; `make data RAW=/path/to/download DATA={data}` makes one")
    images = image_files(Path(data, "train", "images"))
    masks = {p.stem: p for p in image_files(Path(data, "train", "masks"))}
    lonely = [p.name for p in images if p.stem not in masks] + sorted(masks.keys() - {p.stem for p in images})
    if lonely:
        raise UserError(f"{len(lonely)} files of {data}/train lack a partner, first {lonely[0]}; see `make check-data`")
    return [(p, masks[p.stem]) for p in images]


def split(count, val_split=0.1, seed=42):
    """Indices for training and validation: the reference's split, the last share of a seeded permutation.

    `val_split` 0 trains on all and leaves nothing to validate. UserError where either side would be empty by accident.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"--split-seed {seed} is out of range: 0 to {2**32 - 1}")
    held = round(count * val_split) if 0 <= val_split < 1 else 0
    if not 0 <= val_split < 1 or held >= count or (val_split and not held):
        raise UserError(f"--val-split {val_split} of {count} pairs: {held} to validate, {count - held} to train")
    order = np.random.RandomState(seed).permutation(count)
    return order[: count - held], order[count - held :]


def _key(pairs):
    """A name for the cache that changes with any byte or name of the files it is made from."""
    digest = hashlib.sha256(f"version {CACHE_VERSION} size {SIZE}".encode())
    for pair in pairs:
        for path in pair:
            must_be_file(path)
            try:
                digest.update(path.name.encode("utf-8", "surrogateescape") + hashlib.sha256(path.read_bytes()).digest())
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()[:16]


def _decode(task):
    """Writes one pair into its place in the cache file (in a worker process)."""
    cache, index, count, image_path, mask_path = task
    image, mask = read_image(image_path).transpose(2, 0, 1), read_mask(mask_path)
    for path, array in ((image_path, image), (mask_path, mask)):
        if array.shape[-2:] != (SIZE, SIZE):
            raise UserError(f"{path} is {array.shape[-1]} x {array.shape[-2]}, not 512 x 512; `make data` resizes")
    with open(cache, "r+b") as file:
        for offset, array in (
            (index * IMAGE_BYTES, image),
            (count * IMAGE_BYTES + index * MASK_BYTES, mask),
            (count * (IMAGE_BYTES + MASK_BYTES) + index, np.array([reversed_sides(mask)], np.uint8)),
        ):
            file.seek(offset)
            file.write(array.tobytes())


def load_pairs(data, cache="build/cache", workers=None):
    """All pairs of DATA/train from the cache, which is made first where there is none for exactly these files.

    The cache is one file: N images, N masks, N bytes that say whether left and right are reversed.
    """
    pairs = find_pairs(data)
    count = len(pairs)
    total = count * (IMAGE_BYTES + MASK_BYTES + 1)
    key = _key(pairs)
    path = Path(cache, f"{key}.u8")
    if not path.is_file() or path.stat().st_size != total:
        if path.is_file():
            print(f"{path} is cut short: making it again", file=sys.stderr)
        elif any(path.parent.glob("*.u8")):
            print(f"{cache} holds caches of other data or versions only: making one of these pairs", file=sys.stderr)
        _build(path, pairs, total, workers)
    whole = np.memmap(path, np.uint8, "r")
    images = whole[: count * IMAGE_BYTES].reshape(count, 3, SIZE, SIZE)
    masks = whole[count * IMAGE_BYTES : count * (IMAGE_BYTES + MASK_BYTES)].reshape(count, SIZE, SIZE)
    return Pairs(images, masks, np.array(whole[-count:], bool), [p.stem for p, _ in pairs], key)


def _build(path, pairs, total, workers):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_unfinished(path.parent)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            _reserve(handle, total)
            tasks = [(temporary, i, len(pairs), *pair) for i, pair in enumerate(pairs)]
            for _ in in_parallel(_decode, tasks, workers, "decoding"):
                pass
            if path.stem != _key(pairs):
                raise UserError(f"files of {pairs[0][0].parent.parent} changed while they were read; start again")
            os.fsync(handle)
            os.replace(temporary, path)
        finally:
            os.close(handle)
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the cache {path} ({total >> 20} MiB): {error.strerror}; see --cache") from None


def _reserve(handle, total):
    """Take the disk's blocks now: a full one is an error here, not a SIGBUS in a mapped page later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, total)
    else:  # macOS
        for start in range(0, total, 1 << 20):
            os.pwrite(handle, bytes(min(1 << 20, total - start)), start)


def _clear_unfinished(folder):
    """Remove what killed processes left unfinished in the cache; whoever still writes a file holds its lock."""
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(OSError), open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", help="folder with train/images and train/masks; default ./data, else drawn faces")
    parser.add_argument("--cache", default="build/cache", help="folder of the decoded copies")
    parser.add_argument("--workers", type=positive, help="decoding processes; default one a core")
    args = parser.parse_args()
    pairs = load_pairs(resolve(args.data), args.cache, args.workers)
    print(f"{len(pairs.names)} pairs, {int(pairs.reversed.sum())} with left and right reversed")


if __name__ == "__main__":
    run_main(main)
