"""LoTR in plain torch: the specification of behaviour that random programs are compared with. Shares no code with the package.

    y = x W^T + bias + s ((drop(x) A) G) B^T
    y = bias + (m / c) (x W^T + s ((drop(x) A) G) B^T)      with magnitudes m; c_n = |W_n + s B_n G^T A^T| is a constant

A few lines of autograd, run in float64 (the truth) and in the program's own dtype (what plain torch reaches). Names of classes,
parameters and methods are those of lotr_ext, so that the same program runs on either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

Ranks = tuple[int, int]
Mixing = list[tuple[Tensor, float] | None]  # the core and scaling of each row of a batch, None for the base model

# The contexts that are open, the innermost last: by layer what its rows mix, None where it is off.
OPEN: list[dict[nn.Module, Mixing | None]] = []


def philox_words(count: int, seed: int) -> Tensor:
    """The first `count` 32-bit words of Philox4x32-10 under a 64-bit key, counter 0, 1, ... (Salmon et al., SC 2011)."""
    low32 = 0xFFFFFFFF
    counter = torch.arange((count + 3) // 4)
    a, b, c, d = counter & low32, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)
    key0, key1 = seed & low32, (seed >> 32) & low32
    for i in range(10):
        # an int64 product wraps, yet its bits are those of the unsigned 64-bit product
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        k0, k1 = (key0 + i * 0x9E3779B9) & low32, (key1 + i * 0xBB67AE85) & low32
        a, b, c, d = ((second >> 32) & low32) ^ b ^ k0, second & low32, ((first >> 32) & low32) ^ d ^ k1, first & low32
    return torch.stack((a, b, c, d), 1).flatten()[:count]


def dropout_mask(shape: torch.Size, p: float, seed: int) -> Tensor:
    """0, or 1 / (1 - p) where kept: element e is kept iff word e of the seed's Philox stream is at least floor(p 2^32)."""
    kept = philox_words(shape.numel(), seed) >= math.floor(p * 2.0**32)
    return kept.double().view(shape) / (1 - p)


class Reads(torch.autograd.Function):
    """t, whose gradient needs `other` as it is: notices that it was changed also where a product has saved a copy, for its
    layout, or a result. selective: where selective checkpointing keeps what was made of `other`, too."""

    @staticmethod
    def forward(ctx, t: Tensor, other: Tensor, selective: bool = False) -> Tensor:
        ctx.save_for_backward(other)
        ctx.other = other if selective and torch._C._len_torch_dispatch_stack() else None
        ctx.version = other._version
        return t.detach()  # shares t's version, yet is no view of it

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.saved_tensors  # noqa: B018
        if ctx.other is not None and ctx.other._version != ctx.version:
            raise RuntimeError("changed in place between the forward and the backward of a selective checkpoint")
        return grad, None, None


class Linked(torch.autograd.Function):
    """t. Who asks for its gradient goes through all that others are used for, too."""

    @staticmethod
    def forward(ctx, t: Tensor, *others: Tensor) -> Tensor:
        ctx.count = len(others)
        return t.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *(None for _ in range(ctx.count))


