"""Pictures of the model, shared-gradient and kernel results, and of the projection from counted bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from ..measure.shapes import Shape
from ..traffic.counts import Key, Row
from ..traffic.projection import FLOPS_REACHED, GPUS, LABEL, Times, excess
from .plots import save

MODEL_COLOURS = {"lora": "tab:orange", "vera": "tab:pink", "lotr-eager": "0.55", "lotr_ext": "tab:blue", "frozen": "0.8"}
PROJECTED = {
    "lotr-eager": "0.55",
    "lora-eager": "tab:orange",
    "lora-in-place": "tab:green",
    "lora-in-place-beta": "tab:olive",
    "lotr_ext two_pass": "tab:cyan",
    "lotr_ext beta": "tab:blue",
    "least possible": "0.85",
}


def _colour(rival: str) -> str:
    return next(colour for prefix, colour in MODEL_COLOURS.items() if rival.startswith(prefix))


def draw_model(cells: list[dict], folder: Path) -> list[Path]:
    """Step time (stacked: forward, backward, optimizer) and peak memory of every method, for the first case."""
    if not cells:
        return []
    case = cells[0]["case"]
    cells = [c for c in cells if c["case"] == case]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.4 * len(cells) + 1.4), layout="constrained", sharey=True)
    places = list(range(len(cells)))[::-1]
    for place, c in zip(places, cells):
        parts = [c["forward"]["seconds"][1], c["backward"]["seconds"][1], c["optimizer_seconds"]]
        begin = 0.0
        for part, alpha in zip(parts, (1.0, 0.65, 0.35)):
            left.barh(place, 1e3 * part, left=begin, color=_colour(c["rival"]), alpha=alpha, edgecolor="white")
            begin += 1e3 * part
        low, middle, high = (1e3 * s for s in c["step"]["seconds"])
        left.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="k", lw=1)
        right.barh(place, c["peak_bytes"] / 2**20, color=_colour(c["rival"]))
    names = [c["label"] + (f", r = {c['rank']}" if c["rank"] else "") for c in cells]
    left.set_yticks(places, names, fontsize=8)
    left.set(xlabel="ms a step: forward, backward (lighter), optimizer (lightest)")
    right.set(xlabel="MiB allocated at the peak of a step")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    where = f"{case['model']}, {case['batch']} x {case['sequence']} tokens, {case['dtype']}, {case['threads']} thread(s)"
    figure.suptitle(f"Training one model with each method: {where}\n{cells[-1]['machine']['name']}", fontsize=10)
    return save({"model": figure}, folder)


def draw_shared(cells: list[dict], folder: Path) -> list[Path]:
    """Against the number of layers: time of backward, bytes allocated in it, operators launched, error."""
    groups = {(c["case"]["dtype"], c["case"]["threads"]) for c in cells}
    if not groups:
        return []
    dtype, threads = min(groups, key=lambda g: (g[0] != "fp32", g[1]))
    cells = [c for c in cells if (c["case"]["dtype"], c["case"]["threads"]) == (dtype, threads)]
    values = {
        "backward, ms": lambda c: 1e3 * c["backward"]["seconds"][1],
        "allocated in backward, MiB": lambda c: c["allocated_bytes"] / 2**20,
        "operators or kernels in backward": lambda c: c["launches"],
        "error of dA against float64": lambda c: c["error"],
    }
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for axis, (name, value) in zip(axes, values.items()):
        for rival, colour in (("autograd", "tab:orange"), ("lotr_ext", "tab:cyan"), ("lotr_ext-scope", "tab:blue")):
            own = sorted((c for c in cells if c["rival"] == rival), key=lambda c: c["case"]["layers"])
            if own:
                style = {"color": colour, "label": own[0]["label"], "ms": 4}
                axis.plot([c["case"]["layers"] for c in own], [value(c) for c in own], "o-", **style)
        axis.set(xlabel="layers on one A and B", title=name)
        axis.set_xticks(sorted({c["case"]["layers"] for c in cells}))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    c = cells[-1]["case"]
    where = f"{c['m']} x {c['k']} x {c['k']}, r = {c['r']}, {dtype}, {threads} thread(s)"
    figure.suptitle(f"The shared gradient: {where}; {cells[-1]['machine']['name']}", fontsize=10)
    return save({"shared": figure}, folder)


def draw_kernels(cells: list[dict], folder: Path) -> list[Path]:
    """Our time over the library's, a panel a kernel, a bar a shape."""
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
        axis.bar(range(len(own)), middle, yerr=spread, color="tab:blue", error_kw={"lw": 0.8})
        axis.axhline(1, color="k", lw=0.8, ls="--")
        names = [f"{c['case']['m']}x{c['case']['n']} r{c['case']['r']} {c['case']['dtype']}" for c in own]
        axis.set_xticks(range(len(own)), names, fontsize=6, rotation=90)
        axis.set_title(kernel, fontsize=9)
        axis.set_ylabel("x library", fontsize=8)
    figure.suptitle(f"Each kernel alone over the library's product\n{ours[-1]['machine']['name']}", fontsize=10)
    return save({"kernels": figure}, folder)


def draw_projection(shape: Shape, rows: dict[Key, Row], times: dict[str, Times], folder: Path) -> list[Path]:
    """Bars: projected excess of forward + backward on every GPU of times."""
    gpus = [GPUS[gpu] for gpu in times]
    columns = [excess(shape, rows, GPUS[gpu], own) for gpu, own in times.items()]
    figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
    for i, (name, colour) in enumerate(PROJECTED.items()):
        places = [j + (i - (len(PROJECTED) - 1) / 2) * 0.8 / len(PROJECTED) for j in range(len(gpus))]
        axis.bar(places, [100 * c[name]["step"] for c in columns], 0.8 / len(PROJECTED), color=colour, label=name)
    axis.set_xticks(range(len(gpus)), [gpu.name for gpu in gpus])
    axis.set_ylabel("over the frozen layer, %")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    m, k, n, r = shape
    title = f"{LABEL.capitalize()}: forward + backward of one layer, {m} x {k} x {n}, r = {r}, bf16"
    figure.suptitle(
        f"{title}\nfrom machine code, counted bytes and data sheets; products at {FLOPS_REACHED:.0%} of their peak", fontsize=10
    )
    return save({"projection": figure}, folder)
