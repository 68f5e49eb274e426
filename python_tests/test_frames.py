"""How much Python runs in a forward and backward of q, k and v.

Host time is most of a step on few tokens.
"""

import sys
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import nn

import lotr_ext
from lotr_ext import LoTRFactors, LoTRLinear

PACKAGE = str(Path(lotr_ext.__file__).parent)
MAX_CALLS = 150
MAX_FUNCTIONS = 48
MAX_FILES = 9


class Call(NamedTuple):
    """The function of a call."""

    file: str
    name: str
    line: int


def calls_of_a_step() -> list[Call]:
    """Returns the calls of the package's functions in a forward and backward of q, k and v.

    As much work as 2,048 tokens of width 768: the layers share u = x A, which needs the most calls.
    """
    factors = LoTRFactors(32, 32, 4)
    layers = [LoTRLinear.from_linear(nn.Linear(32, 32), factors) for _ in range(3)]
    tokens = 2048 * 768 // 32

    def step() -> None:
        x = torch.ones(tokens, 32, requires_grad=True)
        sum(layer(x) for layer in layers).sum().backward()

    step()
    calls: list[Call] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            calls.append(Call(code.co_filename, code.co_name, code.co_firstlineno))

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def test_frames_of_q_k_v() -> None:
    calls = calls_of_a_step()
    functions = sorted(set(calls))
    assert len(calls) <= MAX_CALLS, functions
    assert len(functions) <= MAX_FUNCTIONS, functions
    assert len({function.file for function in functions}) <= MAX_FILES, functions
