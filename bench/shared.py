"""Layers that share A and B: their gradients as one sum in place, against autograd's sums.

    python -m bench.shared                    4, 16, 64 layers; 256 tokens of width 768, r = 16
                                              (GPU: 4096 tokens of width 4096)
    python -m bench.shared --shapes 8x4096x4096x16 --dtypes bf16

A shape is layers x tokens x width x rank. "autograd" is the three-line formula in torch operations,
so that autograd sums the gradients of A and B. "lotr_ext" is our layers. The tensors are the same.

    error         of dA against float64, checked first
    allocated     all bytes that a backward allocates
    new_factors   how many tensors of A's size it makes
"""

import argparse
import sys
from typing import Any

from torch import Tensor, nn

from .checks import check_error, error_of, memory_changes
from .common import Case, dtype_of
from .program import Program
from .rivals import random_tokens, stack, stack_values
from .timing import Group, Step, training

FLOOR = "autograd"
KEY = ("layers", "m", "k", "r")
STACKS = {FLOOR: "lotr-eager", "lotr_ext": "lotr_ext"}
# Of dA: at least five times what correct ways of summing have.
TOLERANCE = {"fp32": 2e-5, "bf16": 0.15, "fp16": 2e-2}


def gradient_of_A(model: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    model(x).backward(g)
    A = next(p for name, p in model.named_parameters() if "A" in name.split("."))
    return A.grad


def allocations(step: Step, factor_bytes: set[int]) -> dict[str, int]:
    """What a backward allocates on the CPU: all bytes, and tensors of a factor's size."""
    step.prepare()
    y = step.stages["forward"](None)
    changes = memory_changes(lambda: step.stages["backward"](y))
    new = [change for change in changes if change > 0]
    factors = sum(change in factor_bytes for change in new)
    return {"allocated_bytes": sum(new), "new_factors": factors}


def build(case: Case, options: argparse.Namespace) -> Group:
    layers, m, k, r = (case[name] for name in KEY)
    dtype = dtype_of(case)
    tensors = stack_values(layers, k, r, dtype, options.device)
    x, g = random_tokens(m, k, k, dtype, options.device)
    wide = stack("lotr-eager", [t.double() for t in tensors], "chained")
    truth = gradient_of_A(wide, x.double(), g.double())

    def step_of(name: str) -> Step:
        model = stack(STACKS[name], tensors, "chained")
        error = error_of(gradient_of_A(model, x, g), truth)
        facts: dict[str, Any] = {"error": check_error("dA", error, TOLERANCE[case["dtype"]])}
        step = training(lambda: model(x), g, model.parameters(), facts=facts)
        step.run()
        if options.device == "cpu":
            # A factor has k r numbers in the layer's dtype, its sum of gradients in float32.
            facts |= allocations(step, {k * r * dtype.itemsize, k * r * 4})
        return step

    return Group(options.rivals or STACKS, step_of)


PROGRAM = Program(
    name="shared",
    doc=__doc__,
    rivals=tuple(STACKS),
    build=build,
    form="{layers} layers, {m} tokens of width {k}, r {r}",
    key=KEY,
    shapes={
        "cpu": "4x256x768x16,16x256x768x16,64x256x768x16",
        "cuda": "4x4096x4096x16,16x4096x4096x16,64x4096x4096x16",
    },
    floor=FLOOR,
    slice_s=0.0,
    compared=tuple(STACKS),
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
