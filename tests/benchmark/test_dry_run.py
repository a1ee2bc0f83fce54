"""What a dry run promises, by hand where the speed is given, and that a speed can be measured."""

import dataclasses
import json

from helpers_jobs import RUN, FakeRunner, flag, tiny_set

from benchmark.dry_run import dry_run_table, estimate, first_images, measure
from benchmark.plan import PRESETS, SCRATCH, jigsaw_arm
from jigsaw_d2.tools.time_budget import Trial

TRIAL = Trial(pretrain_step=0.5, erf_refresh=3.0, detection_step=2.0, evaluation=9.0)
PLAN = dataclasses.replace(PRESETS["smoke"], pretrain_iterations=41, detection_iterations=10)


def test_equal_total_cost():
    # 41 * 0.5 + 1 refresh of 3 = 23.5 s are 11.75 detection steps, so 12; 22 steps of 2 s.
    assert estimate(PLAN, jigsaw_arm(), TRIAL) == (41, 10, 43.5)
    assert estimate(PLAN, SCRATCH, TRIAL) == (0, 22, 44.0)


def test_a_longer_arm_costs_more_and_counts_for_scratch():
    twice = dataclasses.replace(jigsaw_arm(), name="twice", length=8.0)
    plan = dataclasses.replace(PLAN, arms=(jigsaw_arm(), twice, SCRATCH))
    assert estimate(plan, twice, TRIAL)[0] == 328
    # 328 * 0.5 + 2 * 3 = 170 s, 85 detection steps.
    assert estimate(plan, SCRATCH, TRIAL)[1] == 10 + 85
    plan = dataclasses.replace(plan, budget="detection")
    assert estimate(plan, SCRATCH, TRIAL)[1] == 10


def test_a_trial_runs_the_commands_on_real_batches_and_leaves_nothing(tmp_path, monkeypatch):
    data, runner = tiny_set(tmp_path / "set"), FakeRunner()
    monkeypatch.setattr(RUN, runner)
    before = sorted(tmp_path.rglob("*"))
    trial = measure(dataclasses.replace(PLAN, num_gpus=4), data)
    # Fake speeds: 1 s a pre-training step, 5 s a refresh, 2 s a detection step, 3 s an evaluation.
    assert trial == Trial(1.0, 5.0, 2.0, 3.0)
    assert [argv[0] for argv in runner.calls] == ["extract", "extract", "pretrain", "finetune"]
    for argv in runner.calls[2:]:
        assert flag(argv, "--num-gpus") == "4" and int(flag(argv, "SOLVER.MAX_ITER")) >= 12
    assert flag(runner.calls[2], "SOLVER.IMS_PER_BATCH") == "32"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_trial_needs_few_images(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmark.dry_run.TRIAL_IMAGES", 3)
    data = tiny_set(tmp_path / "set", train_images=6, val_images=2)
    content = json.loads(data.train_json.read_text())
    for entry in content["annotations"]:
        entry["image_id"] = str(entry["image_id"])  # both are read as the same number
    data.train_json.write_text(json.dumps(content), encoding="utf-8-sig")
    part = first_images(data, tmp_path)
    content = json.loads(part.train_json.read_text())
    assert [image["id"] for image in content["images"]] == [1, 2, 3]
    assert {entry["image_id"] for entry in content["annotations"]} == {"1", "2", "3"}
    assert part.train_images == data.train_images


def test_a_plan_for_gpus_is_not_timed_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert measure(PRESETS["paper"], tiny_set(tmp_path / "set")) is None
    assert "No GPU here" in dry_run_table(PLAN, "set", None)
