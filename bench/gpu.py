"""One run on a machine with a GPU: build, tests, sanitizer, measurements, each kept as it ends, within a time (make gpu).

    python -m bench.gpu                       about nine minutes; python -m bench.gpu --budget 1800 for half an hour
    python -m bench.gpu --dry-run             what is here, what is missing, and the plan; changes nothing
    python -m bench.gpu --parts kernels,layer some of the parts; what an earlier run measured is gone on with
    python -m bench.gpu --wheel FILE          kernels from a wheel of ours (make wheel) instead of a build

It works in build-gpu, on a copy of the sources, so the checkout and what is installed stay as they are; results are in
build-gpu/results: a log a part, summary.json, and a folder of the card that bench.report takes when it is put into
bench/results. The machine needs torch with CUDA and numpy, safetensors, pytest; a compiler, nvcc, cmake and ninja, or a
wheel. No network. A part that something is missing for is left out by name, and so is one that no time is left for.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from .gpu_summary import summary

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 540
COPIED = ("csrc", "lotr_ext", "bench", "python_tests")
FILES = ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE")
NEEDED = ("torch", "numpy", "safetensors")
OPTIONAL = ("rich", "matplotlib", "peft", "transformers", "hypothesis")
MODULE = "lotr_ext/_C.abi3.so"
TOOLS = ("memcheck", "racecheck")  # of compute-sanitizer
FLOOR = ("--autotune", "--shapes", "8192x4096x16", "--kernels", "shrink,expand_add,factor_grad,shrink_grad")
HOPPER = "compute capability 9.0"
GRACE_S = 10  # a part that is told to stop writes what it has


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of the plan, in which {minutes} stands for the time it gets. weight: its share of the time that is left; needs:
    names of `look` that must be there."""

    name: str
    weight: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    about: str = ""


def sanitizer() -> str | None:
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def nvcc() -> str | None:
    """As CMakeLists.txt looks for it."""
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for folder in (*folders, Path("/usr/local/cuda/bin")):
        if (folder / "nvcc").is_file():
            return str(folder / "nvcc")
    return shutil.which("nvcc")


