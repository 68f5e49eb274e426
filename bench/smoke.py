"""Every operator in every form against float64, in processes that may crash.

    python -m bench.smoke                           on the GPU
    python -m bench.smoke --forms fold,shrink --dtypes bf16 --device cpu
    python -m bench.smoke --in-process --shapes 2   without processes, for compute-sanitizer

The forms are the entries of the tests' table of operators (python_tests/test_operators.py): each
runs all strategies, fresh and given sums, and memory with NaN around every operand. "dropout" runs
an entry with dropout, "fused" with the fused strategy in place of beta. Each form runs in a
process: bf16 first, then the other dtypes, also with float32 factors. An outcome is printed as soon
as it is known:

    passed     all numbers are right, and a second run has the same bits
    skipped    the device cannot run the form; the reason follows
    wrong      a number differs from float64, or the second run from the first
    failed     an error was raised, for example a CUDA error
    crashed    the process ended
    hung       the process printed nothing for 20 s and was ended

After the last three a new process runs the remaining dtypes, because a CUDA error is sticky.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from lotr_ext.core.strategy import fused_obstacle

ROOT = Path(__file__).resolve().parents[1]
# The dtype of x, and of factors if they have another one.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16+fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
START_S = 90  # for the imports of many processes at once
WATCHDOG_S = 20
DROPPED = 0.4


def table() -> ModuleType:
    """Returns the tests of operators on a GPU, which import the table."""
    # The tests fill new memory with NaN, in a mode of torch in which cuBLAS needs this setting.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for folder in ("python_tests", "python_tests/cuda"):
        sys.path.insert(0, str(ROOT / folder))
    return importlib.import_module("test_gpu_operators")


def forms() -> list[str]:
    """Returns the entries of the table, each followed by its variants."""
    tests = table()
    operators = tests.test_operators
    names = []
    for name in operators.TABLE:
        names.append(name)
        if name in operators.DROPS:
            names.append(f"{name} dropout")
        if name in tests.FUSED_OPERATORS:
            names.append(f"{name} fused")
    return names


# ---- one process ---------------------------------------------------------------------------------


def obstacle(form: str, dtype: str, device: str) -> str | None:
    """Why the device cannot run a form, None if it can."""
    if not form.endswith(" fused"):
        return None
    if "+" in dtype:
        return "the fused strategy needs x and factors of one dtype"
    return fused_obstacle(64, 64, 16, DTYPES[dtype][0], torch.device(device))


def error_line(text: str) -> str:
    """Returns the line of a message that says most: the first with "CUDA error", else the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "CUDA error" in line), lines[0])[:300]


def outcome_of(
    form: str,
    dtype: str,
    device: str,
    shapes: int | None = None,
    before: Callable[[str], None] = lambda shape: None,
) -> str:
    """Runs a form in this process.

    Args:
        shapes: How many of the table's shapes, None for all.
        before: Called with each shape before it runs.
    """
    reason = obstacle(form, dtype, device)
    if reason is not None:
        return f"skipped: {reason}"
    tests = table()
    operators = tests.test_operators
    name, _, variant = form.partition(" ")
    on_device = tests.OnDevice(device, fused=variant == "fused")
    p = DROPPED if variant == "dropout" else 0.0
    sizes = tests.FUSED_SHAPES if variant == "fused" else operators.SHAPES
    for i, shape in enumerate(sizes[::-1][:shapes]):
        layout = operators.LAYOUTS[i % len(operators.LAYOUTS)]
        place = f"{' x '.join(map(str, shape))} {layout}"
        before(place)
        try:
            with mock.patch.object(operators, "ops", on_device):
                tests.check(name, partial(operators.Case, shape, *DTYPES[dtype], layout, p), place)
        except AssertionError as error:
            return f"wrong: {error_line(str(error))}"
        except Exception as error:
            return f"failed: {place}: {type(error).__name__}: {error_line(str(error))}"
    return "passed"


def child(form: str, dtypes: Sequence[str], device: str, shapes: int | None) -> None:
    """The program of a process: prints @ready, @shape and @outcome. It ends after an error."""
    table()
    print("@ready", flush=True)
    for dtype in dtypes:
        outcome = outcome_of(
            form, dtype, device, shapes, lambda shape: print(f"@shape {shape}", flush=True)
        )
        print(f"@outcome {outcome}", flush=True)
        if outcome.startswith("failed"):
            return


# ---- all processes -------------------------------------------------------------------------------


