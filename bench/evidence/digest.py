"""What a task's kept runs say: a point a method and rank with intervals, and LoTR against LoRA and VeRA at each size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..measure.paired import interval
from ..measure.store import RESULTS, Store, latest
from . import sweep
from .intervals import Draws, Interval, too_few, verdict
from .methods import BASE, METHODS, reference
from .packing import unpacked
from .plan import MOST, SEEDS, Place, best_at_end, best_rate, tried_rates
from .tasks import ALL, TASKS, Task

FOLDER = RESULTS / "evidence"  # of all machines: a search that one began another goes on with
OURS = tuple(name for name in METHODS if name.startswith("lotr"))
LORA, VERA = ("lora",), ("vera",)
# one change of a method, at the same rank
PAIRS = (("lotr-gradient", "lotr"), ("lotr-core-gradient", "lotr-core"), ("lotr-magnitude", "lotr"), ("dora", "lora"))
FORMS = ("lotr-width", "lotr-name", "lotr-block", "lotr-diagonal")  # against "lotr", by shape and dense, of no more numbers
DIVERGED = 2.0  # times the untrained model's validation loss: where a run that ends above it is one that diverged
FALLING = 0.05  # of its whole fall, in the last tenth of a run: it has not reached a plateau


class Point(NamedTuple):
    """One method at one rank and its rate. loss, share: with intervals where there are seeds enough; share is None without a
    reference or full fine-tuning, or if full's gain is not above 0. end: the rate is at the end of those tried. falling: the
    part of the training loss's fall in the last tenth of the run. losses: [seeds, items] of held-out items."""

    method: str
    rank: int
    parameters: int
    lr: float
    tried: int
    end: int
    seeds: tuple[int, ...]
    validation: float
    loss: Interval
    share: Interval | None
    accuracy: tuple[float, float | None] | None
    falling: float
    losses: Tensor

    @property
    def label(self) -> str:
        return METHODS[self.method].label

    @property
    def name(self) -> str:
        return name_of(self.method, self.rank)

    @property
    def sized(self) -> str:
        return f"{self.name} ({self.parameters:,} numbers)"


class Digest(NamedTuple):
    """Of one task. unfinished: places whose runs are still missing or diverged, and why. given_up: the rates that the first
    seed chose and another seed diverged at. gain: by how much full fine-tuning lowers the reference's loss; None without one of
    them."""

    task: Task
    cells: list[dict]
    points: list[Point]
    seeds: int
    unfinished: list[str]
    given_up: list[str]
    gain: Interval | None

    @property
    def shares(self) -> bool:
        return all(point.share is not None for point in self.points)

    def of(self, *methods: str) -> list[Point]:
        return [point for point in self.points if point.method in methods]

    def draws(self) -> Draws:
        return Draws(self.seeds, self.points[0].losses.shape[1])


def name_of(method: str, rank: int) -> str:
    return METHODS[method].label + (f", r = {rank}" if rank else "")


def file_of(task: str, sweep: bool = False) -> str:
    return f"{task}{'-sweep' if sweep else ''}.jsonl"


def kept(folder: Path, task: str, sweep: bool = False) -> list[dict]:
    """The last run of each case, of methods that are known. A run that ended far above the untrained model has no loss, as one
    whose loss is not finite."""
    cells = latest([c for c in Store(folder / file_of(task, sweep)).read() if c["rival"] in METHODS and "setting" in c])
    untrained = next((c["validation"] for c in cells if c["rival"] == reference(TASKS[task])), None)
    if untrained is None:
        return cells
    nothing = dict.fromkeys(("validation", "loss", "losses", "accuracy"))
    return [c | nothing if (c["validation"] or 0.0) > DIVERGED * untrained else c for c in cells]


def _own(cells: list[dict], place: Place) -> list[dict]:
    return [cell for cell in cells if (cell["case"]["method"], cell["case"]["rank"]) == place]


def _falling(cell: dict) -> float:
    curve = cell["curve"]
    return (curve[-2] - curve[-1]) / (curve[0] - curve[-1]) if len(curve) > 2 and curve[0] > curve[-1] else 0.0


def _at_rate(cells: list[dict], place: Place) -> list[dict]:
    """A place's runs at the rate that has the most seeds; of two, the one that the search chose."""
    own = _own(cells, place)
    counts, chosen = Counter(cell["case"]["lr"] for cell in own), best_rate(tried_rates(own, place) or {0.0: None})
    lr = max(counts, key=lambda lr: (counts[lr], lr == chosen))
    return sorted((cell for cell in own if cell["case"]["lr"] == lr), key=lambda cell: cell["case"]["seed"])


