"""The stages of a job: which settings make a result, and what is read of what they leave."""

import json
import time

import pytest
from helpers_jobs import flag, tiny_set
from helpers_store import make_store

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.io import ConfigError, DataError, RunError
from jigsaw_d2.tools.pipeline import (
    DetectionSet,
    finetuning_stage,
    length_overrides,
    pretraining_stage,
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


def test_missing_results_are_an_error_and_missing_costs_are_zero(tmp_path):
    with pytest.raises(RunError, match="no box results"):
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
    with pytest.raises(RunError, match="more than two"):
        step_seconds(tmp_path)


def test_folder_of_a_dataset_must_be_whole(tmp_path):
    data = tiny_set(tmp_path / "set")
    assert DetectionSet.from_folder(tmp_path / "set") == data
    data.val_json.unlink()
    with pytest.raises(DataError, match="val.json does not exist"):
        DetectionSet.from_folder(tmp_path / "set")


def test_equally_named_sets_have_names_of_their_own_in_the_catalog(tmp_path):
    one, other = tiny_set(tmp_path / "a" / "set"), tiny_set(tmp_path / "b" / "set")
    assert one.name == other.name and set(one.catalog_names()).isdisjoint(other.catalog_names())


def test_an_apostrophe_in_a_folder_s_name(tmp_path):
    data = tiny_set(tmp_path / 'Anna\'s "set"')
    cfg = load_detection_config(SMALL, data.overrides())
    assert cfg.DATASETS.TRAIN == (data.catalog_names()[0],)
    assert cfg.DATASETS.TEST == (data.catalog_names()[1],)
    assert cfg.DATASETS.COCO_FILES[1][1:] == [str(data.val_json), str(data.val_images)]


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


def test_lengths_are_said_in_the_config_s_reference_batch():
    # 1,000 steps of 64 images are 125 of the reference's 512.
    cfg = get_jigsaw_cfg("jigsaw_R_50.yaml", ["SOLVER.IMS_PER_BATCH", "64"])
    assert flag(length_overrides(cfg, 1000), "SOLVER.MAX_ITER") == "125"


def settings_of(tmp_path, folder="out", num_gpus=1, overrides=(), seed=0, weights=None):
    data = tiny_set(tmp_path / "set")
    store = tmp_path / "store"
    if not store.exists():
        make_store(store)
    common = {"num_gpus": num_gpus, "seed": seed}
    pretrain = pretraining_stage(
        (store, None), tmp_path / folder, "jigsaw_R_18_cpu.yaml", overrides, **common
    )
    detector = finetuning_stage(data, weights, tmp_path / folder, SMALL, overrides, **common)
    return pretrain.settings, detector.settings


def test_gpus_workers_device_and_folder_are_no_part_of_a_result(tmp_path):
    elsewhere = ("MODEL.DEVICE", "cuda", "DATALOADER.NUM_WORKERS", "7")
    assert settings_of(tmp_path) == settings_of(tmp_path, "other", 4, elsewhere)
    moved = DetectionSet.from_folder((tmp_path / "set").rename(tmp_path / "moved"))
    stage = finetuning_stage(moved, None, tmp_path / "out", SMALL)
    assert stage.settings == settings_of(tmp_path)[1]


def test_seed_schedule_and_inputs_are_part_of_a_result(tmp_path):
    pretrain, detector = settings_of(tmp_path)
    weights = tmp_path / "weights.pkl"
    weights.write_bytes(b"other")
    assert settings_of(tmp_path, seed=1)[0]["SEED"] == 1
    assert settings_of(tmp_path, overrides=("SOLVER.MAX_ITER", "9"))[1]["SOLVER.MAX_ITER"] == 9
    assert settings_of(tmp_path, weights=weights)[1]["weights"] != detector["weights"] == "none"
    make_store(tmp_path / "store2", seed=1)
    other = pretraining_stage((tmp_path / "store2", None), tmp_path, "jigsaw_R_18_cpu.yaml")
    assert {k for k in pretrain if pretrain[k] != other.settings[k]} == {"store"}
