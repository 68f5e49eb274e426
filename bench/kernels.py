"""Each CUDA kernel against the library's product: time, bandwidth, error.

    python -m bench.kernels                             every kernel at Llama-3-8B's widths
    python -m bench.kernels --kernels shrink,shrink_grad --shapes 8192x4096x16 --dtypes bf16
    python -m bench.kernels --once --kernels shrink     one call of each kernel, for a profiler

A shape is tokens x width x rank (fold: 1 x width x rank; row_core: rows x cores x rank; gemm_lotr:
the weight is width x width). factor_grad, shrink_grad and gemm_lotr are operators of a layer with
nothing but these launches. Our side and the library's are checked against float64 first: ours may
have at most twice the library's error, plus a rounding. On a GPU, times are the device's, with a
cold L2.

    least      bytes, with every operand moved once
    gb_per_s   these bytes in our time
    of_copy    that bandwidth over the one of a copy on the same device (copy_gb_per_s)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lotr_ext.core.operators import FUSED
from lotr_ext.core.strategy import fused_obstacle

from .checks import check_error, error_of
from .common import Case, dtype_of, some_of
from .program import Program
from .timing import Group, Step, copy_gb_per_s

SCALING = 0.5
KEY = ("m", "n", "r")
Results = tuple[Tensor, ...]
SHAPES = {
    "cuda": ("8192x4096x16,8192x4096x64,2048x4096x16,8192x14336x16,8192x1024x16,8192x4096x128"),
    "cpu": "2048x768x16,512x768x16,2048x768x64",
}


def library() -> object:
    return torch.ops.lotr


@dataclass
class Operator:
    """One kernel with its operands.

    Attributes:
        ours: Calls it. Returns all results, new ones or those written in place.
        library: The same in torch's products.
        truth: The same in float64.
        bytes: Every operand once.
        written: Tensors that the calls add to, with their values before.
        more: Other products of the library, by name.
    """

    ours: Callable[[], Results]
    library: Callable[[], Results]
    truth: Callable[[], Results]
    bytes: int
    written: tuple[tuple[Tensor, Tensor], ...] = ()
    more: dict[str, Callable[[], Results]] = field(default_factory=dict)

    def reset(self) -> None:
        for tensor, before in self.written:
            tensor.copy_(before)


class Inputs:
    """Random tensors for a case. sizes: its (m, n, r)."""

    def __init__(self, case: Case, device: str):
        self.dtype = dtype_of(case)
        self.device = device
        self.sizes = tuple(case[name] for name in KEY)
        self.generator = torch.Generator().manual_seed(3)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator) * scale
        return values.to(self.device, self.dtype)

    def zeros(self) -> Tensor:
        """Returns a float32 sum [n, r]."""
        return torch.zeros(self.sizes[1:], device=self.device)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def shrink(inputs: Inputs) -> Operator:
    """u = x A"""
    m, n, r = inputs.sizes
    x = inputs.normal(m, n)
    A = inputs.normal(n, r, scale=n**-0.5)
    return Operator(
        ours=lambda: (library().shrink(x, A),),
        library=lambda: (x @ A,),
        truth=lambda: (x.double() @ A.double(),),
        bytes=_bytes(x, A) + m * r * x.itemsize,
    )


def expand_add(inputs: Inputs) -> Operator:
    """y += u F^T"""
    m, n, r = inputs.sizes
    start = inputs.normal(m, n)
    u = inputs.normal(m, r)
    F = inputs.normal(n, r, scale=r**-0.5)
    y = start.clone()
    library_y = start.clone()

    def ours() -> Results:
        library().expand_add_(y, u, F)
        return (y,)

    return Operator(
        ours=ours,
        library=lambda: (library_y.addmm_(u, F.T),),
        truth=lambda: (start.double() + u.double() @ F.double().T,),
        bytes=_bytes(y, y, u, F),
        written=((y, start), (library_y, start)),
    )


def factor_grad(inputs: Inputs) -> Operator:
    """D += x^T k"""
    m, n, r = inputs.sizes
    x = inputs.normal(m, n)
    k = inputs.normal(m, r, scale=m**-0.5)
    D = inputs.zeros()
    library_D = inputs.zeros()

    def ours() -> Results:
        library().shrink_backward_(k, None, x, None, D)
        return (D,)

    return Operator(
        ours=ours,
        library=lambda: (library_D.add_(x.T @ k),),
        truth=lambda: (x.double().T @ k.double(),),
        bytes=_bytes(x, k, D, D),
        written=((D, inputs.zeros()), (library_D, inputs.zeros())),
    )


def shrink_grad(inputs: Inputs) -> Operator:
    """k = g F and Q += g^T u"""
    m, n, r = inputs.sizes
    g = inputs.normal(m, n)
    F = inputs.normal(n, r, scale=n**-0.5)
    u = inputs.normal(m, r, scale=m**-0.5)
    Q = inputs.zeros()
    library_Q = inputs.zeros()

    def ours() -> Results:
        _, k, _ = library().layer_backward_rows_(g, None, u, F, None, Q, True, True)
        return k, Q

    return Operator(
        ours=ours,
        library=lambda: (g @ F, library_Q.add_(g.T @ u)),
        truth=lambda: (g.double() @ F.double(), g.double().T @ u.double()),
        bytes=_bytes(g, F, u, u, Q, Q),
        written=((Q, inputs.zeros()), (library_Q, inputs.zeros())),
    )


def fold(inputs: Inputs) -> Operator:
    """F = s B G^T"""
    _, n, r = inputs.sizes
    B = inputs.normal(n, r, scale=r**-0.5)
    core = inputs.normal(r, r)
    return Operator(
        ours=lambda: (library().fold(B, core, SCALING, inputs.dtype),),
        library=lambda: ((B * SCALING) @ core.T,),
        truth=lambda: (SCALING * (B.double() @ core.double().T),),
        bytes=_bytes(B, B, core),
    )


def row_core(inputs: Inputs) -> Operator:
    """h_i = s u_i G_c(i)"""
    m, count, r = inputs.sizes
    u = inputs.normal(m, r)
    cores = inputs.normal(count, r, r, scale=r**-0.5)
    index = torch.randint(count, (m,), generator=inputs.generator).to(inputs.device)

    def truth() -> Results:
        return (SCALING * torch.einsum("mr,mrs->ms", u.double(), cores.double()[index]),)

    return Operator(
        ours=lambda: (library().row_core(u, cores, index, None, None, SCALING),),
        library=lambda: (SCALING * torch.bmm(u.unsqueeze(1), cores[index]).squeeze(1),),
        truth=truth,
        bytes=_bytes(u, u, index) + len(index.unique()) * cores[0].nbytes,
    )


def gemm_lotr(inputs: Inputs) -> Operator:
    """y = x W^T + u F^T in one kernel.

    The library's base product is timed as well, and "beta": u F^T first, then the product onto it.
    """
    m, n, r = inputs.sizes
    x = inputs.normal(m, n)
    W = inputs.normal(n, n, scale=n**-0.5)
    u = inputs.normal(m, r)
    F = inputs.normal(n, r, scale=r**-0.5)

    def ours() -> Results:
        return (library().layer_forward_rows(x, W, None, u, F, FUSED),)

    return Operator(
        ours=ours,
        library=lambda: ((x @ W.T).addmm_(u, F.T),),
        truth=lambda: (x.double() @ W.double().T + u.double() @ F.double().T,),
        bytes=_bytes(x, W, u, F, x),
        more={
            "base product": lambda: (x @ W.T,),
            "library, beta": lambda: ((u @ F.T).addmm_(x, W.T),),
        },
    )


KERNELS: dict[str, Callable[[Inputs], Operator]] = {
    make.__name__: make
    for make in (gemm_lotr, shrink, expand_add, shrink_grad, factor_grad, fold, row_core)
}


def obstacle(case: Case, device: str) -> str | None:
    """Why a kernel cannot run, None if it can."""
    if case["kernel"] != "gemm_lotr":
        return None
    return fused_obstacle(case["n"], case["n"], case["r"], dtype_of(case), torch.device(device))


def cases(options: argparse.Namespace) -> list[Case]:
    every = []
    for shape in options.shapes:
        for name in options.kernels:
            rows = {"m": 1} if name == "fold" else {}
            every.append({"kernel": name, **shape, **rows})
    return [case for case in every if obstacle({**case, "dtype": "bf16"}, options.device) is None]


def check(operator: Operator, dtype: torch.dtype) -> float:
    """Returns the largest error of our results.

    Raises:
        ArithmeticError: If it is above twice the library's, plus a rounding.
    """
    truth = operator.truth()
    operator.reset()
    ours = max(map(error_of, operator.ours(), truth))
    theirs = max(map(error_of, operator.library(), truth))
    return check_error("ours", ours, 2 * theirs + torch.finfo(dtype).eps)


def build(case: Case, options: argparse.Namespace) -> Group:
    reason = obstacle(case, options.device)
    if reason is not None:
        raise ValueError(reason)
    operator = KERNELS[case["kernel"]](Inputs(case, options.device))
    facts = {
        "error": check(operator, dtype_of(case)),
        "least_bytes": operator.bytes,
        "copy_gb_per_s": copy_gb_per_s(options.device),
    }
    calls = {"library": operator.library, **operator.more, "lotr_ext": operator.ours}

    def step_of(name: str) -> Step:
        return Step({"step": lambda _: calls[name]()}, facts=facts if name == "lotr_ext" else {})

    return Group(options.rivals or calls, step_of)


def run_once(options: argparse.Namespace) -> int:
    """Calls each kernel once, with nothing else around it. For a profiler."""
    for case in PROGRAM.all_cases(options):
        KERNELS[case["kernel"]](Inputs(case, options.device)).ours()
        print(PROGRAM.title(case), flush=True)
    if options.device == "cuda":
        torch.cuda.synchronize()
    return 0


def more_options(parser: argparse.ArgumentParser) -> None:
    kernels = ",".join(KERNELS)
    parser.add_argument("--kernels", type=some_of(KERNELS), default=kernels, help=f"({kernels})")
    once = "call each kernel once, for a profiler, and measure nothing"
    parser.add_argument("--once", action="store_true", help=once)


PROGRAM = Program(
    name="kernels",
    doc=__doc__,
    rivals=("library", "lotr_ext"),
    build=build,
    form="{kernel} {m} x {n}, r {r}",
    key=KEY,
    shapes=SHAPES,
    cases=cases,
    floor="library",
    rounds=15,
    slice_s=0.01,
    dtypes="bf16",
    options=more_options,
)
if __name__ == "__main__":
    arguments = PROGRAM.arguments(None)
    sys.exit(run_once(arguments) if arguments.once else PROGRAM.main())
