"""SentenceTransformers save their modules one by one, so the adapter belongs to the transformers model inside."""

from __future__ import annotations

from torch import nn

__all__ = ["inner_model", "is_of_sentence_transformers"]


def is_of_sentence_transformers(model: object) -> bool:
    """Whether model's class is from sentence-transformers, or inherits from one."""
    return any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__)


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a SentenceTransformer or its first module; any other model itself."""
    if not is_of_sentence_transformers(model):
        return model
    inner = getattr(model, "transformers_model", None)
    inner = getattr(model, "auto_model", None) if inner is None else inner
    return inner if isinstance(inner, nn.Module) else model
