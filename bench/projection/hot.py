"""The hot loop of a kernel, found by control flow, and the ways through it that the executor's counts ask for.

The hot loop is the smallest natural loop with asynchronous copies, waits for them, matrix products and stores, as far as the
executor counted any. Its body has branches: edges of the matrix, elements one by one, dropout. Which of them run is decided by
those counts: of all ways from the loop's head back to it, those mixes are kept whose waits, 16-byte copies, matrix
instructions and 16-byte stores are in the counted proportion, and of these the one with the fewest instructions; copies of
factors may be left over, and a few of the others: what is done before the loop and after it. So unrolling does not matter: a
way that does two tiles is taken half as often. A branch over a few instructions that touch no memory is taken to run them,
since the way that is checked against the matrix's edge is the usual one.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .sass import Block, Instruction, blocks_of, loops_of

MATRIX = ("HMMA", "QGMMA", "HGMMA", "IMMA")
SKIPPED = 24  # instructions that a branch may leave out and are counted all the same
OUTSIDE, ELSEWHERE = 200, 2000  # instructions; the cost of a counted copy, or wait, product, store that the loop does not do
MOST_ELSEWHERE = 0.25  # of the waits, products and stores: a small problem is soon over
UNEVEN = 0.02  # what a way costs more for each count that is twice the mean: of equal mixes the even one
KINDS = {
    "copy": ("LDGSTS", "LDGDEPBAR", "DEPBAR", "UTMALDG", "UBLKCP"),
    "matrix": MATRIX,
    "fragment": ("LDSM",),
    "shared": ("LDS", "STS", "STSM"),
    "global": ("LDG", "STG", "LD", "ST", "ATOMG", "RED"),
    "constant": ("LDC", "ULDC", "S2R", "S2UR", "CS2R", "LDCU"),
    "float": ("FADD", "FFMA", "FMUL", "F2FP", "FADD2", "FFMA2", "HADD2", "HFMA2", "HMUL2", "FSEL", "PRMT"),
    "control": ("BRA", "BRX", "CALL", "BSSY", "BSYNC", "BAR", "WARPSYNC", "WARPGROUP", "SYNCS", "NOP", "YIELD"),
}
_KIND = {name: kind for kind, names in KINDS.items() for name in names}


def kind_of(instruction: Instruction) -> str:
    """The instruction's kind in KINDS; the last one computes addresses and bounds."""
    return _KIND.get(instruction.name, "address")


@dataclass(frozen=True)
class Wanted:
    """Warp instructions in the whole kernel, as counted by the executor; None: ignored."""

    waits: float | None  # for asynchronous copies
    copies: float | None  # asynchronous, of 16 bytes a lane
    matrix: float | None
    stores: float | None  # of 16 bytes a lane
    least_copies: float = 0  # of copies, those of the large matrix, which the loop must do
    narrow: bool = False  # whether it read or wrote global memory in smaller pieces, too

    def pick(self, values: tuple) -> tuple:
        """The values for waits, copies, matrix and stores that are not ignored."""
        looked_at = (self.waits, self.copies, self.matrix, self.stores)
        return tuple(value for value, asked in zip(values, looked_at) if asked is not None)

    def vector(self) -> tuple[float, ...]:
        return self.pick((self.waits, self.copies, self.matrix, self.stores))

    def most(self) -> tuple[float, ...]:
        """That one way through the loop may have: of twice the mean tile, thrice unrolled."""
        vector = self.vector()
        if len(vector) == 1:  # no proportion to match
            return vector
        return tuple(6 * v / (self.waits or min(vector)) + 1 for v in vector)

    def of(self, code: Iterable[Instruction]) -> tuple[int, ...]:
        """The number of instructions of each kind in some code."""
        found = Counter(_counted(i) for i in code)
        return self.pick((found["wait"], found["copy"], found["matrix"], found["store"]))


def _counted(instruction: Instruction) -> str:
    name = instruction.name
    if name == "DEPBAR":
        return "wait"
    if name == "LDGSTS" and instruction.width == 16 and not instruction.never:
        return "copy"
    if name == "STG" and instruction.width == 16:
        return "store"
    return "matrix" if name in MATRIX else ""


def _is_narrow(instruction: Instruction) -> bool:
    """Whether it is a lane's access to global memory of less than 8 bytes."""
    return instruction.name in ("LDG", "STG", "LD", "ST") and instruction.width < 8


@dataclass(frozen=True)
class Hot:
    """The hot loop's ways and how often all warps take each, so that together they move what was counted."""

    ways: list[tuple[float, tuple[Instruction, ...]]]

    @property
    def instructions(self) -> float:
        """The number of instructions of all warps."""
        return sum(times * len(way) for times, way in self.ways)

    @property
    def iterations(self) -> float:
        return sum(times for times, _ in self.ways)

    def kinds(self) -> dict[str, float]:
        """Instructions of all warps by kind."""
        found: Counter[str] = Counter()
        for times, way in self.ways:
            for instruction in way:
                found[kind_of(instruction)] += times
        return dict(found)

    def trace(self, iterations: int) -> list[tuple[Instruction, ...]]:
        """That many ways one after another, each as often as its share, evenly spread."""
        owed = [0.0] * len(self.ways)
        found = []
        for _ in range(iterations):
            for i, (times, _way) in enumerate(self.ways):
                owed[i] += times / self.iterations
            most = max(range(len(owed)), key=owed.__getitem__)
            owed[most] -= 1
            found.append(self.ways[most][1])
        return found


