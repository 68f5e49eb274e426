"""The picture of the results of examples/evolve.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import save

WAYS = {
    "start": ("start", "0.55"),
    "CoreES": ("CoreES:\nforwards alone", "tab:blue"),
    "Adam": ("Adam on\ncross-entropy", "tab:orange"),
}


def draw_evolution(run: dict, folder: Path) -> list[Path]:
    """For one run: the accuracy, the sums, and the throughput of a population."""
    return save({"evolve": _evolution(run)}, folder, dpi=120)


def _evolution(run: dict) -> Figure:
    parts = [name for name in ("accuracy", "sums", "speed") if run.get(name)]
    figure, axes = plt.subplots(1, len(parts), figsize=(4.2 * len(parts), 4), layout="constrained", squeeze=False)
    for axis, part in zip(axes[0], parts):
        {"accuracy": _accuracy, "sums": _sums, "speed": _speed}[part](axis, run)
        axis.grid(alpha=0.3, axis="y")
    seeds = run["shape"]["seeds"]
    error = "95 % intervals over seeds" if seeds > 1 else "no interval"
    figure.suptitle(f"{seeds} seed{'s' * (seeds > 1)}, {error}\n{run['machine']['name']}", fontsize=9)
    return figure


def _points(axis: Axes, rows: dict[str, list[float | None]], ways: list[str], shift: float, marker: str, label: str) -> None:
    for x, way in enumerate(ways):
        mean, half = rows[way]
        error = 0 if half is None else 100 * half
        first = label if x == 0 else None
        axis.errorbar(x + shift, 100 * mean, error, fmt=marker, color=WAYS[way][1], capsize=4, markersize=8, label=first)
        axis.annotate(f"{100 * mean:.1f}", (x + shift, 100 * mean), (8, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_xticks(range(len(ways)), [WAYS[way][0] for way in ways])
    axis.set_xlim(-0.5, len(ways) - 0.3)


def _accuracy(axis: Axes, run: dict) -> None:
    _points(axis, run["summary"]["accuracy"], ["start", "CoreES", "Adam"], 0.0, "o", "")
    axis.set_ylabel("held-out accuracy, %")
    axis.set_title("MiniLM: good film or bad", fontsize=10)


def _sums(axis: Axes, run: dict) -> None:
    for shift, marker, part in ((-0.12, "o", "rewarded"), (0.12, "s", "held out")):
        _points(axis, run["summary"][f"sums, {part}"], ["start", "CoreES"], shift, marker, f"sums {part}")
    axis.set_ylabel("sums written exactly right, %")
    axis.set_title("SmolLM2-135M: an exact match", fontsize=10)
    axis.legend(fontsize=8, loc="upper left")


def _speed(axis: Axes, run: dict) -> None:
    found = run["speed"]["by_members"]
    members = [int(n) for n in found]
    axis.plot(members, [row["over_base"] for row in found.values()], marker="o", color="tab:blue", label="a member in each row")
    axis.axhline(1.0, color="0.55", linestyle="--", label="base model, same rows")
    axis.axhline(0.9, color="tab:red", linestyle=":", label="target")
    axis.set(xscale="log", ylim=(0, 1.15), xlabel="members in one forward", ylabel="throughput over the base model")
    axis.set_xticks(members, [str(n) for n in members])
    axis.minorticks_off()
    axis.set_title(f"MiniLM, {run['speed']['tokens']} tokens per row, r = 16", fontsize=10)
    axis.legend(fontsize=8, loc="lower left")
