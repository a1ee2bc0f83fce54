"""Dispatch, help and error reporting shared by every command."""

import errno
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from jigsaw_d2.__main__ import COMMANDS, main
from jigsaw_d2.io import JigsawError
from jigsaw_d2.tools import run_command

PROJECT = Path(__file__).parents[1] / "projects" / "JigsawPretrain"
SCRIPTS = ("train_net", "extract_samples", "convert_weights", "finetune_net", "visualize")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name, capsys):
    parser = importlib.import_module(f"jigsaw_d2.tools.{name}").build_parser()
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_every_script_is_a_door_to_its_command():
    for script in SCRIPTS:
        source = (PROJECT / f"{script}.py").read_text()
        assert "from jigsaw_d2.tools." in source
        assert source.count("\n") < 20, f"{script}.py should hold no logic"


@pytest.mark.parametrize("script, flag", [("convert_weights", "--input"), ("demo", "--data")])
def test_a_script_runs_from_elsewhere(script, flag, tmp_path):
    result = subprocess.run(
        [sys.executable, str(PROJECT / f"{script}.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert flag in result.stdout


def test_users_mistake_is_one_line_and_status_2(capsys):
    def fails(argv):
        raise JigsawError("the store is gone")

    assert run_command(fails, []) == 2
    assert capsys.readouterr().err == "error: the store is gone\n"


@pytest.mark.parametrize(
    "error, said, status",
    [
        (OSError(errno.EROFS, "Read-only file system", "/o/a"), "/o/a: Read-only file system", 2),
        (OSError(errno.ENOSPC, "No space left"), "the system refuses: No space left", 2),
        (KeyboardInterrupt(), "stopped", 130),
    ],
)
def test_what_the_machine_refuses_or_a_user_stops_is_one_line(capsys, error, said, status):
    def fails(argv):
        raise error

    assert run_command(fails, []) == status
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_our_own_mistake_keeps_its_traceback():
    def fails(argv):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_command(fails, [])


@pytest.mark.parametrize("argv, status", [([], 2), (["nonsense"], 2), (["--help"], 0)])
def test_without_a_command_all_are_listed(argv, status, capsys):
    assert main(argv) == status
    captured = capsys.readouterr()
    assert all(name in captured.out + captured.err for name in COMMANDS)
