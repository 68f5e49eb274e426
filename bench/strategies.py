"""Runs layers with several strategies (LOTR_STRATEGY, docs/kernels.md) in turns in one process.

lotr_ext.core is imported inside the functions, and not at all on a CPU: with --against, a worker
measures an older lotr_ext that has no strategies.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

STRATEGY_NAMES = ("two_pass", "beta", "fused")


def fused_reason(k: int, n: int, rank: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the fused strategy cannot run a layer [k] -> [n], None if it can."""
    if device.type != "cuda":
        return "it needs a GPU"
    from lotr_ext.core.strategy import fused_obstacle

    return fused_obstacle(k, n, rank, dtype, device)


@contextlib.contextmanager
def running(strategy: str) -> Iterator[None]:
    """Layers that are called inside run with this strategy, also in their backward."""
    from lotr_ext.core import dispatch
    from lotr_ext.core.strategy import STRATEGIES

    # LOTR_STRATEGY is read once per process, but the rivals of a case share a process.
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
