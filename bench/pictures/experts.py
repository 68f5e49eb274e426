"""The picture of the results of bench.experts."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from ..measure.store import by_case
from ..rivals.experts import FLOOR, LABELS, OURS
from .figures import save


def place(case: dict) -> str:
    sizes = f"{case['m']} tokens, {case['e']} experts of H {case['h']}, I {case['i']}, top {case['top_k']}"
    return f"{sizes}, r = {case['r']}, {case['dtype']}, {case['threads']} thread{'s' * (case['threads'] > 1)}"


def draw_experts(cells: list[dict], folder: Path) -> list[Path]:
    """Bars of the excess over the frozen experts, and of the peak above theirs, two panels per case."""
    found = by_case(cells)
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
