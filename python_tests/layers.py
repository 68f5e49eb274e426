"""Small networks of adapted layers for the tests, each with the same function in plain PyTorch, in float64: the truth.

`Net(kind)` is a module. `Side` is what a test compares: the net itself, or its truth over copies of its parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from helpers import sums_dtype
from torch import Tensor, nn
from torch.nn import functional as nnf

from lotr_ext import (
    LoTRConv1D,
    LoTRFactor,
    LoTRFactors,
    LoTRLinear,
    LoTRWrapped,
    lotr_linear,
    reference,
)
from lotr_ext.core.request import open_request

K, R = 12, 3
Found = list[Tensor | None]
Call = Callable[[int, Tensor], Tensor]
INDEX = torch.tensor([2, -1, 0, 2, 1, 0])  # of tasks, by row
SCALING = 0.7


class RowTasks(NamedTuple):
    """The state of a layer in a request (`lotr_ext.core.request.TaskState`)."""

    net: Net
    cores: Tensor

    def index_of(self, x: Tensor) -> Tensor:
        return self.net.index(x)


class Conv1D(nn.Module):
    """transformers' Conv1D: the weight is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.nx = K, K
        self.weight, self.bias = (
            nn.Parameter(torch.randn(K, K) / K**0.5),
            nn.Parameter(torch.randn(K)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Scaled(nn.Module):
    """A linear layer with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = K, K
        self.weight, self.bias = (
            nn.Parameter(torch.randn(K, K) / K**0.5),
            nn.Parameter(torch.randn(K)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return 2 * nnf.linear(x, self.weight, self.bias)


def one(call: Call, x: Tensor) -> Tensor:
    return call(0, x)


def siblings(call: Call, x: Tensor) -> Tensor:
    """q, k and v read the same x, o another."""
    x = torch.sigmoid(x)
    return call(3, torch.tanh(call(0, x) * call(1, x) + call(2, x)))


def again(call: Call, x: Tensor) -> Tensor:
    """A layer on its own output, beside another one on the same x."""
    return call(0, call(0, x)) * call(1, x)


# kind: (how many layers, how they are wired)
KINDS: dict[str, tuple[int, Callable[[Call, Tensor], Tensor]]] = {
    "linear": (1, one),
    "siblings": (4, siblings),
    "again": (2, again),
    "two Bs": (4, siblings),  # of one A
    "conv1d": (2, again),
    "wrapped": (4, siblings),
    "function": (2, again),
    "trained base": (4, siblings),
    "trained bias": (1, one),
    "rows": (2, again),
    "rows of siblings": (4, siblings),
    "rows, wrapped": (4, siblings),
}


class Net(nn.Module):
    """Layers of one kind over shared factors. factors: the dtype of the adapter."""

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype = torch.float64,
        factors: torch.dtype | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        torch.manual_seed(0)
        count, self.wire = KINDS[kind]
        self.kind, self.rows, factors = kind, kind.startswith("rows"), factors or dtype
        self.dropout = dropout
        pair = LoTRFactors(K, K, (R, R + 1), dtype=factors)
        pairs = [pair] * count
        if kind == "two Bs":
            other = LoTRFactors.of(pair.A, LoTRFactor(K, R + 1, dtype=factors))
            pairs = [pair, other, pair, other]
        base = (
            Conv1D if kind == "conv1d" else Scaled if "wrapped" in kind else lambda: nn.Linear(K, K)
        )
        adapted = (
            LoTRConv1D if kind == "conv1d" else LoTRWrapped if "wrapped" in kind else LoTRLinear
        )
        made = (
            adapted.from_linear(base().to(dtype), pair, scaling=SCALING, dropout=dropout)
            for pair in pairs
        )
        self.layers = nn.ModuleList(made)
        tasks = (3, R, R + 1) if self.rows else (R, R + 1)
        self.cores = (
            nn.ParameterList(nn.Parameter(torch.randn(tasks).to(factors)) for _ in range(count))
            if self.rows
            else None
        )
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "factors" in name or name.endswith("core"):
                    p.normal_(0, p.shape[0] ** -0.5)
        for layer in self.layers if kind.startswith("trained") else ():
            layer.weight.requires_grad_(kind == "trained base"), layer.bias.requires_grad_()

    def index(self, x: Tensor) -> Tensor:
        """[b]; for siblings [b, tokens] if x has three dimensions."""
        b = INDEX.repeat(-(-x.shape[0] // len(INDEX)))[: x.shape[0]]
        return (
            b
            if x.dim() < 3 or self.kind == "rows"
            else (b[:, None] + torch.arange(x.shape[1])) % 4 - 1
        )

    def forward(self, x: Tensor) -> Tensor:
        def call(i: int, h: Tensor) -> Tensor:
            layer = self.layers[i]
            if self.kind not in ("function", "rows"):
                return layer(h)
            core, index = (self.cores[i], self.index(h)) if self.rows else (layer.core, None)
            A, B = layer.factors.A.value, layer.factors.B.value
            return lotr_linear(h, layer.weight, layer.bias, A, B, core, SCALING, core_index=index)

        return self.wire(call, x)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """The context of the layers' tasks."""
        if self.cores is None or self.kind == "rows":
            yield
            return
        states = {layer: RowTasks(self, self.cores[i]) for i, layer in enumerate(self.layers)}
        with open_request(states):
            yield

    def truth(self, leaves: dict[str, Tensor], x: Tensor) -> Tensor:
        """The same function of x and the parameters by name."""
        return self.wire(lambda i, h: self.plain(i, leaves, h), x)

    def plain(self, i: int, leaves: dict[str, Tensor], x: Tensor) -> Tensor:
        """The formula of one layer."""
        names, layer = {id(p): name for name, p in self.named_parameters()}, self.layers[i]
        core = layer.core if self.cores is None else self.cores[i]
        parts = (layer.factors.A.value, layer.factors.B.value, core, layer.weight, layer.bias)
        A, B, core, W, bias = (leaves[names[id(p)]] for p in parts)
        W, bias = (
            (2 * W, 2 * bias)
            if "wrapped" in self.kind
            else (W.T if self.kind == "conv1d" else W, bias)
        )
        u = self.dropped(x) @ A
        if self.cores is None:
            return nnf.linear(x, W, bias) + SCALING * (u @ core @ B.T)
        index = self.index(x)
        index = index.view(*index.shape, *(1,) * (x.dim() - 1 - index.dim()))
        own = core[index.clamp(min=0)] * (index >= 0)[..., None, None]
        return nnf.linear(x, W, bias) + SCALING * (u.unsqueeze(-2) @ own).squeeze(-2) @ B.T

    def dropped(self, x: Tensor) -> Tensor:
        """Drops elements of x by the mask that the kernels draw from the next seed of torch's generator."""
        if not (self.dropout and self.training):
            return x
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        mask = reference.dropout_mask(x[..., 0].numel(), K, self.dropout, int(seed))
        return x * mask.view(x.shape)


class Side:
    """One of the two things that a test compares. x, and leaves by name: what gradients are taken of."""

    def __init__(self, net: Net, x: Tensor, exact: bool, trains_x: bool = True):
        self.net, self.exact = net, exact
        self.x = (
            x.detach().to(torch.float64 if exact else x.dtype, copy=True).requires_grad_(trains_x)
        )
        own = dict(net.named_parameters())
        self.values = (
            {
                n: p.detach().to(torch.float64, copy=True).requires_grad_(p.requires_grad)
                for n, p in own.items()
            }
            if exact
            else own
        )
        self.leaves = {n: p for n, p in self.values.items() if p.requires_grad}

    @property
    def wanted(self) -> list[Tensor]:
        return [*([self.x] if self.x.requires_grad else []), *self.leaves.values()]

    def __call__(self, x: Tensor | None = None, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """The output for another x or other leaves."""
        x = self.x if x is None else x
        if self.exact:
            return self.net.truth({**self.values, **(leaves or {})}, x)
        return self.net(x) if leaves is None else torch.func.functional_call(self.net, leaves, (x,))

    def layer(self, i: int, x: Tensor) -> Tensor:
        """The output of one layer."""
        return self.net.plain(i, self.values, x) if self.exact else self.net.layers[i](x)

    def grad(
        self, loss: Tensor, of: list[Tensor] | None = None, **settings: bool
    ) -> list[Tensor | None]:
        return list(
            torch.autograd.grad(
                loss, self.wanted if of is None else of, allow_unused=True, **settings
            )
        )


def sides(net: Net, x: Tensor, trains_x: bool = True) -> tuple[Side, Side]:
    return Side(net, x, False, trains_x), Side(net, x, True, trains_x)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, K, generator=generator, dtype=torch.float64).to(dtype)


def loss(y: Tensor) -> Tensor:
    return (
        y.to(sums_dtype(y.dtype)).square().sum() / 16
    )  # within float16's range also where it is differentiated twice


def once(s: Side) -> Found:
    y = s()
    return [y, *s.grad(loss(y))]


def no_grad_first(s: Side) -> Found:
    with torch.no_grad():
        a = s()
    return [a, *s.grad(loss(s()))]


def linear_with_dropout() -> LoTRLinear:
    layer = LoTRLinear(K, K, 3, bias=False, scaling=SCALING, dropout=0.5, dtype=torch.float64)
    nn.init.normal_(layer.core)
    return layer


def check_masks(call: Callable[[Tensor], Tensor], layer: LoTRLinear) -> None:
    """Without a bias y is linear in x and in each of A, B and G, for a fixed mask."""
    x = inputs(6).requires_grad_()
    y = call(x)
    g = torch.randn_like(y)
    of = [x, layer.factors.A.value, layer.factors.B.value, layer.core]
    base = (y - x @ layer.weight.T).detach()
    found = torch.autograd.grad(y, of, g)
    for t, d, of_y in zip(of, found, (y, base, base, base), strict=True):
        assert abs(((d * t).sum() / (of_y * g).sum()).item() - 1) < 1e-8
    assert not torch.equal(call(x), y)
