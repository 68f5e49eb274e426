"""Which runs come next: learning rates by a search that is the same for every method, then the other seeds at the best rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .methods import BASE, METHODS
from .tasks import TASKS
from .training import Run

SEEDS = 5
MOST = 9  # rates that are tried of a method at most, where the best one is at the end
Place = tuple[str, int]  # method and rank
STEPS = (1, 2, 5)  # of a decade


def rung(index: int) -> float:
    """.., 0.1, 0.2, 0.5, 1, 2, 5, ..: the rates that exist. rung(0) is 1."""
    return float(f"{STEPS[index % 3]}e{index // 3}")


def index_of(lr: float) -> int:
    """Of the rung that is nearest."""
    near = 3 * math.floor(math.log10(lr))
    return min(range(near - 1, near + 5), key=lambda i: abs(math.log(rung(i) / lr)))


def rates_to_try(begins_at: float, tried: dict[float, float | None]) -> list[float]:
    """The rates to try next, by the validation losses of those tried (None: diverged). Three neighbours first; while the best
    of them is the lowest or the highest, the next one beyond it; none: the search is over."""
    middle = index_of(begins_at)
    if missing := [lr for step in (0, -1, 1) if (lr := rung(middle + step)) not in tried]:
        return missing
    end = best_at_end(tried)
    return [rung(index_of(best_rate(tried)) + end)] if end and len(tried) < MOST else []


def best_rate(tried: dict[float, float | None]) -> float:
    """Of the lowest validation loss; where all diverged, the lowest."""
    finite = {lr: loss for lr, loss in tried.items() if loss is not None}
    return min(finite, key=finite.__getitem__) if finite else min(tried)


def best_at_end(tried: dict[float, float | None]) -> int:
    """-1 where the best rate is the lowest of those tried, 1 where it is the highest, 0 where it is between others."""
    best = best_rate(tried)
    return -1 if best == min(tried) else int(best == max(tried))


def tried_rates(cells: Iterable[dict], place: Place) -> dict[float, float | None]:
    """The validation losses of a place's runs with the first seed, by rate; None if a run with any seed diverged."""
    own = [cell for cell in cells if (cell["case"]["method"], cell["case"]["rank"]) == place]
    given_up = {cell["case"]["lr"] for cell in own if cell["validation"] is None}
    first = {cell["case"]["lr"]: cell["validation"] for cell in own if cell["case"]["seed"] == 0}
    return first | dict.fromkeys(given_up & set(first))


class Search:
    """One task's places, and how they are searched. lr: the one rate, instead of a search."""

    def __init__(self, task: str, places: Sequence[Place], seeds: Sequence[int], lr: float | None = None, quick: bool = False):
        self.task, self.places, self.seeds, self.lr, self.quick = task, list(places), list(seeds), lr, quick

    def _first_rates(self, place: Place, cells: list[dict]) -> list[float]:
        """Those to try next with the first seed."""
        tried = tried_rates(cells, place)
        if place[0] == BASE or self.lr is not None or self.quick:
            only = self.rate(place, cells)
            return [] if only in tried else [only]
        return rates_to_try(self._begins_at(place), tried)

    def _begins_at(self, place: Place) -> float:
        return METHODS[place[0]].begins_at(TASKS[self.task].kind)

    def _is_searched(self, place: Place) -> bool:
        """Whether it has runs with the first seed before others."""
        return (self.lr is None and not self.quick) or 0 in self.seeds or place[0] == BASE

    def rate(self, place: Place, cells: list[dict]) -> float:
        """The one that the other seeds are run with."""
        if place[0] == BASE:
            return 0.0
        if self.lr is not None:
            return self.lr
        return self._begins_at(place) if self.quick else best_rate(tried_rates(cells, place))

    def next_runs(self, cells: list[dict]) -> list[Run]:
        """Runs that may go side by side, given those that are kept; none: the task is done. All places finish their search
        before any gets another seed, and all have a seed before any gets the next: what a stopped command has kept is fair."""
        searched = [place for place in self.places if self._is_searched(place)]
        if found := [Run(self.task, *place, lr, 0) for place in searched for lr in self._first_rates(place, cells)]:
            return found
        kept = {tuple(cell["case"].values()) for cell in cells}
        for seed in self.seeds:
            runs = [Run(self.task, *place, self.rate(place, cells), seed) for place in self.places if place[0] != BASE]
            if missing := [run for run in runs if tuple(run) not in kept]:
                return missing
        return []

    def estimate(self, cells: list[dict]) -> int:
        """How many runs are left, if no search goes beyond its next rates."""
        kept, left = {tuple(cell["case"].values()) for cell in cells}, 0
        for place in self.places:
            rates = self._first_rates(place, cells) if self._is_searched(place) else []
            others = [] if place[0] == BASE else [seed for seed in self.seeds if seed or not rates]
            lr = self.rate(place, cells) if not rates else None
            left += len(rates) + sum(lr is None or tuple(Run(self.task, *place, lr, seed)) not in kept for seed in others)
        return left
