"""Times rivals in interleaved rounds.

Every rival is measured once per round, in random order, so that drift and other load affect all
alike. A time is the median over rounds. A ratio is the median of per-round ratios, with a 95 %
interval by a paired bootstrap over rounds.
"""

import contextlib
import functools
import gc
import io
import itertools
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .common import reason_of

CLOCKS = ("wall", "cpu", "events")
FLUSH_BYTES = 256 << 20  # read before a measurement; four times the L2, if that is more
QUEUE_CYCLES = 6_000_000  # a few milliseconds, enough to queue a layer's step, not a model's
COPIED_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}
SAMPLED = {  # column: what nvidia-smi calls it
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "gpu_celsius": "temperature.gpu",
    "gpu_watts": "power.draw",
}
Times = dict[str, dict[str, float]]  # seconds in one round, by rival and stage


@dataclass
class Step:
    """What is timed of a rival.

    Attributes:
        stages: Functions by name, timed one after the other. The first one gets None, and each
            other one the result of the one before.
        prepare: Runs before the stages and is not timed.
        layers: What each time is divided by.
        facts: Further columns of the rival's rows. `Rounds` adds the peak of memory.
    """

    stages: dict[str, Callable[[Any], Any]]
    prepare: Callable[[], None] = lambda: None
    layers: int = 1
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        self.prepare()
        state = None
        for stage in self.stages.values():
            state = stage(state)


class Group(NamedTuple):
    """The rivals of one case.

    Attributes:
        names: The names of the rivals.
        make: Returns the step of a rival. If it raises, the rival is left out.
        prepare_round: Called before each round with its random generator, to draw what the steps
            use in it.
    """

    names: Iterable[str]
    make: Callable[[str], Step]
    prepare_round: Callable[[random.Random], None] = lambda rng: None


