"""Runs layers with several strategies (LOTR_STRATEGY, docs/kernels.md) in turns in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

from lotr_ext.core import dispatch
from lotr_ext.core.strategy import STRATEGIES


@contextlib.contextmanager
def running(strategy: str) -> Iterator[None]:
    """Layers that are called inside run with this strategy, also in their backward."""
    usual = dispatch.choose_strategy
    dispatch.choose_strategy = lambda tokens, x: STRATEGIES[strategy]
    try:
        yield
    finally:
        dispatch.choose_strategy = usual


def with_strategy(strategy: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a function that runs `call` with a strategy."""

    def run(*arguments: object, **keywords: object) -> Tensor:
        with running(strategy):
            return call(*arguments, **keywords)

    return run
