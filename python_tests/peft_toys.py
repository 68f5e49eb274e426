"""Small models with LoTR adapters by PEFT, and the same in plain torch: what the PEFT tests compare with."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import IDS, loss, toy

from lotr_ext import cores

peft = pytest.importorskip("peft", minversion="0.21", reason="expected PEFT 0.21 or later")
ours = pytest.importorskip("lotr_ext.interop.peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
LoTRPeftConfig, LoTRPeftLinear = ours.LoTRPeftConfig, ours.LoTRPeftLinear

SETTINGS = {"rank": 4, "target_modules": ["q", "v"]}


class ConvToy(nn.Module):
    """GPT-2's form of linear layer, with weights [in, out], beside nn.Linear. Token ids [b, t] -> [b, 3]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(29, 16)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": Conv1D(24, 16), "down": Conv1D(16, 24)}) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x) + 0.3))
        return self.head(x.mean(1))


BASES = {"toy": toy, "conv": ConvToy}
CASES = {
    "names": ("toy", {}),
    "regex, two groups": ("toy", {"target_modules": r".*\.(q|up)", "alpha": 8.0, "rslora": True}),
    "ranks, by name": ("toy", {"rank": (2, 5), "group_by": "name", "scaling": 0.7}),
    "modules_to_save": ("toy", {"modules_to_save": ["head"]}),
    "conv1d": ("conv", {"target_modules": ["up", "down"]}),
}
# cores that are made of fewer numbers; one A a width in and one B a width out
FEWER_NUMBERS = [{"core": core, "target_modules": ["q", "k", "up"]} for core in cores.FORMS]
FEWER_NUMBERS += [{"target_modules": ["q", "k", "up", "down"], "group_by": "width"}]


def base(kind: str = "toy") -> nn.Module:
    """The same weights each time."""
    return BASES[kind]().eval()


def config(**settings) -> LoTRPeftConfig:
    return LoTRPeftConfig(**{**SETTINGS, **settings})


def randomize(model: nn.Module, name: str = "default", seed: int = 7, std: float = 0.3) -> None:
    """Gives an adapter's cores, and its modules_to_save, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".lotr_adapter.{name}." in key or f"lotr_cores.{name}." in key or f".modules_to_save.{name}." in key:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * std).to(parameter.dtype))


def tuned(kind: str = "toy", name: str = "default", random: bool = True, **settings) -> peft.PeftModel:
    """A model with one adapter, by default rank 4 on q and v and with values that matter."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base(kind), config(**settings), adapter_name=name).eval()
    if random:
        randomize(model, name)
    return model


def with_two(**settings) -> peft.PeftModel:
    """Adapters "default" on q and v, active, and "other" of another rank on v and up."""
    model = tuned(**settings)
    torch.manual_seed(2)
    model.add_adapter("other", config(rank=3, target_modules=["v", "up"], alpha=6.0))
    randomize(model, "other", seed=8)
    return model.eval()


class _Plain(nn.Module):
    """base(x) + sum over adapters of s ((x A) G) B^T by autograd alone."""

    def __init__(self, layer: LoTRPeftLinear, names: list[str]):
        super().__init__()
        self.base = layer.base_layer
        self.cores = nn.ModuleList(layer.lotr_adapter[n] for n in names if n in layer.lotr_adapter)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for core in self.cores:
            y = y + core.scaling * (((x @ core.factors.A) @ core.core) @ core.factors.B.T)
        return y


def plain(model: peft.PeftModel, names: list[str]) -> nn.Module:
    """A copy of the model, in float64, whose adapters of these names are three lines of torch."""
    tuner = copy.deepcopy(model).double().base_model
    for name, layer in [(n, m) for n, m in tuner.model.named_modules() if isinstance(m, LoTRPeftLinear)]:
        parent, _, child = name.rpartition(".")
        setattr(tuner.model.get_submodule(parent), child, _Plain(layer, names))
    tuner.model.factors, tuner.model.forms = tuner.lotr_factors, tuner.lotr_cores
    return tuner.model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the adapters' parts and modules_to_save, by the name that they have in both kinds of model."""
    model.zero_grad()
    model(IDS).square().sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = (
                name.removeprefix("base_model.")
                .removeprefix("model.")
                .replace("lotr_factors.", "factors.")
                .replace("lotr_cores.", "forms.")
            )
            found[name.replace("lotr_adapter.default.", "cores.0.")] = parameter.grad
    return found


def trained(model: nn.Module) -> list[str]:
    """Names of the parameters that require grad."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def made(case: str, **more) -> peft.PeftModel:
    """A model with the adapter of a case."""
    kind, settings = CASES[case]
    return tuned(kind, **{**settings, **more})


def base_of(case: str) -> nn.Module:
    """The base model of a case."""
    return base(CASES[case][0])


def layers(model: nn.Module) -> list[LoTRPeftLinear]:
    """The adapted layers."""
    return [m for m in model.modules() if isinstance(m, LoTRPeftLinear)]


def close(y: Tensor, want: Tensor, atol: float = 1e-5) -> bool:
    """Equal up to rounding."""
    return torch.allclose(y, want.to(y.dtype), atol=atol)


def step(model: nn.Module, count: int = 3) -> None:
    """count steps of training; the model is left in eval mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(count):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    model.eval()


def loaded(directory: Path, kind: str = "toy", **settings) -> peft.PeftModel:
    """A saved adapter on a fresh base model; PEFT's warnings are errors."""
    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        return peft.PeftModel.from_pretrained(base(kind), directory, **settings)
