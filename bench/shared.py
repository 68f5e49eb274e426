"""The gradient of L layers that share A and B: one sum in place, against autograd's own sums.

    python -m bench.shared                    L = 4, 16, 64 at M x K x N, r = 256 x 768 x 768, 16 (GPU: 4096 x 4096 x 4096)
    python -m bench.shared --dtypes bf16 --layers 8,32

For each L and way of summing: time of forward, backward and both through the stack; in a backward, new tensors of A's or B's
shape and their bytes, all bytes allocated, and operators (GPU: kernels) launched, all counted; and the error of dA against
float64, which comes first: a case where it is too large is named and left out. All have the same tensors. "autograd" computes
the three-line formula in torch operations, so that autograd sums A's and B's gradients itself; "lotr_ext" is layers built by
hand, "lotr_ext-scope" the same in a model, with apply_lotr's forward scope.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .measure.bounds import DIRECTIONS
from .measure.counted import allocated_bytes, launches
from .measure.forms import stages
from .measure.names import numbers, sizes
from .measure.session import ROUNDS, Session, Table, add_options, bytes_text, check_options, start, time_text
from .measure.shapes import DTYPES
from .measure.timing import check_error, interleave, training
from .pictures import draw_measured
from .rivals.shared import FLOOR, LABELS

LAYERS = (4, 16, 64)
SHAPES = {"cpu": "256x768x16", "cuda": "4096x4096x16"}  # M x K x R
# Of dA against float64, through up to 128 layers at ranks up to K: five times and more what correct ways of summing have.
TOLERANCE = {"fp32": 2e-5, "bf16": 0.15, "fp16": 2e-2}


class SharedCase(NamedTuple):
    """L layers of one shape on one pair of factors."""

    layers: int
    m: int
    k: int
    r: int
    dtype: str
    threads: int

    def name(self) -> str:
        return f"{self.layers} layers {self.m}x{self.k}x{self.k} r{self.r} {self.dtype} t{self.threads}"


class Stack(nn.Module):
    """x_{l+1} = layer_l(x_l): adapted layers on one pair of factors, summed as `rival` says."""

    def __init__(self, case: SharedCase, dtype: torch.dtype, device: torch.device, rival: str):
        super().__init__()
        from lotr_ext import LoTRFactors, LoTRLinear
        from lotr_ext.model.scope import attach_scope

        self.plain = rival == FLOOR
        self.factors = LoTRFactors(case.k, case.k, case.r, dtype=dtype, device=device)
        made = (LoTRLinear(case.k, case.k, factors=self.factors, dtype=dtype, device=device) for _ in range(case.layers))
        self.layers = nn.ModuleList(made)
        if rival == "lotr_ext-scope":
            attach_scope(self)

    def forward(self, x: Tensor) -> Tensor:
        if not self.plain:
            for layer in self.layers:
                x = layer(x)
            return x
        A, B = self.factor_parameters()
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias) + ((x @ A) @ layer.core.to(x.dtype)) @ B.T
        return x

    def factor_parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        named = dict(self.factors.named_parameters())
        return named["A"], named["B"]


class NewTensors(TorchDispatchMode):
    """Counts the new tensors of a factor's shape that run through the dispatcher."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.count, self.bytes = sorted(shape), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in out if isinstance(out, tuple) else (out,):
            fresh = isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs
            if fresh and sorted(t.shape) == self.shape and t.untyped_storage().nbytes() == t.nbytes:
                self.count += 1
                self.bytes += t.nbytes
        return out


def stacks(case: SharedCase, device: torch.device) -> tuple[dict[str, Stack], Stack]:
    """One stack a rival, and one in float64, all with the same values."""
    torch.manual_seed(0)
    first = Stack(case, DTYPES[case.dtype], device, FLOOR)
    with torch.no_grad():
        for layer in first.layers:
            layer.core.normal_(std=0.1)
    made = {FLOOR: first} | {rival: Stack(case, DTYPES[case.dtype], device, rival) for rival in LABELS if rival != FLOOR}
    truth = Stack(case, torch.float64, device, FLOOR)
    for stack in (*made.values(), truth):
        for mine, value in zip(stack.parameters(), first.parameters()):
            mine.data.copy_(value.data)
    return made, truth


