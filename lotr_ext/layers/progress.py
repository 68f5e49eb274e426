"""A progress bar for long work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]

_WIDTH = 20


@contextmanager
def progress_bar(verb: str, total: int, show: bool = True) -> Iterator[Callable[[int, str], None]]:
    """Shows `lotr_ext <verb> <done>/<total> [####....] <what>` on stderr where that is a terminal, and removes it at the end.

    Yields a function of done and what.
    """
    if not (show and sys.stderr.isatty()):
        yield lambda done, what="": None
        return

    def report(done: int, what: str = "") -> None:
        full = _WIDTH * done // total
        bar = f"[{'#' * full}{'.' * (_WIDTH - full)}]"
        print(f"\rlotr_ext {verb} {done}/{total} {bar} {what}", end="\x1b[K", file=sys.stderr, flush=True)

    try:
        yield report
    finally:
        print("\r", end="\x1b[K", file=sys.stderr, flush=True)
