"""SentenceTransformers, which save their modules one by one: the adapter belongs to the transformers model inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["inner_model", "is_of_sentence_transformers"]

# of pretrained.py, which stands above apply.py: the arguments to load the weights in a folder with, and the adapter from there
key_mapping: list[Callable[[Path, dict[str, Any]], dict[str, Any]]] = []
put_on: list[Callable[[nn.Module, Path], nn.Module]] = []


def is_of_sentence_transformers(model: object) -> bool:
    """Whether model is of a class of sentence-transformers, or of one that inherits from it."""
    return any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__)


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a SentenceTransformer or its first module; any other model itself."""
    if not is_of_sentence_transformers(model):
        return model
    inner = getattr(model, "transformers_model", None)
    inner = getattr(model, "auto_model", None) if inner is None else inner
    return inner if isinstance(inner, nn.Module) else model