def tool(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def gpu() -> str | None:
    """The first card and its driver, as torch will see them; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def look() -> dict[str, str | None]:
    """What this machine has of what the parts want: where it is, or None."""
    found = {"gpu": gpu(), "nvcc": nvcc(), "c++": shutil.which(os.environ.get("CXX", "c++").split()[0])}
    found |= {name: tool(name) for name in ("cmake", "ninja")} | {"compute-sanitizer": sanitizer()}
    for package in (*NEEDED, "pytest", *OPTIONAL):
        spec = importlib.util.find_spec(package)
        found[package] = None if spec is None else str(spec.origin)
    found[HOPPER] = found["gpu"] if found["gpu"] and found["gpu"].endswith(", 9.0") else None
    for program in ("static", "host"):
        there = [ROOT / "bench" / f"{program}.py", ROOT / "bench" / program / "__main__.py"]
        found[f"bench.{program}"] = next((str(path) for path in there if path.exists()), None)
    return found


def plan(options: argparse.Namespace) -> list[Part]:
    """All parts in their order: what the others stand on first, then what says most."""
    python, module = sys.executable, (sys.executable, "-m")
    quick = ("--quick", "--keep") if options.quick else ()
    compiled = ("nvcc", "c++", "cmake") if options.wheel is None else ()
    build = (python, "setup.py", "build_ext", "--inplace") if options.wheel is None else ()
    tests = (*module, "pytest", "python_tests/cuda", "-m", "cuda and not full", "-q", "--maxfail=20")
    layer = (*module, "bench.layer", "--dtypes", "bf16", *(quick or ("--minutes", "{minutes}")))
    return [
        Part("build", 4.0, build, (*NEEDED, *compiled), "for this machine's card"),
        Part("info", 0.5, (*module, "lotr_ext.info"), (), "which path runs, and why"),
        Part("tests", 4.0, tests, ("pytest",), "the kernels against float64, graphs, streams, sizes"),
        *(Part(f"sanitize-{tool}", 1.0, sanitize(tool), ("compute-sanitizer",), "every kernel, small") for tool in TOOLS),
        Part("kernels", 4.0, (*module, "bench.kernels", *quick), (), "each kernel against the library's product"),
        Part("fused", 1.5, (*module, "bench.fused"), (HOPPER,), "the adapter inside the base product, on Hopper"),
        Part("layer", 5.0, layer, (), "a layer against its rivals"),
        Part("block", 2.0, (*module, "bench.block", *quick), (), "the layers of a transformer's block together"),
        Part("shared", 1.0, (*module, "bench.shared", "--dtypes", "bf16"), (), "the shared gradient against autograd's sums"),
        Part(
            "experts",
            1.0,
            (*module, "bench.experts", "--dtypes", "bf16", *quick),
            ("transformers", "peft"),
            "a mixture's experts against PEFT's LoRA",
        ),
        Part("host", 1.0, (*module, "bench.host"), ("bench.host",), "host time of a layer"),
        Part(
            "floor-kernels",
            1.5,
            (*module, "bench.kernels", *FLOOR),
            (),
            "the library's products after a search for the fastest",
        ),
        Part(
            "floor-layer",
            1.5,
            (*module, "bench.layer", "--quick", "--keep", "--autotune", "--dtypes", "bf16"),
            (),
            "the same, a layer",
        ),
        Part("static", 1.0, (*module, "bench.static"), ("bench.static",), "the model's times beside the measured ones"),
    ]


def sanitize(tool: str) -> tuple[str, ...]:
    """initcheck is left to make test-full: it also reports what torch's allocator left in reused blocks."""
    found = sanitizer() or "compute-sanitizer"
    checked = (sys.executable, "python_tests/cuda/sanitize.py", "--small")
    return (found, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=lotr", *checked)


def seconds_of(parts: list[Part], left: float) -> list[float]:
    """How long each may take if all before it take as long as they may. What one leaves over goes to those after it."""
    total = sum(part.weight for part in parts)
    return [left * part.weight / total for part in parts]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=f"seconds that all of it may take ({BUDGET_S})")
    parser.add_argument("--parts", help="some of them, comma-separated (all)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build-gpu", help="where it works (build-gpu)")
    parser.add_argument("--wheel", type=Path, help="a wheel of lotr_ext to take the kernels from, instead of a build")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--dry-run", action="store_true", help="print what is here and the plan")
    options = parser.parse_args(argv)
    if not (math.isfinite(options.budget) and options.budget >= 1):
        raise ValueError(f"budget: expected seconds of at least 1, got {options.budget}")
    if options.wheel is not None:
        check_wheel(options.wheel)
    names = [part.name for part in plan(options)]
    options.parts = names if options.parts is None else options.parts.split(",")
    for name in options.parts:
        if name not in names:
            raise ValueError(f"parts: expected some of {', '.join(names)}, got {name!r}")
    return options


def check_wheel(wheel: Path) -> None:
    """Raises ValueError where it is none of ours, or one for another platform."""
    if not (wheel.is_file() and zipfile.is_zipfile(wheel)):
        raise ValueError(f"wheel: expected a wheel of lotr_ext, got {wheel}")
    with zipfile.ZipFile(wheel) as archive:
        if MODULE not in archive.namelist():
            raise ValueError(f"wheel: expected {MODULE} in {wheel}, found none")
    tag = f"linux.*_{platform.machine()}"
    if not re.search(tag + "$", wheel.stem):
        raise ValueError(f"wheel: expected one for this platform (linux, {platform.machine()}), got {wheel.name}")


def missing(part: Part, found: dict[str, str | None]) -> list[str]:
    return [name for name in part.needs if found[name] is None]


def show_plan(options: argparse.Namespace, found: dict[str, str | None]) -> None:
    print(f"GPU                {found['gpu'] or 'none (nvidia-smi names none)'}")
    for name in [name for name in found if name != "gpu"]:
        print(f"{name:18} {found[name] or 'missing' + (', optional' if name in OPTIONAL else '')}")
    parts = [part for part in plan(options) if part.name in options.parts]
    possible = [part for part in parts if not missing(part, found)]
    times = dict(zip((part.name for part in possible), seconds_of(possible, options.budget)))
    print(f"\nin {options.folder}, at most {options.budget:.0f} s:")
    for part in parts:
        lacks = missing(part, found)
        command = shlex.join(part.command) or f"_C.abi3.so from {options.wheel}"
        when = f"{times[part.name]:4.0f} s" if not lacks else "   - "
        print(f"  {part.name:18} {when}  " + (f"left out: needs {', '.join(lacks)}" if lacks else command))


# ---- the work --------------------------------------------------------------------------------------------------------


def copy_sources(folder: Path) -> Path:
    """A fresh copy of the sources, older than nothing that was built from them; kept results come back into it."""
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
    """What the parts have measured so far, out of the copy."""
    for measured in folders(folder / "tree" / "bench" / "results"):
        if measured.name != "simt-executor":
            shutil.copytree(measured, folder / "results" / measured.name, dirs_exist_ok=True)


def take_wheel(wheel: Path, tree: Path) -> None:
    """The compiled module out of a wheel that `check_wheel` has seen."""
    with zipfile.ZipFile(wheel) as archive:
        (tree / MODULE).write_bytes(archive.read(MODULE))


def run_part(part: Part, tree: Path, log: Path, limit: float) -> tuple[str, float]:
    """("done", "failed (status)" or "stopped", seconds). Its output goes to log as it comes."""
    begin = time.monotonic()
    environment = os.environ | {"LOTR_BUILD_DIR": str(tree.parent / "cmake"), "LOTR_CUDA": "ON", "PYTHONPATH": str(tree)}
    environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    command = [word.replace("{minutes}", f"{0.8 * limit / 60:.2f}") for word in part.command]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's `&` leaves it, and then no part would hear `stop`
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
        finally:  # out of time, or interrupted: the part goes with us
            stop(process)
    seconds = time.monotonic() - begin
    return "stopped" if stopped else "done" if process.returncode == 0 else f"failed ({process.returncode})", seconds


def stop(process: subprocess.Popen) -> None:
    """Ends it if it runs: as Ctrl-C would, so that it keeps what it has; then for good. The whole group, which is its own."""
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


def write(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def work(options: argparse.Namespace, found: dict[str, str | None], run: Callable = run_part) -> int:
    """Runs what can run, in order. 1 if a part failed or the build could not be made."""
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
            raise ValueError(f"parts: expected build among them, {built} is not there yet; got {', '.join(options.parts)}")
        shutil.copy2(built, tree / MODULE)
    outcome: dict[str, dict] = {}
    left = [part for part in plan(options) if part.name in options.parts]
    while left:
        part, remaining = left[0], end - time.monotonic()
        lacks = missing(part, found)
        limit = seconds_of([p for p in left if not missing(p, found)], remaining)[0] if not lacks else 0.0
        if part.name == "build":
            limit = remaining  # all others stand on it
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
            status, seconds = run(part, tree, results / f"{part.name}.log", limit)
        outcome[part.name] = {"status": status, "seconds": seconds}
        print(f"{part.name}: {status}" + (f", {seconds:.0f} s" if seconds else ""), flush=True)
        if status.startswith("failed"):
            show_tail(results / f"{part.name}.log")
        keep_results(options.folder)
        write(results / "summary.json", {"gpu": found["gpu"], "budget": options.budget, "parts": outcome})
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
    return int(any(part["status"].startswith("failed") for part in outcome.values()))


def obstacle_in(log: Path) -> str | None:
    """Why lotr_ext.info says that the kernels cannot run; None if they do."""
    found = re.search(r"they cannot run: (.*)", log.read_text(errors="replace")) if log.exists() else None
    return found[1] if found else None


def show_tail(log: Path) -> None:
    if log.exists():
        print("\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-15:]))


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    found = look()
    if options.dry_run:
        show_plan(options, found)
        return 0
    if found["gpu"] is None:
        raise ValueError("gpu: expected an NVIDIA GPU here (nvidia-smi names none); --dry-run prints the plan")
    return work(options, found)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"bench.gpu: {error}")
    except KeyboardInterrupt:
        sys.exit("bench.gpu: interrupted; what was measured is kept, the same command goes on from there")
