"""Counts the adapted and trained parameters of a model."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from ..autograd.tensor_parallel import is_dtensor
from ..layers.hosted import LoTRHostedExperts
from ..layers.quantized import base_format
from ..layers.wrapped import LoTRWrapped
from ..ops.grouped import Packed
from .adapted import adapted_layers
from .config import LoTRConfig
from .stages import inner_model
from .targets import left_out

__all__ = ["TrainableSummary", "trainable_summary"]


class TrainableSummary(NamedTuple):
    """Counts of parameters. adapter: A, B, cores and magnitudes; trained: all that require grad; total: the model with its
    adapter.

    layers: adapted layers; groups: (in_features, out_features, rank) of each pair of factors; left_out: (name, reason) of each
    layer that "all-linear" or a regular expression matched but that was not adapted; formats: (name, format) of each adapted
    quantised layer; parts: (name, shape, shape in this process) of each adapted DTensor weight. str() gives a readable report.
    """

    adapter: int
    trained: int
    total: int
    layers: int
    groups: tuple[tuple[int, int, int | tuple[int, int]], ...]
    left_out: tuple[tuple[str, str], ...] = ()
    formats: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    def __str__(self) -> str:
        pairs = ", ".join(f"{k}x{n} at rank {rank}" for k, n, rank in self.groups)
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out:
            reasons.setdefault(reason, []).append(name)
        lines = (
            f"\nleft out: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({reason})"
            for reason, names in reasons.items()
        )
        counts = Counter(format for _, format in self.formats)
        quantised = f"\nquantised: {', '.join(f'{count} x {name}' for name, count in counts.items())}" if counts else ""
        cuts = Counter(f"W {whole} here {here}" for _, whole, here in self.parts)
        parts = f"\nin parts: {', '.join(f'{count} x {name}' for name, count in cuts.items())}" if cuts else ""
        return (
            f"LoTR: {self.layers} layers, {len(self.groups)} pair{'s' * (len(self.groups) != 1)} of factors ({pairs}), "
            f"{self.adapter:,} adapter parameters; trained {self.trained:,} of {self.total:,} ({self.trained / self.total:.4%})"
        ) + "".join((quantised, parts, *lines))


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Counts adapted and trained parameters and lists the layers that were left out; print it for a report.

    An adapter of S layers of width d has S r^2 + 2 r d parameters per group.

    Raises:
        TypeError: no nn.Module. RuntimeError: a model with no adapter.
    """
    named = adapted_layers(model)
    layers = named.values()
    factors = {id(layer.factors): layer.factors for layer in layers}
    adapter = {id(p): p.numel() for layer in layers for p in layer.adapter_parameters()}
    parameters = {id(p): p for p in model.parameters()}
    inner = inner_model(model)
    config = getattr(inner, "lotr_config", None)
    return TrainableSummary(
        adapter=sum(adapter.values()),
        trained=sum(p.numel() for p in parameters.values() if p.requires_grad),
        total=sum(p.numel() for p in parameters.values()),
        layers=len(layers),
        groups=tuple((f.in_features, f.out_features, f.rank) for f in factors.values()),
        left_out=tuple(left_out(inner, config).items()) if isinstance(config, LoTRConfig) else (),
        formats=tuple((name, found) for name, layer in named.items() if (found := _format(layer)) is not None),
        parts=tuple(
            (name, tuple(weight.shape), tuple(weight.to_local().shape))
            for name, layer in named.items()
            if is_dtensor(weight := getattr(layer, "weight", None))
        ),
    )


def _format(layer: nn.Module) -> str | None:
    if isinstance(layer, LoTRHostedExperts):
        return weight.format if isinstance(weight := layer.weight, Packed) else None
    return base_format(layer.base_layer) if isinstance(layer, LoTRWrapped) else None
