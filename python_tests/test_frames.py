"""How much Python a forward and backward of q, k and v runs: host time is most of a step on few tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import lotr_ext
from lotr_ext import LoTRFactors, LoTRLinear

PACKAGE = str(Path(lotr_ext.__file__).parent)
FRAMES, FUNCTIONS, FILES = 150, 48, 9


def test_frames_of_q_k_v() -> None:
    """2,048 tokens: the layers share u, so this is the longest way. Calls of the package's functions, forward and backward."""
    factors = LoTRFactors(32, 32, 4)
    layers = [LoTRLinear.from_linear(nn.Linear(32, 32), factors) for _ in range(3)]
    tokens = 2048 * 768 // 32  # as much work as 2,048 tokens of width 768

    def step() -> None:
        x = torch.ones(tokens, 32, requires_grad=True)
        sum(layer(x) for layer in layers).sum().backward()

    step()
    seen: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            seen.append(
                (frame.f_code.co_filename, f"{frame.f_code.co_name} {frame.f_code.co_firstlineno}")
            )

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    found = len(seen), len(set(seen)), len({file for file, _ in seen})
    assert found[0] <= FRAMES and found[1] <= FUNCTIONS and found[2] <= FILES, (
        found,
        sorted(set(seen)),
    )
