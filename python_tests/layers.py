"""Small networks of adapted layers for the tests, and the truth about each of them.

`Net(kind)` is a module. Its truth is the same function in plain PyTorch and float64. `Side` is what
a test compares: the net itself, or its truth over copies of its parameters.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from helpers import copy64, sums_dtype
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

K = 12  # in_features and out_features
R = 3
Results = list[Tensor | None]
Call = Callable[[int, Tensor], Tensor]  # (the layer's number, x) -> the layer's output
INDEX = torch.tensor([2, -1, 0, 2, 1, 0])  # the task of each row; -1 is the base
SCALING = 0.7


@dataclass(frozen=True)
class RowTasks:
    """The state of a layer in a request (see lotr_ext/core/request.py)."""

    net: "Net"
    layer: int

    @property
    def cores(self) -> Tensor:
        """Looks the cores up in each call, because `functional_call` replaces them."""
        return self.net.cores[self.layer]

    def index_of(self, x: Tensor) -> Tensor:
        return self.net.index(x)


# ---- base layers ---------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """A copy of transformers' Conv1D, with a weight of shape [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = K
        self.nx = K
        self.weight = nn.Parameter(torch.randn(K, K) / K**0.5)
        self.bias = nn.Parameter(torch.randn(K))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Scaled(nn.Module):
    """A linear layer with a custom forward, which doubles the output."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = K
        self.out_features = K
        self.weight = nn.Parameter(torch.randn(K, K) / K**0.5)
        self.bias = nn.Parameter(torch.randn(K))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * nnf.linear(x, self.weight, self.bias)


def layer_classes(kind: str) -> tuple[Callable[[], nn.Module], type]:
    """Returns what builds a base layer, and the class of the adapted layer."""
    if kind == "conv1d":
        return Conv1D, LoTRConv1D
    if "wrapped" in kind:
        return Scaled, LoTRWrapped
    return partial(nn.Linear, K, K), LoTRLinear


# ---- networks ------------------------------------------------------------------------------------


def single(call: Call, x: Tensor) -> Tensor:
    """Calls one layer once."""
    return call(0, x)


def siblings(call: Call, x: Tensor) -> Tensor:
    """Calls q, k and v on the same x, and o on another one."""
    x = torch.sigmoid(x)
    return call(3, torch.tanh(call(0, x) * call(1, x) + call(2, x)))


def again(call: Call, x: Tensor) -> Tensor:
    """Calls a layer on its output, and another layer on the same x."""
    return call(0, call(0, x)) * call(1, x)


# kind: (number of layers, how they are wired)
KINDS: dict[str, tuple[int, Callable[[Call, Tensor], Tensor]]] = {
    "linear": (1, single),
    "siblings": (4, siblings),
    "again": (2, again),
    "two Bs": (4, siblings),  # two pairs of factors with the same A
    "conv1d": (2, again),
    "wrapped": (4, siblings),
    "function": (2, again),
    "trained base": (4, siblings),
    "trained bias": (1, single),
    "rows": (2, again),
    "rows of siblings": (4, siblings),
    "rows, wrapped": (4, siblings),
}


class Net(nn.Module):
    """Layers of one kind over shared factors.

    Args:
        kind: a key of `KINDS`.
        dtype: the dtype of the base layers.
        factors: the dtype of the factors and the cores; `dtype` if it is absent.
        dropout: the probability that an element of x is dropped.
    """

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype = torch.float64,
        factors: torch.dtype | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.rows = kind.startswith("rows")
        self.dropout = dropout
        count, self.wire = KINDS[kind]
        adapter_dtype = factors or dtype

        pair = LoTRFactors(K, K, (R, R + 1), dtype=adapter_dtype)
        pairs = [pair] * count
        if kind == "two Bs":
            other = LoTRFactors.of(pair.A, LoTRFactor(K, R + 1, dtype=adapter_dtype))
            pairs = [pair, other, pair, other]

        make_base, adapted = layer_classes(kind)
        self.layers = nn.ModuleList()
        for pair in pairs:
            base = make_base().to(dtype)
            layer = adapted.from_linear(base, pair, scaling=SCALING, dropout=dropout)
            self.layers.append(layer)

        self.cores = None
        if self.rows:
            task_cores = [torch.randn(3, R, R + 1).to(adapter_dtype) for _ in range(count)]
            self.cores = nn.ParameterList(map(nn.Parameter, task_cores))

        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "factors" in name or name.endswith("core"):
                    parameter.normal_(0, parameter.shape[0] ** -0.5)
        if kind.startswith("trained"):
            for layer in self.layers:
                layer.weight.requires_grad_(kind == "trained base")
                layer.bias.requires_grad_()

    def index(self, x: Tensor) -> Tensor:
        """Returns the task of each row.

        The shape is [b], or [b, tokens] for siblings if x has three dimensions.
        """
        repeats = -(-x.shape[0] // len(INDEX))
        row_tasks = INDEX.repeat(repeats)[: x.shape[0]]
        if x.dim() < 3 or self.kind == "rows":
            return row_tasks
        return (row_tasks[:, None] + torch.arange(x.shape[1])) % 4 - 1

    def core(self, i: int) -> Tensor:
        """Returns the core of a layer, [r, r]; for a net of rows, its cores by task."""
        return self.layers[i].core if self.cores is None else self.cores[i]

    def forward(self, x: Tensor) -> Tensor:
        call = self.call_function if self.kind in ("function", "rows") else self.call_layer
        return self.wire(call, x)

    def call_layer(self, i: int, x: Tensor) -> Tensor:
        return self.layers[i](x)

    def call_function(self, i: int, x: Tensor) -> Tensor:
        """Computes a layer by `lotr_linear`, from the layer's tensors."""
        layer = self.layers[i]
        A = layer.factors.A.value
        B = layer.factors.B.value
        index = self.index(x) if self.rows else None
        return lotr_linear(
            x, layer.weight, layer.bias, A, B, self.core(i), SCALING, core_index=index
        )

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Opens a request with the tasks of the layers, if the layers take their task from one."""
        if self.cores is None or self.kind == "rows":
            yield
            return
        states = {layer: RowTasks(self, i) for i, layer in enumerate(self.layers)}
        with open_request(states):
            yield

    def truth(self, leaves: dict[str, Tensor], x: Tensor) -> Tensor:
        """Computes the net in plain PyTorch from parameters by name."""
        return self.wire(lambda i, h: self.plain(i, leaves, h), x)

    def plain(self, i: int, leaves: dict[str, Tensor], x: Tensor) -> Tensor:
        """Computes one layer by its formula from parameters by name."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}

        def leaf(parameter: Tensor) -> Tensor:
            return leaves[names[id(parameter)]]

        layer = self.layers[i]
        A = leaf(layer.factors.A.value)
        B = leaf(layer.factors.B.value)
        G = leaf(self.core(i))
        base_output = self.plain_base(leaf(layer.weight), leaf(layer.bias), x)
        u = self.dropped(x) @ A
        if self.cores is None:
            return base_output + SCALING * (u @ G @ B.T)
        index = self.index(x)
        index = index.view(*index.shape, *(1,) * (x.dim() - 1 - index.dim()))
        row_cores = G[index.clamp(min=0)] * (index >= 0)[..., None, None]
        return base_output + SCALING * (u.unsqueeze(-2) @ row_cores).squeeze(-2) @ B.T

    def plain_base(self, W: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        """Computes the base layer."""
        if "wrapped" in self.kind:
            return nnf.linear(x, 2 * W, 2 * bias)
        if self.kind == "conv1d":
            return nnf.linear(x, W.T, bias)
        return nnf.linear(x, W, bias)

    def dropped(self, x: Tensor) -> Tensor:
        """Drops elements of x by the mask that the kernels draw.

        Its seed is the next number of torch's generator.
        """
        if not (self.dropout and self.training):
            return x
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        mask = reference.dropout_mask(x[..., 0].numel(), K, self.dropout, int(seed))
        return x * mask.view(x.shape)


# ---- the two sides of a comparison ---------------------------------------------------------------


class Side:
    """One of the two things that a test compares.

    Args:
        net: the network.
        x: its input, of which the side makes a copy.
        exact: whether the side is the truth, over float64 copies of x and the parameters.
        trains_x: whether x requires a gradient.

    Attributes:
        values: the parameters by name.
        leaves: the values that require a gradient.
    """

    def __init__(self, net: Net, x: Tensor, exact: bool, trains_x: bool = True):
        self.net = net
        self.exact = exact
        dtype = torch.float64 if exact else x.dtype
        self.x = x.detach().to(dtype, copy=True).requires_grad_(trains_x)
        self.values: dict[str, Tensor] = {}
        for name, parameter in net.named_parameters():
            value = copy64(parameter).requires_grad_(parameter.requires_grad)
            self.values[name] = value if exact else parameter
        self.leaves = {name: value for name, value in self.values.items() if value.requires_grad}

    @property
    def targets(self) -> list[Tensor]:
        """The tensors that require a gradient: x first, then the leaves."""
        return [leaf for leaf in (self.x, *self.leaves.values()) if leaf.requires_grad]

    def __call__(self, x: Tensor | None = None, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """Computes the output, for another x or other leaves if they are present."""
        x = self.x if x is None else x
        if self.exact:
            return self.net.truth({**self.values, **(leaves or {})}, x)
        if leaves is None:
            return self.net(x)
        return torch.func.functional_call(self.net, leaves, (x,))

    def layer(self, i: int, x: Tensor) -> Tensor:
        """Computes the output of one layer."""
        return self.net.plain(i, self.values, x) if self.exact else self.net.layers[i](x)

    def grad(self, y: Tensor, targets: list[Tensor] | None = None, **settings: object) -> Results:
        """Returns the gradients of y.

        Args:
            y: a loss, or an output with `grad_outputs` in the settings.
            targets: the tensors that y is differentiated by; `self.targets` if it is absent.
            **settings: arguments of `torch.autograd.grad`.
        """
        if targets is None:
            targets = self.targets
        return list(torch.autograd.grad(y, targets, allow_unused=True, **settings))


def sides(net: Net, x: Tensor, trains_x: bool = True) -> tuple[Side, Side]:
    """Returns the net and its truth."""
    return Side(net, x, False, trains_x), Side(net, x, True, trains_x)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns an x of shape [*shape, K]. Its numbers depend only on the shape."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, K, generator=generator, dtype=torch.float64).to(dtype)


def loss(y: Tensor) -> Tensor:
    """Returns a sum of squares that float16 can hold, also after it is differentiated twice."""
    return y.to(sums_dtype(y.dtype)).square().sum() / 16


# ---- contexts and checks that several files use --------------------------------------------------


def once(side: Side) -> Results:
    y = side()
    return [y, *side.grad(loss(y))]


def no_grad_first(side: Side) -> Results:
    with torch.no_grad():
        y = side()
    return [y, *side.grad(loss(side()))]


def linear_with_dropout() -> LoTRLinear:
    """Returns a layer without bias that drops half of the elements of x."""
    layer = LoTRLinear(K, K, 3, bias=False, scaling=SCALING, dropout=0.5, dtype=torch.float64)
    nn.init.normal_(layer.core)
    return layer


def check_masks(call: Callable[[Tensor], Tensor], layer: LoTRLinear) -> None:
    """Checks that forward and backward use one mask, and the next call another one.

    For a fixed mask and without a bias, y is linear in x, and the adapter's output is linear in
    each of A, B and G. So the product of each tensor and its gradient gives the output again.

    Args:
        call: computes the layer, for example after `torch.compile`.
        layer: a layer from `linear_with_dropout`.
    """
    x = inputs(6).requires_grad_()
    y = call(x)
    dy = torch.randn_like(y)
    tensors = [x, layer.factors.A.value, layer.factors.B.value, layer.core]
    gradients = torch.autograd.grad(y, tensors, dy)
    adapter_output = (y - x @ layer.weight.T).detach()
    outputs = (y, adapter_output, adapter_output, adapter_output)
    for tensor, gradient, output in zip(tensors, gradients, outputs, strict=True):
        ratio = (gradient * tensor).sum() / (output * dy).sum()
        assert abs(ratio.item() - 1) < 1e-8
    assert not torch.equal(call(x), y)
