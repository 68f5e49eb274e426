"""Ctrl-C while a model is being changed: it is raised when the change is complete."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uninterrupted"]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Context and decorator: SIGINT inside calls its handler at the end, so that no model stays half changed. A second one
    calls it at once. Without effect in threads other than the main one, which get no signals.
    """
    handler, received = signal.getsignal(signal.SIGINT), []

    def keep(*arguments) -> None:
        received.append(arguments)
        if len(received) > 1:
            handler(*arguments)

    if not callable(handler) or not _handled_by(keep):  # not callable: the process ignores SIGINT, or ends by it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if len(received) == 1:
            handler(*received[0])


def _handled_by(handler) -> bool:
    """Whether SIGINT now calls handler."""
    try:
        signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread
        return False
    return True
