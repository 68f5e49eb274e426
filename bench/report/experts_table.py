"""The results of bench.experts as a table and a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from ..measure.session import ROUNDS
from ..measure.store import by_case, newest
from ..rivals.experts import FLOOR, HEADS, LABELS, OURS, SHAPES, row_of
from . import tables
from .plots import save


def place(case: dict) -> str:
    sizes = f"{case['m']} tokens, {case['e']} experts of H {case['h']}, I {case['i']}, top {case['top_k']}"
    return f"{sizes}, r = {case['r']}, {case['dtype']}, {case['threads']} thread{'s' * (case['threads'] > 1)}"


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


def draw_experts(cells: list[dict], folder: Path) -> list[Path]:
    """Bars of the excess over the frozen experts, and of the peak above theirs, two panels per case."""
    found = by_case(newest(cells))
    if not found:
        return []
    figure, axes = plt.subplots(len(found), 2, figsize=(11, 1.9 * len(found) + 0.6), layout="constrained", squeeze=False)
    for (left, right), (case, own) in zip(axes, found):
        floor = own[FLOOR]
        cells_of = [cell for name, cell in reversed(own.items()) if name != FLOOR]
        for i, cell in enumerate(cells_of):
            colour = "tab:blue" if cell["rival"] == OURS else "tab:orange" if "peft" in cell["rival"] else "0.6"
            low, middle, high = (100 * value for value in cell["step"]["excess"])
            left.barh(i, middle, color=colour)
            left.errorbar(middle, i, xerr=[[max(middle - low, 0)], [max(high - middle, 0)]], color="k", lw=1)
            right.barh(i, (cell["peak_bytes"] - floor["peak_bytes"]) / 2**20, color=colour)
        for axis, text in ((left, "time over the frozen experts, %"), (right, "peak memory over the frozen experts', MiB")):
            axis.set_yticks(range(len(cells_of)), [LABELS[cell["rival"]] for cell in cells_of], fontsize=8)
            axis.set_xlabel(text, fontsize=8)
            axis.grid(axis="x", alpha=0.3)
            axis.axvline(0, color="k", lw=0.8)
        left.set_title(place(case), fontsize=9, loc="left")
    figure.suptitle(
        f"What an adapter adds to a mixture's experts, forward + backward\n{cells[-1]['machine']['name']}", fontsize=10
    )
    return save({"experts": figure}, folder)
