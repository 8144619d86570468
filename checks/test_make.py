"""The Makefile passes settings on as flags; scripts import little; errors are one line."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ArgumentParser, UserError, atomic, duration, in_parallel, remove_unfinished, run_main, write_text

import pytest
import torch

from checks.conftest import cases, write


def make(*args, **environment):
    command = ["make", "--no-print-directory", "VENV=", f"PYTHON={sys.executable}", *args]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment})


def typed(*args, target="train", **environment):
    """The words that make runs in place of python, after the script."""
    with tempfile.TemporaryDirectory() as folder:
        echo = Path(folder, "echo")
        echo.write_text(f"#!{sys.executable}\nimport sys\nprint('\\0'.join(['', *sys.argv[1:]]))")
        echo.chmod(0o755)
        return make("-s", target, *args, f"PYTHON={echo}", **environment).stdout.rstrip("\n").split("\0")[2:]


def test_help_is_the_default_and_lists_every_target():
    targets = re.search(r"^TARGETS := ((?:.*\\\n)*.*)", Path("Makefile").read_text(), re.M)[1].replace("\\", "")
    assert set(targets.split()) <= set(re.findall(r"^ +(\S+)  ", make().stdout, re.M))


@cases("target", ["train", "resume", "sweep", "predict", "submit", "report-zip"])
def test_settings_become_flags_and_values_reach_the_script_as_typed(target, tmp_path):
    odd = f'it\'s $HOME "x"; `id` $(shell touch {tmp_path}/run) $(touch {tmp_path}/run)\n\ttouch {tmp_path}/run # \\ %'
    names = ["NAME", "IN", "OUT", "MATRIC", "VAL_EVERY", "lower"]
    words = [word for word in typed(*(f"{name}={odd}" for name in names), target=target) if word.startswith("--")]
    first = "resume" if target == "resume" else "name"
    assert set(words) == {f"--{flag}={odd}" for flag in (first, "in", "out", "matric", "val-every", "lower")}
    assert not list(tmp_path.iterdir())


def test_environment_sets_nothing():
    assert typed(NAME="laptop", DEVICE="sda", ARGS="--overwrite", VENV="/usr") == []
    assert "course_report" not in make("-n", "report", NAME="laptop").stdout
    assert "needs NAME=" in make("-n", "resume", NAME="laptop").stderr


MISTAKES = [
    *[("train DCIE=2", "--dcie"), ("train v=1", "--v"), ("train LR=", "LR is empty")],
    *[("trian", "trian"), ("predict OUT=d", "IN="), ("train x;id=1", ";"), ("train x`id`=1", "`")],
    *[("install LR=1", "LR has no effect"), ("help PYTHON=a b", "PYTHON")],
]


@cases(("args", "error"), MISTAKES)
def test_mistakes_are_refused_with_status_2(args, error):
    done = make(*args.split(" ", 1))
    assert done.returncode == 2 and error in done.stderr


def test_clean_removes_only_an_environment(tmp_path):
    write({"docs/a": b"", "venv/.ready": b"", "venv/pyvenv.cfg": b"", "mine/.ready": b""}, tmp_path)
    for value, status in (("docs venv", 2), ("mine", 0), ("venv", 0)):
        assert make("-C", tmp_path, "-f", Path("Makefile").resolve(), "clean", f"VENV={value}").returncode == status
    assert {path.name for path in tmp_path.iterdir()} == {"docs", "mine"}


def test_switches_take_values():
    parser = ArgumentParser()
    parser.switch("--lmsa", None)
    found = [parser.parse_args(given.split()).lmsa for given in ("--lmsa=0", "--no-lmsa", "--no-lmsa=0", "")]
    assert found == [False, False, True, None]


def test_each_script_imports_three_packages_and_those_before_it():
    order = ["common", "labels", "model", "checkpoint", "register", "device", "views", "losses", "augment", "images"]
    order += ["data", "evaluate", "options", "train", "photo", "predict", "ensemble_tta"]
    scripts = {path.stem: path.read_text().partition('"""\n\n')[2] for path in Path().glob("*.py")}
    assert sorted(order) == sorted(scripts)
    for place, name in enumerate(order):
        modules = set(re.findall(r"^ *(?:from|import) (\w+)(?:[. ].*)?$", scripts[name], re.M))
        assert modules <= {"torch", "numpy", "PIL", *order[:place]} | sys.stdlib_module_names, name


def test_scripts_are_commands():
    for path in [*Path().glob("*.py"), *Path().glob("tools/*.py"), *Path().glob("checks/*.py")]:
        text = path.read_text()
        assert ("\ndef main(" in text) == text.endswith('if __name__ == "__main__":\n    run_main(main)\n'), path


def test_durations():
    assert [duration(s) for s in (0.4, 89, 90, 5400, 11100)] == ["0 s", "89 s", "2 min", "1 h 30 min", "3 h 05 min"]


def test_mistakes_and_lack_of_memory_are_one_line_and_bugs_keep_their_traceback(refused):
    assert "=1" in refused(ArgumentParser().parse_args, "--x\n=1")
    assert "out of memory: try a smaller BATCH" in refused(lambda: torch.empty(1 << 62, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="size"):
        run_main(lambda: torch.zeros(2) + torch.zeros(3))


def test_failed_write_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(UserError, match="disk full"), atomic(tmp_path / "a") as temporary:
        temporary.write_text("new")
        remove_unfinished(tmp_path, {"a"})  # what a killed process would leave
        assert not temporary.exists()
        raise OSError("disk full")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_tasks_in_parallel_are_done_once_in_order():
    assert list(in_parallel(abs, range(-1100, 0), "counting")) == list(range(1100, 0, -1))
