"""Interleaved timing: every rival once a round, in an order drawn for each, so that drift and neighbours hit all alike."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from .isa import held_to

CLOCKS = ("wall", "cpu", "events")
FLUSH_BYTES = 256 << 20  # more than any L2
QUEUE_CYCLES = 6_000_000  # a few milliseconds of waiting on the GPU, in which the CPU queues a whole step
CEILING_S = 0.5  # seconds that a ceiling is measured for: another program's moment of work must not pass for the best


@dataclass
class Timed:
    """What is timed: stages run one after the other, each given what the one before returned; prepare runs before, untimed."""

    stages: Sequence[Callable[[object], object]]
    prepare: Callable[[], None] = lambda: None


class Clock:
    """Seconds of each stage of a Timed.

    wall     the time that passes; on a GPU from an idle device to an idle device, so Python and launches count
    cpu      CPU seconds, for one thread on a busy machine
    events   GPU only: the device's own time. L2 is flushed first, then the device waits while the CPU queues the stages, so
             that launches are hidden and nothing synchronises between them
    """

    def __init__(self, device: torch.device, kind: str):
        if kind not in CLOCKS or (kind == "events") > (device.type == "cuda") or (kind == "cpu") > (device.type == "cpu"):
            raise ValueError(f"clock: expected wall, cpu (on a CPU) or events (on a GPU), got {kind!r} on {device.type}")
        self.device, self.kind = device, kind
        self.read = time.process_time if kind == "cpu" else time.perf_counter
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def seconds(self, timed: Timed, repeats: int) -> list[float]:
        """Of each stage, averaged over repeats made back to back."""
        return self._events(timed, repeats) if self.kind == "events" else self._read(timed, repeats)

    def _read(self, timed: Timed, repeats: int) -> list[float]:
        totals, cuda = [0.0] * len(timed.stages), self.device.type == "cuda"
        for _ in range(repeats):
            timed.prepare()
            state = None
            if cuda:
                self.flush.zero_()
                torch.cuda.synchronize(self.device)
            last = self.read()
            for i, stage in enumerate(timed.stages):
                state = stage(state)
                if cuda:
                    torch.cuda.synchronize(self.device)
                now = self.read()
                totals[i] += now - last
                last = now
        return [total / repeats for total in totals]

    def _events(self, timed: Timed, repeats: int) -> list[float]:
        marks = []
        for _ in range(repeats):
            timed.prepare()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(len(timed.stages) + 1)]
            self.flush.zero_()
            torch.cuda._sleep(QUEUE_CYCLES)
            state = None
            events[0].record()
            for stage, event in zip(timed.stages, events[1:]):
                state = stage(state)
                event.record()
            marks.append(events)
        torch.cuda.synchronize(self.device)
        return [
            sum(events[i].elapsed_time(events[i + 1]) for events in marks) / repeats / 1e3 for i in range(len(timed.stages))
        ]


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection in the timed loop."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def interleave(
    calls: Sequence[Timed],
    clock: Clock,
    rounds: int,
    slice_s: float,
    settle: bool = False,
    deal: Callable[[random.Random], None] = lambda draw: None,
) -> list[list[list[float]]]:
    """times[call][stage][round] in seconds. slice_s: about how long one measurement of a call takes, with all around it.

    deal: called before each round, to draw what the calls are given in it.
    settle: each measurement is of a call that has just run, as a layer in training has, not of one that finds the allocator and
    the caches as another rival left them. The order is the same in every run, and no rival always follows the same one.
    """
    repeats = []
    for call in calls:
        clock.seconds(call, 1)
        begin = time.perf_counter()
        clock.seconds(call, 1)
        repeats.append(max(1, min(1000, round(slice_s / max(time.perf_counter() - begin, 1e-7)))))
    times: list[list[list[float]]] = [[[] for _ in call.stages] for call in calls]
    with no_collection():
        for turn in range(rounds):
            draw = random.Random(turn)
            deal(draw)
            for i in draw.sample(range(len(calls)), len(calls)):
                if settle:
                    clock.seconds(calls[i], 1)
                for stage, seconds in zip(times[i], clock.seconds(calls[i], repeats[i])):
                    stage.append(seconds)
    return times


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """(25 %, median, 75 %)"""
    values = sorted(values)
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def against(times: Sequence[float], floor: Sequence[float]) -> dict[str, tuple[float, float, float]]:
    """A stage of a rival as it is kept: quartiles of its seconds, and of its per-round ratio to the floor, less one."""
    return {"seconds": quartiles(times), "excess": quartiles(t / f - 1 for t, f in zip(times, floor))}


def ceilings(device: torch.device, dtype: torch.dtype, clock: Clock) -> dict[str, float]:
    """What this machine does at its best at the present thread count: a large product and a large addition."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    long = torch.zeros(1 << (24 if device.type == "cpu" else 28), device=device)

    def best(call: Callable[[object], object]) -> float:
        timed, until = Timed([call]), time.monotonic() + CEILING_S
        clock.seconds(timed, 1)
        found = clock.seconds(timed, 1)[0]
        while time.monotonic() < until:
            found = min(found, clock.seconds(timed, 1)[0])
        return found

    return {
        "flops_per_s": 2 * size**3 / best(lambda _: torch.mm(a, b, out=out)),
        "bytes_per_s": 2 * long.nbytes / best(lambda _: long.add_(1.0)),
    }


def versions() -> dict[str, str]:
    """Of torch and of what the rivals come from, those that are installed."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("peft", "transformers", "triton", "unsloth", "lorafusion"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine(device: torch.device) -> dict[str, str]:
    """Names, clocks and versions of what runs here."""
    facts = versions() | {"system": f"{platform.system()} {platform.machine()}"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "cuda": str(torch.version.cuda),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        }
        return facts | _nvidia_smi(device.index or 0)
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        found, clock = re.search(r"model name\s*:\s*(.+)", text), re.search(r"cpu MHz\s*:\s*([\d.]+)", text)
        model = found[1].strip() if found else model
        facts |= {"clock": f"{float(clock[1]):.0f} MHz"} if clock else {}
    isa = torch.backends.cpu.get_cpu_capability()  # in the name: machines of one name may have different instruction sets
    verb = "held to" if held_to() else "with"
    return facts | {"name": f"{model} {verb} {isa}, {os.cpu_count()} cores", "isa": isa}


def _nvidia_smi(index: int) -> dict[str, str]:
    """Driver and clocks as they are now, where the tool is there to tell."""
    if shutil.which("nvidia-smi") is None:
        return {}
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values)) if done.returncode == 0 and len(values) == len(names) else {}


def slug(name: str) -> str:
    """A folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