def hot_loop(code: list[Instruction], wanted: Wanted) -> Hot:
    """The hot loop of a kernel. Raises ValueError if no loop can match the counts."""
    blocks = blocks_of(code)
    best: Hot | None = None
    loops = loops_of(blocks)
    for head, body in loops.items():
        own = [wanted.of(blocks[b].code) for b in body]
        if not all(any(counts[i] for counts in own) for i in range(len(wanted.vector()))):
            continue
        if any(other < body and _holds(other, blocks, wanted) for other in loops.values()):
            continue  # an inner loop suffices
        found = ways(head, body, blocks, wanted)
        known = [(vector, tuple(i for b in path for i in blocks[b].code)) for vector, path in found]
        mix = _cheapest(known, wanted)
        if mix is not None and (best is None or mix.instructions < best.instructions):
            best = mix
    if best is None:
        raise ValueError(f"hot loop: expected one with {wanted}, found none among {len(loops)} loops")
    return best


def _holds(body: set[int], blocks: dict[int, Block], wanted: Wanted) -> bool:
    own = [wanted.of(blocks[b].code) for b in body]
    return all(any(counts[i] for counts in own) for i in range(len(wanted.vector())))


def _followers(start: int, blocks: dict[int, Block]) -> tuple[int, ...]:
    """A block's successors, without a jump over a little arithmetic."""
    block = blocks[start]
    if len(block.next) == 2 and block.next[1] > block.next[0] and block.code[-1].name != "BRX":
        between = [b for a, b in blocks.items() if block.next[0] <= a < block.next[1]]
        skipped = [i for b in between for i in b.code]
        if len(skipped) <= SKIPPED and all(kind_of(i) in ("address", "constant", "float") for i in skipped):
            return block.next[:1]
    return block.next


class Limits(Protocol):
    """What `ways` asks of Wanted: how much some code has of what is counted, and the most that one way may have."""

    narrow: bool

    def of(self, code: Iterable[Instruction]) -> tuple[int, ...]: ...

    def most(self) -> tuple[float, ...]: ...


def ways(
    head: int, body: set[int], blocks: dict[int, Block], wanted: Limits
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each vector of counts that a way from the head back to it can have: that, and the shortest such way's blocks."""
    passable = {b for b in body if wanted.narrow or not any(_is_narrow(i) for i in blocks[b].code)}
    followers = {b: [f for f in _followers(b, blocks) if f in passable] for b in body}
    counts = {b: wanted.of(blocks[b].code) for b in body}
    most = wanted.most()
    start = (head, counts[head])
    queue: list[tuple[int, int, tuple[int, tuple[int, ...]], tuple | None]] = [(len(blocks[head].code), 0, start, None)]
    order = itertools.count(1)
    done: dict[tuple[int, tuple[int, ...]], tuple | None] = {}
    closed: set[tuple[int, ...]] = set()
    while queue:
        cost, _, state, before = heapq.heappop(queue)
        if state in done:
            continue
        done[state] = before
        at, vector = state
        for follow in followers[at]:
            if follow == head:
                if vector not in closed:
                    closed.add(vector)
                    yield vector, _path(done, state)
                continue
            total = tuple(a + b for a, b in zip(vector, counts[follow]))
            if all(t <= limit for t, limit in zip(total, most)) and (follow, total) not in done:
                heapq.heappush(queue, (cost + len(blocks[follow].code), next(order), (follow, total), state))


def _path(done: dict, state: tuple) -> tuple[int, ...]:
    path = []
    while state is not None:
        path.append(state[0])
        state = done[state]
    return tuple(reversed(path))


def _cheapest(ways: list[tuple[tuple[int, ...], tuple[Instruction, ...]]], wanted: Wanted) -> Hot | None:
    """The mix of ways with these counts and the fewest instructions, by the revised simplex method; None: there is none."""
    target = np.array(wanted.vector())
    size = len(target)
    mean = target / target[0]
    uneven = [1 + UNEVEN * float(np.abs(np.array(v) / mean / (v[0] or 1) - 1).sum()) for v, _ in ways]
    left_over = wanted.pick((ELSEWHERE, OUTSIDE, ELSEWHERE, ELSEWHERE))
    most_left_over = np.array(wanted.pick((MOST_ELSEWHERE, 1.0, MOST_ELSEWHERE, MOST_ELSEWHERE))) * target
    columns = np.array([vector for vector, _ in ways] + np.eye(size).tolist(), float).T  # at last: what no way does
    costs = np.array([len(way) * more for (_, way), more in zip(ways, uneven)] + list(left_over))
    basis = list(range(len(ways), len(ways) + size))
    for _ in range(1000):
        inverse = np.linalg.inv(columns[:, basis])
        times = inverse @ target
        gain = costs - costs[basis] @ inverse @ columns
        enters = int(gain.argmin())
        if gain[enters] > -1e-6:
            break
        direction = inverse @ columns[:, enters]
        ratios = np.where(direction > 1e-9, times / np.where(direction > 1e-9, direction, 1), np.inf)
        basis[int(ratios.argmin())] = enters
    used = [(float(t), b) for t, b in zip(times, basis) if t > 1e-6 * target.max()]
    ours = [(t, ways[b][1]) for t, b in used if b < len(ways)]
    copies = sum(t * sum(_counted(i) == "copy" for i in way) for t, way in ours)
    too_much = any(b >= len(ways) and t > most_left_over[b - len(ways)] for t, b in used)
    if not ours or too_much or copies < wanted.least_copies * (1 - 1e-6):
        return None
    return Hot(ours)
