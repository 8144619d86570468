"""The short form of checks/faults.py: nothing may be lost. `make faults` is the whole of it."""

import json
import subprocess
import sys

import pytest

# Two processes at a time; checks/test_fuzz.py tries the properties.
SHARES = (("killed", "same"), ("disk", "images", "files", "numbers"))


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    folder, cases, losses = tmp_path_factory.mktemp("faults"), {}, []
    command = [sys.executable, "-m", "checks.faults", "--short"]
    begun = [
        subprocess.Popen([*command, "--out", folder / parts[0], "--part", *parts], stdout=subprocess.PIPE, text=True)
        for parts in SHARES
    ]
    for parts, process in zip(SHARES, begun, strict=True):
        said = process.communicate()[0]
        assert (folder / parts[0]).is_file(), said
        record = json.loads((folder / parts[0]).read_text())
        cases |= record["cases"]
        losses += record["losses"]
    return cases, losses


@pytest.mark.parametrize("part", [part for parts in SHARES for part in parts])
def test_nothing_is_lost(counts, part):
    cases, losses = counts
    assert sum(attempts for attempts, _ in cases[part].values())
    assert not [loss for loss in losses if loss.startswith(part)]
