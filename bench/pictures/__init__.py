"""Pictures of results. A program draws its own after a run; bench.report draws all again."""

from __future__ import annotations

import importlib
from pathlib import Path

MEASURED = {
    "layer": "layer.draw",
    "model": "more.draw_model",
    "shared": "more.draw_shared",
    "kernels": "more.draw_kernels",
    "host": "host.draw_host",
    "experts": "experts.draw_experts",
    "tasks": "tasks.draw_training",
}  # the function that draws the results of a program


def draw_measured(program: str, cells: list[dict], folder: Path) -> list[Path]:
    """Draws a measuring program's newest cells into folder; returns the pictures. Needs matplotlib."""
    module, _, function = MEASURED[program].partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)(cells, folder)
