"""Bytes of row_core and its backward, counted by the SIMT executor, over the bytes of each operand moved once.

A case is TOKENS x TOP x CORES x RANK: each token goes through TOP of CORES cores. With TOP > 1 it is a mixture: rows sorted by
core with offsets, `tokens` saying whose row each is. With TOP = 1 it is many tasks in a batch: an index, rows in no order.
The library's sort is not counted. The kernels' reads of the sorted order, and k in float32, have no name among the
operands: "order, k". Counts are kept in bench/results/simt-executor/rows.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ..measure.names import sizes
from ..measure.session import Table
from ..measure.store import Store, of_build
from .counts import ELEMENT, aligned, executor, sources_id, symbols

FILE = "rows.jsonl"
CASES = "2048x4x32x16,2048x4x32x64,64x1x64x16,64x1x64x64"
OPERATORS = ("row_core", "row_core backward")
UNNAMED, ORDER = "(unregistered)", "order, k"
HEADS = ("operator", "tokens, of cores, r", "launches: blocks", "cores", "all", "least", "x least", "sectors used")
MULTIPROCESSORS = 132  # an H100's, for which the launches are planned


class Mixture(NamedTuple):
    """Each of `tokens` tokens goes through `top` of `cores` cores of r x r."""

    tokens: int
    top: int
    cores: int
    r: int

    @property
    def rows(self) -> int:
        return self.tokens * self.top

    def __str__(self) -> str:
        return f"{self.tokens:,}, {self.top} of {self.cores:,}, {self.r}"


Key = tuple[str, Mixture, int]  # operator, sizes, multiprocessors


@dataclass(frozen=True)
class RowCounts:
    """One operator on one case, bfloat16 (dG in float32)."""

    launches: list[tuple[str, int]]  # kernels with their blocks, in order
    moved: dict[str, int]  # bytes read and written, by operand
    sectors: int  # of 32 bytes
    least: int  # bytes with every operand moved once, of the cores those that have rows
    machine: list[dict] = field(default_factory=list)  # of each launch, for a model of the machine code (model.py)

    @property
    def total(self) -> int:
        return sum(self.moved.values())

    @property
    def over_least(self) -> float:
        return self.total / self.least

    @property
    def sector_efficiency(self) -> float:
        return self.total / (32 * self.sectors)


def parse(text: str) -> list[Mixture]:
    """Cases from TOKENSxTOPxCORESxRANK, comma-separated."""
    found = []
    for numbers in sizes("rows", text, "TOKENSxTOPxCORESxRANK"):
        case = Mixture(*numbers)
        if case.r > 256:
            raise ValueError(f"rows: expected ranks up to 256, what the CUDA kernels take, got {case.r}")
        if case.top > case.cores:
            raise ValueError(f"rows: expected at most as many cores a token as there are, {case.cores}, got {case.top}")
        found.append(case)
    return found


def indices(case: Mixture) -> dict[str, np.ndarray | None]:
    """Which core and token each row has: index, or offs and tokens; drawn at random, the same every time."""
    rng = np.random.default_rng(0)
    if case.top == 1:
        return {"index": rng.permutation(np.arange(case.tokens) % case.cores), "offs": None, "tokens": None}
    core = np.concatenate([rng.permutation(case.cores)[: case.top] for _ in range(case.tokens)])
    order = np.argsort(core, kind="stable")
    offs = np.cumsum(np.bincount(core, minlength=case.cores)).astype(np.int32)
    return {"index": None, "offs": offs, "tokens": order // case.top}


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def least_bytes(operator: str, case: Mixture, used: int, index_bytes: int) -> int:
    """Every operand once: u, the used cores, h, and the indices; backward reads g as well and writes du and float32 dG."""
    u, h, core = ELEMENT * case.tokens * case.r, ELEMENT * case.rows * case.r, case.r * case.r
    if operator == "row_core":
        return u + h + ELEMENT * used * core + index_bytes
    return 2 * u + h + ELEMENT * used * core + 4 * case.cores * core + index_bytes


def count(lib: ModuleType, operator: str, case: Mixture, multiprocessors: int) -> RowCounts:
    """Runs one operator and returns its counts."""
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}, got {operator!r}")
    rows, tokens, cores = (case.rows, case.r), (case.tokens, case.r), (case.cores, case.r, case.r)
    u, G, g = aligned(tokens, np.uint16), aligned(cores, np.uint16), aligned(rows, np.uint16)
    which = {name: array if array is None else _aligned_copy(array) for name, array in indices(case).items()}
    lib.set_options(count_memory=True)
    lib.reset_counters()
    if operator == "row_core":
        lib.row_core(u, G, **which, scaling=1.0, h=g, multiprocessors=multiprocessors)
    else:
        du, dcores = aligned(tokens, np.uint16), aligned(cores, np.float32)
        lib.row_core_backward(g, u, G, **which, scaling=1.0, du=du, dcores=dcores, multiprocessors=multiprocessors)
    counters = lib.counters()
    lib.set_options()
    arrays = counters["arrays"]
    moved = {ORDER if name == UNNAMED else name: a["read_bytes"] + a["written_bytes"] for name, a in arrays.items()}
    rows_of = np.diff(which["offs"], prepend=0) if which["index"] is None else np.bincount(which["index"])
    index_bytes = sum(array.nbytes for array in which.values() if array is not None)
    return RowCounts(
        launches=[(one["name"], int(np.prod(one["grid"]))) for one in counters["launches"]],
        moved={name: size for name, size in moved.items() if size},
        sectors=sum(a["read_sectors"] + a["written_sectors"] for a in arrays.values()),
        least=least_bytes(operator, case, int((rows_of > 0).sum()), index_bytes),
        machine=[_machine(lib, one) for one in counters["launches"]],
    )


def _machine(lib: ModuleType, launch: dict) -> dict:
    """The instance that ran, with its launch; barriers of all blocks, warps' loads of 2 bytes a lane, all bytes."""
    found = {name: launch[name] for name in ("barriers", "half_loads", "bytes")}
    found |= {"shared": launch["shared_bytes"], "warps": launch["block"][0] // 32}
    return found | {"symbol": symbols(lib).get(launch["offset"], "")}


def needed(cases: list[Mixture], multiprocessors: int = MULTIPROCESSORS) -> list[Key]:
    return [(operator, case, multiprocessors) for case in cases for operator in OPERATORS]


def kept(store: Store, build: str | None = None) -> dict[Key, RowCounts]:
    """The kept counts of these sources; None: of the newest counted ones."""
    found = {}
    for cell in of_build(store.read(), build):
        operator, *sizes, sm = cell["case"].values()
        row = cell["row"] | {"launches": [tuple(one) for one in cell["row"]["launches"]]}
        found[operator, Mixture(*sizes), sm] = RowCounts(**row)
    return found


def count_all(keys: list[Key], store: Store, begin: Callable[[str], None], again: bool = False) -> dict[Key, RowCounts]:
    """The rows of keys, counted where they are not kept."""
    build, lib = sources_id(), None
    found = {} if again else kept(store, build)
    for key in keys:
        operator, case, sm = key
        begin(f"{operator} {case}, {sm} multiprocessors")
        if key not in found:
            lib = lib or executor()
            found[key] = count(lib, operator, case, sm)
            named = {"operator": operator} | case._asdict() | {"multiprocessors": sm}
            store.append({"case": named, "rival": "lotr_ext", "build": build, "row": asdict(found[key])})
    if lib is not None:
        store.keep_only(build)
    return {key: found[key] for key in keys}


def cells_of(operator: str, case: Mixture, row: RowCounts) -> list[str]:
    """A row of the table with the columns HEADS."""
    sizes = [f"{size / 1e6:.3f} MB" for size in (row.moved.get("cores", 0), row.total, row.least)]
    launches = ", ".join(f"{name}: {blocks:,}" for name, blocks in row.launches)
    return [operator, str(case), launches, *sizes, f"{row.over_least:.2f}", f"{row.sector_efficiency:.1%}"]


def table(found: dict[Key, RowCounts]) -> Table:
    """The table for a terminal."""
    result = Table(f"Counted bytes of row_core, bf16, planned for {MULTIPROCESSORS} multiprocessors (no GPU)", *HEADS)
    for (operator, case, _), row in found.items():
        result.add_row(*cells_of(operator, case, row))
    return result