def unadapted(task: Task, cells: list[dict]) -> dict[int, Tensor]:
    """By seed, the held-out losses [items] of what gains are counted from (`reference`)."""
    place = (reference(task), 0)
    own = [cell for cell in _at_rate(cells, place) if cell["losses"] is not None] if _own(cells, place) else []
    if own and reference(task) == BASE:  # the same for all seeds
        return dict.fromkeys(range(SEEDS), unpacked(own[0]["losses"]))
    return {cell["case"]["seed"]: unpacked(cell["losses"]) for cell in own}


def swept(folder: Path, task: Task) -> list[sweep.Transfer]:
    """What a task's kept sweep says."""
    return sweep.transfers(kept(folder, task.name, True), unadapted(task, kept(folder, task.name)))


def digest(task: Task, cells: list[dict]) -> Digest:
    """Points are compared over the seeds that most of them have. A point without all of these stands under `unfinished`."""
    places = list(dict.fromkeys((cell["case"]["method"], cell["case"]["rank"]) for cell in cells))
    places.sort(key=lambda place: (list(METHODS).index(place[0]), place[1]))
    runs = {place: _at_rate(cells, place) for place in places}
    whole = {p: [c for c in own if c["losses"] is not None] for p, own in runs.items()}
    counts = Counter(tuple(c["case"]["seed"] for c in own) for p, own in whole.items() if p[0] != BASE and own)
    seeds = max(counts, key=lambda s: (counts[s], len(s)), default=(0,))
    unfinished, given_up, points, losses = [], [], [], {}
    for place, own in whole.items():
        name = name_of(*place)
        given_up += [f"{name}: {lr:g} with {bad} of {of} seeds" for lr, bad, of in _given_up(_own(cells, place))]
        have = {c["case"]["seed"]: c for c in own}
        kept = [have[s] for s in seeds if s in have]
        if place[0] == BASE and have:  # the same for all seeds
            kept = [next(iter(have.values()))] * len(seeds)
        if len(kept) < len(seeds):
            diverged = sum(c["losses"] is None for c in runs[place])
            why = f"{diverged} runs diverged" if diverged else f"{len(kept)} of {len(seeds)} seeds"
            unfinished.append(f"{name}: {why}")
        else:
            losses[place] = torch.stack([unpacked(c["losses"]) for c in kept]), kept
    draws = Draws(len(seeds), next(iter(losses.values()))[0].shape[1]) if losses else None
    base, full = ((losses[p][0] if p in losses else None) for p in ((reference(task), 0), ("full", 0)))
    gain = None if base is None or full is None else draws.difference(base, full)
    told = gain is not None and (gain.low is None or gain.low > 0)  # else a share of it would say nothing
    for place, (own, kept) in losses.items():
        tried = tried_rates(cells, place)
        share = draws.share(base, own, full) if told else None
        right = [c["accuracy"] for c in kept if c["accuracy"] is not None]
        points.append(
            Point(
                *place, kept[0]["parameters"], kept[0]["case"]["lr"], len(tried), best_at_end(tried) if len(tried) > 1 else 0,
                seeds, sum(c["validation"] for c in kept) / len(kept), draws.mean(own), share,
                interval(right[:10]) if right else None, _falling(kept[0]), own,
            )
        )  # fmt: skip
    return Digest(task, cells, points, len(seeds), unfinished, given_up, gain)


def _given_up(own: list[dict]) -> Iterator[tuple[float, int, int]]:
    """(rate, runs that diverged, runs) of a place's rates with several seeds."""
    for lr in dict.fromkeys(cell["case"]["lr"] for cell in own):
        ends = [cell["losses"] is None for cell in own if cell["case"]["lr"] == lr]
        if len(ends) > 1 and any(ends):
            yield lr, sum(ends), len(ends)


def digests(folder: Path = FOLDER) -> list[Digest]:
    """Of all tasks that have runs."""
    found = [(task, kept(folder, task.name)) for task in ALL]
    return [digest(task, cells) for task, cells in found if cells]


