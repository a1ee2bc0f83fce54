"""Training lengths for a number of hours: measure a few steps of each training, then divide.

The rule, in the order in which it is applied:

1. from the budget go what was spent already, one evaluation, start-ups, and a reserve;
2. of the rest, pre-training has a share of 0.2, which of 0.2 to 0.5 was best where it was measured
   (projects/JigsawPretrain/results; Table 5 has 0.3), fine-tuning (of both detectors, if there are
   two) what is left;
3. neither gets more passes over its data than the caps below, and what one leaves the other takes;
4. the ERF is refreshed as often as in the paper (64k iterations / 5k), or as often as a tenth of
   the pre-training's time allows, but at least once.
"""

import math
from dataclasses import dataclass

from jigsaw_d2.io import ConfigError

# Digest of Sec. 4.1: 64k iterations x 2,048 samples over COCO's about 946k are 139 passes.
MAX_SAMPLE_PASSES = 139
MAX_DETECTION_EPOCHS = 72  # Fig. 8's longest, the "6x" schedule
PRETRAIN_SHARE = 0.2
RESERVE = 0.08  # of the budget, for what no trial shows: checkpoints, a busy machine
START_UP_SECONDS = 20.0  # of each training's process
ERF_REFRESHES = 12
ERF_SHARE = 0.1


@dataclass(frozen=True)
class Trial:
    """Wall-clock seconds: a step of each training, an ERF refresh, an evaluation."""

    pretrain_step: float
    erf_refresh: float
    detection_step: float
    evaluation: float


@dataclass(frozen=True)
class Lengths:
    """Optimiser steps of both trainings and between two ERF refreshes, and how they came about."""

    pretrain_iterations: int
    detection_iterations: int
    erf_period: int
    explanation: str


def plan_lengths(
    seconds: float, spent: float, trial: Trial, sample_pass: float, epoch: float, detectors: int = 1
) -> Lengths:
    """Lengths that fill ``seconds`` of wall-clock time, of which ``spent`` are gone.

    Args:
        sample_pass, epoch: steps in a pass over the samples, and over the detection set.
        detectors: how many are fine-tuned, one after another, each for the length returned.

    Raises:
        ConfigError: nothing is left, or not enough for one step of each training.
    """
    fixed = detectors * trial.evaluation + (1 + detectors) * START_UP_SECONDS + RESERVE * seconds
    left = seconds - spent - fixed
    detection_step = detectors * trial.detection_step
    detection_cap = math.ceil(MAX_DETECTION_EPOCHS * epoch)
    pretrain, refreshes = _pretrain_steps(PRETRAIN_SHARE * left, trial, sample_pass)
    paid = pretrain * trial.pretrain_step + refreshes * trial.erf_refresh
    detection = min(detection_cap, int((left - paid) / detection_step))
    if detection == detection_cap:
        pretrain, refreshes = _pretrain_steps(left - detection * detection_step, trial, sample_pass)
    if pretrain < 1 or detection < 1:
        raise ConfigError(
            f"{seconds / 3600:.2f} hours leave {left:.0f} s for training, where one step takes "
            f"{trial.pretrain_step:.2f} and {detection_step:.2f} s; allow more --hours"
        )
    period = math.ceil(pretrain / refreshes)
    explanation = (
        f"budget {seconds:.0f} s: {spent:.0f} s spent on extraction and trial steps, {fixed:.0f} s "
        f"kept for evaluation, start-up and reserve, {left:.0f} s to train, "
        f"{PRETRAIN_SHARE:.0%} of them for pre-training; "
        f"pre-training: {pretrain} steps at {trial.pretrain_step:.3f} s "
        f"({pretrain / sample_pass:.1f} passes over the samples, at most {MAX_SAMPLE_PASSES}), "
        f"ERF refreshed every {period} steps; fine-tuning: {detection} steps at "
        f"{trial.detection_step:.3f} s ({detection / epoch:.1f} epochs, at most "
        f"{MAX_DETECTION_EPOCHS})"
    )
    if detectors > 1:
        explanation += f", for each of {detectors} detectors"
    return Lengths(pretrain, detection, period, explanation)


def _pretrain_steps(seconds: float, trial: Trial, sample_pass: float) -> tuple[int, int]:
    """Steps of pre-training, and ERF refreshes, that fit."""
    affordable = ERF_SHARE * seconds / trial.erf_refresh if trial.erf_refresh else ERF_REFRESHES
    refreshes = max(1, min(ERF_REFRESHES, int(affordable)))
    steps = int((seconds - refreshes * trial.erf_refresh) / trial.pretrain_step)
    return min(steps, math.ceil(MAX_SAMPLE_PASSES * sample_pass)), refreshes
