"""Barriers of warps, blocks and clusters, and mbarriers (PTX manual, "Parallel Synchronization and Communication")."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxError
from .memory import access_of
from .parse import Instruction
from .program import LANES, MEMBERS, WARP, Lanes, Mask, Program, Run, Signal, operation, put
from .warp import Warp

if TYPE_CHECKING:
    from .grid import Block

_MOST = 2**20 - 1  # arrivals or bytes that an mbarrier can count


@dataclass
class NamedBarrier:
    """A barrier of a block.

    Attributes:
        warps: that have arrived in this phase.
        expected: threads in this phase; 0: all that have not ended.
        phase: how often it has completed.
        votes: the predicates of bar.red in this phase.
        results: the predicates of each phase that has ended.
    """

    warps: set[int] = field(default_factory=set)
    expected: int = 0
    phase: int = 0
    votes: list[bool] = field(default_factory=list)
    results: dict[int, list[bool]] = field(default_factory=dict)

    def complete(self, block: Block) -> None:
        """Ends the phase if all threads have arrived."""
        expected = self.expected or LANES * sum(not w.done for w in block.warps)
        if 0 < expected <= LANES * len(self.warps):
            self.results[self.phase] = self.votes
            self.warps, self.expected, self.phase, self.votes = set(), 0, self.phase + 1, []
            block.grid.events += 1


@operation("bar", forms=r"warp\.sync", together=MEMBERS)
@operation("setmaxnreg", forms=r"(inc|dec)\.sync\.aligned\.u32", together=WARP)
def _nothing(program: Program, i: Instruction) -> Run:
    """The warp has waited for its threads."""
    return lambda w, m: None


@operation("bar", forms="sync|arrive", together=WARP)
def _barrier(program: Program, i: Instruction) -> Run:
    waits, slots = i.has("sync"), [program.slot(o, 4) for o in i.operands]
    if not waits and len(slots) < 2:
        raise PtxError("expected a number of threads")

    def run(w: Warp, m: Mask) -> Signal:
        barrier, phase = _arrive_at(w, m, slots, i, [])
        return (lambda: barrier.phase > phase) if waits else None

    return run


@operation("bar", forms=r"red\.(and|or)\.pred", together=WARP)
def _reduce(program: Program, i: Instruction) -> Run:
    """Whether the predicate holds in all threads (.and) or in any (.or)."""
    d, holds = program.target(i.operands[0], 0), program.predicate(i.operands[-1])
    slots = [program.slot(o, 4) for o in i.operands[1:-1]]
    reduced = all if i.has("and") else any

    def run(w: Warp, m: Mask) -> Signal:
        votes = holds(w) if m is None else holds(w)[m]
        barrier, phase = _arrive_at(w, m, slots, i, votes.tolist())

        def ready() -> bool:
            if barrier.phase > phase:
                put(w, d, np.full(LANES, reduced(barrier.results[phase])), m)
                return True
            return False

        return ready

    return run


def _arrive_at(w: Warp, m: Mask, slots: list[int], i: Instruction, votes: list[bool]) -> tuple[NamedBarrier, int]:
    """One warp more. Returns the barrier and the phase in which the warp arrived."""
    name = w.uniform(slots[0], m, i.text)
    count = w.uniform(slots[1], m, i.text) if len(slots) > 1 else 0
    if name > 15 or count % LANES or count > w.block.threads or (len(slots) > 1 and not count):
        raise PtxError(f"expected barrier 0 to 15 and whole warps of the block, got {name} and {count}")
    barrier = w.block.barriers.setdefault(name, NamedBarrier())
    if barrier.warps and barrier.expected != count:
        raise PtxError(f"barrier {name}: expected {barrier.expected} threads as the warps before (0: all), got {count}")
    if w.index in barrier.warps:
        raise PtxError(f"barrier {name}: expected each warp once before it completes, got warp {w.index} again")
    phase, barrier.expected = barrier.phase, count
    barrier.warps.add(w.index)
    barrier.votes += votes
    barrier.complete(w.block)
    return barrier, phase


@operation("barrier", forms=r"cluster\.(arrive(\.release|\.relaxed)?|wait(\.acquire)?)\.aligned", together=WARP)
@operation("barrier", forms=r"cluster\.(arrive(\.release|\.relaxed)?|wait(\.acquire)?)")
def _cluster_barrier(program: Program, i: Instruction) -> Run:
    return _cluster_arrive if i.has("arrive") else _cluster_wait


def _cluster_arrive(w: Warp, m: Mask) -> None:
    threads = w.live if m is None else m
    if (w.cluster_arrivals != w.cluster_waits)[threads].any():
        raise PtxError("expected barrier.cluster.wait between two arrivals")
    w.cluster_arrivals += threads
    w.block.cluster.complete()


def _cluster_wait(w: Warp, m: Mask) -> Signal:
    threads = w.live if m is None else m
    if (w.cluster_arrivals == w.cluster_waits)[threads].any():
        raise PtxError("expected barrier.cluster.arrive before the wait")
    w.cluster_waits += threads
    cluster, until = w.block.cluster, int(w.cluster_arrivals[threads].max())
    return lambda: cluster.phase >= until


@dataclass
class Mbarrier:
    """An mbarrier object (PTX manual, "Contents of the mbarrier object").

    Attributes:
        expected: arrivals in each phase.
        pending: arrivals that this phase still needs.
        bytes: the tx-count; below zero if bytes have come before they were expected.
        by: the warp that initialised it.
        shown: whether that warp has then executed fence.mbarrier_init or fence.proxy.async: bulk copies and other blocks of the
            cluster need it.
        phase: how many phases have ended.
    """

    expected: int
    pending: int
    by: int
    shown: bool = False
    bytes: int = 0
    phase: int = 0

    def expect_shown(self) -> None:
        if not self.shown:
            raise PtxError("mbarrier: expected fence.mbarrier_init after it was initialised")

    def add_bytes(self, count: int) -> None:
        self.bytes += count
        if abs(self.bytes) > _MOST:
            raise PtxError(f"mbarrier: expected a tx-count of at most {_MOST}, got {self.bytes}")

    def arrive(self, block: Block, count: int) -> None:
        if not 1 <= count <= self.pending:
            raise PtxError(f"mbarrier: expected 1 to {self.pending} arrivals in this phase, got {count}")
        self.pending -= count
        self.complete(block)

    def complete(self, block: Block) -> None:
        """Ends the phase if no arrival and no byte is pending."""
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.expected, self.phase + 1
            block.grid.events += 1


def mbarrier_at(block: Block, address: int) -> Mbarrier:
    if address not in block.mbarriers:
        raise PtxError(f"mbarrier: expected one that is initialised at {address:#x} of {block.name}")
    return block.mbarriers[address]


def complete_bytes(block: Block, address: int, count: int) -> None:
    """A bulk copy has brought `count` bytes."""
    barrier = mbarrier_at(block, address)
    barrier.expect_shown()
    barrier.add_bytes(-count)
    barrier.complete(block)


def _places(w: Warp, m: Mask, i: Instruction, addresses: Lanes) -> list[tuple[int, Block, int]]:
    """(lane, block, address in its shared memory) of each active thread."""
    lanes = np.arange(LANES) if m is None else np.flatnonzero(m)
    found = []
    for memory, at, some in access_of(i)(w, addresses[lanes]):
        block = next(b for b in w.block.cluster.blocks if b.shared is memory)
        found += [(int(lane), block, int(a)) for lane, a in zip(lanes[some], at, strict=True)]
    return sorted(found, key=lambda place: place[0])


@operation("mbarrier", forms=r"init\.shared::cta\.b64")
def _init(program: Program, i: Instruction) -> Run:
    address, number = program.address(i.operands[0]), program.slot(i.operands[1], 4)

    def run(w: Warp, m: Mask) -> None:
        for lane, block, at in _places(w, m, i, address(w)):
            count = int(w.registers[number][lane])
            if at % 8 or at + 8 > block.shared.end or not 1 <= count <= _MOST:
                raise PtxError(f"expected a multiple of 8 in shared memory and 1 to {_MOST} arrivals, got {at:#x} and {count}")
            block.mbarriers[at] = Mbarrier(count, count, w.index)

    return run


@operation("mbarrier", forms=r"arrive(\.expect_tx)?(\.release\.(cta|cluster))?\.shared::(cta|cluster)\.b64")
def _arrive(program: Program, i: Instruction) -> Run:
    """The result, a state, must be _: nvcc's code waits for parities."""
    if program.target(i.operands[0], 8):
        raise PtxError("expected _ in place of the state")
    address, expects = program.address(i.operands[1]), i.has("expect_tx")
    number = program.slot(i.operands[2], 4) if len(i.operands) > 2 else None

    def run(w: Warp, m: Mask) -> None:
        for lane, block, at in _places(w, m, i, address(w)):
            count = int(w.registers[number][lane]) if number is not None else 1
            barrier = mbarrier_at(block, at)
            if block is not w.block:
                barrier.expect_shown()
            if expects:
                barrier.add_bytes(count)
            barrier.arrive(block, 1 if expects else count)

    return run


@operation("mbarrier", forms=r"try_wait\.parity(\.acquire\.(cta|cluster))?\.shared::cta\.b64")
def _try_wait(program: Program, i: Instruction) -> Run:
    """True if the phase of this parity, the current one or the one before, has ended."""
    p, address, parity = program.target(i.operands[0], 0), program.address(i.operands[1]), program.slot(i.operands[2], 4)

    def run(w: Warp, m: Mask) -> Signal:
        answer = np.zeros(LANES, np.bool_)
        for lane, block, at in _places(w, m, i, address(w)):
            asked = int(w.registers[parity][lane])
            if asked > 1:
                raise PtxError(f"expected a parity of 0 or 1, got {asked}")
            answer[lane] = mbarrier_at(block, at).phase & 1 != asked
        put(w, p, answer, m)
        return None if (answer if m is None else answer[m]).all() else "yield"

    return run
