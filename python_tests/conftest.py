"""Fixtures of all tests: a fixed seed, and the switch between one autograd node and two; and where only the tests on a GPU are
asked for, the other files need not find their packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from nets import OpCounter

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = not (ROOT / "lotr_ext" / "_C.abi3.so").is_file()  # not built here: the tests are of the package that is installed
if INSTALLED:
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT] + [str(ROOT)]

os.environ["LOTR_TUNE"] = "0"  # whatever was found on this machine by `tune`; child processes too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of child processes: their inputs are tiny, and threads that wait take time

import lotr_ext  # noqa: E402

# Child processes find the same package, and after it what else is in the checkout, whichever folder they start in.
_FOLDERS = [Path(lotr_ext.__file__).parents[1], ROOT / "python_tests", ROOT / "examples", ROOT]
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, _FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])
if INSTALLED:
    os.environ["PYTHONSAFEPATH"] = "1"  # else the folder that a process starts in comes first (Python 3.10 does not know this)

from lotr_ext.ops import planner  # noqa: E402

torch.set_num_threads(1)  # tiny inputs: a second thread only waits


def pytest_report_header() -> str:
    return f"lotr_ext: {Path(lotr_ext.__file__).parent}"


class GpuMachineModule(pytest.Module):
    """A file of tests whose import may miss a package: a machine with a GPU has few (rich, hypothesis, yaml are not there)."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            missing = error.__cause__
            if isinstance(missing, ModuleNotFoundError):
                pytest.skip(f"{self.path.name}: the package {missing.name} is not installed")
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """With -m cuda alone: anywhere else a package that is missing is an error, so that no test is lost in silence."""
    if parent.config.option.markexpr != "cuda":
        return None
    return GpuMachineModule.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _as_large_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of tests take our nodes, as larger ones do; those of 128 tokens and more two, however narrow they are."""
    monkeypatch.setattr(planner, "LITTLE_WORK", 0)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small test inputs take the path of many tokens: two nodes, folded, siblings sharing."""
    monkeypatch.setattr(planner, "FEW_TOKENS", 0)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> OpCounter:
    """The products that our operators make."""
    from nets import OpCounter

    return OpCounter(monkeypatch)


def _take(path: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(planner, "FEW_TOKENS", 128 if path == "one node" else 0)
    monkeypatch.setattr(planner, "LITTLE_WORK", 2**62 if path == "one folded node" else 0)
    return path


@pytest.fixture(params=["one node", "two nodes"])
def our_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both paths of ours that a small input can take."""
    return _take(request.param, monkeypatch)


@pytest.fixture(params=["one node", "two nodes", "one folded node"])
def either_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on all paths that a small input can take."""
    return _take(request.param, monkeypatch)
