"""Throughput, memory and scale, each beside its limit: `make bench`.

python -m checks.bench                             # all parts, under ten minutes on two idle cores; runs/bench.json
python -m checks.bench --only network,views --quick
python -m checks.bench --write                     # docs/bench.md and the README's table from runs/bench.json

Variants are measured in turn, medians of repeats; where threads or peak memory matter, in processes of their own.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from atomic import write_text
from checks.bench_measure import ROOT, child, machine, median, ratio
from device import computes_bf16
from errors import ArgumentParser, UserError, run_main
from model import build
from parameters import count_parameters


@dataclass
class Row:
    """A line of the table: what was measured, in words, and where there is a mark whether it is reached."""

    part: str
    what: str
    measured: str
    figure: str = ""
    mark: str = ""
    reached: bool | None = None
    reason: str = ""  # why a mark is not reached


def times(value):
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def at_least(part, what, measured, value, mark, reason):
    """A row whose figure is a ratio that should reach the mark; `reason` is a text, or a function that measures it."""
    reached = value >= mark
    if callable(reason):
        reason = "" if reached else reason()
    return Row(part, what, measured, times(value), f"{mark:g}x", reached, reason)


def profile_reason(what, threads, **arguments):
    """The reason why a speed is not reached, from a profile: the operators that take the most of ours."""
    shares, _ = child("bench_network:profile", threads, what=what, **arguments)
    return "most of its time: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares)


MAPS = {"training": "maps that backward needs", "inference": "maps of the network"}


def network(quick, threads):
    """Part 1: MicroSegFormer evaluated literally against ours, training and inference, batch 1 and 8, and memory."""
    rows, size = [], 64 if quick else 512
    kinds = ["literal", "float32"] + (["bf16"] if computes_bf16() else [])
    for what in ("training", "inference"):
        for batch in (1,) if quick else (1, 8):
            given = {"what": what, "name": "microsegformer", "batch": batch, "size": size}
            seconds, before, peaks = {kind: [] for kind in kinds}, {}, {}
            # In processes of their own, for ours keep their memory.
            for _ in range(1 if quick else 3):
                for kind in kinds:
                    (second, before[kind]), peaks[kind] = child("bench_network:repeated", threads, kind=kind, **given)
                    seconds[kind].append(second)
            speed = {kind: batch / median(seconds[kind]) for kind in kinds}
            for kind in kinds[1:]:
                title = f"{what}, batch {batch}, {kind}"
                told = f"{speed['literal']:.2f} to {speed[kind]:.2f} images/s"
                reason = partial(profile_reason, threads=threads, kind=kind, **given)
                rows.append(at_least("network", title, told, ratio(seconds, "literal", kind), 3, reason))
                told = f"peak {peaks['literal']:.0f} to {peaks[kind]:.0f} MiB"
                reason = f"{before[kind]:.0f} MiB are torch, the weights and the images; the rest are {MAPS[what]}"
                rows.append(at_least("network", title, told, peaks["literal"] / peaks[kind], 3, reason))
            if batch > 1:
                kept = batch / child("bench_network:repeated", threads, kind="literal", keep=True, **given)[0][0]
                title = f"{what}, batch {batch}, float32, if the literal kept its memory too"
                told = f"{kept:.2f} to {speed['float32']:.2f} images/s"
                rows.append(Row("network", title, told, times(speed["float32"] / kept)))
    found, _ = child("bench_network:differences", threads, name="microsegformer", batch=1, size=size)
    for kind, (difference, same) in zip(kinds[1:], found, strict=False):
        told = f"logits differ by {difference:.1e} of the largest, {100 * same:.2f} % of labels are the same"
        rows.append(Row("network", f"agreement with the literal evaluation, {kind}", told))
    return rows


def processes(quick, threads):
    """Part 2: one process with two threads against two with one each, and what more would exchange."""
    speeds, _ = child(
        "bench_pixels:processes", 1, repeats=1 if quick else 2, count=8 if quick else 64, size=64 if quick else 256
    )
    model = build("microunet")
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    latency, step = child("bench_pixels:sums", 1, repeats=100)[0], 8 / speeds["2 x 1"]
    reason = (
        f"a sum of 1 KB over both takes {1e6 * latency:.0f} us, batch norm's {2 * len(norms)} in a step "
        f"{100 * 2 * len(norms) * latency / step:.1f} % of its {1e3 * step:.0f} ms; that at each of them one process "
        "waits for the other, and that batch norm over both passes over its maps twice more, is not measured apart"
    )
    rows = []
    for name in ("1 x 2", "2 x 1"):
        told = f"{speeds['1 x 1']:.2f} to {speeds[name]:.2f} images/s"
        gain = speeds[name] / speeds["1 x 1"]
        what = f"processes x threads: {name} against 1 x 1"
        if name == "2 x 1":
            rows.append(at_least("processes", what, told, gain, 1.8, reason))
        else:
            rows.append(Row("processes", what, told, times(gain)))
    sent = 4 * count_parameters(model) + sum(4 * 4 * m.num_features for m in norms)
    # A ring sends every byte on and back: 2 (n - 1) / n of the sum leaves each process.
    step, wire = 8 / speeds["1 x 1"], 2 * sent * 8 / 1e9
    told = (
        f"{sent / 1e6:.1f} MB a step in {2 * len(norms) + 1} sums: for many processes {wire:.2f} s at 1 Gbit/s, as "
        f"long as {8 * wire / step:.0f} images a process take: with fewer it stops scaling; a tenth at 10 Gbit/s"
    )
    rows.append(Row("processes", "on paper: bytes summed over processes", told))
    return rows


def data(quick, threads):
    """Part 3: epochs with and without the cache, memory on large sets, start-up of predict.py."""
    count = 8 if quick else 64
    (made, again), seconds = child("bench_pixels:epochs", threads, repeats=1 if quick else 3, count=count)[0]
    rows = [
        Row("data", f"cache of {count} pairs", f"made in {made:.2f} s, once; found again in {again:.2f} s"),
        Row(
            "data", "an epoch's reading, from files against the cache",
            f"{1e3 * median(seconds['files']) / count:.2f} to {1e3 * median(seconds['cache']) / count:.2f} ms a pair",
            times(ratio(seconds, "files", "cache")),
        ),
    ]  # fmt: skip
    reads = 64 if quick else 600
    memory = {n: child("bench_pixels:streaming", threads, count=n, reads=reads)[0] for n in (300, 3000, 30000)}
    own = [m[0] for m in memory.values()]
    told = ", ".join(f"{n:,} pairs {m[0]:.0f} MiB" for n, m in memory.items())
    told += f" (and up to {max(m[1] for m in memory.values()):.0f} MiB of file pages that the system can take back)"
    growth = max(own) / own[0] - 1
    rows.append(
        Row("data", f"own memory after {reads} pairs read", told, f"{100 * growth:+.1f} %", "flat: +5 %", growth < 0.05,
            "the names and the order of the pairs")
    )  # fmt: skip
    seconds, _ = child("bench_pixels:start_up", threads, repeats=1 if quick else 5)
    late = median([p - t for p, t in zip(seconds["predict"], seconds["torch"], strict=True)])
    told = f"{median(seconds['torch']):.2f} to {median(seconds['predict']):.2f} s"
    rows.append(
        Row("data", "predict.py on one image against `import torch`", told, f"+{late:.2f} s", "+0.5 s", late <= 0.5,
            "the processor time differs by 0.3 s; the rest is waiting for a busy machine")
    )  # fmt: skip
    return rows


def views(quick, threads):
    """Part 4: cost and peak memory of 2, 6 and 10 views against one."""
    size, listed = (64 if quick else 512), ["1", "flip", "flip,scales", "flip,0.75,0.875,1,1.125,1.25"]
    seconds, pixels = child("bench_network:views", threads, repeats=1 if quick else 5, size=size, listed=listed)[0]
    counts = dict(zip(listed, (1, 2, 6, 10), strict=True))
    rows = []
    for text in listed[1:]:
        cost = ratio(seconds, text, "1")
        excess = cost / pixels[text] - 1
        told = f"{cost:.2f} times one view's time for {pixels[text]:.2f} times its pixels"
        rows.append(
            Row("views", f"{counts[text]} views", told, f"{100 * excess:+.0f} %", "+10 %", excess <= 0.1,
                "softmax, mirroring back and averaging add 5 % to each view")
        )  # fmt: skip
    peaks = {text: child("bench_network:view_peak", threads, size=size, text=text)[1] for text in ("1.25", listed[-1])}
    one, many = peaks.values()
    rows.append(
        Row("views", "peak memory of 10 views against the largest alone", f"{one:.0f} to {many:.0f} MiB",
            f"{100 * (many / one - 1):+.0f} %", "flat: +10 %", many <= 1.1 * one, "the average beside the view")
    )  # fmt: skip
    return rows


def limit(quick, threads):
    """Part 5: the share of the machine's sgemm rate that MicroUNet's training and inference reach."""
    from checks.bench_network import release_size

    settings = {"batch": 2, "size": 64} if quick else release_size()
    side, repeats = (256, 1) if quick else (2048, 5)
    seconds, counts = child("bench_network:limit", threads, repeats=repeats, side=side, settings=settings)[0]
    rate = {name: 2e-9 * counts[name] / median(seconds[name]) for name in counts}
    rows = [
        Row(
            "limit",
            f"matrix products, {side} x {side}",
            f"float32 {rate['sgemm']:.0f} Gflop/s, bf16 {rate['bf16 gemm']:.0f}",
        )
    ]
    for name in ("training float32", "training bf16", "inference"):
        if name.endswith("bf16") and not computes_bf16():
            continue
        kind = name.removeprefix("training ")
        product = "bf16 gemm" if kind == "bf16" else "sgemm"
        share = rate[name] / rate[product]
        what = f"MicroUNet {name}, batch {settings['batch']} at {settings['size']} px"
        told = f"{settings['batch'] / median(seconds[name]):.2f} images/s, {rate[name]:.1f} Gflop/s"
        row = Row("limit", what, told, f"{100 * share:.0f} % of {product}")
        if name.startswith("training"):
            row.mark, row.reached = "45 %", share >= 0.45
            if not row.reached:
                row.reason = profile_reason("training", threads, kind=kind, name="microunet", **settings)
        rows.append(row)
    return rows


def score(quick, threads):
    """Part 6: the official score of 100 masks against the formula written plainly."""
    count = 4 if quick else 100
    (seconds, values), _ = child("bench_pixels:score", 1, repeats=1 if quick else 5, count=count)
    told = f"{1e3 * median(seconds['plain']):.0f} to {1e3 * median(seconds['ours']):.1f} ms, "
    told += f"both {values['ours']:.6f}" if abs(values["ours"] - values["plain"]) < 1e-12 else f"DIFFERENT: {values}"
    reason = "a mask with many short runs of labels has more of them to count"
    return [at_least("score", f"official score of {count} masks", told, ratio(seconds, "plain", "ours"), 20, reason)]


def augmentation(quick, threads):
    """Part 7: augmentation against kornia's chain."""
    size, batch = (64, 2) if quick else (512, 8)
    seconds, _ = child("bench_pixels:augmentation", threads, repeats=1 if quick else 5, batch=batch, size=size)
    speed = {name: 4 * batch / median(values) for name, values in seconds.items()}
    what = f'"advanced" at {size} px, batch {batch}'
    if "kornia" not in seconds:
        return [Row("augmentation", what, f"{speed['ours']:.0f} images/s; kornia is not installed")]
    told = f"kornia {speed['kornia']:.0f}, ours {speed['ours']:.0f} images/s"
    reason = "the 19 maps of blended labels take a third of the time, resampling a sixth"
    return [at_least("augmentation", what, told, ratio(seconds, "kornia", "ours"), 2, reason)]


