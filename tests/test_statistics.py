import math

import pytest

from jigsaw_d2.comparison.statistics import (
    mean_interval,
    paired_difference,
    student_t_cdf,
    student_t_quantile,
)


@pytest.mark.parametrize(
    "degrees, two_sided_95",  # any printed t table
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042)],
)
def test_quantile_equals_the_printed_table(degrees, two_sided_95):
    assert student_t_quantile(0.975, degrees) == pytest.approx(two_sided_95, abs=5e-4)


def test_cdf_closed_forms():
    # One degree is Cauchy's: 1/2 + atan(t)/pi. Two: 1/2 + t / (2 sqrt(2 + t^2)).
    assert student_t_cdf(1.0, 1) == pytest.approx(0.75)
    assert student_t_cdf(3.0, 2) == pytest.approx(0.5 + 3 / (2 * math.sqrt(11)))
    assert student_t_cdf(-1.0, 1) == pytest.approx(0.25)


def test_mean_interval_by_hand():
    # 1, 2, 3: mean 2, s = 1, half width = 4.3027 * 1 / sqrt(3) = 2.4841.
    interval = mean_interval([1, 2, 3])
    assert (interval.mean, interval.count) == (2, 3)
    assert interval.half_width == pytest.approx(2.4841, abs=1e-4)
    assert interval.covers_zero


def test_one_value_has_no_interval_and_none_is_an_error():
    interval = mean_interval([7.0])
    assert (interval.mean, interval.half_width, interval.covers_zero) == (7.0, None, None)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
    with pytest.raises(ValueError, match="quantile"):
        student_t_quantile(0.3, 4)


def test_paired_difference_uses_common_seeds_alone():
    interval = paired_difference(
        {0: 3.0, 1: 4.0, 2: 5.0, 9: 100.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: 0.0}
    )
    assert interval.mean == 2.0 and interval.count == 3 and interval.half_width == 0.0
    assert not interval.covers_zero
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
