"""The training pairs: find, decode once into a memory-mapped cache, split, read in batches, repair reversed masks."""

import fcntl
import hashlib
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import UserError, atomic, in_parallel, make_folder, print_message, remove_unfinished

import numpy as np
import torch

from images import image_files, image_hash, is_turned, read_image, read_mask, require_file
from labels import FLIP, NUM_CLASSES, SIDES
from register import run_record
from views import to_device

SIZE = 512  # side of every stored image and mask
# A pair in the cache; `hashes` are 16 bytes of the image, 16 of the mask and `reversed`.
PAIR = np.dtype([("image", "u1", (SIZE, SIZE, 3)), ("mask", "u1", (SIZE, SIZE)), ("reversed", bool), ("hashes", "V32")])
SYNTHETIC = Path("build/synthetic-faces")
SYNTHETIC_MARKER = "SYNTHETIC.txt"  # a file in every folder that tools/synth.py made

_LEFT, _RIGHT = np.array(SIDES).T
_MIRROR = np.array(FLIP, np.uint8)


def reversed_sides(mask):
    """True if a mask (H, W) of uint8 labels has left and right reversed, as 7 % of the challenge's masks have.

    The person's left eye, brow and ear lie at the image's right. In a reversed mask the centroid of every left part
    lies left of its right partner's, over the pairs with both parts present (at least one).
    """
    pixels = np.flatnonzero((mask >= _LEFT[0]) & (mask <= _RIGHT[-1]))
    labels = mask.ravel()[pixels]
    count = np.bincount(labels, minlength=NUM_CLASSES)
    x = np.bincount(labels, pixels % mask.shape[1], NUM_CLASSES) / np.maximum(count, 1)
    present = (count[_LEFT] > 0) & (count[_RIGHT] > 0)
    return bool(present.any() and (x[_LEFT] < x[_RIGHT])[present].all())


def swap_sides(mask):
    """A copy of a mask (any shape, labels 0..18) as uint8 with 4<->5, 6<->7, 8<->9; IndexError above label 18."""
    return _MIRROR[mask]


@dataclass(frozen=True)
class Pairs:
    """All training pairs."""

    images: np.ndarray  # uint8 (N, 512, 512, 3), memory-mapped
    masks: np.ndarray  # uint8 (N, 512, 512), memory-mapped
    reversed: np.ndarray  # bool (N,): left and right are reversed in the mask
    names: list  # (N,), sorted
    digest: str  # of all the files
    path: Path  # of the cache
    hashes: list  # (N,), bytes
    verified: set = field(default_factory=set)  # indices of the pairs that have their hashes

    def keys(self, indices=None):
        """[(name, hash of the image), ...] of some pairs, or of all, as in a checkpoint."""
        indices = range(len(self.names)) if indices is None else indices
        return [(self.names[i], self.hashes[i][:16].hex()) for i in indices]

    def batch(self, indices, fix_sides=True):
        """Some pairs as uint8 tensors (B, 3, 512, 512), channels last, and (B, 512, 512); `fix_sides` repairs masks.

        UserError if the cache is damaged, which is checked when a pair is first read.
        """
        images, masks = self.images[indices], self.masks[indices]
        for row, i in enumerate(indices):
            if i not in self.verified and _hashes(images[row], masks[row], self.reversed[i]) != self.hashes[i]:
                raise UserError(f"the cache {self.path} is damaged; delete it, and it is built again")
        self.verified.update(indices)
        if fix_sides:
            for row in np.flatnonzero(self.reversed[indices]):
                masks[row] = swap_sides(masks[row])
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(masks)


