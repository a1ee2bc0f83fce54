import pytest

from jigsaw_d2.io import ConfigError
from jigsaw_d2.tools.time_budget import Trial, plan_lengths

TRIAL = Trial(pretrain_step=0.5, erf_refresh=2.0, detection_step=1.0, evaluation=10.0)
LARGE = (10**6 / 64, 10**5 / 8)  # steps in a pass over the samples, and in an epoch


def test_divides_what_is_left_as_the_paper_does():
    # 1000 s - 110 spent - 10 evaluation - 40 start-up - 80 reserve = 760 s; 0.3 of it are 228 s.
    # ERF: a tenth of 228 s pays 11 refreshes of 2 s; (228 - 22) / 0.5 = 412 steps.
    # 412 steps leave 760 - 228 = 532 s, 532 detection steps.
    lengths = plan_lengths(1000, 110, TRIAL, *LARGE)
    assert lengths.pretrain_iterations == 412
    assert lengths.detection_iterations == 532
    assert lengths.erf_period == 38  # ceil(412 / 11)
    assert "412 steps" in lengths.explanation and "110 s spent" in lengths.explanation


def test_two_detectors_share_what_pre_training_leaves():
    # 1000 s - 110 spent - 2 evaluations, 20 - three start-ups, 60 - 80 reserve = 730 s; 219 s, of
    # which 10 refreshes: (219 - 20) / 0.5 = 398 steps; 511 s / (2 detectors * 1 s) = 255.
    lengths = plan_lengths(1000, 110, TRIAL, *LARGE, detectors=2)
    assert (lengths.pretrain_iterations, lengths.detection_iterations) == (398, 255)
    assert "for each of 2 detectors" in lengths.explanation


def test_capped_pre_training_leaves_its_time_to_detection():
    # 139 passes over 46 samples at 64 a step: ceil(6394 / 64) = 100 steps, 50 s + 22 s of ERF.
    lengths = plan_lengths(1000, 110, TRIAL, 46 / 64, 10**5 / 8)
    assert lengths.pretrain_iterations == 100
    assert lengths.detection_iterations == 760 - 72


def test_capped_detection_leaves_its_time_to_pre_training():
    # 72 epochs of 11 images at 8 a step: 99 steps; (760 - 99 - 24) / 0.5 = 1274 steps.
    lengths = plan_lengths(1000, 110, TRIAL, 10**6 / 64, 11 / 8)
    assert (lengths.pretrain_iterations, lengths.detection_iterations) == (1274, 99)


def test_both_capped_leaves_time_unused():
    lengths = plan_lengths(10**5, 0, TRIAL, 46 / 64, 11 / 8)
    assert (lengths.pretrain_iterations, lengths.detection_iterations) == (100, 99)


def test_dear_erf_is_refreshed_once_at_least():
    lengths = plan_lengths(1000, 110, Trial(0.5, 100.0, 1.0, 10.0), *LARGE)
    assert lengths.erf_period == lengths.pretrain_iterations == 256  # (228 - 100) / 0.5


def test_too_little_time_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="allow more --hours"):
        plan_lengths(60, 30, TRIAL, *LARGE)
