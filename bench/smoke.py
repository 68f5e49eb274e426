"""Every operator in every form against float64, in processes that may crash.

    python -m bench.smoke                           on the GPU
    python -m bench.smoke --forms fold,shrink --dtypes bf16 --device cpu
    python -m bench.smoke --in-process --shapes 2   without processes, for compute-sanitizer

The forms are the entries of the tests' table of operators (python_tests/test_operators.py): each
runs all strategies, sums that the operator allocates and sums that the caller passes, and memory
with NaN around every operand. "dropout" runs an entry with dropout, "fused" with the fused strategy
in place of beta. A form runs in bf16 first, then in the other dtypes, also with float32 factors. An
outcome is printed as soon as it is known:

    passed     all numbers are right, and a second run has the same bits
    skipped    the device cannot run the form; the reason follows
    wrong      a number differs from float64, or the second run from the first
    failed     an error was raised, for example a CUDA error
    crashed    the process ended
    hung       one shape took 20 s, and the process was ended

Several processes share the forms. After failed, crashed and hung a new process takes over the rest,
because after a CUDA error no call of the process can use the GPU.

    main -> run_all -> run_jobs   starts a process, reads its lines and reports outcomes
                       child      in that process: prints @shape and @outcome
                       outcome_of runs one form
"""

import argparse
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import pandas as pd
import torch

from lotr_ext.core.strategy import fused_obstacle

from .common import ROOT, parser_of, some_of, telling_line, write

# The dtypes of x and of the factors.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16+fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
MOST_PROCESSES = 14
WATCHDOG_S = 20  # the most that one shape may take
DROPPED = 0.4  # the probability of the forms with dropout
OPTIONS: dict[str, dict] = {  # and --forms, which needs the tests' table
    "device": {"choices": ("cuda", "cpu"), "default": "cuda"},
    "dtypes": {
        "type": some_of(DTYPES),
        "default": list(DTYPES),
        "help": f"some of {', '.join(DTYPES)}",
    },
    "shapes": {"type": int, "help": "only so many shapes of the table"},
    "results": {"type": Path, "help": "a folder for smoke.jsonl"},
    "in-process": {"action": "store_true", "help": "all forms in this process"},
    "child": {"type": json.loads, "help": argparse.SUPPRESS},
}
Job = tuple[str, str]  # a form and a dtype


def operator_tests() -> ModuleType:
    """Returns the tests of operators on a GPU, which import the table."""
    # The tests fill new memory with NaN, in a mode of torch in which cuBLAS needs this setting.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for folder in ("python_tests", "python_tests/cuda"):
        sys.path.insert(0, str(ROOT / folder))
    return importlib.import_module("test_gpu_operators")


def forms() -> list[str]:
    """Returns the entries of the table, each followed by its variants."""
    tests = operator_tests()
    operators = tests.test_operators
    variants = {"dropout": operators.DROPS, "fused": tests.FUSED_OPERATORS}
    names = []
    for name in operators.TABLE:
        names.append(name)
        names += [f"{name} {variant}" for variant, members in variants.items() if name in members]
    return names


# ---- one process ---------------------------------------------------------------------------------


def obstacle(form: str, dtype: str, device: str) -> str | None:
    """Returns why the device cannot run a form, None if it can."""
    if not form.endswith(" fused"):
        return None
    if "+" in dtype:
        return "the fused strategy needs x and factors of one dtype"
    return fused_obstacle(64, 64, 16, DTYPES[dtype][0], torch.device(device))


def outcome_of(
    form: str,
    dtype: str,
    device: str,
    shapes: int | None = None,
    before: Callable[[str], None] = lambda shape: None,
) -> str:
    """Runs a form in this process, and returns its outcome.

    Args:
        form: An entry of the table, and perhaps " dropout" or " fused".
        dtype: One of DTYPES.
        device: "cuda" or "cpu".
        shapes: How many of the table's shapes, None for all.
        before: Called with each shape before it runs.
    """
    reason = obstacle(form, dtype, device)
    if reason is not None:
        return f"skipped: {reason}"
    tests = operator_tests()
    operators = tests.test_operators
    name, _, variant = form.partition(" ")
    on_device = tests.OnDevice(device, fused=variant == "fused")
    dropout = {"dropout": DROPPED}.get(variant, 0.0)
    all_shapes = {"fused": tests.FUSED_SHAPES}.get(variant, operators.SHAPES)
    # From the last shape of the table, because the last ones are ragged or large.
    for i, shape in enumerate(all_shapes[::-1][:shapes]):
        layout = operators.LAYOUTS[i % len(operators.LAYOUTS)]
        place = f"{' x '.join(map(str, shape))} {layout}"
        before(place)
        try:
            with mock.patch.object(operators, "ops", on_device):  # else they run on a CPU
                tests.check(
                    name, partial(operators.Case, shape, *DTYPES[dtype], layout, dropout), place
                )
        except AssertionError as error:
            return f"wrong: {telling_line(str(error))}"
        except Exception as error:
            return f"failed: {place}: {type(error).__name__}: {telling_line(str(error))}"
    return "passed"


