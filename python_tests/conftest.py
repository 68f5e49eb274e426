"""Fixtures of all tests: a fixed seed, and the switch between one autograd node and two."""

from __future__ import annotations

import pytest
import torch

from lotr_ext.ops import planner

torch.set_num_threads(1)  # tiny inputs: a second thread only waits


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small test inputs take the path of many tokens: two nodes, folded, siblings sharing."""
    monkeypatch.setattr(planner, "FEW_TOKENS", 0)


@pytest.fixture(params=["one node", "two nodes"])
def either_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both paths that a small input can take."""
    monkeypatch.setattr(planner, "FEW_TOKENS", 0 if request.param == "two nodes" else 128)
    return request.param
