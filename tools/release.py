"""Create runs/release from a run: its records, and its weights in half precision.

python -m tools.release --name a
python -m tools.release --name a --weights runs/a/epoch-100.pt

Prediction, evaluation and submission use runs/release unless other weights are given.
"""

import shutil

from common import ArgumentParser, UserError, make_folder, run_main, write_text

import checkpoint

LICENCE = """These weights were trained on CelebAMask-HQ (Lee et al., arXiv 1907.11922), which is for non-commercial
research and education; the same restriction applies to them. They contain no image of it.
"""


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", required=True, help="run to release")
    parser.add_argument("--weights", help="checkpoint made from the run; default its best.pt")
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    args = parser.parse_args()
    release, folder = checkpoint.RELEASE, checkpoint.find_run(args.name, args.runs)
    if folder.resolve() == release.resolve():
        raise UserError(f"{folder} is already the release; give another run")
    weights = checkpoint.find_weights(args.weights or str(folder), args.runs)
    content = checkpoint.load(weights)
    state = {key: v.half() if v.is_floating_point() else v for key, v in content["state_dict"].items()}
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise UserError(f"some weights of {weights} exceed half precision; release another run")
    make_folder(release)
    for name in ("args.json", "metrics.jsonl", "best.json"):
        (release / name).unlink(missing_ok=True)  # of the previous release
        if (folder / name).is_file():
            shutil.copyfile(folder / name, release / name)
    checkpoint.save(release / "best.pt", {**content, "state_dict": state})
    write_text(release / "LICENCE.txt", LICENCE)
    print(f"{release}: {(release / 'best.pt').stat().st_size / 1e6:.1f} MB from {weights}")


if __name__ == "__main__":
    run_main(main)
