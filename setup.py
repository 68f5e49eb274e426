"""Packaging entry: metadata is in pyproject.toml, CMakeLists.txt does the building.

Environment variables; an empty value counts as none:
    LOTR_CUDA       AUTO (where nvcc is found), ON, OFF
    LOTR_ARCHS      AUTO (the cards of this machine, else 80 and 90a), all (for a wheel), or CMake's list
    LOTR_CPU_ISAS   AUTO (generic and this machine's best two instruction sets), all (for a wheel), native, or names
    LOTR_BUILD_DIR  CMake's folder;  MAX_JOBS  parallel compilations;  CXX  the compiler;  CUDA_HOME  the toolkit
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)
MIN_CMAKE = (3, 26)
# CMake reads these when it first configures a build folder, and ignores later changes of them.
READ_ONCE = (
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDACXX",
    "CUDAHOSTCXX",
    "CUDAFLAGS",
    "CMAKE_GENERATOR",
)
NOTE = "-- note: "  # how csrc/cuda/toolkit.cmake begins a line for the person who waits


def stop(message: str) -> None:
    """End with one line that says what to do, instead of a traceback."""
    sys.exit(f"lotr_ext: {message}")


def numbers(version: str) -> tuple[int, ...]:
    """(2, 10) of "2.10.0+cpu"."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def find_tool(name: str) -> str | None:
    """A tool beside this Python (a virtual environment need not be activated), then one on PATH."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    return beside or shutil.which(name)


def check_packages() -> None:
    """Stop with one line, before setuptools prints anything, unless torch is there and wheels can be made."""
    if importlib.util.find_spec("torch") is None:
        stop(
            "expected torch >= 2.10 in this Python, got none. Install it first (pip install torch), "
            "then: pip install --no-build-isolation ."
        )
    torch = importlib.metadata.version("torch")
    if numbers(torch) < MIN_TORCH:
        stop(
            f"expected torch >= 2.10 in this Python, got {torch}. Upgrade it: pip install -U torch"
        )
    if importlib.util.find_spec("wheel") is None and numbers(
        importlib.metadata.version("setuptools")
    ) < (70, 1):
        stop(
            "expected the package wheel in this Python, got none. Install it: pip install -U setuptools wheel"
        )


def check_requirements() -> str:
    """Return the cmake to use, or stop with a friendly line."""
    check_packages()
    compiler = os.environ.get("CXX", "").split()
    if not any(shutil.which(name) for name in (compiler[:1] or ["c++", "g++", "clang++"])):
        stop(
            f"expected a C++17 compiler, got {' '.join(compiler) or 'none'}. "
            "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or set CXX."
        )
    cmake = find_tool("cmake")
    if cmake is None:
        stop("expected cmake >= 3.26, got none. Install it: pip install cmake ninja")
    if find_tool("ninja") is None and find_tool("make") is None:
        stop(
            "expected ninja or make, which compile what CMake lists, got neither. Install one: pip install cmake ninja"
        )
    first_line = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout.split(
        "\n"
    )[0]
    if numbers(first_line.split()[-1]) < MIN_CMAKE:
        stop(
            f"expected cmake >= 3.26, got {first_line} at {cmake}. Upgrade it: pip install -U cmake"
        )
    return cmake


def parallel_jobs() -> str:
    """How many files to compile at a time: MAX_JOBS, or one for each core up to eight."""
    jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 8))
    if not jobs.isdecimal() or int(jobs) < 1:
        stop(
            f"MAX_JOBS: expected a whole number of 1 or more, got {jobs!r}. Unset it to use one job for each core."
        )
    return jobs


def progress_line(line: str, seconds: float) -> str | None:
    """A bar for what ninja ("[7/17] Building ...") or make ("[ 41%] Building ...") says; None for any other line."""
    found = re.match(r"\[\s*(\d+)(?:/(\d+)|%)\] (.*)", line)
    if not found:
        return None
    done, total = int(found[1]), int(found[2] or 100)
    bar = "#" * (20 * done // max(total, 1))
    minutes, rest = divmod(int(seconds), 60)
    return f"lotr_ext: compiling [{bar:20}] {done}/{total} {minutes}:{rest:02} {found[3].split('/')[-1][:40]}"


def terminal_line(line: str, seconds: float) -> str | None:
    """What the terminal shows of a line of CMake's or ninja's: a note as it is and for good, the bar until the next one."""
    if line.startswith(NOTE):
        return f"\r\033[Klotr_ext: {line.removeprefix(NOTE).rstrip()}\n"
    bar = progress_line(line, seconds)
    return bar and f"\r\033[K{bar}"


def run_with_progress(command: list[str]) -> None:
    """Runs a step of the build. pip keeps its output to itself, so notes and the bar go to the terminal, if there is one.

    Raises subprocess.CalledProcessError as subprocess.run does.
    """
    try:
        terminal = None if sys.stdout.isatty() else open("/dev/tty", "w")
    except OSError:
        terminal = None
    if terminal is None:
        subprocess.run(command, check=True)
        return
    begin = time.monotonic()
    piped = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "errors": "replace",
    }
    with terminal, subprocess.Popen(command, **piped) as build:
        for line in build.stdout:
            sys.stdout.write(line)
            if shown := terminal_line(line, time.monotonic() - begin):
                terminal.write(shown)
                terminal.flush()
        terminal.write("\r\033[K")
    if build.returncode:
        raise subprocess.CalledProcessError(build.returncode, command)


class CMakeBuild(build_ext):
    """Build lotr_ext/_C.abi3.so with CMake in build/cmake-*, which is kept: a second build compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        cmake, jobs = check_requirements(), parallel_jobs()
        folder = Path(
            os.environ.get("LOTR_BUILD_DIR")
            or ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        ).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "lotr_configured_with.txt", "a+") as settings:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(
                    settings, fcntl.LOCK_EX
                )  # two builds in one folder would write the same objects
            try:
                self.configure(cmake, folder, settings)
                run_with_progress([cmake, "--build", str(folder), "--parallel", jobs])
            except subprocess.CalledProcessError as error:
                step = "building" if "--build" in error.cmd else "configuring"
                stop(
                    f"{step} with CMake failed, see the first error above (build folder: {folder}).{self.hint()}"
                )
            shutil.copy2(folder / "_C.abi3.so", target)

    def hint(self) -> str:
        """What to do about a failed build for which nvcc may be the reason."""
        if os.environ.get("LOTR_CUDA") == "OFF":
            return ""
        return (
            " If nvcc is the reason, set CUDA_HOME to another toolkit, CUDAHOSTCXX to a compiler that it supports, or "
            "LOTR_CUDA=OFF to build only the CPU kernels."
        )

    def configure(self, cmake: str, folder: Path, settings: TextIO) -> None:
        """Runs CMake; from the start if what it reads only once differs from settings, the file of the last run's values."""
        command = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        ninja = find_tool("ninja")
        if ninja:
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # Every option is given every time: a value of an earlier build would live on in CMake's cache.
        options = {"LOTR_CUDA": "AUTO", "LOTR_ARCHS": "AUTO", "LOTR_CPU_ISAS": "AUTO"}
        command += [
            f"-D{name}={os.environ.get(name) or default}" for name, default in options.items()
        ]
        command += [f"-DLOTR_VERSION={self.distribution.get_version()}"]
        now = ascii(
            [
                str(ROOT),
                str(folder),
                ninja is not None,
                *((name, os.environ.get(name)) for name in READ_ONCE),
            ]
        )
        settings.seek(0)
        if settings.read() != now:
            command.append("--fresh")
        settings.truncate(0)  # of a run that failed, nothing is kept
        run_with_progress(command)
        settings.write(now)
        settings.flush()

    def copy_extensions_to_source(self) -> None:
        """In place: never write into the old module, a running Python may have it mapped."""
        (ROOT / "lotr_ext" / "_C.abi3.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()


class BuildPython(build_py):
    """Starts without what an earlier build left: setuptools would put modules that are gone from the source into the wheel."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "lotr_ext", ignore_errors=True)
        super().run()


if sys.version_info < (3, 10):  # noqa: UP036  (setup.py run by hand checks no requires-python)
    stop(f"expected Python >= 3.10, got {sys.version.split()[0]}")

if {"build_ext", "bdist_wheel", "dist_info", "editable_wheel", "install", "develop"} & set(
    sys.argv
):
    check_packages()  # pip makes the metadata first, so that this line is the last one of its output

setup(
    ext_modules=[Extension("lotr_ext._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
