"""Pictures of bench.evidence: the share of full fine-tuning's gain against parameters, one per task and one for README."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from ..pictures.figures import save
from .digest import Digest, Point, digests
from .table import setting_text

SERIES = 6
STYLES = {  # colour and line; the first SERIES that a task has are drawn, the tables have all
    "lotr": ("tab:blue", "o-"),
    "lora": ("tab:red", "o-"),
    "lotr-width": ("tab:cyan", "v--"),
    "lotr-core-gradient": ("tab:green", "s:"),
    "lotr-block": ("tab:purple", "D--"),
    "lotr-core": ("tab:olive", "x:"),
    "dora": ("tab:pink", "P-"),
}
CORNERS = {"lotr": (4, -11), "lora": (-4, 7)}  # the offset of a point's rank label; labels on all lines would overlap


def draw_evidence(folder: Path) -> list[Path]:
    """<task>.png of each task that has runs, and evidence.png of the main ones."""
    found = [one for one in digests(folder) if any(p.method in STYLES for p in one.points)]
    figures: dict[str, Figure | None] = {one.task.name: _task(one) for one in found}
    main = [one for one in found if one.task.main]
    if found:
        figures["evidence"] = _main(main) if main else None
    return save(figures, folder)


def _task(one: Digest) -> Figure:
    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    _panel(axis, one, _drawn([one]))
    axis.set_ylabel(_measure(one))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))  # outside, because inside it would hide points
    axis.set_title(f"{one.task.title}\n{setting_text(one)}", fontsize=10)
    return figure


def _main(found: list[Digest]) -> Figure:
    figure, axes = plt.subplots(1, len(found), figsize=(max(8, 3.6 * len(found)), 4), layout="constrained", squeeze=False)
    drawn = _drawn(found)
    handles: dict[str, object] = {}
    for axis, one in zip(axes.flat, found):
        _panel(axis, one, drawn)
        axis.set_title(one.task.title, fontsize=9)
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    axes[0, 0].set_ylabel(_measure(found[0]))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _drawn(found: list[Digest]) -> list[str]:
    have = {p.method for one in found for p in one.points}
    return [method for method in STYLES if method in have][:SERIES]


def _measure(one: Digest) -> str:
    return "share of full fine-tuning's gain, %" if one.shares else f"held-out loss, {one.task.unit}"


def _panel(axis: Axes, one: Digest, drawn: list[str]) -> None:
    """A line per method, with 95 % intervals if known; full fine-tuning as a horizontal line."""
    for method in drawn:
        own = sorted(one.of(method), key=lambda p: p.parameters)
        if not own:
            continue
        colour, line = STYLES[method]
        values = [_value(one, p) for p in own]
        sizes, middle = [p.parameters for p in own], [value[0] for value in values]
        spread = [[m - low for m, low, _ in values], [high - m for m, _, high in values]]
        axis.errorbar(
            sizes, middle, spread, fmt=line, color=colour, label=own[0].label, ms=5, capsize=3, lw=1.4, elinewidth=0.9
        )
        for size, value, p in zip(sizes, middle, own) if method in CORNERS else ():
            axis.annotate(str(p.rank), (size, value), CORNERS[method], textcoords="offset points", fontsize=8, color=colour)
    for full in one.of("full"):
        axis.axhline(_value(one, full)[0], color="0.6", lw=1, ls="--")
    axis.margins(y=0.1)
    axis.set(xscale="log", xlabel="trained numbers (small figures: rank)")
    least, most = axis.get_xlim()
    subs = (1, 2, 5) if most < 100 * least else (1, 3)  # labels of a wider range would overlap
    axis.xaxis.set(major_locator=LogLocator(subs=subs), major_formatter=EngFormatter(sep=""), minor_locator=NullLocator())
    axis.grid(alpha=0.3)


def _value(one: Digest, point: Point) -> tuple[float, float, float]:
    """The middle and both ends, in per cent if they are shares."""
    shown, unit = (point.share, 100.0) if one.shares else (point.loss, 1.0)
    low, high = (shown.value if end is None else end for end in (shown.low, shown.high))
    return unit * shown.value, unit * min(low, shown.value), unit * max(high, shown.value)
