"""How sure a figure is: 95% intervals by bootstrap over rows.

B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (the percentile interval): draw as many
rows as there are, with replacement, and take the statistic of them; the interval holds the middle 95% of what many such
draws give. It is too narrow for few rows, and has no width where all rows are alike.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]
"""Indices of rows [..., rows]; a row that was drawn twice stands there twice."""

Statistic = Callable[[Rows], Any]
"""A figure of the rows at some indices: one number for each draw of them [...]."""

PERCENTILES = (2.5, 97.5)
CHUNK = 2**22
"""Indices that are looked up at once: bounds what a statistic copies to some 32 MiB."""


class Interval(NamedTuple):
    """A figure with its 95% interval, in the figure's own unit."""

    value: float
    low: float
    high: float


def mean_of(values: Sequence[float] | NDArray[np.floating]) -> Statistic:
    """The mean of one value a row."""
    of_row = np.asarray(values, dtype=np.float64)
    return lambda rows: of_row[rows].mean(-1)


def bootstrap_interval(statistic: Statistic, rows: int, *, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """Low and high end of the statistic's 95% percentile interval; the same seed draws the same rows."""
    if rows < 1:
        raise ValueError("an interval needs at least one row")
    draw = np.random.default_rng(seed)
    at_once = max(1, CHUNK // rows)
    figures = [
        statistic(np.stack([draw.integers(rows, size=rows) for _ in range(min(at_once, resamples - done))]))
        for done in range(0, resamples, at_once)
    ]
    low, high = np.percentile(np.concatenate(figures), PERCENTILES)
    return float(low), float(high)


def interval(statistic: Statistic, rows: int, *, seed: int, resamples: int = 1000) -> Interval:
    """The statistic of all rows, with its interval."""
    low, high = bootstrap_interval(statistic, rows, seed=seed, resamples=resamples)
    return Interval(float(statistic(np.arange(rows))), low, high)


def change_interval(
    statistic: Statistic, reference: Statistic, rows: int, *, seed: int, resamples: int = 1000
) -> Interval:
    """The statistic minus the reference's, paired: both are taken of the same drawn rows."""
    return interval(lambda drawn: statistic(drawn) - reference(drawn), rows, seed=seed, resamples=resamples)
