"""What an adapter takes along beside its own tensors: the model's modules_to_save."""

from __future__ import annotations

from torch import Tensor, nn

from .config import LoTRConfig
from .targets import name_ends_with

__all__ = ["saved_modules", "saved_tensors"]


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are trained whole beside the adapter, by name."""
    config = getattr(model, "lotr_config", None)
    endings = config.modules_to_save if isinstance(config, LoTRConfig) and config.modules_to_save else ()
    named = ((name, m) for name, m in model.named_modules() if not name.startswith(("lotr_factors", "lotr_parked")))
    return {name: m for name, m in named if name and any(name_ends_with(name, e) for e in endings)}


def saved_tensors(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers by full name; tied ones under their first name only."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        for key, value in module.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"modules_to_save: expected tensors in state_dict, got {name}.{key} ({type(value).__name__})")
            if id(value) not in seen:
                seen.add(id(value))
                tensors[f"{name}.{key}"] = value
    return tensors
