"""Counts the memory that a call allocates and the operators it runs, by torch's profiler and allocators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# operators that allocate a tensor or make a view, and compute nothing
_NO_WORK = {"empty", "empty_strided", "empty_like", "resize_", "view", "t", "transpose", "as_strided", "detach", "expand"}
_NO_WORK |= {"alias", "select", "slice", "reshape", "unsqueeze", "squeeze", "permute", "detach_", "_unsafe_view", "narrow"}
_NO_WORK |= {"split", "mT"}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that torch had allocated during call beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    now = most = 0
    for change in _changes(call):
        now += change
        most = max(most, now)
    return most


def allocated_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The sum of all that torch allocates during call."""
    if device.type == "cuda":
        before = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"] - before
    return sum(change for change in _changes(call) if change > 0)


def _changes(call: Callable[[], object]) -> list[int]:
    """Each CPU allocation (positive) and release (negative) in bytes, in order; also those of autograd's C++ and of our
    operators, which no dispatch mode sees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def launches(call: Callable[[], object], device: torch.device) -> int:
    """Kernels that call launches on a GPU; on a CPU the operators that compute something and call no other operator."""
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize(device)
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    names = [event.name.split("::") for event in profiler.events() if not event.cpu_children]
    return sum(len(name) == 2 and name[0] in ("aten", "lotr") and name[1] not in _NO_WORK for name in names)
