"""How much Python runs in a forward and backward of q, k and v.

Host time is most of a step on few tokens.
"""

import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import nn

import lotr_ext
from lotr_ext import LoTRFactors, LoTRLinear

PACKAGE = str(Path(lotr_ext.__file__).parent)
# A little above the counts when they were set. Each call costs host time.
MAX_CALLS = 150
MAX_FUNCTIONS = 48
MAX_FILES = 9


def test_calls_of_q_k_v() -> None:
    """Counts the calls of the package's functions in a forward and backward.

    x has as many elements as 2,048 tokens of width 768. The layers then share u = x A, which needs
    the most calls.
    """
    factors = LoTRFactors(32, 32, 4)
    layers = [LoTRLinear.from_linear(nn.Linear(32, 32), factors) for _ in range(3)]

    def step() -> None:
        x = torch.ones(2048 * 768 // 32, 32, requires_grad=True)
        sum(layer(x) for layer in layers).sum().backward()

    step()
    calls: Counter[CodeType] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[frame.f_code] += 1

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    assert 0 < calls.total() <= MAX_CALLS, calls
    assert len(calls) <= MAX_FUNCTIONS, calls
    assert len({code.co_filename for code in calls}) <= MAX_FILES, calls
