"""Tests of the CUDA operators on a real GPU: make test-gpu. They skip elsewhere, and say why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def obstacle() -> str | None:
    """Why these tests cannot run here."""
    if not torch.cuda.is_available():
        return f"no GPU (torch {torch.__version__}, CUDA {torch.version.cuda})"
    from lotr_ext.ops import planner

    return planner.cuda_obstacle(torch.cuda.current_device())


@pytest.hookimpl(tryfirst=True)  # before the selection by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents and "_cpu" not in item.name]
    reason = obstacle() if here else None
    for item in here:
        item.add_marker(pytest.mark.cuda)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def backend():
    """The operators on the GPU, as the kernel tests call them."""
    from bench.gpu.torch_library import TorchLibrary

    yield TorchLibrary("cuda")
    torch.set_float32_matmul_precision("highest")
