"""Simulates a multiprocessor that runs a loop's instructions, without limits by memory.

Four schedulers issue an instruction a cycle each, from the warps that lie on them; a warp goes in order and waits for what the
compiler's own fields say (sass.py): cycles, scoreboards. Units take turns: the integer and multiply units of a scheduler, its
matrix unit, the shared-memory and load path of the multiprocessor (128 bytes a cycle). A block's barrier opens when its last
warp arrives. Products of a warpgroup run while its warps go on, each warp's quarter on its scheduler's matrix unit, its
operands by way of the shared-memory path: B once for the four, A unless it comes from registers; waits for their groups are
kept. Copies from global memory are taken to have landed when they are waited for; bandwidth is the model's business.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .hot import MATRIX
from .sass import Instruction

SCHEDULERS = 4
QUEUED = 64  # cycles of work that the queue before the shared-memory and load path holds: the issuing warp does not wait


@dataclass(frozen=True)
class Latencies:
    """Latencies in cycles. Their origin: `sources` in assumptions.py."""

    matrix: float  # between two m16n8k16 of a scheduler (half as many for m16n8k8 of tf32's half the depth)
    shared: int = 29  # of a load from shared memory, without its turns
    constant: int = 30  # of LDC and special registers
    global_load: int = 263  # of a load that L2 serves
    operands: int = 12  # until a store or copy has read its registers
    barrier: int = 20  # from the last warp's arrival to the first instruction behind
    wgmma: float = 4  # of a scheduler for a 16 x 8 x 16 part of a warpgroup's product, which 32-bit sums do not slow
    taken: int = 8  # between a branch that is taken and what it leads to
    special: int = 20  # of MUFU and other slow conversions


@dataclass
class _Warp:
    block: int
    scheduler: int
    at: int = 0  # its next step
    ready: float = 0.0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)  # when its scoreboards are released
    set_by: list[str] = field(default_factory=lambda: [""] * 6)  # and by which unit
    open_group: float = 0.0  # when the products of its open group are done
    groups: list[float] = field(default_factory=list)  # and of the groups before


_MULTIPLY = ("IMAD", "IDP", "UIMAD")
_FLOAT = ("FADD", "FFMA", "FMUL", "HFMA2", "HADD2", "HMUL2")
_SHARED = ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDG", "STG", "LD", "ST", "ATOMG", "RED", "ATOMS")
_SLOW = ("MUFU", "I2F", "F2I", "POPC", "FLO", "BREV", "I2I")


def _unit(instruction: Instruction, latencies: Latencies) -> tuple[str, float]:
    """The unit of an instruction, and for how many cycles."""
    name = instruction.name
    if name == "HGMMA":
        return "matrix", latencies.wgmma * Product.of(instruction).columns / 8
    if name in MATRIX:
        parts = (4096 if "16816" in instruction.opcode else 2048) / 4096
        return "matrix", latencies.matrix * parts * (2 if "TF32" in instruction.opcode else 1)
    if name in _SHARED:
        turns = max(1.0, instruction.width / 4) * (2 if name == "LDG" else 1)  # from L2: 64 bytes a cycle
        return "memory", 0.0 if instruction.never else turns
    if name in _MULTIPLY:
        return "multiply", 2
    if name in _FLOAT:
        return "float", 1
    if name in _SLOW:
        return "special", 8
    if name.startswith("U") and name not in ("UTMALDG", "UBLKCP"):
        return "uniform", 2
    if name in (
        "BRA",
        "BRX",
        "CALL",
        "BSSY",
        "BSYNC",
        "BAR",
        "NOP",
        "DEPBAR",
        "LDGDEPBAR",
        "EXIT",
        "WARPSYNC",
        "WARPGROUP",
        "SYNCS",
        "LDC",
        "S2R",
        "CS2R",
    ):
        return "", 0
    return "integer", 2


def _latency(instruction: Instruction, latencies: Latencies, turns: float) -> float:
    """From issue to the release of its scoreboards."""
    name = instruction.name
    if name in ("LDS", "LDSM"):
        return latencies.shared + turns
    if name in ("LDG", "LD", "ATOMG"):
        return latencies.global_load + turns
    if name in ("STS", "STG", "LDGSTS", "RED"):
        return latencies.operands + turns
    if name in _SLOW:
        return latencies.special
    return latencies.constant


@dataclass(frozen=True)
class Product:
    """A warp's quarter of a wgmma, from its text: HGMMA.64x128x16.F32.BF16 R24, R184, gdesc[UR16].tnspB, R24, gsb0."""

    columns: int
    operand_bytes: int  # from shared memory
    ends_group: bool

    @classmethod
    def of(cls, i: Instruction) -> Product:
        columns, depth = (int(n) for n in i.opcode.split(".")[1].split("x")[1:])
        registers = i.operands.split(",")[1].strip().startswith("R") and not i.operands.split(",")[1].strip().startswith("RZ")
        return cls(columns, (0 if registers else 64 * depth * 2 // 4) + columns * depth * 2 // 4, "gsb" in i.operands)


@dataclass(frozen=True)
class Run:
    """The result of running a trace on a multiprocessor."""

    cycles: float  # an iteration of all resident warps
    waits: dict[str, float]  # share of a warp's time: what it waited for; "issue": it issued, or the scheduler was taken

    @property
    def reason(self) -> str:
        return max(self.waits, key=self.waits.__getitem__)


@dataclass(frozen=True)
class _Step:
    """An instruction of the trace and its cost."""

    instruction: Instruction
    unit: str  # of `_unit`
    turns: float  # cycles of that unit
    stall: int  # until the warp may issue its next
    latency: float
    product: Product | None


def _steps(trace: Sequence[Sequence[Instruction]], latencies: Latencies) -> list[_Step]:
    code = [i for way in trace for i in way]
    steps = []
    for i, after in zip(code, [*code[1:], code[0]]):
        unit, turns = _unit(i, latencies)
        product = Product.of(i) if i.name == "HGMMA" else None
        jump = latencies.taken if i.targets and after.address != i.address + 16 else 0
        steps.append(_Step(i, unit, turns, max(1, i.stall, jump), _latency(i, latencies, turns), product))
    return steps


class _Multiprocessor:
    """Its warps, units and queues while `steps` run. crowded: the shared-memory path takes so much longer."""

    def __init__(self, steps: Sequence[_Step], warps: int, blocks: int, latencies: Latencies, crowded: float) -> None:
        self.steps, self.warps, self.latencies, self.crowded = steps, warps, latencies, crowded
        self.all = [_Warp(block, (block * warps + w) % SCHEDULERS) for block in range(blocks) for w in range(warps)]
        self.free: dict[tuple[str, int], float] = {}  # when a unit is; 0: of the whole multiprocessor
        self.arrived: list[list[int]] = [[] for _ in range(blocks)]  # warps at the block's barrier
        self.waits: Counter[str] = Counter()
        # at equal times the warp that has been ready longest goes first
        self.queue = [(0.0, 0.0, n) for n in range(len(self.all))]

    def run(self, marks: Sequence[int]) -> list[list[float]]:
        """Issues every step of every warp; returns when each warp had issued the last step before each mark."""
        row_of = {mark: row for row, mark in enumerate(marks)}
        done_at = [[0.0] * len(self.all) for _ in marks]
        while self.queue:
            asked, _, n = heapq.heappop(self.queue)
            warp = self.all[n]
            step = self.steps[warp.at]
            time, reason = self._earliest(warp, step)
            if time > asked:
                heapq.heappush(self.queue, (time, warp.ready, n))
                self.waits[reason] += time - asked
                continue
            self._issue(warp, step, time)
            if warp.at in row_of:
                done_at[row_of[warp.at]][n] = time
            if warp.at < len(self.steps):
                self._go_on(n, step, time)
        return done_at

    def _unit_of(self, warp: _Warp, step: _Step) -> tuple[str, int]:
        return step.unit, 0 if step.unit == "memory" else warp.scheduler

    def _earliest(self, warp: _Warp, step: _Step) -> tuple[float, str]:
        """When the warp may issue, and the reason of its wait."""
        time, reason = warp.ready, "dependence"
        if step.instruction.waits:
            for board in range(6):
                if step.instruction.waits >> board & 1 and warp.boards[board] > time:
                    time, reason = warp.boards[board], warp.set_by[board]
        if step.instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            left = int(step.instruction.operands.split(",")[1], 16)
            done = max(warp.groups[: len(warp.groups) - left], default=0.0)
            if done > time:
                time, reason = done, "products"
        issue = self.free.get(("issue", warp.scheduler), 0.0)
        if issue > time:
            time, reason = issue, "issue"
        if step.unit:
            backlog = QUEUED if step.unit == "memory" or step.product else 0
            free = self.free.get(self._unit_of(warp, step), 0.0) - backlog
            if free > time:
                time, reason = free, step.unit
        return time, reason

    def _issue(self, warp: _Warp, step: _Step, time: float) -> None:
        self.free["issue", warp.scheduler] = time + 1
        turns, begins = step.turns * (self.crowded if step.unit == "memory" else 1), time
        if step.unit:
            unit = self._unit_of(warp, step)
            begins = max(self.free.get(unit, 0.0), time)
            self.free[unit] = begins + turns
        if step.product:
            read = max(self.free.get(("memory", 0), 0.0), time) + step.product.operand_bytes / 128 * self.crowded
            self.free["memory", 0] = read
            warp.open_group = max(warp.open_group, begins + turns, read)
            if step.product.ends_group:
                warp.groups.append(warp.open_group)
        self.waits["issue"] += 1
        if step.stall > 1:
            self.waits["dependence"] += step.stall - 1
        for board in step.instruction.sets:
            warp.boards[board] = max(warp.boards[board], begins + step.latency)
            shared = step.instruction.name in ("LDS", "LDSM", "STS")
            warp.set_by[board] = "shared" if shared else "constant" if step.unit == "" else step.unit
        warp.at += 1
        warp.ready = time + step.stall

    def _go_on(self, n: int, step: _Step, time: float) -> None:
        """Queues the warp for its next step, or at its block's barrier, which the last warp opens."""
        warp = self.all[n]
        if step.instruction.name != "BAR":
            heapq.heappush(self.queue, (warp.ready, warp.ready, n))
            return
        arrived = self.arrived[warp.block]
        arrived.append(n)
        if len(arrived) == self.warps:
            opens = time + self.latencies.barrier
            for other in arrived:
                self.waits["barrier"] += opens - self.all[other].ready
                self.all[other].ready = opens
                heapq.heappush(self.queue, (opens, opens, other))
            arrived.clear()


def run(
    trace: Sequence[Sequence[Instruction]],
    warps: int,
    blocks: int,
    latencies: Latencies,
    settle: int = 3,
    arriving: float = 0.0,
) -> Run:
    """`blocks` blocks of `warps` warps, each of which runs all iterations of the trace; the first `settle` are not timed.
    arriving: bytes that bulk copies write to shared memory in an iteration of a block, evenly beside what its warps do
    there."""
    steps = _steps(trace, latencies)
    own = warps * sum(s.product.operand_bytes / 128 if s.product else s.turns * (s.unit == "memory") for s in steps)
    crowded = 1 + arriving / 128 * len(trace) / own if arriving else 1.0
    multiprocessor = _Multiprocessor(steps, warps, blocks, latencies, crowded)
    done_at = multiprocessor.run(list(itertools.accumulate(len(way) for way in trace)))
    ends = [sum(times) / len(times) for times in done_at]
    first = min(settle, len(ends) - 1)
    begin = ends[first - 1] if first else 0.0
    total = sum(multiprocessor.waits.values()) or 1.0
    return Run((ends[-1] - begin) / (len(ends) - first), {name: value / total for name, value in multiprocessor.waits.items()})
