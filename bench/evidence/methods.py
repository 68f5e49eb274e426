"""The methods by name: what each trains, at which ranks it is measured, and where the search for its learning rate begins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..measure.names import named
from .tasks import Task

HEAD_LR = 1e-2
LOTR_SCALING, LORA_SCALING = "auto", 2.0  # s; LoRA's as in the demo
BASE = "base"  # the frozen model as it is
Ranks = Mapping[str, tuple[int, ...]]  # by kind of task; none: not measured there; 0: has no rank


@dataclass(frozen=True)
class Method:
    """family: "lotr", "peft" (LoRA, DoRA, VeRA), or what is trained whole: "full", "norm", "head", "base". settings: of
    LoTRConfig, or of PEFT's configuration. from_gradient: A and B start from the gradient. quick: its rank in --quick."""

    label: str
    family: str
    ranks: Ranks
    settings: Mapping[str, Any] = field(default_factory=dict)
    from_gradient: bool = False
    quick: int | None = None

    def begins_at(self, kind: str) -> float:
        """The middle of the learning rates that are tried first."""
        special = "vera" if self.settings.get("vera") else self.settings.get("core")
        return FIRST_RATES.get(special, FIRST_RATES[self.family])[kind == "teacher"]

    def definition(self, task: Task) -> dict[str, Any]:
        """What a kept run must have been made with."""
        words = {
            name: value if isinstance(value, str | int | float | bool) else str(value) for name, value in self.settings.items()
        }
        return {"layers": task.layers, "from_gradient": self.from_gradient, **words}


def _ranks(teacher: tuple[int, ...] = (), classifier: tuple[int, ...] = (), language: tuple[int, ...] = ()) -> Ranks:
    return {"teacher": teacher, "classifier": classifier, "language": language}


def _lotr(label: str, ranks: Ranks, from_gradient: bool = False, quick: int | None = None, **own: Any) -> Method:
    return Method(label, "lotr", ranks, {"scaling": LOTR_SCALING, **own}, from_gradient, quick)


CORES = ("core",)
LORA = named("lora-peft")
FIRST_RATES = {  # of a pretrained model, and of the teacher's small net
    "base": (0.0, 0.0),
    "head": (HEAD_LR, HEAD_LR),
    "norm": (5e-3, 5e-3),
    "full": (1e-4, 1e-2),
    "lotr": (5e-3, 5e-2),
    "diagonal": (2e-2, 5e-2),  # a sum over r instead of r^2, which scaling="auto" is made for
    "peft": (2e-3, 2e-2),
    "vera": (1e-2, 2e-2),
}
METHODS = {
    BASE: Method("the model as it is", "base", _ranks((0,), (), (0,)), quick=0),
    "head": Method("head only", "head", _ranks((), (0,), ()), quick=0),
    "full": Method("full fine-tuning", "full", _ranks((0,), (0,), (0,)), quick=0),
    "norm": Method("norms only", "norm", _ranks((), (0,), (0,))),
    "lotr": _lotr("LoTR", _ranks((1, 2, 4, 8, 16), (4, 8, 16, 28), (4, 24, 60)), quick=8),
    "lotr-width": _lotr("LoTR, by width", _ranks((), (16,), (28,)), group_by="width"),
    "lotr-name": _lotr("LoTR, by name", _ranks((), (16,), ()), group_by="name"),
    "lotr-block": _lotr("LoTR, by block", _ranks((), (1, 5), (6,)), group_by="block"),
    "lotr-core": _lotr("LoTR, cores only", _ranks((8, 16), (64,), (32,)), train=CORES),
    "lotr-core-gradient": _lotr(
        "LoTR, cores only, from the gradient", _ranks((8, 16), (64,), (32,)), train=CORES, from_gradient=True
    ),
    "lotr-gradient": _lotr("LoTR, from the gradient", _ranks((4, 8), (8, 16), ()), from_gradient=True),
    "lotr-diagonal": _lotr("LoTR, diagonal cores", _ranks((5, 11, 16, 22, 45), (8,), (48,)), core="diagonal"),
    "lotr-tucker": _lotr("LoTR, cores of a common basis", _ranks((8,), (), ()), core="tucker"),
    "lotr-train": _lotr("LoTR, cores a train", _ranks((8,), (), ()), core="train"),
    "lotr-few": _lotr("LoTR, few numbers a core", _ranks((8,), (32,), (32,)), core="few", train=CORES),
    "lora": Method(LORA, "peft", _ranks((1, 2, 4, 8), (1, 4, 8, 32), (1, 4, 16)), quick=2),
    "dora": Method(named("dora-peft"), "peft", _ranks((1, 4), (1,), (1,)), {"use_dora": True}),
    "lotr-magnitude": _lotr("LoTR with magnitudes", _ranks((4, 8), (16,), (24,)), magnitude=True),
    "lora-xs": _lotr("LoRA-XS", _ranks((8,), (32,), (32,)), init="svd", group_by="layer", train=CORES),
    "vera": Method(named("vera-peft"), "peft", _ranks((64,), (256,), (256,)), {"vera": True}),
}  # fmt: skip
MAIN: Mapping[str, Mapping[str, tuple[int, ...]]] = {  # by kind: what a task without all methods is measured with
    "classifier": {"head": (0,), "full": (0,), "lotr": (4, 16), "lora": (1, 4)},
    "language": {BASE: (0,), "full": (0,), "lotr": (4, 24, 60), "lotr-block": (6,), "lotr-diagonal": (48,), "lora": (1, 4)},
}


