"""Modules that read the weight of a linear layer and do not call it, so that an adapter is ignored.

nn.MultiheadAttention              reads out_proj.weight: that layer cannot be adapted
nn.TransformerEncoderLayer         its fast path reads linear1 and linear2: turned off
nn.TransformerEncoder              makes nested tensors for that fast path: turned off
"""

from __future__ import annotations

from torch import nn

from .layers import LoTRLayer

__all__ = ["fast_paths", "why_not_called"]

# The attributes on which the fast paths depend. Nothing else reads them.
_FAST_PATH_ATTRIBUTES = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


def why_not_called(parent: nn.Module, child: str) -> str | None:
    """Returns why parent does not call its linear layer of this name, None if nothing is known."""
    if child == "out_proj" and isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and does not call it"
    return None


def fast_paths(model: nn.Module, *, on: bool, adapted: type[nn.Module] = LoTRLayer) -> None:
    """Turns the fast paths of modules with adapted layers off, or on again.

    Args:
        model: The model.
        on: Whether to restore them.
        adapted: The class of adapted layers.
    """
    for module in model.modules():
        attribute = _fast_path_attribute(module)
        if attribute is None:
            continue
        if on and "lotr_fast_path" in vars(module):
            setattr(module, attribute, vars(module).pop("lotr_fast_path"))
        elif not on and any(isinstance(child, adapted) for child in module.modules()):
            module.lotr_fast_path = getattr(module, attribute)
            setattr(module, attribute, False)


def _fast_path_attribute(module: nn.Module) -> str | None:
    for cls, attribute in _FAST_PATH_ATTRIBUTES.items():
        if isinstance(module, cls) and hasattr(module, attribute):
            return attribute
    return None
