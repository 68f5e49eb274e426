"""save_pretrained of adapted transformers models: the adapter goes beside the weights, for `pretrained.from_pretrained`.

The weights' file has all of an adapted model's tensors, so that Trainer resumes from it; transformers' own from_pretrained
takes the base model's from it and leaves the adapter's out.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..layers.layer import LoTRLayer
from .stages import is_of_sentence_transformers

__all__ = ["hook_saving", "name_loader", "unhook_saving"]

_NAME = "save_pretrained"
# that of pretrained.py, above apply.py: of the factors' owner, what is saved, where, and the whole tensors if they are given
write_beside: list[Callable[[nn.Module, nn.Module, Path, dict[str, Any] | None], None]] = []


class SavePretrained:
    """In the place of save_pretrained of an adapted model, or of its part. owner: the whole model, which has the factors.

    It keeps no model alive: in a circle of references a model and its memory would wait for the garbage collector.
    """

    def __init__(self, model: nn.Module, owner: nn.Module):
        self.model, self.owner = weakref.ref(model), weakref.ref(owner)

    def __reduce__(self):
        return SavePretrained, (self.model(), self.owner())

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        return SavePretrained(*(memo.get(id(m), m) for m in (self.model(), self.owner())))

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """As the model's class's; then the adapter, in the same directory.

        Raises:
            RuntimeError: tensors in parts that state_dict lacks; a copied part, which its owner does
                not have; a part whose cores are made of what all layers share.
            ValueError: push_to_hub, which would leave the adapter behind: model.push_to_hub does not.
        """
        model, owner = self.model(), self.owner()
        if model is None:
            raise RuntimeError("save_pretrained: expected a model that is held in a variable, got one that is gone by now")
        if owner is None or all(module is not model for module in owner.modules()):
            raise RuntimeError(
                f"save_pretrained: expected a part of the model that has the factors, got a {type(model).__name__} outside of "
                "it; copy and save the whole model"
            )
        if model is not owner and hasattr(owner, "lotr_cores"):
            raise RuntimeError(
                f"save_pretrained: expected cores of their own in the part {type(model).__name__}, got some that are made of "
                "what all layers share; save the whole model"
            )
        original = getattr(type(model), _NAME)
        given = inspect.signature(original).bind(model, *args, **kwargs)
        given.apply_defaults()
        settings = given.arguments
        if settings.get("push_to_hub"):
            raise ValueError(
                "push_to_hub: expected False for a model with a LoTR adapter, which would not go along, got True; call "
                "model.push_to_hub(...), which takes it"
            )
        state = settings.get("state_dict")
        state = None if state is None else dict(state)  # transformers takes out what it leaves out
        original(model, *args, **kwargs)
        if settings.get("is_main_process", True):
            write_beside[0](owner, model, Path(settings["save_directory"]), state)
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, nn.Module):
            name_loader(model, caller)


def name_loader(model: nn.Module, holder: nn.Module) -> None:
    """Tells a module of sentence-transformers that its model is adapted: a SentenceTransformer writes down by which class each
    module is to be loaded. Where the model alone was adapted, that module is known only as the caller of save_pretrained."""
    if is_of_sentence_transformers(holder) and any(child is model for child in holder.children()):
        from .sentence_transformers import load_with_adapter

        load_with_adapter(holder)


def hook_saving(model: nn.Module) -> None:
    """Puts SavePretrained into an adapted model, and into its parts that hold adapted layers."""
    for module in model.modules():
        savable = all(callable(getattr(type(module), name, None)) for name in (_NAME, "from_pretrained"))
        if savable and any(isinstance(m, LoTRLayer) for m in module.modules()):
            module.__dict__[_NAME] = SavePretrained(module, model)


def unhook_saving(model: nn.Module) -> None:
    """Undoes hook_saving."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_NAME), SavePretrained):
            del module.__dict__[_NAME]
