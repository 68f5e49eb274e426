"""The forward scope of an adapted model: what may be computed once for all layers of a group while one forward runs."""

from __future__ import annotations

from torch import nn


def attach_scope(model: nn.Module) -> None:
    """Opens a scope around each forward of model."""


def detach_scope(model: nn.Module) -> None:
    """Undoes attach_scope."""