def training(
    forward: Callable[[], Tensor],
    g: Tensor | None,
    leaves: Sequence[Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    **further: Any,
) -> Step:
    """Returns a step of forward, backward and perhaps an optimizer.

    Args:
        forward: Computes the output, or the loss.
        g: The gradient of the output, None for a loss.
        leaves: The tensors with a gradient, which is dropped before each step.
        optimizer: Its step is the last stage.
        further: The other fields of the step: layers, facts.
    """

    def drop_gradients() -> None:
        for leaf in leaves:
            leaf.grad = None

    stages = {"forward": lambda _: forward(), "backward": lambda y: y.backward(g)}
    if optimizer is not None:
        stages["optimizer"] = lambda _: optimizer.step()
    return Step(stages, drop_gradients, **further)


# ---- clocks --------------------------------------------------------------------------------------


class Clock:
    """Measures the seconds of each stage of a Step.

    wall     the time that passes. On a GPU it is from an idle device to an idle device, so that
             Python and launches count
    cpu      CPU seconds of this process, for one thread on a busy machine
    events   the GPU's time. The GPU sleeps while the CPU queues the stages. That hides all launches
             of a layer's step, and the first ones of a model's

    On a GPU each measurement starts with a cold L2: a large buffer is read first. It is not
    written, because dirty lines would be written back during the measurement.
    """

    def __init__(self, device: str, kind: str):
        self.kind = kind
        self.is_cuda = device == "cuda"
        if self.is_cuda:
            properties = torch.cuda.get_device_properties(0)
            size = max(FLUSH_BYTES, 4 * getattr(properties, "L2_cache_size", 0))
            self._flush_buffer = torch.zeros(size // 4, device=device)
            self._flush_sum = torch.zeros((), device=device)

    def seconds(self, step: Step, repeats: int = 1) -> dict[str, float]:
        """Returns the seconds of each stage, and their sum as "step" if there are several stages.

        They are per layer, and averages over `repeats` runs back to back.
        """
        mean = np.mean([self._run(step) for _ in range(repeats)], 0) / step.layers
        stages = dict(zip(step.stages, mean.tolist()))
        return stages if len(stages) == 1 else stages | {"step": float(mean.sum())}

    def _run(self, step: Step) -> list[float]:
        step.prepare()
        if self.is_cuda:
            torch.sum(self._flush_buffer, 0, out=self._flush_sum)
        if self.kind == "events":
            # A private name, but without this sleep the launches of a short stage would be timed,
            # not its kernels.
            torch.cuda._sleep(QUEUE_CYCLES)
        state = None
        times = [self._now()]
        for stage in step.stages.values():
            state = stage(state)
            times.append(self._now())
        if self.kind != "events":
            return np.diff(times).tolist()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(times)]

    def _now(self) -> Any:
        """Returns the time in seconds, or an event that the GPU will record."""
        if self.kind == "events":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.process_time() if self.kind == "cpu" else time.perf_counter()


@contextlib.contextmanager
def gpu_samples(device: str) -> Iterator[Callable[[], dict[str, float]]]:
    """Samples clocks, temperature and power once per second, of all GPUs that nvidia-smi lists.

    Yields a function that returns the medians so far: none on a CPU, and none without nvidia-smi.
    """
    if device != "cuda" or shutil.which("nvidia-smi") is None:
        yield dict  # a function that returns {}
        return
    query = ["--query-gpu=" + ",".join(SAMPLED.values()), "--format=csv,noheader,nounits"]
    with tempfile.NamedTemporaryFile("r") as log:
        process = subprocess.Popen(["nvidia-smi", *query, "--loop=1"], stdout=log)

        def medians() -> dict[str, float]:
            lines = io.StringIO(",".join(SAMPLED) + "\n" + Path(log.name).read_text())
            # The last line may be incomplete. Values such as "[N/A]" are left out.
            samples = pd.read_csv(lines, on_bad_lines="skip").apply(pd.to_numeric, errors="coerce")
            return samples.median().dropna().to_dict()

        try:
            yield medians
        finally:
            process.kill()
            process.wait()


@functools.cache
def copy_gb_per_s(device: str) -> float:
    """Returns the bandwidth of torch's copy of a large tensor: bytes read and written."""
    source = torch.zeros(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device, "events" if device == "cuda" else "wall")
    step = Step({"copy": lambda _: target.copy_(source)})
    seconds = [clock.seconds(step)["copy"] for _ in range(11)]
    return 2 * source.nbytes / float(np.median(seconds)) / 1e9


# ---- memory --------------------------------------------------------------------------------------


def memory_changes(call: Callable[[], object]) -> list[int]:
    """Returns each CPU allocation (positive) and release (negative) during a call, in bytes.

    They are in order. Those in C++ code, of autograd and of our operators, are included.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # A private name: the profiler's public summary adds allocations up by operator and loses
    # their order.
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]


def peak_bytes(call: Callable[[], object], is_cuda: bool) -> int:
    """Returns the most that torch allocates during a call, beyond what was allocated before."""
    if not is_cuda:
        return max(itertools.accumulate(memory_changes(call), initial=0))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- rounds --------------------------------------------------------------------------------------


class Rounds:
    """Makes the rivals of a group and measures them round by round.

    A rival that cannot be made or run is left out, and the others are measured.

    Args:
        group: The rivals of one case.
        clock: What measures them.
        measurement_s: About how many seconds one measurement of a rival takes.

    Attributes:
        steps: The steps of the rivals that run, by name.
        repeats: How often each of these steps runs in one measurement, by name.
        failures: Why the other rivals do not run, by name.
    """

    def __init__(self, group: Group, clock: Clock, measurement_s: float):
        self.prepare_round = group.prepare_round
        self.clock = clock
        self.steps: dict[str, Step] = {}
        self.repeats: dict[str, int] = {}
        self.failures: dict[str, str] = {}
        for name in group.names:
            try:
                step = group.make(name)
                clock.seconds(step)  # makes caches, compiled code and the optimizer's state
                step.facts["peak_bytes"] = peak_bytes(step.run, clock.is_cuda)
                begin = time.perf_counter()
                clock.seconds(step)
            except Exception as error:  # the packages that rivals come from may raise anything
                self.failures[name] = reason_of(error)
                continue
            elapsed = time.perf_counter() - begin
            self.steps[name] = step
            self.repeats[name] = max(1, min(1000, round(measurement_s / elapsed)))
        gc.collect()

    def run(self, number: int) -> Times:
        """Returns the seconds of each rival's stages in one round.

        Each rival runs once untimed first, so that caches and allocator are as it leaves them.
        The number seeds the order of rivals, so that round 7 has the same order in every run.
        """
        rng = random.Random(number)
        times = {}
        gc.disable()  # a collection would be timed with the rival that happens to run
        try:
            self.prepare_round(rng)
            for name in rng.sample(list(self.steps), len(self.steps)):
                self.clock.seconds(self.steps[name])
                times[name] = self.clock.seconds(self.steps[name], self.repeats[name])
        finally:
            gc.enable()
        return times


def seconds_of(times: Sequence[Times], rival: str, stage: str) -> np.ndarray:
    """Returns the seconds of a rival's stage in each round, NaN if it was not measured."""
    return np.array([in_round.get(rival, {}).get(stage, np.nan) for in_round in times])


def median_interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Returns the median over rounds and the ends of its 95 % bootstrap interval.

    The ends are NaN for fewer than three rounds.
    """
    middle = float(np.median(ratios))
    if len(ratios) < 3:
        return middle, float("nan"), float("nan")
    if not np.ptp(ratios) > 0:  # the floor over itself, or no floor: scipy would warn
        return middle, middle, middle
    # With a fixed seed, so that the same rounds have the same interval.
    resampled = stats.bootstrap(
        (ratios,), np.median, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    return middle, float(resampled.low), float(resampled.high)


def rows_of(times: Sequence[Times], steps: Mapping[str, Step], floor: str) -> list[dict[str, Any]]:
    """Returns a row per rival and stage.

    `seconds` is the median. `over` is the time over the floor's of the same round, less one; it is
    NaN if the floor was not measured.
    """
    rows = []
    for name, step in steps.items():
        for stage in times[0][name]:
            seconds = seconds_of(times, name, stage)
            over, low, high = median_interval(seconds / seconds_of(times, floor, stage) - 1)
            row = {"rival": name, "stage": stage, "seconds": float(np.median(seconds))}
            row |= {"over": over, "over_low": low, "over_high": high, **step.facts}
            if "least_bytes" in row:  # facts of bench.kernels
                row["gb_per_s"] = row["least_bytes"] / row["seconds"] / 1e9
                row["of_copy"] = row["gb_per_s"] / row["copy_gb_per_s"]
            rows.append(row)
    return rows
