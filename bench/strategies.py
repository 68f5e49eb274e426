"""The strategies of a layer on CUDA: in which order, and in how many kernels, its products run.

    two_pass   the base product, then the adapter is added to it
    beta       the adapter, then the base product accumulates onto it (its beta is 1)
    fused      both in one kernel, on Hopper GPUs

LOTR_STRATEGY sets the strategy of a process. Here several run in turns in one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

STRATEGIES = {"two_pass": 0, "beta": 1, "fused": 2}  # csrc/torch/check.h
FUSED_MAX_RANK = 128


def fused_obstacle(dtype: torch.dtype, device: str, rank: int = 1) -> str | None:
    """Why the fused strategy cannot run, None if it can."""
    from lotr_ext.core.kernel_support import build_info

    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        return "the fused strategy needs a Hopper GPU (compute capability 9.0)"
    if not any("90a" in arch for arch in build_info()["cuda"]["archs"]):
        return "the fused strategy needs a build for 90a (LOTR_ARCHS)"
    if dtype not in (torch.bfloat16, torch.float16):
        return "the fused strategy needs bfloat16 or float16"
    if rank > FUSED_MAX_RANK:
        return f"the fused strategy needs a rank of at most {FUSED_MAX_RANK}, got {rank}"
    return None


@contextlib.contextmanager
def running(strategy: str) -> Iterator[None]:
    """Layers that are called inside run with this strategy, also in their backward."""
    from lotr_ext.core import dispatch

    usual = dispatch.choose_strategy
    dispatch.choose_strategy = lambda tokens, x: STRATEGIES[strategy]
    try:
        yield
    finally:
        dispatch.choose_strategy = usual


def with_strategy(
    strategy: str, call: Callable[..., Tensor], dtype: torch.dtype, device: str, rank: int
) -> Callable[..., Tensor]:
    """Returns a function that runs `call` with a strategy.

    Raises:
        ValueError: if the strategy cannot run.
    """
    obstacle = fused_obstacle(dtype, device, rank) if strategy == "fused" else None
    if obstacle is not None:
        raise ValueError(obstacle)

    def run(*arguments: object, **keywords: object) -> Tensor:
        with running(strategy):
            return call(*arguments, **keywords)

    return run
