"""Tables of row_core: its counts, and the estimates by the model of its machine code."""

from __future__ import annotations

from pathlib import Path

from ..measure.store import Store
from ..projection import row_model as row_model
from ..projection.row_counts import CASES, FILE, HEADS, MULTIPROCESSORS, Key, RowCounts, cells_of, kept, needed, parse
from ..projection.table import LABEL
from . import tables


def row_counts(results: Path) -> dict[Key, RowCounts]:
    """The kept counts of the newest sources that were counted, of the usual cases."""
    found = kept(Store(results / "simt-executor" / FILE))
    return {key: found[key] for key in needed(parse(CASES)) if key in found}


def rows_table(found: dict[Key, RowCounts]) -> str:
    """Counted bytes of row_core and its backward: a row per operator and case."""
    title = (
        f"`python -m bench.traffic`, no GPU: row_core, the product with a core per row, bf16, planned for {MULTIPROCESSORS} "
        "SMs. Least: every operand and every core with rows once. The backward adds k in float32, the sorted order, and "
        "partial sums. Each block that has rows of a core reads the core again, from L2:"
    )
    lines = [cells_of(operator, case, row) for (operator, case, _), row in found.items()]
    return "\n".join([title, "", *tables.markdown(list(HEADS), lines, 3)])


def static_rows_table(results: Path) -> str:
    """The newest estimates of row_core and its backward; empty without any."""
    found = row_model.kept(Store(results / "simt-executor" / row_model.FILE))
    if not found:
        return ""
    heads, rows = row_model.markdown_rows(found)
    title = (
        f"`python -m bench.static`, no GPU: row_core, bf16: {LABEL}. An operator's launches follow one another; what the "
        "library sorts before them is left out:"
    )
    return "\n".join([title, "", *tables.markdown(heads, rows, 4)])
