import json
from dataclasses import replace

import pytest
from helpers_jobs import FakeRunner, fake_passports, flag, tiny_set

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.detection.finetune_config import load_detection_config
from jigsaw_d2.jobs.job import Job, JobRunner, default_configs, with_lengths
from jigsaw_d2.jobs.job_report import job_report, result_tables
from jigsaw_d2.jobs.stages import StageError
from jigsaw_d2.jobs.time_budget import Lengths


@pytest.fixture
def job(tmp_path, monkeypatch):
    fake_passports(monkeypatch)
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
    assert [images for _, images in result.stages] == [4, 4, 480, 0, 240, 240]


def test_failed_stage_stops_and_the_same_call_goes_on_from_there(job):
    broken = FakeRunner(fail=lambda argv: argv[0] == "convert")
    with pytest.raises(StageError, match="convert broke"):
        JobRunner(job, quiet, broken).run()
    runner = FakeRunner()
    result = JobRunner(job, quiet, runner).run()
    assert [argv[0] for argv in runner.calls] == ["convert", "finetune", "finetune"]
    assert len(result.stages) == 6


def test_other_pre_training_renews_what_follows(job):
    JobRunner(job, quiet, FakeRunner()).run()
    runner = FakeRunner()
    JobRunner(replace(job, pretrain=("SOLVER.MAX_ITER", "40")), quiet, runner).run()
    # The detector from scratch does not depend on it.
    assert [argv[0] for argv in runner.calls] == ["pretrain", "convert", "finetune"]


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


def test_trial_tells_wall_clock_time_on_any_number_of_gpus(job):
    # The ledger counts the seconds of all four; the time that passes is a quarter of them.
    JobRunner(replace(job, num_gpus=4), quiet, FakeRunner()).run(seconds=2000)
    known = json.loads((job.output / "lengths.json").read_text())
    assert known["trial"]["detection_step"] == 2.0 and known["trial"]["erf_refresh"] == 5.0
    assert "at 1.000 s" in known["answer"]["explanation"]


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
    widths = {len(line) for line in text.split("\n\n")[0].splitlines()}
    assert len(widths) == 2  # the ruler is shorter; all other lines line up
    assert "python -m jigsaw_d2 pretrain" in job_report(job, result, ["figures/erf.png"])
