"""The Makefile: every target is listed, settings become flags, what is misspelt is an error."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import options
from errors import ArgumentParser, UserError

MAKEFILE = Path("Makefile").read_text()


def make(*args, **environment):
    return subprocess.run(
        ["make", "--no-print-directory", *args],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def test_help_is_the_default_and_lists_every_target_and_variable():
    shown = make("VENV=", "PYTHON=python3").stdout
    phony = re.search(r"\nTARGETS :=((?:.*\\\n)*.*)", MAKEFILE)[1].replace("\\", "").split()
    taken = re.findall(r"^(?:TAKES_\S+|TRAIN_VARS) :=((?:.*\\\n)*.*)", MAKEFILE, re.M)
    variables = {word for line in taken for word in line.replace("\\", "").split() if not word.startswith("$")}
    assert {"RAW", "NPROC", "MATRIC", "LR"} <= variables
    for word in [*phony, *variables]:
        assert re.search(rf"\b{word}\b", shown), word


def test_misspelt_variable_is_an_error():
    wrong = make("-n", "train", "DCIE=2")
    assert wrong.returncode == 2 and "DCIE" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_variable_that_a_target_would_ignore_is_an_error():
    wrong = make("-n", "resume", "NAME=a", "LR=1")
    assert wrong.returncode == 2 and "LR does nothing in `make resume`" in wrong.stderr
    assert make("-n", "resume", "NAME=a", "VENV=", "DEVICE=cpu", "ARGS=--cache c").returncode == 0


def test_a_target_that_there_is_not_is_told_before_its_variables():
    done = make("trian", "NAME=a")
    assert done.returncode == 2 and "no target trian" in done.stderr
    assert "no target 8e-4" in make("train", "LR=", "8e-4").stderr


def test_weights_are_named_once():
    assert "give one" in make("predict", "NAME=a", "WEIGHTS=b").stderr
    assert make("-n", "predict", "WEIGHTS=b", "IN=c", "OUT=d", "VENV=", NAME="the shell's").returncode == 0


def test_a_setting_that_a_target_needs_is_asked_for_by_its_name():
    wrong = make("-n", "predict", "OUT=d", "VENV=")
    assert wrong.returncode == 2 and "`make predict` needs IN=" in wrong.stderr and "OUT" not in wrong.stderr
    assert make("-n", "predict", "VENV=", "ARGS=--input c --output d").returncode == 0


@pytest.mark.parametrize(
    ("typed", "became"), [("--input=~/a b", "/home/me/a b"), ("~/a", "/home/me/a"), ("a~/b", "a~/b")]
)
def test_home_is_known_in_paths(monkeypatch, typed, became):
    monkeypatch.setenv("HOME", "/home/me")
    parser = ArgumentParser()
    parser.add_argument("--input")
    args = parser.parse_args([typed] if typed.startswith("-") else ["--input", typed])
    assert args.input == became


def test_lmsa_of_the_other_network_is_refused():
    with pytest.raises(UserError, match="MicroSegFormer's"):
        options.parse(["--model", "microunet", "--no-lmsa"])
    done = make("check-params", "MODEL=microunet", "LMSA=0", "-n")
    assert "--no-lmsa" in done.stdout


def test_names_reach_the_script_as_typed():
    line = make("-n", "train", "VENV=", "PYTHON=echo", 'NAME=it\'s $HOME "x"').stdout
    assert shlex.split(line)[2:] == ["--name", 'it\'s $HOME "x"']


def test_settings_become_flags_and_empty_ones_do_not():
    line = make(
        "-n", "train", "VENV=", "PYTHON=py", "LR=8e-4", "DICE=1.5", "LMSA=0", "NAME=a", "EPOCHS=", "NPROC=2"
    ).stdout
    flags = "--nproc 2 --name a --lr 8e-4 --dice 1.5 --no-lmsa"
    assert shlex.split(line) == ["py", "launch.py", *flags.split()]


def test_environment_does_not_leak_into_settings():
    assert "--name" not in make("-n", "train", "VENV=", NAME="laptop", DEVICE="sda").stdout


def test_clean_removes_only_an_environment_that_make_made(tmp_path):
    assert f"rm -rf {tmp_path}" not in make("-n", "clean", f"VENV={tmp_path}").stdout
    (tmp_path / ".ready").touch()
    assert f"rm -rf {tmp_path}" in make("-n", "clean", f"VENV={tmp_path}").stdout


def test_every_training_variable_is_a_flag():
    names = re.search(r"^TRAIN_VARS :=((?:.*\\\n)*.*)", MAKEFILE, re.M)[1].replace("\\", "").split()
    flags = {option for action in options.build_parser()._actions for option in action.option_strings}
    assert {f"--{name.lower().replace('_', '-')}" for name in names} <= flags


@pytest.mark.parametrize("name", sorted(options.load_recipes()))
def test_every_recipe_parses(name):
    args, given = options.parse(["--recipe", name, "--lr", "0.5"])
    assert args.lr == 0.5 and {"lr", "recipe"} <= given


def test_recipe_is_overridden_by_flags():
    args, _ = options.parse(["--recipe", "lmsa_v1"])
    assert args.dice == 1.0
    assert options.parse(["--recipe", "lmsa_v1", "--dice", "3"])[0].dice == 3


def test_sweep_makes_one_run_for_each_value():
    from sweep import expand

    runs = dict(expand(["--dice", "0.5 1.0", "--lr", "1e-3"]))
    assert runs == {"dice0.5": ["--dice", "0.5", "--lr", "1e-3"], "dice1.0": ["--dice", "1.0", "--lr", "1e-3"]}


def test_scripts_import_nothing_but_the_three_packages():
    allowed = {"torch", "numpy", "PIL"} | {path.stem for path in Path().glob("*.py")}
    import sys

    for path in Path().glob("*.py"):
        for module in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M):
            assert module in allowed or module in sys.stdlib_module_names, f"{path} imports {module}"
