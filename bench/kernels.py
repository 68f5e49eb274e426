"""Each CUDA kernel alone against the library's product: time, bandwidth, error.

    python -m bench.kernels                             every kernel at Llama-3-8B's widths; needs a GPU
    python -m bench.kernels --kernels shrink,shrink_grad --shapes 8192x4096x16 --dtypes bf16
    python -m bench.kernels --check --dtypes fp16       compares with float64 at odd sizes, and measures nothing

A shape is tokens x width x rank (fold: 1 x width x rank; row_core: rows x cores x rank; gemm_lotr: the weight is width x
width). factor_grad, shrink_grad and gemm_lotr are a layer's operators with nothing but these launches. Both sides are checked
against float64 first; ours may have at most twice the library's error, plus a rounding. On a GPU, times are the device's own
with a cold L2. least: every operand moved once; gb_per_s: these bytes in our time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .common import DTYPES, Case, Group, Program, Step, check_error, error_of, listed, sizes
from .rivals import chosen, dtype_of

SCALING = 0.5
TWO_PASS, FUSED = 0, 2  # strategies: csrc/torch/check.h
Results = tuple[Tensor, ...]
SHAPES = {
    "cuda": "8192x4096x16,8192x4096x64,2048x4096x16,8192x14336x16,8192x1024x16,8192x4096x128",
    "cpu": "2048x768x16,512x768x16,2048x768x64",
}
CHECKED = "333x200x13,300x264x16,17x4104x61,520x1032x64,257x136x128,130x72x200"


def library() -> object:
    importlib.import_module("lotr_ext.core.operators")  # loads the operators

    return torch.ops.lotr


@dataclass
class Operator:
    """Calls that return all results, new ones or those written in place. bytes: every operand once. written: tensors that calls
    add to, with their values before. more: other library products, by name."""

    ours: Callable[[], Results]
    library: Callable[[], Results]
    truth: Callable[[], Results]
    bytes: int
    written: tuple[tuple[Tensor, Tensor | float], ...] = ()
    more: dict[str, Callable[[], Results]] = field(default_factory=dict)

    def reset(self) -> None:
        for tensor, before in self.written:
            tensor.copy_(torch.as_tensor(before))


class Inputs:
    """Random tensors of a case."""

    def __init__(self, case: Case, device: str):
        self.dtype, self.device = dtype_of(case), device
        self.m, self.n, self.r = case["m"], case["n"], case["r"]
        self.generator = torch.Generator().manual_seed(3)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(
            self.device, dtype or self.dtype
        )

    def sums(self) -> tuple[Tensor, Tensor]:
        """Of ours and of the library."""
        return torch.zeros(self.n, self.r, device=self.device), torch.zeros(
            self.n, self.r, device=self.device
        )


def _bytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def shrink(i: Inputs) -> Operator:
    """u = x A"""
    x, A, op = i.normal(i.m, i.n), i.normal(i.n, i.r, scale=i.n**-0.5), library().shrink
    moved = _bytes(x, A) + i.m * i.r * x.itemsize
    return Operator(
        lambda: (op(x, A),), lambda: (x @ A,), lambda: (x.double() @ A.double(),), moved
    )


def expand_add(i: Inputs) -> Operator:
    """y += u F^T"""
    start, u, F = i.normal(i.m, i.n), i.normal(i.m, i.r), i.normal(i.n, i.r, scale=i.r**-0.5)
    y, z, op = start.clone(), start.clone(), library().expand_add_
    return Operator(
        lambda: (op(y, u, F), y)[1:],
        lambda: (z.addmm_(u, F.T),),
        lambda: (start.double() + u.double() @ F.double().T,),
        _bytes(y, y, u, F),
        ((y, start), (z, start)),
    )


def factor_grad(i: Inputs) -> Operator:
    """D += x^T k"""
    x, k, (D, E), op = (
        i.normal(i.m, i.n),
        i.normal(i.m, i.r, scale=i.m**-0.5),
        i.sums(),
        library().shrink_backward_,
    )
    return Operator(
        lambda: (op(k, None, x, None, D), D)[1:],
        lambda: (E.add_(x.T @ k),),
        lambda: (x.double().T @ k.double(),),
        _bytes(x, k, D, D),
        ((D, 0.0), (E, 0.0)),
    )


def shrink_grad(i: Inputs) -> Operator:
    """k = g F and Q += g^T u"""
    g, F, u = (
        i.normal(i.m, i.n),
        i.normal(i.n, i.r, scale=i.n**-0.5),
        i.normal(i.m, i.r, scale=i.m**-0.5),
    )
    (Q, P), op = i.sums(), library().layer_backward_
    B, core = i.normal(i.n, 1), i.normal(i.r, 1)  # not read where Q is given
    given = (
        g,
        None,
        None,
        u,
        None,
        F,
        B,
        core,
        SCALING,
        TWO_PASS,
        None,
        None,
        Q,
        None,
        None,
        False,
        False,
    )
    return Operator(
        lambda: (op(*given)[1], Q),
        lambda: (g @ F, P.add_(g.T @ u)),
        lambda: (g.double() @ F.double(), g.double().T @ u.double()),
        _bytes(g, F, u, u, Q, Q),
        ((Q, 0.0), (P, 0.0)),
    )


def fold(i: Inputs) -> Operator:
    """F = s B G^T"""
    B, core, op = i.normal(i.n, i.r, scale=i.r**-0.5), i.normal(i.r, i.r), library().fold
    return Operator(
        lambda: (op(B, core, SCALING, i.dtype),),
        lambda: ((B * SCALING) @ core.T,),
        lambda: (SCALING * (B.double() @ core.double().T),),
        _bytes(B, B, core),
    )


def row_core(i: Inputs) -> Operator:
    """h_i = s u_i G_c(i)"""
    u, cores, op = i.normal(i.m, i.r), i.normal(i.n, i.r, i.r, scale=i.r**-0.5), library().row_core
    index = torch.randint(i.n, (i.m,), generator=i.generator).to(i.device)
    return Operator(
        lambda: (op(u, cores, index, None, None, SCALING),),
        lambda: (SCALING * torch.bmm(u.unsqueeze(1), cores[index]).squeeze(1),),
        lambda: (SCALING * torch.einsum("mr,mrs->ms", u.double(), cores.double()[index]),),
        _bytes(u, u, index) + len(index.unique()) * cores[0].nbytes,
    )


def gemm_lotr(i: Inputs) -> Operator:
    """y = x W^T + u F^T in one kernel; the library's base product alone, and beta: u F^T first, then the product onto it."""
    x, W, op = i.normal(i.m, i.n), i.normal(i.n, i.n, scale=i.n**-0.5), library().layer_forward
    u, F = i.normal(i.m, i.r), i.normal(i.n, i.r, scale=i.r**-0.5)
    B, core = i.normal(i.n, 1), i.normal(i.r, 1)  # not read where F is given
    return Operator(
        lambda: (op(x, W, None, None, B, core, SCALING, FUSED, u, F)[0],),
        lambda: ((x @ W.T).addmm_(u, F.T),),
        lambda: (x.double() @ W.double().T + u.double() @ F.double().T,),
        _bytes(x, W, u, F, x),
        more={
            "base product alone": lambda: (x @ W.T,),
            "library, beta": lambda: ((u @ F.T).addmm_(x, W.T),),
        },
    )


