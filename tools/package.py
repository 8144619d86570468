"""Create the Codabench zip: masks of the test images, and run.py with the checkpoint that predicts them.

python -m tools.package --name a                            # runs/a/submission-test.zip
python -m tools.package --phase dev --views flip,scales     # only masks, by the release

The masks come from the packaged run.py itself. The zip is checked as `make check-submission RUN=5` does before it
replaces an older one.
"""

import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

from common import ArgumentParser, UserError, atomic, check_target, make_folder, natural, run_main

import checkpoint
import register
from data import find_data_of, is_synthetic
from images import image_files
from model import PARAM_LIMIT, count_parameters
from tools.check_submission import PYTHON, judge, show
from views import ONE_VIEW, parse_views

ROOT = Path(__file__).resolve().parent.parent
ZIP = rb"PK\x03\x04....\x08\x00\x00\x00!\x00"  # how the zips of `write_zip` begin: dated 1980-01-01
# The modules that run.py imports, directly or not.
MODULES = ("common.py", "labels.py", "images.py", "views.py", "model.py", "checkpoint.py")
CODE_OF_RUN = (ROOT / "tools" / "run.py", *(ROOT / name for name in MODULES))


def write_zip(path, entries):
    """Write {name in the zip: bytes}, sorted and with a fixed date: the same content gives the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in sorted(entries.items()):
            info = zipfile.ZipInfo(name)  # dated 1980-01-01
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)


def write_solution(folder, content, views):
    """Write the folder solution/ for a loaded checkpoint."""
    folder.mkdir()
    for path in (*CODE_OF_RUN, ROOT / "requirements.txt"):
        shutil.copy(path, folder)
    kept = ("model", "model_args", "size", "trained_on", "held_out")
    settings = {key: content[key] for key in kept if key in content}
    checkpoint.save(folder / "ckpt.pth", {**settings, "views": views, "state_dict": dict(content["state_dict"])})


def make_submission(weights, images, phase, target, views="", run=5):
    """Write the zip of a phase (test or dev) to `target`, which keeps its older content if a check fails.

    The packaged run.py is executed once more on `run` images. UserError if the model has too many parameters, a check
    fails, or a file cannot be read or written.
    """
    content = checkpoint.load(weights)
    parameters = count_parameters(checkpoint.restore(content, weights))
    if parameters >= PARAM_LIMIT:
        raise UserError(f"{weights} has {parameters:,} parameters; a submission must have fewer than {PARAM_LIMIT:,}")
    views = views if parse_views(views) != ONE_VIEW else ""
    images, target = Path(images).resolve(), Path(target)
    check_target(target, ZIP)
    count = len(image_files(images))
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(prefix="submission-") as folder, atomic(target) as made:
        solution, masks = Path(folder, "solution"), Path(folder, "masks")
        write_solution(solution, content, views)
        command = [*PYTHON, "run.py", "--weights", "ckpt.pth", "--input", str(images), "--output", str(masks)]
        if subprocess.run(command, cwd=solution).returncode:
            raise UserError(f"run.py could not predict the images of {images}; nothing was written")
        folders = [masks] if phase == "dev" else [masks, solution]
        write_zip(made, {f"{part.name}/{path.name}": path.read_bytes() for part in folders for path in part.iterdir()})
        if not show(judge(made, images, phase, run)):
            raise UserError(f"{target} was not written, because a check failed")
    size = target.stat().st_size / 1e6
    of = " of synthetic faces" if is_synthetic(images.parent.parent) else ""
    print(f"{target}: {count} masks{of}, {parameters:,} parameters, views: {views or 'none'}, {size:.1f} MB")


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", "--name", help="run or checkpoint; default the release")
    parser.add_argument("--data", help="folder with test/ and dev/; default that of the training, else ./data")
    parser.add_argument("--phase", choices=("test", "dev"), default="test", help="dev: only masks")
    parser.add_argument("--zip", help="zip to write; default submission-PHASE.zip in the run's folder, else in build")
    parser.add_argument("--views", default="", help="views to average: flip, scales, or numbers such as flip,1,1.5")
    parser.add_argument("--run", type=natural, default=5, help="images on which run.py is checked")
    args = parser.parse_args()
    weights = register.find_weights(args.weights)
    print(f"weights: {weights}{'' if args.weights else ' (no NAME given)'}", flush=True)
    folder = weights.parent if weights.with_name("args.json").is_file() else Path("build")
    target = args.zip or folder / f"submission-{args.phase}.zip"
    images = find_data_of(weights, args.data) / args.phase / "images"
    make_submission(weights, images, args.phase, target, args.views, args.run)


if __name__ == "__main__":
    run_main(main)
