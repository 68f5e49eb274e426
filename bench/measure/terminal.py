"""Tables, lines and a bar in the terminal: rich's where it is installed, plain text where it is not.

A machine with a GPU and no network often has little more than torch, and its measurements are the same.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ModuleNotFoundError:
    Console = Table = Progress = None

WIDTH = 210  # of the widest table; on a narrower terminal the lines wrap as wholes, which can be read, and columns do not


class PlainTable:
    """A table as lines: the first column to the left, the others to the right."""

    def __init__(self, title: str):
        self.title, self.rows = title, []
        self.heads: list[str] = []

    def add_column(self, head: str, **_: object) -> None:
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
        return "\n".join(["", self.title, texts[0], rule, *texts[1:], ""])


AnyTable = PlainTable if Table is None else Table


class PlainConsole:
    """print, as rich's console has it."""

    def print(self, what: object, **_: object) -> None:
        print(what, flush=True)


def wide_console() -> Console | PlainConsole:
    """As wide as the widest table, also where the terminal is not."""
    if Console is None:
        return PlainConsole()
    return Console(width=max(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH)


def new_table(title: str, *heads: str) -> AnyTable:
    """A table whose first column is text and whose other columns are numbers."""
    if Table is None:
        table = PlainTable(title)
    else:
        table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", overflow="fold")  # narrow: wrapped, never cut off
    return table


@contextlib.contextmanager
def bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, or a line a case; what it yields names the case that begins, which ends the one before."""
    begun = 0
    if Progress is None:

        def begin(name: str) -> None:
            nonlocal begun
            begun += 1
            print(f"[{begun}/{total}] {name}", file=sys.stderr, flush=True)

        yield begin
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    shown = Progress(*columns, console=Console(stderr=True), transient=True)
    task = shown.add_task("", total=total)

    def begin(name: str) -> None:
        nonlocal begun
        shown.start()  # with the first case: a bar of none leaves an empty line
        shown.update(task, description=name, completed=begun)
        begun += 1

    try:
        yield begin
    finally:
        if begun:
            shown.stop()
