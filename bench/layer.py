"""One adapted layer, forward and backward, against its rivals: the adapter's time over the frozen layer's.

    python -m bench.layer                     five sizes, ranks 16 and 64, one CPU thread (on a GPU: Llama-3-8B's layers)
    python -m bench.layer --shapes 512x768x768x16,2048x4096x4096x64 --dtypes bf16 --threads 1,2
    python -m bench.layer --rivals frozen,lora-compiled,lotr_ext,lotr_ext-compiled
    python -m bench.layer --against ../other  another checkout's lotr_ext in turns with this one's

A shape is tokens x in x out x rank. Every rival is checked against float64 before it is timed. The adapters have the layer's
own dtype for every rival, so that all do the same arithmetic.
"""

from __future__ import annotations

import argparse
import sys

import torch

from .common import Case, Group, Program, Step, peak_bytes, sizes
from .rivals import COMPILED, LAYERS, TOLERANCE, Rival, Tensors, check_layer, chosen, dtype_of

SHAPES = {
    "cpu": "512x768x768x16,2048x768x768x16,1024x2048x2048x16,2048x768x768x64,16x768x768x16,1x768x768x16",
    "cuda": "8192x4096x4096x16,8192x4096x14336x16,8192x14336x4096x16,8192x4096x4096x64,2048x4096x4096x16,16x4096x4096x16",
}


def cases(options: argparse.Namespace) -> list[Case]:
    return options.shapes or sizes("m", "k", "n", "r")(SHAPES[options.device])


def step_of(rival: Rival, copies: list[torch.Tensor], i: int, g: torch.Tensor) -> Step:
    leaves = list(rival.parameters())

    def drop_gradients() -> None:
        for leaf in (copies[i], *leaves):
            leaf.grad = None

    return Step(
        {"forward": lambda _: rival(copies[i]), "backward": lambda y: y.backward(g)}, drop_gradients
    )


def build(case: Case, options: argparse.Namespace) -> Group:
    m, k, n, r, dtype = case["m"], case["k"], case["n"], case["r"], dtype_of(case)
    tensors = Tensors.random(k, n, r, dtype, options.device)
    generator = torch.Generator().manual_seed(1)
    x, g = (
        torch.randn(m, width, generator=generator).to(options.device, dtype) for width in (k, n)
    )
    x.requires_grad_()
    names = chosen(options.rivals, [name for name in LAYERS if name not in COMPILED], LAYERS)
    # a copy of x for each rival, shuffled each round: on a CPU the address of x changes a layer's time by up to 2 %
    copies, steps = [x.detach().clone().requires_grad_() for _ in names], {}
    for i, name in enumerate(names):
        rival = LAYERS[name](tensors)
        facts = {"error": check_layer(rival, tensors, x, g, TOLERANCE[case["dtype"]])}
        steps[name] = step_of(rival, copies, i, g)
        steps[name].run()
        steps[name].facts = facts | {"peak_bytes": peak_bytes(steps[name].run, options.device)}
    return Group(steps, lambda draw: draw.shuffle(copies))


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", type=sizes("m", "k", "n", "r"), help="MxKxNxR, comma-separated")


FORM = "{m} x {k} x {n}, r {r}"
PROGRAM = Program(
    "layer",
    __doc__,
    cases,
    build,
    FORM,
    compared=("frozen", "lotr_ext"),
    pivoted=True,
    options=more_options,
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
