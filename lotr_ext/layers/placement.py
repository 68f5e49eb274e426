"""The device of a layer's tensors: where they are, or with accelerate's offloading, where they are moved for a
forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

__all__ = ["check_not_offloaded", "home"]


def _hooks(module: nn.Module) -> Iterator[object]:
    """accelerate's hooks of a module: one hook, which may be a sequence."""
    hook = getattr(module, "_hf_hook", None)
    yield from () if hook is None else getattr(hook, "hooks", (hook,))


def home(module: nn.Module) -> torch.device:
    """The device of a module's first tensor; if accelerate offloads it, the device to which it is moved for a forward."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    if device.type == "meta":
        brought_to = (getattr(hook, "execution_device", None) for hook in _hooks(module))
        device = next((torch.device(found) for found in brought_to if found is not None), device)
    return device


def check_not_offloaded(parts: Iterable[tuple[nn.Module, str]]) -> None:
    """Refuses to train parameters that accelerate offloads: each forward creates new ones, and their gradients would be lost.

    parts: the modules that have A, B and the cores, and the names in them.

    Raises:
        RuntimeError: a trained parameter on the meta device in a module with accelerate's offloading hook.
    """
    trained = [module._parameters.get(name) for module, name in parts]
    if True not in [t is not None and t.is_meta for t in trained]:
        return  # this runs in each forward; a computed core is not a parameter, and is never offloaded
    for module, _ in parts:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and parameter.requires_grad and any(getattr(h, "offload", False) for h in _hooks(module)):
                raise RuntimeError(
                    f"{type(module).__name__}.{name}: expected a trained parameter in memory, got one that accelerate offloads "
                    "and whose gradient would be lost; dispatch the base model first and call apply_lotr after that, or keep "
                    "lotr_factors and the adapted layers out of the offloaded part of device_map"
                )
