"""A multiprocessor that runs a loop's instructions: how long it takes if memory were never the limit.

Four schedulers issue an instruction a cycle each, from the warps that lie on them; a warp goes in order and waits for what the
compiler's own fields say (sass.py): cycles, scoreboards. Units take turns: the integer and multiply units of a scheduler, its
matrix unit, the shared-memory and load path of the multiprocessor (128 bytes a cycle). A block's barrier opens when its last
warp arrives. Products of a warpgroup run while its warps go on, each warp's quarter on its scheduler's matrix unit, its
operands by way of the shared-memory path: B once for the four, A unless it comes from registers; waits for their groups are
kept. Copies from global memory are taken to have landed when they are waited for; bandwidth is the model's business.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .hot import MATRIX
from .sass import Instruction

SCHEDULERS = 4
QUEUED = 64  # cycles of work that the queue before the shared-memory and load path holds: the issuing warp does not wait


@dataclass(frozen=True)
class Latencies:
    """Cycles. Where they come from: `sources` in assumptions.py."""

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
    at: int = 0
    ready: float = 0.0


_MULTIPLY = ("IMAD", "IDP", "UIMAD")
_FLOAT = ("FADD", "FFMA", "FMUL", "HFMA2", "HADD2", "HMUL2")
_SHARED = ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDG", "STG", "LD", "ST", "ATOMG", "RED", "ATOMS")
_SLOW = ("MUFU", "I2F", "F2I", "POPC", "FLO", "BREV", "I2I")


def _unit(instruction: Instruction, latencies: Latencies) -> tuple[str, float]:
    """Which unit an instruction takes, for how many cycles."""
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
    """What it takes a multiprocessor to run a trace."""

    cycles: float  # an iteration of all resident warps
    waits: dict[str, float]  # share of a warp's time: what it waited for; "issue": it issued, or the scheduler was taken

    @property
    def reason(self) -> str:
        return max(self.waits, key=self.waits.__getitem__)


def run(  # noqa: C901  one loop over cycles; its parts share ten counters
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
    code = [i for way in trace for i in way]
    marks = []  # ends of iterations
    end = 0
    for way in trace:
        end += len(way)
        marks.append(end)
    facts = []
    for i, after in zip(code, [*code[1:], code[0]]):
        unit, turns = _unit(i, latencies)
        product = Product.of(i) if i.name == "HGMMA" else None
        jump = latencies.taken if i.targets and after.address != i.address + 16 else 0
        facts.append((i, unit, turns, max(1, i.stall, jump), _latency(i, latencies, turns), product))
    own = warps * sum(p.operand_bytes / 128 if p else turns * (unit == "memory") for _, unit, turns, _, _, p in facts)
    crowded = 1 + arriving / 128 * len(trace) / own if arriving else 1.0
    everyone = [_Warp(block, (block * warps + w) % SCHEDULERS) for block in range(blocks) for w in range(warps)]
    boards = [[0.0] * 6 for _ in everyone]
    open_group, groups = [0.0] * len(everyone), [[] for _ in everyone]  # when their products are done
    board_reason = [[""] * 6 for _ in everyone]
    free: dict[tuple[str, int], float] = {}
    arrived: list[list[int]] = [[] for _ in range(blocks)]
    done_at = [[0.0] * len(everyone) for _ in marks]
    waits: Counter[str] = Counter()
    queue = [(0.0, 0.0, n) for n in range(len(everyone))]  # at equal times the warp that has been ready longest goes first
    heapq.heapify(queue)
    mark_of = {mark: i for i, mark in enumerate(marks)}
    while queue:
        asked, _, n = heapq.heappop(queue)
        warp = everyone[n]
        instruction, unit, turns, stall, latency, product = facts[warp.at]
        if unit == "memory":
            turns *= crowded
        time, reason = warp.ready, "dependence"
        if instruction.waits:
            for board in range(6):
                if instruction.waits >> board & 1 and boards[n][board] > time:
                    time, reason = boards[n][board], board_reason[n][board]
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            left = int(instruction.operands.split(",")[1], 16)
            done = max(groups[n][: len(groups[n]) - left], default=0.0)
            if done > time:
                time, reason = done, "products"
        issue = free.get(("issue", warp.scheduler), 0.0)
        if issue > time:
            time, reason = issue, "issue"
        if unit:
            key = (unit, 0 if unit == "memory" else warp.scheduler)
            backlog = QUEUED if unit == "memory" or product else 0
            if free.get(key, 0.0) - backlog > time:
                time, reason = free[key] - backlog, unit
        if time > asked:
            heapq.heappush(queue, (time, warp.ready, n))
            waits[reason] += time - asked
            continue
        free["issue", warp.scheduler] = time + 1
        begins = time
        if unit:
            begins = max(free.get(key, 0.0), time)
            free[key] = begins + turns
        if product:
            read = max(free.get(("memory", 0), 0.0), time) + product.operand_bytes / 128 * crowded
            free["memory", 0] = read
            open_group[n] = max(open_group[n], begins + turns, read)
            if product.ends_group:
                groups[n].append(open_group[n])
        waits["issue"] += 1
        if stall > 1:
            waits["dependence"] += stall - 1
        for board in instruction.sets:
            boards[n][board] = max(boards[n][board], begins + latency)
            board_reason[n][board] = (
                "shared" if instruction.name in ("LDS", "LDSM", "STS") else "constant" if unit == "" else unit
            )
        warp.at += 1
        warp.ready = time + stall
        if warp.at in mark_of:
            done_at[mark_of[warp.at]][n] = time
        if warp.at == len(facts):
            continue
        if instruction.name == "BAR":
            arrived[warp.block].append(n)
            if len(arrived[warp.block]) == warps:
                for other in arrived[warp.block]:
                    opens = time + latencies.barrier
                    waits["barrier"] += opens - everyone[other].ready
                    everyone[other].ready = opens
                    heapq.heappush(queue, (opens, opens, other))
                arrived[warp.block] = []
        else:
            heapq.heappush(queue, (warp.ready, warp.ready, n))
    ends = [sum(times) / len(times) for times in done_at]
    first = min(settle, len(ends) - 1)
    timed = len(ends) - first
    begin = ends[first - 1] if first else 0.0
    total = sum(waits.values()) or 1.0
    return Run((ends[-1] - begin) / timed, {name: value / total for name, value in waits.items()})
