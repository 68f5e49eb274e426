"""The picture of what examples/many_tasks.py kept."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..measure.names import named, renamed
from .plots import save

COLOURS = {named("lora-peft"): "tab:orange", "LoTR": "tab:blue"}


def draw_tasks(run: dict, folder: Path) -> list[Path]:
    """Of one run: time of a batch against the tasks in it."""
    return save({f"many-tasks-{run['shape']['tokens']}-tokens": _tasks(run)}, folder, dpi=120)


def _tasks(run: dict) -> Figure:
    ways = {renamed(name): 1000 * row["seconds"] for name, row in run["ways"].items()}
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
    axis.set_ylabel("milliseconds a batch")
    tokens = run["shape"]["tokens"]
    axis.set_title(f"{tokens} token{'s' * (tokens > 1)} a row, r = {run['shape']['rank']}\n{run['machine']['name']}")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    return figure
