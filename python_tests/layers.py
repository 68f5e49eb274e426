"""Small networks of adapted layers for the tests, and the truth about each of them.

`Net(kind)` is a module. Its truth is a copy in float64 that computes each layer in plain PyTorch.
`Side` is what a test compares: the net or its truth, each with an input.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from helpers import CLOSE, sums_dtype, worst
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


class Scaled(nn.Linear):
    """A linear layer with a custom forward, which doubles the output."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def layer_classes(kind: str) -> tuple[Callable[[], nn.Module], type]:
    """Returns what builds a base layer, and the class of the adapted layer."""
    if kind == "conv1d":
        return Conv1D, LoTRConv1D
    if "wrapped" in kind:
        return partial(Scaled, K, K), LoTRWrapped
    return partial(nn.Linear, K, K), LoTRLinear


# ---- networks ------------------------------------------------------------------------------------


def single(call: Call, x: Tensor) -> Tensor:
    return call(0, x)


def siblings(call: Call, x: Tensor) -> Tensor:
    """Calls q, k and v on the same x, and o on another one."""
    x = torch.sigmoid(x)
    return call(3, torch.tanh(call(0, x) * call(1, x) + call(2, x)))


def again(call: Call, x: Tensor) -> Tensor:
    """Calls a layer on its output, and another layer on the same x."""
    return call(0, call(0, x)) * call(1, x)