class Batches:
    """Training batches as uint8 tensors on the device: resident on a GPU if they fit, else copied per batch."""

    def __init__(self, pairs, indices, device, fix_sides):
        self.pairs, self.indices, self.device, self.fix_sides = pairs, indices, device, fix_sides
        self.resident = None
        # A CPU reads the memory map directly; on a GPU the pairs may take 40 % of the free memory.
        needed = len(indices) * PAIR.itemsize
        if device.type == "cuda" and needed < 0.4 * torch.cuda.mem_get_info(device)[0]:
            chunks = [self.read(chunk) for chunk in np.array_split(np.arange(len(indices)), len(indices) // 64 + 1)]
            self.resident = [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def read(self, positions):
        """Images (B, 3, 512, 512) and masks (B, 512, 512) of the training pairs at these positions (B,)."""
        if self.resident is not None:
            chosen = to_device(torch.from_numpy(positions), self.device)
            return [part[chosen] for part in self.resident]
        batch = self.pairs.batch(self.indices[positions], self.fix_sides)
        return [to_device(part, self.device) for part in batch]


def find_data(folder=None):
    """The data folder: `folder` if given, else ./data, else synthetic faces, created on first use with a warning."""
    if Path(folder or "data").is_dir():
        return Path(folder or "data")
    if folder is None:
        print_message(
            f"no data/ folder: using synthetic faces in {SYNTHETIC}; scores on them say nothing about real faces. "
            "`make data RAW=/path/to/download` prepares the real ones"
        )
    elif Path(folder) != SYNTHETIC:
        raise UserError(f"no data folder {folder}: DATA= names another, {_creation(folder)}")
    # A process of its own, since tools/synth.py imports this file.
    command = [sys.executable, "-m", "tools.synth", "--out", str(SYNTHETIC.resolve())]
    if subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"could not create the synthetic faces in {SYNTHETIC}")
    return SYNTHETIC


def _creation(data):
    return f"`make data RAW=/path/to/download DATA={shlex.quote(str(data))}` creates it"


def is_synthetic(data):
    """True if tools/synth.py made the data folder."""
    return Path(data, SYNTHETIC_MARKER).is_file()


def find_data_of(weights, folder=None):
    """The data folder for a file in a run's folder: `folder`, else that of the run, else ./data.

    A run on synthetic faces uses them, not ./data. UserError if there is no data folder.
    """
    record = run_record(weights)
    folder = folder or record.get("args", {}).get("data")
    if folder is None and record.get("pairs", {}).get("drawn"):
        return find_data(SYNTHETIC)
    if folder is None and not Path("data").is_dir():
        raise UserError("no data/ folder: `make data RAW=/path/to/download` creates it; DATA=FOLDER names another")
    return find_data(folder)


def find_pairs(data):
    """[(image path, mask path), ...] of DATA/train, sorted by name. UserError if a file has no partner."""
    images, masks = {}, {}  # by name
    for kind, files in (("images", images), ("masks", masks)):
        if not Path(data, "train", kind).is_dir():
            raise UserError(f"no folder {data}/train/{kind}; {_creation(data)}")
        for path in image_files(Path(data, "train", kind)):
            if (first := files.setdefault(path.stem, path)) != path:
                raise UserError(f"{first} and {path} would share a partner; rename or remove one")
    unpaired = [path.name for name, path in images.items() if name not in masks] + sorted(masks.keys() - images.keys())
    if unpaired:
        what = f"{len(unpaired)} files of {data}/train have no partner, such as {unpaired[0]}"
        raise UserError(f"{what}; `make check-data DATA={data} LIST=1` lists them")
    return [(path, masks[name]) for name, path in images.items()]


def split(count, val_split=0.1, seed=42, hashes=None):
    """(training, validation) indices: the reference's split, the last fraction of a seeded permutation.

    val_split 0 trains on all pairs. UserError if either side would be empty otherwise. With the images' `hashes`
    the copies of an image that is held out are held out too, with a warning.
    """
    held = round(count * val_split)
    if held == count or (val_split and not held):
        sides = f"{held} for validation, {count - held} for training"
        raise UserError(f"--val-split {val_split} of {count} pairs: {sides}; change it, or 0 trains on all")
    order = np.random.RandomState(seed).permutation(count)
    train, validation = order[: count - held], order[count - held :]
    if hashes is None or not held:
        return train, validation
    unseen = {hashes[i] for i in validation}
    copies = np.array([hashes[i] in unseen for i in train])
    if copies.any():
        print_message(f"{copies.sum()} copies of held-out images are held out too; `make check-data LIST=1` lists them")
    if copies.all():
        raise UserError("no images are left to train on")
    return train[~copies], np.concatenate([validation, train[copies]])


def load_pairs(data, cache="build/cache"):
    """All pairs of DATA/train, from the cache if it was made of exactly these files, else decoded into it first."""
    files = find_pairs(data)
    digest = _digest(files)
    path = Path(cache, f"{digest}.pairs")
    if not is_complete(path, files):
        _build_cache(path, files)
    whole = np.memmap(path, PAIR, "r")
    names, hashes = [p.stem for p, _ in files], [known.tobytes() for known in whole["hashes"]]
    return Pairs(whole["image"], whole["mask"], whole["reversed"], names, digest, path, hashes)


def _hashes(image, mask, is_reversed):
    """32 bytes: the image's hash, and that of the mask and its flag."""
    return image_hash(image) + hashlib.sha256(mask.tobytes() + bytes([bool(is_reversed)])).digest()[:16]


def _digest(files):
    """A key that changes with any byte or name of the files; runs record it, so it stays the same for ever."""
    digest = hashlib.sha256(b"version 1 size 512")
    for path in (path for pair in files for path in pair):
        require_file(path)
        digest.update(path.name.encode("utf-8", "surrogateescape") + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def is_complete(path, files):
    """True if the cache file `path` has the size of these pairs."""
    return path.is_file() and path.stat().st_size == len(files) * PAIR.itemsize


def _build_cache(path, files):
    """Decode all pairs into the cache file `path`, atomically; one process at a time."""
    make_folder(path.parent)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if is_complete(path, files):  # another process has built it meanwhile
            return
        remove_unfinished(path.parent, {path.name})  # of a killed process: a live one has the lock
        with atomic(path) as temporary, open(temporary, "wb") as file:
            for pair in in_parallel(_decode, files, label="decoding"):
                file.write(pair)
            if path.stem != _digest(files):
                raise UserError(f"files of {files[0][0].parent.parent} changed while they were read; run it again")
    finally:
        os.close(folder)


def _decode(paths):
    """The bytes of one pair in the cache; runs in a worker process."""
    image, mask = read_image(paths[0]), read_mask(paths[1])
    for path, array in zip(paths, (image, mask), strict=True):
        if array.shape[:2] != (SIZE, SIZE):
            size = f"{array.shape[1]} x {array.shape[0]}"
            raise UserError(f"{path} is {size}, not 512 x 512; `make data RAW=FOLDER DATA=NEW` resizes a data folder")
        if is_turned(path):
            raise UserError(f"{path} has an EXIF orientation, its partner may not; turn the pixels and remove it")
    flag = reversed_sides(mask)
    return image.tobytes() + mask.tobytes() + bytes([flag]) + _hashes(image, mask, flag)
