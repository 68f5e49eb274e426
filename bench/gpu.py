"""One command on a machine with a GPU: build, tests and benchmarks in limited time (make gpu).

    python -m bench.gpu                            nine minutes; --budget 1800 for half an hour
    python -m bench.gpu --parts build,info,smoke   some parts; later commands run others
    python -m bench.gpu --wheel FILE               kernels from a wheel of ours instead of a build
    python -m bench.gpu --out DIR                  where summary.md and results.tar.gz go
    python -m bench.gpu --dry-run                  the parts, their time, and what is missing

It needs a Python with torch, numpy, pandas, scipy, rich and pytest; for the build also nvcc, a C++
compiler, cmake and ninja. It needs neither a network nor make. Each part is a process with a share
of the time that is left. A part is stopped when its time is over, and what it measured is kept,
because every program writes its rows as it measures them. A benchmark that crashes is started again
with the next case. After each part the page build-gpu/summary.md and build-gpu/results.tar.gz (logs
and result files) are written again, so that nothing is lost if the machine goes away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from . import summary
from .common import ROOT, reason_of
from .program import DEVICE_LOST

FOLDER = ROOT / "build-gpu"
MODULE = "lotr_ext/_C.abi3.so"
CUDA_PROGRAMS = Path("/usr/local/cuda/bin")
BUDGET_S = 540
GRACE_S = 10
RESTARTS = 5
PYTHON = (sys.executable, "-m")
GOOD = ("done", "skipped")


class Part(NamedTuple):
    """One process of a run.

    Attributes:
        weight: Its share of the time that is left.
        needs: Programs and packages without which it cannot run.
        uses: Packages without which some rivals are left out.
        environment: Variables that it gets.
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
    """Returns all parts in order of worth: first what others need, then numbers, then speed."""
    device = ("--device", options.device)
    results = str(options.folder / "results")
    quick = ("--quick",) if options.quick else ()

    def bench(
        name: str,
        weight: float,
        *words: str,
        uses: tuple[str, ...] = (),
        needs: tuple[str, ...] = (),
    ) -> Part:
        words = (*words, "--require-kernels", "--results", results, *device, *quick)
        return Part(name, weight, (*PYTHON, f"bench.{name}", *words), needs, uses, restarts=True)

    def tests(name: str) -> Part:
        words = [
            "-m",
            "cuda and not full",
            "-v",
            "--tb=short",
            "--maxfail=20",
            "-p",
            "no:cacheprovider",
        ]
        if importlib.util.find_spec("pytest_timeout") is not None:
            words.append("--timeout=60")
        file = f"python_tests/cuda/test_{name}.py"
        # Launches that wait name the kernel that failed. test_device is about those that do not.
        environment = {} if name == "device" else {"CUDA_LAUNCH_BLOCKING": "1"}
        command = (*PYTHON, "pytest", file, *words)
        return Part(f"test_{name}", 2.0, command, ("pytest",), (), environment)

    def sanitizer(tool: str) -> Part:
        words = ("--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=lotr", *PYTHON)
        smoke = ("bench.smoke", "--in-process", "--dtypes", "bf16", "--shapes", "3", *device)
        # Memcheck knows allocations, so each tensor must be one.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = ("compute-sanitizer", *words, *smoke)
        return Part(tool, 1.5, command, ("compute-sanitizer",), (), environment)

    few = ("--dtypes", "bf16", "--shapes", "1") if options.quick else ("--shapes", "6")
    smoke_words = ("--results", results, *few, *device)
    if options.wheel is None:
        build = Part(
            "build",
            4.0,
            (sys.executable, "setup.py", "build_ext", "--inplace"),
            ("nvcc", "c++", "cmake") if options.device == "cuda" else ("c++", "cmake"),
            environment={"LOTR_CUDA": "ON" if options.device == "cuda" else "OFF"},
        )
    else:
        build = Part("build", 1.0, ())
    metrics = (
        "gpu__time_duration.sum,dram__bytes.sum,"
        "dram__throughput.avg.pct_of_peak_sustained_elapsed,"
        "sm__throughput.avg.pct_of_peak_sustained_elapsed"
    )
    profiled = ("shrink", "expand_add", "shrink_grad", "factor_grad")
    profile = (
        *("ncu", "--clock-control", "none", "--metrics", metrics, "--csv"),
        *("--kernel-name", f"regex:^({'|'.join(profiled)})$"),
        *(*PYTHON, "bench.kernels", "--once", "--kernels", ",".join(profiled)),
        *("--shapes", "8192x4096x16", "--dtypes", "bf16", *device),
    )
    bf16 = ("--dtypes", "bf16")
    transformers = ("transformers",)
    return [
        build,
        Part("info", 0.5, (*PYTHON, "lotr_ext.info")),
        Part("smoke", 4.0, (*PYTHON, "bench.smoke", *smoke_words), ("pytest",)),
        bench("kernels", 4.0, *bf16),
        bench("layer", 5.0, *bf16, uses=("peft",)),
        tests("gpu_operators"),
        tests("gpu_layers"),
        tests("device"),
        sanitizer("memcheck"),
        bench("model", 4.0, *bf16, "--rounds", "7", needs=transformers, uses=("peft",)),
        bench("host", 1.5, "--clock", "wall", *bf16, uses=("peft",)),
        Part("profile", 1.0, profile, ("ncu",)),
        bench("shared", 1.0, *bf16),
        bench("experts", 1.0, *bf16, needs=transformers, uses=("peft",)),
        bench("tasks", 1.0, *bf16, needs=transformers, uses=("peft",)),
        sanitizer("racecheck"),
    ]


