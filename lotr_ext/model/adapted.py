"""The adapted layers of a model, and their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ..layers.layer import LoTRLayer
from ..layers.sharded import named_modules

__all__ = ["adapted_layers", "expect_merged", "layers_in", "lotr_parameters", "refuse_magnitudes"]


def layers_in(model: nn.Module) -> dict[str, LoTRLayer]:
    """As `adapted_layers`, of a model that may have none, like a stage of a pipeline."""
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
    """The adapter's trained parameters, for an optimizer: each A, B, core and magnitude once, those that require grad; of a
    parametrized one (torch.nn.utils.parametrize) the parameters that it is computed from.

    modules_to_save are not among them: `[p for p in model.parameters() if p.requires_grad]` has both.

    Raises:
        TypeError, RuntimeError: as `adapted_layers`.
    """
    seen: dict[int, nn.Parameter] = {}
    for layer in adapted_layers(model).values():
        for parameter in layer.adapter_parameters():
            if parameter.requires_grad:
                seen.setdefault(id(parameter), parameter)
    return iter(seen.values())


def expect_merged(layers: dict[str, LoTRLayer], merged: bool, name: str) -> None:
    """RuntimeError unless all layers are merged, or none is. name: the caller's, for the message."""
    for layer_name, layer in layers.items():
        if layer.merged != merged:
            states = ("unmerged", "merged")
            raise RuntimeError(f"{name}: expected {states[merged]} layers, got {layer_name!r}, which is {states[layer.merged]}")


def refuse_magnitudes(layers: Mapping[str, LoTRLayer], name: str) -> None:
    """ValueError for an adapter with magnitudes, where rows have cores, and so lengths, of their own. name: the caller's."""
    for layer_name, layer in layers.items():
        if layer.norms is not None:
            raise ValueError(
                f"{name}: expected an adapter without magnitudes, for rows with cores of their own have lengths of their own, "
                f"got {layer_name!r} with; adapt with magnitude=False"
            )
