"""Benchmark speed, memory and scaling, each against its baseline in the same run.

make bench WRITE=1                                 # at most 10 minutes on two idle cores; writes docs/bench.md
python -m checks.bench --only network,views --rounds 1

Baseline and ours take turns for --rounds rounds, in processes of their own if peak memory or the number of threads
matters. Peak memory is the process's on a CPU (Linux only) and that of torch's tensors on a GPU.
"""

import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

from common import ArgumentParser, UserError, positive, run_main, show_time, write_text

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from augment import PRESETS, Strength, augment, draw
from checks.references import plain_forward
from data import IMAGE_BYTES, SIZE, Batches, Pairs, load_pairs
from device import amp_dtype, select_device
from evaluate import confusion, official_score
from labels import NUM_CLASSES
from model import build
from options import parse
from tools.synth import make_dataset
from train import load_batch, read_status, set_up, train_step
from views import ONE_VIEW, input_size, label_map, log_probabilities, parse_views

FACES, CACHE = Path("build/bench-faces"), Path("build/bench-cache")
VIEWS = {"flip": (2, "1"), "flip,scales": (6, "1.25"), "flip,0.75,0.875,1,1.125,1.25": (10, "1.25")}
AMP = {"float32": "off", "bf16": "bf16"}
# The second shows how much of the gain on a CPU comes from keeping freed memory.
BASELINES = "baseline", "baseline that keeps freed memory"


def row(what, unit, baseline, ours, target=""):
    """A line of the table: medians over the rounds and of ours / baseline; `target`: ">= 3", "<= 1.1" or ""."""
    ratio = median(b / a for a, b in zip(baseline, ours, strict=True))
    shown = [f"{median(values):.{0 if median(values) >= 100 else 2}f} {unit}" for values in (baseline, ours)]
    met = ""
    if target:
        sign, bound = target.split()
        met = "yes" if (ratio >= float(bound) if sign == ">=" else ratio <= float(bound)) else "no"
    return {"what": what, "baseline": shown[0], "ours": shown[1], "ratio": f"{ratio:.2f}", "target": target, "met": met}


def speeds(work, rounds):
    """Amounts per second {name: [one per round]} of {name: (amount, function)}, called in turn after a warm-up."""
    result = {name: [] for name in work}
    for number, name in itertools.product(range(rounds + 1), work):
        amount, function = work[name]
        begin = time.perf_counter()
        function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if number:
            result[name].append(amount / (time.perf_counter() - begin))
    return result


def memory(key="VmHWM"):
    """Peak MiB of this process, or of torch's tensors on a GPU; key RssAnon: what is not mapped from files."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def in_process(threads, function, *arguments):
    """(function(*arguments), peak MiB) from a new process, not a fork, whose torch uses `threads` threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *arguments).result(), pool.submit(memory).result()


def faces(count, device):
    """uint8 images (B, 3, 512, 512) and masks (B, 512, 512) of synthetic faces."""
    return [torch.from_numpy(part).to(device) for part in load_pairs(FACES, CACHE).batch(np.arange(count))]


def training(device, *flags):
    """A function that takes one step of train.py at 512 pixels, augmentation included."""
    places = [f"--data={FACES}", f"--cache={CACHE}", f"--device={device}", "--name=bench", f"--sizes={SIZE}:9"]
    with tempfile.TemporaryDirectory() as runs:
        run = set_up(parse([*flags, *places, f"--runs={runs}"])[0])
    return lambda: read_status(run, train_step(run, 0, 0, *load_batch(run, 0, np.arange(run.batch), 0)), 0, 0)


def baseline_training(device, batch):
    """The same for the baseline of MicroSegFormer: CE + Dice of full-size logits and one-hot labels."""
    model = build("microsegformer").to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=8e-4)
    images, masks = faces(batch, device)

    def step():
        x, target = augment(images, masks, draw(batch, Strength(**PRESETS["basic"]), (0,)), SIZE)
        logits = plain_forward(model, x)
        p, true = logits.softmax(1), F.one_hot(target, NUM_CLASSES).permute(0, 3, 1, 2).float()
        dice = (2 * (p * true).sum((2, 3)) + 1) / ((p + true).sum((2, 3)) + 1)
        loss = F.cross_entropy(logits, target) + 1.5 * (1 - dice.mean())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    return step


