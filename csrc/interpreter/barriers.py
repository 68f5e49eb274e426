"""Barriers of warps, blocks and clusters, and mbarriers (PTX manual, "Parallel Synchronization and Communication")."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxError
from .memory import Bytes, access_of
from .parse import Instruction, Pair
from .program import LANES, Lanes, Mask, Program, Run, Signal, operation, put
from .warp import Warp

if TYPE_CHECKING:
    from .grid import Block


@dataclass
class NamedBarrier:
    """arrived: threads in this phase; votes: of bar.red, results: of the phases that have ended."""

    arrived: int = 0
    phase: int = 0
    votes: list[bool] = field(default_factory=list)
    results: dict[int, list[bool]] = field(default_factory=dict)


EXPECTED, PENDING, BYTES, PHASE = range(4)  # of an mbarrier
_MOST_ARRIVALS = 2**20 - 1


@operation("bar", "barrier", collective=True)
def _barrier(program: Program, i: Instruction) -> Run:
    """bar.sync, bar.arrive and bar.red on a named barrier, bar.warp.sync, barrier.cluster."""
    words = [word for word in i.words if word not in ("aligned", "cta")]
    if words[1] == "warp":
        members = program.slot(i.operands[0], 4)
        return lambda w, m: w.expect_members(w.registers[members], m, i)
    if words[1] == "cluster":
        return _cluster_arrive if words[2] == "arrive" else _cluster_wait
    if words[1] == "red":
        return _reduce(program, i)
    if words[1] not in ("sync", "arrive"):
        raise PtxError(f"{i.text}: expected .sync, .arrive or .red")
    waits, slots = words[1] == "sync", [program.slot(o, 4) for o in i.operands]

    def run(w: Warp, m: Mask) -> Signal:
        barrier, phase = _arrive_at(w, m, slots, i)
        return (lambda: barrier.phase > phase) if waits else None

    return run


def _arrive_at(w: Warp, m: Mask, slots: list[int], i: Instruction, holds: Lanes | None = None) -> tuple[NamedBarrier, int]:
    """One warp more; of as many threads as the instruction says, or the block has."""
    _whole(w, m, i)
    block = w.block
    name = w.uniform(slots[0], m, i.text)
    count = w.uniform(slots[1], m, i.text) if len(slots) > 1 else block.threads
    if name > 15 or count % LANES or count > block.threads:
        raise PtxError(f"{i.text}: expected barrier 0 to 15 and whole warps of the block, got {name} and {count}")
    barrier = block.barriers.setdefault(name, NamedBarrier())
    phase = barrier.phase
    barrier.arrived += LANES
    barrier.votes += [] if holds is None else holds.tolist()
    if barrier.arrived > count:
        raise PtxError(f"{i.text}: expected {count} threads at barrier {name}, got {barrier.arrived}")
    if barrier.arrived == count:
        barrier.results[phase] = barrier.votes
        barrier.arrived, barrier.phase, barrier.votes = 0, phase + 1, []
        block.grid.events += 1
    return barrier, phase


def _reduce(program: Program, i: Instruction) -> Run:
    """bar.red: whether the predicate holds in all threads (.and), in any (.or), or in how many (.popc)."""
    kind, d, holds = i.words[i.words.index("red") + 1], program.target(i.operands[0]), program.predicate(i.operands[-1])
    slots = [program.slot(o, 4) for o in i.operands[1:-1]]
    reduced = {"and": all, "or": any, "popc": sum}[kind]

    def run(w: Warp, m: Mask) -> Signal:
        barrier, phase = _arrive_at(w, m, slots, i, holds(w))

        def ready() -> bool:
            if barrier.phase > phase:
                put(w, d, np.full(LANES, reduced(barrier.results[phase]), w.registers[d].dtype), m)
                return True
            return False

        return ready

    return run


def _whole(w: Warp, m: Mask, i: Instruction) -> None:
    """An .aligned instruction needs all threads of the warp that have not ended."""
    live = sum(int(p.mask.sum()) for p in w.paths)
    if (LANES if m is None else int(m.sum())) < live:
        raise PtxError(f"{i.text}: expected all {live} threads of the warp together")


def _cluster_arrive(w: Warp, m: Mask) -> None:
    cluster = w.block.cluster
    w.cluster_phase = cluster.phase
    cluster.arrived += LANES
    if cluster.arrived == cluster.threads:
        cluster.arrived, cluster.phase = 0, cluster.phase + 1
        w.block.grid.events += 1


def _cluster_wait(w: Warp, m: Mask) -> Signal:
    cluster, arrived_in = w.block.cluster, w.cluster_phase
    return lambda: cluster.phase > arrived_in


def _complete(block: Block, state: list[int]) -> None:
    """The phase ends when no arrival and no byte is pending."""
    if state[PENDING] == 0 and state[BYTES] == 0:
        state[PENDING], state[PHASE] = state[EXPECTED], state[PHASE] + 1
        block.grid.events += 1


def _block_of(w: Warp, memory: Bytes) -> Block:
    return next(b for b in w.block.cluster.blocks if b.shared is memory)


def state_of(block: Block, address: int) -> list[int]:
    if address not in block.mbarriers:
        raise PtxError(f"mbarrier: expected one that is initialised at {address:#x} of {block.name}")
    return block.mbarriers[address]


def expect_bytes(block: Block, address: int, count: int) -> None:
    state_of(block, address)[BYTES] += count


def complete_bytes(block: Block, address: int, count: int) -> None:
    """A bulk copy has brought `count` bytes."""
    state = state_of(block, address)
    state[BYTES] -= count
    _complete(block, state)


def _arrive(block: Block, address: int, count: int) -> int:
    """Returns the phase in which it arrived."""
    state = state_of(block, address)
    phase = state[PHASE]
    if count > state[PENDING]:
        raise PtxError(f"mbarrier {address:#x}: expected at most {state[PENDING]} arrivals in this phase, got {count}")
    state[PENDING] -= count
    _complete(block, state)
    return phase


def _places(w: Warp, m: Mask, i: Instruction, addresses: Lanes) -> list[tuple[int, Block, int]]:
    """(lane, block, address in its shared memory) of each active thread."""
    lanes = np.arange(LANES) if m is None else np.flatnonzero(m)
    found = []
    for memory, at, some in access_of(i)(w, addresses[lanes]):
        found += [(int(lane), _block_of(w, memory), int(a)) for lane, a in zip(lanes[some], at, strict=True)]
    return sorted(found, key=lambda place: place[0])


@operation("mbarrier")
def _mbarrier(program: Program, i: Instruction) -> Run:
    action = i.words[1]
    if action in ("try_wait", "test_wait"):
        return _try_wait(program, i)
    returns = action == "arrive"
    operands = i.operands[1:] if returns else i.operands
    address = program.address(operands[0])
    number = program.slot(operands[1], 4) if len(operands) > 1 else None
    state = program.target(i.operands[0]) if returns else 0

    def run(w: Warp, m: Mask) -> Signal:
        phases = np.zeros(LANES, np.uint64)
        for lane, block, at in _places(w, m, i, address(w)):
            count = int(w.registers[number][lane]) if number is not None else 1
            if action == "init":
                if at % 8 or not 1 <= count <= _MOST_ARRIVALS:
                    raise PtxError(
                        f"{i.text}: expected a multiple of 8 and 1 to {_MOST_ARRIVALS} arrivals, got {at:#x} and {count}"
                    )
                block.mbarriers[at] = [count, count, 0, 0]
            elif action == "inval":
                state_of(block, at)
                del block.mbarriers[at]
            elif action == "expect_tx":
                expect_bytes(block, at, count)
            elif i.has("expect_tx"):
                expect_bytes(block, at, count)
                phases[lane] = _arrive(block, at, 1)
            else:
                phases[lane] = _arrive(block, at, count)
        if state:
            put(w, state, phases, m)
        return None

    if action not in ("init", "inval", "expect_tx", "arrive"):
        raise PtxError(f"{i.text}: expected an mbarrier instruction that the interpreter knows")
    return run


def _try_wait(program: Program, i: Instruction) -> Run:
    """True if the phase of this parity, or in which a thread arrived, has ended."""
    target = i.operands[0]
    p = program.target(target.first if isinstance(target, Pair) else target)
    address, b, parity = program.address(i.operands[1]), program.slot(i.operands[2], 4), i.has("parity")

    def run(w: Warp, m: Mask) -> Signal:
        answer = np.zeros(LANES, np.bool_)
        for lane, block, at in _places(w, m, i, address(w)):
            phase, asked = state_of(block, at)[PHASE], int(w.registers[b][lane])
            answer[lane] = phase & 1 != asked if parity else phase > asked
        put(w, p, answer, m)
        return None if (answer if m is None else answer[m]).all() else "yield"

    return run
