"""The whole job: its stages, its resumption, its time budget, its report."""

import json
from dataclasses import replace
from unittest import mock

import pytest
from helpers_jobs import RUN, FakeRunner, flag, tiny_set

import demo
from jigsaw_d2.io import ConfigError, DataError, RunError
from jigsaw_d2.tools import run, run_command
from jigsaw_d2.tools.job import Job, default_configs
from jigsaw_d2.tools.pipeline import Pipeline
from jigsaw_d2.tools.time_budget import Lengths

SHORT = ("SOLVER.MAX_ITER", "30")


@pytest.fixture
def job(tmp_path):
    pipeline = Pipeline(tiny_set(tmp_path / "set"), *default_configs(on_gpu=False))
    return Job(pipeline, tmp_path / "out", SHORT, SHORT, with_scratch=True)


def do(job, runner, seconds=None, **shared):
    """A new call for the same output; ``shared`` changes the pipeline."""
    job = replace(job, pipeline=replace(job.pipeline, **shared))
    with mock.patch(RUN, runner):
        job.run(seconds)
    return job


def test_stages_in_order_and_both_detectors_alike(job):
    runner = FakeRunner(lambda weights, seed: 3.0 if weights == "none" else 5.0)
    done = do(job, runner)
    names = [argv[0] for argv in runner.calls]
    assert names == ["extract", "extract", "pretrain", "convert", "finetune", "finetune"]
    ours, scratch = runner.calls[-2:]
    different = [(a, b) for a, b in zip(ours, scratch) if a != b]
    assert [a.rsplit("/", 1)[-1] for a, _ in different] == ["backbone.pkl", "detector"]
    assert [found["AP"] for found in done.metrics.values()] == [5.0, 3.0]
    assert [images for _, _, images in done.stages] == [4, 4, 480, 0, 240, 240]
    text = done.tables()
    for words in ("extract train", "pre-train", "fine-tune from scratch", "5.00", "AP50", "total"):
        assert words in text
    for table in text.split("\n\n"):  # columns line up on a terminal too
        assert len({len(line) for line in table.splitlines()}) == 1
    report = done.report([job.output / "figures" / "erf.png"])
    assert "python -m jigsaw_d2 pretrain" in report and "](figures/erf.png)" in report


@pytest.mark.parametrize("gpus, step, longer", [(1, 2.0, 52), (4, 2.0, 49), (1, 3.0, 35)])
def test_scratch_at_equal_time_takes_as_long_as_the_jigsaw_detector(job, gpus, step, longer):
    """10 s of extraction, 30 steps of 1 s, a refresh of 5 s, 30 of 2 s: 105 s, in steps from
    scratch of 2 or 3 s. On four GPUs the ledger has four times the seconds of both trainings: 390
    in steps of 8."""
    runner = FakeRunner(scratch_step=step)
    done = do(replace(job, equal_cost=True), runner, num_gpus=gpus)
    lengths = [int(flag(argv, "SOLVER.MAX_ITER")) for argv in runner.calls if "finetune" in argv]
    assert lengths == [30, 30, longer]
    assert list(done.metrics)[1:] == ["scratch, equal steps", "scratch, equal time"]


def test_fewer_gpus_on_resume_go_on_with_what_is_there(job):
    with pytest.raises(RunError):
        do(job, FakeRunner(fail=lambda argv: argv[0] == "pretrain"), num_gpus=8)
    checkpoint = job.output / "pretrain" / "model_0000009.pth"
    checkpoint.write_text("hours of eight GPUs")
    runner = FakeRunner()
    do(job, runner, num_gpus=4)
    assert runner.calls[0][:2] == ["pretrain", "--resume"]
    assert flag(runner.calls[0], "--num-gpus") == "4"
    assert checkpoint.read_text() == "hours of eight GPUs"
    assert (
        do(job, None, num_gpus=8).metrics["scratch, equal steps"]["AP"] == 10.0
    )  # all done before


@pytest.mark.parametrize("gpus", [1, 4])
def test_time_budget_measures_sets_lengths_and_keeps_them(job, gpus):
    runner = FakeRunner()
    first = do(job, runner, seconds=2000, num_gpus=gpus)
    # Fake speeds: 1 s a pre-training step, 5 s a refresh, 2 s a detection step, 3 s an evaluation;
    # the ledger counts the seconds of all four GPUs, of which a quarter is what passes.
    trial = json.loads((job.output / "lengths.json").read_text())["trial"]
    assert [*trial.values()] == [1.0, 5.0, 2.0, 3.0]
    folders = [flag(argv, "OUTPUT_DIR") for argv in runner.calls if argv[0] == "pretrain"]
    assert folders == [str(job.output / "trial" / "pretrain"), str(job.output / "pretrain")]
    assert "budget 2000 s" in first.explanation and first.explanation in first.report([])
    assert "for each of 2 detectors" in first.explanation  # scratch is trained too
    # 2 s for 4 images of the detector, 1 s for 16 Jigsaw images
    assert "costs the detector as much as 8 Jigsaw images" in first.explanation
    assert do(job, None, seconds=2000, num_gpus=2).explanation == first.explanation
    with pytest.raises(ConfigError, match="seconds: 2000 -> 3000"):
        do(job, None, seconds=3000)


