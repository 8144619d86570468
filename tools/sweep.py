"""One training for each value of the flags that list several values.

python -m tools.sweep --dice="0.5 1.0 1.5 2.0" --sizes=128:12
python -m tools.sweep --lr="4e-4 8e-4" --seed="1 2"

Runs are named after their values. The same command continues an interrupted sweep: an unfinished run is resumed.
"""

import itertools
import subprocess
import sys
from pathlib import Path

from common import UserError, run_main

from options import parse
from register import run_arguments
from tools.report import leaderboard, survey

SINGLE = {"--name", "--data", "--from", "--runs", "--cache", "--model-args"}  # values may contain spaces


def expand(flags):
    """[(name suffix, flags), ...] for every combination of values; each flag is "--flag=values" or a switch."""
    choices = []
    for flag, equals, value in (text.partition("=") for text in flags):
        if not flag.startswith("--"):
            raise UserError(f'{flag}: write it after "=", in one word with its flag, such as --dice="0.5 1.0 1.5"')
        choices.append([flag + equals + one for one in ([value] if flag in SINGLE else value.split() or [value])])
    if all(len(values) == 1 for values in choices):
        raise UserError('a sweep needs a flag with several values, such as DICE="0.5 1.0 1.5"')
    for chosen in dict.fromkeys(itertools.product(*choices)):  # a value that is listed twice runs once
        varied = [flag for flag, values in zip(chosen, choices, strict=True) if len(values) > 1]
        suffix = "-".join(flag.removeprefix("--").replace("=", "") for flag in varied)
        yield suffix.replace("/", "_").replace(":", "_").replace(",", "+"), list(chosen)


def main():
    if "--help" in sys.argv:
        parse(["--help"])
    runs, names = list(expand(sys.argv[1:])), []
    settings = [parse(flags)[0] for _, flags in runs]  # checks every run before the first one starts
    for i, ((suffix, flags), args) in enumerate(zip(runs, settings, strict=True), 1):
        name = f"{args.name or args.recipe or 'sweep'}-{suffix}"
        resumes = Path(args.runs, name, "args.json").is_file() and not args.overwrite  # its flags must be the same
        names.append(name)
        print(f"--- {i} of {len(runs)}: {name}", flush=True)
        flags = [flag for flag in flags if not flag.startswith("--name=")]
        if i > 1 and not resumes:  # what the first run chose where it was left open
            first, unset = run_arguments(Path(args.runs, names[0])), {"amp": "auto", "threads": 0}
            flags += [f"--{key}={first[key]}" for key, value in unset.items() if getattr(args, key) == value]
        child = subprocess.Popen([sys.executable, "train.py", *flags, f"--{'resume' if resumes else 'name'}={name}"])
        try:
            status = child.wait()
        except BaseException:  # Ctrl-C or SIGTERM: the training saves before it ends
            child.terminate()
            child.wait()
            less = ", without OVERWRITE=1," if args.overwrite else ""
            print(f"repeat the same command{less} to continue the sweep", file=sys.stderr)
            raise
        if status:
            return status
    found, _ = survey(settings[0].runs, experiments=False)
    print("\n" + leaderboard([run for run in found if Path(run["folder"]).name in names]))
    return 0


if __name__ == "__main__":
    run_main(main)
