"""Compares two result files and names what became slower by more than the spread.

    python -m bench.compare old.jsonl new.jsonl

A cell is slower (faster) when its excess over the frozen layer moved, and the quartile ranges of the two do not meet. The
floor is part of every excess, so two machines, or a busy and an idle hour, compare better than by seconds. Exit 1 if any
cell of lotr_ext is slower.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .shapes import Case
from .store import Store, latest


def compare(old: list[dict], new: list[dict]) -> list[tuple[str, str, float, float, str]]:
    """(case, rival, old excess, new excess, verdict) of every cell in both."""
    before = {(tuple(c["case"].values()), c["rival"]): c for c in latest(old)}
    rows = []
    for cell in latest(new):
        was = before.get((tuple(cell["case"].values()), cell["rival"]))
        if was is None or cell["rival"] == "frozen":
            continue
        (low0, middle0, high0), (low1, middle1, high1) = was["step"]["excess"], cell["step"]["excess"]
        verdict = "slower" if low1 > high0 else "faster" if high1 < low0 else ""
        rows.append((Case(**cell["case"]).name(), cell["rival"], middle0, middle1, verdict))
    return rows


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        raise ValueError(f"expected two result files, got {len(argv)} argument(s): python -m bench.compare old.jsonl new.jsonl")
    for name in argv:
        if not Path(name).is_file():
            raise FileNotFoundError(f"{name}: expected a result file (layer.jsonl), found none")
    from rich.console import Console
    from rich.table import Table

    rows = compare(Store(Path(argv[0])).read(), Store(Path(argv[1])).read())
    if not rows:
        raise ValueError("the two files have no case and rival in common")
    table = Table("case", "rival", "old excess", "new excess", "")
    for case, rival, old, new, verdict in rows:
        table.add_row(case, rival, f"{old:.1%}", f"{new:.1%}", verdict)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return int(any(verdict == "slower" and rival.startswith("lotr_ext") for _, rival, _, _, verdict in rows))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"bench.compare: {error}")
