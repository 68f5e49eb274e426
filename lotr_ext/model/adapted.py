"""The adapted layers of a model, and their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ..layers.layer import LoTRLayer
from ..layers.sharded import named_modules

__all__ = [
    "adapted_layers",
    "expect_count",
    "expect_merged",
    "layers_in",
    "lotr_parameters",
    "refuse_magnitudes",
    "refuse_starts",
]


def layers_in(model: nn.Module) -> dict[str, LoTRLayer]:
    """As `adapted_layers`, but the result may be empty, as for a stage of a pipeline."""
    return {name: m for name, m in named_modules(model) if isinstance(m, LoTRLayer)}


def adapted_layers(model: nn.Module) -> dict[str, LoTRLayer]:
    """The adapted layers of a model by name, each once, whether it comes from `apply_lotr` or was built by hand.

    Raises:
        TypeError: not an nn.Module. RuntimeError: a model with no adapter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers = layers_in(model)
    if not layers:
        raise RuntimeError(f"model: expected one with a LoTR adapter, got {type(model).__name__} without; apply_lotr adds one")
    return layers


def lotr_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The adapter's trained parameters, for an optimizer: each A, B, core and magnitude that requires grad, once. For a
    parametrized one (torch.nn.utils.parametrize), the parameters that it is computed from.

    Does not contain modules_to_save: `[p for p in model.parameters() if p.requires_grad]` contains both.

    Raises:
        TypeError, RuntimeError: as `adapted_layers`.
    """
    seen: dict[int, nn.Parameter] = {}
    for layer in adapted_layers(model).values():
        for parameter in layer.adapter_parameters():
            if parameter.requires_grad:
                seen.setdefault(id(parameter), parameter)
    return iter(seen.values())


def expect_count(layers: Mapping[str, LoTRLayer], count: int, name: str) -> None:
    """Raises RuntimeError unless there are as many layers as an adapter has cores. name: the caller."""
    if len(layers) != count:
        raise RuntimeError(
            f"{name}: expected the {count} layers that the adapters and tasks were made for, got {len(layers)}; a block was "
            "copied or removed since"
        )


def expect_merged(layers: dict[str, LoTRLayer], merged: bool, name: str) -> None:
    """Raises RuntimeError unless the `merged` of every layer is as given. name: the caller, for the message."""
    for layer_name, layer in layers.items():
        if layer.merged != merged:
            states = ("unmerged", "merged")
            raise RuntimeError(f"{name}: expected {states[merged]} layers, got {layer_name!r}, which is {states[layer.merged]}")


def refuse_magnitudes(layers: Mapping[str, LoTRLayer], name: str) -> None:
    """Raises ValueError for an adapter with magnitudes: with a core per row, each row's lengths differ. name: the caller."""
    for layer_name, layer in layers.items():
        if layer.norms is not None:
            raise ValueError(
                f"{name}: expected an adapter without magnitudes, since rows with different cores have different lengths, "
                f"got {layer_name!r} with magnitudes; adapt with magnitude=False"
            )


def refuse_starts(layers: Mapping[str, LoTRLayer], name: str) -> None:
    """Raises ValueError for an adapter that init "svd" has taken from the weights: they are not the base model's, which rows
    without an adapter and tasks with zero cores compute. name: the caller."""
    for layer_name, layer in layers.items():
        if layer.start_core is not None:
            raise ValueError(
                f'{name}: expected an adapter with another init than "svd", which moves a part of the base weights into the '
                f"adapter, so that rows without one would not be the base model's, got {layer_name!r} with it"
            )
