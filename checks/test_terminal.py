"""Colours and the running line are a terminal's; a pipe, NO_COLOR and TERM=dumb get none."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from schedule import cost
from terminal import duration, show_count, show_line, style
from trainlog import closing, step_line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def in_terminal(*command, **environment):
    """What a command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env | {"COLUMNS": "80"} | environment)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 4096):
            written += part
    except OSError:  # how Linux tells that the other end is closed
        pass
    process.wait()
    os.close(ours)
    return written.decode()


@pytest.fixture
def colourful(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_colours_are_a_terminals_unless_declined(colourful, monkeypatch):
    assert style("0.84", "good", Terminal()) == "\x1b[32m0.84\x1b[0m"
    assert style("0.84", "good", io.StringIO()) == "0.84"
    monkeypatch.setenv("TERM", "dumb")
    assert style("0.84", "good", Terminal()) == "0.84"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert style("0.84", "good", Terminal()) == "0.84"


def test_a_script_colours_its_error_on_a_terminal_alone():
    script = "from errors import *\ndef main(): raise UserError('wrong')\nrun_main(main)"
    command = sys.executable, "-c", script
    assert in_terminal(*command, TERM="xterm").strip() == "\x1b[31merror:\x1b[0m wrong"
    assert in_terminal(*command, TERM="xterm", NO_COLOR="1").strip() == "error: wrong"
    assert subprocess.run(command, capture_output=True, text=True).stderr == "error: wrong\n"


def test_running_line_is_cut_to_the_width_and_cleared(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    screen, pipe = Terminal(), io.StringIO()
    for stream in (screen, pipe):
        show_line("x" * 50, stream)
        show_line("", stream)
    assert screen.getvalue() == "\r" + "x" * 19 + "\r" + " " * 19 + "\r"
    assert pipe.getvalue() == ""


def test_count_tells_speed_and_time_left_and_vanishes_with_the_last(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", Terminal())
    show_count("image", 10, 40, 5.0)
    assert sys.stderr.getvalue().strip() == "image 10/40 2.0/s ETA 15 s"
    show_count("image", 40, 40, 20.0)
    assert sys.stderr.getvalue().endswith(" \r")


def test_durations():
    assert [duration(s) for s in (0.4, 89, 90, 3540, 5400, 11100)] == [
        "0 s", "89 s", "2 min", "59 min", "1 h 30 min", "3 h 05 min",
    ]  # fmt: skip


def test_step_line_foretells_by_the_pixels_that_are_left():
    phases = [(128, 2), (256, 1)]  # 2 + 4 parts of work
    assert cost(phases, 3) == 6 * 128 * 128
    line = step_line(phases, 1, 5, 10, 0.5, 20.0, 60.0)  # 1.5 of 6 parts in a minute
    assert line.startswith("epoch 2/3 128px step 5/10 ") and line.endswith(" 25% ETA 3 min")


def test_closing_tells_the_best_epoch_the_files_and_the_next_command(tmp_path):
    progress = {"best": 0.81234, "best_epoch": 7, "epoch": 9, "seconds": 65.0}
    text = closing(Path("runs/my run"), progress, scored=True, stopped=0)
    assert "official score 0.8123 in epoch 7; 9 epochs in 65 s" in text
    assert "runs/my run/best.pt" in text and "make predict NAME='my run' IN=" in text
    assert closing(tmp_path / "a", progress, scored=True, stopped=2).endswith(f"make resume NAME={tmp_path}/a")
    assert "score" not in closing(tmp_path / "a", progress, scored=False, stopped=0)
