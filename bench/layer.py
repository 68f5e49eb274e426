"""One adapted layer, forward and backward, against its rivals: the time over the frozen layer's.

    python -m bench.layer                     six sizes, one CPU thread (GPU: Llama-3-8B's layers)
    python -m bench.layer --shapes 512x768x768x16,2048x4096x4096x64 --dtypes bf16 --threads 1,2
    python -m bench.layer --rivals frozen,lora-compiled,lotr_ext,lotr_ext-compiled
    python -m bench.layer --against ../other  this lotr_ext over another checkout's

A shape is tokens x in x out x rank. Every rival is checked against float64 before it is timed. The
adapters have the dtype of the layer, so that all do the same arithmetic. "lotr_ext-fp32" has
float32 factors and core on a half-precision layer, which is the default of `apply_lotr`.
"-two_pass", "-beta" and "-fused" are the strategies of our layer on a GPU (docs/kernels.md).
"""

import argparse
import sys

from .common import Case, dtype_of
from .program import Program
from .rivals import LAYERS, TOLERANCE, Tensors, check_layer, default_layers, random_tokens
from .timing import Group, Step, training

DIMENSIONS = ("m", "k", "n", "r")


def build(case: Case, options: argparse.Namespace) -> Group:
    m, k, n, r = (case[name] for name in DIMENSIONS)
    dtype = dtype_of(case)
    tensors = Tensors.random(k, n, r, dtype, options.device)
    x, g = random_tokens(m, k, n, dtype, options.device)
    names = options.rivals or default_layers(tensors)
    # Each rival has a copy of x, and the copies are shuffled each round: on a CPU the address of x
    # changes a layer's time by up to 2 %.
    copies = [x.clone().requires_grad_() for _ in names]

    def step_of(name: str) -> Step:
        rival = LAYERS[name](tensors)
        facts = {"error": check_layer(rival, tensors, x, g, TOLERANCE[case["dtype"]])}
        i = names.index(name)
        return training(lambda: rival(copies[i]), g, [*copies, *rival.parameters()], facts=facts)

    return Group(names, step_of, prepare_round=lambda rng: rng.shuffle(copies))


PROGRAM = Program(
    name="layer",
    doc=__doc__,
    rivals=tuple(LAYERS),
    build=build,
    title_format="{m} x {k} x {n}, r {r}",
    dimensions=DIMENSIONS,
    shapes={
        "cpu": (
            "512x768x768x16,2048x768x768x16,1024x2048x2048x16,2048x768x768x64,"
            "16x768x768x16,1x768x768x16"
        ),
        "cuda": (
            "8192x4096x4096x16,2048x4096x4096x16,16x4096x4096x16,8192x4096x4096x64,"
            "8192x4096x14336x16,8192x14336x4096x16"
        ),
    },
    compared=("frozen", "lotr_ext"),
    is_pivoted=True,
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
