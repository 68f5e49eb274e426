"""Tests on a GPU: make test-gpu. Elsewhere they are skipped with the reason.

Tests with the parameter `device` also run on the CPU, which shows that they can pass.
"""

import os
from pathlib import Path

import pytest
import torch

# The tables fill new memory with NaN, which is a part of torch's deterministic mode. In that mode
# cuBLAS needs this setting.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HERE = Path(__file__).resolve().parent


def obstacle() -> str | None:
    """Returns why these tests cannot run on this machine, or None."""
    if not torch.cuda.is_available():
        return f"no GPU (torch {torch.__version__}, CUDA {torch.version.cuda})"
    from lotr_ext.core.kernel_support import cuda_obstacle

    return cuda_obstacle(torch.cuda.current_device())


def on_gpu(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return HERE in item.path.parents and parameters.get("device") != "cpu"


@pytest.hookimpl(tryfirst=True)  # before the selection by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if on_gpu(item)]
    reason = obstacle() if gpu_items else None
    for item in gpu_items:
        item.add_marker(pytest.mark.cuda)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param
