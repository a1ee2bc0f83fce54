"""lr_schedule.py: Sec. 4.1's rate at every iteration, and the rule for other batch sizes."""

import math

import mpmath
import pytest
import torch
import yaml
from detectron2.config import CfgNode

from jigsaw_d2.config import get_jigsaw_cfg, scale_to_batch
from jigsaw_d2.engine.lr_schedule import build_lr_scheduler, warmup_then_cosine
from jigsaw_d2.io import ConfigError


def rates(cfg: CfgNode) -> list[float]:
    """The rate of every step, as the optimiser sees it, driven as Detectron2's hook drives it."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_papers_rate_at_every_iteration():
    found = rates(get_jigsaw_cfg("jigsaw_R_50.yaml"))
    assert len(found) == 64000
    # Written down here from Sec. 4.1 alone: 0.2 -> 0.8 over 1,250 iterations, a line; then half a
    # cosine from 0.8 at 1,250 to 0 at 64,000.
    for k, rate in enumerate(found):
        if k < 1250:
            expected = 0.8 * (0.25 + 0.75 * (k / 1250))
        else:
            expected = 0.8 * (0.5 * (1 + math.cos(math.pi * (k - 1250) / 62750)))
        assert abs(rate - expected) < 4e-16, k  # two roundings apart
    assert found[0] == pytest.approx(0.2, rel=1e-15) and found[1250] == 0.8
    assert found[625] == pytest.approx(0.5, rel=1e-15)  # halfway between 0.2 and 0.8
    assert found[1250 + 62750 // 2] == pytest.approx(0.4, rel=1e-12)
    assert 0 < found[-1] < 1e-8


def test_the_closed_form_is_right_to_float64s_precision():
    mpmath.mp.dps = 40
    schedule = warmup_then_cosine(0.25, 1250, 64000)
    for k in range(0, 64000, 97):
        if k < 1250:
            exact = mpmath.mpf("0.25") + mpmath.mpf("0.75") * k / 1250
        else:
            exact = (1 + mpmath.cos(mpmath.pi * (k - 1250) / 62750)) / 2
        # Three roundings of an argument up to pi, halved by the formula: below 0.6e-15.
        assert abs(schedule(k / 64000) - exact) < 1e-15, k


def test_a_run_that_starts_anew_at_an_iteration_has_that_iterations_rate():
    cfg = get_jigsaw_cfg("jigsaw_R_50.yaml", ["SOLVER.MAX_ITER", "100", "SOLVER.WARMUP_ITERS", "7"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for _ in range(40):
        optimizer.step()
        scheduler.step()
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    resumed = build_lr_scheduler(cfg, other)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    optimizer.step(), scheduler.step(), other.step(), resumed.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("warmup, length", [(0, 10), (10, 10), (1, 1), (1250, 10)])
def test_edges_of_the_schedule(warmup, length):
    values = [warmup_then_cosine(0.25, warmup, length)(k / length) for k in range(length)]
    assert all(0 <= v <= 1 for v in values)
    assert values[0] == (1.0 if warmup == 0 else 0.25)


def test_lengths_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="WARMUP_ITERS is 1250 and SOLVER.MAX_ITER 0"):
        warmup_then_cosine(0.25, 1250, 0)
    cfg = get_jigsaw_cfg("jigsaw_R_50.yaml", ["SOLVER.WARMUP_METHOD", "constant"])
    with pytest.raises(ConfigError, match="WARMUP_METHOD"):
        build_lr_scheduler(cfg, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))


def test_detectron2s_own_schedules_stay_what_they_are():
    cfg = get_jigsaw_cfg(
        "jigsaw_R_50.yaml",
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(8,)"]
        + ["SOLVER.MAX_ITER", "10", "SOLVER.WARMUP_ITERS", "0"],
    )
    assert rates(cfg) == pytest.approx([0.8] * 8 + [0.08] * 2)


LENGTHS = {
    "MAX_ITER": lambda cfg: cfg.SOLVER.MAX_ITER,
    "WARMUP_ITERS": lambda cfg: cfg.SOLVER.WARMUP_ITERS,
    "CHECKPOINT_PERIOD": lambda cfg: cfg.SOLVER.CHECKPOINT_PERIOD,
    "EVAL_PERIOD": lambda cfg: cfg.TEST.EVAL_PERIOD,
    "ERF.PERIOD": lambda cfg: cfg.MODEL.JIGSAW.ERF.PERIOD,
}


@pytest.mark.parametrize("batch", [64, 256, 512, 1024])
def test_batch_scales_rate_linearly_and_lengths_inversely(batch):
    reference = get_jigsaw_cfg("jigsaw_R_50.yaml")
    cfg = scale_to_batch(get_jigsaw_cfg("jigsaw_R_50.yaml", ["SOLVER.IMS_PER_BATCH", str(batch)]))
    assert cfg.SOLVER.BASE_LR == 0.8 * batch / 512
    for name, get in LENGTHS.items():
        assert get(cfg) * batch == get(reference) * 512, name  # as many images as before
    assert cfg.MODEL.JIGSAW.ERF.FIRST_ITER == 0


def test_scaling_happens_once_also_through_a_saved_config(tmp_path):
    once = scale_to_batch(get_jigsaw_cfg("jigsaw_R_50.yaml", ["SOLVER.IMS_PER_BATCH", "64"]))
    assert scale_to_batch(once) == once
    (tmp_path / "config.yaml").write_text(once.dump())
    again = scale_to_batch(get_jigsaw_cfg(str(tmp_path / "config.yaml")))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(once.dump())


def test_reference_of_zero_takes_numbers_as_they_stand():
    options = ["SOLVER.IMS_PER_BATCH", "64", "SOLVER.REFERENCE_BATCH_SIZE", "0"]
    cfg = get_jigsaw_cfg("jigsaw_R_50.yaml", options)
    assert scale_to_batch(cfg) == cfg


def test_what_was_switched_off_stays_off_and_nothing_vanishes():
    options = [
        "SOLVER.IMS_PER_BATCH",
        "51200",
        "TEST.EVAL_PERIOD",
        "0",
        "SOLVER.STEPS",
        "(10, 300)",
    ]
    cfg = scale_to_batch(get_jigsaw_cfg("jigsaw_R_50.yaml", options))
    assert cfg.TEST.EVAL_PERIOD == 0
    assert cfg.SOLVER.STEPS == (1, 3)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="IMS_PER_BATCH is 0"):
        scale_to_batch(get_jigsaw_cfg("jigsaw_R_50.yaml", ["SOLVER.IMS_PER_BATCH", "0"]))
