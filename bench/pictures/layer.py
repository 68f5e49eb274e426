"""Pictures of the layer results: bars against rivals, excess against tokens and against rank, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

from ..measure.names import COLOURS, EXTRA_FLOPS, name_of
from ..measure.shapes import Case
from .figures import save

FEW = 128  # tokens; below, an excess is several hundred per cent, far above all other bars
LEAST_POINTS = 3  # of a line: two do not show a shape
LEAST_INCHES, AROUND_INCHES = 8.0, 0.9  # width of a title or of a legend with five columns; height of the two
Panel = tuple[int, str]  # threads, dtype
# the first five of the measured ones are drawn, and the extra FLOPs; the tables have all
DRAWN = ("lotr_ext", "lora-lorafusion", "lora-unsloth", "lora-peft", "lora-eager", "lora-in-place-beta", "lotr-eager", *COLOURS)


def _panels(cells: list[dict]) -> list[Panel]:
    return sorted({(c["case"]["threads"], c["case"]["dtype"]) for c in cells})


def _of(cells: list[dict], panel: Panel) -> list[dict]:
    return [c for c in cells if (c["case"]["threads"], c["case"]["dtype"]) == panel]


def _title(panel: Panel, cells: list[dict]) -> str:
    on_gpu = "cuda" in cells[0]["machine"]
    return panel[1] if on_gpu else f"{panel[1]}, {panel[0]} thread{'s' * (panel[0] > 1)}"


def _place(cell: dict) -> str:
    c = cell["case"]
    return f"{c['m']}x{c['k']}x{c['n']}\nr = {c['r']}"


def _grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    size = max(width * columns, LEAST_INCHES), height * rows + AROUND_INCHES
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def _finish(figure: Figure, axes: list[Axes], title: str, cells: list[dict]) -> Figure:
    """Adds a legend below with every label once, and a title with the machine."""
    handles: dict[str, object] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"{title}\n{cells[-1]['machine']['name']}", fontsize=10)
    return figure


def _bars(axis: Axes, cells: list[dict], value: Callable[[dict], tuple[float, float, float]]) -> list[str]:
    """Draws groups of bars, a group per shape and a bar per rival, with quartiles; returns the groups' names."""
    names = list(dict.fromkeys(_place(c) for c in cells))
    rivals = [r for r in COLOURS if any(c["rival"] == r for c in cells)]
    for i, rival in enumerate(rivals):
        own = {_place(c): c for c in cells if c["rival"] == rival}
        places, values = [], []
        for j, name in enumerate(names):
            if name in own:
                places.append(j + (i - (len(rivals) - 1) / 2) * 0.8 / len(rivals))
                values.append(value(own[name]))
        low, middle, high = zip(*values)
        spread = [[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]]
        style = {"color": COLOURS[rival], "label": name_of(next(iter(own.values()))), "error_kw": {"lw": 0.8}}
        axis.bar(places, middle, 0.8 / len(rivals), yerr=spread, **style)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    return names


def _excess(cells: list[dict]) -> Figure | None:
    """Bars of every rival's excess over the frozen layer, at the shapes at which most rivals were measured."""
    counts: dict[str, int] = {}
    for c in cells:
        counts[_place(c)] = counts.get(_place(c), 0) + 1
    many = [c for c in cells if c["case"]["m"] >= FEW]
    first = sorted({_place(c) for c in many}, key=lambda p: -counts[p])[:7]
    many = [c for c in many if _place(c) in first]
    if not many:
        return None
    panels = _panels(many)
    figure, axes = _grid(len(panels), 1, 11, 2.7)
    for axis, panel in zip(axes, panels):
        shown = _of(many, panel)
        names = _bars(axis, shown, lambda c: tuple(100 * v for v in c["step"]["excess"]))
        for j, name in enumerate(names):
            level = 100 * Case(**next(c["case"] for c in shown if _place(c) == name)).extra_flops()
            axis.plot([j - 0.42, j + 0.42], [level, level], "k--", lw=1, label=EXTRA_FLOPS if j == 0 else None)
        axis.set(title=_title(panel, cells), ylabel="over the frozen layer, %")
    return _finish(figure, axes, "Forward + backward of one adapted layer: time over the frozen layer", cells)


