"""A stack of adapted layers, forward and backward: host overhead, and the shared gradient.

    python -m bench.host                      24 layers of width 32; 1, 16, 160 tokens; fp32
    python -m bench.host --shapes 1x96x32x8,2048x24x32x8 --wirings siblings
    python -m bench.host --shapes 256x64x768x16 --wirings chained --rivals lotr-eager,lotr_ext
    python -m bench.host --against ../other   this lotr_ext over another checkout's

A shape is tokens x layers x width x rank. chained: the x of a layer is the y of the one before.
siblings: three layers on one x, as q, k and v of a block. At width 32 products take almost no time.
At width 768 autograd's sums of the gradients of A and B take time and memory. Our layers add to one
sum in place. Every rival has the same weights, and the LoTR ones are compared with the formula in
float64 first. Times are per layer. python_tests/test_frames.py counts the Python calls of a layer.

    allocated     all bytes that a backward allocates, on a CPU
"""

import argparse
import sys

from .common import Case, dtype_of, some_of
from .program import Program
from .rivals import STACKED, WIRINGS, check_stack, random_tokens, stack, stack_values
from .timing import Group, Step, memory_changes, training

# Of y, dx and the gradients, through all layers: at least five times the error of correct sums.
TOLERANCE = {"fp32": 2e-5, "bf16": 0.2, "fp16": 5e-2}
DIMENSIONS = ("m", "layers", "k", "r")


def cases(options: argparse.Namespace) -> list[Case]:
    return [{"wiring": wiring, **shape} for wiring in options.wirings for shape in options.shapes]


def allocated_bytes(step: Step) -> int:
    """Returns how much a backward allocates on the CPU, after a first one that makes caches."""
    step.run()
    step.prepare()
    y = step.stages["forward"](None)
    changes = memory_changes(lambda: step.stages["backward"](y))
    return sum(change for change in changes if change > 0)


def build(case: Case, options: argparse.Namespace) -> Group:
    m, layers, k, r = (case[name] for name in DIMENSIONS)
    dtype = dtype_of(case)
    if case["wiring"] == "siblings" and layers % 3:
        raise ValueError(f"layers: expected a multiple of 3 for siblings, got {layers}")
    x, g = random_tokens(m, k, k, dtype, options.device)
    x.requires_grad_()
    tensors = stack_values(layers, k, r, dtype, options.device)
    truth = stack("lotr-eager", [t.double() for t in tensors], case["wiring"])

    def step_of(name: str) -> Step:
        model = stack(name, tensors, case["wiring"])
        facts: dict[str, float] = {}
        if name.startswith("lotr"):
            facts["error"] = check_stack(model, truth, x, g, TOLERANCE[case["dtype"]])
        step = training(lambda: model(x), g, [x, *model.parameters()], layers=layers, facts=facts)
        if options.device == "cpu":
            facts["allocated_bytes"] = allocated_bytes(step)
        return step

    return Group(options.rivals or STACKED, step_of)


PROGRAM = Program(
    name="host",
    doc=__doc__,
    rivals=STACKED,
    build=build,
    title_format="{wiring}, {m} tokens, {layers} layers of width {k}, r {r}",
    dimensions=DIMENSIONS,
    shapes=dict.fromkeys(("cpu", "cuda"), "1x24x32x8,16x24x32x8,160x24x32x8"),
    cases=cases,
    floor="lotr-eager",
    rounds=41,
    measurement_s=0.0,
    dtypes="fp32",
    compared=("lotr-eager", "lotr_ext", "lotr_ext-model"),
    options={"wirings": {"type": some_of(WIRINGS), "default": "chained,siblings"}},
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
