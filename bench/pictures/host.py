"""The picture of the host times of bench.host."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from ..measure.store import by_case
from ..rivals import host as rh
from .figures import save

COLOURS = {
    rh.FLOOR: "0.8",
    rh.LORA: "tab:orange",
    "lora-peft": "tab:red",
    rh.LOTR: "0.45",
    rh.LOTR_OWN: "0.6",
    rh.ALONE: "tab:purple",
    rh.SHARED: "tab:cyan",
    rh.IN_MODEL: "tab:blue",
}


def place(case: dict) -> str:
    tokens = f"{case['m']} token{'s' * (case['m'] > 1)}"
    return f"{tokens}, {'q, k, v' if case['form'] == 'siblings' else 'chained'}"


def draw_host(cells: list[dict], folder: Path) -> list[Path]:
    """Bars of us per layer, forward and backward (lighter), a panel per case."""
    cases = by_case(cells)
    if not cases:
        return []
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    names = [name for name in rh.RIVALS if all(name in own for _, own in cases)]  # the others are only in the table
    size = (4.2 * columns + 1.6, (0.3 * len(names) + 0.9) * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    for axis, (case, own) in zip(axes.flat, cases):
        for where, name in enumerate(reversed(names)):
            cell = own[name]
            forward, backward = (1e6 * cell[d]["seconds"][1] for d in ("forward", "backward"))
            low, middle, high = (1e6 * s for s in cell["step"]["seconds"])
            axis.barh(where, forward, color=COLOURS[name])
            axis.barh(where, backward, left=forward, color=COLOURS[name], alpha=0.55)
            axis.errorbar(middle, where, xerr=[[max(middle - low, 0)], [max(high - middle, 0)]], color="k", lw=1)
        axis.set_xlim(0, 1.2 * max(1e6 * own[name]["step"]["seconds"][1] for name in names))  # error bars may exceed the panel
        axis.set_title(place(case), fontsize=9)
        axis.set_xlabel("us per layer: forward, backward (lighter)", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    for row in axes:
        row[0].set_yticks(range(len(names)), [rh.RIVALS[name].label for name in reversed(names)], fontsize=8)
    case = cases[0][0]
    threads = f"{case['threads']} thread{'s' * (case['threads'] > 1)}"
    where = f"{case['layers']} layers {case['k']} x {case['k']}, {case['dtype']}, {threads}"
    figure.suptitle(f"Host time of a layer whose products cost nothing: {where}\n{cells[-1]['machine']['name']}", fontsize=10)
    return save({"host": figure}, folder)
