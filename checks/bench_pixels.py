"""What the benchmark times of pixels: augmentation against kornia's, the score against its plain formula, the cache."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import distributed
from augment import PRESETS, Strength, augment, draw
from checks.bench_measure import ROOT, environment, interleaved, median, status
from checks.bench_network import pictures
from checks.test_metrics import plain_score
from data import IMAGE_BYTES, MASK_BYTES, SIZE, Batches, Pairs, find_pairs, load_pairs
from device import keep_memory
from images import read_image, read_mask
from labels import NUM_CLASSES
from metrics import confusion, official_score
from synth import make_dataset

FACES = Path("build/bench-faces")


def faces(count):
    """A folder of drawn pairs, made on first use."""
    make_dataset(FACES, train=count, dev=1, test=1)
    return str(FACES)


def augmentation(repeats, batch, size):
    """Seconds {ours, kornia: [of each round]} of four batches with all of "advanced"; without kornia ours alone."""
    keep_memory()  # as trainings do
    images, masks = pictures(batch)
    strength, number = Strength(**PRESETS["advanced"]), iter(range(10**6))
    functions = {"ours": lambda: [augment(images, masks, draw(batch, strength, (next(number),)), size) for _ in "1234"]}
    try:
        import kornia.augmentation as K
    except ImportError:
        return interleaved(functions, repeats)
    chain = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(15, (0.05, 0.05), (0.9, 1.1), padding_mode="reflection", p=1.0),
        K.ColorJiggle(0.2, 0.2, 0.1, p=1.0),
        K.RandomGaussianBlur((7, 7), (0.3, 1.2), p=0.1),
        K.RandomGaussianNoise(std=0.05, p=0.1),
        data_keys=["input", "mask"],
    )
    keys = {"p": 0.3, "data_keys": ["input", "class"]}
    mixup, cutmix = K.RandomMixUpV2((0.0, 1.0), **keys), K.RandomCutMixV2(**keys)

    def theirs():
        x, y = chain(images.float() / 255, masks[:, None].float())
        pasted = cutmix(torch.cat([x, y], 1), torch.arange(batch))[0]  # the masks as a fourth channel
        x, y = pasted[:, :3], F.one_hot(pasted[:, 3].long(), NUM_CLASSES).permute(0, 3, 1, 2)
        x, mixed = mixup(x, torch.arange(batch))  # (B, 3): own index, the other's, and the share
        share = mixed[:, 2, None, None, None]
        return x, torch.lerp(y.float(), y[mixed[:, 1].long()].float(), share) if bool(share.any()) else y.argmax(1)

    return interleaved(functions | {"kornia": lambda: [theirs() for _ in "1234"]}, repeats)


def score(repeats, count):
    """Seconds of the official score of drawn masks against shifted ones, plainly and as here, and both values."""
    true = [read_mask(mask) for _, mask in find_pairs(faces(count))[:count]]
    pairs = [(np.roll(mask, 3, 0), mask) for mask in true]
    values = {}

    def ours():
        values["ours"] = official_score(np.stack([confusion(p, t) for p, t in pairs]))

    def plain():
        values["plain"] = float(np.mean([plain_score(p, t) for p, t in pairs]))

    return interleaved({"ours": ours, "plain": plain}, repeats), values


def epochs(repeats, count):
    """Seconds to make the cache and find it again, and in turn to read all pairs from it and from the files."""
    data = faces(count)
    with tempfile.TemporaryDirectory() as cache:
        made = []
        for _ in "12":
            begun = time.perf_counter()
            pairs = load_pairs(data, cache)
            made.append(time.perf_counter() - begun)
        batches = Batches(pairs, np.arange(len(pairs.names)), torch.device("cpu"), True)
        work = {
            "cache": lambda: [batches.read(batches.order((0,))[i : i + 8]) for i in range(0, count, 8)],
            "files": lambda: [(read_image(image), read_mask(mask)) for image, mask in find_pairs(data)[:count]],
        }
        return made, interleaved(work, repeats)


def streaming(count, reads):
    """MiB of this process's own memory and of pages of the cache file, after batches from a set of so many pairs."""
    Path("build").mkdir(exist_ok=True)  # a file system on disk, where holes take no memory either
    with tempfile.NamedTemporaryFile(dir="build") as file:
        file.truncate(count * (IMAGE_BYTES + MASK_BYTES))  # all holes: zeros that take no disk
        whole = np.memmap(file.name, np.uint8, "r")
        images = whole[: count * IMAGE_BYTES].reshape(count, 3, SIZE, SIZE)
        masks = whole[count * IMAGE_BYTES :].reshape(count, SIZE, SIZE)
        pairs = Pairs(images, masks, np.zeros(count, bool), [str(i) for i in range(count)])
        batches, strength = Batches(pairs, np.arange(count), torch.device("cpu"), True), Strength(**PRESETS["basic"])
        order = np.resize(batches.order((0,)), reads)
        for start in range(0, reads, 8):
            augment(*batches.read(order[start : start + 8]), draw(8, strength, (start,)), 64)
        return status("RssAnon"), status("RssFile")


def start_up(repeats):
    """Seconds {torch, predict: [of each round]} of importing torch and of predicting one image with the release."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["predict.py", "--input", faces(1) + "/test/images", "--output", folder, "--device", "cpu"]
        command += ["--weights", str(ROOT / "runs/release/best.pt")]

        def run(*arguments):
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT, env=environment())

        return interleaved({"torch": lambda: run("-c", "import torch"), "predict": lambda: run(*command)}, repeats)


def processes(repeats, count, size):
    """Images/s {"processes x threads": median} of train.py with MicroUNet, batch 8, over whole epochs."""
    data, speeds = faces(count), {"1 x 1": [], "1 x 2": [], "2 x 1": []}
    with tempfile.TemporaryDirectory() as folder:
        given = {"model": "microunet", "dropout": 0, "batch": 8, "sizes": f"{size}:3", "val-split": 0, "name": "a"}
        given |= {"device": "cpu", "data": data, "cache": f"{folder}/cache", "runs": folder}
        for _ in range(repeats):
            for name, seen in speeds.items():
                number, threads = name.split(" x ")
                flags = [f"--{key}={value}" for key, value in {**given, "nproc": number, "threads": threads}.items()]
                command = [sys.executable, "launch.py", "--overwrite", *flags]
                subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment())
                lines = Path(folder, "a/metrics.jsonl").read_text().splitlines()
                seen.append(max(json.loads(line)["images_per_s"] for line in lines[1:]))
    return {name: median(seen) for name, seen in speeds.items()}


def sums(repeats):
    """Median seconds of a sum of 1 KB over two processes, as batch norm takes two of for each layer and step."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_sum, (folder, repeats), nprocs=2, start_method="spawn")
        return float(Path(folder, "seconds").read_text())


def _sum(rank, folder, repeats):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    distributed.connect()
    numbers = torch.zeros(256)
    seconds = interleaved({"sum": lambda: distributed.total(numbers)}, repeats)["sum"]
    if rank == 0:
        Path(folder, "seconds").write_text(str(median(seconds)))
    torch.distributed.destroy_process_group()
