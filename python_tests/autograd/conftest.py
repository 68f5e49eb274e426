"""A small model and its input."""

from __future__ import annotations

import pytest
import torch

from nets import Net


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 7, 24)
