"""All tests: a fixed seed, one thread, child processes that find the same package; and the forms that a layer's node takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (
    ROOT / "lotr_ext" / "_C.abi3.so"
).is_file():  # not built here: the tests are of the package that is installed
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT] + [str(ROOT)]
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # of child processes: their inputs are tiny, and threads that wait take time

import lotr_ext  # noqa: E402
from lotr_ext.core import dispatch  # noqa: E402

_FOLDERS = [Path(lotr_ext.__file__).parents[1], ROOT / "python_tests", ROOT / "examples", ROOT]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*map(str, _FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])]
)
torch.set_num_threads(1)


def pytest_report_header() -> str:
    return f"lotr_ext: {Path(lotr_ext.__file__).parent}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["alone", "folded", "shared"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The three forms that a layer's node takes by its size, each for any size: "alone", u is made inside and the core is not
    folded; "folded", u is made inside; "shared", siblings share u = x A, as with large inputs."""
    monkeypatch.setattr(dispatch, "LITTLE_WORK", 0 if request.param == "shared" else 2**62)
    monkeypatch.setattr(dispatch, "FEW_TOKENS", 2**62 if request.param == "alone" else 0)
    return request.param


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Siblings share u = x A for any size of x."""
    monkeypatch.setattr(dispatch, "LITTLE_WORK", 0)
