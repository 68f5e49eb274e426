"""The command line of a measuring program: its cases, its rivals, its result file and tables.

    cases -> build: a Group of rivals -> rounds -> rows into the file, as they come -> tables

A program is a module with a `Program` named PROGRAM: its cases, and a function `build` that makes
the rivals of a case. `Program.main` measures them, for example bench.layer:

    case     {"m": 512, "k": 768, "n": 768, "r": 16, "dtype": "bf16", "threads": 1}
    rivals   frozen, lora-eager, .., lotr_ext, each timed once per round
    rows     a median per rival and stage, in bench/results/<machine>/layer.jsonl

Nothing that was measured is lost. A rival that cannot run is left out. A case that fails, and a
program that is stopped, keep the rounds that they have measured. With --against, every round
measures this lotr_ext and another checkout's.
"""

import argparse
import importlib
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from .common import (
    DTYPES,
    QUICK,
    RESULTS,
    ROOT,
    Case,
    case_table,
    commit,
    keep_memory,
    machine,
    named,
    parser_of,
    pivot,
    provenance,
    read,
    reason_of,
    replace_rows,
    seconds_text,
    show,
    sizes,
    slug,
    some_of,
)
from .timing import (
    CLOCKS,
    Clock,
    Group,
    Rounds,
    Step,
    Times,
    gpu_samples,
    median_interval,
    rows_of,
    seconds_of,
)

CASE_ENDING = ", {dtype}, threads: {threads}"  # of a case's title
AGAINST_ROUNDS = 41  # by default, because two checkouts differ by less than rivals do
DEVICE_LOST = 3  # exit status after a CUDA error
WRITE_EVERY_S = 2.0

# The options of every program. `Program.parser` adds those that depend on the program.
OPTIONS: dict[str, dict[str, Any]] = {
    "quick": {
        "action": "store_true",
        "help": "3 rounds of the first case, into demo_results/bench",
    },
    "device": {
        "choices": ("cpu", "cuda"),
        "default": "cuda" if torch.cuda.is_available() else "cpu",
    },
    "threads": {"type": sizes("threads"), "default": "1", "help": "CPU thread counts (1)"},
    "clock": {
        "choices": CLOCKS,
        "help": "default: cpu for one CPU thread, wall for more, events on a GPU",
    },
    "against": {
        "type": Path,
        "help": "another built checkout, whose lotr_ext every round measures as well",
    },
    "from": {
        "type": int,
        "default": 1,
        "dest": "first",
        "help": "start with this case (not with --against)",
    },
    "require-kernels": {
        "action": "store_true",
        "help": "exit with status 1 if the PyTorch fallback would replace our kernels",
    },
    "results": {"type": Path, "help": "folder for the results (bench/results/<machine>)"},
    "show": {"type": Path, "help": "print the tables of a result file, and measure nothing"},
}


