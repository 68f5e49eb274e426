"""row_core and its backward on known GPUs, from their machine code and the executor's counts: a model, not a measurement.

A turn is one pass of small_product's loop, 32 of the sum for a tile of 32 x 16: a thread stores 12 elements to shared memory,
multiplies 128 times and meets two barriers. How many turns there are, and how many of a thread's 12 elements are loaded, the
executor counts; the shortest way through the loop with just these is what the schedulers run (issue.py). What stands before it
are loads that wait for one another: the search for a row's core, or for the rows of a core or token; row_ends and sum_rows are
nothing else. An operator's time is that of its launches in turn; what the library sorts is left out.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..measure.session import Table
from ..measure.store import Store, of_build
from . import row_counts as traffic
from .assumptions import BEGIN, LIKELY, Assumed, Spread
from .cards import CARDS, Card
from .compiled import Compiled, compile_kernels, tools
from .hot import Hot, ways
from .issue import run
from .model import ITERATIONS, blocks_resident, gap, together
from .row_counts import Mixture, RowCounts
from .sass import Instruction, blocks_of, loops_of

FILE, COUNTS = "static_rows.jsonl", traffic.FILE
Key = tuple[str, Mixture, str]  # operator, sizes, GPU
ELEMENTS, PRODUCTS, BARRIERS = 12, 128, 2  # of a thread and turn
TILE_ROWS, TILE_COLUMNS = 32, 16  # small_product.cuh
HEADS = ("operator", "tokens, of cores, r", "launch", "registers", "blocks, resident", "turns a block", "loads", "instr a turn")
HEADS += ("issue", "memory", "waits", "us", "limiter")


@dataclass(frozen=True)
class Turn:
    """What a way through the loop must do, a thread: loads of 2 bytes, each with `indices` of 8, and ELEMENTS, PRODUCTS,
    BARRIERS."""

    loads: int
    indices: int = 0
    narrow = True  # as hot.Wanted: loads of single elements are what it is about

    def vector(self) -> tuple[int, ...]:
        return ELEMENTS, self.loads, self.loads * self.indices, PRODUCTS, BARRIERS

    def most(self) -> tuple[int, ...]:
        return self.vector()

    def of(self, code: Iterable[Instruction]) -> tuple[int, ...]:
        found = Counter((i.name, i.width if i.name == "LDG" else 0) for i in code)
        return tuple(found[key] for key in (("STS", 0), ("LDG", 2), ("LDG", 8), ("FFMA", 0), ("BAR", 0)))


def turn_of(code: list[Instruction], turn: Turn) -> tuple[Instruction, ...]:
    """The shortest way through the smallest loop that has such turns. ValueError where there is none."""
    blocks = blocks_of(code)
    for head, body in sorted(loops_of(blocks).items(), key=lambda item: len(item[1])):
        if turn.of(i for b in body for i in blocks[b].code)[-1] < BARRIERS:
            continue
        for vector, path in ways(head, body, blocks, turn):
            if vector == turn.vector():
                return tuple(i for b in path for i in blocks[b].code)
    raise ValueError(f"turn: expected a way with {turn}, found none in the loops with barriers")


def hot_of_rows(kernel: Compiled, turns: float, loads: float) -> Hot:
    """turns of so many loads a thread, in the mean: of the two whole numbers beside it."""
    few, share = int(loads), loads - int(loads)
    indices = 1 if kernel.kernel == "row_core_grad" else 0  # whose token, or place in the sorted order
    found = [(n, part * turns) for n, part in ((few, 1 - share), (few + 1, share)) if part > 0.01]
    return Hot([(times, turn_of(kernel.code, Turn(n, indices))) for n, times in found])


@dataclass(frozen=True)
class RowLaunch:
    """One launch of an operator on a GPU, and the seconds that each limit alone would ask for; bytes at the data sheet's."""

    name: str
    registers: int
    spilled: int
    blocks: int
    resident: int
    turns: float  # a block
    loads: float  # of a thread and turn
    instructions: float  # of a warp and turn
    issue: float
    dram: float
    l2: float
    waits: float
    latency: float  # of memory

    def seconds(self, assumed: Assumed = LIKELY) -> float:
        return BEGIN + self.latency + self.waits + together([self.issue, max(self.dram / assumed.bandwidth, self.l2)])

    @property
    def limiter(self) -> str:
        limits = {"issue": self.issue, "memory": max(self.dram, self.l2), "loads one after another": self.waits}
        return max(limits, key=limits.__getitem__)


