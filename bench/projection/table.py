"""The model's tables: for a terminal, one GPU at a time; and for README and the site, all side by side."""

from __future__ import annotations

from ..measure.session import Table
from . import assumptions, fused
from .cards import CARDS
from .model import Estimate
from .predict import Key

LABEL = "model from the machine code, not measured"
HEADS = ("kernel", "M x N, r", "registers", "shared", "blocks", "grid, waves", "idle", "instr", "a 16 B (addr)", "KB in flight")
HEADS += ("issue", "memory", "flight", "L2", "cluster", "begin", "after (rounds)", "launches", "us (low-high)", "of HBM")
HEADS += ("limiter",)


def table(gpu: str, dtype: str, found: dict[Key, Estimate]) -> Table:
    """The table of one GPU and dtype, a row per kernel; times in us."""
    own = {key: e for key, e in found.items() if key[4:] == (dtype, gpu)}
    result = Table(f"{CARDS[gpu].name}, {dtype}: {LABEL}", *HEADS)
    for key, e in own.items():
        t = e.at()
        row = [key[0], f"{key[1]} x {key[2]}, {key[3]}", f"{e.registers}" + (f" +{e.spilled} B" if e.spilled else "")]
        row += [f"{e.shared / 1024:.0f} K", f"{e.resident} ({e.resident_by})", f"{e.blocks}, {e.waves:.2f}", f"{e.idle:.0%}"]
        row += [f"{e.iteration:.0f}", f"{e.per_16_bytes:.0f} ({e.kinds.get('address', 0):.0f})"]
        row += [f"{e.in_flight / 1024:.0f} / {e.needed_in_flight / 1024:.0f}"]
        row += [f"{1e6 * seconds:.1f}" for seconds in t.bound.values()]
        row += [f"{1e6 * t.parts['begin']:.1f}", f"{1e6 * t.parts['after']:.1f} ({e.late_rounds})"]
        row += [f"{e.launches} + {e.memsets}", e.spread.us(), f"{t.share:.0%}", t.limiter]
        result.add_row(*row)
    result.caption = (
        "instr: of a warp in one turn of the hot loop; a 16 B: of a thread for each 16 bytes of the large matrix (of these for "
        "addresses and bounds). in flight: of a multiprocessor / bandwidth x latency. issue, memory, flight, L2, cluster: what "
        "each alone asks for. launches + memsets. Times in us, under likely assumptions; in brackets all low and all high."
    )
    return result


def fused_table(gpu: str) -> Table:
    """gemm_lotr on a Hopper GPU: a row per shape and direction."""
    result = Table(f"{CARDS[gpu].name}, bf16, gemm_lotr: a model of its tickets, not measured", *fused.HEADS)
    for row in fused.rows(fused.SHAPES, gpu):
        result.add_row(*row)
    result.caption = "Assumed: " + "; ".join(fused.ASSUMED)
    return result


def markdown_rows(found: dict[Key, Estimate], gpus: list[str]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows for a page: a row per kernel and size; its code and limiter on the first GPU, and each GPU's time."""
    first = gpus[0]
    heads = ["kernel", "M x N, r", "registers", "blocks a multiprocessor", "instructions a 16 bytes"]
    heads += [f"{CARDS[gpu].name}: us, of bandwidth" for gpu in gpus] + [f"what limits on {CARDS[first].name}"]
    rows = []
    for key, e in found.items():
        if key[5] != first:
            continue
        row = [key[0], f"{key[1]} x {key[2]}, {key[3]}", str(e.registers), str(e.resident), f"{e.per_16_bytes:.0f}"]
        for gpu in gpus:
            other = found.get((*key[:5], gpu))
            row.append(f"{other.spread.us()}, {other.at().share:.0%}" if other else "-")
        rows.append([*row, e.at().limiter])
    return heads, rows


def ranges_table() -> Table:
    """The table of the assumptions that are ranges."""
    result = Table("Assumed, by the time that follows", *assumptions.RANGE_HEADS)
    for row in assumptions.range_rows():
        result.add_row(*row)
    return result
