"""The CUDA kernels as nvcc's PTX, run by csrc/interpreter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python_tests" / "kernels"), str(ROOT)]

from csrc.interpreter import build  # noqa: E402
from csrc.interpreter.launch import Library  # noqa: E402


class Kernels:
    """The kernels for one GPU: `module` has the launchers of csrc/simt/module, whose launches `library` runs."""

    def __init__(self, capability: int) -> None:
        self.library = Library(build.module(capability), capability)
        self.module: ModuleType = self.library.python_module("lotr_simt")
        assert self.module.__file__ == str(self.library.path)

    def bits(self, run: Callable[[ModuleType], list[bytes]], seed: int) -> list[bytes]:
        """What `run` returns, in one order of warps and copies. Raises what stopped a kernel."""
        self.library.seed = seed
        try:
            return run(self.module)
        except RuntimeError:
            self.library.raise_error()
            raise


@pytest.fixture(scope="session")
def kernels() -> Callable[[int], Kernels]:
    """kernels(capability), built once."""
    if build.simt.tool("nvcc") is None:
        pytest.skip("no nvcc")
    made: dict[int, Kernels] = {}

    def of(capability: int) -> Kernels:
        if capability not in made:
            made[capability] = Kernels(capability)
        return made[capability]

    return of
