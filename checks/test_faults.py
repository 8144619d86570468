"""The short form of checks/faults.py: nothing may be lost. `make faults` is the whole of it."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, "-m", "checks.faults", "--short", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert out.is_file(), done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("part", ["killed", "disk", "images", "files", "numbers", "same"])
def test_nothing_is_lost(counts, part):
    attempts = sum(attempts for attempts, _ in counts["cases"][part].values())
    assert attempts and not [loss for loss in counts["losses"] if loss.startswith(part)]