def test_lengths_reach_both_schedules_in_steps_of_their_own_batch():
    configs = ("jigsaw_R_50.yaml", "finetune/faster_rcnn_R_18_FPN_small.yaml")
    job = Job(Pipeline(None, *configs), None, ("SOLVER.IMS_PER_BATCH", "64"))
    job.set_lengths(Lengths(1000, 320, 90, ""))
    cfg = job.pipeline.pretrain_cfg(job.pretrain)
    assert cfg.SOLVER.MAX_ITER == 1000 and cfg.SOLVER.REFERENCE_BATCH_SIZE == 0
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.8 * 64 / 512)  # linear in the batch
    assert cfg.MODEL.JIGSAW.ERF.PERIOD == 90 and cfg.SOLVER.WARMUP_ITERS == 100
    solver = job.pipeline.detector_cfg(job.detector).SOLVER
    assert (solver.MAX_ITER, tuple(solver.STEPS)) == (320, (256, 300))  # (640, 750) of 800


@pytest.fixture
def computing_nothing(monkeypatch):
    runner = FakeRunner(lambda weights, seed: 1.5 if weights == "none" else 2.5)
    monkeypatch.setattr(RUN, runner)
    monkeypatch.setattr(Job, "draw_figures", lambda job: [])
    return runner


def test_demo_prints_one_table_with_both_arms_and_writes_a_report(
    tmp_path, computing_nothing, capsys
):
    tiny_set(tmp_path / "set")
    argv = ["--data", str(tmp_path / "set"), "--output", str(tmp_path / "out")]
    assert demo.main(argv) == 0
    printed = capsys.readouterr().out
    for words in (
        "| pre-train ",
        "| scratch, equal steps",
        "| scratch, equal time",
        "2.50",
        "1.50",
        "AP50",
        "backbone.pkl",
    ):
        assert words in printed
    assert "2.50" in (tmp_path / "out" / "report.md").read_text()
    calls = len(computing_nothing.calls)
    assert demo.main(argv) == 0  # all done before
    assert len(computing_nothing.calls) == calls


def test_run_hands_its_flags_on_and_says_how_it_came_to_its_lengths(
    tmp_path, computing_nothing, capsys, monkeypatch
):
    (tmp_path / "my_backbones.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    data = tiny_set(tmp_path / "set")
    argv = ["--json", str(data.train_json), "--images", str(data.train_images)]
    argv += ["--val-json", str(data.val_json), "--output", str(tmp_path / "out"), "--hours", "0.5"]
    assert run.main([*argv, "--register", "my_backbones", "--trust"]) == 0
    printed = capsys.readouterr().out
    assert "budget 1800 s" in printed and "20% of them for pre-training" in printed
    assert "scratch" not in printed.split("detector from")[1].split("weights:")[0]
    for call in computing_nothing.calls:
        assert flag(call, "--register") == "my_backbones"
        assert ("--trust" in call) == (call[0] != "extract")
    assert run_command(run.main, argv) == 2
    assert "register: ['my_backbones'] -> (default)" in capsys.readouterr().err
    assert run_command(run.main, [*argv, "--register", "no_such_module"]) == 2
    assert "no_such_module cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize("key, words", [("annotations", "nothing can be"), ("categories", "diff")])
def test_data_that_some_stage_could_not_use_is_refused_before_the_first(job, key, words):
    data = job.pipeline.data
    content = json.loads(data.val_json.read_text())
    content[key] = [] if key == "annotations" else content[key][::-1][1:]
    data.val_json.write_text(json.dumps(content))
    runner = FakeRunner()
    with pytest.raises(DataError, match=words):
        do(job, runner)
    assert runner.calls == [] and not job.output.exists()


def test_a_mended_held_out_set_is_cut_and_scored_again_and_nothing_else(job):
    do(job, FakeRunner())
    data = job.pipeline.data
    content = json.loads(data.val_json.read_text())
    content["annotations"] = content["annotations"][1:]
    data.val_json.write_text(json.dumps(content))
    runner = FakeRunner()
    do(job, runner)
    assert [argv[:2] for argv in runner.calls] == [
        ["extract", "--overwrite"],
        ["finetune", "--eval-only"],
        ["finetune", "--eval-only"],
    ]
    assert (job.output / "samples" / "val" / "store.1" / "header.json").exists()
    assert (job.output / "detector" / "results.1.json").exists()
