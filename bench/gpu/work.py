"""Runs the parts, each as a process with a time limit and a log, and saves the measurements of each when it ends."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from lotr_ext import __version__

from .machine import ROOT, write
from .plan import Part, missing, seconds_of
from .results import SUMMARY, pack
from .smoke import SECONDS
from .summary import summary

COPIED = ("csrc", "lotr_ext", "bench", "python_tests")
FILES = ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE")
MODULE = "lotr_ext/_C.abi3.so"
GRACE_S = 10  # time for a stopped part to write its results


def copy_sources(folder: Path) -> Path:
    """Makes a fresh copy of the sources, with their modification times, and copies kept results back into it."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    skip = shutil.ignore_patterns("__pycache__", "*.so", "results", ".*")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=skip)
    for name in FILES:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, tree / name)
    counted = ROOT / "bench" / "results" / "simt-executor"
    if counted.is_dir():
        shutil.copytree(counted, tree / "bench" / "results" / counted.name)
    for kept in folders(folder / "results"):
        shutil.copytree(kept, tree / "bench" / "results" / kept.name, dirs_exist_ok=True)
    return tree


def folders(where: Path) -> list[Path]:
    return sorted(path for path in where.iterdir() if path.is_dir()) if where.is_dir() else []


def keep_results(folder: Path) -> None:
    """Copies the parts' measurements so far out of the copy of the sources."""
    for measured in folders(folder / "tree" / "bench" / "results"):
        if measured.name != "simt-executor":
            shutil.copytree(measured, folder / "results" / measured.name, dirs_exist_ok=True)


def take_wheel(wheel: Path, tree: Path) -> None:
    """Extracts the compiled module from a wheel that `check_wheel` accepted."""
    with zipfile.ZipFile(wheel) as archive:
        (tree / MODULE).write_bytes(archive.read(MODULE))


def run_part(part: Part, tree: Path, log: Path, limit: float, without: Iterable[str] = ()) -> tuple[str, float]:
    """("done", "failed (status)" or "stopped", seconds). Its output is written to log as it comes. without: hardware features
    at fault here, in addition to those already switched off and the part's own."""
    begin = time.monotonic()
    environment = os.environ | {"LOTR_BUILD_DIR": str(tree.parent / "cmake"), "LOTR_CUDA": "ON", "PYTHONPATH": str(tree)}
    off = [*environment.get("LOTR_CUDA_WITHOUT", "").split(","), *without, part.without]
    if off := ",".join(dict.fromkeys(filter(None, off))):
        environment["LOTR_CUDA_WITHOUT"] = off
    environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    times = {"{minutes}": f"{0.8 * limit / 60:.2f}", "{seconds}": f"{min(SECONDS, 0.9 * limit):.0f}"}
    command = [times.get(word, word) for word in part.command]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `&` sets this, and then parts would ignore `stop`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "w") as kept:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=kept, stderr=subprocess.STDOUT, start_new_session=True
        )
        stopped = False
        try:
            while process.poll() is None and not stopped:
                passed = time.monotonic() - begin
                stopped = passed > limit
                if sys.stdout.isatty():
                    print(f"\r{part.name}: {passed:.0f} of at most {limit:.0f} s", end="\r", flush=True)
                time.sleep(min(0.2, limit))
        finally:  # out of time, or interrupted: stop the part
            stop(process)
    seconds = time.monotonic() - begin
    return "stopped" if stopped else "done" if process.returncode == 0 else f"failed ({process.returncode})", seconds


def stop(process: subprocess.Popen) -> None:
    """Ends the process group of a running part: first by SIGINT, so that it saves its results; then by SIGKILL."""
    if process.poll() is not None:
        return
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(GRACE_S)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
            return


def work(options: argparse.Namespace, found: dict[str, str | None], run: Callable = run_part) -> int:
    """Runs all parts that can run, in order. Returns 1 if a part or the build failed."""
    end = time.monotonic() + options.budget - min(GRACE_S, 0.1 * options.budget)
    results = options.folder / "results"
    try:
        results.mkdir(parents=True, exist_ok=True)
        tree = copy_sources(options.folder)
    except OSError as error:
        raise OSError(f"folder: cannot write {options.folder}: {error.strerror or error}") from None
    built = options.folder / "_C.abi3.so"
    if "build" not in options.parts:
        if not built.exists():
            raise ValueError(f"parts: expected build among them, {built} does not exist yet; got {', '.join(options.parts)}")
        shutil.copy2(built, tree / MODULE)
    outcome: dict[str, dict] = {}
    left = [part for part in options.plan if part.name in options.parts]
    while left:
        part, remaining = left[0], end - time.monotonic()
        lacks = missing(part, found)
        limit = seconds_of([p for p in left if not missing(p, found)], remaining)[0] if not lacks else 0.0
        if part.name == "build":
            limit = remaining  # all others need it
        left = left[1:]
        if lacks:
            status, seconds = f"left out: needs {', '.join(lacks)}", 0.0
        elif remaining < 1:
            status, seconds = "left out: no time left", 0.0
        elif not part.command:
            take_wheel(options.wheel, tree)
            status, seconds = "done", 0.0
        else:
            print(f"{part.name} ({part.about}): at most {limit:.0f} s, log {results / part.name}.log", flush=True)
            status, seconds = run(part, tree, results / f"{part.name}.log", limit, at_fault(results))
        outcome[part.name] = {"status": status, "seconds": seconds}
        print(f"{part.name}: {status}" + (f", {seconds:.0f} s" if seconds else ""), flush=True)
        if status.startswith("failed"):
            show_tail(results / f"{part.name}.log")
        keep_results(options.folder)
        write(results / SUMMARY, {"gpu": found["gpu"], "version": __version__, "budget": options.budget, "parts": outcome})
        if part.name == "info" and (obstacle := obstacle_in(results / "info.log")) is not None:
            print(f"bench.gpu: the kernels cannot run here, and nothing else is worth measuring: {obstacle}")
            return 1
        if part.name == "build":
            if status != "done":
                print("bench.gpu: without a build nothing else can run")
                return 1
            shutil.copy2(tree / MODULE, built)
    for line in summary(results, outcome):
        print(line)
    print(f"all of it in one file: {pack(options.folder)}; python -m bench.gpu --import-results FILE takes it into a checkout")
    return int(any(part["status"].startswith("failed") for part in outcome.values()))


def at_fault(results: Path) -> list[str]:
    """The features that the smoke part found to be at fault on this GPU."""
    found = results / "smoke" / "smoke.json"
    return json.loads(found.read_text())["without"] if found.exists() else []


def obstacle_in(log: Path) -> str | None:
    """Why the kernels cannot run, by lotr_ext.info; None if they can."""
    found = re.search(r"they cannot run: (.*)", log.read_text(errors="replace")) if log.exists() else None
    return found[1] if found else None


def show_tail(log: Path) -> None:
    if log.exists():
        print("\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-15:]))
