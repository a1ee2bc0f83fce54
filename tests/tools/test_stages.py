"""Stages: done once, resumed, refused with both settings shown; never anything deleted."""

import json
import os
import signal
import subprocess
import sys

import pytest

from jigsaw_d2.io import ConfigError, RunError
from jigsaw_d2.tools.pipeline import read_curve
from jigsaw_d2.tools.stages import Stage, progress_text


def make_stage(folder, argv=("work", "--fast"), **settings):
    return Stage("work", argv, folder, folder / "result", settings, ("--resume",))


class Recorder:
    """A runner that notes the command lines and writes the result, or fails."""

    def __init__(self, fail=False, write=True):
        self.calls, self.fail, self.write = [], fail, write

    def __call__(self, stage, argv, say):
        self.calls.append(argv)
        (stage.folder / "half").write_text("x")
        if self.fail:
            raise RunError("broke")
        if self.write:
            (stage.folder / "result").write_text("good")


def quiet(text):
    pass


def test_done_stage_is_not_run_again(tmp_path):
    runner = Recorder()
    first = make_stage(tmp_path / "a").run(quiet, runner)
    assert make_stage(tmp_path / "a").run(quiet, runner) == first
    assert len(runner.calls) == 1
    assert make_stage(tmp_path / "a").command == "python -m jigsaw_d2 work --fast"


def test_interrupted_stage_resumes(tmp_path):
    with pytest.raises(RunError, match="broke"):
        make_stage(tmp_path / "a").run(quiet, Recorder(fail=True))
    assert not make_stage(tmp_path / "a").is_done()
    runner = Recorder()
    make_stage(tmp_path / "a").run(quiet, runner)
    assert runner.calls == [["work", "--resume", "--fast"]]
    assert (tmp_path / "a" / "half").exists()


@pytest.mark.parametrize("half", [False, True])
def test_other_settings_are_refused_with_both_shown_and_nothing_is_touched(tmp_path, half):
    stage = make_stage(tmp_path / "a", LENGTH=10, SIZE=[1, 2], OLD=1)
    if half:
        with pytest.raises(RunError):
            stage.run(quiet, Recorder(fail=True))
        (tmp_path / "a" / "model_0000009.pth").write_text("hours of work")
    else:
        stage.run(quiet, Recorder())
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    runner = Recorder()
    changed = make_stage(tmp_path / "a", LENGTH=20, SIZE=(1, 2), NEW="x")
    with pytest.raises(ConfigError) as refused:
        changed.run(quiet, runner)
    for words in ("LENGTH: 10 -> 20", "OLD: 1 -> (default)", "NEW: (default) -> x", "--output"):
        assert words in str(refused.value)
    assert "SIZE" not in str(refused.value) and not runner.calls
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_a_mistake_that_made_nothing_can_be_mended(tmp_path):
    with pytest.raises(RunError):
        make_stage(tmp_path / "a", RATE="fast").run(quiet, Recorder(fail=True))
    make_stage(tmp_path / "a", RATE=0.1).run(quiet, Recorder())
    assert json.loads((tmp_path / "a" / "stage.json").read_text())["settings"] == {"RATE": 0.1}


def test_another_command_line_of_the_same_settings_changes_nothing(tmp_path):
    make_stage(tmp_path / "a", ("work", "--num-gpus", "8")).run(quiet, Recorder())
    runner = Recorder()
    make_stage(tmp_path / "a", ("work", "--num-gpus", "4")).run(quiet, runner)
    assert not runner.calls


def test_lost_output_is_made_again(tmp_path):
    make_stage(tmp_path / "a").run(quiet, Recorder())
    (tmp_path / "a" / "result").unlink()
    runner = Recorder()
    make_stage(tmp_path / "a").run(quiet, runner)
    assert runner.calls == [["work", "--resume", "--fast"]]


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="something else"):
        make_stage(tmp_path / "a").run(quiet, Recorder())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.txt"]


def test_a_folder_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "stage.json").write_text('{"argv": [], "inputs": {}, "seconds": 1, "done": true}')
    with pytest.raises(ConfigError, match="not of this version"):
        make_stage(tmp_path).run(quiet, Recorder())


def test_success_without_output_is_a_failure(tmp_path):
    with pytest.raises(RunError, match="did not write .*result"):
        make_stage(tmp_path / "a").run(quiet, Recorder(write=False))


def test_failing_command_shows_its_last_words(tmp_path):
    with pytest.raises(RunError, match="status 2(.|\n)*usage: python -m jigsaw_d2"):
        make_stage(tmp_path / "a", ("no-such-command",)).run(quiet)


@pytest.fixture
def sleepers(monkeypatch):
    """Commands that sleep instead; the list of their processes."""
    monkeypatch.setattr("jigsaw_d2.tools.stages.PROGRESS_SECONDS", 0.0)
    children, started = [], subprocess.Popen

    def popen(command, **options):
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        children.append(started(sleeper, **options))
        return children[-1]

    monkeypatch.setattr("jigsaw_d2.tools.stages.subprocess.Popen", popen)
    return children


def test_sigterm_leaves_no_orphan(tmp_path, sleepers):
    """A stage's process ends with the job, and the job can go on afterwards."""

    def terminate_when_at_work(text):
        if "at work" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        make_stage(tmp_path / "a").run(terminate_when_at_work)
    assert sleepers[0].poll() is not None
    assert json.loads((tmp_path / "a" / "stage.json").read_text())["done"] is False
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_two_processes_never_work_in_one_folder(tmp_path, sleepers):
    def start_a_second(text):
        if "at work" in text:
            with pytest.raises(RunError, match="another process is at work"):
                make_stage(tmp_path / "a").run(quiet)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_stage(tmp_path / "a").run(start_a_second)
    assert len(sleepers) == 1


def test_progress_and_curves_bear_torn_lines(tmp_path):
    stage = Stage("work", ("work",), tmp_path, tmp_path / "x", {}, (), iterations=300)
    assert progress_text(stage) == "at work"
    line = json.dumps({"iteration": 119, "total_loss": 1.5})
    scored = json.dumps({"iteration": 99, "bbox/AP": 2.5})
    # Killed in the middle of a line, resumed behind it, and killed again.
    (tmp_path / "metrics.json").write_text(f'{scored}\n{{"itera{scored}\n{line}\n{{"iteration": 1')
    assert progress_text(stage) == "iteration 120 of 300, loss 1.500"
    assert read_curve(tmp_path, 300) == [(100, 2.5)]