# ---- LoTR against LoRA and VeRA --------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """LoRA or VeRA at one size, and the LoTR that validation prefers among those that are no larger. difference: LoTR's
    held-out loss less the rival's."""

    task: Task
    rival: Point
    lotr: Point
    difference: Interval
    seeds: int

    @property
    def words(self) -> str:
        return verdict(self.difference, self.lotr.sized, self.rival.sized, self.seeds)


def _no_larger(one: Digest, methods: tuple[str, ...], than: Point) -> Point | None:
    """The point of these methods that validation prefers among those with at most as many numbers."""
    found = [p for p in one.of(*methods) if p.parameters <= than.parameters]
    return min(found, key=lambda p: p.validation, default=None)


def compared(one: Digest) -> list[Comparison]:
    found = []
    for rival in sorted(one.of(*LORA, *VERA), key=lambda p: p.parameters):
        if (lotr := _no_larger(one, OURS, rival)) is not None:
            found.append(Comparison(one.task, rival, lotr, one.draws().difference(lotr.losses, rival.losses), one.seeds))
    return found


def changed(one: Digest) -> list[str]:
    """What a change of a method does, in words: a line each of PAIRS and rank, and of FORMS and rank."""
    if too_few(one.seeds):
        return []
    lines = []
    for new, usual in PAIRS:
        by_rank = {point.rank: point for point in one.of(usual)}
        pairs = [(point, by_rank[point.rank]) for point in one.of(new) if point.rank in by_rank]
        lines += [verdict(one.draws().difference(a.losses, b.losses), a.name, b.name, one.seeds) for a, b in pairs]
    for point in one.of(*FORMS):
        if (lotr := _no_larger(one, ("lotr",), point)) is not None:
            lines.append(verdict(one.draws().difference(point.losses, lotr.losses), point.sized, lotr.sized, one.seeds))
    return lines


def below(one: Digest) -> Point | None:
    """The LoTR that validation prefers among those smaller than every LoRA that was measured."""
    least = min((p.parameters for p in one.of(*LORA)), default=0)
    return min((p for p in one.of(*OURS) if p.parameters < least), key=lambda p: p.validation, default=None)


SIZES = (
    ("as LoRA of rank 1 or 2", "LoRA", LORA, range(1, 3)),
    ("as LoRA of rank 4 or 8", "LoRA", LORA, range(3, 9)),
    ("as larger LoRA", "LoRA", LORA, range(9, 10**6)),
    ("as VeRA", "VeRA", VERA, range(1, 10**6)),
)


class Advice(NamedTuple):
    """A row of the table of what to take. lower, none, higher: of so many comparisons LoTR's loss is that."""

    size: str
    lower: int
    none: int
    higher: int
    take: str


def advice(found: list[Digest]) -> list[Advice]:
    """What to take at which size, from all tasks that have intervals."""
    found = [one for one in found if not too_few(one.seeds)]
    rows = []
    small = [(one, point) for one in found if (point := below(one)) is not None]
    shares = sorted(point.share.value for _, point in small if point.share is not None)
    if small:
        ends = dict.fromkeys(f"{share:.0%}" for share in (shares[0], shares[-1])) if shares else ()
        reach = f" ({' to '.join(ends)} of full fine-tuning's gain)" if shares else ""
        rows.append(Advice("smaller than any LoRA", 0, 0, 0, f"LoTR: LoRA has none as small{reach}"))
    for size, rival, methods, ranks in SIZES:
        own = [c for one in found for c in compared(one) if c.rival.method in methods and c.rival.rank in ranks]
        if not own:
            continue
        lower, higher = ([c for c in own if c.difference.sign == sign] for sign in (-1, 1))
        rows.append(Advice(size, len(lower), len(own) - len(lower) - len(higher), len(higher), _take(rival, lower, higher)))
    return rows


def _take(rival: str, lower: list[Comparison], higher: list[Comparison]) -> str:
    if not lower and not higher:
        return "either: no difference; LoTR trains no more numbers"
    if not higher:
        return "LoTR"
    if not lower:
        return rival
    tasks = {name: dict.fromkeys(c.task.name for c in own) for name, own in (("LoTR", lower), (rival, higher))}
    return "; ".join(f"{name} for {', '.join(own)}" for name, own in tasks.items())


def at_the_end(one: Digest) -> list[str]:
    """Names the points whose best rate is the last one tried, which the search could not widen further."""
    return [
        f"{p.name}: the best rate, {p.lr:g}, is the {'lowest' if p.end < 0 else 'highest'} of {p.tried} tried"
        for p in one.points
        if p.end and p.tried >= MOST
    ]
