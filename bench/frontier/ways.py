"""The ways to train few numbers of a text classifier that the frontier compares, each at several ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..measure.names import named

QV = r".*\.(query|value)"  # what the demo adapts, all of one shape
LINEAR = r".*\.layer\.\d+\..*\.(query|key|value|dense)"  # all linear layers of the encoder's blocks, of three shapes
HEAD_LR = 1e-2
TRIED = (1.0, 0.3, 3.0)  # the learning rates of every way and rank, as multiples of the way's own
LOTR_SCALING, LORA_SCALING = 4.0, 2.0  # s, as in the demo
Adapt = Callable[[nn.Module, int], nn.Module]


@dataclass(frozen=True)
class Way:
    """label: for people; ranks: where it is measured; lr: the middle one of those tried, of the adapter, or of the head where
    that is all; adapt(model, rank): freezes a TextClassifier's encoder and adds the adapter; quick: ranks of --quick;
    from_gradient: a tenth of the steps trains the head alone, and A and B then start from the gradient."""

    label: str
    ranks: tuple[int, ...]
    lr: float
    adapt: Adapt
    quick: tuple[int, ...] = ()
    from_gradient: bool = False


def _head(model: nn.Module, rank: int) -> nn.Module:
    model.encoder.requires_grad_(False)
    return model


def _lotr(targets: str = QV, **settings: object) -> Adapt:
    def adapt(model: nn.Module, rank: int) -> nn.Module:
        from lotr_ext import LoTRConfig, apply_lotr

        common = {"target_modules": targets, "modules_to_save": ["head"], "scaling": LOTR_SCALING}
        return apply_lotr(model, LoTRConfig(rank=rank, **common, **settings))

    return adapt


def _own_group(name: str, module: nn.Module) -> str:
    """A group a layer: with factors from the layer's own weight, and the core alone trained, LoRA-XS (arXiv 2405.17604)."""
    return name.replace(".", "_")


def _lora(targets: str = QV) -> Adapt:
    def adapt(model: nn.Module, rank: int) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        common = {"target_modules": targets, "modules_to_save": ["head"]}
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=LORA_SCALING * rank, **common))

    return adapt


def _vera(model: nn.Module, rank: int) -> nn.Module:
    from peft import VeraConfig, get_peft_model

    return get_peft_model(model, VeraConfig(r=rank, target_modules=QV, modules_to_save=["head"]))


WAYS = {
    "head": Way("head only", (0,), HEAD_LR, _head, quick=(0,)),
    "lotr": Way("LoTR", (2, 4, 8, 16, 32, 64), 5e-3, _lotr(), quick=(4, 32)),
    "lora": Way(named("lora-peft"), (1, 2, 4, 8, 16), 3e-3, _lora(), quick=(1, 8)),
    "lotr-core": Way("LoTR, cores only", (16, 64), 5e-3, _lotr(train=("core",)), quick=(64,)),
    "lora-xs": Way("LoRA-XS", (8, 32), 5e-3, _lotr(init="svd", group_by=_own_group, train=("core",))),
    "vera": Way(named("vera-peft"), (256,), 1e-2, _vera),
    "lotr-linear": Way("LoTR, all linear layers", (2, 16), 5e-3, _lotr(LINEAR)),
    "lotr-width": Way("LoTR, all linear layers, by width", (2, 16), 5e-3, _lotr(LINEAR, group_by="width")),
    "lotr-gradient": Way("LoTR, from the gradient", (4, 16), 5e-3, _lotr(), from_gradient=True),
    "lotr-diagonal": Way("LoTR, diagonal cores", (16, 64), 5e-3, _lotr(core="diagonal")),
    "lotr-train": Way("LoTR, cores a train", (64,), 5e-3, _lotr(core="train")),
    "lora-linear": Way(f"{named('lora-peft')}, all linear layers", (1, 4), 3e-3, _lora(LINEAR)),
}