def measure(case: SharedCase, session: Session) -> list[dict]:
    """One result a way of summing."""
    device, dtype = session.device, DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(case.m, case.k, generator=generator).to(device, dtype) for _ in range(2))
    made, truth = stacks(case, device)
    truth(x.double()).backward(g.double())
    expected = truth.factor_parameters()[0].grad
    results, calls = [], []
    for rival, stack in made.items():
        timed = training(lambda stack=stack: stack(x), g, stack.parameters())
        result = {"rival": rival, "label": LABELS[rival]}
        timed.run()
        grad = stack.factor_parameters()[0].grad
        result["error"] = ((grad.double() - expected).norm() / expected.norm()).item()
        check_error(f"{rival}: dA: ", result["error"], TOLERANCE[case.dtype])
        for name, count in (("allocated_bytes", allocated_bytes), ("launches", launches)):
            timed.prepare()
            step = count(timed.run, device)
            result[name] = step - count(lambda timed=timed: timed.stages[0](None), device)
        timed.prepare()
        y = timed.stages[0](None)
        with NewTensors((case.k, case.r)) as new:
            timed.stages[1](y)
        del y
        results.append(result | {"tensors": new.count, "tensor_bytes": new.bytes})
        calls.append(timed)
    times = interleave(calls, session.clock, session.options.rounds, 0.0)
    for result, own in zip(results, times):
        result |= stages(own, times[0])
    return results


def show(case: SharedCase, results: list[dict], session: Session) -> None:
    launched = "kernels" if session.device.type == "cuda" else "operators"
    heads = ["A's and B's gradients summed by", *DIRECTIONS, "(quartiles)", "backward, less", f"{launched} in backward"]
    table = Table(case.name(), *heads, "allocated", "tensors like A", "their bytes", "error of dA")
    for result in results:
        times = [time_text(result[direction]["seconds"][1]) for direction in DIRECTIONS]
        low, _, high = result["step"]["seconds"]
        spread = f"{time_text(low)}, {time_text(high)}"
        less = "" if result["rival"] == FLOOR else f"{-result['backward']['excess'][1]:.1%}"
        counts = [str(result["launches"]), bytes_text(result["allocated_bytes"]), str(result["tensors"])]
        sizes = [bytes_text(result["tensor_bytes"]), f"{result['error']:.1e}"]
        table.add_row(result["label"], *times, spread, less, *counts, *sizes)
    print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.shared", description=__doc__.split("\n")[0])
    add_options(parser, dtypes="fp32")
    parser.add_argument("--quick", action="store_true", help="few layers, few rounds")
    parser.add_argument("--layers", help="how many layers share the factors (4,16,64; quick 4,16)")
    parser.add_argument("--shape", help=f"MxKxR ({SHAPES['cpu']}; on a GPU {SHAPES['cuda']})")
    options = parser.parse_args(argv)
    check_options(options, rounds=5 if options.quick else ROUNDS["shared"], dtypes="fp32")
    options.layers = numbers("layers", options.layers, (4, 16) if options.quick else LAYERS)
    (options.shape,) = sizes("shape", SHAPES[options.device] if options.shape is None else options.shape, "MxKxR")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    session = Session(options, "shared.jsonl")
    session.introduce()
    cases = [
        SharedCase(count, *options.shape, d, t) for t in options.threads for d in options.dtypes for count in options.layers
    ]
    session.run(cases, lambda case: LABELS, lambda case: measure(case, session), show)
    return session.finish(draw_measured)


if __name__ == "__main__":
    start("bench.shared", main)