@dataclass(frozen=True)
class Program:
    """One measuring program.

    Attributes:
        name: The name of its module in `bench`.
        doc: What --help prints.
        rivals: The names of all rivals, in the order of the tables.
        build: Makes the rivals of a case, only those in `options.rivals` if it is set.
        title_format: A format string that makes a case's title from its columns.
        dimensions: The names of the numbers in a shape: ("m", "k", "n", "r") for 512x768x768x16.
            A program with dimensions has the option --shapes.
        shapes: The shapes that are measured without --shapes, by device.
        cases: Makes the cases from the options, without dtype and threads. By default a case is a
            shape.
        floor: The rival that the others are compared with.
        rounds: How many rounds are measured without --rounds.
        measurement_s: About how many seconds one measurement of a rival takes. A step that is
            shorter is repeated within it.
        dtypes: The dtypes that are measured without --dtypes, the most important first.
        compared: The rivals that --against compares without --rivals.
        is_pivoted: Whether the program prints one table of all cases instead of one per case.
        options: Options that only this program has.
    """

    name: str
    doc: str
    rivals: Sequence[str]
    build: Callable[[Case, argparse.Namespace], Group]
    title_format: str
    dimensions: Sequence[str] = ()
    shapes: Mapping[str, str] = field(default_factory=dict)
    cases: Callable[[argparse.Namespace], list[Case]] = lambda options: options.shapes
    floor: str = "frozen"
    rounds: int = 11
    measurement_s: float = 0.02
    dtypes: str = "bf16,fp32"
    compared: tuple[str, ...] = ()
    is_pivoted: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    # ---- options ----

    def parser(self) -> argparse.ArgumentParser:
        per_program: dict[str, dict[str, Any]] = {
            "dtypes": {
                "type": some_of(DTYPES),
                "default": self.dtypes,
                "help": f"some of {', '.join(DTYPES)} ({self.dtypes})",
            },
            "rounds": {
                "type": int,
                "help": f"per case ({self.rounds}; with --against {AGAINST_ROUNDS})",
            },
            "rivals": {"type": some_of(self.rivals), "help": f"some of {', '.join(self.rivals)}"},
        }
        if self.dimensions:
            per_program["shapes"] = {
                "type": sizes(*self.dimensions),
                "help": f"{'x'.join(self.dimensions)}, comma-separated",
            }
        return parser_of(self.name, self.doc, OPTIONS | per_program | dict(self.options))

    def arguments(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Returns the options with all defaults filled in. A bad option ends the program.

        `options.words` is the command line, which the output repeats.
        """
        parser = self.parser()
        words = list(sys.argv[1:] if argv is None else argv)
        options = parser.parse_args(words, argparse.Namespace(words=words))
        # CPU seconds add up over threads, and only a GPU records events.
        clocks = ["wall"]
        if options.device == "cuda":
            clocks = ["events", "wall"]
        elif options.threads == [{"threads": 1}]:
            clocks = ["cpu", "wall"]
        options.clock = options.clock or clocks[0]
        if options.clock not in clocks:
            parser.error(
                f"clock: expected {' or '.join(clocks)} on {options.device} with these threads, "
                f"got {options.clock}"
            )
        if self.dimensions and options.shapes is None:
            options.shapes = sizes(*self.dimensions)(self.shapes[options.device])
        default_rounds = AGAINST_ROUNDS if options.against else self.rounds
        options.rounds = options.rounds or (3 if options.quick else default_rounds)
        if options.against and not list((options.against / "lotr_ext").glob("_C*.so")):
            parser.error(
                f"against: expected a checkout with a built lotr_ext, got {options.against}. "
                f"Build it there first."
            )
        return options

    def all_cases(self, options: argparse.Namespace) -> list[Case]:
        cases = self.cases(options)[:1] if options.quick else self.cases(options)
        return [
            {**case, "dtype": dtype, **threads}
            for dtype, threads, case in itertools.product(options.dtypes, options.threads, cases)
        ]

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Measures all cases, compares two checkouts, or shows recorded rows.

        Returns:
            The exit status.
        """
        options = self.arguments(argv)
        cases = self.all_cases(options)
        if options.show:
            self.tables(read(options.show), list(cases[0]))
            return 0
        fallback = fallback_line(cases, options.device) if options.require_kernels else None
        if fallback is not None:
            print(f"require-kernels: {fallback}", file=sys.stderr)
            return 1
        if options.against:
            compare(self, cases, options)
            return 0
        return Measurement(self, options).run(cases)

    # ---- tables ----

    def tables(self, frame: pd.DataFrame, key: list[str]) -> None:
        """Prints the tables of recorded rows. The columns `key` tell the cases apart."""
        if self.is_pivoted:
            show(
                f"{self.name}: time over {named(self.floor)}",
                pivot(frame, self.title_format + CASE_ENDING, self.floor),
            )
            return
        titles = [self.title(row) for row in frame.to_dict("records")]
        for title, rows in frame.groupby(titles, sort=False):
            show(str(title), case_table(rows, self.floor, key))

    def title(self, case: Case) -> str:
        return (self.title_format + CASE_ENDING).format(**case)


class Measurement:
    """One run of a program: what it has measured, and its result file.

    Attributes:
        provenance: The columns of every row.
        path: The result file.
        rows: The rows that were measured, by case.
        status: The exit status: 1 if a case or a rival could not be measured, DEVICE_LOST after a
            CUDA error, because no call of the process can then use the GPU.
    """

    def __init__(self, program: Program, options: argparse.Namespace):
        self.program = program
        self.options = options
        self.provenance = provenance(options)
        folder = options.results or (QUICK if options.quick else RESULTS)
        self.path = folder / slug(self.provenance["machine"]) / f"{program.name}.jsonl"
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.status = 0

    def run(self, cases: Sequence[Case]) -> int:
        """Measures the cases, and prints their tables. Returns the exit status."""
        keep_memory()
        for number, case in list(enumerate(cases, 1))[self.options.first - 1 :]:
            title = self.program.title(case)
            print(f"[{number}/{len(cases)}] {title}", file=sys.stderr, flush=True)
            try:
                self.measure(case)
            except Exception as error:  # the other cases are still measured
                self.fail(f"{title}: {reason_of(error)}")
            if self.status == DEVICE_LOST:
                break
        if self.rows:
            rows = itertools.chain.from_iterable(self.rows.values())
            self.program.tables(pd.DataFrame(rows), list(cases[0]))
        print(
            f"\npython -m bench.{self.program.name} {' '.join(self.options.words)}",
            "{machine}, {clock} seconds, {date}, {commit}".format(**self.provenance),
            f"results in {self.path}",
            sep="\n",
        )
        return self.status

    def measure(self, case: Case) -> None:
        """Measures one case, and writes its rows every WRITE_EVERY_S seconds and at the end."""
        options = self.options
        torch.set_num_threads(case["threads"])
        # A run of few rounds only shows that everything works, so steps are not repeated.
        measurement_s = 0.0 if options.quick or options.rounds < 5 else self.program.measurement_s
        clock = Clock(options.device, options.clock)
        rounds = Rounds(self.program.build(case, options), clock, measurement_s)
        for name, reason in rounds.failures.items():
            self.fail(f"{self.program.title(case)}, {named(name)}: {reason}")
        if not rounds.steps:
            return
        times: list[Times] = []
        with gpu_samples(options.device) as samples:
            try:
                next_write = time.monotonic() + WRITE_EVERY_S
                for number in range(options.rounds):
                    times.append(rounds.run(number))
                    if time.monotonic() > next_write:
                        self.write_rows(case, times, rounds.steps, samples())
                        next_write = time.monotonic() + WRITE_EVERY_S
            finally:  # also when a round raises, and when the program is interrupted
                if times:
                    self.write_rows(case, times, rounds.steps, samples())

    def write_rows(
        self,
        case: Case,
        times: Sequence[Times],
        steps: Mapping[str, Step],
        samples: dict[str, float],
    ) -> None:
        """Writes the rows of a case. They replace those that were written after fewer rounds."""
        columns = self.provenance | {"rounds": len(times)} | samples | case
        rows = [columns | row for row in rows_of(times, steps, self.program.floor)]
        self.rows[str(case)] = rows
        replace_rows(self.path, rows, ["machine", *case])

    def fail(self, line: str) -> None:
        # Only the text of an error says that it is CUDA's: torch raises a RuntimeError for it.
        self.status = DEVICE_LOST if "CUDA error" in line else max(self.status, 1)
        print(f"not measured: {line}", file=sys.stderr, flush=True)


def fallback_line(cases: Sequence[Case], device: str) -> str | None:
    """Returns the line of `explain` for a case that runs the PyTorch fallback, None without one."""
    from lotr_ext import LoTRLinear, explain

    # The kernels depend on dtype and rank, not on the other sizes. For a rank above them,
    # LoTRLinear would warn.
    for dtype, rank in dict.fromkeys((DTYPES[case["dtype"]], case["r"]) for case in cases):
        layer = LoTRLinear(256, 256, rank, device=device, dtype=dtype)
        line = explain(layer, torch.zeros(1, 256, device=device, dtype=dtype))
        if "kernels of lotr_ext" not in line:
            return line
    return None


# ---- two checkouts -------------------------------------------------------------------------------


class Worker:
    """A process that measures with the lotr_ext of one checkout.

    There are two requests: {"case": ..} makes the rivals of a case, and the reply has the reason of
    each that cannot run; {"round": number} measures one round, and the reply has the times.
    """

    def __init__(self, name: str, argv: list[str], checkout: Path):
        self.connection, other_end = Pipe()
        # lotr_ext comes from the checkout, bench from this tree, whatever is installed.
        code = (
            f"import sys; sys.path.insert(0, {str(checkout.resolve())!r}); import lotr_ext; "
            f"sys.path[0] = {str(ROOT)!r}; "
            f"from bench.program import reply_to_requests; "
            f"reply_to_requests({name!r}, {argv!r}, {other_end.fileno()})"
        )
        command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(command, pass_fds=[other_end.fileno()])
        other_end.close()  # so that `recv` raises when the process has ended

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a request, and returns the reply.

        Raises:
            EOFError: If the process has ended. What it printed says why.
        """
        self.connection.send(message)
        return self.connection.recv()

    def close(self) -> None:
        self.connection.send(None)
        self.process.wait()


def reply_to_requests(name: str, argv: list[str], file_descriptor: int) -> None:
    """Runs in the process of a `Worker`: replies to its requests, until one is None."""
    connection = Connection(file_descriptor)
    program = importlib.import_module(f"bench.{name}").PROGRAM
    options = program.arguments(argv)
    keep_memory()
    clock = Clock(options.device, options.clock)
    for message in iter(connection.recv, None):
        if "case" in message:
            torch.set_num_threads(message["case"]["threads"])
            # At least 50 ms: two checkouts differ by less than rivals do.
            measurement_s = max(program.measurement_s, 0.05)
            rounds = Rounds(program.build(message["case"], options), clock, measurement_s)
            connection.send(rounds.failures)
        else:
            connection.send(rounds.run(message["round"]))


def compare(program: Program, cases: Sequence[Case], options: argparse.Namespace) -> None:
    """Measures this checkout and another one in each round, and prints the ratio of their times."""
    words = options.words
    if program.compared and not options.rivals:
        words = [*words, "--rivals", ",".join(program.compared)]
    workers = {
        "new": Worker(program.name, words, ROOT),
        "old": Worker(program.name, words, options.against),
    }
    for number, case in enumerate(cases, 1):
        title = program.title(case)
        print(f"[{number}/{len(cases)}] {title}", file=sys.stderr, flush=True)
        for side, worker in workers.items():
            for rival, reason in worker.request({"case": case}).items():
                print(f"not measured: {side}, {named(rival)}: {reason}", file=sys.stderr)
        times: dict[str, list[Times]] = {"new": [], "old": []}
        for round_number in range(options.rounds):
            # In random order, so that no side always runs second.
            for side in random.Random(round_number).sample(list(workers), 2):
                times[side].append(workers[side].request({"round": round_number}))
        show(title, comparison(times["new"], times["old"], program.floor))
    for worker in workers.values():
        worker.close()
    print(
        f"\npython -m bench.{program.name} {' '.join(words)}\n"
        f"{commit()} (new) over {commit(options.against)} (old), medians of {options.rounds} "
        f"rounds, 95 % intervals\n{machine(options.device)}, {options.clock} seconds, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def comparison(new: list[Times], old: list[Times], floor: str) -> pd.DataFrame:
    """Returns the ratios of new to old times, a row per rival and stage.

    The last column first divides each time by the floor's of the same checkout and round. A floor
    without lotr_ext runs the same code in both checkouts, so the machine's drift cancels out.
    """
    rows = []
    for rival, stages in new[0].items():
        for stage in stages:
            seconds = seconds_of(new, rival, stage)
            old_seconds = seconds_of(old, rival, stage)
            floor_ratio = seconds_of(new, floor, stage) / seconds_of(old, floor, stage)
            rows.append(
                {
                    "": f"{named(rival)}, {stage}",
                    "new": seconds_text(np.median(seconds)),
                    "old": seconds_text(np.median(old_seconds)),
                    "new / old": _ratio_text(seconds / old_seconds),
                    f"the same, each over its {named(floor)}": _ratio_text(
                        seconds / old_seconds / floor_ratio
                    ),
                }
            )
    return pd.DataFrame(rows)


def _ratio_text(ratio: np.ndarray) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*median_interval(ratio))
