"""Each CUDA kernel against the library's product: time, bandwidth, error.

    python -m bench.kernels                             every kernel at Llama-3-8B's widths
    python -m bench.kernels --kernels shrink,shrink_grad --shapes 8192x4096x16 --dtypes bf16
    python -m bench.kernels --once --kernels shrink     one call of each kernel, for a profiler

A shape is tokens x width x rank (fold: 1 x width x rank; row_core: rows x cores x rank; gemm_lotr:
the weight is width x width). factor_grad, shrink_grad and gemm_lotr run in operators of a layer
that launch nothing else. Our results and the library's are compared with float64 first: our error
may be at most twice the library's, plus a rounding. On a GPU, times are the device's, with a cold
L2.

    least      bytes, with every operand moved once
    gb_per_s   these bytes in our time
    of_copy    that bandwidth over the one of a copy on the same device (copy_gb_per_s)
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lotr_ext.core.operators import FUSED
from lotr_ext.core.strategy import fused_obstacle

from .common import Case, check_error, dtype_of, error_of, some_of
from .program import Program
from .timing import Group, Step, copy_gb_per_s

SCALING = 0.5
lotr = torch.ops.lotr
DIMENSIONS = ("m", "n", "r")
Results = tuple[Tensor, ...]
SUMS = ("D", "Q")  # operands in float32, to which a kernel adds: they start at zero


# ---- our kernels ---------------------------------------------------------------------------------


def expand_add(y: Tensor, u: Tensor, F: Tensor) -> Results:
    lotr.expand_add_(y, u, F)
    return (y,)


def factor_grad(D: Tensor, x: Tensor, v: Tensor) -> Results:
    lotr.shrink_backward_(du=v, dx=None, x=x, A=None, dA=D)
    return (D,)


def shrink_grad(g: Tensor, F: Tensor, u: Tensor, Q: Tensor) -> Results:
    _, du, _ = lotr.layer_backward_rows_(g, None, h=u, B=F, dx=None, dB=Q, need_h=True, need_B=True)
    return du, Q


class Kernel(NamedTuple):
    """One kernel.

    Attributes:
        ours: Calls it. Returns all results: new tensors, or operands that were written in place.
        operands: Their names and dimensions, a letter of DIMENSIONS for each.
        formula: The same in torch's products. In float64 it is the truth.
        more: Other products of the library to compare with, by name.
    """

    ours: Callable[..., Results]
    operands: dict[str, str]
    formula: Callable[..., Results]
    more: Mapping[str, Callable[..., Results]] = {}


KERNELS = {
    "gemm_lotr": Kernel(
        ours=lambda x, W, u, F: (lotr.layer_forward_rows(x, W, None, h=u, B=F, strategy=FUSED),),
        operands={"x": "mn", "W": "nn", "u": "mr", "F": "nr"},
        formula=lambda x, W, u, F: ((x @ W.T).addmm_(u, F.T),),
        more={
            "base product": lambda x, W, u, F: (x @ W.T,),
            "library, beta": lambda x, W, u, F: ((u @ F.T).addmm_(x, W.T),),
        },
    ),
    "shrink": Kernel(
        ours=lambda x, A: (lotr.shrink(x, A),),
        operands={"x": "mn", "A": "nr"},
        formula=lambda x, A: (x @ A,),
    ),
    "expand_add": Kernel(
        ours=expand_add,
        operands={"y": "mn", "u": "mr", "F": "nr"},
        formula=lambda y, u, F: (y.addmm_(u, F.T),),
    ),
    "shrink_grad": Kernel(
        ours=shrink_grad,
        operands={"g": "mn", "F": "nr", "u": "mr", "Q": "nr"},
        formula=lambda g, F, u, Q: (g @ F, Q.add_(g.T @ u)),
    ),
    "factor_grad": Kernel(
        ours=factor_grad,
        operands={"D": "nr", "x": "mn", "v": "mr"},
        formula=lambda D, x, v: (D.add_(x.T @ v),),
    ),
    "fold": Kernel(
        ours=lambda B, core: (lotr.fold(B, core, SCALING, B.dtype),),
        operands={"B": "nr", "core": "rr"},
        formula=lambda B, core: ((B * SCALING) @ core.T,),
    ),
    "row_core": Kernel(
        ours=lambda u, cores, index: (
            lotr.row_core(u, cores, index, offs=None, tokens=None, scaling=SCALING),
        ),
        operands={"u": "mr", "cores": "nrr", "index": "m"},
        formula=lambda u, cores, index: (
            SCALING * torch.bmm(u.unsqueeze(1), cores[index]).squeeze(1),
        ),
    ),
}


# ---- the program ---------------------------------------------------------------------------------


def operands_of(case: Case, device: str) -> dict[str, Tensor]:
    """Returns the operands of a case's kernel: random ones, sums, and an index of all cores."""
    generator = torch.Generator().manual_seed(3)
    operands = {}
    for name, letters in KERNELS[case["kernel"]].operands.items():
        shape = [case[letter] for letter in letters]
        if name == "index":
            values = torch.randperm(case["m"], generator=generator) % case["n"]
        elif name in SUMS:
            values = torch.zeros(shape)
        else:
            values = torch.randn(shape, generator=generator).to(dtype_of(case))
        operands[name] = values.to(device)
    return operands


