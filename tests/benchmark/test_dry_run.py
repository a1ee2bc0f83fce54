"""What a dry run promises, by hand where the speed is given, and that a speed can be measured."""

import dataclasses
import time

import pytest
import torch

from benchmark.dry_run import (
    Speed,
    detection_size,
    detection_step_flops,
    estimate,
    measured_speed,
    pretraining_flops,
    step_seconds,
)
from benchmark.plan import PRESETS, SCRATCH, jigsaw_arm
from jigsaw_d2.detection.finetune_config import load_detection_config

SPEED = Speed(pretrain_step=0.5, detection_step=2.0)
PLAN = dataclasses.replace(PRESETS["smoke"], pretrain_iterations=41, detection_iterations=10)


def test_equal_total_cost_in_seconds():
    # 41 * 0.5 = 20.5 s are 10.25 detection steps, so 11; 10 + 11 = 21 steps of 2 s.
    ours, scratch = (estimate(PLAN, arm, SPEED) for arm in (jigsaw_arm(), SCRATCH))
    assert (ours.pretrain_iterations, ours.detection_iterations) == (41, 10)
    assert ours.seconds == pytest.approx(40.5)
    assert (scratch.pretrain_iterations, scratch.detection_iterations) == (0, 21)
    assert scratch.seconds == pytest.approx(42.0)


def test_equal_total_cost_in_flops():
    plan = dataclasses.replace(PLAN, cost="flops")
    ours, scratch = (estimate(plan, arm, SPEED) for arm in (jigsaw_arm(), SCRATCH))
    step = detection_step_flops(load_detection_config(plan.detector_config, list(plan.detector)))
    assert 0 <= scratch.flops - ours.flops < step  # rounded up by less than one step
    assert ours.flops == pytest.approx(pretraining_flops(plan, jigsaw_arm())[1] + 10 * step)


def test_equal_detection_cost():
    plan = dataclasses.replace(PLAN, budget="detection")
    assert estimate(plan, SCRATCH, SPEED).detection_iterations == 10


def test_a_longer_arm_costs_more_and_counts_for_scratch():
    twice = dataclasses.replace(jigsaw_arm(), name="twice", length=2.0)
    plan = dataclasses.replace(PLAN, arms=(jigsaw_arm(), twice, SCRATCH))
    assert estimate(plan, twice, SPEED).pretrain_iterations == 82
    assert estimate(plan, SCRATCH, SPEED).detection_iterations == 10 + 21  # ceil(41 / 2)


def test_size_of_a_detection_image():
    cfg = load_detection_config(PLAN.detector_config)
    assert detection_size(cfg) == (160, 224)  # 160 x 213.3, up to multiples of 32
    cfg.INPUT.MAX_SIZE_TRAIN = 128
    assert detection_size(cfg) == (96, 128)


def test_speed_is_measured():
    plan = dataclasses.replace(
        PLAN,
        pretrain=("INPUT.JIGSAW.TEMPLATE_SIZE", "[96, 96]", "SOLVER.IMS_PER_BATCH", "2"),
        detector=("INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "1"),
    )
    speed = measured_speed(plan)
    assert 0 < speed.pretrain_step < 60 and 0 < speed.detection_step < 60


class Device:
    """Steps that take 10 ms and 1 ms an image; one of more images than fit runs out of memory."""

    def __init__(self, fits=10**6):
        self.fits, self.tried = fits, []

    def __call__(self, images):
        def step():
            if images > self.fits:
                raise torch.OutOfMemoryError("out of memory")
            time.sleep(0.01 + 0.001 * images)

        self.tried.append(images)
        return step


def test_a_trial_batch_is_the_real_one():
    device = Device()
    seconds = step_seconds(device, 24, "cpu")
    assert device.tried == [1, 2, 4, 8, 16, 24]
    assert seconds >= 0.034


def test_a_trial_ends_where_memory_or_time_do():
    device = Device(fits=4)
    assert step_seconds(device, 64, "cpu") >= 0.014 * 16
    assert device.tried == [1, 2, 4, 8]
    device = Device()
    step_seconds(device, 4096, "cpu", limit=0.3)
    assert device.tried[-1] < 64
    with pytest.raises(torch.OutOfMemoryError):
        step_seconds(Device(fits=0), 4, "cpu")


def test_several_devices_share_a_batch(monkeypatch):
    batches = []
    monkeypatch.setattr(
        "benchmark.dry_run.step_seconds",
        lambda trial, batch, device: batches.append(batch) or 1.0,
    )
    measured_speed(dataclasses.replace(PLAN, num_gpus=4))  # of 8 Jigsaw images, and of 4
    assert batches == [2, 1]
