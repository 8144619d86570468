"""Train a face parser; one run is one folder below runs/.

python train.py --name a --dice 1.5 --lr 8e-4
python train.py --resume a
torchrun --standalone --nproc-per-node 2 train.py --name b --sizes 128:36,256:12 --batch 8

runs/NAME/ holds args.json (arguments, commit, versions), metrics.jsonl (a line an epoch), best.json (scores of the
best epoch by label and image), best.pt (inference) and last.pt (resume).
"""

import math
import re
import signal
import sys
import time
import traceback

import numpy as np
import torch
from torch import nn

import checkpoint
import distributed
from augment import augment, draw, slice_batch
from errors import UserError, run_main
from evaluate import evaluate
from losses import training_loss
from metrics import batch_score, by_label, official_score
from optimisation import update_average
from options import model_arguments, parse
from parameters import PARAM_LIMIT, count_parameters
from report import redraw, write_page
from rundir import append_metrics, close_run, in_force, make_name, plain, write_best
from schedule import learning_rate, size_at
from state import save_last, set_up
from terminal import show_line
from trainlog import closing, epoch_line, long_warning, step_line

LOST = re.compile("connection|broken pipe|closed by|read error|write error|socket", re.IGNORECASE)


def rate_at(args, phases, epoch):
    """Learning rate after `epoch` epochs, a float."""
    return learning_rate(
        epoch, phases, lr=args.lr, warmup=args.warmup, kind=args.schedule, floor=args.lr_floor,
        period=args.restart_period, growth=args.restart_growth,
    )  # fmt: skip


