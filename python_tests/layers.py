"""Small networks of adapted layers for the tests, and the truth about each of them.

`Net(kind)` is a module. Its truth is a copy in float64 that computes each layer in plain PyTorch.
`Side` is what a test compares: the net or its truth, each with an input. For example

    def twice(side):  # a context: the same code runs on both sides
        return side.grad(loss(side() + side()))

    agree(Net("siblings"), twice, inputs(6))

contexts.py has the contexts of the tests.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from helpers import CLOSE, sums_dtype, worst
from torch import Tensor, nn

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
R = 3  # r_in; r_out is R + 1
Results = list[Tensor | None]
Call = Callable[[int, Tensor], Tensor]  # (the layer's number, x) -> the layer's output
INDEX = torch.tensor([2, -1, 0, 2, 1, 0])  # the task of each row; -1 is the base
SCALING = 0.7


# ---- base layers ---------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """A copy of transformers' Conv1D, with a weight of shape [in, out]."""

    def __init__(self, nx: int, nf: int):
        super().__init__()
        self.nx = nx
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Scaled(nn.Linear):
    """A linear layer with a custom forward, which doubles the output."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


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


class Kind(NamedTuple):
    """What a net consists of.

    Attributes:
        layers: The number of layers.
        wire: Computes the net's output from calls of its layers.
        base: The class of the base layers.
        adapted: The class of the adapted layers.
        pairs: The number of pairs of factors. All have the same A.
        trained: The parameters of the base that require a gradient.
        has_tasks: Whether each row of x has a task. The tasks are in a request.
        by_function: Whether `lotr_linear` computes the layers, on their tensors.
    """

    layers: int
    wire: Callable[[Call, Tensor], Tensor]
    base: type[nn.Module] = nn.Linear
    adapted: type[nn.Module] = LoTRLinear
    pairs: int = 1
    trained: tuple[str, ...] = ()
    has_tasks: bool = False
    by_function: bool = False


KINDS = {
    "linear": Kind(1, single),
    "siblings": Kind(4, siblings),
    "again": Kind(2, again),
    "two Bs": Kind(4, siblings, pairs=2),
    "conv1d": Kind(2, again, Conv1D, LoTRConv1D),
    "wrapped": Kind(4, siblings, Scaled, LoTRWrapped),
    "function": Kind(2, again, by_function=True),
    "trained base": Kind(4, siblings, trained=("weight", "bias")),
    "trained bias": Kind(1, single, trained=("bias",)),
    "rows": Kind(2, again, has_tasks=True, by_function=True),
    "rows of siblings": Kind(4, siblings, has_tasks=True),
    "rows, wrapped": Kind(4, siblings, Scaled, LoTRWrapped, has_tasks=True),
}


class Net(nn.Module):
    """Layers of one kind over shared factors.

    Args:
        kind: A key of `KINDS`.
        dtype: The dtype of the base layers.
        factors_dtype: The dtype of the factors and the cores; `dtype` if it is absent.
        dropout: The probability that an element of x is dropped.

    Attributes:
        exact: Whether the net is a truth, which computes its layers in plain PyTorch.
    """

    exact = False

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype = torch.float64,
        factors_dtype: torch.dtype | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        torch.manual_seed(0)
        self.kind = KINDS[kind]
        self.wire = self.kind.wire
        adapter_dtype = factors_dtype or dtype

        pairs = [LoTRFactors(K, K, (R, R + 1), dtype=adapter_dtype)]
        for _ in range(self.kind.pairs - 1):
            pairs.append(LoTRFactors.of(pairs[0].A, LoTRFactor(K, R + 1, dtype=adapter_dtype)))

        self.layers = nn.ModuleList()
        for i in range(self.kind.layers):
            base = self.kind.base(K, K).to(dtype)
            settings = {"scaling": SCALING - 0.1 * i, "dropout": dropout}
            layer = self.kind.adapted.from_linear(base, pairs[i % len(pairs)], **settings)
            for name in self.kind.trained:
                getattr(layer, name).requires_grad_()
            self.layers.append(layer)

        self.cores = None
        if self.kind.has_tasks:
            task_cores = [torch.randn(3, R, R + 1).to(adapter_dtype) for _ in self.layers]
            self.cores = nn.ParameterList(map(nn.Parameter, task_cores))

        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "factors" in name or name.endswith("core"):
                    parameter.normal_(0, parameter.shape[0] ** -0.5)

    def index(self, x: Tensor) -> Tensor:
        """Returns the task of each row, [b].

        For modules and an x of three dimensions, returns the task of each token, [b, tokens].
        """
        repeats = -(-x.shape[0] // len(INDEX))
        row_tasks = INDEX.repeat(repeats)[: x.shape[0]]
        if x.dim() < 3 or self.kind.by_function:
            return row_tasks
        # Along a row, tasks cycle through -1, 0, 1, 2. The row's own task determines the first.
        return (row_tasks[:, None] + torch.arange(x.shape[1])) % 4 - 1

    def parts(self, i: int) -> dict[str, Tensor]:
        """Returns the parameters of a layer. With tasks, "core" has the cores of all tasks."""
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
        """Computes a layer: by its formula, by `lotr_linear` on its tensors, or by its module."""
        if self.exact:
            return self.plain(i, x)
        layer = self.layers[i]
        if self.kind.by_function:
            return lotr_linear(
                x,
                **self.parts(i),
                scaling=layer.scaling,
                core_index=self.index(x) if self.kind.has_tasks else None,
                dropout_p=layer.dropout,
                training=self.training,
            )
        if not self.kind.has_tasks:
            return layer(x)
        # A request (lotr_ext/core/request.py). An inner one, for no layer, changes nothing.
        tasks = SimpleNamespace(cores=self.cores[i], index_of=self.index)
        with open_request({layer: tasks}), open_request({}):
            return layer(x)

    def plain(self, i: int, x: Tensor) -> Tensor:
        """Computes a layer by its formula, with its core or the core of each row's task."""
        core = self.parts(i)["core"]
        if self.kind.has_tasks:
            index = self.index(x)
            shared = x.dim() - 1 - index.dim()  # dimensions of x that share the task of their row
            core = cores_of_rows(core, index.view(*index.shape, *[1] * shared))
        return self.formula(i, x, core)

    def formula(self, i: int, x: Tensor, core: Tensor) -> Tensor:
        """Computes a layer by its formula, with a core [r_in, r_out] or one per row."""
        parts = self.parts(i)
        u = self.dropped(i, x) @ parts["A"]
        update = (u.unsqueeze(-2) @ core).squeeze(-2) @ parts["B"].T
        return self.plain_base(i, x) + self.layers[i].scaling * update

    def plain_base(self, i: int, x: Tensor) -> Tensor:
        layer = self.layers[i]
        if self.kind.base is Scaled:
            return nn.functional.linear(x, 2 * layer.weight, 2 * layer.bias)
        if self.kind.base is Conv1D:
            return nn.functional.linear(x, layer.weight.T, layer.bias)
        return nn.functional.linear(x, layer.weight, layer.bias)

    def dropped(self, i: int, x: Tensor) -> Tensor:
        """Drops elements of x by the mask that the kernels draw for a layer.

        Its seed is the next number of torch's generator.
        """
        p = self.layers[i].dropout
        if not (p and self.training):
            return x
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        return x * reference.dropout_mask(x[..., 0].numel(), K, p, int(seed)).view(x.shape)


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
            targets: The tensors by which y is differentiated; `self.targets` if it is absent.
            **settings: Arguments of `torch.autograd.grad`.
        """
        inputs = self.targets if targets is None else targets
        return list(torch.autograd.grad(y, inputs, allow_unused=True, **settings))


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