def _sweep(cells: list[dict], axis_of: str, title: str) -> Figure | None:
    """Lines of excess against tokens ("m") or rank ("r"), at the (K, N) and the other one with most measured points. Panels of
    fewer than LEAST_POINTS are left out."""
    other = {"m": "r", "r": "m"}[axis_of]
    points: dict[tuple, set[int]] = {}
    for c in cells:
        points.setdefault((c["case"]["k"], c["case"]["n"], c["case"][other]), set()).add(c["case"][axis_of])
    if not points:
        return None
    k, n, fixed = max(points, key=lambda p: len(points[p]))
    cells = [c for c in cells if (c["case"]["k"], c["case"]["n"], c["case"][other]) == (k, n, fixed)]
    panels = [p for p in _panels(cells) if len({c["case"][axis_of] for c in _of(cells, p)}) >= LEAST_POINTS]
    if not panels:
        return None
    figure, axes = _grid(len(panels), 2, 4.6, 3.2)
    for axis, panel in zip(axes, panels):
        shown = sorted(_of(cells, panel), key=lambda c: c["case"][axis_of])
        for rival, colour in COLOURS.items():
            own = [c for c in shown if c["rival"] == rival and c["step"]["excess"][1] > 0]
            if own:
                percent = [100 * c["step"]["excess"][1] for c in own]
                axis.plot([c["case"][axis_of] for c in own], percent, "o-", color=colour, label=name_of(own[0]), ms=4, lw=1.2)
        extra = {c["case"][axis_of]: 100 * Case(**c["case"]).extra_flops() for c in shown}
        axis.plot(list(extra), list(extra.values()), "k--", lw=1, label=EXTRA_FLOPS)
        axis.set(xscale="log", yscale="log", ylabel="over the frozen layer, % (log)", title=_title(panel, cells))
        axis.set_xlabel("tokens M (log)" if axis_of == "m" else "rank r (log)")
        axis.set_xticks(list(extra), [str(v) for v in extra], fontsize=8, rotation=45)  # neighbours differ by a factor of 2
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))  # most are within one decade
        axis.tick_params(axis="y", labelsize=8)
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.grid(alpha=0.3, which="both")
    where = f"{k} x {n}, " + (f"r = {fixed}" if other == "r" else f"M = {fixed}")
    return _finish(figure, axes, f"{title}: {where}, forward + backward", cells)


def _memory(cells: list[dict]) -> Figure | None:
    """Bars of the bytes kept for backward and of the peak, which do not depend on threads."""
    cells = [c for c in cells if "peak_bytes" in c and c["case"]["m"] >= FEW]
    if not cells:
        return None
    dtype = cells[0]["case"]["dtype"]
    first = list(dict.fromkeys(_place(c) for c in cells))[:6]
    threads = min(c["case"]["threads"] for c in cells)
    cells = [c for c in cells if _place(c) in first and c["case"]["dtype"] == dtype and c["case"]["threads"] == threads]
    figure, axes = _grid(2, 1, 11, 2.7)
    titles = {"saved_bytes": "kept for backward", "peak_bytes": "most allocated during forward + backward"}
    for axis, (field, title) in zip(axes, titles.items()):
        _bars(axis, cells, lambda c, field=field: (c[field] / 2**20,) * 3)
        axis.set(title=f"{title}, {dtype}", ylabel="MiB")
    return _finish(figure, axes, "Memory of one adapted layer", cells)


def draw(cells: list[dict], folder: Path) -> list[Path]:
    """The pictures of layer.jsonl that can be drawn from the cells."""
    drawn = [rival for rival in dict.fromkeys(DRAWN) if any(c["rival"] == rival for c in cells)][:5]
    cells = [c for c in cells if c["rival"] in drawn]
    figures = {
        "excess": _excess(cells),
        "tokens": _sweep(cells, "m", "Time over the frozen layer against tokens"),
        "rank": _sweep(cells, "r", "Time over the frozen layer against rank"),
        "memory": _memory(cells),
    }
    return save(figures, folder)