def train_step(t, epoch, step, positions):
    """One step on the pairs at `positions` (of the whole batch); the loss over all processes, finite, as a float."""
    args = t.args
    for group in t.optimiser.param_groups:
        group["lr"] = rate_at(args, t.phases, epoch + (step + 1) / t.steps)
    # Dropout draws from the step's own seed, so that a resumed run draws the same.
    torch.manual_seed(int(np.random.SeedSequence((args.seed, epoch, step, t.rank)).generate_state(1)[0]))
    mine = slice(t.rank * t.batch // t.processes, (t.rank + 1) * t.batch // t.processes)
    drawn = slice_batch(draw(t.batch, t.changes, (args.seed, epoch, step)), mine.start, mine.stop)
    images, masks = t.batches.read(positions[mine])
    stride = 1 if args.loss_grid == "image" else t.model.stride
    images, target = augment(images, masks, drawn, size_at(t.phases, epoch), stride, t.changes.exchange_sides)
    with t.autocast():
        logits = t.network(images, full_size=False)
    loss = training_loss(
        logits.float(), target, ce=args.ce, dice=args.dice, focal=args.focal, class_weights=t.label_weights,
        smoothing=args.smoothing, dice_over=args.dice_over, lovasz=args.lovasz,
    )  # fmt: skip
    value = distributed.total(loss.detach().clone()).item() / t.processes
    if not math.isfinite(value):
        raise UserError(
            f"the loss is {value} in epoch {epoch + 1}, step {step + 1}; the last save is whole: try a lower --lr"
        )
    t.optimiser.zero_grad(set_to_none=True)
    t.scaler.scale(loss).backward()
    if args.clip:
        t.scaler.unscale_(t.optimiser)
    norm = nn.utils.clip_grad_norm_(t.model.parameters(), args.clip or math.inf)
    if not (norm.isfinite() or t.scaler.is_enabled()):  # the scaler passes over such a step itself
        raise UserError(
            f"the gradient is {norm} in epoch {epoch + 1}, step {step + 1}; the last save is whole: try a lower --lr"
        )
    t.scaler.step(t.optimiser)
    t.scaler.update()
    if t.average:
        update_average(*t.averaging, args.ema, epoch * t.steps + step)
    return value


def validate(t, size):
    """Scores of the averaged weights (the plain ones without --ema) on the held-out pairs: (metrics, confusions).

    None where a signal came meanwhile.
    """
    confusions, losses = scored(t, t.val_indices, size)
    sample = min(t.args.train_score, len(t.val_indices))
    of_training = scored(t, t.batches.indices[:sample], size)[0] if sample else None
    if distributed.any_of(bool(t.caught), t.device):
        return None
    if not math.isfinite(losses.mean()):
        raise UserError(f"the validation loss is {losses.mean()}; the last save is whole: try a lower --lr")
    metrics = {
        "val_loss": float(losses.mean()), "official": official_score(confusions), "batch32": batch_score(confusions),
        "labels": plain(by_label(confusions)[0]),
    }  # fmt: skip
    if sample:
        metrics["train_official"] = official_score(of_training)
    return metrics, confusions


def scored(t, indices, size):
    """Confusions (N, 19, 19) and losses (N,) of some pairs, each process having done its share."""
    confusions, losses = evaluate(
        t.average or t.model, t.pairs, indices, t.args.val_size or size, t.device, share=(t.rank, t.processes),
        stop=lambda: bool(t.caught),
    )  # fmt: skip
    confusions = distributed.total(torch.from_numpy(confusions).to(t.device)).cpu().numpy()
    return confusions, distributed.total(torch.from_numpy(losses).float().to(t.device))


def close_epoch(t, epoch, line):
    """Validate where it is due, and record the epoch: metrics.jsonl, best.pt, last.pt; the epoch's line completed.

    False where a signal came meanwhile: the epoch is not recorded then, and a resumed run validates.
    """
    size, scores = size_at(t.phases, epoch), None
    start = time.monotonic()
    if len(t.val_indices) and ((epoch + 1) % t.args.val_every == 0 or epoch + 1 == t.epochs):
        if t.rank == 0:
            show_line(f"epoch {epoch + 1}/{t.epochs} scoring {len(t.val_indices)} validation images", sys.stdout)
        validated = validate(t, size)
        if not validated:
            return False
        metrics, confusions = validated
        line |= metrics
        scores = line, confusions, [t.pairs.names[i] for i in t.val_indices]
    t.progress["seconds"] += time.monotonic() - start
    line["minutes"] = round(t.progress["seconds"] / 60, 2)
    # Without validation the last epoch is the best there is.
    score = line.get("official", -1.0) if len(t.val_indices) else float(epoch)
    better = score > t.progress["best"]
    if better:
        t.progress |= {"best": score, "best_epoch": epoch + 1}
    t.progress |= {"epoch": epoch + 1, "step": 0, "loss": 0.0}
    if t.rank == 0:
        checkpoint.must_be_finite(t.model, t.average)
        append_metrics(t.folder, line)
        content = {
            "model": t.args.model, "model_args": model_arguments(t.args), "size": t.args.val_size or size,
            "state_dict": (t.average or t.model).state_dict(), "epoch": epoch + 1, "official": line.get("official"),
            "validated": bool(len(t.val_indices)),
        }  # fmt: skip
        if better:
            write_best(t.folder, content, scores)
        if t.args.keep_every and (epoch + 1) % t.args.keep_every == 0:
            checkpoint.save(t.folder / f"epoch-{epoch + 1:03d}.pt", content)
        show_line("", sys.stdout)
        print(epoch_line(line, t.epochs, better), flush=True)
    save_last(t)
    if t.rank == 0 and scores:
        show_run(t)
    return True


def stop_asked(t):
    """The number of the signal that asked any process to stop, all being saved, or 0."""
    if not distributed.any_of(bool(t.caught), t.device):
        return 0
    save_last(t)
    return t.caught[0] if t.caught else signal.SIGTERM


def show_run(t):
    """Rewrite the page of all runs, with this run's pictures where its best weights are new.

    A page is not worth a training: whatever goes wrong with it is told, and the training goes on.
    """
    try:
        if (t.folder / "best.json").is_file():
            redraw(t.folder, t.device)
        write_page(t.folder.parent)
    except UserError as error:
        print(f"{t.folder.parent}/index.html: {error}", file=sys.stderr)
    except Exception:  # noqa: BLE001 - see above
        traceback.print_exc()


def finished(t):
    """Whether the target is reached or the patience is over."""
    stale = t.progress["epoch"] - t.progress["best_epoch"]
    return 0 < t.args.target <= t.progress["best"] or 0 < t.args.patience <= stale


def train(t):
    """The epochs that are left; the number of the signal that stopped them, or 0."""
    if t.rank == 0:
        show_run(t)
    clock = saved = time.monotonic()
    t.model.train()
    for epoch in range(t.progress["epoch"], t.epochs):
        if finished(t):
            break
        if number := stop_asked(t):
            return number
        order = t.batches.order((t.args.seed, epoch))
        begun, first, speed = time.monotonic(), t.progress["step"], None
        for step in range(first, t.steps):
            loss = train_step(t, epoch, step, order[step * t.batch : (step + 1) * t.batch])
            now = time.monotonic()
            t.progress["seconds"] += now - clock
            clock = now
            t.progress |= {"loss": t.progress["loss"] + loss, "step": step + 1}
            speed = (step + 1 - first) * t.batch / (now - begun)
            if t.rank == 0:
                mean, seconds = t.progress["loss"] / (step + 1), t.progress["seconds"]
                show_line(step_line(t.phases, epoch, step + 1, t.steps, mean, speed, seconds), sys.stdout)
            if step == first:
                warm = now  # the first step also fills caches and pools of memory
            elif t.rank == 0 and epoch == 0 and step == first + 3:
                show_line("", sys.stdout)
                warning = long_warning(t.phases, t.steps, t.batch, 3 * t.batch / (now - warm))
                print(warning, end="", file=sys.stderr)
            if number := stop_asked(t):
                return number
            if t.rank == 0 and now - saved > 60 * t.args.save_minutes:
                save_last(t)
                saved = now
        line = {
            "epoch": epoch + 1, "size": size_at(t.phases, epoch), "lr": rate_at(t.args, t.phases, epoch + 1),
            "loss": t.progress["loss"] / t.steps, "images_per_s": speed and round(speed, 2),
        }  # fmt: skip
        if not close_epoch(t, epoch, line):
            return stop_asked(t)
        clock = saved = time.monotonic()
    return 0


def main():
    args = in_force(*parse(sys.argv[1:]))
    try:
        return run_of(args)
    except (RuntimeError, ConnectionError) as error:
        if distributed.processes() == 1 or not LOST.search(str(error)):
            raise
        # Where the first process has failed, it has told why; what the others see is a closed connection.
        raise UserError("another process of this training has ended; `make resume NAME=...` goes on with it") from None


def run_of(args):
    """Set up the training that the arguments describe, train, and tell what it leaves; the exit status."""
    began = time.monotonic()
    t = set_up(args)
    t.progress["seconds"] += time.monotonic() - began  # a run's minutes count its cache and set-up
    count = count_parameters(t.model)
    if t.rank == 0:
        print(
            f"{t.folder}: {t.args.model} {count:,} parameters{'' if count < PARAM_LIMIT else ' (TOO MANY to submit)'}, "
            f"{len(t.batches.indices)} training and {len(t.val_indices)} validation pairs, {t.epochs} epochs of "
            f"{t.steps} steps of {t.batch} images, {t.device} x {t.processes}",
            flush=True,
        )
    if t.args.resume and (t.progress["epoch"] == t.epochs or finished(t)):
        if t.rank == 0:
            close_run()
            show_run(t)
            name = make_name(t.folder)
            print(f"finished: nothing is left to resume; `make train FROM={name}` starts a new run from its weights")
        return 0
    number = train(t)
    if t.rank == 0:
        close_run()
        show_run(t)
        show_line("", sys.stdout)
        print(closing(t.folder, t.progress, len(t.val_indices), number))
    return 128 + number if number else 0


if __name__ == "__main__":
    try:
        run_main(main)
    except SystemExit as ended:
        distributed.leave(ended.code)
