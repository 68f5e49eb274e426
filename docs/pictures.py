"""Draws docs/shared_gradient.svg, the picture in README.

python docs/pictures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "lotr_ext"})
LAYERS = ("layer 1", "layer 2", "layer L")
BLUE, ORANGE, GREY = "#dbe9f6", "#fde3cf", "#eeeeee"


def box(axis: Axes, x: float, y: float, w: float, h: float, text: str, colour: str) -> None:
    patch = FancyBboxPatch(
        (x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0.02,rounding_size=0.06", fc=colour, ec="#444444", lw=1
    )
    axis.add_patch(patch)
    axis.text(x, y, text, ha="center", va="center")


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, style: str = "-") -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linestyle=style, lw=1.3))


def frame(axis: Axes, title: str) -> None:
    axis.set(xlim=(0, 6), ylim=(0, 4.3))
    axis.axis("off")
    axis.set_title(title, fontsize=11)


def draw(path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    heights = (3.5, 2.5, 0.9)

    frame(left, "plain autograd: L temporaries, L - 1 additions in A's dtype")
    box(left, 0.7, 2.2, 0.9, 0.6, "A [K, r]", BLUE)
    for name, y in zip(LAYERS, heights):
        box(left, 5.2, y, 1.2, 0.6, name, GREY)
        box(left, 3.1, y, 1.3, 0.6, f"dA of {name}", ORANGE)
        arrow(left, (4.55, y), (3.82, y), "#c04000")
        arrow(left, (2.38, y), (1.2, 2.2 + (y - 2.2) * 0.25), "#c04000")
    left.text(5.2, 1.7, "...", ha="center", fontsize=14)
    left.text(3.1, 1.7, "...", ha="center", fontsize=14)
    left.text(1.6, 0.15, "each dA is a tensor of its own, rounded and summed one by one", fontsize=9, color="#555555")

    frame(right, "lotr_ext: one fp32 sum for all layers, one gradient")
    box(right, 0.7, 2.6, 0.9, 0.6, "A [K, r]", BLUE)
    box(right, 2.6, 2.6, 1.0, 0.6, "hub", BLUE)
    box(right, 2.6, 0.9, 1.3, 0.7, "sum of dA\n[K, r] fp32", ORANGE)
    arrow(right, (1.18, 2.7), (2.06, 2.7), "#2060a0")
    arrow(right, (2.06, 2.5), (1.18, 2.5), "#c04000")
    arrow(right, (2.6, 1.3), (2.6, 2.28), "#c04000")
    for name, y in zip(LAYERS, heights):
        box(right, 5.2, y, 1.2, 0.6, name, GREY)
        arrow(right, (3.15, 2.65), (4.55, y + 0.1), "#2060a0")
        arrow(right, (4.55, y - 0.1), (3.32, 0.9 + (y - 0.9) * 0.12), "#c04000", "--")
    right.text(5.2, 1.65, "...", ha="center", fontsize=14)
    right.text(
        0.1,
        0.1,
        "blue: forward.  dashed: += in place, in a fixed order.  red: backward, once each, cast once",
        fontsize=9,
        color="#555555",
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("shared_gradient.svg"))
