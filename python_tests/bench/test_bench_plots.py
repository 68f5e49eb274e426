"""The pictures of the layer results: which there are, and that all that is written in them can be read."""

from __future__ import annotations

from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from bench.report import plots

RIVALS = ["frozen", *plots.COLOURS]


def cells(points: list[tuple[int, int]], dtypes: tuple[str, ...] = ("fp32",)) -> list[dict]:
    """Of (tokens, rank), all rivals; excesses of 11 to 19 %."""
    ceilings = {"flops_per_s": 1e11, "bytes_per_s": 1e10}
    found = []
    for dtype in dtypes:
        for m, r in points:
            for i, rival in enumerate(RIVALS):
                excess = 0.11 + 0.008 * i
                step = {"seconds": [1, 1, 1], "excess": [0.1, excess, 0.3], "flops_per_s": 5e10, "bytes_per_s": 1e9}
                case = {"m": m, "k": 768, "n": 768, "r": r, "dtype": dtype, "threads": 1}
                shared = {"machine": {"name": "a machine"}, "ceilings": ceilings, "peak_bytes": 9, "saved_bytes": 7}
                label = f"{rival}, as it is called"[:19]  # as long as the longest
                found.append({"case": case, "rival": rival, "label": label, "step": step, **shared})
    return found


def test_pictures(tmp_path):
    points = [(128, 4), (512, 4), (2048, 4), (128, 8), (128, 16)]
    drawn = [path.name for path in plots.draw(cells(points), tmp_path)]
    assert drawn == ["excess.png", "tokens.png", "rank.png", "memory.png"]
    few = [path.name for path in plots.draw(cells([(512, 4)]), tmp_path)]
    assert few == ["excess.png", "memory.png"]
    two = [path.name for path in plots.draw(cells([(128, 4), (512, 4), (128, 8)]), tmp_path)]
    assert two == few and sorted(path.name for path in tmp_path.iterdir()) == two  # the old ones are gone
    assert plots.draw([], tmp_path) == []


@pytest.fixture
def figures(monkeypatch):
    """Draws cells; what was to be saved, laid out."""

    def made(measured: list[dict]) -> dict[str, Figure]:
        kept: dict[str, Figure] = {}
        monkeypatch.setattr(plots, "save", lambda figures, folder: kept.update({n: f for n, f in figures.items() if f}) or [])
        plots.draw(measured, None)
        for figure in kept.values():
            figure.canvas.draw()
        return kept

    yield made
    plots.plt.close("all")


@pytest.mark.parametrize("dtypes", [("fp32",), ("bf16", "fp32")])
def test_titles_and_legends_are_inside_and_panels_have_room(figures, dtypes):
    points = [(128, 16), (512, 16), (2048, 16), (2048, 64), (2048, 256)]
    made = figures(cells(points, dtypes))
    assert set(made) == {"excess", "tokens", "rank", "memory"}
    for name, figure in made.items():
        page = figure.bbox
        for part in (figure.legends[0], figure._suptitle):
            box = part.get_window_extent()
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, (name, part)
        for axis in figure.axes:
            assert axis.get_window_extent().height > 150, name


def test_labels_of_neighbours_do_not_meet_and_both_axes_are_labelled(figures):
    measured = cells([(m, 16) for m in (1, 16, 128, 512, 2048, 8192, 16384)], ("bf16", "fp32"))
    measured += cells([(2048, r) for r in (4, 64, 256)], ("bf16", "fp32"))
    made = figures(measured)
    for name, count in (("tokens", 7), ("rank", 4)):
        for axis in made[name].axes:
            labels = axis.get_xticklabels()
            assert len(labels) == count
            assert all(label.get_rotation() == 45 for label in labels)
            gap = min(b.get_window_extent().x0 - a.get_window_extent().x0 for a, b in pairwise(labels))
            assert gap > 2**0.5 * labels[-1].get_fontsize() * made[name].dpi / 72  # of lines of text at 45 degrees
            assert axis.get_xscale() == axis.get_yscale() == "log"
            assert axis.get_xlabel().endswith("(log)") and axis.get_ylabel().endswith("% (log)")
            low, high = axis.get_ylim()
            assert sum(low <= tick <= high for tick in axis.get_yticks()) >= 2, name
