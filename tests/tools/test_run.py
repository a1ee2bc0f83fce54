"""The whole job: its stages, its resumption, its time budget, its report."""

import json
from dataclasses import replace

import pytest
from helpers_jobs import FakeRunner, flag, tiny_set

import demo
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.io import ConfigError, RunError
from jigsaw_d2.tools import run
from jigsaw_d2.tools.job import (
    Job,
    JobRunner,
    default_configs,
    job_report,
    result_tables,
    with_lengths,
)
from jigsaw_d2.tools.time_budget import Lengths


@pytest.fixture
def job(tmp_path):
    (tmp_path / "out").mkdir()
    data = tiny_set(tmp_path / "set")
    short = ("SOLVER.MAX_ITER", "30")
    return Job(
        data, tmp_path / "out", *default_configs(on_gpu=False), short, short, with_scratch=True
    )


def quiet(text):
    pass


def test_stages_in_order_and_both_detectors_alike(job):
    runner = FakeRunner(lambda weights, seed: 3.0 if weights == "none" else 5.0)
    result = JobRunner(job, quiet, runner).run()
    names = [argv[0] for argv in runner.calls]
    assert names == ["extract", "extract", "pretrain", "convert", "finetune", "finetune"]
    ours, scratch = runner.calls[-2:]
    different = [(a, b) for a, b in zip(ours, scratch) if a != b]
    assert [a.rsplit("/", 1)[-1] for a, _ in different] == ["backbone.pkl", "detector"]
    assert result.metrics["jigsaw"]["AP"] == 5.0 and result.metrics["scratch"]["AP"] == 3.0
    assert [images for _, _, images in result.stages] == [4, 4, 480, 0, 240, 240]


def test_failed_stage_stops_and_the_same_call_goes_on_from_there(job):
    broken = FakeRunner(fail=lambda argv: argv[0] == "convert")
    with pytest.raises(RunError, match="convert broke"):
        JobRunner(job, quiet, broken).run()
    runner = FakeRunner()
    result = JobRunner(job, quiet, runner).run()
    assert [argv[0] for argv in runner.calls] == ["convert", "finetune", "finetune"]
    assert len(result.stages) == 6


def test_other_pre_training_is_refused_and_keeps_what_is_there(job):
    JobRunner(job, quiet, FakeRunner()).run()
    before = (job.output / "pretrain" / "model_final.pth").read_bytes()
    runner = FakeRunner()
    with pytest.raises(ConfigError, match="SOLVER.MAX_ITER: 30 -> 40"):
        JobRunner(replace(job, pretrain=("SOLVER.MAX_ITER", "40")), quiet, runner).run()
    assert runner.calls == []
    assert (job.output / "pretrain" / "model_final.pth").read_bytes() == before


def test_fewer_gpus_on_resume_go_on_with_what_is_there(job):
    job = replace(job, num_gpus=8)
    stopped = FakeRunner(fail=lambda argv: argv[0] == "pretrain")
    with pytest.raises(RunError):
        JobRunner(job, quiet, stopped).run()
    checkpoint = job.output / "pretrain" / "model_0000009.pth"
    checkpoint.write_text("hours of eight GPUs")
    runner = FakeRunner()
    JobRunner(replace(job, num_gpus=4), quiet, runner).run()
    assert runner.calls[0][:2] == ["pretrain", "--resume"]
    assert flag(runner.calls[0], "--num-gpus") == "4"
    assert checkpoint.read_text() == "hours of eight GPUs"
    assert JobRunner(job, quiet, runner).run().metrics["scratch"]["AP"] == 10.0
    assert len(runner.calls) == 4  # on eight again: all done before


def test_time_budget_measures_sets_lengths_and_keeps_them(job):
    runner = FakeRunner()
    first = JobRunner(job, quiet, runner).run(seconds=2000)
    # Fake speeds: 1 s a pre-training step, 5 s a refresh, 2 s a detection step, 3 s an evaluation.
    trial = json.loads((job.output / "lengths.json").read_text())["trial"]
    assert trial == {
        "pretrain_step": 1.0,
        "erf_refresh": 5.0,
        "detection_step": 2.0,
        "evaluation": 3.0,
    }
    pretrains = [argv for argv in runner.calls if argv[0] == "pretrain"]
    assert [flag(argv, "OUTPUT_DIR").split("/")[-2:] for argv in pretrains] == [
        ["trial", "pretrain"],
        ["out", "pretrain"],
    ]
    assert "budget 2000 s" in first.explanation
    assert "for each of 2 detectors" in first.explanation  # scratch is trained too
    assert "budget 2000 s" in job_report(job, first, [])
    again = FakeRunner()
    second = JobRunner(job, quiet, again).run(seconds=2000)
    assert again.calls == [] and second.explanation == first.explanation


