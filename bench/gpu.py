"""One command on a machine with a GPU: build, checks, tests and benchmarks within a time, results in one file (make gpu).

    python -m bench.gpu                        about nine minutes; --budget 1800 for half an hour
    python -m bench.gpu --parts build,smoke    some of the parts; a later command goes on with the rest
    python -m bench.gpu --wheel FILE           kernels from a wheel of ours instead of a build
    python -m bench.gpu --dry-run              the parts, their time, and what is missing

It needs a Python with torch, numpy, pandas, scipy, rich and pytest; for the build nvcc, a C++ compiler, cmake and ninja; no
network and no make. smoke runs every kernel and dtype against float64 in a process of its own, so that one that hangs or
crashes ends with its process. Each part has a share of the time that is left and is stopped when it is over; what it measured
is kept. Logs and results are in build-gpu/results, and in build-gpu/results.tar.gz.
"""

from __future__ import annotations

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
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .common import ROOT

FOLDER, MODULE = ROOT / "build-gpu", "lotr_ext/_C.abi3.so"
BUDGET_S, GRACE_S, WATCHDOG_S = 540, 10, 60
PYTHON = (sys.executable, "-m")


class Part(NamedTuple):
    """A command. weight: its share of the time that is left; needs: programs and packages."""

    name: str
    weight: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def parts_of(options: argparse.Namespace) -> list[Part]:
    """All parts in order: first those that others need, then the most important."""
    results = (
        "--results",
        str(options.folder / "results"),
        "--device",
        options.device,
        *(["--quick"] * options.quick),
    )
    build = (sys.executable, "setup.py", "build_ext", "--inplace") if options.wheel is None else ()
    tools = ("nvcc", "c++", "cmake") if options.wheel is None else ()
    small = ("--check", "--device", options.device, "--shapes", "129x136x16,70x72x64")
    sanitize = (
        "compute-sanitizer",
        "--error-exitcode",
        "9",
        "--kernel-regex",
        "kns=lotr",
        "--tool",
    )
    bench = {
        "kernels": 3.0,
        "layer": 4.0,
        "model": 2.0,
        "host": 1.0,
        "shared": 1.0,
        "experts": 1.0,
        "tasks": 1.0,
    }
    packages = {
        "model": ("transformers", "peft"),
        "experts": ("transformers", "peft"),
        "tasks": ("transformers", "peft"),
    }
    return [
        Part("build", 4.0, build, tools),
        Part("info", 0.5, (*PYTHON, "lotr_ext.info")),
        Part("smoke", 2.0, (*PYTHON, "bench.gpu", "--smoke", "--device", options.device)),
        Part(
            "tests",
            4.0,
            (*PYTHON, "pytest", "python_tests", "-m", "cuda", "-q", "--maxfail=20"),
            ("pytest",),
        ),
        *(
            Part(name, weight, (*PYTHON, f"bench.{name}", *results), packages.get(name, ()))
            for name, weight in bench.items()
        ),
        *(
            Part(
                tool,
                1.0,
                (*sanitize, tool, *PYTHON, "bench.kernels", *small),
                ("compute-sanitizer",),
            )
            for tool in ("memcheck", "racecheck")
        ),
    ]


def missing(part: Part) -> list[str]:
    cuda, found = Path("/usr/local/cuda/bin"), importlib.util.find_spec
    return [
        n
        for n in part.needs
        if not (shutil.which(n) or (cuda / n).exists() or found(n.replace("-", "_")))
    ]


# ---- smoke -----------------------------------------------------------------------------------------------------------


def smoke(device: str, dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")) -> int:
    """Prints a line a kernel and dtype: passed, wrong, crashed or hung. Returns 1 unless all passed."""
    from .kernels import KERNELS

    def outcome(kernel: str, dtype: str) -> str:
        command = [
            *PYTHON,
            "bench.kernels",
            "--check",
            "--device",
            device,
            "--kernels",
            kernel,
            "--dtypes",
            dtype,
        ]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=WATCHDOG_S
            )
        except subprocess.TimeoutExpired:
            return f"hung, ended after {WATCHDOG_S} s"
        if done.returncode < 0:
            return f"crashed: {signal.Signals(-done.returncode).name}"
        if bad := [line for line in done.stdout.splitlines() if "WRONG" in line]:
            return "wrong: " + "; ".join(bad)
        return (
            "passed"
            if done.returncode == 0
            else "crashed: " + (done.stderr.strip().splitlines() or ["no output"])[-1]
        )

    variants = [(kernel, dtype) for dtype in dtypes for kernel in KERNELS]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        failed = 0
        for (kernel, dtype), text in zip(
            variants, pool.map(lambda variant: outcome(*variant), variants)
        ):
            print(f"{kernel:12} {dtype}: {text}", flush=True)
            failed += text != "passed"
    return int(failed > 0)


