"""Our operators one by one, each with the library products that do the same and the least work there is in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """ours() and library() are what is timed; results(side) runs one of them on fresh tensors; truth(): the same in float64."""

    ours: Callable[[], object]
    library: Callable[[], object]
    results: Callable[[str], Results]
    truth: Callable[[], Results]
    work: Work


class Inputs:
    """Tensors of a case; `large` [m, n] is what the kernel is about."""

    def __init__(self, case: KernelCase, device: torch.device):
        self.case, self.device, self.dtype = case, device, DTYPES[case.dtype]
        self.generator = torch.Generator().manual_seed(3)
        self.work = kernel_work(case.kernel, case.m, case.n, case.r, self.dtype.itemsize)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, dtype or self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """Of what sums are kept in."""
        return torch.zeros(*shape, device=self.device)


def _pair(call_ours: Callable[[], Results], call_library: Callable[[], Results]) -> Callable[[str], Results]:
    return lambda side: call_ours() if side == "ours" else call_library()


def _shrink(i: Inputs) -> Operator:
    """u = x A"""
    m, n, r = i.case[1:4]
    x, A = i.normal(m, n), i.normal(n, r, scale=n**-0.5)
    ours, library = lambda: ops.shrink(x, A), lambda: x @ A
    return Operator(
        ours, library, _pair(lambda: {"u": ours()}, lambda: {"u": library()}), lambda: {"u": x.double() @ A.double()}, i.work
    )


def _expand_add(i: Inputs) -> Operator:
    """y += u F^T"""
    m, n, r = i.case[1:4]
    start, u, F = i.normal(m, n), i.normal(m, r), i.normal(n, r, scale=r**-0.5)
    y, z = start.clone(), start.clone()

    def once(call: Callable[[], object], target: Tensor) -> Results:
        target.copy_(start)
        call()
        return {"y": target}

    ours, library = lambda: ops.expand_add_(y, u, F), lambda: z.addmm_(u, F.T)
    return Operator(
        ours,
        library,
        _pair(lambda: once(ours, y), lambda: once(library, z)),
        lambda: {"y": start.double() + u.double() @ F.double().T},
        i.work,
    )


def _factor_grad(i: Inputs) -> Operator:
    """D += x^T k"""
    m, n, r = i.case[1:4]
    x, k = i.normal(m, n), i.normal(m, r, scale=m**-0.5)
    ours_sum, library_sum = i.zeros(n, r), i.zeros(n, r)

    def once(call: Callable[[], object], target: Tensor) -> Results:
        target.zero_()
        call()
        return {"D": target}

    ours, library = lambda: ops.factor_grad_(ours_sum, x, k), lambda: library_sum.add_(x.T @ k)
    results = _pair(lambda: once(ours, ours_sum), lambda: once(library, library_sum))
    return Operator(ours, library, results, lambda: {"D": x.double().T @ k.double()}, i.work)


def _shrink_grad(i: Inputs) -> Operator:
    """k = g F and Q += g^T u"""
    m, n, r = i.case[1:4]
    g, F, u = i.normal(m, n), i.normal(n, r, scale=n**-0.5), i.normal(m, r, scale=m**-0.5)
    ours_Q, library_Q = i.zeros(n, r), i.zeros(n, r)

    def products() -> Tensor:
        k = g @ F
        library_Q.add_(g.T @ u)
        return k

    def once(call: Callable[[], Tensor], Q: Tensor) -> Results:
        Q.zero_()
        return {"k": call(), "Q": Q}

    def ours() -> Tensor:
        return ops.shrink_grad_(ours_Q, g, F, u)

    results = _pair(lambda: once(ours, ours_Q), lambda: once(products, library_Q))
    return Operator(ours, products, results, lambda: {"k": g.double() @ F.double(), "Q": g.double().T @ u.double()}, i.work)


def _fold(i: Inputs) -> Operator:
    """F_l = s B G_l^T of all layers"""
    layers, n, r = i.case[1:4]
    B, cores = i.normal(n, r, scale=r**-0.5), i.normal(layers, r, r)
    ours, library = lambda: ops.fold(B, cores, SCALING, i.dtype), lambda: (B * SCALING) @ cores.mT
    results = _pair(lambda: {"F": ours()}, lambda: {"F": library()})
    return Operator(ours, library, results, lambda: {"F": SCALING * (B.double() @ cores.double().mT)}, i.work)


def _fold_grad(i: Inputs) -> Operator:
    """dB += s sum_l Q_l G_l, dG_l = s Q_l^T B"""
    layers, n, r = i.case[1:4]
    Q, B, cores = i.normal(layers, n, r, dtype=torch.float32), i.normal(n, r, scale=r**-0.5), i.normal(layers, r, r)
    ours_dB, library_dB = i.zeros(n, r), i.zeros(n, r)

    def products() -> Tensor:
        library_dB.add_((Q @ cores.float()).sum(0), alpha=SCALING)
        return SCALING * (Q.mT @ B.float())

    def ours() -> Tensor:
        return ops.fold_grad(Q, B, cores, SCALING, ours_dB)

    def once(call: Callable[[], Tensor], dB: Tensor) -> Results:
        dB.zero_()
        return {"dG": call(), "dB": dB}

    def truth() -> Results:
        return {"dG": SCALING * (Q.double().mT @ B.double()), "dB": SCALING * (Q.double() @ cores.double()).sum(0)}

    return Operator(ours, products, _pair(lambda: once(ours, ours_dB), lambda: once(products, library_dB)), truth, i.work)


def _small_forward(i: Inputs) -> Operator:
    """y += s (x A G) B^T, for few tokens"""
    m, n, r = i.case[1:4]
    start, x, A = i.normal(m, n), i.normal(m, n), i.normal(n, r, scale=n**-0.5)
    core, B = i.normal(r, r, scale=r**-0.5), i.normal(n, r, scale=r**-0.5)
    y, z = start.clone(), start.clone()

    def once(call: Callable[[], object], target: Tensor) -> Results:
        target.copy_(start)
        call()
        return {"y": target}

    def ours() -> Tensor:
        return ops.small_forward_(y, x, A, core, B, SCALING)

    def library() -> Tensor:
        return z.addmm_((x @ A) @ core, B.T, alpha=SCALING)

    def truth() -> Results:
        return {"y": start.double() + SCALING * ((x.double() @ A.double()) @ core.double()) @ B.double().T}

    return Operator(ours, library, _pair(lambda: once(ours, y), lambda: once(library, z)), truth, i.work)


def _small_backward(i: Inputs) -> Operator:
    """h = s g B, dx += (h G^T) A^T, dA += x^T (h G^T), dB += s g^T (u G), dG = u^T h, for few tokens"""
    m, n, r = i.case[1:4]
    start, g, x, A = i.normal(m, n), i.normal(m, n), i.normal(m, n), i.normal(n, r, scale=n**-0.5)
    core, B = i.normal(r, r, scale=r**-0.5), i.normal(n, r, scale=r**-0.5)
    u = x @ A
    dx, dz = start.clone(), start.clone()
    sums = {side: (i.zeros(n, r), i.zeros(n, r)) for side in ("ours", "library")}

    def ours() -> Tensor:
        return ops.small_backward_(dx, g, x, u, A, core, B, SCALING, *sums["ours"], True)

    def library() -> Tensor:
        h = (g @ B).mul_(SCALING)
        k = h @ core.T
        dz.addmm_(k, A.T)
        sums["library"][0].add_(x.T @ k)
        sums["library"][1].add_(g.T @ (u @ core), alpha=SCALING)
        return u.T @ h

    def once(side: str) -> Results:
        target = dx if side == "ours" else dz
        target.copy_(start)
        for total in sums[side]:
            total.zero_()
        dG = ours() if side == "ours" else library()
        return {"dx": target, "dA": sums[side][0], "dB": sums[side][1], "dG": dG}

    def truth() -> Results:
        h = SCALING * (g.double() @ B.double())
        k = h @ core.double().T
        dB = SCALING * g.double().T @ (u.double() @ core.double())
        return {"dx": start.double() + k @ A.double().T, "dA": x.double().T @ k, "dB": dB, "dG": u.double().T @ h}

    return Operator(ours, library, once, truth, i.work)


KERNELS: dict[str, Callable[[Inputs], Operator]] = {
    "shrink": _shrink,
    "expand_add": _expand_add,
    "factor_grad": _factor_grad,
    "shrink_grad": _shrink_grad,
    "fold": _fold,
    "fold_grad": _fold_grad,
    "small_forward": _small_forward,
    "small_backward": _small_backward,
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
