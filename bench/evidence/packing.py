"""A loss an item, in half precision, as text for JSON."""

from __future__ import annotations

import base64

import torch
from torch import Tensor


def packed(losses: Tensor) -> str:
    return base64.b64encode(losses.half().numpy().tobytes()).decode()


def unpacked(text: str) -> Tensor:
    """[items] float64."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.half).double()
