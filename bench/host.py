"""Host overhead of an adapted layer, forward and backward, at sizes at which the products take almost no time.

    python -m bench.host                      24 layers of width 32; 1, 16, 160 tokens; chained and as q, k, v; fp32, 1 thread
    python -m bench.host --shapes 1x96x32x8,2048x24x32x8 --forms siblings
    python -m bench.host --against ../other   another checkout's lotr_ext in turns with this one's

A shape is tokens x layers x width x rank. chained: the x of a layer is the y of the one before. siblings: three layers on one
x, as q, k and v of a block. Every rival has the same weights, and the LoTR ones are compared with the formula in float64 first.
Times are microseconds a layer. frames: calls a layer of Python functions of lotr_ext in a step; functions: how many different
ones; operators: those that Python and autograd dispatch. These counts do not depend on the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .common import Case, Group, Program, Step, listed, sizes, training
from .rivals import FORMS, STACKED, check_stack, chosen, dtype_of, stack, stack_values

TOLERANCE = {
    "fp32": 1e-4,
    "bf16": 0.2,
    "fp16": 5e-2,
}  # of y and dx against float64, through all layers
SHAPES = "1x24x32x8,16x24x32x8,160x24x32x8"
KEY = ("m", "layers", "k", "r")


def cases(options: argparse.Namespace) -> list[Case]:
    shapes = options.shapes or sizes(*KEY)(SHAPES)
    return [
        {"form": form, **shape} for form in chosen(options.forms, FORMS, FORMS) for shape in shapes
    ]


def count_frames(call: Callable[[], object], folder: Path) -> tuple[int, int]:
    """Calls of Python functions in a folder's files, and how many different functions."""
    found: list[object] = []

    def seen(frame: Any, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(folder)):
            found.append(frame.f_code)

    with torch.autograd.set_multithreading_enabled(
        False
    ):  # backward on this thread, where the profile function is
        sys.setprofile(seen)
        try:
            call()
        finally:
            sys.setprofile(None)
    return len(found), len(set(found))


def count_operators(call: Callable[[], object]) -> int:
    """Operators that Python or autograd calls, without those that they call in turn."""
    from torch.profiler import ProfilerActivity, profile

    def is_operator(event: Any) -> bool:
        return event is not None and event.name.startswith(("aten::", "lotr::"))

    def is_inner(event: Any) -> bool:
        above = event.cpu_parent
        while above is not None and not is_operator(above):
            above = above.cpu_parent
        return above is not None

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return sum(is_operator(event) and not is_inner(event) for event in profiler.events())


def step_of(made: nn.Module, x: Tensor, g: Tensor, layers: int, facts: dict[str, Any]) -> Step:
    import lotr_ext

    leaves = [x, *(p for p in made.parameters() if p.requires_grad)]
    step = training(lambda: made(x), g, leaves, layers=layers, facts=facts)
    step.run()
    frames, functions = count_frames(step.run, Path(lotr_ext.__file__).parent)
    facts |= {
        "frames": frames / layers,
        "functions": functions,
        "operators": count_operators(step.run) / layers,
    }
    return step


def build(case: Case, options: argparse.Namespace) -> Group:
    m, k, layers, dtype = case["m"], case["k"], case["layers"], dtype_of(case)
    if case["form"] == "siblings" and layers % 3:
        raise ValueError(f"layers: expected a multiple of 3 for siblings, got {layers}")
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(m, k, generator=generator).to(options.device, dtype) for _ in range(2))
    x.requires_grad_()
    tensors = stack_values(layers, k, case["r"], dtype, options.device)
    truth, steps = stack("lotr-eager", [t.double() for t in tensors], case["form"]), {}
    for name in chosen(options.rivals, STACKED, STACKED):
        made = stack(name, tensors, case["form"])
        facts = (
            {"error": check_stack(made, truth, x, g, TOLERANCE[case["dtype"]])}
            if name.startswith("lotr")
            else {}
        )
        steps[name] = step_of(made, x, g, layers, facts)
    return Group(steps)


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        type=sizes(*KEY),
        help="MxLxKxR, comma-separated: tokens x layers x width x rank",
    )
    parser.add_argument("--forms", type=listed, help=f"some of {', '.join(FORMS)}")


FORM = "{form}, {m} tokens, {layers} layers of width {k}, r {r}"
SIDES = ("lotr-eager", "lotr_ext", "lotr_ext-model")
PROGRAM = Program(
    "host",
    __doc__,
    cases,
    build,
    FORM,
    SIDES[0],
    41,
    slice_s=0.0,
    dtypes="fp32",
    compared=SIDES,
    options=more_options,
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
