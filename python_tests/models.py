"""The table of models that tests share.

Networks of `zoo`, ways to adapt them, and the same function in plain PyTorch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import zoo
from torch import Tensor, nn

from lotr_ext import LoTRConfig, apply_lotr
from lotr_ext.model import adapted_layers
from lotr_ext.sharded import full_tensor

# Ways to adapt a network. Each is tried on each network that it is for.
WAYS: dict[str, dict[str, object]] = {
    "shape": {},
    "width": {"group_by": "width", "rank": (3, 2)},
    "block": {"group_by": "block", "rank": 3},
    "name": {"group_by": "name"},
    "layer": {"group_by": "layer"},
    "identity": {"core_init": "identity", "rslora": True, "alpha": 3.0},
    "svd": {"init": "svd"},
    "diagonal": {"core": "diagonal"},
    "train": {"core": "train"},
    "bfloat16": {"adapter_dtype": "bfloat16", "rank": 2},
}
# Experts refuse "svd", "diagonal" and "train". Four of the other ways are enough for the mixture.
CASES = [
    (name, way)
    for name in zoo.NETS
    for way in WAYS
    if name != "mixture" or way in ("shape", "width", "block", "layer")
]
FULL_PRECISION = [(name, way) for name, way in CASES if way != "bfloat16"]


def config(name: str, way: str = "shape", **settings: object) -> LoTRConfig:
    """Returns the configuration that adapts the layers of zoo.TARGETS.

    Unless the way or the settings say otherwise, the scaling is 1.5. "auto" would move the outputs
    far from the plain network's.
    """
    field = "target_parameters" if name == "mixture" else "target_modules"
    values = {"rank": 3, field: zoo.TARGETS[name], **WAYS[way], **settings}
    if "alpha" not in values:
        values.setdefault("scaling", 1.5)
    return LoTRConfig.from_dict(values)


def started(name: str, way: str = "shape", **settings: object) -> nn.Module:
    """The named network, adapted, as it starts."""
    return apply_lotr(zoo.net(name), config(name, way, **settings))


def trained(name: str, way: str = "shape", seed: int = 7, **settings: object) -> nn.Module:
    """The named network with an adapter that was moved off its start."""
    return moved(started(name, way, **settings), seed)


def moved(model: nn.Module, seed: int = 7) -> nn.Module:
    """Gives the parameters of a model's adapter random values."""
    adapter = {p for layer in adapted_layers(model).values() for p in layer.adapter_parameters()}
    names = {name for name, p in model.named_parameters() if p in adapter}
    return zoo.fill(model, seed, 0.4, lambda name: name in names)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flags_of(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Checks that a block leaves the tensors, flags and attributes of a model as they are."""
    before = (state(model), flags_of(model), set(vars(model)))
    yield
    assert same(state(model), before[0])
    assert flags_of(model) == before[1]
    assert set(vars(model)) == before[2]


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the trained parameters, also of a sharded or wrapped model."""
    return {
        name.removeprefix("module."): full_tensor(parameter).detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns A, B and then the cores of a model (or what they are computed from), each once."""
    layers = adapted_layers(model).values()
    parts = {parameter: part for layer in layers for part, parameter in layer.parts()}
    return sorted(parts, key=parts.get)


def written_out(model: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a plain float64 copy plus the model's adapter, W + s B G^T A^T.

    They are differentiable in A, B and the cores.
    """
    weights = dict(plain.named_parameters())
    for name, layer in adapted_layers(model).items():
        A = layer.factors.A.value.double()
        B = layer.factors.B.value.double()
        delta = layer.scaling * B @ layer.core.double().mT @ A.mT  # [.., n, k]
        # For experts, the layer "experts.lotr.up_proj" adapts the parameter "experts.up_proj".
        key = f"{name}.weight" if f"{name}.weight" in weights else name.replace(".lotr.", ".")
        if delta.shape != weights[key].shape:  # [k, n], as in a Conv1D; no such weight is square
            delta = delta.mT
        weights[key] = weights[key].detach() + delta
    return weights
