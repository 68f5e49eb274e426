"""Our operators, each with library products that compute the same, and with its minimal work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lotr_ext import ops

from ..measure.bounds import Work, kernel_work
from ..measure.shapes import DTYPES

SCALING = 0.5
Results = dict[str, Tensor]


class KernelCase(NamedTuple):
    """One operator: m tokens (fold, fold_grad: layers), n columns of the large matrix, rank r."""

    kernel: str
    m: int
    n: int
    r: int
    dtype: str
    threads: int

    def name(self) -> str:
        return f"{self.kernel} {self.m}x{self.n} r{self.r} {self.dtype} t{self.threads}"


@dataclass
class Operator:
    """ours() and library() are timed. returned: the name of their return value, "" if they only write. written: by name, the
    tensors that ours and library write, and their values before. truth(): all results by name, in float64."""

    ours: Callable[[], object]
    library: Callable[[], object]
    truth: Callable[[], Results]
    work: Work
    returned: str = ""
    written: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def results(self, side: str) -> Results:
        """The results of one side ("ours" or "library"), after the written tensors are reset."""
        written = {name: own if side == "ours" else library for name, (own, library, _) in self.written.items()}
        for name, tensor in written.items():
            tensor.copy_(self.written[name][2])
        value = self.ours() if side == "ours" else self.library()
        return written | ({self.returned: value} if self.returned else {})


class Inputs:
    """Makes the tensors of a case."""

    def __init__(self, case: KernelCase, device: torch.device):
        self.case, self.device, self.dtype = case, device, DTYPES[case.dtype]
        self.generator = torch.Generator().manual_seed(3)
        self.work = kernel_work(case.kernel, case.m, case.n, case.r, self.dtype.itemsize)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, dtype or self.dtype)

    def sums(self, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of ours and of the library, in float32, and their initial values: zero."""
        ours, library, before = torch.zeros(3, *shape, device=self.device)
        return ours, library, before


def _shrink(i: Inputs) -> Operator:
    """u = x A"""
    m, n, r = i.case[1:4]
    x, A = i.normal(m, n), i.normal(n, r, scale=n**-0.5)
    return Operator(lambda: ops.shrink(x, A), lambda: x @ A, lambda: {"u": x.double() @ A.double()}, i.work, "u")


def _expand_add(i: Inputs) -> Operator:
    """y += u F^T"""
    m, n, r = i.case[1:4]
    start, u, F = i.normal(m, n), i.normal(m, r), i.normal(n, r, scale=r**-0.5)
    y, z = start.clone(), start.clone()

    def truth() -> Results:
        return {"y": start.double() + u.double() @ F.double().T}

    written = {"y": (y, z, start)}
    return Operator(lambda: ops.expand_add_(y, u, F), lambda: z.addmm_(u, F.T), truth, i.work, written=written)


def _factor_grad(i: Inputs) -> Operator:
    """D += x^T k"""
    m, n, r = i.case[1:4]
    x, k = i.normal(m, n), i.normal(m, r, scale=m**-0.5)
    sums = i.sums(n, r)
    ours, library = lambda: ops.factor_grad_(sums[0], x, k), lambda: sums[1].add_(x.T @ k)
    return Operator(ours, library, lambda: {"D": x.double().T @ k.double()}, i.work, written={"D": sums})


def _shrink_grad(i: Inputs) -> Operator:
    """k = g F and Q += g^T u"""
    m, n, r = i.case[1:4]
    g, F, u = i.normal(m, n), i.normal(n, r, scale=n**-0.5), i.normal(m, r, scale=m**-0.5)
    Q = i.sums(n, r)

    def library() -> Tensor:
        k = g @ F
        Q[1].add_(g.T @ u)
        return k

    def truth() -> Results:
        return {"k": g.double() @ F.double(), "Q": g.double().T @ u.double()}

    return Operator(lambda: ops.shrink_grad_(Q[0], g, F, u), library, truth, i.work, "k", {"Q": Q})


def _fold(i: Inputs) -> Operator:
    """F_l = s B G_l^T of all layers"""
    layers, n, r = i.case[1:4]
    B, cores = i.normal(n, r, scale=r**-0.5), i.normal(layers, r, r)
    ours, library = lambda: ops.fold(B, cores, SCALING, i.dtype), lambda: (B * SCALING) @ cores.mT
    return Operator(ours, library, lambda: {"F": SCALING * (B.double() @ cores.double().mT)}, i.work, "F")


def _fold_grad(i: Inputs) -> Operator:
    """dB += s sum_l Q_l G_l, dG_l = s Q_l^T B"""
    layers, n, r = i.case[1:4]
    Q, B, cores = i.normal(layers, n, r, dtype=torch.float32), i.normal(n, r, scale=r**-0.5), i.normal(layers, r, r)
    dB = i.sums(n, r)

    def library() -> Tensor:
        dB[1].add_((Q @ cores.float()).sum(0), alpha=SCALING)
        return SCALING * (Q.mT @ B.float())

    def truth() -> Results:
        return {"dG": SCALING * (Q.double().mT @ B.double()), "dB": SCALING * (Q.double() @ cores.double()).sum(0)}

    return Operator(lambda: ops.fold_grad(Q, B, cores, SCALING, dB[0]), library, truth, i.work, "dG", {"dB": dB})


KERNELS: dict[str, Callable[[Inputs], Operator]] = {
    "shrink": _shrink,
    "expand_add": _expand_add,
    "factor_grad": _factor_grad,
    "shrink_grad": _shrink_grad,
    "fold": _fold,
    "fold_grad": _fold_grad,
}


def make(case: KernelCase, device: torch.device) -> Operator:
    return KERNELS[case.kernel](Inputs(case, device))


def errors(operator: Operator) -> dict[str, float]:
    """The largest relative error (Frobenius) of each side against float64."""
    truth, found = operator.truth(), {}
    for side in ("ours", "library"):
        results = operator.results(side)
        found[side] = max(((results[n].double() - t).norm() / t.norm().clamp_min(1e-30)).item() for n, t in truth.items())
    return found
