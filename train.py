"""Train a face parser; one run is one folder below runs/.

    python train.py --name a --dice 1.5 --lr 8e-4
    python train.py --resume a
    torchrun --standalone --nproc-per-node 2 train.py --name b --sizes 128:36,256:12 --batch 8

runs/NAME/ holds args.json (arguments, commit, versions), metrics.jsonl (a line an epoch), best.json (scores of the
best epoch by label and image), best.pt (inference) and last.pt (resume).
"""

import copy
import math
import signal
import sys
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import distributed
from augment import augment, draw, needs_pairs, slice_batch
from data import load_pairs, resolve, split
from errors import UserError, run_main
from evaluate import evaluate
from labels import NAMES
from losses import segmentation_loss
from metrics import batch_score, by_label, official_score
from model import PARAM_LIMIT, build, count_parameters
from options import class_weights, model_arguments, parse, strength
from rundir import append_metrics, find_weights, open_run, plain, truncate_metrics, write_best
from schedule import cost, learning_rate, parse_sizes, size_at

LONG_HOURS = 6


class Stop:
    """Remembers SIGINT or SIGTERM until the step is done."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        self.signal = number


def parameter_groups(model, weight_decay, decay_all):
    """AdamW groups: all parameters decayed, or only those of two dimensions and more."""
    if decay_all:
        return [{"params": list(model.parameters()), "weight_decay": weight_decay}]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@torch.no_grad()
def update_average(average, model, decay, step):
    """Move the average's weights and statistics towards the model's; the decay warms up from 0 over the first steps."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    for kept, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, share)
        else:
            kept.copy_(new)


