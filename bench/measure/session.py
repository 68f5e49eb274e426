"""Shared by all measuring programs: options, facts of the machine, a result file that a later run continues, progress."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from .isa import add_isa_option, check_isa, restart_if_asked
from .names import chosen
from .shapes import DTYPES
from .store import QUICK, RESULTS, Store, build_id, case_of, newest, runs, setting_of
from .terminal import Table as Table
from .terminal import bar
from .timing import CLOCKS, Clock, ceilings, gpu_state, machine, slug, throttled

T = TypeVar("T")
Show = Callable[[T, list[dict], "Session"], None]  # of a program: prints the results of one case
Draw = Callable[[str, list[dict], Path], list[Path]]  # of a program's name, its cells and a folder: the pictures
ALLOCATORS = ("keep", "system")
# of each program by default
ROUNDS = {"layer": 11, "shared": 9, "model": 7, "profile": 11, "kernels": 15, "host": 61, "experts": 9, "tasks": 9}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def add_options(parser: argparse.ArgumentParser, dtypes: str = "fp32,bf16") -> None:
    """Adds the options of every program. dtypes: the default, for --help (`check_options` fills it in)."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (a GPU if any)")
    parser.add_argument("--dtypes", help=f"some of fp32, bf16, fp16 ({dtypes})")
    parser.add_argument("--threads", help="CPU thread counts, comma-separated (1 and all; 1 beside a GPU)")
    parser.add_argument("--rounds", type=int, help="rounds of all rivals per case")
    parser.add_argument("--clock", choices=CLOCKS, help="wall; cpu: CPU seconds of one thread; events (a GPU's default)")
    parser.add_argument(
        "--allocator", choices=ALLOCATORS, default="keep", help="keep: freed memory stays with the process (keep)"
    )
    add_isa_option(parser)
    parser.add_argument("--results", help="folder for the results (bench/results/<machine>; with --quick demo_results/bench)")
    parser.add_argument("--keep", action="store_true", help="with --quick, also write to bench/results")
    parser.add_argument("--fresh", action="store_true", help="measure again, although results of this build exist")


