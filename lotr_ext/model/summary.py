"""How much of a model is adapted and trained."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .apply import adapted_layers

__all__ = ["TrainableSummary", "trainable_summary"]


class TrainableSummary(NamedTuple):
    """Counts of parameters. adapter: A, B and cores; trained: all that require grad; total: the model with its adapter.

    layers: adapted layers; groups: (in_features, out_features, rank) of each pair of factors.
    """

    adapter: int
    trained: int
    total: int
    layers: int
    groups: tuple[tuple[int, int, int | tuple[int, int]], ...]

    def __str__(self) -> str:
        pairs = ", ".join(f"{k}x{n} at rank {rank}" for k, n, rank in self.groups)
        return (
            f"LoTR: {self.layers} layers, {len(self.groups)} pair{'s' * (len(self.groups) != 1)} of factors ({pairs}), "
            f"{self.adapter:,} adapter parameters; trained {self.trained:,} of {self.total:,} ({self.trained / self.total:.4%})"
        )


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Prints one line on what is adapted and trained, and returns the counts.

    An adapter of S layers of width d has S r^2 + 2 r d parameters a group.

    Raises:
        TypeError: no nn.Module. RuntimeError: a model with no adapter.
    """
    layers = adapted_layers(model).values()
    factors = {id(layer.factors): layer.factors for layer in layers}
    adapter = sum(f.A.numel() + f.B.numel() for f in factors.values()) + sum(layer.core.numel() for layer in layers)
    parameters = {id(p): p for p in model.parameters()}
    summary = TrainableSummary(
        adapter=adapter,
        trained=sum(p.numel() for p in parameters.values() if p.requires_grad),
        total=sum(p.numel() for p in parameters.values()),
        layers=len(layers),
        groups=tuple((f.in_features, f.out_features, f.rank) for f in factors.values()),
    )
    print(summary)
    return summary
