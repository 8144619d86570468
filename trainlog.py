"""The lines of a training: the running one, one an epoch, a warning where it will be long, the closing ones."""

import sys

from rundir import make_name
from schedule import cost, size_at
from terminal import duration, style

LONG_HOURS = 6


def step_line(phases, epoch, step, steps, loss, speed, seconds):
    """The running line: `step` of `steps` of `epoch` (from 0) are done, after so many seconds in all."""
    total = sum(length for _, length in phases)
    done = cost(phases, epoch + step / steps) / cost(phases, total)
    return (
        f"epoch {epoch + 1}/{total} {size_at(phases, epoch)}px step {step}/{steps} loss {loss:.4f} "
        f"{speed:.1f} images/s {done:.0%} ETA {duration(seconds * (1 / done - 1))}"
    )


def epoch_line(line, epochs, better):
    """One compact line of an epoch, from its line of metrics.jsonl; * marks the best score so far."""
    text = f"epoch {line['epoch']}/{epochs} {line['size']}px loss {line['loss']:.4f} lr {line['lr']:.2e}"
    if "official" in line:
        score = f"official {line['official']:.4f}{'*' if better else ''}"
        text += f" {style(score, 'good', sys.stdout) if better else score} batch32 {line['batch32']:.4f}"
    return text + f" {line['images_per_s']} images/s {line['minutes']:.1f} min"


def long_warning(phases, steps, batch, speed):
    """A warning for stderr where the first steps' speed (images/s) shows that the run will take very long, or ""."""
    epochs = sum(length for _, length in phases)
    hours = cost(phases, epochs) / phases[0][0] ** 2 * steps * batch / speed / 3600
    if hours <= LONG_HOURS:
        return ""
    text = (
        f"at this speed the run takes about {hours:.0f} hours on this device; RECIPE=cpu (128, then 256 pixels) takes "
        "about half an hour on one core"
    )
    return style(text, "warning", sys.stderr) + "\n"


def closing(folder, progress, scored, stopped):
    """What a training leaves: its best epoch and score, where the files are, what to do next.

    `progress` is that of last.pt; `scored` tells whether pairs were held out, `stopped` whether a signal ended it.
    """
    name = make_name(folder)
    done = progress["epoch"]
    epochs = f"{done} epoch{'s' * (done != 1)} in {duration(progress['seconds'])}"
    if stopped:
        lines = {"stop": f"in epoch {done + 1}, saved; {epochs}", "next": f"make resume NAME={name}"}
    else:
        lines = {
            "best": f"epoch {progress['best_epoch']}; {epochs}",
            "files": f"{folder}/best.pt (weights), metrics.jsonl" + (", best.json (scores)" if scored else ""),
            "look": f"{folder.parent}/index.html, in a browser",
            "next": f"make predict NAME={name} IN=photos OUT=masks, or make submit NAME={name}",
        }
        if scored:
            score = style(f"official score {progress['best']:.4f}", "good", sys.stdout)
            lines["best"] = f"{score} in {lines['best']}"
    return "\n".join(f"{style(f'{head:<6}', 'bold', sys.stdout)}{text}" for head, text in lines.items())
