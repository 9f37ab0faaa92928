"""How fast a sampled quantity grows, with an interval that allows for samples that resemble their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 4000
BLOCK_S = 120.0  # residuals are drawn anew in stretches of this length: memory stays for a while where it is
LEVEL = 0.95
ROUNDED = 9  # digits: what never changes has the slope zero, and no error of the computation

Series = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Slope:
    """Growth an hour, and the interval that holds the true one with a probability of ``LEVEL``."""

    per_hour: float
    low: float
    high: float

    @property
    def contains_zero(self) -> bool:
        return self.low <= 0 <= self.high


def slope(seconds: npt.ArrayLike, values: npt.ArrayLike, block_s: float = BLOCK_S) -> Slope:
    """Least squares, with a moving block bootstrap of the residuals (Kuensch 1989): blocks of neighbours, ``block_s``
    long, are put back on the line until it is full.

    Raises:
        ValueError: fewer than four samples.
    """
    at, what = np.asarray(seconds, dtype=np.float64), np.asarray(values, dtype=np.float64)
    count = len(at)
    if count < 4:
        raise ValueError(f"{count} samples are too few for a slope")
    hours = (at - at.mean()) / 3600
    weights = hours / (hours @ hours)
    fitted = weights @ what
    residuals = what - what.mean() - fitted * hours
    step = max((at[-1] - at[0]) / (count - 1), 1e-9)
    length = int(min(max(round(block_s / step), 1), count // 2))
    drawn = _resampled(residuals - residuals.mean(), length)
    low, high = np.quantile(drawn @ weights, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Slope(*(round(float(each), ROUNDED) for each in (fitted, fitted - high, fitted - low)))


def _resampled(residuals: Series, length: int) -> Series:
    """Rows of residuals made of whole blocks, centred so that blocks at the ends count as much as others."""
    count = len(residuals)
    blocks = -(-count // length)
    starts = np.random.default_rng(0).integers(0, count - length + 1, (RESAMPLES, blocks))
    rows = residuals[(starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :count]]
    expected = np.array([residuals[i : count - length + 1 + i].mean() for i in range(length)])
    return rows - np.tile(expected, blocks)[:count]
