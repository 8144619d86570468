"""One training for each value of the flags that are given several values.

python sweep.py --dice "0.5 1.0 1.5 2.0" --sizes 128:12
python sweep.py --lr "4e-4 8e-4" --seed "1 2"

Runs one after another, each named after its values; a run that exists already and is complete is passed over, one
that was interrupted goes on, so the same command continues a sweep.
"""

import itertools
import subprocess
import sys
from pathlib import Path

from errors import ArgumentParser, UserError, run_main
from leaderboard import leaderboard, standing, summary
from options import parse

HERE = Path(__file__).parent


# Values of these flags may hold spaces of their own.
WHOLE = {"--name", "--data", "--from", "--runs", "--cache", "--model-args"}


def expand(argv):
    """[(name suffix, flags)] for every combination of the values that stand in one argument, separated by spaces."""
    choices = [[part] if i and argv[i - 1] in WHOLE else part.split() or [part] for i, part in enumerate(argv)]
    several = [i for i, values in enumerate(choices) if len(values) > 1]
    if not several:
        raise UserError('a sweep needs a flag with several values, as DICE="0.5 1.0 1.5"')
    for flags in itertools.product(*choices):
        suffix = "-".join(f"{argv[i - 1].removeprefix('--')}{flags[i]}".replace("/", "_") for i in several)
        yield suffix.replace(":", "_").replace(",", "+"), list(flags)


def main():
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    launcher = ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--nproc")  # launch.py's own
    own, argv = launcher.parse_known_args(argv)
    nproc = ["--nproc", own.nproc] if own.nproc else []
    runs = list(expand(argv))
    for _, flags in runs:
        parse(flags)  # every run's flags are checked before the first one starts
    folders = []
    for suffix, flags in runs:
        args, _ = parse(flags)
        name = f"{args.name or args.recipe or 'sweep'}-{suffix}"
        folder = Path(args.runs, name)
        folders.append(folder)
        if (folder / "args.json").is_file() and not args.overwrite:
            flags = [*flags, "--resume", name]  # with its flags, so that other settings are refused
        else:
            flags = [*flags, "--name", name]
        print(f"--- {name}", flush=True)
        child = subprocess.Popen([sys.executable, str(HERE / "launch.py"), *nproc, *flags])
        try:
            status = child.wait()
        except BaseException:  # Ctrl-C, or an end that was asked for: the training saves before it ends
            child.terminate()
            child.wait()
            raise
        if status:
            return status
    print("\n" + leaderboard(sorted(filter(None, map(summary, folders)), key=standing)))
    return 0


if __name__ == "__main__":
    run_main(main)
