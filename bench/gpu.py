"""One command on a machine with a GPU: build, tests and benchmarks in limited time (make gpu).

    python -m bench.gpu                            nine minutes; --budget 1800 for half an hour
    python -m bench.gpu --parts build,info,smoke   some parts; later commands run others
    python -m bench.gpu --wheel FILE               kernels from a wheel of ours instead of a build
    python -m bench.gpu --out DIR                  where summary.md and results.tar.gz go
    python -m bench.gpu --dry-run                  the parts, their time, and what is missing

It needs a Python with torch, numpy, pandas, scipy and pytest; for the build also nvcc, a C++
compiler, cmake and ninja. It needs neither a network nor make. Each part is a process with a share
of the time that is left. A part is stopped when its time is over, and what it measured is kept,
because every program writes its rows as it measures them. A benchmark that crashes is started again
with the next case. After each part the page build-gpu/summary.md and build-gpu/results.tar.gz (logs
and result files) are written again, so that nothing is lost if the machine goes away.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from . import summary
from .common import ROOT, parser_of, reason_of, some_of
from .program import DEVICE_LOST

FOLDER = ROOT / "build-gpu"
MODULE = "lotr_ext/_C.abi3.so"
CUDA_PROGRAMS = Path("/usr/local/cuda/bin")
BUDGET_S = 540
GRACE_S = 10  # for a part that is stopped to shut down cleanly
RESTARTS = 5  # of a part at most
PYTHON = (sys.executable, "-m")
NOT_FAILED = ("done", "skipped")  # what the outcome of a part begins with
PROFILED = ("shrink", "expand_add", "shrink_grad", "factor_grad")
PROFILE = (
    *("ncu", "--clock-control", "none", "--csv", "--metrics"),
    "gpu__time_duration.sum,dram__bytes.sum,"
    "dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    *("--kernel-name", f"regex:^({'|'.join(PROFILED)})$"),
    *(*PYTHON, "bench.kernels", "--once", "--kernels", ",".join(PROFILED)),
)
OPTIONS = {
    "budget": {"type": float, "default": BUDGET_S, "help": f"seconds for all parts ({BUDGET_S})"},
    "folder": {"type": Path, "default": FOLDER, "help": "for logs and results (build-gpu)"},
    "out": {"type": Path, "help": "for summary.md and results.tar.gz (the folder)"},
    "wheel": {"type": Path, "help": "take the kernels from this wheel instead of building them"},
    "device": {
        "choices": ("cuda", "cpu"),
        "default": "cuda",
        "help": "cpu tries these parts without a GPU",
    },
    "quick": {"action": "store_true", "help": "one case and few rounds of each program"},
    "dry-run": {"action": "store_true", "help": "print the parts and what is missing"},
}


class Part(NamedTuple):
    """One process of a run.

    Attributes:
        name: Its name for --parts, and the name of its log.
        weight: Its share of the time that is left is its weight over the sum of the weights of all
            parts that have not run.
        command: What it runs.
        needs: Programs and packages without which it is skipped.
        uses: Packages without which some of its rivals are left out.
        environment: Variables that are set for it.
        restarts: Whether it has --from N, to continue after case N - 1 has crashed.
    """

    name: str
    weight: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    restarts: bool = False


def parts_of(options: argparse.Namespace) -> list[Part]:
    """Returns all parts, the most important first, because the time may not suffice for all."""
    device = ("--device", options.device)
    results = ("--results", str(options.folder / "results"))
    smoke_amount = ("--dtypes", "bf16", "--shapes", "1") if options.quick else ("--shapes", "6")
    profiled_shape = ("--shapes", "8192x4096x16", "--dtypes", "bf16", *device)
    # The sums of the gradients of A and B, which the layers of a stack share.
    shared = (
        *("--shapes", "4096x4x4096x16,4096x16x4096x16,4096x64x4096x16"),
        *("--wirings", "chained", "--rivals", "lotr-eager,lotr_ext"),
    )
    needs_transformers = {"needs": ("transformers",), "uses": ("peft",)}
    return [
        build_part(options),
        Part("info", 0.5, (*PYTHON, "lotr_ext.info")),
        Part(
            "smoke",
            4.0,
            (*PYTHON, "bench.smoke", *results, *smoke_amount, *device),
            needs=("pytest",),
        ),
        bench_part("kernels", 4.0, options),
        bench_part("layer", 5.0, options, uses=("peft",)),
        test_part("gpu_operators"),
        test_part("gpu_layers"),
        test_part("device"),
        sanitizer_part("memcheck", options),
        bench_part("model", 4.0, options, "--rounds", "7", **needs_transformers),
        bench_part("host", 1.5, options, "--clock", "wall", uses=("peft",)),
        Part("profile", 1.0, (*PROFILE, *profiled_shape), needs=("ncu",)),
        bench_part("host", 1.0, options, *shared)._replace(name="shared"),
        bench_part("experts", 1.0, options, **needs_transformers),
        bench_part("tasks", 1.0, options, **needs_transformers),
        sanitizer_part("racecheck", options),
    ]


def build_part(options: argparse.Namespace) -> Part:
    if options.wheel is not None:
        unzip = "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(sys.argv[2])"
        words = (unzip, str(options.wheel.resolve()), MODULE)
        return Part("build", 1.0, (sys.executable, "-c", *words))
    is_cuda = options.device == "cuda"
    return Part(
        "build",
        4.0,
        (sys.executable, "setup.py", "build_ext", "--inplace"),
        needs=("nvcc", "c++", "cmake") if is_cuda else ("c++", "cmake"),
        environment={"LOTR_CUDA": "ON" if is_cuda else "OFF"},
    )


def bench_part(
    name: str,
    weight: float,
    options: argparse.Namespace,
    *words: str,
    **fields: tuple[str, ...],
) -> Part:
    """Returns the part of a measuring program. A quick run has --quick in place of the words."""
    fixed = (
        *("--dtypes", "bf16", "--require-kernels"),
        *("--results", str(options.folder / "results"), "--device", options.device),
    )
    amount = ("--quick",) if options.quick else words
    command = (*PYTHON, f"bench.{name}", *fixed, *amount)
    return Part(name, weight, command, restarts=True, **fields)


def test_part(name: str) -> Part:
    has_timeout = importlib.util.find_spec("pytest_timeout") is not None
    selected = (f"python_tests/cuda/test_{name}.py", "-m", "cuda and not full")
    reports = ("-v", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider")
    command = (*PYTHON, "pytest", *selected, *reports, *["--timeout=60"] * has_timeout)
    # With blocking launches an error names its kernel. test_device tests launches that do not wait.
    environment = {} if name == "device" else {"CUDA_LAUNCH_BLOCKING": "1"}
    return Part(f"test_{name}", 2.0, command, needs=("pytest",), environment=environment)


def sanitizer_part(tool: str, options: argparse.Namespace) -> Part:
    words = ("--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=lotr", *PYTHON)
    amount = ("--in-process", "--dtypes", "bf16", "--shapes", "3", "--device", options.device)
    return Part(
        tool,
        1.5,
        ("compute-sanitizer", *words, "bench.smoke", *amount),
        needs=("compute-sanitizer",),
        # Memcheck only notices what leaves an allocation, so each tensor must be one.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def missing(names: tuple[str, ...]) -> list[str]:
    """Returns the programs and packages among `names` that are not installed."""

    def is_there(name: str) -> bool:
        is_program = shutil.which(name) or (CUDA_PROGRAMS / name).exists()
        return bool(is_program or importlib.util.find_spec(name.replace("-", "_")))

    return [name for name in names if not is_there(name)]


# ---- one part ------------------------------------------------------------------------------------


def environment_of(part: Part) -> dict[str, str]:
    # lotr_ext and bench of this tree come first. The variables of a part come last, and win.
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {
        "LOTR_BUILD_DIR": str(FOLDER / "cmake"),
        "PATH": os.pathsep.join([os.environ["PATH"], str(CUDA_PROGRAMS)]),
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
    }
    return {"MAX_JOBS": str(os.cpu_count() or 1), **os.environ, **fixed, **part.environment}


def run(part: Part, log: Path, limit_s: float) -> str:
    """Runs a part. If it crashes, it is started again with the case after the one that crashed.

    Args:
        part: What runs.
        log: The file that its output goes to, as it comes.
        limit_s: The time for all its processes together.

    Returns:
        "done", "failed (status)" or "stopped", and in which cases it crashed, if it did.
    """
    end = time.monotonic() + limit_s
    log.write_bytes(b"")
    command = part.command
    crashes: list[str] = []
    for _ in range(1 + RESTARTS):
        status = _run_process(part, command, log, end - time.monotonic())
        # A negative status is the signal that ended the process.
        has_crashed = status is not None and (status < 0 or status == DEVICE_LOST)
        if not (has_crashed and part.restarts and summary.last_case(log)):
            break
        crashes.append(summary.last_case(log)[0])
        # Its output is added to the log, in which `last_case` then finds the next crash.
        command = (*part.command, "--from", str(int(crashes[-1]) + 1))
    outcome = {None: "stopped", 0: "done"}.get(status, f"failed ({status})")
    if not crashes:
        return outcome
    return f"{'stopped' if status is None else 'failed'}, crashed in case {', '.join(crashes)}"


def _run_process(part: Part, command: tuple[str, ...], log: Path, limit_s: float) -> int | None:
    """Returns the exit status of a process, None if it was stopped after limit_s seconds."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment_of(part),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group, which `stop` ends with its children
        )
        try:
            return process.wait(max(limit_s, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also after a KeyboardInterrupt
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """Ends the process group of a part: by SIGINT, and what is left of it by SIGKILL.

    A part that has ended may have left children.
    """
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sign)
            process.wait(GRACE_S)


# ---- all parts -----------------------------------------------------------------------------------


def run_parts(parts: list[Part], options: argparse.Namespace) -> int:
    """Runs the parts in order, and packs the results after each of them.

    Returns:
        1 if a part failed, was stopped, or found no time, else 0.
    """
    end = time.monotonic() + options.budget - GRACE_S
    results = options.folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    outcomes = summary.outcomes_in(results)
    failed = []
    for i, part in enumerate(parts):
        remaining = end - time.monotonic()
        share = part.weight / sum(other.weight for other in parts[i:])
        log = results / f"{part.name}.log"
        begin = time.monotonic()
        # The build may take all of the time, and must not be skipped: nothing else runs without it.
        outcome = outcome_of(part, log, remaining if part.name == "build" else remaining * share)
        seconds = round(time.monotonic() - begin)
        print(f"{part.name}: {outcome}, {seconds} s", flush=True)
        outcomes[part.name] = {"outcome": outcome, "seconds": seconds}
        if not outcome.startswith("done" if part.name == "build" else NOT_FAILED):
            failed.append(part.name)
            for line in summary.error_lines(log):
                print(f"    {line}", flush=True)
        pack(results, outcomes, options.out)
        if failed == ["build"]:
            print("failed: without a build nothing else can run")
            break
    print(f"read {options.out / 'summary.md'}; all logs and rows: {options.out / 'results.tar.gz'}")
    return int(bool(failed))


def outcome_of(part: Part, log: Path, limit_s: float) -> str:
    """Runs a part if it can run. Returns its outcome in words."""
    lacking = missing(part.needs)
    if lacking:
        return f"skipped, needs {', '.join(lacking)}"
    if limit_s <= 0:
        return "no time left"
    print(f"{part.name}: at most {limit_s:.0f} s, log {log}", flush=True)
    outcome = run(part, log, limit_s)
    without = missing(part.uses)
    return f"{outcome}, without {', '.join(without)}" if without else outcome


def pack(results: Path, outcomes: summary.Outcomes, out: Path) -> None:
    """Writes the page and the archive. An older archive stays until the new one is complete."""
    (results / "summary.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    try:
        page = summary.page(results, outcomes)
    except Exception as error:  # the archive is worth more than the page
        page = f"The page could not be written: {reason_of(error)}\n"
    (results / "summary.md").write_text(page, encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    archive = out / "results.tar.gz.tmp"
    with tarfile.open(archive, "w:gz") as file:
        file.add(results, "results")
    archive.replace(out / "results.tar.gz")
    shutil.copy(results / "summary.md", out / "summary.md")


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("gpu", __doc__, OPTIONS)
    names = [part.name for part in parts_of(parser.parse_args([]))]
    parser.add_argument("--parts", type=some_of(names), default=names, help="some parts (all)")
    options = parser.parse_args(argv)
    options.out = options.out or options.folder
    selected = [part for part in parts_of(options) if part.name in options.parts]
    if not options.dry_run:
        return run_parts(selected, options)
    total = sum(part.weight for part in selected)
    for part in selected:
        lacking = missing((*part.needs, *part.uses))
        words = f"   missing: {', '.join(lacking)}" if lacking else ""
        seconds = options.budget * part.weight / total
        print(f"{part.name:14} {seconds:5.0f} s   {' '.join(part.command)}{words}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
