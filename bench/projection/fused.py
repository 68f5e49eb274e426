"""A model of gemm_lotr, the base product with the adapter inside (docs/hopper.md): a model, not a measurement.

Clusters draw tickets in the kernel's own order, the scouts' first; a tile takes its k-steps of 128 x 256 x 64, and cannot end
before the scout of its band has. The time of a k-step is what the library's product would take for it, over the share of the
library's speed that the main loop is assumed to reach (assumptions.py): the result depends mostly on that share, and `may_stay`
is how low it may be before `beta` is faster. ASSUMED has the other assumptions.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from lotr_ext.ops.planner import FUSED_MAX_RANK

from ..measure.bounds import Work
from ..measure.shapes import Shape
from .assumptions import LEVELS, LIKELY, Assumed, Spread
from .cards import CARDS, Card
from .counts import ELEMENT
from .layer import Step, base_step, expand_step, makes_Q
from .layer_time import library_seconds

BM, BK = 128, 64
EPILOGUE = 2.0  # k-steps of a tile that are not hidden: 64 KB leave a multiprocessor at about 64 bytes a clock, the ring fills
FLAG = 0.1  # k-steps: the flag, u, one more turn of the ring
L2_ALL = 6154.0  # bytes a clock that L2 gives to all multiprocessors
SHAPES: list[Shape] = [(8192, 4096, 4096, 16), (8192, 4096, 14336, 16), (16384, 4096, 4096, 64), (2048, 4096, 4096, 16)]
ASSUMED = [
    f"{EPILOGUE:.0f} k-steps of a tile are not hidden: a tile's 64 KB at about 64 bytes a clock, and the ring that fills again",
    f"L2 gives {L2_ALL:.0f} bytes a clock to all multiprocessors (DeepGEMM's heuristic), of which a scout takes its share",
    "dx up to rank 16 makes Q too: its scouts also store partial sums, which are read at the end",
    "beta: its shrink reads x and its expand writes y, two launches, and what of y's read does not hide",
]


@dataclass(frozen=True)
class Tickets:
    """The order of csrc/cuda/kernels/gemm_lotr_traits.cuh, cut as csrc/cuda/plan/gemm_lotr.h does."""

    bands: int
    columns: int
    scouts: int
    band_group: int
    cluster: int
    sums: int = 0  # of Q

    @classmethod
    def planned(cls, m: int, outer: int, r: int, multiprocessors: int, steps_of_Q: int = 0) -> Tickets:
        cluster = 2 if m > BM else 1
        bands, columns, clusters = ceil(m, BM * cluster), ceil(outer, width(r)), multiprocessors // cluster
        scouts, idle = min(bands, clusters // 4), -bands * columns % clusters
        if idle < scouts and bands <= 3 * idle:
            scouts = idle
        return cls(bands, columns, max(1, scouts), 8 // cluster, cluster, ceil(steps_of_Q, cluster))

    def each(self) -> Iterator[list[tuple[int, int]]]:
        """The pieces (band, column) of each ticket; column -1: a scout; -2: the sums of Q of some k-steps."""
        for t in range(self.scouts):
            yield [(band, -1) for band in range(t, self.bands, self.scouts)]
        for start in range(0, self.bands, self.band_group):
            group = range(start, min(start + self.band_group, self.bands))
            yield from ([(band, column)] for column in range(self.columns) for band in group)
        yield from ([(number, -2)] for number in range(self.sums))


@dataclass(frozen=True)
class Fused:
    """One launch: m rows, inner summed over, outer columns. adds: over the library's base product; beta: what that strategy
    adds. waits: k-steps that tiles wait for scouts, of all clusters."""

    m: int
    inner: int
    outer: int
    r: int
    tickets: Tickets
    waves: float
    idle: float
    waits: float
    epilogue: float
    l2_bytes_a_clock: float
    base_seconds: float
    adds: float
    beta: float
    main_loop: float

    @property
    def seconds(self) -> float:
        return self.base_seconds * (1 + self.adds)

    @property
    def may_stay(self) -> float:
        """The share of the library's speed that the kernel must reach to take beta's time."""
        return self.main_loop * (1 + self.adds) / (1 + self.beta)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def width(r: int) -> int:
    """Columns of a tile."""
    return 256 if r <= 64 else 128


def padded(r: int) -> int:
    """The compiled rank that holds r."""
    return next(R for R in (16, 32, 64, 128) if r <= R)


def model(
    m: int,
    inner: int,
    outer: int,
    r: int,
    gpu: str,
    backward: bool = False,
    with_Q: bool | None = None,
    assumed: Assumed = LIKELY,
) -> Fused:
    """Models one launch on a Hopper GPU; with_Q None: the kernel's choice for this rank.

    Raises ValueError for another GPU, or a rank that the kernel does not support.
    """
    card = CARDS[gpu]
    if card.architecture != "90a":
        raise ValueError(f"gpu: expected one of compute capability 9.0 ({', '.join(hopper())}), got {gpu!r}")
    if not 1 <= r <= FUSED_MAX_RANK:
        raise ValueError(f"r: expected 1 to {FUSED_MAX_RANK}, got {r}")
    with_Q = makes_Q(backward, r) if with_Q is None else with_Q
    tickets = Tickets.planned(m, outer, r, card.multiprocessors, ceil(inner, BK) if with_Q else 0)
    workers, steps, tiles = card.multiprocessors // tickets.cluster, ceil(inner, BK), tickets.bands * tickets.columns
    plain, _ = makespan(tickets, workers, steps, 0.0, None)
    base = library_seconds(base_step(m, inner, outer), card, assumed)
    clocks = base / plain * card.clock  # of a k-step
    share = L2_ALL / card.multiprocessors * clocks  # bytes that a multiprocessor has of L2 in a k-step
    sums = 4 * BK * padded(r)  # bytes of Q's sums of a k-step
    scout, last = assumed.scouts * 2 * BK * (BM + padded(r)) / share, 0.0
    if with_Q:  # a band's sums are written, those of the bands after a ticket's first read before; then all once more
        scout += sums * (2 - tickets.scouts / tickets.bands) / share
        last = sums * tickets.cluster * tickets.scouts / share + FLAG
    rank = padded(r) / BK + FLAG
    full, waits = makespan(tickets, workers, steps, rank, scout, last, assumed.main_loop)
    a_step = 2 * BK * (BM + width(r) / tickets.cluster)  # bytes that a multiprocessor fetches for a k-step
    return Fused(
        *(m, inner, outer, r, tickets, tiles / workers, 1 - tiles / workers / ceil(tiles, workers), waits),
        *(
            EPILOGUE / (steps + rank + EPILOGUE),
            card.multiprocessors * a_step / clocks,
            base,
            full / plain - 1 + assumed.fences / base,
        ),
        beta_adds(m, inner, outer, r, card, assumed) / base,
        assumed.main_loop,
    )


def makespan(
    tickets: Tickets, workers: int, steps: int, rank: float, scout: float | None, last: float = 0.0, main_loop: float = 1.0
) -> tuple[float, float]:
    """(k-steps of the library until all is done, those waited); rank: k-steps of the adapter; scout: of a scout's k-step,
    None: none; last: of one of Q's sums; main_loop: of the library's speed."""
    free = [0.0] * workers
    published: dict[int, float] = {}
    waits = end = 0.0
    for pieces in tickets.each():
        if scout is None and pieces[0][1] < 0:
            continue
        now = heapq.heappop(free)
        for band, column in pieces:
            if column == -2:
                now = max(now, *published.values()) + last
            elif column < 0:
                assert scout is not None
                now += steps * scout + 0.5
                published[band] = now
            else:
                ready = now + steps / main_loop
                start = max(ready, published.get(band, 0.0))
                waits += start - ready
                now = start + rank + EPILOGUE
        end = max(end, now)
        heapq.heappush(free, now)
    return end, waits


def beta_adds(m: int, inner: int, outer: int, r: int, card: Card, assumed: Assumed) -> float:
    """Seconds: u = x A reads x, the expand writes y, onto which the base product accumulates."""
    own = [Step("shrink", Work(0, ELEMENT * m * inner)), expand_step(m, outer, r), base_step(m, inner, outer, accumulate=True)]
    total = sum(library_seconds(step, card, assumed) + assumed.launch for step in own) + assumed.fences
    return total - library_seconds(base_step(m, inner, outer), card, assumed) - assumed.launch


def hopper() -> list[str]:
    return [name for name, card in CARDS.items() if card.architecture == "90a"]


HEADS = ("M x K x N, r", "direction", "tiles, waves", "idle", "scouts' tickets", "waits", "epilogue", "L2 to SM, bytes a clock")
HEADS += ("base product", "fused adds, %", "beta adds, %", "must reach, of the library's speed")


def cells(m: int, k: int, n: int, r: int, gpu: str, backward: bool) -> list[str]:
    """A row of HEADS; in brackets under low and high assumptions."""
    inner, outer = (n, k) if backward else (k, n)
    every = [model(m, inner, outer, r, gpu, backward, assumed=assumed) for assumed in LEVELS.values()]
    f, t = every[1], every[1].tickets
    return [
        f"{m} x {k} x {n}, {r}",
        "dx" if backward else "y",
        f"{t.bands * t.columns * t.cluster}, {f.waves:.2f}",
        f"{f.idle:.1%}",
        str(t.scouts),
        f"{f.waits:.0f} k-steps",
        f"{f.epilogue:.1%}",
        f"{f.l2_bytes_a_clock:.0f} of {L2_ALL:.0f}",
        f"{1e6 * f.base_seconds:.0f} us",
        Spread(*(one.adds for one in every)).percent(),
        Spread(*(one.beta for one in every)).percent(),
        f"{f.may_stay:.1%}",
    ]


def rows(shapes: list[Shape], gpu: str) -> list[list[str]]:
    """Both directions of each shape."""
    return [cells(*shape, gpu, backward) for shape in shapes for backward in (False, True)]