def copied(operands: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Returns copies for a call that writes to them, of floating-point operands in the dtype."""
    return {
        name: operand.to(dtype if operand.is_floating_point() else None, copy=True)
        for name, operand in operands.items()
    }


def obstacle(case: Case, device: str) -> str | None:
    """Returns why a kernel cannot run, None if it can. Only gemm_lotr depends on the GPU."""
    if case["kernel"] != "gemm_lotr":
        return None
    return fused_obstacle(case["n"], case["n"], case["r"], dtype_of(case), torch.device(device))


def cases(options: argparse.Namespace) -> list[Case]:
    all_cases = []
    for shape in options.shapes:
        # fold has no tokens. A row reads one core, so more cores than rows would not be read.
        changes = {"fold": {"m": 1}, "row_core": {"n": min(shape["m"], shape["n"])}}
        for name in options.kernels:
            all_cases.append({"kernel": name, **shape, **changes.get(name, {})})
    # The dtypes are added later. A GPU that can run gemm_lotr can run it in bf16.
    return [
        case for case in all_cases if obstacle({**case, "dtype": "bf16"}, options.device) is None
    ]


def build(case: Case, options: argparse.Namespace) -> Group:
    reason = obstacle(case, options.device)
    if reason is not None:
        raise ValueError(reason)
    kernel = KERNELS[case["kernel"]]
    operands = operands_of(case, options.device)
    # Each call gets copies, because some kernels add to an operand.
    truth = kernel.formula(**copied(operands, torch.float64))
    library_error = max(map(error_of, kernel.formula(**copied(operands)), truth))
    results = kernel.ours(**copied(operands))
    # Ours may round once more, and sums in another order.
    limit = 2 * library_error + torch.finfo(dtype_of(case)).eps
    facts = {
        "error": check_error("ours", max(map(error_of, results, truth)), limit),
        # A tensor that is written in place is an operand and a result: it is read and written.
        "least_bytes": sum(t.nbytes for t in (*operands.values(), *results)),
        "copy_gb_per_s": copy_gb_per_s(options.device),
    }
    calls = {"library": kernel.formula, **kernel.more, "lotr_ext": kernel.ours}

    def step_of(name: str) -> Step:
        rival_operands = copied(operands)
        return Step(
            {"step": lambda _: calls[name](**rival_operands)},
            facts=facts if name == "lotr_ext" else {},
        )

    return Group(options.rivals or calls, step_of)


def run_once(options: argparse.Namespace) -> int:
    """Calls each kernel once, with nothing else around it, for a profiler."""
    for case in PROGRAM.all_cases(options):
        KERNELS[case["kernel"]].ours(**operands_of(case, options.device))
        print(PROGRAM.title(case), flush=True)
    if options.device == "cuda":
        torch.cuda.synchronize()
    return 0


PROGRAM = Program(
    name="kernels",
    doc=__doc__,
    rivals=("library", "lotr_ext"),
    build=build,
    title_format="{kernel} {m} x {n}, r {r}",
    dimensions=DIMENSIONS,
    shapes={
        "cuda": ("8192x4096x16,8192x4096x64,2048x4096x16,8192x14336x16,8192x1024x16,8192x4096x128"),
        "cpu": "2048x768x16,512x768x16,2048x768x64",
    },
    cases=cases,
    floor="library",
    rounds=15,
    measurement_s=0.01,
    dtypes="bf16",
    options={
        "kernels": {"type": some_of(KERNELS), "default": list(KERNELS), "help": ", ".join(KERNELS)},
        "once": {
            "action": "store_true",
            "help": "call each kernel once, for a profiler, and measure nothing",
        },
    },
)
if __name__ == "__main__":
    arguments = PROGRAM.arguments(None)
    sys.exit(run_once(arguments) if arguments.once else PROGRAM.main())
