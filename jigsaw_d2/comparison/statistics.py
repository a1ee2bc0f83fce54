"""Means over seeds with their confidence intervals, from Student's t; pure functions.

Few seeds are the rule here, so the intervals are wide, and ought to be: with three seeds the factor
before the standard error is 4.3, with two it is 12.7. A single seed has no interval at all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Mean of ``count`` values and the half width of its confidence interval (None: one value)."""

    mean: float
    half_width: float | None
    count: int

    @property
    def covers_zero(self) -> bool | None:
        """Whether zero lies within the interval; None where there is no interval."""
        return None if self.half_width is None else abs(self.mean) <= self.half_width


def student_t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for ``degrees`` >= 1, by the finite series of Abramowitz and Stegun 26.7.3-4."""
    angle = math.atan(t / math.sqrt(degrees))
    cos2 = math.cos(angle) ** 2
    # Terms: 1, (2/3) cos^2, ... for odd degrees; 1, (1/2) cos^2, (1*3)/(2*4) cos^4, ... for even.
    odd = degrees % 2 == 1
    term, total = 1.0, 0.0
    for k in range((degrees - 1) // 2 if odd else degrees // 2):
        total += term
        term *= cos2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    if odd:
        both_tails = 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
    else:
        both_tails = math.sin(angle) * total
    return 0.5 + both_tails / 2


def student_t_quantile(probability: float, degrees: int) -> float:
    """The t with P(T <= t) = ``probability``, to 1e-9, by bisection.

    Raises:
        ValueError: ``probability`` not within 0.5 .. 1 (exclusive), or fewer than 1 degree.
    """
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(
            f"no t quantile for probability {probability}, {degrees} degrees of freedom"
        )
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        high *= 2
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if student_t_cdf(middle, degrees) < probability else (low, middle)
        )
    return (low + high) / 2


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and half width t * s / sqrt(n), with s the sample deviation (n - 1 in the denominator).

    Raises:
        ValueError: no values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("no values to take the mean of")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    t = student_t_quantile((1 + confidence) / 2, count - 1)
    return Interval(mean, t * math.sqrt(variance / count), count)


def paired_difference(
    ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float = 0.95
) -> Interval | None:
    """Interval of ours - theirs over the seeds (keys) that both have; None if they share none."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    return mean_interval([ours[seed] - theirs[seed] for seed in seeds], confidence)