def missing(names: tuple[str, ...]) -> list[str]:
    """The programs and packages of these names that are not installed."""

    def is_there(name: str) -> bool:
        module = name.replace("-", "_")
        is_program = shutil.which(name) or (CUDA_PROGRAMS / name).exists()
        return bool(is_program or importlib.util.find_spec(module))

    return [name for name in names if not is_there(name)]


# ---- one part ------------------------------------------------------------------------------------


def environment_of(part: Part) -> dict[str, str]:
    environment = os.environ | {"LOTR_BUILD_DIR": str(FOLDER / "cmake")}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment["PATH"] += os.pathsep + str(CUDA_PROGRAMS)
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    return environment | part.environment


def run(part: Part, log: Path, limit_s: float) -> str:
    """Runs a part, again with the next case while it crashes. Its output goes to `log` as it comes.

    Returns:
        "done", "failed (status)" or "stopped".
    """
    end = time.monotonic() + limit_s
    words: tuple[str, ...] = ()
    crashes = []
    log.write_bytes(b"")
    while True:
        status = _run_once(part, (*part.command, *words), log, end - time.monotonic())
        if status is None:
            return "stopped" + _crashed(crashes)
        is_crash = status < 0 or status == DEVICE_LOST
        case = _last_case(log)
        if not (is_crash and part.restarts and case) or len(crashes) == RESTARTS:
            break
        number, count = case
        crashes.append(number)
        if number == count:
            break
        words = ("--from", str(number + 1))
    if crashes:
        return "failed" + _crashed(crashes)
    return "done" if status == 0 else f"failed ({status})"


def _crashed(cases: list[int]) -> str:
    return f", crashed in case {', '.join(map(str, cases))}" if cases else ""


def _last_case(log: Path) -> tuple[int, int] | None:
    """Returns the last "[3/42]" in a log."""
    matches = re.findall(r"^\[(\d+)/(\d+)\]", log.read_text(errors="replace"), re.MULTILINE)
    return (int(matches[-1][0]), int(matches[-1][1])) if matches else None


def _run_once(part: Part, command: tuple[str, ...], log: Path, limit_s: float) -> int | None:
    """Returns the exit status of a process, None if it was stopped after limit_s seconds."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment_of(part),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(limit_s, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also after a KeyboardInterrupt
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """Ends the process group of a part, first by SIGINT, so that it ends in order."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sign)
            process.wait(GRACE_S)


