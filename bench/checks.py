"""Checks of numbers, and counts of memory."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def error_of(result: Tensor, truth: Tensor) -> float:
    """Returns the relative error (Frobenius)."""
    truth = truth.double()
    return ((result.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check_error(what: str, error: float, limit: float) -> float:
    """Returns the error.

    Raises:
        ArithmeticError: If it is NaN or above the limit.
    """
    if not error <= limit:
        raise ArithmeticError(f"{what}: relative error expected <= {limit:.2g}, got {error:.1e}")
    return error


def memory_changes(call: Callable[[], object]) -> list[int]:
    """Returns each CPU allocation (positive) and release (negative) during a call, in bytes.

    They are in order. The C++ code of autograd and of our operators is included.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # A private name: the profiler's public summary adds allocations up by operator and loses
    # their order.
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in changes]


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Returns the most that torch allocates during a call, beyond what was allocated before."""
    if device != "cuda":
        return max(itertools.accumulate(memory_changes(call), initial=0))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
