"""The soak's verdict rests on these intervals: a leak must lie outside of zero, and noise around a level must not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.soak.slopes import slope

SECONDS = np.arange(240) * 5.0  # 20 minutes


def _wandering(seed: int, stays: float) -> np.ndarray:
    """Noise that resembles its neighbours, of a standard deviation of 1."""
    draw, value, values = np.random.default_rng(seed), 0.0, []
    for each in draw.normal(size=len(SECONDS)):
        value = stays * value + (1 - stays**2) ** 0.5 * each
        values.append(value)
    return np.array(values)


def test_slope_is_that_of_the_line() -> None:
    """Growth is told an hour, and of a line without noise exactly."""
    found = slope(SECONDS, 7 + SECONDS / 3600 * 12)
    assert (found.per_hour, found.low, found.high) == pytest.approx((12, 12, 12))


def test_what_never_changes_has_the_slope_zero() -> None:
    """Counts of descriptors and threads are such series: their interval is zero and nothing else."""
    found = slope(SECONDS, np.full(len(SECONDS), 31))
    assert found.contains_zero
    assert found.low == found.high == 0


def test_interval_of_correlated_noise_contains_zero_about_as_often_as_it_says() -> None:
    """An interval for independent samples would miss zero in two of three such series, and accuse what is level."""
    missed = sum(not slope(SECONDS, _wandering(seed, 0.9)).contains_zero for seed in range(100))
    assert missed <= 15


def test_a_leak_as_large_as_the_noise_is_found() -> None:
    """Growth by four standard deviations in 20 minutes is seen through correlated noise."""
    found = [slope(SECONDS, _wandering(seed, 0.9) + SECONDS / 300) for seed in range(20)]
    assert not any(each.contains_zero for each in found)
    assert all(each.low < 12 < each.high for each in found[:3])


def test_too_few_samples_are_refused() -> None:
    """A verdict from three samples would be none."""
    with pytest.raises(ValueError, match="too few"):
        slope([0, 5, 10], [1, 2, 3])
