"""A few attempts of every attack in faults.py, and random flags."""

import contextlib
import random
import subprocess
import sys

from common import UserError

from options import build_parser, parse, parse_sizes
from train import learning_rate

VALUES = ["128:36,256:12", "32:0", ":", "{}", '{"a": 1}', "[[[[", "null", "balanced", ",", "1e400", "٣", "nan", "inf"]
VALUES += ["-1", "0", "0.5", "1", "2", "7" * 30, "1e-9", "", "\0", "\n", "--", "-x", "basic", "muon", "restarts"]


def test_attacks_cause_no_loss():
    done = subprocess.run([sys.executable, "-m", "checks.faults", "--short"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_random_flags_are_parsed_or_refused():
    rng, flags = random.Random(0), [a.option_strings[-1] for a in build_parser()._actions[1:]]
    for _ in range(200):
        words = [rng.choice(rng.choice([flags, VALUES])) for _ in range(rng.randint(0, 6))]
        with contextlib.suppress(UserError, SystemExit):
            args, given = parse(words)
            rate = learning_rate(args, parse_sizes(args.sizes, args.epochs), 0.5)
            assert 0 <= rate <= args.lr and given <= vars(args).keys()
