"""The picture of the model of the machine code: each kernel's share of bandwidth, and a breakdown of its time."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from ..measure.names import LIGHT_BLUE
from ..projection.cards import CARDS
from ..projection.model import Estimate
from ..projection.predict import Key
from ..projection.predictions import Compared
from ..projection.table import LABEL
from .figures import save

PARTS = {
    "reading and writing its bytes at the data sheet's bandwidth": "tab:blue",
    "bandwidth not reached, or another limit of the loop": "tab:orange",
    "start of the kernel": "0.75",
    "sums over blocks at the end": "tab:red",
}


def _stack(e: Estimate) -> list[float]:
    """Seconds of PARTS; together they are the estimate's."""
    t = e.at()
    least = min(e.least_seconds, t.parts["waves"])
    return [least, t.parts["waves"] - least, t.parts["begin"], t.parts["after"]]


def draw_static(found: dict[Key, Estimate], folder: Path) -> list[Path]:
    """A panel per GPU, a bar per kernel and rank: shares of its time, for the first shape and dtype."""
    if not found:
        return []
    first = next(iter(found))
    own = {key: e for key, e in found.items() if (key[1], key[2], key[4]) == (first[1], first[2], first[4])}
    gpus = list(dict.fromkeys(key[5] for key in own))
    names = list(dict.fromkeys((key[3], key[0]) for key in own))[::-1]  # from bottom to top; a GPU may lack some
    figure, axes = plt.subplots(
        1, len(gpus), figsize=(max(3.1 * len(gpus), 8), 5.2), layout="constrained", squeeze=False, sharey=True
    )
    for axis, gpu in zip(axes.flat, gpus):
        bars = {key: e for key, e in own.items() if key[5] == gpu}
        places = [names.index((key[3], key[0])) for key in bars]
        left = [0.0] * len(bars)
        for i, (label, colour) in enumerate(PARTS.items()):
            widths = [1e6 * _stack(e)[i] for e in bars.values()]
            axis.barh(places, widths, left=left, color=colour, label=label if axis is axes.flat[0] else None)
            left = [a + b for a, b in zip(left, widths)]
        for place, end, e in zip(places, left, bars.values()):
            axis.text(end, place, f" {e.at().share:.0%}", va="center", fontsize=7)
        axis.set_yticks(range(len(names)), [f"{kernel}, r = {r}" for r, kernel in names], fontsize=8)
        axis.set_xlim(0, 1.18 * max(left))
        axis.set_title(CARDS[gpu].name, fontsize=9)
        axis.set_xlabel("us; %: of the bandwidth", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(f"Kernels at {first[1]} x {first[2]}, {first[4]}: {LABEL}", fontsize=10)
    return save({"static": figure}, folder)


def draw_predicted(found: list[Compared], folder: Path) -> list[Path]:
    """Measured over the likely prediction, a point per value, with the prediction's interval."""
    if not found:
        return save({"predicted": None}, folder)
    figure, axis = plt.subplots(figsize=(8, 0.26 * len(found) + 1.4), layout="constrained")
    for place, one in enumerate(reversed(found)):
        low, likely, high = one.predicted
        axis.barh(place, (high - low) / likely, left=low / likely, color=LIGHT_BLUE)
        axis.plot(one.ratio, place, "o", color="tab:blue" if one.inside else "tab:red", ms=4)
    axis.axvline(1, color="k", lw=0.8)
    axis.margins(0.02, 0.01)
    axis.set_yticks(range(len(found)), [one.what for one in reversed(found)], fontsize=7)
    axis.set_xlabel("measured over the likely prediction; bars: from low to high; red: outside", fontsize=8)
    axis.set_title(f"Measured beside predicted: {folder.name}", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    return save({"predicted": figure}, folder)