# ---- parts as processes ----------------------------------------------------------------------------------------------


def run(part: Part, log: Path, limit: float) -> str:
    """ "done", "failed (status)" or "stopped". Its output goes to log as it comes."""
    environment = os.environ | {
        "LOTR_CUDA": "ON",
        "LOTR_BUILD_DIR": str(FOLDER / "cmake"),
        "PYTHONPATH": str(ROOT),
    }
    environment["PATH"] += os.pathsep + "/usr/local/cuda/bin"
    environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    with open(log, "w") as output:
        where = {"cwd": ROOT, "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(part.command, **where, start_new_session=True)
        try:
            status = process.wait(limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            stop(process)
            if isinstance(error, KeyboardInterrupt):
                raise
            return "stopped"
    return "done" if status == 0 else f"failed ({status})"


def stop(process: subprocess.Popen) -> None:
    """Ends a part's process group: first by SIGINT, so that it ends in order; then by SIGKILL."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sign)
            process.wait(GRACE_S)
            return


def work(options: argparse.Namespace) -> int:
    """Runs the parts that can run, in order. Returns 1 if one failed."""
    end, results = time.monotonic() + options.budget - GRACE_S, options.folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    left, outcomes = [part for part in parts_of(options) if part.name in options.parts], {}
    while left:
        part, remaining = left[0], end - time.monotonic()
        limit = (
            remaining
            if part.name == "build"
            else remaining * part.weight / sum(p.weight for p in left)
        )
        left, begin, log = left[1:], time.monotonic(), results / f"{part.name}.log"
        if lacking := missing(part):
            outcomes[part.name] = f"left out, needs {', '.join(lacking)}"
        elif remaining < 1:
            outcomes[part.name] = "left out, no time"
        elif not part.command:
            with zipfile.ZipFile(options.wheel) as archive:
                (ROOT / MODULE).write_bytes(archive.read(MODULE))
            outcomes[part.name] = "done"
        else:
            print(f"{part.name}: at most {limit:.0f} s, log {log}", flush=True)
            outcomes[part.name] = run(part, log, limit)
        print(f"{part.name}: {outcomes[part.name]}, {time.monotonic() - begin:.0f} s", flush=True)
        if outcomes[part.name].startswith("failed"):
            print(
                "\n".join(
                    f"    {line}" for line in log.read_text(errors="replace").splitlines()[-15:]
                )
            )
        (results / "summary.json").write_text(json.dumps(outcomes, indent=1) + "\n")
        if part.name == "build" and outcomes["build"] != "done":
            print("without a build nothing else can run")
            break
    with tarfile.open(options.folder / "results.tar.gz", "w:gz") as archive:
        archive.add(results, "results")
    print(
        f"all of it: {options.folder / 'results.tar.gz'}; its result files belong into bench/results/<the GPU's name>"
    )
    return int(
        any(text.startswith(("failed", "left out, needs nvcc")) for text in outcomes.values())
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_S,
        help=f"seconds that all of it may take ({BUDGET_S})",
    )
    parser.add_argument("--parts", help="some parts, comma-separated (all)")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="for logs and results (build-gpu)"
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        help="a wheel of lotr_ext to take the kernels from, instead of a build",
    )
    parser.add_argument(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="cpu: tries these parts without a GPU",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one case and few rounds of each program"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the parts and what is missing"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="the part of this name alone, in this process"
    )
    options = parser.parse_args(argv)
    if options.smoke:
        return smoke(options.device)
    parts = parts_of(options)
    names = [part.name for part in parts]
    options.parts = options.parts.split(",") if options.parts else names
    if bad := [name for name in options.parts if name not in names]:
        parser.error(f"parts: expected some of {', '.join(names)}, got {bad[0]!r}")
    if options.wheel is not None and not zipfile.is_zipfile(options.wheel):
        parser.error(f"wheel: expected a wheel of lotr_ext, got {options.wheel}")
    if options.dry_run:
        total = sum(part.weight for part in parts if part.name in options.parts)
        for part in parts:
            if part.name in options.parts:
                lacking = f"   missing: {', '.join(missing(part))}" if missing(part) else ""
                print(
                    f"{part.name:10} {options.budget * part.weight / total:5.0f} s   {' '.join(part.command)}{lacking}"
                )
        return 0
    return work(options)


if __name__ == "__main__":
    sys.exit(main())