def read(x: Tensor, A: Tensor, B: Tensor, core: Tensor, others: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """x, A, B and core as a layer takes them that saves no u G and no G B^T (docs/how_a_call_runs.md).

    The gradient of A needs x, as any does; x's and A's need B and core, that of B the core, and that of the core B. others: of
    B's other layers in a model, the cores: one node stands for all of these.
    """
    x, A = (Reads.apply(Reads.apply(t, B, True), core, True) for t in (x, Reads.apply(A, x)))
    return x, A, Reads.apply(B, core, True), Linked.apply(Reads.apply(core, B, True), *others)


class Output(torch.autograd.Function):
    """y, which the gradient of magnitudes needs as it is."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        out = y.detach()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.saved_tensors  # noqa: B018
        return grad


def lengths(weight: Tensor, A: Tensor, B: Tensor, core: Tensor, scaling: float) -> Tensor:
    """c [n] in float64, whatever the others are in."""
    W, A, B, core = (t.detach().double() for t in (weight, A, B, core))
    return (W + scaling * B @ core.mT @ A.mT).norm(dim=1)


class LoTRFactors(nn.Module):
    """A [k, r_in] and B [n, r_out]."""

    def __init__(self, in_features: int, out_features: int, rank: Ranks, *, dtype: torch.dtype):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(in_features, rank[0], dtype=dtype))
        self.B = nn.Parameter(torch.zeros(out_features, rank[1], dtype=dtype))


class LoTRLinear(nn.Module):
    """A frozen linear layer (`wrapped`: any base module) with an adapter.

    next_mask: gives the mask of this x at each call in training with dropout. next_noise: what a core made with random numbers
    was multiplied by in this call. moved: what rounding may make of u. keep: work on copies of everything, so that nothing
    that is changed in place afterwards can change a gradient: the right number, where plain torch would raise. strict: raise
    for a changed x whatever its layout.
    """

    keep = strict = False
    siblings: Sequence[LoTRLinear] = ()  # in a model the layers that have B

    def __init__(
        self,
        base: nn.Module,
        factors: LoTRFactors,
        *,
        scaling: float,
        dropout: float,
        wrapped: bool = False,
        magnitude: bool = False,
    ):
        super().__init__()
        if wrapped:
            self.base_layer = base
        else:
            self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.core = nn.Parameter(factors.A.new_zeros(factors.A.shape[1], factors.B.shape[1]))
        self.register_parameter("magnitude", nn.Parameter(factors.A.new_zeros(len(base.weight))) if magnitude else None)
        self.factors = factors
        self.wrapped, self.scaling, self.dropout = wrapped, scaling, dropout
        self.disabled = self.merged = False
        self.backup: Tensor | None = None
        self.next_mask: Callable[[LoTRLinear, Tensor], Tensor] | None = None
        self.next_noise: Callable[[], float] | None = None
        self.moved: Callable[[Tensor], Tensor] | None = None
        self.train(base.training)

    @property
    def core(self) -> Tensor:
        """The parameter, or what the model's cores make (`make_core`, by a module of numbers that layers share)."""
        core = self._parameters.get("core")
        if core is None and "make_core" not in self.__dict__:
            raise AttributeError("core")
        return self.make_core(self) if core is None else core

    def forward(self, x: Tensor) -> Tensor:
        own = (lambda t: t.clone()) if self.keep else (lambda t: t)
        x = own(x)
        if self.wrapped:
            y = self.base_layer(x)
        else:
            y = nnf.linear(x, own(self.weight), None if self.bias is None else own(self.bias))
        mixtures = [context[self] for context in OPEN if self in context]
        if self.merged or self.disabled or None in mixtures:
            if not self.merged or self.backup is not None:
                return y
            return y + (self.delta(x) if self.magnitude is None else self._scaled(x, x, own) - y).detach()
        if mixtures:
            return y + self._mixed(x, mixtures[-1]).to(y.dtype)
        dropped = x * self.next_mask(self, x).to(x.dtype) if self.dropout and self.training else x
        return y + self.delta(dropped, own).to(y.dtype) if self.magnitude is None else self._scaled(x, dropped, own)

    def _scaled(self, x: Tensor, dropped: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        base = self.base_layer if self.wrapped else self
        z = nnf.linear(x, own(base.weight))
        y = (z + self.delta(dropped, own).to(z.dtype)) * (own(self.magnitude).double() / self.lengths()).to(z.dtype)
        y = y if base.bias is None else y + own(base.bias).to(y.dtype)
        return Output.apply(y) if self.strict and self.magnitude.requires_grad else y

    def lengths(self) -> Tensor:
        """c [n] in float64."""
        base = self.base_layer if self.wrapped else self
        return lengths(base.weight, self.factors.A, self.factors.B, self.core, self.scaling)

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        self.magnitude.copy_(self.lengths())

    def delta(self, x: Tensor, own: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        """s ((x A) G) B^T in x's dtype."""
        A, B, core = (own(t).to(x.dtype) for t in (self.factors.A, self.factors.B, self.core))
        if self.next_noise is not None:
            core = core * self.next_noise()
        if self.strict:
            others = (layer._parameters.get("core") for layer in self.siblings if layer is not self)
            x, A, B, core = read(x, A, B, core, [t for t in others if t is not None and t.requires_grad])
        u = x @ A
        return ((u if self.moved is None else self.moved(u)) @ core) @ B.mT * self.scaling

    def _mixed(self, x: Tensor, mixing: Mixing) -> Tensor:
        rows = []
        for row, part in zip(x, mixing):
            A, B = self.factors.A.to(x.dtype), self.factors.B.to(x.dtype)
            core, scaling = (self.core.detach() * 0, 0.0) if part is None else part
            rows.append(row @ A @ core.to(x.dtype) @ B.mT * scaling)
        return torch.stack(rows)

    @torch.no_grad()
    def merge(self) -> None:
        """W += s B G^T A^T, with magnitudes (m / c) of that sum, seen by autograd as any change in place; a weight that is made
        of others is left as it is."""
        self.merged = True
        if "weight" not in self._parameters:
            return
        self.backup = self.weight.clone()
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        A, B, core = (t.to(wide) for t in (self.factors.A, self.factors.B, self.core))
        rows = self.weight.to(wide) + self.scaling * B @ core.mT @ A.mT
        if self.magnitude is not None:
            rows = rows * (self.magnitude.double() / self.lengths()).to(wide).unsqueeze(1)
        self.weight.copy_(rows.to(self.weight.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.backup is not None:
            self.weight.copy_(self.backup)
        self.backup, self.merged = None, False


class LoTRExperts(nn.Module):
    """The matrices of several experts with an adapter, for rows sorted by expert."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, factors: LoTRFactors, *, scaling: float):
        super().__init__()
        self.weight, self.bias, self.scaling = weight, bias, scaling
        self.requires_grad_(False)
        self.factors = factors
        self.core = nn.Parameter(factors.A.new_zeros(len(weight), factors.A.shape[1], factors.B.shape[1]))

    def forward(self, x: Tensor, offs: Tensor, tokens: Tensor | None = None) -> Tensor:
        f = self.factors
        return grouped_linear(x, self.weight, offs, f.A, f.B, self.core, self.scaling, bias=self.bias, tokens=tokens)


def grouped_linear(
    x: Tensor, weight: Tensor, offs: Tensor, A: Tensor, B: Tensor, cores: Tensor, scaling: float, *, bias=None, tokens=None
) -> Tensor:
    """Each expert's rows by themselves. Rows from offs[-1] on are zero: nothing of them is read."""
    A, B, cores = (t.to(x.dtype) for t in (A, B, cores))
    parts, start = [], 0
    for expert, end in enumerate(offs.tolist()):
        rows = x[start:end] if tokens is None else x[tokens[start:end]]
        y = nnf.linear(rows, weight[expert], None if bias is None else bias[expert])
        parts.append(y + ((rows @ A) @ cores[expert]) @ B.mT * scaling)
        start = end
    count = len(x if tokens is None else tokens)
    return torch.cat([*parts, parts[0].new_zeros(count - start, len(B))])
