"""Writes figures into files. Nothing is shown on a screen."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def save(figures: dict[str, Figure | None], folder: Path, dpi: int = 100) -> list[Path]:
    """Writes <name>.png of each figure by way of a temporary name; for None, removes the old picture."""
    written = []
    for name, figure in figures.items():
        if figure is None:
            (folder / f"{name}.png").unlink(missing_ok=True)
        else:
            temporary = folder / f"{name}.tmp.png"
            figure.savefig(temporary, dpi=dpi)
            plt.close(figure)
            written.append(temporary.replace(folder / f"{name}.png"))
    return written