@torch.inference_mode()
def predict(model, images, kind):
    """uint8 labels (B, 512, 512) of uint8 images (B, 3, 512, 512); kind as in `network_speed`."""
    if kind in BASELINES:
        return plain_forward(model, images.float() / 255).argmax(1).byte()
    with torch.autocast(images.device.type, torch.bfloat16, kind == "bf16"):
        return label_map(log_probabilities([model], images, SIZE, ONE_VIEW), SIZE, SIZE)


def network_speed(what, kind, device, batch):
    """Images/s of "training" or "inference"; kind: one of BASELINES, float32 or bf16."""
    if kind != "baseline":
        select_device(device)  # a CPU process then keeps freed memory
    if what == "inference":
        layout = torch.preserve_format if kind in BASELINES else torch.channels_last
        model = build("microsegformer").to(device, memory_format=layout).eval()
        step = partial(predict, model, faces(batch, device)[0], kind)
    elif kind in BASELINES:
        step = baseline_training(device, batch)
    else:
        step = training(device, f"--batch={batch}", f"--amp={AMP[kind]}")
    return median(speeds({kind: (batch, step)}, max(1, 4 // batch))[kind])


def network(args):
    """MicroSegFormer at 512 pixels against the baseline, the same layers evaluated as in the reference, in float32."""
    rows = []
    for what, batch in itertools.product(("training", "inference"), (1, 8)):
        results = {kind: [] for kind in (*BASELINES, *args.kinds)}
        for _, kind in itertools.product(range(args.rounds), results):
            results[kind].append(in_process(args.threads, network_speed, what, kind, args.device, batch))
        found, peaks = ({kind: [pair[i] for pair in pairs] for kind, pairs in results.items()} for i in (0, 1))
        title = f"{what}, batch {batch}"
        for kind in args.kinds:
            rows.append(row(f"{title}, {kind}", "images/s", found["baseline"], found[kind], ">= 3"))
            rows.append(row(f"{title}, {kind}, peak", "MiB", peaks["baseline"], peaks[kind], "<= 0.33"))
        rows.append(row(f"{title}, float32, against {BASELINES[1]}", "images/s", found[BASELINES[1]], found["float32"]))
    return rows


def streaming(count):
    """MiB of own memory after reading 600 training pairs of a set of `count`."""
    with tempfile.NamedTemporaryFile(dir=CACHE) as file:
        file.truncate(count * SIZE * SIZE * 4)  # a sparse file: zeros that take no disk space
        images = np.memmap(file.name, np.uint8, "r", 0, (count, 3, SIZE, SIZE))
        masks = np.memmap(file.name, np.uint8, "r", count * IMAGE_BYTES, (count, SIZE, SIZE))
        pairs = Pairs(images, masks, np.zeros(count, bool), [str(i) for i in range(count)])
        batches = Batches(pairs, np.arange(count), torch.device("cpu"), fix_sides=True)
        for positions in np.resize(np.arange(len(batches.indices)), (75, 8)):
            batches.read(positions)
    return memory("RssAnon")


def data(args):
    """Memory as the data set grows; start-up of predict.py."""
    few, many = ([in_process(args.threads, streaming, count)[0]] for count in (300, 30000))
    rows = [row("memory for 30,000 training pairs against 300", "MiB", few, many, "<= 1.05")]
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--input={FACES}/test/images", f"--output={folder}", "--device=cpu"]
        commands = [sys.executable, "-c", "import torch"], [sys.executable, "predict.py", *flags]
        work = {command[1]: (1, partial(subprocess.check_output, command)) for command in commands}
        seconds = [[1 / speed for speed in values] for values in speeds(work, args.rounds).values()]
    return [*rows, row("start-up: predict.py of one image against `import torch`", "s", *seconds, "<= 1.3")]


def views_speed(rounds, device, texts):
    """Megapixels per second, {text: [one per round]}, that MicroUNet processes for these views of one image."""
    model = build("microunet").to(select_device(device), memory_format=torch.channels_last).eval()
    image, work = faces(1, device)[0], {}
    for text in texts:
        chosen = parse_views(text)
        pixels = (1 + chosen.flip) * sum(np.prod(input_size(SIZE, SIZE, SIZE, scale)) for scale in chosen.scales)
        work[text] = pixels / 1e6, partial(log_probabilities, [model], image, SIZE, chosen)
    return speeds(work, rounds)


def views(args):
    """Speed and peak memory of several views against one."""
    found, _ = in_process(args.threads, views_speed, args.rounds, args.device, ["1", *VIEWS])
    rows = []
    for text, (count, largest) in VIEWS.items():
        rows.append(row(f"{count} views against one", "Mpixel/s", found["1"], found[text], ">= 0.9"))
        peaks = [[in_process(args.threads, views_speed, 0, args.device, [key])[1]] for key in (largest, text)]
        rows.append(row(f"{count} views against the largest alone, peak", "MiB", *peaks, "<= 1.1"))
    return rows


def flop_rates(rounds, device, kinds):
    """Gflop/s of matrix products and of MicroUNet's training with the release's recipe, {name: [one per round]}."""
    a = torch.randn(2048, 2048, device=device)
    functions = {"float32 gemm": partial(torch.mm, a, a), "bf16 gemm": partial(torch.mm, a.bfloat16(), a.bfloat16())}
    functions |= {kind: training(device, "--recipe=release", f"--amp={AMP[kind]}") for kind in kinds}
    work = {}
    for name, function in functions.items():
        with FlopCounterMode(display=False) as counter:
            function()
        work[name] = counter.get_total_flops() / 1e9, function
    return speeds(work, rounds)


def limit(args):
    """MicroUNet's training at 512 pixels with the release's recipe against matrix products of 2048 x 2048."""
    found, _ = in_process(args.threads, flop_rates, args.rounds, args.device, args.kinds)
    return [
        row(f"MicroUNet step against {k} gemm", "Gflop/s", found[f"{k} gemm"], found[k], ">= 0.45") for k in args.kinds
    ]


def plain_score(pred, true):
    """The challenge's formula, label by label."""
    scores = []
    for label in np.unique(true):
        p, t = pred == label, true == label
        precision, recall = np.sum(p & t) / (np.sum(p) + 1e-7), np.sum(p & t) / (np.sum(t) + 1e-7)
        scores.append(2 * precision * recall / (precision + recall + 1e-7))
    return np.mean(scores)


def score(args):
    """The official score against the plain formula."""
    masks = [(np.roll(mask, 3, 0), mask) for mask in load_pairs(FACES, CACHE).masks]
    work = {
        "plain": (len(masks), lambda: np.mean([plain_score(*pair) for pair in masks])),
        "ours": (len(masks), lambda: official_score(np.stack([confusion(*pair) for pair in masks]))),
    }
    return [row("official score against the plain formula", "masks/s", *speeds(work, args.rounds).values(), ">= 20")]


def threads(args):
    """Training with two threads against one."""
    what = "training", "float32", "cpu", 8
    found = [[in_process(count, network_speed, *what)[0] for count in (1, 2)] for _ in range(args.rounds)]
    return [row("MicroSegFormer training, batch 8, 2 threads against 1", "images/s", *zip(*found, strict=True))]


PARTS = {part.__name__: part for part in (network, data, views, limit, score, threads)}


def table(rows):
    """Rows as a Markdown table."""
    columns = ["part", "what", "baseline", "ours", "ratio", "target", "met"]
    lines = [columns, ["---"] * len(columns), *([line[column] for column in columns] for line in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(args):
    """The processor, the settings and the date in one line."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu[1] if cpu else "CPU"
    return f"{name}, {args.threads} threads, torch {torch.__version__}, rounds: {args.rounds}, {time.strftime('%F')}"


def main():
    parser = ArgumentParser(description="Benchmark speed, memory and scaling against baselines.")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run")
    parser.add_argument("--rounds", type=positive, default=2, help="measurements of each figure")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads of each process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda is untested")
    parser.switch("--write", help="write docs/bench.md and runs/bench.json; needs all parts")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise UserError(f"--only {args.only}: no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    if args.write and chosen != list(PARTS):
        raise UserError("--write replaces the whole table: remove --only")
    native = amp_dtype("auto", select_device(args.device)) is torch.bfloat16
    args.kinds = ["float32", "bf16"] if native else ["float32"]
    make_dataset(FACES, train=100, dev=1, test=1)
    load_pairs(FACES, CACHE)
    rows = []
    print(machine(args), flush=True)
    for name in chosen:
        with show_time(f"measuring {name}"):
            found = [{"part": name, **line} for line in PARTS[name](args)]
        if found:
            print(f"\n{table(found)}", flush=True)
        rows += found
    if args.write:
        head = f"# Benchmark\n\n`make bench WRITE=1` on {machine(args)}. Ratio: ours / baseline.\n\n"
        write_text("docs/bench.md", f"{head}{table(rows)}\n")
        write_text("runs/bench.json", json.dumps({"machine": machine(args), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
