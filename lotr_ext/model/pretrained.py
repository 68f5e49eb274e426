"""Loads adapted transformers models that save_pretrained or Trainer wrote: the weights, and the adapter beside them."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ..layers.merging import write_
from . import adapter_files as files
from .loading import load_adapter

__all__ = ["from_pretrained", "key_mapping", "put_on"]


def from_pretrained(model_class: type, directory: str | PathLike[str], *args: Any, **kwargs: Any) -> nn.Module:
    """Loads an adapted model that save_pretrained or Trainer wrote: calls model_class.from_pretrained, then loads the adapter.

    Args:
        model_class: a class of transformers, or one of its Auto classes.
        directory: with the weights and the adapter.
        *args: for model_class.from_pretrained.
        **kwargs: for model_class.from_pretrained, which reports the adapter's tensors in the weights as unexpected.

    Raises:
        ValueError: no adapter in the directory, or weights that were later saved without one. Otherwise as `load_adapter` and
            model_class.from_pretrained.
    """
    path = Path(directory)
    files.read(path)  # raises for an invalid adapter before anything is loaded
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
            f"directory: expected weights saved together with their adapter, got {path}, whose weights contain none of its "
            "tensors, as after a merge; load the base model and call load_adapter(model, directory)"
        )
    if any(".base_layer." in key for key in keys):  # wrapped layers
        return kwargs | {"key_mapping": {**(kwargs.get("key_mapping") or {}), r"\.base_layer\.": "."}}
    return kwargs


def put_on(model: nn.Module, path: Path) -> nn.Module:
    """Loads the adapter in path into a model with the weights in path. Returns the model."""
    manifest, tensors = files.read(path)
    layers = dict(model.named_modules())
    started = [name for name in manifest.layers if f"{name}.start_core" in tensors]
    kept = {name: layers[name].weight.detach().clone() for name in started if name in layers}
    load_adapter(model, path)
    for name, weight in kept.items():  # the start was subtracted before they were saved, and load_adapter subtracts it again
        write_(model.get_submodule(name).weight, weight)
    return model