KEPT = Path("runs/bench.json")
PARTS = {f.__name__: f for f in (network, processes, data, views, limit, score, augmentation)}


def table(rows, marked=False):
    """Markdown of rows as dicts; those with a mark alone where `marked`, and below it what is not reached, and why."""
    rows = [row for row in rows if row["mark"] or not marked]
    reached = {True: "yes", False: "no", None: ""}
    lines = ["| part | what | measured | figure | mark | reached |", "|---|---|---|---|---|---|"]
    for r in rows:
        cells = (r["part"], r["what"], r["measured"], r["figure"], r["mark"], reached[r["reached"]])
        lines.append(f"| {' | '.join(cells)} |")
    reasons = {}
    for r in rows:
        if r["reached"] is False:
            reasons.setdefault(r["reason"], []).append(f"{r['part']}: {r['what']}")
    if reasons and not marked:
        lines += ["", "Not reached, and why:", ""]
        lines += [f"- {'; '.join(dict.fromkeys(whats))}. {reason}" for reason, whats in reasons.items()]
    return "\n".join(lines)


def write_pages(result):
    """docs/bench.md, and the README's table between its two markers."""
    page = f"# Benchmark\n\nMade from `runs/bench.json` by `python -m checks.bench --write`.\n\n{result['machine']}\n\n"
    write_text(ROOT / "docs/bench.md", page + table(result["rows"]) + "\n")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = f"<!-- bench -->\n{result['machine']}\n\n{table(result['rows'], marked=True)}\n<!-- /bench -->"
    write_text(ROOT / "README.md", re.sub(r"<!-- bench -->.*<!-- /bench -->", lambda _: text, readme, flags=re.S))


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that the parts run")
    parser.add_argument("--threads", type=int, default=2, help="threads of each measured process")
    parser.add_argument("--json", type=Path, help=f"where the result is kept; {KEPT} where all is measured in full")
    parser.add_argument(
        "--write", action="store_true", help="measure nothing; make docs/bench.md and the README's table"
    )
    args = parser.parse_args()
    if args.write:
        kept = args.json or KEPT
        if not kept.is_file():
            raise UserError(f"no {kept}; `make bench` measures first")
        write_pages(json.loads(kept.read_text(encoding="utf-8")))
        return
    chosen = args.only.split(",")
    kept = args.json or (KEPT if not args.quick and chosen == list(PARTS) else None)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise UserError(f"--only {args.only}: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    result = {"machine": machine(args.threads), "quick": args.quick, "rows": []}
    print(result["machine"], flush=True)
    for name in chosen:
        rows = [asdict(row) for row in PARTS[name](args.quick, args.threads)]
        result["rows"] += rows
        print("\n" + table(rows), flush=True)
        if kept:
            write_text(kept, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
