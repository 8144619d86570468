"""Every script on emulated GPUs: losses and labels equal the CPU's, and a training step hardly waits for the GPU."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from checks.references import metrics
from tools.synth import make_dataset

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the emulated GPU needs g++")
UNET = "--model=microunet --dropout=0 --optimiser=muon --ema=0.9 --augment=robust --noise=0.5 --cutmix=0.5"
UNET += " --sizes=32:1,64:1"
SEGFORMER = "--dropout=0 --augment=strong --sizes=64:1 --class-weights=balanced"
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu")
    make_dataset(root / "data", train=16, dev=0, test=0, workers=1)
    (root / "last.py").write_text(LAST)
    return root


def run(*command, gpus=1, free=1 << 34, status=0):
    """What a script prints on this number of emulated GPUs, 0 for the CPU."""
    words = [sys.executable, *(["-m", "checks.gpu"] if gpus else []), *map(str, command)]
    settings = {"GPUS": str(gpus), "FREE": str(free), "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(place, name, flags, **settings):
    places = (f"--{key}={place / key}" for key in ("runs", "data", "cache"))
    return run("train.py", f"--name={name}", "--overwrite", *places, *f"--batch=4 {flags}".split(), **settings)


@pytest.mark.parametrize(
    ("flags", "settings", "tolerance"),
    [
        (f"{UNET} --amp=bf16", {}, 1e-2),
        (f"{UNET} --amp=off --optimiser=adamw --lr=1e-4 --nproc=2", {"gpus": 2}, 1e-3),
        (f"{SEGFORMER} --amp=off", {"free": 0}, 1e-3),  # the pairs are copied batch by batch
        (f"{SEGFORMER} --amp=fp16", {}, 5e-2),  # the scaler skips the first steps
    ],
    ids=["bf16", "two", "copied", "fp16"],
)
def test_training_equals_the_cpu(place, flags, settings, tolerance):
    train(place, "cpu", f"{flags} --device=cpu".replace("fp16", "off").replace("--nproc=2", ""), gpus=0)
    train(place, "gpu", flags, **settings)
    cpu, gpu = (
        [line[key] for line in metrics(place / "runs" / name) for key in ("loss", "val_loss")]
        for name in ("cpu", "gpu")
    )
    assert np.allclose(gpu, cpu, rtol=tolerance), (gpu, cpu)


def test_a_step_hardly_waits_and_fp16_resumes_what_bf16_saved(place):
    waits = [train(place, "waits", f"{UNET} --sizes=32:1 --val-split=0 --batch={batch}") for batch in (8, 2)]
    few, many = (int(re.search(r"waits: (\d+)", text)[1]) for text in waits)
    assert many - few <= 3 * (8 - 2)  # 2 and 8 steps
    assert "already finished" in run("train.py", f"--resume={place}/runs/waits", f"--cache={place}/cache", "--amp=fp16")
    assert "cuda:1 is not available" in run("predict.py", f"--in={PHOTO}", "--out=.", "--device=cuda:1", status=2)


def test_predictions_and_scores_equal_the_cpu(place):
    scores = []
    for out, settings in ((place / "cpu", {"gpus": 0}), (place / "gpu", {})):
        run("predict.py", f"--in={PHOTO}", f"--out={out}/search", **settings)
        run(place / "last.py", out / "search", **settings)
        weights = RELEASE, f"{out}/search/release/best.pt"
        run("ensemble_tta.py", f"--in={PHOTO}", f"--out={out}", "--whole", "--weights", *weights, **settings)
        run("tools/run.py", f"--input={PHOTO}", f"--output={out}/run.png", f"--weights={RELEASE}", **settings)
        flags = f"--data={place}/data", f"--cache={place}/cache", "--size=64", "--views=flip,2"
        text = run("evaluate.py", f"--weights={weights[1]}", *flags, **settings)
        scores.append(float(re.search(r"official score (\S+)", text)[1]))
    cpu, gpu = ([np.asarray(Image.open(path)) for path in sorted((place / n).rglob("*.png"))] for n in ("cpu", "gpu"))
    assert len(cpu) == 4 and all((one != two).mean() < 1e-3 for one, two in zip(cpu, gpu, strict=True))
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)
