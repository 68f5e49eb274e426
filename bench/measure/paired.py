"""Means with an interval: over seeds, and over rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 97.5 %, of 1, 2 .. 9 degrees


def t95(degrees: int) -> float:
    """Student's t at 97.5 %, of 1 to 9 degrees of freedom; of more, that of 9, which is a little too wide."""
    return _T95[min(degrees, len(_T95)) - 1]


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of a few values, and half of its 95 % interval by Student's t; of differences at equal seeds it is the paired
    interval. None for one value, which has none.

    Raises:
        ValueError: no value, or more than 10.
    """
    if not 1 <= len(values) <= len(_T95) + 1:
        raise ValueError(f"values: expected 1 to {len(_T95) + 1}, got {len(values)}")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, t95(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def interval_of_many(values: Sequence[float]) -> tuple[float, float]:
    """The mean of many values, over rows or prompts, and half of its 95 % interval by the normal distribution; NaN for one."""
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), half
