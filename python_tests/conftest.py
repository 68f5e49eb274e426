"""For all tests: a fixed seed, one thread, and the same package in child processes."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "lotr_ext" / "_C.abi3.so").is_file():  # test the installed package
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT] + [str(ROOT)]
# For child processes. Their inputs are tiny, and waiting threads take time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import models  # noqa: E402
import zoo  # noqa: E402

import lotr_ext  # noqa: E402
from lotr_ext.core import dispatch  # noqa: E402

_FOLDERS = [Path(lotr_ext.__file__).parents[1], ROOT / "python_tests", ROOT / "examples", ROOT]
_inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, _FOLDERS), *_inherited])
torch.set_num_threads(1)


def pytest_report_header() -> str:
    return f"lotr_ext: {Path(lotr_ext.__file__).parent}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["few tokens", "folded", "shared"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes layers of any size use one of the three plans that depend on the size.

    "few tokens": one node, core not folded. "folded": one node. "shared": siblings share u = x A.
    """
    monkeypatch.setattr(dispatch, "LITTLE_WORK", 0 if request.param == "shared" else 2**62)
    monkeypatch.setattr(dispatch, "FEW_TOKENS", 2**62 if request.param == "few tokens" else -1)
    return request.param


@pytest.fixture
def model() -> torch.nn.Module:
    """A small adapted network, `zoo.Mlp`, with random cores and factors."""
    return models.trained("mlp")


@pytest.fixture
def x() -> torch.Tensor:
    return zoo.inputs("mlp")