# kind: (number of layers, how they are wired). In the name of a kind,
# - "wrapped": the base has a custom forward;
# - "trained ..": the base, or its bias, requires a gradient;
# - "rows ..": one task per row. `lotr_linear` computes "rows" itself, a request the other ones.
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
        kind: A key of `KINDS`.
        dtype: The dtype of the base layers.
        factors: The dtype of the factors and the cores; `dtype` if it is absent.
        dropout: The probability that an element of x is dropped.

    Attributes:
        exact: Whether the net is a truth, which computes its layers in plain PyTorch.
    """

    exact = False

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
        count, self.wire = KINDS[kind]
        adapter_dtype = factors or dtype

        first = LoTRFactors(K, K, (R, R + 1), dtype=adapter_dtype)
        pairs = [first] * count
        if kind == "two Bs":
            other = LoTRFactors.of(first.A, LoTRFactor(K, R + 1, dtype=adapter_dtype))
            pairs = [first, other, first, other]

        make_base, adapted = layer_classes(kind)
        self.layers = nn.ModuleList()
        for i, pair in enumerate(pairs):
            base = make_base().to(dtype)
            scaling = SCALING - 0.1 * i  # another one for each layer
            self.layers.append(adapted.from_linear(base, pair, scaling=scaling, dropout=dropout))

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

    def parts(self, i: int) -> dict[str, Tensor]:
        """Returns the parameters of a layer. The core of a net of rows is the layer's cores."""
        layer = self.layers[i]
        return {
            "weight": layer.weight,
            "bias": layer.bias,
            "A": layer.factors.A.value,
            "B": layer.factors.B.value,
            "core": layer.core if self.cores is None else self.cores[i],
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.wire(self.call, x)

    def call(self, i: int, x: Tensor) -> Tensor:
        """Computes a layer: by its formula, its module, or `lotr_linear` on its tensors."""
        if self.exact:
            return self.plain(i, x)
        layer = self.layers[i]
        if self.rows and self.kind != "rows":
            # A request (lotr_ext/core/request.py). An inner one, for no layer, changes nothing.
            tasks = SimpleNamespace(cores=self.cores[i], index_of=self.index)
            with open_request({layer: tasks}), open_request({}):
                return layer(x)
        if self.kind not in ("function", "rows"):
            return layer(x)
        # The function, on the tensors of the layer.
        return lotr_linear(
            x,
            **self.parts(i),
            scaling=layer.scaling,
            core_index=self.index(x) if self.rows else None,
            dropout_p=layer.dropout,
            training=self.training,
        )

    def plain(self, i: int, x: Tensor) -> Tensor:
        """Computes a layer by its formula, with its core or the core of each row's task."""
        core = self.parts(i)["core"]
        if self.rows:
            index = self.index(x)
            core = cores_of_rows(
                core, index.view(*index.shape, *(1,) * (x.dim() - 1 - index.dim()))
            )
        return self.formula(i, x, core)

    def formula(self, i: int, x: Tensor, core: Tensor) -> Tensor:
        """Computes a layer by its formula, with a core [r_in, r_out] or one per row."""
        W, bias, A, B, _ = self.parts(i).values()
        update = ((self.dropped(i, x) @ A).unsqueeze(-2) @ core).squeeze(-2) @ B.T
        return self.plain_base(W, bias, x) + self.layers[i].scaling * update

    def plain_base(self, W: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        """Computes the base layer."""
        if "wrapped" in self.kind:
            return nnf.linear(x, 2 * W, 2 * bias)
        if self.kind == "conv1d":
            return nnf.linear(x, W.T, bias)
        return nnf.linear(x, W, bias)

    def dropped(self, i: int, x: Tensor) -> Tensor:
        """Drops elements of x by the mask that the kernels draw for a layer.

        Its seed is the next number of torch's generator.
        """
        p = self.layers[i].dropout
        if not (p and self.training):
            return x
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        mask = reference.dropout_mask(x[..., 0].numel(), K, p, int(seed))
        return x * mask.view(x.shape)


def cores_of_rows(cores: Tensor, index: Tensor) -> Tensor:
    """Returns the core of each row, zero for -1."""
    return cores[index.clamp(min=0)] * (index >= 0)[..., None, None]


# ---- the two sides of a comparison ---------------------------------------------------------------


class Side:
    """One of the two things that a test compares.

    Args:
        net: A network or its truth.
        x: The input, of which the side makes a copy, in float64 for a truth.
        trains_x: Whether x requires a gradient.

    Attributes:
        leaves: The parameters that require a gradient, by name.
    """

    def __init__(self, net: Net, x: Tensor, trains_x: bool = True):
        self.net = net
        dtype = torch.float64 if net.exact else x.dtype
        self.x = x.detach().to(dtype, copy=True).requires_grad_(trains_x)
        self.leaves = {name: p for name, p in net.named_parameters() if p.requires_grad}

    @property
    def targets(self) -> list[Tensor]:
        """The tensors that require a gradient: x first, then the leaves."""
        return [leaf for leaf in (self.x, *self.leaves.values()) if leaf.requires_grad]

    def __call__(self, x: Tensor | None = None, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """Computes the output, for another x or other leaves if they are present."""
        x = self.x if x is None else x
        return torch.func.functional_call(self.net, leaves, (x,)) if leaves else self.net(x)

    def replace(self, i: int, part: str, tensor: Tensor) -> None:
        """Makes another tensor a part of a layer: "weight", "bias", "A", "B" or "core"."""
        parameter = self.net.parts(i)[part]
        name = next(name for name, p in self.net.named_parameters() if p is parameter)
        module, _, attribute = name.rpartition(".")
        delattr(self.net.get_submodule(module), attribute)
        setattr(self.net.get_submodule(module), attribute, tensor)

    def grad(self, y: Tensor, targets: list[Tensor] | None = None, **settings: object) -> Results:
        """Returns the gradients of y.

        Args:
            y: A loss, or an output with `grad_outputs` in the settings.
            targets: The tensors that y is differentiated by; `self.targets` if it is absent.
            **settings: Arguments of `torch.autograd.grad`.
        """
        if targets is None:
            targets = self.targets
        return list(torch.autograd.grad(y, targets, allow_unused=True, **settings))


def sides(net: Net, x: Tensor, trains_x: bool = True) -> tuple[Side, Side]:
    truth = copy.deepcopy(net).double()
    truth.exact = True
    return Side(net, x, trains_x), Side(truth, x, trains_x)


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


def agree(
    net: Net,
    context: Callable[[Side], Results],
    x: Tensor,
    close: float = CLOSE[torch.float64],
    trains_x: bool = True,
) -> None:
    """Checks that a context returns the same for the net and for its truth.

    Args:
        net: The network.
        context: What runs on both sides.
        x: The input of the network.
        close: The bound of the relative error of each result.
        trains_x: Whether x requires a gradient.
    """
    results = []
    for side in sides(net, x, trains_x):
        torch.manual_seed(0)
        results.append(context(side))
    error = worst(*results)
    assert error < close, f"{error:.1e}"
