"""Adapted transformers models from what save_pretrained or Trainer wrote: the weights, and the adapter beside them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..layers.merging import write_
from ..layers.sharded import holds_parts, whole
from . import adapter_files as files
from . import adapters, save_hook, stages
from .checkpoint import contents, load_adapter, save_adapter
from .saved import adapter_slots

__all__ = ["from_pretrained"]


def from_pretrained(model_class: type, directory: str | PathLike[str], *args: Any, **kwargs: Any) -> nn.Module:
    """An adapted model that save_pretrained or Trainer has written: model_class.from_pretrained, then the adapter beside it.

    Args:
        model_class: of transformers, an Auto class too.
        directory: with the weights and the adapter.
        *args: for model_class.from_pretrained.
        **kwargs: the same. It reports the adapter's own tensors among the weights as unexpected.

    Raises:
        ValueError: no adapter there, or weights that were saved without one after it. Else as `load_adapter`, and what
            model_class.from_pretrained raises.
    """
    path = Path(directory)
    files.read(path)  # says what is wrong with the adapter before anything is loaded
    kwargs = key_mapping(path, kwargs)
    return put_on(model_class.from_pretrained(directory, *args, **kwargs), path)


def key_mapping(path: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of transformers' from_pretrained with which it reads the base model's weights in path.

    Raises:
        ValueError: weights that were saved without an adapter.
    """
    from safetensors import safe_open

    keys: set[str] = set()
    for file in path.glob("*.safetensors"):
        if not file.name.startswith("lotr_adapter."):
            with safe_open(file, "pt") as weights:
                keys.update(weights.keys())
    if not any(".core" in key or ".parametrizations.core." in key for key in keys):
        raise ValueError(
            f"directory: expected weights saved together with their adapter, got {path}, whose weights have none of its "
            "tensors: they were saved without it, perhaps merged; load_adapter(model, directory) puts it onto a base model"
        )
    if any(".base_layer." in key for key in keys):  # wrapped layers
        return kwargs | {"key_mapping": {**(kwargs.get("key_mapping") or {}), r"\.base_layer\.": "."}}
    return kwargs


def put_on(model: nn.Module, path: Path) -> nn.Module:
    """Puts the adapter in path onto a model with the weights in path. Returns the model."""
    manifest, tensors = files.read(path)
    layers = dict(model.named_modules())
    started = [name for name in manifest.layers if f"{name}.start_core" in tensors]
    kept = {name: layers[name].weight.detach().clone() for name in started if name in layers}
    load_adapter(model, path)
    for name, weight in kept.items():  # which had lost the start when it was saved, and need not lose it again
        write_(model.get_submodule(name).weight, weight)
    return model


def save_beside(owner: nn.Module, model: nn.Module, directory: Path, state: dict[str, Any] | None) -> None:
    """Writes an adapted model's adapter, or that of a part of owner, beside the weights that transformers has saved. state: the
    whole tensors."""
    sharded, part = holds_parts(owner), model is not owner
    if sharded and part:
        raise RuntimeError(
            f"save_pretrained: expected whole tensors or the whole model, got its part {type(model).__name__}, held in parts; "
            "call save_adapter for the whole one in every process"
        )
    if sharded and state is None:
        save_adapter(owner, directory)  # every process is here
    elif sharded and not state:  # Trainer's, in process 0 alone, where DeepSpeed writes a checkpoint of its own instead
        warnings.warn(
            "lotr_ext: save_pretrained wrote no adapter, for state_dict is empty and the model is held in parts: add "
            "AdapterCheckpoint() to Trainer's callbacks, or call save_adapter in every process",
            stacklevel=4,
        )
    else:
        with whole(owner, adapter_slots(owner), state):
            manifest, tensors = contents(owner)
            if part:
                manifest, tensors = _of_part(manifest, tensors, next(f"{n}." for n, m in owner.named_modules() if m is model))
            files.write(directory, manifest, tensors)
    if hasattr(owner, "lotr_parked") and len(names := adapters.adapter_names(owner)) > 1:
        warnings.warn(
            f"lotr_ext: save_pretrained wrote the adapter {names[0]!r} beside the weights, and not {', '.join(names[1:])}: "
            "save_adapter(model, directory, name=...) writes each",
            stacklevel=4,
        )


def _of_part(manifest: files.Manifest, tensors: dict[str, Tensor], prefix: str) -> tuple[files.Manifest, dict[str, Tensor]]:
    """What a file has of the part whose names begin with prefix: its layers by their names there, and the factors they use."""

    def inside(named: Mapping[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}

    layers, config = inside(manifest.layers), manifest.config
    saved = tuple(inside(dict.fromkeys(manifest.modules_to_save)))
    factors = (entry.factors if isinstance(entry.factors, tuple) else (entry.factors,) for entry in layers.values())
    owners = tuple(f"{one}." for several in factors for one in several)
    found = inside(tensors) | {name: tensor for name, tensor in tensors.items() if name.startswith(owners)}
    if config is not None:
        by = inside(config.group_by) if isinstance(config.group_by, Mapping) else config.group_by
        config = replace(config, modules_to_save=saved or None, group_by=by, task_type=None)
    return files.Manifest(config, layers, saved, inside(manifest.base)), found


save_hook.write_beside[:] = [save_beside]
stages.key_mapping[:], stages.put_on[:] = [key_mapping], [put_on]
