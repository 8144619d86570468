"""Scripts on emulated GPUs: losses and labels equal the CPU's, and a training step hardly waits for the GPU."""

import contextlib
import os
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import register
from checks.conftest import cases, train_here
from checks.references import metrics

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the emulated GPU needs g++")
UNET = "--model=microunet --dropout=0 --optimiser=muon --ema=0.9 --augment=robust --grain=0.5 --cutmix=0.5 --batch=4"
SEGFORMER = "--dropout=0 --augment=strong --sizes=64:1 --class-weights=balanced --batch=4"
PHOTO, RELEASE = "docs/astronaut.jpg", "runs/release/best.pt"
LAST = f"""
from concurrent.futures import ThreadPoolExecutor
import sys, pathlib, images, predict, register, tools.export
out = pathlib.Path(sys.argv[1])
parser = predict.FaceParser()  # in a thread, as the page's server calls it
images.mask_image(ThreadPoolExecutor(1).submit(parser, "{PHOTO}").result().mask).save(out / "page.png")
register.RELEASE, run = out / "release", register.RELEASE
tools.export.write_release(run / "best.pt", run)
"""


def run(*commands, gpus=1, free=1 << 34, status=0):
    """What scripts with flags, one after the other, print on this number of emulated GPUs."""
    words = [sys.executable, "-m", "checks.gpu", *" -- ".join(commands).split()]
    settings = {"GPUS": str(gpus), "FREE": str(free), "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def training(place, name, flags):
    return f"train.py --name={name} --runs={place}/runs --data={place}/data --cache={place}/cache {flags}"


@cases(
    ("flags", "settings", "tolerance"),
    [
        (f"{UNET} --sizes=32:1,64:1 --amp=bf16", {}, 1e-2),
        (f"{UNET} --sizes=32:1,64:1 --amp=off --optimiser=adamw --lr=1e-4 --nproc=2 --val-split=.3", {"gpus": 2}, 1e-3),
        (f"{SEGFORMER} --amp=off", {"free": 0}, 1e-3),  # the pairs are copied batch by batch
        (f"{SEGFORMER} --amp=fp16", {}, 5e-2),  # the scaler skips the first steps
    ],
    ids=["bf16", "two", "copied", "fp16"],
)
def test_training_equals_the_cpu(place, flags, settings, tolerance):
    train_here(place, f"--name=cpu --overwrite {flags.replace('fp16', 'off').replace('--nproc=2', '')}")
    run(training(place, "gpu", f"--overwrite {flags}"), **settings)
    cpu, gpu = (metrics(place / "runs" / name) for name in ("cpu", "gpu"))
    for line, expected in zip(gpu, cpu, strict=True):
        for key in ("loss", "val_loss"):
            assert line[key] == pytest.approx(expected[key], rel=tolerance), key
        assert "--amp=off" not in flags or line["official"] == pytest.approx(expected["official"], abs=1e-3)


def test_a_step_hardly_waits_and_fp16_resumes_what_bf16_saved(place):
    sizes = 8, 2
    text = run(*(training(place, f"of-{n}", f"{UNET} --sizes=32:1 --val-split=0 --batch={n}") for n in sizes))
    few, many = map(int, re.findall(r"waits: (\d+)", text))
    assert many - few <= 3 * (5 - 1)  # 1 and 5 steps
    resume = f"train.py --resume={place}/runs/of-2 --cache={place}/cache --data={place}/data --amp=fp16"
    text = run(resume, f"predict.py --in={PHOTO} --out=. --device=cuda:1", status=2)
    assert "already finished" in text and "cuda:1 is not available" in text


def commands(place, out):
    weights = f"{out}/search/release/best.pt"
    return [
        f"predict.py --in={PHOTO} --out={out}/search",
        f"{place}/last.py {out}/search",
        f"ensemble_tta.py --in={PHOTO} --out={out} --whole --weights {RELEASE} {weights}",
        f"tools/run.py --input={PHOTO} --output={out}/run.png --weights={RELEASE}",
        f"evaluate.py --weights={weights} --data={place}/data --cache={place}/cache --size=64 --views=flip,2",
    ]


def test_predictions_and_scores_equal_the_cpu(place, monkeypatch, capsys):
    (place / "last.py").write_text(LAST)
    texts = [run(*commands(place, place / "gpu"))]
    monkeypatch.setattr(register, "RELEASE", register.RELEASE)  # which the second one changes
    for line in commands(place, place / "cpu"):
        monkeypatch.setattr(sys, "argv", line.split())
        with contextlib.suppress(SystemExit):
            runpy.run_path(sys.argv[0], run_name="__main__")
    texts.append(capsys.readouterr().out)
    gpu, cpu = ([np.asarray(Image.open(path)) for path in sorted((place / n).rglob("*.png"))] for n in ("gpu", "cpu"))
    assert len(cpu) == 4 and all((one != two).mean() < 1e-3 for one, two in zip(cpu, gpu, strict=True))
    scores = [float(re.search(r"official score (\S+)", text)[1]) for text in texts]
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)
