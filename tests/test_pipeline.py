import json
import time

import pytest
from helpers_jobs import FakeRunner, fake_passports, flag, tiny_set

from jigsaw_d2.commands import demo, run
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.detection.finetune_config import load_detection_config
from jigsaw_d2.jobs.pipeline import (
    DetectionSet,
    PipelineError,
    finetuning_stage,
    length_overrides,
    pretraining_stage,
    read_curve,
    read_results,
    stage_cost,
    step_seconds,
)

SMALL = "finetune/faster_rcnn_R_18_FPN_small.yaml"


def test_folder_of_a_dataset_must_be_whole(tmp_path):
    data = tiny_set(tmp_path / "set")
    assert DetectionSet.from_folder(tmp_path / "set") == data
    data.val_json.unlink()
    with pytest.raises(PipelineError, match="val.json does not exist"):
        DetectionSet.from_folder(tmp_path / "set")


def test_equally_named_sets_have_names_of_their_own_in_the_catalog(tmp_path):
    one, other = tiny_set(tmp_path / "a" / "set"), tiny_set(tmp_path / "b" / "set")
    assert one.name == other.name and set(one.catalog_names()).isdisjoint(other.catalog_names())
    cfg = load_detection_config(SMALL, one.overrides())
    assert cfg.DATASETS.TRAIN == (one.catalog_names()[0],)
    assert cfg.DATASETS.COCO_FILES[1][1] == str(one.val_json)


def test_schedules_keep_their_shape_at_another_length():
    cfg = load_detection_config(SMALL)  # steps (640, 750) of 800, warm-up 50
    changed = load_detection_config(SMALL, length_overrides(cfg, 1600))
    solver = changed.SOLVER
    assert (solver.MAX_ITER, tuple(solver.STEPS), solver.WARMUP_ITERS) == (1600, (1280, 1500), 50)
    short = load_detection_config(SMALL, length_overrides(cfg, 16)).SOLVER
    assert (short.MAX_ITER, tuple(short.STEPS), short.WARMUP_ITERS) == (16, (13, 15), 1)
    with pytest.raises(PipelineError, match="no training"):
        length_overrides(cfg, 0)


def test_lengths_are_said_in_the_config_s_reference_batch():
    # 1,000 steps of 64 images are 125 of the reference's 512.
    cfg = get_jigsaw_cfg("jigsaw_R_50.yaml", ["SOLVER.IMS_PER_BATCH", "64"])
    assert flag(length_overrides(cfg, 1000), "SOLVER.MAX_ITER") == "125"


def test_stages_resume_before_their_overrides(tmp_path, monkeypatch):
    fake_passports(monkeypatch)
    data = tiny_set(tmp_path / "set")
    stage = finetuning_stage(data, None, tmp_path / "out", SMALL)
    argv = list(stage.argv)
    assert flag(argv, "--weights") == "none" and stage.iterations == 800
    assert stage.resume_argv == ("--resume",)
    assert argv[stage.resume_at] == "DATASETS.COCO_FILES"  # options end, KEY VALUE begins


def test_pre_training_follows_the_content_of_its_store(tmp_path):
    from helpers_store import make_store

    fingerprints = []
    for seed in (0, 1):
        store = tmp_path / f"store{seed}"
        make_store(store, seed=seed)
        stage = pretraining_stage((store, None), tmp_path / "out", "jigsaw_R_18_cpu.yaml")
        fingerprints.append(stage.inputs["store"])
    assert fingerprints[0] != fingerprints[1]


def test_curve_of_a_resumed_run_has_each_point_once(tmp_path):
    lines = [
        {"iteration": 9, "total_loss": 1.0},
        {"iteration": 19, "bbox/AP": 1.0},
        {"iteration": 19, "bbox/AP": 2.0},  # evaluated again after a resume
        {"iteration": 40, "bbox/AP": 3.0},  # Detectron2 counts the end of a run like this
    ]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curve(tmp_path, 40) == [(20, 2.0), (40, 3.0)]


def test_missing_results_are_an_error_and_missing_costs_are_zero(tmp_path):
    with pytest.raises(PipelineError, match="no box results"):
        read_results(tmp_path)
    assert stage_cost(tmp_path, "pretraining") == {"images": 0, "flops": 0, "seconds": 0}


def test_warm_up_is_no_part_of_a_step_s_time(tmp_path):
    """Read off what Detectron2's own hooks write, whose first steps are a hundred times slower."""
    from detectron2.engine import TrainerBase
    from detectron2.engine.hooks import IterationTimer, PeriodicWriter
    from detectron2.utils.events import JSONWriter

    class Trainer(TrainerBase):
        def run_step(self):
            time.sleep(0.3 if self.iter < 2 else 0.003)

    trainer = Trainer()
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    trainer.register_hooks([IterationTimer(), PeriodicWriter([writer])])
    trainer.train(0, 12)
    assert 0.003 <= step_seconds(tmp_path) < 0.05  # the mean of all is 0.0525


def test_a_training_of_two_steps_tells_no_time(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "total_loss": 1.0}\n')
    with pytest.raises(PipelineError, match="more than two"):
        step_seconds(tmp_path)


@pytest.fixture
def computing_nothing(monkeypatch):
    fake_passports(monkeypatch)
    runner = FakeRunner(lambda weights, seed: 1.5 if weights == "none" else 2.5)
    monkeypatch.setattr("jigsaw_d2.jobs.stages.run_subprocess", runner)
    monkeypatch.setattr("jigsaw_d2.commands.run.draw_figures", lambda job, say: [])
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
