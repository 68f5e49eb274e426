"""The picture of the results of examples/loras_to_bank.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .figures import save

COLOURS = {"layer": "tab:blue", "shape": "tab:green"}
LABELS = {"layer": "bank, factors of each layer", "shape": "bank, one pair for all layers"}


def draw_loras(results: dict, folder: Path) -> list[Path]:
    """For one run: the share of the LoRAs' gain that a bank keeps against its size; a new task's loss against its size."""
    return save({"loras-to-bank": _figure(results)}, folder, dpi=120)


def _figure(results: dict) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _kept(left, results)
    _new(right, results)
    options = results["options"]
    figure.suptitle(
        f"{len(results['tasks'])} LoRAs of rank {options['lora_rank']} as one bank; {results['machine']['name']}", fontsize=10
    )
    return figure


def _points(axis: Axes, rows: dict[str, dict], ways: dict[str, dict], value: str, half: str) -> None:
    for by, colour in COLOURS.items():
        own = [(rows[name], way) for name, way in ways.items() if way["group_by"] == by]
        if own:
            x, y, bars = [r["numbers"] for r, _ in own], [r[value] for r, _ in own], [r[half] for r, _ in own]
            axis.errorbar(x, y, bars, marker="o", capsize=3, color=colour, label=LABELS[by])
            for row, way in own:  # blue above its point and green below: two points may be close to each other
                style = {"textcoords": "offset points", "fontsize": 8, "color": colour}
                axis.annotate(f"r = {way['rank']}", (row["numbers"], row[value]), (6, 5 if by == "layer" else -12), **style)
    axis.set_xscale("log")
    axis.grid(alpha=0.3, which="both")
    axis.margins(x=0.15)


def _kept(axis: Axes, results: dict) -> None:
    axis.plot(results["lora_numbers"], 1.0, "s", color="tab:orange", label="the LoRAs")
    _points(axis, results["ways"], results["ways"], "kept", "kept_half")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel(f"numbers of all {len(results['tasks'])} tasks")
    axis.set_ylabel("gain in held-out loss that is kept")
    axis.set_title("known tasks, converted", fontsize=10)
    axis.legend(fontsize=8)


def _new(axis: Axes, results: dict) -> None:
    base, lora = results["new_base"], results["new_lora"]
    axis.axhline(base["loss"], color="grey", linestyle="--", label="base model")
    axis.plot(lora["numbers"], lora["loss"], "s", color="tab:orange", label="LoRA")
    _points(axis, results["new_task"], results["ways"], "loss", "half")
    axis.set_xlabel("trained numbers")
    axis.set_ylabel("held-out loss; bars: difference to LoRA")
    axis.set_title(f"a new task ({results['new']}): cores over the factors found", fontsize=10)
    handles, labels = axis.get_legend_handles_labels()
    own = [(h, name.replace("bank", "cores")) for h, name in zip(handles, labels)]
    axis.legend(*zip(*own), fontsize=8)
