"""The progress bar of work that takes long."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Report", "progress_bar"]

Report = Callable[[str, float], None]  # (what is being done, the fraction of all that is done)


@contextmanager
def progress_bar(show: bool = True, console: Any = None) -> Iterator[Report]:
    """Yields a function that shows what is being done and how much of all is done.

    console: of rich. None: stderr, and no bar where that is no terminal or the package rich is missing.
    """
    if not show or (console is None and not (sys.stderr.isatty() and importlib.util.find_spec("rich"))):
        yield lambda what, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)
