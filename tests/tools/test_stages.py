"""Stages: done once, resumed, refused with both settings shown; never anything deleted."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from unittest import mock

import pytest
from helpers_jobs import RUN

from jigsaw_d2.io import ConfigError, RunError
from jigsaw_d2.tools.pipeline import read_curve
from jigsaw_d2.tools.stages import Stage, exit_on_sigterm, progress_text


class Recorder:
    """A runner that notes the command lines and writes the result, or fails."""

    def __init__(self, fail=False, write=True):
        self.calls, self.fail, self.write = [], fail, write

    def __call__(self, stage, argv):
        self.calls.append(argv)
        (stage.folder / "half").write_text("x")
        if self.fail:
            raise RunError("broke")
        if self.write:
            stage.output.write_text("good")


def make_stage(folder, argv=("work", "--fast"), **settings):
    return Stage("work", argv, folder, folder / "result", settings, "--resume")


def do(stage, **options):
    """The command lines of a call, and the seconds that it says."""
    runner = Recorder(**options)
    with mock.patch(RUN, runner):
        return stage.run(), runner.calls


def files(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def test_done_stage_is_not_run_again_and_lost_output_is_made_again(tmp_path):
    stage = make_stage(tmp_path / "a")
    seconds, calls = do(stage)
    assert calls == [["work", "--fast"]] and stage.command == "python -m jigsaw_d2 work --fast"
    # Another command line of the same settings changes nothing.
    assert do(make_stage(tmp_path / "a", ("work", "--num-gpus", "4"))) == (seconds, [])
    stage.output.unlink()
    assert do(stage)[1] == [["work", "--resume", "--fast"]]


def test_a_stage_of_another_interpreter(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" > ' + str(tmp_path / "a" / "result"))
    python.chmod(0o755)
    stage = make_stage(tmp_path / "a", ("script.py", "--fast"))
    stage = dataclasses.replace(stage, program=(str(python),))
    stage.run()
    assert stage.output.read_text() == "-u script.py --fast\n"
    assert stage.command == f"{python} script.py --fast"


def test_interrupted_stage_resumes(tmp_path):
    stage = make_stage(tmp_path / "a")
    with pytest.raises(RunError, match="broke"):
        do(stage, fail=True)
    assert not stage.is_done()
    assert do(stage)[1] == [["work", "--resume", "--fast"]]
    assert (tmp_path / "a" / "half").exists()


@pytest.mark.parametrize("half", [False, True])
def test_other_settings_are_refused_with_both_shown_and_nothing_is_touched(tmp_path, half):
    stage = make_stage(tmp_path / "a", LENGTH=10, SIZE=[1, 2], OLD=1)
    if half:
        with pytest.raises(RunError):
            do(stage, fail=True)
        (tmp_path / "a" / "model_0000009.pth").write_text("hours of work")
    else:
        do(stage)
    before = files(tmp_path / "a")
    with pytest.raises(ConfigError) as refused:
        make_stage(tmp_path / "a", LENGTH=20, SIZE=(1, 2), NEW="x").run()
    for words in ("LENGTH: 10 -> 20", "OLD: 1 -> (default)", "NEW: (default) -> x", "--output"):
        assert words in str(refused.value)
    assert "SIZE" not in str(refused.value) and files(tmp_path / "a") == before


@pytest.mark.parametrize("half", [False, True])
def test_a_changed_held_out_set_alone_is_only_scored_again(tmp_path, half):
    def stage(held_out, length=10):
        settings = {"held_out": held_out, "LENGTH": length}
        names = {"held_out": ("held_out",), "evaluate": "--eval-only"}
        folder, result = tmp_path / "a", tmp_path / "a" / "result.json"
        return Stage("work", ("work", "--fast"), folder, result, settings, "--resume", **names)

    if half:
        with pytest.raises(RunError):
            do(stage("old"), fail=True)
        (tmp_path / "a" / "model_0000009.pth").write_text("hours of work")
    else:
        do(stage("old"))
    flag = "--resume" if half else "--eval-only"
    assert do(stage("new"))[1] == [["work", flag, "--fast"]]
    assert (tmp_path / "a" / "result.1.json").exists() == (not half)
    assert do(stage("new"))[1] == []
    do(stage("newer"))
    assert (tmp_path / "a" / "result.2.json").exists() == (not half)
    with pytest.raises(ConfigError, match="LENGTH: 10 -> 20"):
        do(stage("newest", length=20))


def test_a_mistake_that_made_nothing_can_be_mended(tmp_path):
    with pytest.raises(RunError):
        do(make_stage(tmp_path / "a", RATE="fast"), fail=True)
    do(make_stage(tmp_path / "a", RATE=0.1))
    assert json.loads((tmp_path / "a" / "stage.json").read_text())["settings"] == {"RATE": 0.1}


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("thesis.txt", "", "something else"),
        ("stage.json", '{"argv": [], "seconds": 1, "done": true}', "not of this version"),
    ],
)
def test_foreign_files_are_left_alone(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        make_stage(tmp_path).run()
    assert files(tmp_path) == {tmp_path / name: content.encode()}


def test_success_without_output_is_a_failure(tmp_path):
    with pytest.raises(RunError, match="did not write .*result"):
        do(make_stage(tmp_path / "a"), write=False)


def test_failing_command_shows_its_last_words(tmp_path):
    with pytest.raises(RunError, match="status 2(.|\n)*usage: python -m jigsaw_d2"):
        make_stage(tmp_path / "a", ("no-such-command",)).run()


@pytest.fixture
def when_at_work(monkeypatch):
    """Lets commands sleep instead, and calls a function meanwhile; the list of the processes."""
    children, started = [], subprocess.Popen

    def popen(command, **options):
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        children.append(started(sleeper, **options))
        return children[-1]

    def arrange(act):
        monkeypatch.setattr("jigsaw_d2.tools.stages.PROGRESS_SECONDS", 0.05)
        monkeypatch.setattr("jigsaw_d2.tools.stages.subprocess.Popen", popen)
        monkeypatch.setattr("jigsaw_d2.tools.stages.progress_text", lambda stage: act())
        return children

    return arrange


def test_sigterm_leaves_no_orphan(tmp_path, when_at_work):
    """A stage's process ends with the job, and the job can go on afterwards."""
    children = when_at_work(lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    exit_on_sigterm()
    try:
        with pytest.raises(SystemExit):
            make_stage(tmp_path / "a").run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert children[0].poll() is not None
    assert json.loads((tmp_path / "a" / "stage.json").read_text())["done"] is False


def test_two_processes_never_work_in_one_folder(tmp_path, when_at_work):
    def start_a_second():
        with pytest.raises(RunError, match="another process is at work"):
            make_stage(tmp_path / "a").run()
        raise KeyboardInterrupt

    children = when_at_work(start_a_second)
    with pytest.raises(KeyboardInterrupt):
        make_stage(tmp_path / "a").run()
    assert len(children) == 1


def test_one_that_is_refused_changes_nothing_of_the_other_s_words(tmp_path, when_at_work):
    def start_a_second():
        with pytest.raises(RunError, match="another process is at work"):
            make_stage(tmp_path / "a", LENGTH=20).run()
        known = json.loads((tmp_path / "a" / "stage.json").read_text())
        assert known["settings"] == {"LENGTH": 10}
        raise KeyboardInterrupt

    when_at_work(start_a_second)
    with pytest.raises(KeyboardInterrupt):
        make_stage(tmp_path / "a", LENGTH=10).run()


def test_a_command_that_was_told_to_stop_ends_the_job_as_it_ended(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import sys; sys.exit(143)"]
    started = subprocess.Popen
    monkeypatch.setattr(
        "jigsaw_d2.tools.stages.subprocess.Popen", lambda _, **options: started(command, **options)
    )
    with pytest.raises(SystemExit) as stopped:
        make_stage(tmp_path / "a").run()
    assert stopped.value.code == 143


def test_a_stage_of_before_is_known_again(tmp_path):
    stage = make_stage(tmp_path / "a", annotations="train", held_out="val")
    do(stage)
    content = json.loads((tmp_path / "a" / "stage.json").read_text())
    content["settings"] = {"annotations": ["train", "val"]}
    (tmp_path / "a" / "stage.json").write_text(json.dumps(content))
    assert do(stage)[1] == []


def test_progress_and_curves_bear_torn_lines(tmp_path):
    stage = Stage("work", ("work",), tmp_path, tmp_path / "x", {}, "--resume", iterations=300)
    assert progress_text(stage) == "at work"
    line = json.dumps({"iteration": 119, "total_loss": 1.5})
    scored = json.dumps({"iteration": 99, "bbox/AP": 2.5})
    # Killed in the middle of a line, resumed behind it, and killed again.
    (tmp_path / "metrics.json").write_text(f'{scored}\n{{"itera{scored}\n{line}\n{{"iteration": 1')
    assert progress_text(stage) == "iteration 120 of 300, loss 1.500"
    assert read_curve(tmp_path, 300) == [(100, 2.5)]
