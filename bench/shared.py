"""Layers that share A and B: their gradients as one sum in place, against autograd's own sums.

    python -m bench.shared                    4, 16, 64 layers; 256 tokens of width 768 (GPU: 4096 of 4096), r = 16
    python -m bench.shared --shapes 8x4096x4096x16 --dtypes bf16

A shape is layers x tokens x width x rank. "autograd": the three-line formula in torch operations, so that autograd sums A's and
B's gradients itself; "lotr_ext": our layers. Both have the same tensors. error: of dA against float64, checked first.
allocated: all bytes that a backward allocates; new factors: how many tensors of A's size it makes.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from .common import Case, Group, Program, check_error, error_of, memory_changes, sizes, training
from .rivals import chosen, dtype_of, stack, stack_values

FLOOR = "autograd"
STACKS = {FLOOR: "lotr-eager", "lotr_ext": "lotr_ext"}
SHAPES = {
    "cpu": "4x256x768x16,16x256x768x16,64x256x768x16",
    "cuda": "4x4096x4096x16,16x4096x4096x16,64x4096x4096x16",
}
TOLERANCE = {
    "fp32": 2e-5,
    "bf16": 0.15,
    "fp16": 2e-2,
}  # of dA: five times and more what correct ways of summing have


def cases(options: argparse.Namespace) -> list[Case]:
    return options.shapes or sizes("layers", "m", "k", "r")(SHAPES[options.device])


def gradient_of_A(made: torch.nn.Module, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    made(x).backward(g)
    A = next(p for name, p in made.named_parameters() if "A" in name.split("."))
    return A.grad


def build(case: Case, options: argparse.Namespace) -> Group:
    layers, m, k, r, dtype = case["layers"], case["m"], case["k"], case["r"], dtype_of(case)
    tensors = stack_values(layers, k, r, dtype, options.device)
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(m, k, generator=generator).to(options.device, dtype) for _ in range(2))
    truth = gradient_of_A(
        stack("lotr-eager", [t.double() for t in tensors], "chained"), x.double(), g.double()
    )
    steps = {}
    for name in chosen(options.rivals, STACKS, STACKS):
        made = stack(STACKS[name], tensors, "chained")
        error = check_error(
            "dA", error_of(gradient_of_A(made, x, g), truth), TOLERANCE[case["dtype"]]
        )
        facts: dict[str, Any] = {"error": error}
        step = steps[name] = training(lambda made=made: made(x), g, made.parameters(), facts=facts)
        step.run()
        if options.device == "cpu":
            step.prepare()
            y = step.stages["forward"](None)
            new = [
                change
                for change in memory_changes(lambda y=y, step=step: step.stages["backward"](y))
                if change > 0
            ]
            factor = {k * r * element for element in (dtype.itemsize, 4)}
            facts |= {
                "allocated_bytes": sum(new),
                "new_factors": sum(change in factor for change in new),
            }
    return Group(steps)


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", type=sizes("layers", "m", "k", "r"), help="LxMxKxR, comma-separated"
    )


FORM = "{layers} layers, {m} tokens of width {k}, r {r}"
PROGRAM = Program(
    "shared",
    __doc__,
    cases,
    build,
    FORM,
    floor=FLOOR,
    slice_s=0.0,
    compared=tuple(STACKS),
    options=more_options,
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
