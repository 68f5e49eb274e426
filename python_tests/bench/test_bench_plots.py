"""The pictures of the layer results: which there are."""

from __future__ import annotations

from bench.pictures import layer

RIVALS = ["frozen", *layer.COLOURS]


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
    drawn = [path.name for path in layer.draw(cells(points), tmp_path)]
    assert drawn == ["excess.png", "tokens.png", "rank.png", "memory.png"]
    few = [path.name for path in layer.draw(cells([(512, 4)]), tmp_path)]
    assert few == ["excess.png", "memory.png"]
    two = [path.name for path in layer.draw(cells([(128, 4), (512, 4), (128, 8)]), tmp_path)]
    assert two == few and sorted(path.name for path in tmp_path.iterdir()) == two  # the old ones are gone
    assert layer.draw([], tmp_path) == []
