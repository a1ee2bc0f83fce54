"""The stages of a job: which settings make a result, and what is read of what they leave."""

import json
import time
from dataclasses import replace

import pytest
from detectron2.engine import TrainerBase
from detectron2.engine.hooks import IterationTimer, PeriodicWriter
from detectron2.utils.events import JSONWriter
from helpers_jobs import flag, tiny_set
from helpers_store import make_store

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.io import ConfigError, DataError, RunError
from jigsaw_d2.tools.pipeline import (
    DetectionSet,
    Pipeline,
    length_overrides,
    read_curve,
    read_results,
    stage_cost,
    step_seconds,
)

SMALL = "finetune/faster_rcnn_R_18_FPN_small.yaml"


def test_curve_of_a_resumed_run_has_each_point_once(tmp_path):
    lines = [
        {"iteration": 9, "total_loss": 1.0, "bbox/AP": float("nan")},  # nothing detected yet
        {"iteration": 19, "bbox/AP": 1.0},
        {"iteration": 19, "bbox/AP": 2.0},  # evaluated again after a resume
        {"iteration": 40, "bbox/AP": 3.0},  # Detectron2 counts the end of a run like this
    ]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curve(tmp_path, 40) == [(20, 2.0), (40, 3.0)]
    (tmp_path / "results.1.json").write_text("{}")  # of a held-out set that changed since
    (tmp_path / "results.json").write_text('{"bbox": {"AP": 5.0}}')
    assert read_curve(tmp_path, 40) == [(40, 5.0)]


def test_missing_results_are_an_error_and_missing_costs_are_zero(tmp_path):
    with pytest.raises(RunError, match="no box results"):
        read_results(tmp_path)
    assert stage_cost(tmp_path, "pretraining") == {"images": 0, "flops": 0, "seconds": 0}


def test_warm_up_is_no_part_of_a_step_s_time(tmp_path):
    """Read off what Detectron2's own hooks write, whose first steps are a hundred times slower."""

    class Trainer(TrainerBase):
        def run_step(self):
            time.sleep(0.3 if self.iter < 2 else 0.003)

    trainer = Trainer()
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    trainer.register_hooks([IterationTimer(), PeriodicWriter([writer])])
    trainer.train(0, 12)
    assert 0.003 <= step_seconds(tmp_path) < 0.05  # the mean of all is 0.0525


def test_folder_of_a_dataset_must_be_whole(tmp_path):
    data = tiny_set(tmp_path / "set")
    assert DetectionSet.from_folder(tmp_path / "set") == data
    data.val_json.unlink()
    with pytest.raises(DataError, match="val.json does not exist"):
        DetectionSet.from_folder(tmp_path / "set")


def test_an_apostrophe_in_a_folder_s_name_and_equally_named_sets(tmp_path):
    data, other = tiny_set(tmp_path / 'Anna\'s "set"'), tiny_set(tmp_path / "b" / 'Anna\'s "set"')
    cfg = load_detection_config(SMALL, data.overrides())
    assert cfg.DATASETS.COCO_FILES[1][1:] == [str(data.val_json), str(data.val_images)]
    names = [entry[0] for entry in cfg.DATASETS.COCO_FILES]
    assert names == [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    assert cfg.DATASETS.TRAIN != load_detection_config(SMALL, other.overrides()).DATASETS.TRAIN


def test_schedules_keep_their_shape_at_another_length():
    cfg = load_detection_config(SMALL)  # steps (640, 750) of 800, warm-up 50
    changed = load_detection_config(SMALL, length_overrides(cfg, 1600))
    solver = changed.SOLVER
    assert (solver.MAX_ITER, tuple(solver.STEPS), solver.WARMUP_ITERS) == (1600, (1280, 1500), 50)
    short = load_detection_config(SMALL, length_overrides(cfg, 16)).SOLVER
    assert (short.MAX_ITER, tuple(short.STEPS), short.WARMUP_ITERS) == (16, (13, 15), 1)
    # 640 / 800 of 6 is step 5; 750 / 800 would be step 6, behind the last one.
    assert flag(length_overrides(cfg, 6), "SOLVER.STEPS") == "(5,)"
    assert flag(length_overrides(cfg, 1), "SOLVER.STEPS") == "()"
    with pytest.raises(ConfigError, match="no training"):
        length_overrides(cfg, 0)
    # 1,000 steps of 64 images are 125 of the reference's 512.
    cfg = get_jigsaw_cfg("jigsaw_R_50.yaml", ["SOLVER.IMS_PER_BATCH", "64"])
    assert flag(length_overrides(cfg, 1000), "SOLVER.MAX_ITER") == "125"


@pytest.fixture
def settings_of(tmp_path):
    """The settings of both trainings, given what changes."""
    pipeline = Pipeline(tiny_set(tmp_path / "set"), "jigsaw_R_18_cpu.yaml", SMALL)
    for seed, name in enumerate(("samples", "other_samples")):
        make_store(tmp_path / name / "train" / "store", seed=seed)

    def settings(overrides=(), weights=None, samples="samples", folder="out", **shared):
        changed = replace(pipeline, **shared)
        ours = changed.pretraining(tmp_path / samples, tmp_path / folder, overrides)
        detector = changed.finetuning(weights, tmp_path / folder, overrides)
        return ours.settings, detector.settings

    return settings


def test_gpus_workers_device_and_folder_are_no_part_of_a_result(tmp_path, settings_of):
    before = settings_of()
    elsewhere = ("MODEL.DEVICE", "cuda", "DATALOADER.NUM_WORKERS", "7")
    moved = DetectionSet.from_folder((tmp_path / "set").rename(tmp_path / "moved"))
    assert before == settings_of(elsewhere, folder="other", num_gpus=4, data=moved)


def test_seed_schedule_and_inputs_are_part_of_a_result(tmp_path, settings_of):
    pretrain, detector = settings_of()
    weights = tmp_path / "weights.pkl"
    weights.write_bytes(b"other")
    assert settings_of(seed=1)[0]["SEED"] == 1
    assert settings_of(("SOLVER.MAX_ITER", "9"))[1]["SOLVER.MAX_ITER"] == 9
    assert settings_of(weights=weights)[1]["weights"] != detector["weights"] == "none"
    other = settings_of(samples="other_samples")[0]
    assert {k for k in pretrain if pretrain[k] != other[k]} == {"store"}
    assert settings_of(register=("json",))[1] == {**detector, "register": ["json"]}