def keep_memory() -> bool:
    """Makes glibc's malloc keep freed memory for the rest of this process. Returns False with another malloc.

    By default malloc returns a freed block at the end of the heap to the system, and the next allocation has a page fault every
    4 KiB: a tenth of a layer's time, for some rivals and not for others, depending on the order of their frees.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def choose_folder(options: argparse.Namespace) -> None:
    """Sets the results folder of a quick run that names none."""
    if getattr(options, "quick", False) and not options.keep and options.results is None:
        options.results = str(QUICK)


def check_options(options: argparse.Namespace, rounds: int, dtypes: str = "fp32,bf16") -> argparse.Namespace:
    """Checks the options and replaces text by lists. rounds, dtypes: the defaults. Raises ValueError for a bad option."""
    if options.device not in ("cuda", "cpu"):
        raise ValueError(f"device: expected cpu or cuda, got {options.device!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU for cuda, found none (torch.cuda.is_available() is False)")
    check_isa(options.isa, options.device)
    options.dtypes = chosen("dtypes", options.dtypes, DTYPES, dtypes.split(","))
    count = os.cpu_count() or 1
    text = options.threads if options.threads is not None else "1" if options.device == "cuda" else f"1,{count}"
    if not all(part.isdigit() and 1 <= int(part) <= count for part in text.split(",")):
        raise ValueError(f"threads: expected numbers from 1 to {count}, got {text!r}")
    options.threads = sorted({int(part) for part in text.split(",")})
    options.clock = options.clock or ("events" if options.device == "cuda" else "wall")
    if options.clock == "cpu" and (options.threads != [1] or options.device == "cuda"):
        raise ValueError("clock: expected one CPU thread for cpu seconds; add --threads 1 --device cpu")
    if options.clock == "events" and options.device == "cpu":
        raise ValueError("clock: expected wall or cpu on a CPU, got events, which need a GPU")
    options.rounds = rounds if options.rounds is None else options.rounds
    if options.rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {options.rounds}")
    choose_folder(options)
    if options.results == "":
        raise ValueError("results: expected a folder, got ''")
    return options


def brief(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


class Session:
    """One run of a program that measures into <results>/<file>."""

    def __init__(self, options: argparse.Namespace, file: str, **settings: object):
        self.options, self.device = options, torch.device(options.device)
        kept = options.allocator == "keep" and keep_memory()
        self.facts = machine(self.device)
        self.folder = Path(options.results) if options.results else RESULTS / slug(self.facts["name"])
        self.store = Store(self.folder / file).prepare()
        self.settings = {"build": build_id(), "rounds": options.rounds, "clock": options.clock, "isa": options.isa, **settings}
        self.settings["allocator"] = "keep" if kept else "system"
        self.clock = Clock(self.device, options.clock)
        self.failures: list[str] = []
        self._ceilings: dict[tuple[str, int], dict[str, float]] = {}
        here = setting_of(self.settings | {"machine": self.facts})
        self._of_setting = [cell for cell in self.store.read() if setting_of(cell) == here]
        same = [c for c in self._of_setting if all(c.get(name) == value for name, value in self.settings.items())]
        self._kept = [] if options.fresh else runs(same)

    def introduce(self) -> None:
        """Prints the machine, the build and the settings."""
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        build, clock, allocator = (self.settings[name] for name in ("build", "clock", "allocator"))
        self.say(f"{facts}, build {build}, clock {clock}, allocator {allocator}")
        load = os.getloadavg()[0]
        if load > 0.5 * (os.cpu_count() or 1):
            self.say(f"load average {load:.1f}: other programs run here, so times will vary")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def fail(self, text: str) -> None:
        """Prints and keeps one line on what could not be measured; the run continues."""
        self.failures.append(text)
        self.say(f"not measured: {text}")

    @contextlib.contextmanager
    def attempt(self, name: str, ends: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
        """For one case or rival: an exception becomes one line and the run continues, except those of `ends`."""
        try:
            yield
        except ends:
            raise
        except Exception as error:  # other packages may raise anything; the other cases are still measured
            self.fail(f"{name}: {brief(error)}")

    def kept(self, case: tuple, rivals: Iterable[str]) -> list[dict]:
        """The case's last run in the result file with all rivals and these settings; [] if there is none."""
        for run in reversed(self._kept):
            if case_of(run[0]) == tuple(case) and set(rivals) <= {cell["rival"] for cell in run}:
                return run
        return []

    def todo(self, cases: list[T], rivals: Callable[[T], Iterable[str]], show: Show) -> list[T]:
        """The cases without kept results. Shows the results of the others."""
        found = [(case, self.kept(case, rivals(case))) for case in cases]
        left = [case for case, results in found if not results]
        if len(left) < len(cases):
            self.say(f"{len(cases) - len(left)} of {len(cases)} cases are in {self.store.path} already (--fresh: again)")
        for case, results in found:
            if results:
                show(case, results, self)
        return left

    def run(self, cases: list[T], rivals: Callable[[T], Iterable[str]], measure: Callable[[T], list[dict]], show: Show) -> None:
        """Measures the cases without kept results; keeps and shows each as it ends."""
        left = self.todo(cases, rivals, show)
        with progress(len(left)) as begin:
            for case in left:
                begin(case.name())
                torch.set_num_threads(case.threads)
                with self.attempt(case.name()):
                    results = measure(case)
                    self.keep(case, results)
                    show(case, results, self)

    def first_ceilings(self, dtype: str, threads: int) -> dict[str, float]:
        """The ceilings of the first kept cell, so that a continued run chooses the same cases; measured now if none is kept."""
        for cell in self._of_setting:
            if (cell["case"].get("dtype"), cell["case"].get("threads")) == (dtype, threads) and "ceilings" in cell:
                return cell["ceilings"]
        return self.ceilings(dtype, threads)

    def ceilings(self, dtype: str, threads: int) -> dict[str, float]:
        """This machine's ceilings, measured once a run for each dtype and thread count."""
        key = (dtype, threads)
        if key not in self._ceilings:
            torch.set_num_threads(threads)
            self._ceilings[key] = ceilings(self.device, DTYPES[dtype], self.clock)
        return self._ceilings[key]

    def keep(self, case, results: list[dict]) -> None:
        """Appends one cell per rival to the result file."""
        shared = {"case": case._asdict(), **self.settings, "machine": self.facts, "when": time.time()}
        shared["load"] = os.getloadavg()[0]  # above the thread count, other programs ran too
        for result in results:
            self.store.append(shared | result)

    @contextlib.contextmanager
    def watched(self, name: str) -> Iterator[dict[str, dict[str, str]]]:
        """Yields {"before", "after"}: the GPU's clocks and throttle reasons. Prints a line if it was throttled."""
        state = {"before": gpu_state(self.device)}
        yield state
        state["after"] = gpu_state(self.device)
        for when, found in state.items():
            if throttled(found):
                facts = ", ".join(f"{key} {value}" for key, value in found.items())
                self.say(f"{name}: the GPU was throttled {when} it: {facts}")

    def _draw(self, draw: Draw) -> None:
        """Draws the pictures; prints a line instead if matplotlib is not installed."""
        try:
            drawn = draw(self.store.path.stem, newest(self.store.read()), self.folder)
            self.say(f"pictures: {', '.join(path.name for path in drawn)}")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "matplotlib":
                raise
            self.say("no pictures: matplotlib is not installed; python -m bench.report draws them where it is")

    def finish(self, draw: Draw | None = None) -> int:
        """Draws the pictures, and prints where the results are. Returns 1 if something could not be measured."""
        if draw is not None:
            self._draw(draw)
        self.say(f"results in {self.store.path}")
        if self.failures:
            self.say(f"not measured, {len(self.failures)}: " + "; ".join(self.failures))
        return int(bool(self.failures))


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar of `total` cases. Call the yielded function with each case's name. Restores torch's thread count."""
    threads = torch.get_num_threads()
    try:
        with bar(total) as begin:
            yield begin
    finally:
        torch.set_num_threads(threads)


def start(program: str, main: Callable[[], int]) -> None:
    """Runs main and exits with its status, or with one line for an error that a user can correct."""
    restart_if_asked(sys.argv[1:])
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"{program}: needs the package {error.name}, which is not installed (pip install {error.name})")
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; what was measured is kept, the same command goes on from there")


def time_text(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 0.01 else f"{seconds * 1e3:.2f} ms"


def bytes_text(count: float) -> str:
    return f"{count / 2**10:.0f} KiB" if abs(count) < 2**20 else f"{count / 2**20:.1f} MiB"
