"""Paired bootstrap intervals over seeds and held-out items.

Two methods are compared on the same items and the same orders of the training data. A draw takes items and seeds with
replacement, the same ones for all methods, and the interval holds the middle 95 % of the draws' values. A mean of n drawn seeds
spreads too little where n is a handful: its distance from the mean of all is widened by t / 1.96 sqrt(n / (n - 1)), which
makes the interval Student's where seeds alone matter. Hesterberg (2015, arXiv 1411.5279) widens percentiles to the same end.
Items are many and need none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from ..measure.paired import t95

LEAST_SEEDS = 3  # two seeds have an interval five times as wide, which would say nothing
DRAWS = 4000


class Interval(NamedTuple):
    """A value and its 95 % interval; low and high are None where there are too few seeds for one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0; 0: none, or no interval."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def text(self, form: str = ".4f") -> str:
        if self.low is None:
            return f"{self.value:{form}}"
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


def widening(seeds: int) -> float:
    """By how much the deviation of a mean of drawn seeds is widened."""
    return t95(seeds - 1) / NormalDist().inv_cdf(0.975) * math.sqrt(seeds / (seeds - 1))


@functools.lru_cache(maxsize=4)
class Draws:
    """The same draws of seeds and items for all methods of a task, made once for each number of both."""

    def __init__(self, seeds: int, items: int):
        self.seeds = seeds
        generator = torch.Generator().manual_seed(0)
        self._seeds = torch.randint(seeds, (DRAWS, seeds), generator=generator)
        ones, drawn = torch.ones(DRAWS, items).double(), torch.randint(items, (DRAWS, items), generator=generator)
        self._items = torch.zeros(DRAWS, items).double().scatter_add_(1, drawn, ones) / items

    def means(self, losses: Tensor) -> Tensor:
        """[draws] of losses [seeds, items], the seeds in the same order for all methods."""
        by_seed = losses.mean(1)
        deviation = by_seed[self._seeds].mean(1) - by_seed.mean()
        return self._items @ losses.mean(0) + widening(self.seeds) * deviation

    def interval(self, value: Callable[..., Tensor], *losses: Tensor) -> Interval:
        """Of a function of mean losses, of one or more methods."""
        point = value(*(one.mean() for one in losses)).item()
        if self.seeds < LEAST_SEEDS:
            return Interval(point)
        drawn = value(*(self.means(one) for one in losses))
        return Interval(point, *torch.quantile(drawn, torch.tensor([0.025, 0.975]).double()).tolist())

    def mean(self, losses: Tensor) -> Interval:
        return self.interval(lambda m: m, losses)

    def difference(self, one: Tensor, other: Tensor) -> Interval:
        """How much higher one's loss is than other's."""
        return self.interval(lambda a, b: a - b, one, other)

    def share(self, base: Tensor, method: Tensor, full: Tensor) -> Interval:
        """The part of full fine-tuning's gain that a method has: (base - method) / (base - full)."""
        return self.interval(lambda b, m, f: (b - m) / (b - f), base, method, full)


def too_few(seeds: int) -> str:
    """Why there is no interval; "" where there is one."""
    if seeds >= LEAST_SEEDS:
        return ""
    return f"too few seeds for an interval: {seeds}; give --seeds {LEAST_SEEDS} or more"


def verdict(difference: Interval, one: str, other: str, seeds: int) -> str:
    """Which of two has the lower loss, in words. difference: one's loss less other's."""
    if lacking := too_few(seeds):
        return f"{one} against {other}: {lacking}"
    if not difference.sign:
        return f"no difference between {one} and {other} ({difference.text()})"
    lower, higher = (one, other) if difference.sign < 0 else (other, one)
    ends = sorted(abs(end) for end in (difference.low, difference.high))
    return f"{lower} is lower than {higher} by {abs(difference.value):.4f} ({ends[0]:.4f} to {ends[1]:.4f})"
