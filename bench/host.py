"""Host overhead of an adapted layer, forward and backward, where products take almost no time.

    python -m bench.host                      24 layers of width 32; 1, 16, 160 tokens; fp32
    python -m bench.host --shapes 1x96x32x8,2048x24x32x8 --forms siblings
    python -m bench.host --against ../other   another checkout's lotr_ext in turns with this one's

A shape is tokens x layers x width x rank. chained: the x of a layer is the y of the one before.
siblings: three layers on one x, as q, k and v of a block. Every rival has the same weights, and the
LoTR ones are compared with the formula in float64 first. Times are microseconds per layer. frames:
calls of Python functions of lotr_ext in a step, per layer; functions: how many different ones;
operators: those that Python and autograd dispatch. These counts do not depend on the machine.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from .common import Case, dtype_of, some_of
from .program import Program
from .rivals import STACKED, WIRINGS, check_stack, random_tokens, stack, stack_values
from .timing import Group, Step, training

TOLERANCE = {"fp32": 1e-4, "bf16": 0.2, "fp16": 5e-2}  # of y and dx, through all layers
SHAPES = "1x24x32x8,16x24x32x8,160x24x32x8"
KEY = ("m", "layers", "k", "r")


def cases(options: argparse.Namespace) -> list[Case]:
    return [{"form": wiring, **shape} for wiring in options.forms for shape in options.shapes]


def count_frames(call: Callable[[], object], folder: Path) -> tuple[int, int]:
    """Counts calls of Python functions in the files of a folder, and different functions."""
    calls: list[CodeType] = []

    def note(frame: Any, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(folder)):
            calls.append(frame.f_code)

    # backward on this thread, which has the profile function
    with torch.autograd.set_multithreading_enabled(False):
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
    return len(calls), len(set(calls))


def count_operators(call: Callable[[], object]) -> int:
    """Counts the operators that Python or autograd calls, without those that they call."""
    from torch.profiler import ProfilerActivity, profile

    def is_operator(event: Any) -> bool:
        return event is not None and event.name.startswith(("aten::", "lotr::"))

    def is_inner(event: Any) -> bool:
        caller = event.cpu_parent
        while caller is not None and not is_operator(caller):
            caller = caller.cpu_parent
        return caller is not None

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return sum(is_operator(event) and not is_inner(event) for event in profiler.events())


def build(case: Case, options: argparse.Namespace) -> Group:
    import lotr_ext

    m, layers, k, r = (case[name] for name in KEY)
    dtype = dtype_of(case)
    if case["form"] == "siblings" and layers % 3:
        raise ValueError(f"layers: expected a multiple of 3 for siblings, got {layers}")
    x, g = random_tokens(m, k, k, dtype, options.device)
    x.requires_grad_()
    tensors = stack_values(layers, k, r, dtype, options.device)
    truth = stack("lotr-eager", [t.double() for t in tensors], case["form"])

    def step_of(name: str) -> Step:
        model = stack(name, tensors, case["form"])
        facts: dict[str, Any] = {}
        if name.startswith("lotr"):
            facts["error"] = check_stack(model, truth, x, g, TOLERANCE[case["dtype"]])
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        step = training(lambda: model(x), g, leaves, layers=layers, facts=facts)
        step.run()
        frames, functions = count_frames(step.run, Path(lotr_ext.__file__).parent)
        facts["frames"] = frames / layers
        facts["functions"] = functions
        facts["operators"] = count_operators(step.run) / layers
        return step

    return Group(options.rivals or STACKED, step_of)


PROGRAM = Program(
    name="host",
    doc=__doc__,
    rivals=STACKED,
    build=build,
    form="{form}, {m} tokens, {layers} layers of width {k}, r {r}",
    key=KEY,
    shapes={"cpu": SHAPES, "cuda": SHAPES},
    cases=cases,
    floor="lotr-eager",
    rounds=41,
    slice_s=0.0,
    dtypes="fp32",
    compared=("lotr-eager", "lotr_ext", "lotr_ext-model"),
    options={"forms": {"type": some_of(WIRINGS), "default": "chained,siblings"}},
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
