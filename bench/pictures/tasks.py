"""The pictures of the results of examples/many_tasks.py and bench.tasks."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..measure.names import named
from ..measure.store import by_case
from ..rivals.tasks import LABELS, STAGES, WAYS
from .figures import save

COLOURS = {named("lora-peft"): "tab:orange", "LoTR": "tab:blue"}


def draw_tasks(run: dict, folder: Path) -> list[Path]:
    """For one run: time of a batch against the number of its tasks."""
    return save({f"many-tasks-{run['shape']['tokens']}-tokens": _tasks(run)}, folder, dpi=120)


def _tasks(run: dict) -> Figure:
    ways = {name: 1000 * row["seconds"] for name, row in run["ways"].items()}
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    ticks: set[int] = set()
    for label, colour in COLOURS.items():
        own = [name for name in ways if name.startswith(f"{label}, ") and name.endswith("in the batch")]
        kinds = [int(name.removeprefix(f"{label}, ").split()[0]) for name in own]
        if kinds:
            axis.plot(kinds, [ways[name] for name in own], marker="o", color=colour, label=f"{label}, mixed")
        ticks |= {*kinds}
    axis.axhline(ways["LoTR, one adapter"], color=COLOURS["LoTR"], linestyle=":", label="LoTR, one adapter for all rows")
    axis.axhline(ways["no adapter"], color="grey", linestyle="--", label="no adapter")
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_ylim(top=1.08 * axis.get_ylim()[1])  # no point on the frame
    axis.set_xticks(sorted(ticks), [str(n) for n in sorted(ticks)])
    axis.set_xlabel(f"tasks in a batch of {run['shape']['rows']} rows")
    axis.set_ylabel("milliseconds per batch")
    tokens = run["shape"]["tokens"]
    axis.set_title(f"{tokens} token{'s' * (tokens > 1)} per row, r = {run['shape']['rank']}\n{run['machine']['name']}")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    return figure


def place(case: dict) -> str:
    sizes = f"{case['rows']} rows of {case['tokens']} tokens, {case['tasks']:,} tasks, width {case['hidden']}"
    threads = f"{case['threads']} thread{'s' * (case['threads'] > 1)}"
    return f"{sizes}, {case['blocks']} blocks, r = {case['r']}, {case['dtype']}, {threads}"


def draw_training(cells: list[dict], folder: Path) -> list[Path]:
    """Bars of the results of bench.tasks: each part of a step over the whole step of one adapter, a panel per case."""
    found = by_case(cells)
    if not found:
        return []
    figure, axes = plt.subplots(len(found), 1, figsize=(9, 3.2 * len(found)), layout="constrained", squeeze=False)
    shades = dict(zip(STAGES, ("#9ecae1", "tab:blue", "tab:orange"), strict=True))
    for axis, (case, own) in zip(axes.flat, found):
        names = [name for name in reversed(WAYS) if name in own]
        # of the paired excess, each stage has its share
        parts = {name: sum(own[name][stage]["seconds"][1] for stage in STAGES) for name in names}
        scale = {name: 100 * (1 + own[name]["step"]["excess"][1]) / parts[name] for name in names}
        left = [0.0] * len(names)
        for stage, colour in shades.items():
            width = [scale[name] * own[name][stage]["seconds"][1] for name in names]
            axis.barh(range(len(names)), width, left=left, color=colour, label=stage)
            left = [a + b for a, b in zip(left, width)]
        for i, name in enumerate(names):
            low, middle, high = (100 * (1 + value) for value in own[name]["step"]["excess"])
            axis.errorbar(middle, i, xerr=[[max(middle - low, 0)], [max(high - middle, 0)]], color="k", lw=1)
        axis.axvline(100, color="k", lw=0.8, ls=":")
        axis.set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=8)
        axis.set_xlabel("% of one adapter's step", fontsize=8)
        axis.set_title(place(case), fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STAGES), fontsize=8)
    figure.suptitle(f"A training step of many tasks\n{cells[-1]['machine']['name']}", fontsize=10)
    return save({"tasks": figure}, folder)
