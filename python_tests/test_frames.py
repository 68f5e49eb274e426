"""How much Python runs in a forward and backward of q, k and v.

Host time is most of a step on few tokens.
"""

import sys
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import nn

import lotr_ext
from lotr_ext import LoTRFactors, LoTRLinear

PACKAGE = str(Path(lotr_ext.__file__).parent)
MAX_CALLS = 150
MAX_FUNCTIONS = 48
MAX_FILES = 9


def calls_of_a_step() -> list[CodeType]:
    """Returns the calls of the package's functions in a forward and backward of q, k and v.

    As much work as 2,048 tokens of width 768: the layers share u = x A, which needs the most calls.
    """
    factors = LoTRFactors(32, 32, 4)
    layers = [LoTRLinear.from_linear(nn.Linear(32, 32), factors) for _ in range(3)]

    def step() -> None:
        x = torch.ones(2048 * 768 // 32, 32, requires_grad=True)
        sum(layer(x) for layer in layers).sum().backward()

    step()
    calls: list[CodeType] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(frame.f_code)

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def test_frames_of_q_k_v() -> None:
    calls = calls_of_a_step()
    functions = set(calls)
    assert len(calls) <= MAX_CALLS, functions
    assert len(functions) <= MAX_FUNCTIONS, functions
    assert len({function.co_filename for function in functions}) <= MAX_FILES, functions