KERNELS: dict[str, Callable[[Inputs], Operator]] = {
    make.__name__: make
    for make in (shrink, expand_add, factor_grad, shrink_grad, fold, row_core, gemm_lotr)
}


def runs(case: Case, device: str) -> bool:
    """gemm_lotr: on Hopper, in half precision, up to rank 128."""
    if case["kernel"] != "gemm_lotr":
        return True
    hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    built = "90a" in json.loads(library().info())["cuda"]["archs"]
    return hopper and built and case["dtype"] != "fp32" and case["r"] <= 128 and not case["n"] % 8


def cases(options: argparse.Namespace) -> list[Case]:
    names = chosen(options.kernels, KERNELS, KERNELS)
    found = []
    for shape in options.shapes or sizes("m", "n", "r")(SHAPES[options.device]):
        for kernel in names:
            found.append({"kernel": kernel, **shape} | ({"m": 1} if kernel == "fold" else {}))
    return [
        case
        for case in found
        if case["kernel"] != "gemm_lotr" or runs({**case, "dtype": "bf16"}, options.device)
    ]


def errors(operator: Operator, dtype: torch.dtype) -> float:
    """The largest error of our results. Raises ArithmeticError above twice the library's, plus a rounding."""
    truth = operator.truth()
    operator.reset()
    ours, theirs = (max(map(error_of, call(), truth)) for call in (operator.ours, operator.library))
    return check_error("ours", ours, 2 * theirs + torch.finfo(dtype).eps)


def build(case: Case, options: argparse.Namespace) -> Group:
    if not runs(case, options.device):
        raise ValueError(
            "gemm_lotr: expected an H100, bf16 or fp16, a rank of at most 128 and a width in multiples of 8"
        )
    operator = KERNELS[case["kernel"]](Inputs(case, options.device))
    facts = {"error": errors(operator, dtype_of(case)), "least_bytes": operator.bytes}
    sides = {"library": operator.library, **operator.more, "lotr_ext": operator.ours}
    steps = {name: Step({"step": lambda _, call=call: call()}) for name, call in sides.items()}
    steps["lotr_ext"].facts = facts
    return Group(steps)


def check(options: argparse.Namespace) -> int:
    """Compares every kernel with float64, and its bits with those of a second run. Returns 1 if a number is wrong."""
    wrong = 0
    for shape in options.shapes or sizes("m", "n", "r")(CHECKED):
        for kernel in chosen(options.kernels, KERNELS, KERNELS):
            for dtype in options.dtypes:
                case = {"kernel": kernel, **shape, "dtype": dtype}
                if not runs(case, options.device):
                    continue
                operator = KERNELS[kernel](Inputs(case, options.device))
                try:
                    error = errors(operator, DTYPES[dtype])
                    operator.reset()
                    first = [t.clone() for t in operator.ours()]
                    operator.reset()
                    same = all(torch.equal(a, b) for a, b in zip(first, operator.ours()))
                    said = f"error {error:.1e}" + (
                        "" if same else ", WRONG: other bits in a second run"
                    )
                except ArithmeticError as problem:
                    same, said = False, f"WRONG: {problem}"
                wrong += not same
                print(f"{kernel} {case['m']}x{case['n']} r{case['r']} {dtype}: {said}", flush=True)
    return int(wrong > 0)


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernels", type=listed, help=f"some of {', '.join(KERNELS)}")
    parser.add_argument("--shapes", type=sizes("m", "n", "r"), help="MxNxR, comma-separated")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with float64 at odd sizes, and measure nothing",
    )


FORM = "{kernel} {m} x {n}, r {r}"
PROGRAM = Program(
    "kernels",
    __doc__,
    cases,
    build,
    FORM,
    floor="library",
    rounds=15,
    slice_s=0.01,
    dtypes="bf16",
    options=more_options,
)
if __name__ == "__main__":
    options = PROGRAM.arguments(None)
    sys.exit(check(options) if options.check else PROGRAM.main())
