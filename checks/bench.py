"""Time MicroSegFormer, and its peak memory, against the same layers evaluated one by one as in the reference.

make bench                   # some minutes on two idle cores

Both networks, in float32 at 512 pixels, run in processes of their own that take turns, and both keep freed memory.
"""

import itertools
import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from common import ArgumentParser, positive, run_main, show_line

import torch
import torch.nn.functional as F

from checks.references import plain_attention, plain_forward
from device import select_device
from labels import NUM_CLASSES
from losses import training_loss
from model import build
from views import ONE_VIEW, label_map, log_probabilities

SIZE = 512


def make_step(training, ours, images, target):
    """A function that takes one step of AdamW on CE + 1.5 Dice, or makes uint8 labels (B, 512, 512) of the images."""
    model = build("microsegformer").train(training)
    model.to(memory_format=torch.channels_last if ours else torch.preserve_format)
    optimiser = torch.optim.AdamW(model.parameters(), lr=8e-4, fused=ours)

    def train():
        if ours:
            loss = training_loss(model(images / 255, full_size=False), target, dice=1.5, dice_over="all")
        else:
            logits = plain_forward(model, images / 255)
            p, true = logits.softmax(1), F.one_hot(target, NUM_CLASSES).permute(0, 3, 1, 2).float()
            dice = (2 * (p * true).sum((2, 3)) + 1) / ((p + true).sum((2, 3)) + 1)
            loss = F.cross_entropy(logits, target) + 1.5 * (1 - dice.mean())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    @torch.inference_mode()
    def predict():
        if ours:
            return label_map(log_probabilities([model], images, SIZE, ONE_VIEW), SIZE, SIZE)
        return plain_forward(model, images / 255).argmax(1).byte()

    return train if training else predict


def measure(training, batch, ours, threads):
    """(images/s, peak MiB) of this process."""
    select_device("cpu", threads)
    if not ours:
        F.scaled_dot_product_attention = plain_attention
    images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)
    target = torch.randint(0, NUM_CLASSES, (batch, SIZE // 32, SIZE // 32))
    step = make_step(training, ours, images, target.repeat_interleave(32, 1).repeat_interleave(32, 2))
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
    args = parser.parse_args()
    print("| what | images/s | baseline | ratios | peak MiB | baseline | ratios |\n|---|---|---|---|---|---|---|")
    for training, batch in itertools.product((True, False), (1, 8)):
        title, found = f"{'training' if training else 'inference'}, batch {batch}", {True: [], False: []}
        for _, ours in itertools.product(range(args.rounds), found):
            show_line(f"{title}: measuring {'ours' if ours else 'the baseline'}", sys.stderr)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[ours].append(pool.submit(measure, training, batch, ours, args.threads).result())
        cells = []
        for ours, base in zip(zip(*found[True], strict=True), zip(*found[False], strict=True), strict=True):
            ratios = "; ".join(f"{a / b:.2f}" for a, b in zip(ours, base, strict=True))
            cells += [f"{median(ours):.4g}", f"{median(base):.4g}", ratios]
        show_line("", sys.stderr)
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_main(main)