def chain(name: str, case: Mixture, splits: int) -> int:
    """The number of dependent loads of a thread, outside the turns."""
    if name == "row_core":
        return 1 if case.top == 1 else math.ceil(math.log2(case.cores + 1))
    if name == "row_ends":
        return math.ceil(math.log2(case.rows + 1))
    if name == "sum_rows":  # a place of the sorted order, then k there; sixteen at a time, and what is left
        return 1 + 2 * (case.top // 16 + case.top % 16)
    return 1 + (4 if splits > 1 else 0)  # row_core_grad: the end of a core's rows; store, arrive, loads of the last block


def launch(name: str, blocks: int, counted: dict, kernel: Compiled, case: Mixture, least: float, card: Card) -> RowLaunch:
    """least: bytes from DRAM."""
    resident, _ = blocks_resident(kernel, counted["warps"], counted["shared"], card)
    tiles = math.ceil(case.r / TILE_ROWS) * math.ceil(case.r / TILE_COLUMNS)
    splits = max(1, blocks // (case.cores * tiles)) if name == "row_core_grad" else 1
    once = 1 if name == "row_core" else 2 * (splits > 1)  # barriers of a block outside of the loop
    turns = (counted["barriers"] - once * blocks) / BARRIERS if name in ("row_core", "row_core_grad") else 0.0
    places, cycles, loads, instructions = resident * card.multiprocessors, 0.0, 0.0, 0.0
    if turns:
        loads = counted["half_loads"] / (turns * counted["warps"])
        hot = hot_of_rows(kernel, turns, loads)
        instructions, trace = hot.instructions / hot.iterations, hot.trace(ITERATIONS)
        full, rest = divmod(blocks, places)
        for times, on_one in ((full, resident), (1 if rest else 0, math.ceil(rest / card.multiprocessors))):
            if times:
                cycles += times * turns / blocks * run(trace, counted["warps"], on_one, card.latencies()).cycles
    l2 = card.l2_bytes_a_cycle * card.multiprocessors * card.clock
    limits = {
        "issue": cycles / card.clock,
        "dram": least / card.bytes_per_s,
        "l2": counted["bytes"] / l2,
        "waits": chain(name, case, splits) * math.ceil(blocks / places) * card.l2_latency / card.clock,
        "latency": card.memory_latency,
    }
    return RowLaunch(name, kernel.registers, kernel.spilled, blocks, resident, turns / blocks, loads, instructions, **limits)


def estimate(row: RowCounts, case: Mixture, compiled: dict[str, Compiled], card: Card) -> list[RowLaunch]:
    """The launches of a counted operator; each takes its share of the least bytes from DRAM."""
    found = []
    for (name, blocks), counted in zip(row.launches, row.machine, strict=True):
        if counted["symbol"] not in compiled:
            raise ValueError(f"{name}: expected the instance {counted['symbol'] or '(none)'} among the compiled, found none")
        least = row.least * counted["bytes"] / row.total
        found.append(launch(name, blocks, counted, compiled[counted["symbol"]], case, least, card))
    return found


def seconds(launches: list[RowLaunch], card: Card, assumed: Assumed = LIKELY) -> float:
    """Of an operator. Its kernels are small and let the next one begin at once; before row_ends stands the library's sort."""
    total = sum(one.seconds(assumed) for one in launches)
    for ahead, one in itertools.pairwise(launches):
        running = ahead.seconds(assumed) - BEGIN
        total += gap(card, None if one.name == "row_ends" else running, assumed)
    return total


def spread(launches: list[RowLaunch], card: Card) -> Spread:
    return Spread.of(lambda assumed: seconds(launches, card, assumed))


# ---- estimates that are kept -----------------------------------------------------------------------------------------


def all_keys(cases: list[Mixture], gpus: Iterable[str]) -> list[Key]:
    return [(operator, case, gpu) for gpu in gpus for case in cases for operator in traffic.OPERATORS]


def kept(store: Store, build: str | None = None) -> dict[Key, list[RowLaunch]]:
    """The estimates of a build; None: of the last one that was kept."""
    found = {}
    for cell in of_build(store.read(), build):
        operator, *sizes, gpu = cell["case"].values()
        found[operator, Mixture(*sizes), gpu] = [RowLaunch(**one) for one in cell["launches"]]
    return found


def predict(
    keys: list[Key], folder: Path, build: str, begin: Callable[[str], None], again: bool = False
) -> dict[Key, list[RowLaunch]]:
    """The estimates of keys. Counts and estimates that are not in folder are made and kept there, for a build (`model_id`).

    FileNotFoundError where something has to be compiled and there is no nvcc or no disassembler."""
    store, counts = Store(folder / FILE).prepare(), Store(folder / COUNTS).prepare()
    found = {} if again else kept(store, build)
    missing = [key for key in keys if key not in found]
    if missing:
        tools()
    for key in keys:
        operator, case, gpu = key
        begin(f"{operator} {case}, {CARDS[gpu].name}")
        if key not in found:
            counted = (operator, case, CARDS[gpu].multiprocessors)
            row = traffic.count_all([counted], counts, lambda _: None, again)[counted]
            found[key] = estimate(row, case, compile_kernels("rows", CARDS[gpu].architecture), CARDS[gpu])
            named = {"operator": operator} | case._asdict() | {"gpu": gpu}
            launches = [asdict(one) for one in found[key]]
            store.append({"case": named, "rival": "lotr_ext", "build": build, "launches": launches})
    if missing:
        store.keep_only(build)
    return {key: found[key] for key in keys}


# ---- tables ----------------------------------------------------------------------------------------------------------


def table_of(gpu: str, found: dict[Key, list[RowLaunch]]) -> Table:
    """The table of one GPU, a row per launch; times in us."""
    result = Table(f"{CARDS[gpu].name}, bf16: row_core, model from the machine code, not measured", *HEADS)
    for (operator, case, on), launches in found.items():
        for i, e in enumerate(launches if on == gpu else ()):
            first = [operator, str(case)] if i == 0 else ["", ""]
            row = [e.name, f"{e.registers}" + (f" +{e.spilled} B" if e.spilled else ""), f"{e.blocks:,}, {e.resident}"]
            row += [f"{e.turns:.1f}", f"{e.loads:.1f}", f"{e.instructions:.0f}"]
            row += [f"{1e6 * value:.1f}" for value in (e.issue, max(e.dram, e.l2), e.waits, e.seconds())]
            result.add_row(*first, *row, e.limiter)
    result.caption = (
        "turns: passes of small_product's loop; loads: of the 12 elements of a thread and turn; instr: of a warp. issue, "
        "memory, waits: what the turns, the bytes, and the loads that wait for one another ask for. Times in us."
    )
    return result


def markdown_rows(found: dict[Key, list[RowLaunch]]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows for a page: a row an operator and case, each GPU's time; code and limiter of the slowest launch on the
    first GPU."""
    gpus = list(dict.fromkeys(gpu for _, _, gpu in found))
    heads = ["operator", "tokens, of cores, r", "launches", "of them the longest", "registers", "instructions a turn"]
    heads += [f"{CARDS[gpu].name}: us" for gpu in gpus] + [f"what limits on {CARDS[gpus[0]].name}"]
    rows = []
    for (operator, case, gpu), launches in found.items():
        if gpu != gpus[0]:
            continue
        most = max(launches, key=lambda e: e.seconds())
        row = [operator, str(case), str(len(launches)), most.name, str(most.registers), f"{most.instructions:.0f}"]
        times = ((found.get((operator, case, other)), CARDS[other]) for other in gpus)
        rows.append([*row, *(spread(own, card).us() if own else "-" for own, card in times), most.limiter])
    return heads, rows
