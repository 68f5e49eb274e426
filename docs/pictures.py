"""Draws the pictures of docs/ that are made by hand: shared_gradient.svg and packages.svg.

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
BLUE, ORANGE, GREEN, GREY = "#dbe9f6", "#fde3cf", "#e0f0dc", "#eeeeee"
FORWARD, BACKWARD = "#2060a0", "#c04000"
# The packages of lotr_ext, from top to bottom, with their contents; below them C++.
PACKAGES = (
    ("interop", "PEFT, LoRA files, llama.cpp, vLLM, Opacus"),
    ("model", "targets, merging, adapters, files, forward scope"),
    ("layers", "LoTRFactors, LoTRLinear, LoTRExperts, lotr_linear, explain"),
    ("autograd", "Call, the Functions, SharedGradient, SharedInput, Bank"),
    ("ops", "operators, planner, composite"),
)
NATIVE = (("csrc/torch", "schemas, checks, outputs"), ("csrc/cpu", "CPU kernels"), ("csrc/cuda", "launchers, kernels"))
# What a training step does in each package, numbered in order of time: (forward, backward).
STEPS = (
    ("", ""),
    ("1 opens a forward scope, 5 closes it", ""),
    ("2 makes a Call", ""),
    ("3 picks nodes and plan", "6 each node's backward, 8 sums handed over"),
    ("4 one operator", "7 one operator"),
)


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


def shared_gradient(path: Path) -> None:
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(6.2, 8.6), layout="constrained")
    heights = (3.5, 2.5, 0.9)

    frame(upper, "plain autograd: L temporaries, L - 1 additions in A's dtype")
    box(upper, 0.7, 2.2, 0.9, 0.6, "A [K, r]", BLUE)
    for name, y in zip(LAYERS, heights):
        box(upper, 5.2, y, 1.2, 0.6, name, GREY)
        box(upper, 3.1, y, 1.3, 0.6, f"dA of {name}", ORANGE)
        arrow(upper, (4.55, y), (3.82, y), BACKWARD)
        arrow(upper, (2.38, y), (1.2, 2.2 + (y - 2.2) * 0.25), BACKWARD)
    upper.text(5.2, 1.7, "...", ha="center", fontsize=14)
    upper.text(3.1, 1.7, "...", ha="center", fontsize=14)
    upper.text(0.1, 0.15, "each dA is a tensor of its own, rounded and summed one by one", fontsize=9, color="#555555")

    frame(lower, "lotr_ext: one fp32 sum for all layers, one gradient")
    box(lower, 0.7, 2.6, 0.9, 0.6, "A [K, r]", BLUE)
    box(lower, 2.6, 2.6, 1.1, 0.6, "LoTRShared", BLUE)
    box(lower, 2.6, 0.9, 1.3, 0.7, "sum of dA\n[K, r] fp32", ORANGE)
    arrow(lower, (1.18, 2.7), (2.02, 2.7), FORWARD)
    arrow(lower, (2.02, 2.5), (1.18, 2.5), BACKWARD)
    arrow(lower, (2.6, 1.3), (2.6, 2.28), BACKWARD)
    for name, y in zip(LAYERS, heights):
        box(lower, 5.2, y, 1.2, 0.6, name, GREY)
        arrow(lower, (3.2, 2.65), (4.55, y + 0.1), FORWARD)
        arrow(lower, (4.55, y - 0.1), (3.32, 0.9 + (y - 0.9) * 0.12), BACKWARD, "--")
    lower.text(5.2, 1.65, "...", ha="center", fontsize=14)
    text = "blue: forward.  dashed: += in place, in a fixed order.  red: backward, once each, cast once"
    lower.text(0.1, 0.1, text, fontsize=9, color="#555555")
    save(figure, path)


def packages(path: Path) -> None:
    """The packages, each of which uses only those below it, and what a training step does in each."""
    figure, axis = plt.subplots(figsize=(5.2, 7.2), layout="constrained")
    axis.set(xlim=(0, 5.2), ylim=(0, 7.2))
    axis.axis("off")
    axis.text(0.1, 7.05, "a training step: forward", color=FORWARD, fontsize=9)
    axis.text(2.25, 7.05, "backward", color=BACKWARD, fontsize=9)
    for i, ((name, holds), steps) in enumerate(zip(PACKAGES, STEPS)):
        y = 6.42 - 1.12 * i
        box(axis, 2.6, y, 5.0, 0.86, "", BLUE)
        axis.text(0.2, y + 0.28, name, fontsize=10.5, weight="bold", va="center")
        axis.text(0.2, y + 0.07, holds, fontsize=8.5, va="center")
        for text, line, colour in zip(steps, (0.13, 0.32), (FORWARD, BACKWARD)):
            axis.text(0.2, y - line, text, fontsize=8.5, color=colour, va="center")
        if i + 1 < len(PACKAGES):
            arrow(axis, (2.6, y - 0.44), (2.6, y - 0.69), "#444444")
    (first, holds), *kernels = NATIVE
    box(axis, 2.6, 1.09, 5.0, 0.42, f"{first}: {holds}", GREEN)
    arrow(axis, (2.6, 1.5), (2.6, 1.3), "#444444")
    for (name, what), x in zip(kernels, (1.3, 3.9)):
        box(axis, x, 0.33, 2.4, 0.5, f"{name}:\n{what}", GREEN)
        arrow(axis, (x, 0.87), (x, 0.6), "#444444")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    folder = Path(__file__).parent
    shared_gradient(folder / "shared_gradient.svg")
    packages(folder / "packages.svg")
