"""The adapted layers of a model, and what the model registers with them.

    model.lotr_factors      each A and B once
    model.lotr_cores        parameters from which several cores are computed
    model.lotr_tasks        a TaskBank
    model.lotr_config       the LoTRConfig
    model.lotr_left_out     the layers that the configuration matches and that have no adapter

The adapted layers refer to the factors and cores and do not register them. A TaskBank refers to the
layers.

Not here: making them (model.py, tasks.py) and what a layer computes (layers.py).
"""

from typing import TypeVar

from torch import nn

from .factors import set_unregistered
from .layers import LoTRLayer

Model = TypeVar("Model", bound=nn.Module)

# Modules that count their children, iterate over them, or call them one after another, and so must
# not get another child.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ATTRIBUTES = ("lotr_factors", "lotr_cores", "lotr_tasks", "lotr_config", "lotr_left_out")


class Attachment(nn.Module):
    """A module with further cores for the layers of an adapted model, such as a TaskBank.

    Its parameters count as the adapter's. `detach_all` calls `on_detach`.
    """

    def on_detach(self) -> None:
        """Removes what the module has added elsewhere, such as hooks."""


def attached_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of the attachments of a model, and of adapted models inside it."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, Attachment)
        for parameter in module.parameters()
    ]


def layers_in(model: nn.Module) -> dict[str, LoTRLayer]:
    """Returns the adapted layers of a model by name, each once. Empty if it has no adapter."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoTRLayer)}


def adapted_layers(model: nn.Module) -> dict[str, LoTRLayer]:
    """Returns the adapted layers by name, of a model from `apply_lotr` or one built by hand.

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


def unmerged_layers(model: nn.Module, caller: str) -> dict[str, LoTRLayer]:
    """Returns the adapted layers of a model by name, and checks that none is merged.

    Args:
        model: The model.
        caller: The public function that the message names.

    Raises:
        RuntimeError: If the model has no adapter, or a layer is merged.
    """
    layers = adapted_layers(model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(
            f"{caller}: expected unmerged layers, got {merged[0]!r}, which is merged. Call "
            f"unmerge(model) first."
        )
    return layers


def attach(model: nn.Module, name: str, module: nn.Module) -> None:
    """Registers a module of the adapter with an adapted model, as `model.<name>`.

    If the model is a container, another module inside it registers the module, and `model.<name>`
    is a plain reference.

    Args:
        model: An adapted model.
        name: One of the attributes above.
        module: The module.
    """
    owner = _owner(model)
    if owner is not model:
        set_unregistered(model, name, module)
    setattr(owner, name, module)


def detach_all(model: nn.Module) -> None:
    """Takes off what was attached to a model and to adapted models inside it."""
    for module in list(model.modules()):
        for name in _ATTRIBUTES:
            # Not getattr: a wrapper passes names on to the model that it wraps. A registered module
            # is in _modules; a configuration and the plain reference of a container are in vars.
            attached = vars(module).get(name, module._modules.get(name))
            if isinstance(attached, Attachment):
                attached.on_detach()
            if attached is not None:
                delattr(module, name)


def _owner(model: nn.Module) -> nn.Module:
    """Returns the module that registers what is attached to an adapted model.

    It is the model, unless the model is a container. A container must not get another child:
    nn.Sequential would call it, and sentence-transformers would save it as a step of its pipeline.
    Then it is the innermost module around the first adapted layer that is not a container, or that
    layer if there is none: the block in Sequential(block(layer)), the layer in Sequential(layer).
    """
    name, layer = next(iter(adapted_layers(model).items()))
    owner = model
    while isinstance(owner, _CONTAINERS) and name:
        name = name.rpartition(".")[0]
        owner = model.get_submodule(name)
    # If there are only containers around the layer, the walk ends at the model.
    return layer if isinstance(owner, _CONTAINERS) else owner