class Process:
    """A child process whose lines are read with a time limit."""

    def __init__(self, command: Sequence[str]):
        environment = os.environ | {
            "CUDA_LAUNCH_BLOCKING": "1",
            "OMP_NUM_THREADS": "1",  # many processes compute in float64 at once
            "PYTHONFAULTHANDLER": "1",
        }
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.output: list[str] = []
        self.shape = "at the start"
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def next_message(self, limit_s: float) -> str | None:
        """Returns the next @ready or @outcome, None if the process ended.

        Raises:
            queue.Empty: if no line comes for limit_s seconds.
        """
        while (line := self._lines.get(timeout=limit_s)) is not None:
            if line.startswith("@shape "):
                self.shape = line.removeprefix("@shape ")
            elif line.startswith("@"):
                return line
            else:
                self.output.append(line)
        return None

    def end(self) -> str:
        """Ends the process. Returns what its end and its output say."""
        self.process.kill()
        status = self.process.wait()
        message = error_line("\n".join(self.output))
        last = self.output[-1].strip() if self.output else ""
        text = message if message == last or not last else f"{message} .. {last[:200]}"
        reason = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"{reason}, {self.shape}: {text}"


def run_form(
    command: Callable[[Sequence[str]], Sequence[str]],
    dtypes: Sequence[str],
    report: Callable[[str, str], None],
    watchdog_s: float = WATCHDOG_S,
) -> None:
    """Runs the dtypes of one form in as many processes as it takes, and reports each outcome.

    Args:
        command: The command of a process for some dtypes.
        report: Called with a dtype and its outcome.
        watchdog_s: After so many seconds without a line a process is ended.
    """
    remaining = list(dtypes)
    while remaining:
        process = Process(command(remaining))
        limit_s = START_S
        outcome = None
        try:
            while remaining:
                message = process.next_message(limit_s)
                limit_s = watchdog_s
                if message == "@ready":
                    continue
                if message is None:
                    process.process.wait()
                    outcome = f"crashed: {process.end()}"
                    break
                report(remaining.pop(0), message.removeprefix("@outcome "))
                if message.startswith("@outcome failed"):
                    break
        except queue.Empty:
            process.end()
            outcome = f"hung: {process.shape}, ended after {limit_s:.0f} s without an answer"
        if outcome is not None:
            report(remaining.pop(0), outcome)
        process.end()


def run_all(options: argparse.Namespace) -> int:
    """Runs all forms side by side. Prints and keeps each outcome as it comes.

    Returns:
        1 if a form has not passed and was not skipped.
    """
    lock = threading.Lock()
    counts: dict[str, int] = {}
    planned = len(options.forms) * len(options.dtypes)

    def report(form: str, dtype: str, outcome: str) -> None:
        with lock:
            kind = outcome.partition(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
            print(f"{form:30} {dtype:10} {outcome}", flush=True)
            if options.results is not None:
                options.results.mkdir(parents=True, exist_ok=True)
                row = {"form": form, "dtype": dtype, "outcome": outcome, "planned": planned}
                with open(options.results / "smoke.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")

    def command(form: str, dtypes: Sequence[str]) -> list[str]:
        words = ["--child", "--forms", form, "--dtypes", ",".join(dtypes)]
        words += ["--device", options.device]
        if options.shapes is not None:
            words += ["--shapes", str(options.shapes)]
        return [sys.executable, "-m", "bench.smoke", *words]

    if options.results is not None:
        (options.results / "smoke.jsonl").unlink(missing_ok=True)
    with ThreadPoolExecutor(min(14, os.cpu_count() or 1)) as pool:
        # the first dtype of all forms before the others
        jobs = [
            pool.submit(run_form, partial(command, form), dtypes, partial(report, form))
            for dtypes in (options.dtypes[:1], options.dtypes[1:])
            for form in options.forms
        ]
        for job in jobs:
            job.result()
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return int(bool(set(counts) - {"passed", "skipped"}))


def run_here(options: argparse.Namespace) -> int:
    """Runs all forms in this process. Returns 1 if one has not passed and was not skipped."""
    good = True
    for dtype in options.dtypes:
        for form in options.forms:
            outcome = outcome_of(form, dtype, options.device, options.shapes)
            print(f"{form:30} {dtype:10} {outcome}", flush=True)
            good = good and outcome.startswith(("passed", "skipped"))
    return int(not good)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.smoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--forms", help="some forms, comma-separated (all)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="some of " + ", ".join(DTYPES))
    parser.add_argument("--shapes", type=int, help="only so many shapes of the table")
    parser.add_argument("--results", type=Path, help="a folder for smoke.jsonl")
    parser.add_argument("--in-process", action="store_true", help="no process for each form")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    every_form = forms()
    options.forms = options.forms.split(",") if options.forms else every_form
    options.dtypes = options.dtypes.split(",")
    for name, values, valid in (
        ("forms", options.forms, every_form),
        ("dtypes", options.dtypes, DTYPES),
    ):
        for value in values:
            if value not in valid:
                parser.error(f"{name}: expected some of {', '.join(valid)}, got {value!r}")
    if options.child:
        child(options.forms[0], options.dtypes, options.device, options.shapes)
        return 0
    return run_here(options) if options.in_process else run_all(options)


if __name__ == "__main__":
    sys.exit(main())
