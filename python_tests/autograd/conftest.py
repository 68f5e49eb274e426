"""A small model and its input, and a compiler without earlier graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nets import Net


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 7, 24)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):  # else a graph of an earlier run's code is taken
        yield
    torch.compiler.reset()
