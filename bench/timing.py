"""Interleaved timing: every rival once a round, the order turned each round, so that drift hits all alike."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


class Clock:
    """wall seconds (CUDA: events, so launches do not count twice) or, for one thread on a busy machine, CPU seconds."""

    def __init__(self, device: torch.device, kind: str):
        self.device, self.kind = device, kind
        self.read = time.process_time if kind == "cpu" else time.perf_counter
        # a cold L2 for every measurement: a real layer comes after other layers
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def seconds(self, call: Callable[[], None], repeats: int) -> float:
        """Of one call, averaged over repeats made back to back."""
        if self.device.type != "cuda":
            start = self.read()
            for _ in range(repeats):
                call()
            return (self.read() - start) / repeats
        total = 0.0
        for _ in range(repeats):
            self.flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end) / 1e3
        return total / repeats


def interleave(calls: list[Callable[[], None]], clock: Clock, rounds: int, slice_s: float) -> list[list[float]]:
    """times[call][round] in seconds. slice_s: about how long one measurement of a call takes."""
    repeats = []
    for call in calls:
        call()
        once = clock.seconds(call, 1)
        repeats.append(max(1, min(1000, round(slice_s / max(once, 1e-7)))))
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        for step in range(len(calls)):
            i = (step + turn) % len(calls)
            times[i].append(clock.seconds(calls[i], repeats[i]))
    return times


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """(25 %, median, 75 %)"""
    values = sorted(values)
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ceilings(device: torch.device, dtype: torch.dtype, clock: Clock) -> dict[str, float]:
    """What this machine does at its best at the present thread count: a large product and a large addition."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    product = min(clock.seconds(lambda: torch.mm(a, b, out=out), 1) for _ in range(5))
    long = torch.zeros(1 << (24 if device.type == "cpu" else 28), device=device)
    stream = min(clock.seconds(lambda: long.add_(1.0), 1) for _ in range(5))
    return {"flops_per_s": 2 * size**3 / product, "bytes_per_s": 2 * long.nbytes / stream}


def machine(device: torch.device) -> dict[str, str]:
    """Names and versions of what runs here."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(terse=True)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "cuda": str(torch.version.cuda),
            "multiprocessors": str(properties.multi_processor_count),
        }
        return facts
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        model = found[1].strip() if found else model
    return facts | {"name": f"{model}, {os.cpu_count()} cores", "isa": torch.backends.cpu.get_cpu_capability()}


def slug(name: str) -> str:
    """A folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