def _own_group(name: str, module: nn.Module) -> str:
    """A group a layer: with factors from the layer's own weight, and the core alone trained, LoRA-XS (arXiv 2405.17604)."""
    return name.replace(".", "_")


def measured(task: Task) -> list[tuple[str, int]]:
    """The methods and ranks that a task is measured with."""
    if not task.all_methods:
        return [(name, rank) for name, ranks in MAIN[task.kind].items() for rank in ranks]
    return [(name, rank) for name, method in METHODS.items() for rank in method.ranks[task.kind]]


def reference(task: Task) -> str:
    """What the gain of a method is counted from: the new head alone, or without one the model as it is."""
    return BASE if not METHODS["head"].ranks[task.kind] else "head"


def check(name: str, task: Task) -> None:
    """Raises ValueError for a method that cannot be on this task."""
    method = METHODS[name]
    if method.family == "head" and not METHODS["head"].ranks[task.kind]:
        raise ValueError(
            f"method: expected a task whose model has a new head for 'head', got {task.name}, without; take 'base'"
        )
    if method.family == "norm" and not task.norms:
        raise ValueError(f"method: expected a task whose model has norms for 'norm', got {task.name}, without; leave it out")


def adapt(model: nn.Module, task: Task, name: str, rank: int) -> nn.Module:
    """Freezes a fresh model but for its new head and adds what the method trains. Returns the module to train."""
    method = METHODS[name]
    check(name, task)
    targets, save = task.layers, ["head"] if hasattr(model, "head") else None
    own = dict(method.settings)
    if method.family == "lotr":
        from lotr_ext import LoTRConfig, apply_lotr

        if own.get("group_by") == "layer":
            own["group_by"] = _own_group
        return apply_lotr(model, LoTRConfig(rank=rank, target_modules=targets, modules_to_save=save, **own))
    if method.family == "peft":
        from peft import LoraConfig, VeraConfig, get_peft_model

        common = {"r": rank, "target_modules": targets, "modules_to_save": save}
        if own.pop("vera", False):
            return get_peft_model(model, VeraConfig(**common, **own))
        return get_peft_model(model, LoraConfig(lora_alpha=LORA_SCALING * rank, **common, **own))
    trained = {"full": targets, "norm": task.norms}.get(method.family)
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            whole = trained is not None and re.fullmatch(trained, module_name) is not None
            parameter.requires_grad_(whole or (save is not None and module_name == "head"))
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # bfloat16 would round Adam's small steps away
    return model
