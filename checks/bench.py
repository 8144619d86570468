"""Time MicroSegFormer, and its peak memory, against the same layers evaluated one by one as in the reference.

make bench                   # some minutes on two idle cores
make bench WRITE=1           # writes docs/bench.md

Both networks, in float32 at 512 pixels, run in processes of their own that take turns, and both keep freed memory.
"""

import itertools
import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from common import ArgumentParser, positive, run_main, show_time, write_text

import torch
import torch.nn.functional as F

from checks.references import plain_forward
from device import select_device
from labels import NUM_CLASSES
from losses import training_loss
from model import build
from views import ONE_VIEW, label_map, log_probabilities

SIZE = 512


def training_step(ours, images, target):
    """A function that takes one step of AdamW on CE + 1.5 Dice."""
    model = build("microsegformer").to(memory_format=torch.channels_last if ours else torch.preserve_format)
    optimiser = torch.optim.AdamW(model.parameters(), lr=8e-4, fused=ours)

    def step():
        if ours:
            loss = training_loss(model(images, full_size=False), target, dice=1.5, dice_over="all")
        else:
            logits = plain_forward(model, images)
            p, true = logits.softmax(1), F.one_hot(target, NUM_CLASSES).permute(0, 3, 1, 2).float()
            dice = (2 * (p * true).sum((2, 3)) + 1) / ((p + true).sum((2, 3)) + 1)
            loss = F.cross_entropy(logits, target) + 1.5 * (1 - dice.mean())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    return step


def inference_step(ours, images):
    """A function that makes uint8 labels (B, 512, 512) of uint8 images (B, 3, 512, 512)."""
    model = build("microsegformer").eval()

    @torch.inference_mode()
    def plain():
        return plain_forward(model, images.float() / 255).argmax(1).byte()

    if not ours:
        return plain
    model.to(memory_format=torch.channels_last)
    return lambda: label_map(log_probabilities([model], images, SIZE, ONE_VIEW), SIZE, SIZE)


def measure(what, batch, ours, threads):
    """(images/s, peak MiB) of this process."""
    select_device("cpu", threads)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)
    target = torch.randint(0, NUM_CLASSES, (batch, SIZE // 32, SIZE // 32)).repeat_interleave(32, 1)
    target = target.repeat_interleave(32, 2)
    step = training_step(ours, images / 255, target) if what == "training" else inference_step(ours, images)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return batch / median(seconds[1:]), int(peak[1]) / 1024


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=positive, default=2, help="measurements of each figure")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads of each process")
    parser.switch("--write", help="write docs/bench.md")
    args = parser.parse_args()
    lines = ["| what | images/s | baseline | ratio | peak MiB | baseline | ratio |", "|---|---|---|---|---|---|---|"]
    for what, batch in itertools.product(("training", "inference"), (1, 8)):
        found = {True: [], False: []}
        for _, ours in itertools.product(range(args.rounds), found):
            title = f"{what}, batch {batch}, {'ours' if ours else 'baseline'}"
            with show_time(title), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[ours].append(pool.submit(measure, what, batch, ours, args.threads).result())
        cells = []
        for ours, base in zip(zip(*found[True], strict=True), zip(*found[False], strict=True), strict=True):
            ratios = "; ".join(f"{a / b:.2f}" for a, b in zip(ours, base, strict=True))
            cells += [f"{median(ours):.4g}", f"{median(base):.4g}", ratios]
        lines.append(f"| {what}, batch {batch} | {' | '.join(cells)} |")
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    head = f"`make bench WRITE=1` on {cpu[1] if cpu else 'a CPU'}, {args.threads} threads, torch {torch.__version__}, "
    text = f"{head}{time.strftime('%F')}; a ratio for each round.\n\n" + "\n".join(lines) + "\n"
    print(text)
    if args.write:
        write_text("docs/bench.md", f"# MicroSegFormer against its layers evaluated one by one\n\n{text}")


if __name__ == "__main__":
    run_main(main)
