import json
import os
import signal
import subprocess
import sys

import pytest

from jigsaw_d2.jobs.stages import Stage, StageError, progress_text, read_marker, run_stage


def make_stage(folder, argv=("work", "--fast"), inputs=None, resumable=True):
    outputs = (folder / "result",)
    return Stage("work", argv, folder, outputs, inputs or {}, 0, resumable, ("--resume",))


class Recorder:
    """A runner that notes the command lines and writes the result, or fails."""

    def __init__(self, fail=False, write=True):
        self.calls, self.fail, self.write = [], fail, write

    def __call__(self, stage, argv, say):
        self.calls.append(argv)
        (stage.folder / "half").write_text("x")
        if self.fail:
            raise StageError("broke")
        if self.write:
            (stage.folder / "result").write_text("good")


def quiet(text):
    pass


def test_done_stage_is_not_run_again(tmp_path):
    runner = Recorder()
    first = run_stage(make_stage(tmp_path / "a"), quiet, runner)
    second = run_stage(make_stage(tmp_path / "a"), quiet, runner)
    assert (first.skipped, second.skipped, len(runner.calls)) == (False, True, 1)
    assert second.seconds == first.seconds
    assert first.command == "python -m jigsaw_d2 work --fast"


def test_interrupted_stage_resumes(tmp_path):
    with pytest.raises(StageError, match="broke"):
        run_stage(make_stage(tmp_path / "a"), quiet, Recorder(fail=True))
    assert not read_marker(tmp_path / "a")["done"]
    runner = Recorder()
    run_stage(make_stage(tmp_path / "a"), quiet, runner)
    assert runner.calls == [["work", "--resume", "--fast"]]
    assert (tmp_path / "a" / "half").exists()


def test_interrupted_stage_that_cannot_resume_starts_over(tmp_path):
    with pytest.raises(StageError):
        run_stage(make_stage(tmp_path / "a", resumable=False), quiet, Recorder(fail=True))
    (tmp_path / "a" / "left over").touch()
    runner = Recorder()
    run_stage(make_stage(tmp_path / "a", resumable=False), quiet, runner)
    assert runner.calls == [["work", "--fast"]]
    assert not (tmp_path / "a" / "left over").exists()


@pytest.mark.parametrize("change", [{"argv": ("work",)}, {"inputs": {"store": "other"}}])
def test_changed_command_or_input_starts_over(tmp_path, change):
    run_stage(make_stage(tmp_path / "a"), quiet, Recorder())
    (tmp_path / "a" / "left over").touch()
    runner = Recorder()
    report = run_stage(make_stage(tmp_path / "a", **change), quiet, runner)
    assert not report.skipped and "--resume" not in runner.calls[0]
    assert not (tmp_path / "a" / "left over").exists()


def test_lost_output_is_made_again(tmp_path):
    run_stage(make_stage(tmp_path / "a"), quiet, Recorder())
    (tmp_path / "a" / "result").unlink()
    assert not run_stage(make_stage(tmp_path / "a"), quiet, Recorder()).skipped


def test_foreign_files_are_never_deleted(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").touch()
    with pytest.raises(StageError, match="something else"):
        run_stage(make_stage(tmp_path / "a"), quiet, Recorder())
    assert (tmp_path / "a" / "thesis.txt").exists()


def test_success_without_outputs_is_a_failure(tmp_path):
    with pytest.raises(StageError, match="did not write .*result"):
        run_stage(make_stage(tmp_path / "a"), quiet, Recorder(write=False))


def test_failing_command_shows_its_last_words(tmp_path):
    stage = make_stage(tmp_path / "a", argv=("no-such-command",))
    with pytest.raises(StageError, match="status 2(.|\n)*usage: python -m jigsaw_d2"):
        run_stage(stage, quiet)


def test_sigterm_leaves_no_orphan(tmp_path, monkeypatch):
    """A stage's process ends with the job, and the job can go on afterwards."""
    monkeypatch.setattr("jigsaw_d2.jobs.stages.PROGRESS_SECONDS", 0.0)
    children = []
    started = subprocess.Popen

    def popen(command, **options):
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        children.append(started(sleeper, **options))
        return children[-1]

    monkeypatch.setattr("jigsaw_d2.jobs.stages.subprocess.Popen", popen)

    def terminate_when_at_work(text):
        if "at work" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        run_stage(make_stage(tmp_path / "a"), terminate_when_at_work)
    assert children[0].poll() is not None
    assert read_marker(tmp_path / "a")["done"] is False
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_progress_reads_metrics_and_bears_half_a_line(tmp_path):
    stage = Stage("work", ("work",), tmp_path, (), iterations=300)
    assert progress_text(stage) == "at work"
    (tmp_path / "stage.log").write_text("[11/23 06:10:52 d2.x]: Starting training\nR4 ( 25) 0.03\n")
    assert progress_text(stage) == "Starting training"
    line = json.dumps({"iteration": 119, "total_loss": 1.5})
    (tmp_path / "metrics.json").write_text(line + '\n{"iteration": 1')
    assert progress_text(stage) == "iteration 120 of 300, loss 1.500"
