"""Tables and a progress line in the terminal, as plain text: a machine with a GPU and no network often has little but torch."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


class Table:
    """A table as lines: the first column to the left, the others to the right; below them the caption."""

    def __init__(self, title: str, *heads: str):
        self.title, self.heads, self.caption = title, list(heads), ""
        self.rows: list[tuple[str, ...]] = []

    def add_column(self, head: str) -> None:
        self.heads.append(head)

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)

    def __str__(self) -> str:
        lines = [tuple(self.heads), *(row + ("",) * (len(self.heads) - len(row)) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.heads))]
        texts = [
            "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
            for line in lines
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join(["", self.title, texts[0], rule, *texts[1:], self.caption])


@contextlib.contextmanager
def bar(cases: int) -> Iterator[Callable[..., None]]:
    """A line on stderr that counts the cases, a line a case where that is no terminal; what it yields names the case that
    begins, which ends the one before. Its `total` is the number of cases, where that has changed."""
    begun, start, alone, all_cases = 0, time.monotonic(), sys.stderr.isatty(), cases

    def begin(name: str, total: int | None = None) -> None:
        nonlocal begun, all_cases
        total = all_cases = all_cases if total is None else total
        left = f", {(time.monotonic() - start) / begun * (total - begun) / 60:.1f} min left" if begun else ""
        begun += 1
        if alone:
            print(f"\r[{begun}/{total}{left}] {name}", end="\x1b[K", file=sys.stderr, flush=True)
        else:
            print(f"[{begun}/{total}] {name}", file=sys.stderr, flush=True)

    try:
        yield begin
    finally:
        if begun and alone:
            print("\r", end="\x1b[K", file=sys.stderr, flush=True)
