"""Compares two result files and names the cells that became slower by more than the spread.

    python -m bench.compare old.jsonl new.jsonl

For layer.jsonl, model.jsonl, shared.jsonl and kernels.jsonl. A cell is slower (faster) if its excess over
the floor changed and the two quartile ranges do not overlap. The floor (the frozen layer or model, autograd's own sums, the
library's product) is part of every excess, so results of two machines, or under different load, compare better than seconds.
Cells in only one of the files are counted. Exit 1 if any cell of lotr_ext is slower.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .measure.session import Table, start
from .measure.store import Store, key_of, latest

OURS = "lotr_ext"  # and its strategies, lotr_ext-...
FLOORS = ("frozen", "autograd", "library")
STAGES = ("forward", "backward", "step")


def compare(old: list[dict], new: list[dict]) -> list[tuple[str, str, str, float, float, str]]:
    """(case, rival, stage, old excess, new excess, verdict) of every cell in both."""
    before = {key_of(c): c for c in latest(old)}
    rows = []
    for cell in latest(new):
        was = before.get(key_of(cell))
        if was is None or cell["rival"] in FLOORS:
            continue
        for stage in STAGES:
            if stage in was and stage in cell:
                (low0, middle0, high0), (low1, middle1, high1) = was[stage]["excess"], cell[stage]["excess"]
                verdict = "slower" if low1 > high0 else "faster" if high1 < low0 else ""
                rows.append((case_name(cell["case"]), cell["rival"], stage, middle0, middle1, verdict))
    return rows


def only(cells: list[dict], others: list[dict]) -> str:
    """How many cells are not in others."""
    found = {key_of(c) for c in cells} - {key_of(c) for c in others}
    return f"{len(found)} cells, {sum(rival.startswith(OURS) for _, rival in found)} of {OURS}"


def case_name(case: dict) -> str:
    """A readable name for a case of any program."""
    return " ".join(f"{name} {value}" if isinstance(value, int) else str(value) for name, value in case.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="old.jsonl new.jsonl")
    argv = parser.parse_args(argv).files
    if len(argv) != 2:
        raise ValueError(f"expected two result files, got {len(argv)} argument(s): python -m bench.compare old.jsonl new.jsonl")
    for name in argv:
        if not Path(name).is_file():
            raise FileNotFoundError(f"{name}: expected a result file (layer.jsonl), found none")
    old_cells, new_cells = (Store(Path(name)).read() for name in argv)
    rows = compare(old_cells, new_cells)
    if not any(rival.startswith(OURS) for _, rival, *_ in rows):
        raise ValueError(f"{argv[0]}, {argv[1]}: expected a case of {OURS} that both have, found none")
    table = Table("Excess over the floor", "case", "rival", "stage", "old", "new", "beyond the spread")
    for case, rival, stage, old, new, verdict in rows:
        table.add_row(case, rival, stage, f"{old:.1%}", f"{new:.1%}", verdict)
    print(table)
    print(f"only in {argv[0]}: {only(old_cells, new_cells)}; only in {argv[1]}: {only(new_cells, old_cells)}")
    slower = sum(verdict == "slower" and rival.startswith(OURS) for _, rival, *_, verdict in rows)
    print(f"{slower} of {sum(rival.startswith(OURS) for _, rival, *_ in rows)} measurements of {OURS} are slower")
    return int(slower > 0)


if __name__ == "__main__":
    start("bench.compare", main)
