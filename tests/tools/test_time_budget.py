import pytest

from jigsaw_d2.io import ConfigError
from jigsaw_d2.tools.time_budget import Trial, plan_lengths

TRIAL = Trial(pretrain_step=0.5, erf_refresh=2.0, detection_step=1.0, evaluation=10.0)
LARGE = (10**6 / 64, 10**5 / 8)  # steps in a pass over the samples, and in an epoch


def test_divides_what_is_left():
    # 1000 s - 110 spent - 10 evaluation - 40 start-up - 80 reserve = 760 s; 0.2 of it are 152 s.
    # ERF: a tenth of 152 s pays 7 refreshes of 2 s; (152 - 14) / 0.5 = 276 steps.
    # They leave 760 - 152 = 608 s, 608 detection steps.
    lengths = plan_lengths(1000, 110, TRIAL, *LARGE)
    assert lengths.pretrain_iterations == 276
    assert lengths.detection_iterations == 608
    assert lengths.erf_period == 40  # ceil(276 / 7)
    assert "276 steps" in lengths.explanation and "110 s spent" in lengths.explanation


def test_two_detectors_share_what_pre_training_leaves():
    # 1000 s - 110 spent - 2 evaluations, 20 - three start-ups, 60 - 80 reserve = 730 s; 146 s, of
    # which 7 refreshes: (146 - 14) / 0.5 = 264 steps; 584 s / (2 detectors * 1 s) = 292.
    lengths = plan_lengths(1000, 110, TRIAL, *LARGE, detectors=2)
    assert (lengths.pretrain_iterations, lengths.detection_iterations) == (264, 292)
    assert "for each of 2 detectors" in lengths.explanation


def test_capped_pre_training_leaves_its_time_to_detection():
    # 139 passes over 46 samples at 64 a step: ceil(6394 / 64) = 100 steps, 50 s + 14 s of ERF.
    lengths = plan_lengths(1000, 110, TRIAL, 46 / 64, 10**5 / 8)
    assert lengths.pretrain_iterations == 100
    assert lengths.detection_iterations == 760 - 64


def test_capped_detection_leaves_its_time_to_pre_training():
    # 72 epochs of 11 images at 8 a step: 99 steps; (760 - 99 - 24) / 0.5 = 1274 steps.
    lengths = plan_lengths(1000, 110, TRIAL, 10**6 / 64, 11 / 8)
    assert (lengths.pretrain_iterations, lengths.detection_iterations) == (1274, 99)


def test_both_capped_leaves_time_unused():
    lengths = plan_lengths(10**5, 0, TRIAL, 46 / 64, 11 / 8)
    assert (lengths.pretrain_iterations, lengths.detection_iterations) == (100, 99)


def test_dear_erf_is_refreshed_once_at_least():
    lengths = plan_lengths(1000, 110, Trial(0.5, 100.0, 1.0, 10.0), *LARGE)
    assert lengths.erf_period == lengths.pretrain_iterations == 104  # (152 - 100) / 0.5


def test_too_little_time_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="allow more --hours"):
        plan_lengths(60, 30, TRIAL, *LARGE)
