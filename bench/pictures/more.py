"""Pictures of the model, shared-gradient and kernel results, of the projection from counted bytes, and README's."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..measure.names import COLOURS, NAMES, PROJECTED_COLOURS, SHARED_COLOURS, colour_of, name_of
from ..measure.shapes import Shape
from ..measure.summary import METHODS, Summary
from ..projection.cards import CARDS
from ..projection.counts import Key, Row
from ..projection.layer_time import LABEL, Levels, excess
from ..rivals.shared import LABELS
from .figures import save

BAR = 0.8 / len(PROJECTED_COLOURS)
# of a model; only in the table, so that a picture has at most six methods
NOT_DRAWN = ("lora-peft-as-lotr", "vera-peft", "vera-peft-as-lotr", "lotr_ext-as-lora", "lotr_ext-core", "lotr-eager-core")


def draw_model(cells: list[dict], folder: Path) -> list[Path]:
    """A picture per model, of its first case; that of the first model is model.png."""
    models = list(dict.fromkeys(c["case"]["model"] for c in cells))
    figures = {}
    for name in models:
        own = [c for c in cells if c["case"]["model"] == name]
        own = [c for c in own if c["case"] == own[0]["case"]]
        own = [c for c in own if c["rival"] not in NOT_DRAWN] or own
        figures["model" if name == models[0] else f"model-{name}"] = _model(own)
    return save(figures, folder)


def _model(cells: list[dict]) -> Figure:
    """Step time (stacked: forward, backward, optimizer) and peak memory of every method."""
    case = cells[0]["case"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.4 * len(cells) + 1.4), layout="constrained", sharey=True)
    places = list(range(len(cells)))[::-1]
    for place, c in zip(places, cells):
        parts = [c["forward"]["seconds"][1], c["backward"]["seconds"][1], c["optimizer_seconds"]]
        begin = 0.0
        for part, alpha in zip(parts, (1.0, 0.65, 0.35)):
            left.barh(place, 1e3 * part, left=begin, color=colour_of(c["rival"]), alpha=alpha, edgecolor="white")
            begin += 1e3 * part
        low, middle, high = (1e3 * s for s in c["step"]["seconds"])
        left.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="k", lw=1)
        right.barh(place, c["peak_bytes"] / 2**20, color=colour_of(c["rival"]))
    names = [name_of(c) + (f", r = {c['rank']}" if c["rank"] else "") for c in cells]
    left.set_yticks(places, names, fontsize=8)
    left.set(xlabel="ms per step: forward, backward (lighter), optimizer (lightest)")
    right.set(xlabel="MiB allocated at the peak of a step")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    where = f"{case['model']}, {case['batch']} x {case['sequence']} tokens, {case['dtype']}, {_threads(case['threads'])}"
    figure.suptitle(f"Training one model with each method: {where}\n{cells[-1]['machine']['name']}", fontsize=10)
    return figure


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def draw_shared(cells: list[dict], folder: Path) -> list[Path]:
    """Against the number of layers: time of backward, bytes allocated in it, operators launched, error."""
    groups = {(c["case"]["dtype"], c["case"]["threads"]) for c in cells}
    if not groups:
        return []
    dtype, threads = min(groups, key=lambda g: (g[0] != "fp32", g[1]))
    cells = [c for c in cells if (c["case"]["dtype"], c["case"]["threads"]) == (dtype, threads)]
    launched = "kernels" if "cuda" in cells[-1]["machine"] else "operators"
    values = {
        "backward, ms": lambda c: 1e3 * c["backward"]["seconds"][1],
        "allocated in it, MiB": lambda c: c["allocated_bytes"] / 2**20,
        f"{launched} in it": lambda c: c["launches"],
        "error of dA, in 1e-7": lambda c: 1e7 * c["error"],
    }
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    for axis, (name, value) in zip(axes, values.items()):
        for rival, label in LABELS.items():
            own = sorted((c for c in cells if c["rival"] == rival), key=lambda c: c["case"]["layers"])
            if own:
                style = {"color": SHARED_COLOURS[rival], "label": label, "ms": 4}
                line = "o--" if rival == "lotr_ext-scope" else "o-"  # it covers the one of layers by hand
                axis.plot([c["case"]["layers"] for c in own], [value(c) for c in own], line, **style)
        axis.set(xlabel="layers on one A and B", title=name)
        axis.set_ylim(bottom=0)
        axis.set_xticks(sorted({c["case"]["layers"] for c in cells}))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LABELS), fontsize=8)
    c = cells[-1]["case"]
    where = f"{c['m']} x {c['k']} x {c['k']}, r = {c['r']}, {dtype}, {_threads(threads)}"
    figure.suptitle(f"A's and B's gradients summed: {where}; {cells[-1]['machine']['name']}", fontsize=10)
    return save({"shared": figure}, folder)


def draw_kernels(cells: list[dict], folder: Path) -> list[Path]:
    """Our time over the library's, a panel per kernel, a bar per shape."""
    ours = [c for c in cells if c["rival"] == "lotr_ext"]
    if not ours:
        return []
    kernels = list(dict.fromkeys(c["case"]["kernel"] for c in ours))
    columns = min(4, len(kernels))
    rows = -(-len(kernels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.9 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(kernels) :]:
        axis.axis("off")
    for axis, kernel in zip(axes.flat, kernels):
        own = [c for c in ours if c["case"]["kernel"] == kernel][:14]
        low, middle, high = zip(*((1 + v for v in c["step"]["excess"]) for c in own))
        spread = [[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]]
        axis.bar(range(len(own)), middle, yerr=spread, color=COLOURS["lotr_ext"], error_kw={"lw": 0.8})
        axis.axhline(1, color="k", lw=0.8, ls="--")
        names = [f"{c['case']['m']}x{c['case']['n']} r{c['case']['r']} {c['case']['dtype']}" for c in own]
        axis.set_xticks(range(len(own)), names, fontsize=6, rotation=90)
        axis.set_title(kernel, fontsize=9)
        axis.set_ylabel("x library", fontsize=8)
    figure.suptitle(f"Each kernel alone over the library's product\n{ours[-1]['machine']['name']}", fontsize=10)
    return save({"kernels": figure}, folder)


def draw_projection(shape: Shape, rows: dict[Key, Row], levels: dict[str, Levels], folder: Path) -> list[Path]:
    """Bars: projected excess of forward + backward on every GPU of levels, with its interval."""
    columns = [excess(shape, rows, CARDS[gpu], own) for gpu, own in levels.items()]
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    for i, (rival, colour) in enumerate(PROJECTED_COLOURS.items()):
        own = [(j, column[rival]["step"]) for j, column in enumerate(columns) if rival in column]
        places = [j + (i - (len(PROJECTED_COLOURS) - 1) / 2) * BAR for j, _ in own]
        middle = [100 * spread.likely for _, spread in own]
        ends = [[100 * (s.likely - s.low) for _, s in own], [100 * (s.high - s.likely) for _, s in own]]
        axis.bar(places, middle, BAR, yerr=ends, color=colour, label=NAMES.get(rival, rival), error_kw={"lw": 0.8})
    axis.set_xticks(range(len(levels)), [CARDS[gpu].name for gpu in levels])
    axis.set_ylabel("over the frozen layer, %")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    m, k, n, r = shape
    title = f"{LABEL.capitalize()}: forward + backward of one layer, {m} x {k} x {n}, r = {r}, bf16"
    figure.suptitle(f"{title}\nbars: likely assumptions; lines: all of them low, all of them high", fontsize=10)
    return save({"projection": figure}, folder)


def draw_summary(found: Summary | None, folder: Path) -> list[Path]:
    """README's picture: size, memory and time of each method, a panel per quantity."""
    if found is None:
        return save({"summary": None}, folder)
    figure, axes = plt.subplots(1, len(found.panels), figsize=(11, 2.4), layout="constrained", sharey=True)
    for axis, (title, bars) in zip(axes, found.panels.items()):
        for place, rival in enumerate(METHODS):
            if rival in bars:
                value, text = bars[rival]
                axis.barh(place, value, color=colour_of(rival))
                axis.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_title(title, fontsize=8)
        axis.set_xlim(0, 1.6 * max(value for value, _ in bars.values()))
        axis.set_xticks([])
    axes[0].set_yticks(range(len(METHODS)), [NAMES[rival] for rival in METHODS], fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(f"{found.case['model']}, rank {found.case['r']}; {found.where}", fontsize=9)
    return save({"summary": figure}, folder)
