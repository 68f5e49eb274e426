"""Compiles the programs of this folder against the headers of CUTLASS."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from csrc.interpreter import build
from csrc.simt.build import BuildError

HERE = Path(__file__).resolve().parent
PROGRAMS = {"sm80_gemm": 80, "sm90_gemm": 90, "cute_sm90": 90, "cuda_sm90": 90}  # the capability of each


def cutlass() -> list[Path]:
    """The folders of CUTLASS' headers. Raises BuildError if they are not installed."""
    package = importlib.util.find_spec("cutlass_library")
    source = Path(package.origin).parent / "source" if package and package.origin else None
    if source is None or not (source / "include" / "cutlass" / "cutlass.h").is_file():
        raise BuildError(
            "cutlass/cutlass.h: expected in the package nvidia-cutlass, found none; pip install --no-deps nvidia-cutlass"
        )
    return [source / "include", source / "tools" / "util" / "include"]


def library(program: str) -> Path:
    """A shared library of one program and the stand-in runtime.

    Raises:
        BuildError: there are no headers or no nvcc, or the compiler's message.
    """
    options = ["--expt-relaxed-constexpr", "-w", "-DNDEBUG", "-DCUTLASS_ENABLE_GDC_FOR_SM90=1"]
    for folder in cutlass():
        options += ["-isystem", str(folder)]
    with build.locked():
        compiled = build.compile_object(HERE / f"{program}.cu", PROGRAMS[program], tuple(options))
        return build.link([compiled], build.BUILD / f"{program}.so")
