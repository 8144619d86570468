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
ADVANCED = "--model=microunet --optimiser=muon --ema=0.9 --augment=advanced --noise=0.5 --sizes=32:1,64:1"
SEGFORMER = "--dropout=0 --augment=strong --sizes=64:1 --class-weights=balanced"
LAST = """
from concurrent.futures import ThreadPoolExecutor
import sys, pathlib, checkpoint, images, predict, tools.export
run, out = map(pathlib.Path, sys.argv[1:])
parser = predict.FaceParser(run)  # in a thread, as the page's server calls it
images.mask_image(ThreadPoolExecutor(1).submit(parser, "docs/astronaut.jpg").result().mask).save(out / "page.png")
checkpoint.RELEASE = out / "release"
tools.export.write_release(run / "best.pt", run)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu")
    make_dataset(root / "data", train=16, dev=0, test=0, workers=1)
    (root / "last.py").write_text(LAST)
    return root


def run(*command, gpus=1, free=1 << 34, status=0):
    """Run a script of the project on emulated GPUs (0: on the CPU): how often it waited for them."""
    words = [sys.executable, *(["-m", "checks.gpu"] if gpus else []), *map(str, command)]
    settings = {"GPUS": str(gpus), "FREE": str(free), "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(place, name, flags, **settings):
    places = (f"--{key}={place / key}" for key in ("runs", "data", "cache"))
    return run("train.py", f"--name={name}", "--overwrite", "--batch=4", *places, *flags.split(), **settings)


def compare(place, name, other, tolerance):
    one, two = (
        [[line["loss"], line.get("val_loss", 0)] for line in metrics(place / "runs" / n)] for n in (name, other)
    )
    assert np.allclose(one, two, rtol=tolerance), (one, two)


@pytest.mark.parametrize(
    ("flags", "settings", "tolerance"),
    [
        (f"{ADVANCED} --amp=bf16", {}, 1e-2),
        (f"{ADVANCED} --amp=off --nproc=2", {"gpus": 2}, 2e-3),
        (f"{SEGFORMER} --amp=off", {"free": 0}, 2e-3),
        (f"{SEGFORMER} --amp=fp16", {}, 5e-2),  # whose scaler skips the first steps
    ],
)
def test_training_equals_the_cpu(place, flags, settings, tolerance):
    train(place, "cpu", flags.replace("fp16", "off").replace("--nproc=2", "") + " --device=cpu", gpus=0)
    train(place, "gpu", flags, **settings)
    compare(place, "gpu", "cpu", tolerance)


def test_a_step_hardly_waits_and_fp16_resumes_what_bf16_saved(place):
    flags = f"{ADVANCED} --sizes=32:1 --val-split=0"
    few, many = (
        int(re.search(r"waits: (\d+)", train(place, "waits", f"{flags} --batch={batch}"))[1]) for batch in (8, 2)
    )
    assert many - few <= 3 * (8 - 2)
    assert "already finished" in run("train.py", f"--resume={place}/runs/waits", f"--cache={place}/cache", "--amp=fp16")
    assert "cuda:1 is not available" in run("predict.py", "--in=docs", "--out=.", "--device=cuda:1", status=2)


def test_predictions_equal_the_cpu(place):
    release, photo = "runs/release/best.pt", "docs/astronaut.jpg"
    predict = ["predict.py", f"--in={photo}"]
    ensemble = ["ensemble_tta.py", f"--in={photo}", "--whole", "--weights", release, "runs/release/validated.pt"]
    for name, settings in (("cpu", {"gpus": 0}), ("gpu", {})):
        (place / name).mkdir()
        run(*predict, f"--out={place / name}/search", **settings)
        run(*ensemble, f"--out={place / name}/ensemble", **settings)
        command = ["tools/run.py", f"--input={photo}", f"--output={place / name}/run.png", f"--weights={release}"]
        run(*command, **settings)
        run(place / "last.py", "runs/release", place / name, **settings)
        evaluate = ["evaluate.py", f"--weights={place / name}/release/best.pt", f"--data={place}/data", "--size=64"]
        score = run(*evaluate, f"--cache={place}/cache", "--views=flip,2", **settings)
        (place / name / "score").write_text(re.search(r"official score (\S+)", score)[1])
    cpu, gpu = (sorted((place / name).rglob("*.png")) for name in ("cpu", "gpu"))
    assert len(cpu) == len(gpu) == 4
    for one, two in zip(cpu, gpu, strict=True):
        assert (np.asarray(Image.open(one)) != np.asarray(Image.open(two))).mean() < 1e-3
    one, two = (float((place / name / "score").read_text()) for name in ("cpu", "gpu"))
    assert one == pytest.approx(two, abs=2e-3)
