"""Builds the extension module with CMake. The metadata is in pyproject.toml.

Environment variables (an empty value counts as unset):
    LOTR_CUDA       AUTO (if nvcc is found), ON, OFF
    LOTR_ARCHS      AUTO (this machine's GPUs, else 80 and 90a), all, or CMake's list
    LOTR_CPU_ISAS   AUTO (generic and this machine's best two), all, native, or names
    LOTR_BUILD_DIR  CMake's build folder
    MAX_JOBS        parallel compilations
    CXX, CUDA_HOME  the compiler, the CUDA toolkit

`pip install -v` shows the progress of the compilation.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)
MIN_CMAKE = (3, 26)
CMAKE_OPTIONS = ("LOTR_CUDA", "LOTR_ARCHS", "LOTR_CPU_ISAS")
# CMake reads these only in the first configuration of a build folder.
READ_ONCE = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "CUDAFLAGS", "CUDAHOSTCXX")


def stop(message: str) -> NoReturn:
    """Exits with one line that says what to do, instead of a traceback."""
    sys.exit(f"lotr_ext: {message}")


if sys.version_info < (3, 10):  # noqa: UP036  (without pip, nothing checks requires-python)
    stop(f"expected Python >= 3.10, got {sys.version.split()[0]}")


def major_minor(version: str) -> tuple[int, ...]:
    """Returns (2, 10) for "2.10.0+cpu"."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def find_tool(name: str) -> str | None:
    """Finds a tool next to this Python, whose environment may not be activated, or on PATH."""
    next_to_python = shutil.which(name, path=str(Path(sys.executable).parent))
    return next_to_python or shutil.which(name)


def check_packages() -> None:
    """Stops unless this Python has torch and can make wheels."""
    if importlib.util.find_spec("torch") is None:
        stop(
            "expected torch >= 2.10 in this Python, got none. Install it first (pip install "
            "torch), then: pip install --no-build-isolation ."
        )
    torch_version = importlib.metadata.version("torch")
    if major_minor(torch_version) < MIN_TORCH:
        stop(
            f"expected torch >= 2.10 in this Python, got {torch_version}. "
            "Upgrade it: pip install -U torch"
        )
    has_wheel = importlib.util.find_spec("wheel") is not None
    if not has_wheel and major_minor(importlib.metadata.version("setuptools")) < (70, 1):
        stop(
            "expected the package wheel in this Python, got none. "
            "Install it: pip install -U setuptools wheel"
        )


def check_compiler() -> None:
    """Stops unless there is a C++ compiler: what CXX names, otherwise c++, g++ or clang++."""
    compiler = os.environ.get("CXX", "").split()  # a command and its options
    if not any(shutil.which(name) for name in (compiler[:1] or ["c++", "g++", "clang++"])):
        stop(
            f"expected a C++17 compiler, got {' '.join(compiler) or 'none'}. Install one "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or set CXX."
        )


def find_cmake() -> str:
    """Returns the path of cmake. Stops unless it is recent and has a tool that runs its build."""
    cmake = find_tool("cmake")
    if cmake is None:
        stop("expected cmake >= 3.26, got none. Install it: pip install cmake ninja")
    if find_tool("ninja") is None and find_tool("make") is None:
        stop("expected ninja or make, got neither. Install one: pip install ninja")
    output = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    version_line = output.split("\n")[0]
    # A broken cmake prints no version, such as pip's script `cmake` without its package.
    if not version_line or major_minor(version_line.split()[-1]) < MIN_CMAKE:
        stop(
            f"expected cmake >= 3.26, got {version_line or 'no version'} at {cmake}. "
            "Upgrade it: pip install -U cmake"
        )
    return cmake


def parallel_jobs() -> str:
    """Returns the number of parallel compilations: MAX_JOBS, or one per core, at most eight."""
    jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 8))
    if not jobs.isdecimal() or int(jobs) < 1:
        stop(f"MAX_JOBS: expected an integer of at least 1, got {jobs!r}. Unset or correct it.")
    return jobs


class CMakeBuild(build_ext):
    """Builds lotr_ext/_C.abi3.so in build/cmake-*. A second build compiles only what changed."""

    def build_extension(self, extension: Extension) -> None:
        check_packages()
        check_compiler()
        cmake = find_cmake()
        jobs = parallel_jobs()
        default_folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        folder = Path(os.environ.get("LOTR_BUILD_DIR") or default_folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.configure(cmake, folder)
            subprocess.run([cmake, "--build", str(folder), "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            step = "building" if "--build" in error.cmd else "configuring"
            stop(
                f"{step} with CMake failed, see the first error above (build folder: {folder}). "
                "If nvcc is the reason: set CUDA_HOME to another toolkit, CUDAHOSTCXX to a "
                "compiler that it supports, or LOTR_CUDA=OFF to build only the CPU kernels."
            )
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / "_C.abi3.so", target)

    def configure(self, cmake: str, folder: Path) -> None:
        """Runs CMake. Starts afresh if a variable that CMake reads only once has changed."""
        command = [cmake, "-S", str(ROOT), "-B", str(folder)]
        command.append(f"-DPython_EXECUTABLE={sys.executable}")
        command.append(f"-DLOTR_VERSION={self.distribution.get_version()}")
        # Each option is always given, because a value of an earlier build stays in CMake's cache.
        command += [f"-D{name}={os.environ.get(name) or 'AUTO'}" for name in CMAKE_OPTIONS]
        ninja = find_tool("ninja")
        if ninja is not None:
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        read_once = [os.environ.get(name) for name in READ_ONCE]
        settings = repr([str(ROOT), ninja, *read_once])
        settings_file = folder / "lotr_configured_with.txt"
        if not settings_file.is_file() or settings_file.read_text() != settings:
            command.append("--fresh")
        settings_file.unlink(missing_ok=True)  # so that the next call starts afresh if this fails
        subprocess.run(command, check=True)
        settings_file.write_text(settings)

    def copy_extensions_to_source(self) -> None:
        """Copies the module to the source folder, for an installation in place."""
        # A running Python may have mapped the old file, so it is replaced and not overwritten.
        (ROOT / "lotr_ext" / "_C.abi3.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()


class BuildPython(build_py):
    """Copies the Python modules, after deleting those of an earlier build, which may be stale."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "lotr_ext", ignore_errors=True)
        super().run()


if {"build_ext", "bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv):
    check_packages()  # before setuptools, whose error for a missing wheel does not say what to do

setup(
    ext_modules=[Extension("lotr_ext._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