def label_weights(args, pairs, indices, device):
    """Class weights as a tensor (19,) whose mean over the training pixels is 1, or None."""
    weights = class_weights(args)
    if weights is None:
        return None
    sample = pairs.masks[indices[:: max(1, len(indices) // 100)]]
    shares = np.bincount(sample.ravel(), minlength=len(NAMES)) / sample.size
    weights = 1 / np.sqrt(shares.clip(1e-4)) if weights == "balanced" else np.array(weights)
    return torch.tensor(weights / (weights * shares).sum(), dtype=torch.float32, device=device)


def precision(args, device):
    """A function that makes the autocast context, and the gradient scaler (does nothing unless fp16)."""
    kind = args.amp if args.amp != "auto" else "off"
    if args.amp == "auto" and device.type == "cuda":
        kind = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]

    def autocast():
        return torch.autocast(device.type, dtype if kind != "off" else None, enabled=kind != "off")

    return autocast, torch.amp.GradScaler(device.type, enabled=kind == "fp16")


class Source:
    """Training batches as uint8 tensors on the device: all pairs resident if they fit, else read from the map."""

    def __init__(self, pairs, indices, device, fix_sides):
        self.pairs, self.indices, self.device, self.fix_sides = pairs, indices, device, fix_sides
        self.resident = None
        size = len(indices) * (pairs.images[0].nbytes + pairs.masks[0].nbytes)
        if device.type == "cuda" and size < 0.4 * torch.cuda.mem_get_info(device)[0]:
            chunks = [self.read(chunk) for chunk in np.array_split(np.arange(len(indices)), len(indices) // 64 + 1)]
            self.resident = [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def read(self, positions):
        if self.resident is not None:
            chosen = torch.from_numpy(positions).to(self.device)
            return [part[chosen] for part in self.resident]
        batch = self.pairs.batch(self.indices[positions], self.fix_sides)
        return [torch.from_numpy(part).to(self.device, non_blocking=True) for part in batch]


def main(argv=None):
    args, given = parse(sys.argv[1:] if argv is None else argv)
    device = distributed.local_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    rank, processes = distributed.start(device)
    folder, args, state = open_run(args, given, rank)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = device.type == "cuda"

    if rank:
        distributed.wait()  # the first process builds the cache
    pairs = load_pairs(resolve(args.data), args.cache)
    if not rank:
        distributed.wait()
    train_indices, val_indices = split(len(pairs.names), args.val_split, args.split_seed)
    source = Source(pairs, train_indices, device, args.fix_sides)
    phases = parse_sizes(args.sizes, args.epochs)
    epochs = sum(length for _, length in phases)
    batch = min(args.batch, len(train_indices))
    changes = strength(args)
    if batch % processes or (processes > 1 and needs_pairs(changes) and batch // processes % 2):
        raise UserError(f"--batch {batch} does not share out evenly (in pairs for mixing) over {processes} processes")
    steps = len(train_indices) // batch
    mine = slice(rank * batch // processes, (rank + 1) * batch // processes)

    try:
        model = build(args.model, **model_arguments(args))
    except TypeError as error:
        raise UserError(f"--model-args: {args.model} does not take them: {error}") from None
    model.to(device, memory_format=torch.channels_last)
    if args.start_from and state is None:
        weights_file = find_weights(args.start_from, args.runs)
        checkpoint.load_state(model, checkpoint.load(weights_file)["state_dict"], weights_file)
    average = copy.deepcopy(model).requires_grad_(False) if args.ema else None
    optimiser = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay, args.decay_all), lr=args.lr, fused=device.type != "mps"
    )
    autocast, scaler = precision(args, device)
    weights = label_weights(args, pairs, train_indices, device)
    progress = {"epoch": 0, "step": 0, "loss": 0.0, "best": -1.0, "best_epoch": 0, "seconds": 0.0}
    if state:
        checkpoint.load_state(model, state["state_dict"], folder / "last.pt")
        if average:
            checkpoint.load_state(average, state["average"], folder / "last.pt")
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        progress = state["progress"]
        if not rank:
            truncate_metrics(folder, progress["epoch"])
    network = distributed.synchronise_batch_norm(model) if processes > 1 else model
    if args.compile:
        network = torch.compile(network)
    if processes > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)

    talk = not rank and sys.stdout.isatty()
    parameters = count_parameters(model)
    if not rank:
        limit = "" if parameters < PARAM_LIMIT else f" (NOT below the limit of {PARAM_LIMIT:,})"
        print(
            f"{folder}: {args.model} {parameters:,} parameters{limit}, {len(train_indices)} training and "
            f"{len(val_indices)} validation pairs, {epochs} epochs of {steps} steps, {device} x {processes}"
        )

    def save_last():
        if not rank:
            content = {
                "model": args.model, "model_args": model_arguments(args), "size": size_at(phases, epochs - 1),
                "state_dict": model.state_dict(), "average": average.state_dict() if average else None,
                "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict(), "progress": progress,
            }  # fmt: skip
            checkpoint.save(folder / "last.pt", content)

    def rate(epoch):
        return learning_rate(
            epoch, phases, lr=args.lr, warmup=args.warmup, kind=args.schedule, floor=args.lr_floor,
            period=args.restart_period, growth=args.restart_growth,
        )  # fmt: skip

    stop, clock, saved = Stop(), time.monotonic(), time.monotonic()
    model.train()
    for epoch in range(progress["epoch"], epochs):
        size = size_at(phases, epoch)
        stride = 1 if args.loss_grid == "image" else model.stride
        order = np.random.default_rng((args.seed, epoch)).permutation(len(train_indices))
        epoch_start, first = time.monotonic(), progress["step"]
        for step in range(first, steps):
            for group in optimiser.param_groups:
                group["lr"] = rate(epoch + (step + 1) / steps)
            torch.manual_seed(hash((args.seed, epoch, step, rank)) % 2**63)  # dropout restarts with the step
            drawn = slice_batch(draw(batch, changes, (args.seed, epoch, step)), mine.start, mine.stop)
            images, masks = source.read(order[step * batch : (step + 1) * batch][mine])
            images, target = augment(images, masks, drawn, size, stride, changes.exchange_sides)
            with autocast():
                logits = network(images, full_size=stride == 1)
            loss = segmentation_loss(
                logits.float(), target, ce=args.ce, dice=args.dice, focal=args.focal, class_weights=weights,
                smoothing=args.smoothing, dice_over=args.dice_over,
            )  # fmt: skip
            value = distributed.total(loss.detach().clone()).item() / processes
            if not math.isfinite(value):
                raise UserError(
                    f"loss is {value} in epoch {epoch + 1}, step {step + 1}: nothing was saved of it; try a lower --lr"
                )
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if args.clip:
                scaler.unscale_(optimiser)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            scaler.step(optimiser)
            scaler.update()
            if average:
                update_average(average, model, args.ema, epoch * steps + step)
            progress["loss"] += value
            progress["step"] = step + 1
            now = time.monotonic()
            progress["seconds"] += now - clock
            clock = now
            speed = (step + 1 - first) * batch / (now - epoch_start)
            if epoch == 0 and step == min(4, steps - 1) and not rank:
                warn_if_long(cost(phases, epochs) / size**2 * len(train_indices) / speed, args)
            if talk:
                done = cost(phases, epoch + (step + 1) / steps) / cost(phases, epochs)
                left = progress["seconds"] * (1 / done - 1) / 60
                print(
                    f"\repoch {epoch + 1}/{epochs} {size}px step {step + 1}/{steps} loss "
                    f"{progress['loss'] / (step + 1):.4f} {speed:.1f} images/s ETA {left:.0f} min ",
                    end="",
                )
            if distributed.any_of(bool(stop.signal), device):
                save_last()
                return interrupted(folder, stop.signal or signal.SIGTERM, epoch, rank)
            if distributed.any_of(now - saved > 60 * args.save_minutes and not rank, device):
                save_last()
                saved = now

        line = {
            "epoch": epoch + 1, "size": size, "lr": rate(epoch + 1), "loss": progress["loss"] / steps,
            "images_per_s": round(speed, 2) if first < steps else None,
        }  # fmt: skip
        tested = average or model
        last = epoch + 1 == epochs
        if len(val_indices) and ((epoch + 1) % args.val_every == 0 or last):
            confusions, losses = evaluate(
                tested, pairs, val_indices, args.val_size or size, device, share=(rank, processes), autocast=autocast
            )
            confusions = distributed.total(torch.from_numpy(confusions).to(device)).cpu().numpy()
            losses = distributed.total(torch.from_numpy(losses).float().to(device)).cpu().numpy()
            line |= {
                "val_loss": float(losses.mean()), "official": official_score(confusions),
                "batch32": batch_score(confusions), "labels": plain(by_label(confusions)[0]),
            }  # fmt: skip
        progress["seconds"] += time.monotonic() - clock
        clock = time.monotonic()
        line["minutes"] = round(progress["seconds"] / 60, 2)
        progress |= {"epoch": epoch + 1, "step": 0, "loss": 0.0}
        better = line.get("official", -1.0 if len(val_indices) else epoch) > progress["best"]
        if better:
            progress |= {"best": line.get("official", float(epoch)), "best_epoch": epoch + 1}
        if not rank:
            append_metrics(folder, line)
            if better:
                content = {
                    "model": args.model, "model_args": model_arguments(args), "size": args.val_size or size,
                    "state_dict": tested.state_dict(), "epoch": epoch + 1, "official": line.get("official"),
                }  # fmt: skip
                names = [pairs.names[i] for i in val_indices]
                write_best(folder, content, (line, confusions, names) if "official" in line else None)
            print(("\r" if talk else "") + epoch_line(line, epochs, better), flush=True)
        save_last()
        saved = time.monotonic()
        stale = epoch + 1 - progress["best_epoch"]
        if args.target and line.get("official", 0) >= args.target or args.patience and stale >= args.patience:
            break
    if not rank:
        print(f"best epoch {progress['best_epoch']}, official score {progress['best']:.4f}, weights {folder}/best.pt")
        print(f"next: make predict NAME={folder.name} IN=photos OUT=masks, or make submit NAME={folder.name}")
    return 0


def epoch_line(line, epochs, better):
    """One compact line of an epoch."""
    text = f"epoch {line['epoch']}/{epochs} {line['size']}px loss {line['loss']:.4f} lr {line['lr']:.2e}"
    if "official" in line:
        text += f" official {line['official']:.4f}{'*' if better else ''} batch32 {line['batch32']:.4f}"
    return text + f" {line['images_per_s']} images/s {line['minutes']:.1f} min"


def warn_if_long(seconds, args):
    """Say so when the first steps show that the run will take very long, and what would not."""
    if seconds > LONG_HOURS * 3600:
        print(
            f"at this speed the run takes about {seconds / 3600:.0f} hours on this device; RECIPE=cpu (128 then 256 "
            "pixels) fits an evening, and Ctrl-C here loses nothing",
            file=sys.stderr,
        )


def interrupted(folder, number, epoch, rank):
    """Report a clean stop and give the exit status of a process that died of this signal."""
    if not rank:
        print(f"\nstopped in epoch {epoch + 1}, saved; go on with: make resume NAME={folder.name}", flush=True)
    return 128 + number


if __name__ == "__main__":
    run_main(main)
