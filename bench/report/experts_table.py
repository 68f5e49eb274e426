"""The results of bench.experts as a table."""

from __future__ import annotations

from ..measure.session import ROUNDS
from ..measure.store import by_case
from ..pictures.experts import place
from ..rivals.experts import HEADS, OURS, SHAPES, row_of
from . import tables


def experts_table(cells: list[dict], pictures: dict[str, str]) -> str:
    """A table in Markdown for all cases; pictures: name -> link."""
    found = by_case(cells)
    shapes = ",".join(dict.fromkeys("x".join(map(str, list(case.values())[:6])) for case, _ in found))
    usual = {"shapes": SHAPES["cuda" if tables.on_gpu(cells) else "cpu"], "dtypes": "fp32", "rounds": ROUNDS["experts"]}
    dtypes = ",".join(dict.fromkeys(c["case"]["dtype"] for c in cells))
    options = {"shapes": shapes, "dtypes": dtypes, "rounds": max(c["rounds"] for c in cells)}
    again = tables.command("experts", cells, options, usual)
    lines = [f"{again}: experts of one layer, forward + backward, over the frozen ones; {tables.where(cells)}:", ""]
    for case, own in found:
        rows = []
        for name, cell in own.items():
            row = row_of(cell, list(own.values()))
            rows.append([f"**{row[0]}**" if name == OURS else row[0], *row[1:]])
        lines += [*tables.markdown([place(case), *HEADS[1:]], rows), ""]
    if "experts" in pictures:
        lines += [f"![what adapters add to the frozen experts]({pictures['experts']})"]
    return "\n".join(lines).rstrip()
