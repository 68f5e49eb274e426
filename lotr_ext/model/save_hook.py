"""save_pretrained of adapted transformers models: also writes the adapter, for `pretrained.from_pretrained`.

The weights' file contains all tensors of the adapted model, so that Trainer can resume from it. transformers' own
from_pretrained reads the base model's tensors from it and ignores the adapter's.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..layers.layer import LoTRLayer
from ..layers.sharded import holds_parts, whole
from . import adapter_files as files
from . import adapters
from .adapted import expect_merged, layers_in
from .replaced import ReplacedMethod
from .saved import adapter_slots, of_part, ties_of
from .saving import contents, write_adapter

__all__ = ["hook_saving", "of_holders", "tell_holder", "unhook_saving"]

_NAME = "save_pretrained"
of_holders: list[Callable[[nn.Module, nn.Module], None]] = []  # of (adapted model, module that holds it): `holders.py`


class SavePretrained(ReplacedMethod):
    """Replaces save_pretrained of an adapted model, or of a part of it. models: this one, and the whole model, which has the
    factors."""

    name = _NAME

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Calls save_pretrained of the model's class, then writes the adapter into the same directory.

        Raises:
            RuntimeError: tensors in parts without a state_dict; a copied part that is not in its owner; a part whose cores are
                made from parameters that all layers share.
            ValueError: push_to_hub, which would upload no adapter; model.push_to_hub uploads it.
        """
        model, owner = self.model, self.models[1]
        if owner is None or all(module is not model for module in owner.modules()):
            raise RuntimeError(
                f"save_pretrained: expected a part of the model that has the factors, got a {type(model).__name__} outside of "
                "it; save the whole model instead"
            )
        if model is not owner and hasattr(owner, "lotr_cores"):
            raise RuntimeError(
                f"save_pretrained: expected dense cores in the part {type(model).__name__}, got cores made from parameters "
                "that all layers share; save the whole model"
            )
        original = getattr(type(model), _NAME)
        given = inspect.signature(original).bind(model, *args, **kwargs)
        given.apply_defaults()
        settings = given.arguments
        if settings.get("push_to_hub"):
            raise ValueError(
                "push_to_hub: expected False for a model with a LoTR adapter, which would not be uploaded, got True; call "
                "model.push_to_hub(...), which uploads it"
            )
        state = settings.get("state_dict")
        if state is None:  # before transformers writes its first file
            expect_merged(layers_in(model), False, "save_pretrained")
        state = None if state is None else dict(state)  # a copy: transformers removes entries from it
        original(model, *args, **kwargs)
        if settings.get("is_main_process", True):
            _save_beside(owner, model, Path(settings["save_directory"]), state)
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, nn.Module):
            tell_holder(model, caller)


def _save_beside(owner: nn.Module, model: nn.Module, directory: Path, state: dict[str, Any] | None) -> None:
    """Writes the adapter of owner, or of its part `model`, beside the weights that transformers has saved. state: the whole
    tensors."""
    sharded, part = holds_parts(owner), model is not owner
    if sharded and part:
        raise RuntimeError(
            f"save_pretrained: expected whole tensors or the whole model, got its part {type(model).__name__}, held in parts; "
            "call save_adapter for the whole model in every process"
        )
    if sharded and state is None:
        write_adapter(owner, directory)  # without a state_dict every process calls save_pretrained
    elif sharded and not state:  # Trainer with DeepSpeed: an empty state_dict, in process 0 only
        warnings.warn(
            "lotr_ext: save_pretrained wrote no adapter, since state_dict is empty and the model is held in parts: add "
            "AdapterCheckpoint() to Trainer's callbacks, or call save_adapter in every process",
            stacklevel=4,
        )
    else:
        tied = ties_of(owner)
        with whole(owner, adapter_slots(owner), state):
            manifest, tensors = contents(owner, tied=tied)
            if part:
                manifest, tensors = _of_part(manifest, tensors, next(f"{n}." for n, m in owner.named_modules() if m is model))
            files.write(directory, manifest, tensors)
    if hasattr(owner, "lotr_parked") and len(names := adapters.adapter_names(owner)) > 1:
        warnings.warn(
            f"lotr_ext: save_pretrained wrote the adapter {names[0]!r} beside the weights, but not {', '.join(names[1:])}: "
            "call save_adapter(model, directory, name=...) for each",
            stacklevel=4,
        )


def _of_part(manifest: files.Manifest, tensors: dict[str, Tensor], prefix: str) -> tuple[files.Manifest, dict[str, Tensor]]:
    """`of_part` with a config for the part alone, which has copies of the factors."""
    part, found = of_part(manifest, tensors, prefix)
    if (config := part.config) is not None:
        by = config.group_by
        if isinstance(by, Mapping):
            by = {name.removeprefix(prefix): group for name, group in by.items() if name.startswith(prefix)}
        config = replace(config, modules_to_save=part.modules_to_save or None, group_by=by, task_type=None)
    return replace(part, config=config, tied=None), found


def tell_holder(model: nn.Module, holder: nn.Module) -> None:
    """Calls all of `of_holders`: after model was adapted, and when holder saves it."""
    for function in of_holders:
        function(model, holder)


def hook_saving(model: nn.Module) -> None:
    """Installs SavePretrained in an adapted model and in its parts with adapted layers."""
    for module in model.modules():
        savable = all(callable(getattr(type(module), name, None)) for name in (_NAME, "from_pretrained"))
        if savable and any(isinstance(m, LoTRLayer) for m in module.modules()):
            module.__dict__[_NAME] = SavePretrained(module, model)


def unhook_saving(model: nn.Module) -> None:
    """Undoes hook_saving."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_NAME), SavePretrained):
            del module.__dict__[_NAME]
