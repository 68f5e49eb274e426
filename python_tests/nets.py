"""A small attention-like network for the tests, and the same network in float64 by plain autograd: the truth."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lotr_ext
from lotr_ext import ops, reference
from lotr_ext.autograd import shared_gradient


class Block(nn.Module):
    """q, k and v read the same x, as in a transformer; o reads another."""

    def __init__(self, d: int, factors: lotr_ext.LoTRFactors, dtype: torch.dtype, **settings):
        super().__init__()
        for name in "qkvo":
            setattr(self, name, lotr_ext.LoTRLinear.from_linear(nn.Linear(d, d, dtype=dtype), factors, **settings))
        self.norm = nn.LayerNorm(d, dtype=dtype).requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        return h + torch.tanh(self.o(torch.sigmoid(self.q(x)) * torch.tanh(self.k(x)) + self.v(x)))


class Net(nn.Module):
    """n blocks over one pair of factors. reentrant: None without checkpointing, else checkpoint's use_reentrant."""

    def __init__(self, d: int = 24, rank: int = 4, n: int = 3, dtype: torch.dtype = torch.float32, **settings):
        super().__init__()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.factors = lotr_ext.LoTRFactors(d, d, rank, dtype=wide)
        self.blocks = nn.ModuleList(Block(d, self.factors, dtype, **settings) for _ in range(n))
        self.reentrant: bool | None = None
        with torch.no_grad():
            for layer in self.layers():
                layer.core.normal_(0, 0.3)

    def layers(self) -> list[lotr_ext.LoTRLinear]:
        return [getattr(block, name) for block in self.blocks for name in "qkvo"]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x

    def step(self, x: Tensor) -> Tensor:
        """One backward of sum(y^2) into fresh gradients; returns y."""
        self.zero_grad(set_to_none=True)
        y = self(x)
        y.square().sum().backward()
        return y

    def pending(self) -> int:
        """Sums of the shared gradient that are still alive."""
        return self.factors._group.A.pending() + self.factors._group.B.pending()


class Truth:
    """y and all gradients of sum(y^2) of a Net at x, in float64 by plain autograd."""

    def __init__(self, net: Net, x: Tensor):
        self.A, self.B = (t.detach().double().requires_grad_() for t in (net.factors.A, net.factors.B))
        self.cores = [layer.core.detach().double().requires_grad_() for layer in net.layers()]
        self.x = x.detach().double().requires_grad_()
        core = dict(zip(net.layers(), self.cores))
        h = self.x
        for block in net.blocks:
            z = nn.functional.layer_norm(h, h.shape[-1:])
            q, k, v = (plain(layer, self.A, self.B, core[layer], z) for layer in (block.q, block.k, block.v))
            h = h + torch.tanh(plain(block.o, self.A, self.B, core[block.o], torch.sigmoid(q) * torch.tanh(k) + v))
        self.y = h.detach()
        h.square().sum().backward()

    def error(self, net: Net) -> float:
        """The worst relative error of the gradients that net holds now."""
        pairs = [(net.factors.A.grad, self.A.grad), (net.factors.B.grad, self.B.grad)]
        pairs += [(layer.core.grad, core.grad) for layer, core in zip(net.layers(), self.cores)]
        return max(relative(got, want) for got, want in pairs)


def plain(layer: lotr_ext.LoTRLinear, A: Tensor, B: Tensor, core: Tensor, x: Tensor) -> Tensor:
    """The definition of one layer in float64, with the factors given."""
    bias = None if layer.bias is None else layer.bias.detach().double()
    return nn.functional.linear(x, layer.weight.detach().double(), bias) + layer.scaling * (x @ A @ core @ B.mT)


def right(net: Net, layer: lotr_ext.LoTRLinear, x: Tensor, y: Tensor | None = None, tolerance: float = 1e-5) -> bool:
    """Whether layer(x), or y, is what the present values of A, B, core and x say."""
    y = layer(x) if y is None else y
    A, B = net.factors.A.detach().double(), net.factors.B.detach().double()
    return relative(y, plain(layer, A, B, layer.core.detach().double(), x.detach().double())) < tolerance


def relative(got: Tensor | None, want: Tensor) -> float:
    """|got - want| / |want|, infinite for a missing one."""
    if got is None:
        return float("inf")
    return ((got.detach().double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def _parts_forward(
    x, weight, bias, A, B, core, scaling, order=0, unfolded=False, *, u=None, F=None, p=0.0, seed=None, scale=None
) -> list[str]:
    return ["small_forward"] if unfolded else ["expand_add_"] + ["shrink"] * (u is None) + ["fold"] * (F is None)


def _parts_backward(
    g, weight, x, u, A, F, B, core, s, order=0, unfolded=False, dA=None, dB=None, need_B=False, need_core=False, *,
    k=None, dx=None, Q=None, p=0.0, seed=None,
) -> list[str]:  # fmt: skip
    if unfolded:
        return ["small_backward"]
    read_g = {(True, True): ["shrink_grad_"], (True, False): ["shrink"], (False, True): ["factor_grad_"], (False, False): []}
    found = read_g[F is not None, u is not None]
    found = found + ["fold_grad"] * (u is not None and Q is None and (need_B or need_core))
    return found + _parts_shrink_backward(None, weight, x if F is not None else None, A if F is not None else None)


def _parts_shrink_backward(k, dx, x, A, *_, **__) -> list[str]:
    return ["expand_add_"] * (A is not None) + ["factor_grad_"] * (x is not None)


class OpCounter(Counter):
    """Counts the products that our operators make, by the name of the operator that makes only that one. The unfolded form has
    no operator of its own; it is counted by its kernels' names, small_forward and small_backward.

    A whole-layer operator counts as what its arguments ask of it (`csrc/torch/layer.h`): test_layer_operators.py holds
    each of them to the results of just those products.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        parts = {"layer_forward": _parts_forward, "layer_backward": _parts_backward, "shrink_backward": _parts_shrink_backward}
        for name, of in parts.items():
            monkeypatch.setattr(ops, name, self._counted_parts(of, getattr(ops, name)))
        for name in ("shrink", "expand_add_", "factor_grad_", "shrink_grad_", "fold", "fold_grad"):
            monkeypatch.setattr(ops, name, self._counted(name, getattr(ops, name)))

    def _counted(self, name: str, function):
        def call(*args, **kwargs):
            self[name] += 1
            return function(*args, **kwargs)

        return call

    def _counted_parts(self, of, function):
        def call(*args, **kwargs):
            self.update(of(*args, **kwargs))
            return function(*args, **kwargs)

        return call

    def take(self) -> dict[str, int]:
        """The counts since the last take."""
        counts = dict(self)
        self.clear()
        return counts


def shapes_of_sums(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of each sum of gradients, as it is made."""
    made: list[torch.Size] = []

    class Counted(shared_gradient.TaskSum):
        def __setattr__(self, name, value):
            if name == "value" and isinstance(value, torch.Tensor):
                made.append(value.shape)
            super().__setattr__(name, value)

    monkeypatch.setattr(shared_gradient, "TaskSum", Counted)
    return made


class Boom(torch.autograd.Function):
    """Identity whose backward fails."""

    @staticmethod
    def forward(ctx, t):
        return t.view_as(t)

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("boom")


def dropped(t: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    return t.double() * reference.dropout_mask(*t.shape, p, int(seed))
