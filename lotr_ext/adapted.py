"""The adapted layers of a model: how the rest of the package finds and checks them.

Not here: making them (model.py) and what they compute (layers.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import nn

from .layers import LoTRLayer

__all__ = ["adapted_layers", "compute_device", "expect_unmerged", "layers_in"]


def layers_in(model: nn.Module) -> dict[str, LoTRLayer]:
    """Returns the adapted layers of a model by name, each once. Empty if it has no adapter."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoTRLayer)}


def adapted_layers(model: nn.Module) -> dict[str, LoTRLayer]:
    """Returns the adapted layers of a model from `apply_lotr` or built by hand, by name.

    Raises:
        RuntimeError: If the model has no adapter.
    """
    layers = layers_in(model)
    if not layers:
        raise RuntimeError(
            f"model: expected one with a LoTR adapter, got {type(model).__name__} without. "
            f"apply_lotr adds one."
        )
    return layers


def expect_unmerged(layers: Mapping[str, LoTRLayer], caller: str) -> None:
    """Checks that no layer is merged.

    Args:
        layers: Layers by name.
        caller: The public function that the message names.

    Raises:
        RuntimeError: If a layer is merged.
    """
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(
            f"{caller}: expected unmerged layers, got {merged[0]!r}, which is merged. Call "
            f"unmerge(model) first."
        )


def compute_device(module: nn.Module) -> torch.device:
    """Returns the device on which a module computes.

    It is the device of its tensors. accelerate keeps those of an offloaded module on the meta
    device between two forwards, and moves them to the device of its hook for each.
    """
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    hook = getattr(module, "_hf_hook", None)
    if device.type == "meta" and hook is not None:
        return torch.device(hook.execution_device)
    return device
