"""Interleaved timing: every rival once a round, in a random order, so that drift and other load affect all rivals alike."""

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
FLUSH_BYTES = 256 << 20  # at least, and at least four times the L2
QUEUE_CYCLES = 6_000_000  # the GPU waits a few milliseconds, in which the CPU queues a whole step
CEILING_S = 0.5  # seconds of measuring a ceiling, so that a short burst of other load does not lower it


@dataclass
class Timed:
    """Stages that are timed one after the other; each gets the result of the one before. prepare runs before them, untimed."""

    stages: Sequence[Callable[[object], object]]
    prepare: Callable[[], None] = lambda: None

    def run(self) -> object:
        """All stages once. Returns what the last one returns."""
        state = None
        for stage in self.stages:
            state = stage(state)
        return state


def training(forward: Callable[[], torch.Tensor], g: torch.Tensor, leaves: Iterable[torch.Tensor]) -> Timed:
    """Forward and backward as inside a model. Before each step the gradients of `leaves` are dropped."""
    leaves = list(leaves)

    def drop_gradients() -> None:
        for leaf in leaves:
            leaf.grad = None

    return Timed((lambda _: forward(), lambda y: y.backward(g)), drop_gradients)


def with_sum(stages: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """times[stage][round] of each stage, then of all stages together."""
    return [*stages, [sum(times) for times in zip(*stages)]]


def check_error(what: str, error: float, limit: float) -> None:
    """Raises ArithmeticError if a relative error is NaN or above its limit."""
    if not error <= limit:
        raise ArithmeticError(f"{what}relative error expected <= {limit:.2g}, got {error:.1e}")


def captured(timed: Timed, device: torch.device) -> Timed:
    """The same with each stage a CUDA graph that is replayed: no Python and one launch a stage.

    The graphs read and write the tensors (inputs, gradients) of the capture. Raises RuntimeError if a stage synchronises.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # torch requires a warm-up on a side stream before a capture
        for _ in range(3):
            timed.prepare()
            timed.run()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    timed.prepare()
    pool, graphs, state = torch.cuda.graph_pool_handle(), [], None
    for stage in timed.stages:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            state = stage(state)
        graphs.append((graph, state))  # a stage's results live as long as its graph
    return Timed([lambda _, graph=graph: graph.replay() for graph, _ in graphs])


class Clock:
    """Seconds of each stage of a Timed.

    wall     the time that passes; on a GPU from an idle device to an idle device, so Python and launches count
    cpu      CPU seconds, for one thread on a busy machine
    events   GPU only: the device's own time. The device waits while the CPU queues the stages, so that launches are hidden and
             nothing synchronises between them

    On a GPU each measurement starts with a cold L2: a large buffer is read before. It is not written, since dirty lines would
    be written back during the measurement.
    """

    def __init__(self, device: torch.device, kind: str):
        if kind not in CLOCKS or (kind == "events") > (device.type == "cuda") or (kind == "cpu") > (device.type == "cpu"):
            raise ValueError(f"clock: expected wall, cpu (on a CPU) or events (on a GPU), got {kind!r} on {device.type}")
        self.device, self.kind = device, kind
        self.read = time.process_time if kind == "cpu" else time.perf_counter
        self._large = self._sum = None
        if device.type == "cuda":
            size = max(FLUSH_BYTES, 4 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
            self._large, self._sum = torch.zeros(size // 4, device=device), torch.zeros((), device=device)

    def cool(self) -> None:
        """Fills the GPU's L2 with clean lines of a buffer that nothing else reads."""
        torch.sum(self._large, 0, out=self._sum)

    def seconds(self, timed: Timed, repeats: int) -> list[float]:
        """Of each stage, averaged over repeats made back to back."""
        return self._events(timed, repeats) if self.kind == "events" else self._read(timed, repeats)

    def _read(self, timed: Timed, repeats: int) -> list[float]:
        totals, cuda = [0.0] * len(timed.stages), self.device.type == "cuda"
        for _ in range(repeats):
            timed.prepare()
            state = None
            if cuda:
                self.cool()
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
            self.cool()
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
    settle: runs each call once before it is measured, so that caches and allocator are as this call leaves them, not as another
    rival does. The order is the same in every run of the program, and no rival always follows the same one.
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
    """This machine's best rates at the current thread count: of a large product and of a large addition."""
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


def gpu_state(device: torch.device) -> dict[str, str]:
    """Current clocks, temperature, power and throttle reasons; {} on a CPU or without nvidia-smi."""
    if device.type != "cuda":
        return {}
    index = torch.cuda.current_device() if device.index is None else device.index
    return _nvidia_smi(index, ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_throttle_reasons.active"))


def throttled(state: dict[str, str]) -> bool:
    """Whether power, heat or the board limits the clocks, rather than idleness or the user's setting."""
    reasons = state.get("clocks_throttle_reasons.active", "0")
    return bool(int(reasons, 16) & ~_HARMLESS) if re.fullmatch(r"0[xX][0-9a-fA-F]+", reasons) else False


# nvml.h: GPU idle 0x1, clocks set by the user 0x2, synchronised boost 0x10, display clocks 0x100
_HARMLESS = 0x1 | 0x2 | 0x10 | 0x100


def _nvidia_smi(
    index: int, names: Sequence[str] = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
) -> dict[str, str]:
    """The values of these names now; {} without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values)) if done.returncode == 0 and len(values) == len(names) else {}


def slug(name: str) -> str:
    """A folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