def test_another_budget_is_refused_and_more_gpus_are_not(job):
    first = JobRunner(job, quiet, FakeRunner()).run(seconds=2000)
    with pytest.raises(ConfigError, match="seconds: 2000 -> 3000"):
        JobRunner(job, quiet, FakeRunner()).run(seconds=3000)
    again = JobRunner(replace(job, num_gpus=2), quiet, FakeRunner()).run(seconds=2000)
    assert again.explanation == first.explanation


def test_trial_tells_wall_clock_time_on_any_number_of_gpus(job):
    # The ledger counts the seconds of all four; the time that passes is a quarter of them.
    JobRunner(replace(job, num_gpus=4), quiet, FakeRunner()).run(seconds=2000)
    known = json.loads((job.output / "lengths.json").read_text())
    assert known["trial"]["detection_step"] == 2.0 and known["trial"]["erf_refresh"] == 5.0
    assert "at 1.000 s" in known["lengths"]["explanation"]


def test_lengths_reach_both_schedules_in_steps_of_their_own_batch():
    job = Job(
        None, None, "jigsaw_R_50.yaml", "finetune/faster_rcnn_R_18_FPN_small.yaml",
        ("SOLVER.IMS_PER_BATCH", "64"),
    )  # fmt: skip
    changed = with_lengths(job, Lengths(1000, 320, 90, ""))
    cfg = get_jigsaw_cfg(job.pretrain_config, list(changed.pretrain))
    assert cfg.SOLVER.MAX_ITER == 1000 and cfg.SOLVER.REFERENCE_BATCH_SIZE == 0
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.8 * 64 / 512)  # linear in the batch
    assert cfg.MODEL.JIGSAW.ERF.PERIOD == 90 and cfg.SOLVER.WARMUP_ITERS == 100
    detector = load_detection_config(job.detector_config, list(changed.detector))
    assert detector.SOLVER.MAX_ITER == 320
    assert tuple(detector.SOLVER.STEPS) == (256, 300)  # (640, 750) of 800


def test_tables_name_every_stage_and_both_detectors(job):
    result = JobRunner(job, quiet, FakeRunner(lambda weights, seed: 1.25)).run()
    text = result_tables(result)
    for words in ("extract train", "pre-train", "fine-tune from scratch", "1.25", "AP50", "total"):
        assert words in text
    for table in text.split("\n\n"):  # columns line up on a terminal too
        assert len({len(line) for line in table.splitlines()}) == 1
    figure = job.output / "figures" / "erf.png"
    report = job_report(job, result, [figure])
    assert "python -m jigsaw_d2 pretrain" in report and "![figures/erf.png]" in report


@pytest.fixture
def computing_nothing(monkeypatch):
    runner = FakeRunner(lambda weights, seed: 1.5 if weights == "none" else 2.5)
    monkeypatch.setattr("jigsaw_d2.tools.stages.run_subprocess", runner)
    monkeypatch.setattr("jigsaw_d2.tools.job.draw_figures", lambda job, say: [])
    return runner


def test_demo_prints_one_table_with_both_arms_and_writes_a_report(
    tmp_path, computing_nothing, capsys
):
    tiny_set(tmp_path / "set")
    argv = ["--data", str(tmp_path / "set"), "--output", str(tmp_path / "out")]
    assert demo.main(argv) == 0
    printed = capsys.readouterr().out
    for words in ("| pre-train ", "| scratch ", "2.50", "1.50", "AP50", "backbone.pkl"):
        assert words in printed
    assert "2.50" in (tmp_path / "out" / "report.md").read_text()
    calls = len(computing_nothing.calls)
    assert demo.main(argv) == 0  # all done before
    assert len(computing_nothing.calls) == calls


def test_run_with_hours_says_how_it_came_to_its_lengths(tmp_path, computing_nothing, capsys):
    data = tiny_set(tmp_path / "set")
    argv = ["--json", str(data.train_json), "--images", str(data.train_images)]
    argv += ["--val-json", str(data.val_json), "--output", str(tmp_path / "out"), "--hours", "0.5"]
    assert run.main(argv) == 0
    printed = capsys.readouterr().out
    assert "budget 1800 s" in printed and "half for each" in printed
    assert "scratch" not in printed.split("detector from")[1].split("weights:")[0]