def unpack(wheel: Path) -> str:
    """Takes the compiled module from a wheel in place of a build."""
    with zipfile.ZipFile(wheel) as archive:
        (ROOT / MODULE).write_bytes(archive.read(MODULE))
    return "done"


# ---- all parts -----------------------------------------------------------------------------------


def work(parts: list[Part], options: argparse.Namespace) -> int:
    """Runs the parts in order, and packs the results after each of them.

    Returns:
        1 if a part failed, was stopped, or found no time, else 0.
    """
    end = time.monotonic() + options.budget - GRACE_S
    results = options.folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    outcomes = summary.outcomes_in(results)
    this_time = []
    for i, part in enumerate(parts):
        remaining = end - time.monotonic()
        share = part.weight / sum(other.weight for other in parts[i:])
        limit_s = remaining if part.name == "build" else remaining * share
        log = results / f"{part.name}.log"
        lacking = missing(part.needs)
        begin = time.monotonic()
        if lacking:
            outcome = f"skipped, needs {', '.join(lacking)}"
        elif remaining < 1:
            outcome = "no time left"
        elif not part.command:
            outcome = unpack(options.wheel)
        else:
            print(f"{part.name}: at most {limit_s:.0f} s, log {log}", flush=True)
            outcome = run(part, log, limit_s)
        without = missing(part.uses)
        if without:
            outcome += f", without {', '.join(without)}"
        seconds = round(time.monotonic() - begin)
        print(f"{part.name}: {outcome}, {seconds} s", flush=True)
        if not outcome.startswith(GOOD) and log.exists():
            for line in summary.error_lines(log.read_text(errors="replace")):
                print(f"    {line}", flush=True)
        outcomes[part.name] = {"outcome": outcome, "seconds": seconds}
        pack(results, outcomes, options.out)
        this_time.append(outcome)
        if part.name == "build" and outcome != "done":
            this_time.append("failed: without a build nothing else can run")
            print(this_time[-1])
            break
    print(f"read {options.out / 'summary.md'}; all logs and rows: {options.out / 'results.tar.gz'}")
    return int(not all(outcome.startswith(GOOD) for outcome in this_time))


def pack(results: Path, outcomes: summary.Outcomes, out: Path) -> None:
    """Writes the page and the archive: two files, each replaced when it is complete."""
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


def dry_run(parts: list[Part], options: argparse.Namespace) -> None:
    total = sum(part.weight for part in parts)
    for part in parts:
        lacking = missing((*part.needs, *part.uses))
        words = f"   missing: {', '.join(lacking)}" if lacking else ""
        seconds = options.budget * part.weight / total
        print(f"{part.name:14} {seconds:5.0f} s   {' '.join(part.command)}{words}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--budget", type=float, default=BUDGET_S, help=f"seconds for all parts ({BUDGET_S})")
    add("--parts", help="some parts, comma-separated (all)")
    add("--folder", type=Path, default=FOLDER, help="for logs and results (build-gpu)")
    add("--out", type=Path, help="for summary.md and results.tar.gz (the folder)")
    add("--wheel", type=Path, help="take the kernels from this wheel instead of building them")
    device = "cpu tries these parts without a GPU"
    add("--device", default="cuda", choices=("cuda", "cpu"), help=device)
    add("--quick", action="store_true", help="one case and few rounds of each program")
    add("--dry-run", action="store_true", help="print the parts and what is missing")
    options = parser.parse_args(argv)
    options.out = options.out or options.folder
    parts = {part.name: part for part in parts_of(options)}
    names = options.parts.split(",") if options.parts else list(parts)
    for name in names:
        if name not in parts:
            parser.error(f"parts: expected some of {', '.join(parts)}, got {name!r}")
    if options.wheel is not None and not zipfile.is_zipfile(options.wheel):
        parser.error(f"wheel: expected a wheel of lotr_ext, got {options.wheel}")
    selected = [part for name, part in parts.items() if name in names]
    if options.dry_run:
        dry_run(selected, options)
        return 0
    return work(selected, options)


if __name__ == "__main__":
    sys.exit(main())
