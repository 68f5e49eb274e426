"""Picture of the frontier: held-out accuracy against the adapter's trained numbers, a line a way; five ways and the head."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from ..frontier.table import Point, points, title
from .plots import save

# colour, line, and where a point's rank stands; the table has all ways
BELOW, LEFT_ABOVE = (4, -10), (-12, 4)
STYLES = {
    "lotr": ("tab:blue", "o-", BELOW),
    "lotr-width": ("tab:cyan", "v--", LEFT_ABOVE),
    "lora": ("tab:red", "o-", LEFT_ABOVE),
    "lora-linear": ("tab:orange", "^--", BELOW),
    "vera": ("tab:pink", "D", BELOW),
}


def draw_frontier(cells: list[dict], folder: Path) -> list[Path]:
    """Means over seeds with their range; the head alone as a band, since its adapter has no numbers."""
    found = points(cells)
    if not found:
        return save({"frontier": None}, folder)
    figure, axis = plt.subplots(figsize=(10.5, 4.6), layout="constrained")
    for way, (colour, style, corner) in STYLES.items():
        own = [p for p in found if p.way == way]
        if not own:
            continue
        sizes, means = [p.parameters for p in own], [100 * p.mean for p in own]
        look = {"fmt": style, "color": colour, "ms": 5, "capsize": 2, "lw": 1.4, "elinewidth": 0.8}
        axis.errorbar(sizes, means, _spread(own), label=own[0].label, **look)
        for size, mean, p in zip(sizes, means, own):
            axis.annotate(str(p.rank), (size, mean), corner, textcoords="offset points", fontsize=7, color=colour)
    for p in (p for p in found if p.parameters == 0):
        axis.axhspan(100 * min(p.accuracies), 100 * max(p.accuracies), color="0.85")
        axis.axhline(100 * p.mean, color="0.5", lw=1, label=p.label)
    axis.set(xscale="log", xlabel="trained numbers of the adapter (small figures: rank)", ylabel="held-out accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))  # beside it: inside it would hide points
    seeds = sorted({len(p.accuracies) for p in found})
    count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    figure.suptitle(f"{title(cells)}; {count} seed{'s' * (seeds[-1] > 1)}", fontsize=10)
    return save({"frontier": figure}, folder)


def _spread(own: list[Point]) -> list[list[float]]:
    below = [100 * (p.mean - min(p.accuracies)) for p in own]
    return [below, [100 * (max(p.accuracies) - p.mean) for p in own]]
