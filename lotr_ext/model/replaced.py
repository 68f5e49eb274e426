"""Callables that stand in for a method of a model."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

__all__ = ["ReplacedMethod"]


class ReplacedMethod:
    """Base class. A subclass defines __call__, and `name`, the method's. models: the model whose attribute this is, and others.

    Holds weak references: in a reference cycle the model's memory would be freed only by the garbage collector.
    """

    name: str

    def __init__(self, *models: nn.Module):
        self._models = tuple(map(weakref.ref, models))

    @property
    def models(self) -> tuple[nn.Module | None, ...]:
        """The models, None for one that was freed."""
        return tuple(model() for model in self._models)

    @property
    def model(self) -> nn.Module:
        """The model whose attribute this is. Raises RuntimeError if it was freed."""
        model = self.models[0]
        if model is None:
            raise RuntimeError(f"{self.name}: expected a model that is still referenced, got one that was freed")
        return model

    def __reduce__(self):
        return type(self), self.models

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplacedMethod:
        return type(self)(*(memo.get(id(model), model) for model in self.models))
