"""The benchmark measures, tells marks that are not reached, and makes its pages from its own record."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checks.bench import Row, asdict, table


def bench(*flags):
    return subprocess.run([sys.executable, "-m", "checks.bench", *flags], capture_output=True, text=True)


def test_a_quick_part_is_recorded_and_shown(tmp_path):
    done = bench("--quick", "--only", "score,augmentation", "--json", str(tmp_path / "a.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    score, augmentation = result["rows"]
    assert "DIFFERENT" not in score["measured"] and score["mark"] == "20x"
    assert done.stdout.startswith(result["machine"]) and table([augmentation]).splitlines()[2] in done.stdout


def test_a_part_alone_does_not_replace_the_record():
    before = Path("runs/bench.json").read_text()
    assert bench("--quick", "--only", "score").returncode == 0
    assert Path("runs/bench.json").read_text() == before


def test_a_part_that_is_not_there_is_told_in_a_line():
    done = bench("--only", "scroe")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "scroe" in done.stderr


@pytest.mark.parametrize("reached", [True, False])
def test_the_table_says_what_is_not_reached_and_why(reached):
    rows = [asdict(Row("limit", "sgemm", "9 Gflop/s")), asdict(Row("a", "b", "c", "1.0x", "3x", reached, "too slow"))]
    assert ("| a | b | c | 1.0x | 3x | no |" in table(rows)) == ("too slow" in table(rows)) == (not reached)
    assert "sgemm" in table(rows) and "sgemm" not in table(rows, marked=True)