def child(jobs: Sequence[Job], device: str, shapes: int | None) -> None:
    """The program of a process: prints @shape and @outcome for each job, until one fails."""

    def before(shape: str) -> None:
        print(f"@shape {shape}", flush=True)
        # A thread of faulthandler ends the process even if a call of CUDA does not return.
        faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)

    for form, dtype in jobs:
        outcome = outcome_of(form, dtype, device, shapes, before)
        print(f"@outcome {outcome}", flush=True)
        if outcome.startswith("failed"):
            return


# ---- all processes -------------------------------------------------------------------------------


def run_jobs(
    command: Callable[[Sequence[Job]], Sequence[str]],
    jobs: Sequence[Job],
    report: Callable[[Job, str], None],
) -> None:
    """Runs forms one after another, and reports each outcome.

    They share a process, until one of them ends it. Then a new process runs those that remain.

    Args:
        command: Returns the command of a process that runs some jobs.
        jobs: The forms and their dtypes.
        report: Called with each job and its outcome.
    """
    environment = os.environ | {
        "CUDA_LAUNCH_BLOCKING": "1",  # an error is raised by the call that caused it
        "OMP_NUM_THREADS": "1",  # many processes compute in float64 at once
        "PYTHONFAULTHANDLER": "1",
    }
    remaining = list(jobs)
    while remaining:
        process = subprocess.Popen(
            command(remaining),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        shape = "at the start"
        outcome = ""
        output = []
        for line in process.stdout:
            if line.startswith("@shape "):
                shape = line.removeprefix("@shape ").strip()
            elif line.startswith("@outcome "):
                outcome = line.removeprefix("@outcome ").strip()
                report(remaining.pop(0), outcome)
            else:
                output.append(line)
        status = process.wait()
        # After "failed" the process has ended as it should. Else the next job has ended it.
        if remaining and not outcome.startswith("failed"):
            report(remaining.pop(0), end_of(status, shape, output))


def end_of(status: int, shape: str, output: list[str]) -> str:
    """Returns the outcome of a form that ended its process.

    Args:
        status: The exit status.
        shape: The shape that ran last.
        output: The other lines that the process printed.
    """
    if any(line.startswith("Timeout (") for line in output):  # of faulthandler
        return f"hung: {shape}, ended after {WATCHDOG_S} s without an answer"
    reason = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"crashed: {reason}, {shape}: {telling_line(''.join(output))}"


def run_all(
    options: argparse.Namespace, jobs: list[Job], report: Callable[[Job, str], None]
) -> None:
    """Runs all jobs, several processes at a time."""

    def command(remaining: Sequence[Job]) -> list[str]:
        words = ["--child", json.dumps(remaining), "--device", options.device]
        if options.shapes is not None:
            words += ["--shapes", str(options.shapes)]
        return [sys.executable, "-m", "bench.smoke", *words]

    count = min(MOST_PROCESSES, os.cpu_count() or 1, len(jobs))
    with ThreadPoolExecutor(count) as pool:
        # Each takes every count-th job, so that the first dtype comes first in all of them. `list`
        # waits for them, and raises what a thread raised.
        list(pool.map(lambda i: run_jobs(command, jobs[i::count], report), range(count)))


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a form has not passed and was not skipped."""
    all_forms = forms()
    form_option = {"type": some_of(all_forms), "default": all_forms, "help": "some (all)"}
    options = parser_of("smoke", __doc__, {"forms": form_option, **OPTIONS}).parse_args(argv)
    if options.child:
        child(options.child, options.device, options.shapes)
        return 0
    jobs = [(form, dtype) for dtype in options.dtypes for form in options.forms]
    rows: list[dict] = []
    lock = threading.Lock()

    def report(job: Job, outcome: str) -> None:
        form, dtype = job
        with lock:
            print(f"{form:30} {dtype:10} {outcome}", flush=True)
            rows.append({"form": form, "dtype": dtype, "outcome": outcome, "planned": len(jobs)})
            if options.results is not None:
                write(options.results / "smoke.jsonl", pd.DataFrame(rows))

    if options.in_process:
        for job in jobs:
            report(job, outcome_of(*job, options.device, options.shapes))
    else:
        run_all(options, jobs, report)
    counts = Counter(row["outcome"].partition(":")[0] for row in rows)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return int(bool(set(counts) - {"passed", "skipped"}))


if __name__ == "__main__":
    sys.exit(main())
