"""Parameter groups of an adapted model for an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.checks import check_number
from ..layers.parametrized import parameters_of
from .adapted import adapted_layers

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    *,
    core_lr: float | None = None,
    factor_lr: float | None = None,
    magnitude_lr: float | None = None,
    other_lr: float | None = None,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """All trained parameters of an adapted model in up to four groups for an optimizer: "cores", "factors" (A and B),
    "magnitudes", and "other" (modules_to_save, such as a new head, and all else that requires grad). Each group has its name
    under "name". Magnitudes get no weight decay, which would shrink the frozen weight.

    Pass the list to any optimizer that takes groups. transformers' Trainer and TRL's trainers accept the optimizer and apply
    their schedule to all groups: `Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-3)), None))`.

    Args:
        model: from `apply_lotr`, or built by hand from adapted layers.
        lr: the learning rate of each group without its own. None: the optimizer's.
        core_lr: of the cores.
        factor_lr: of A and B.
        magnitude_lr: of the magnitudes. None: that of the cores.
        other_lr: of the rest.
        weight_decay: of all groups except the magnitudes. None: the optimizer's.

    Raises:
        TypeError, ValueError: a rate that is no number or negative. TypeError, RuntimeError: as `lotr_parameters`.
    """
    rates = {"lr": lr, "core_lr": core_lr, "factor_lr": factor_lr, "magnitude_lr": magnitude_lr, "other_lr": other_lr}
    given = {**rates, "weight_decay": weight_decay}
    for name, value in given.items():
        if value is not None:
            check_number(name, value)
            if value < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    kinds: dict[int, str] = {}
    for layer in adapted_layers(model).values():
        kinds |= {id(p): "cores" for p in parameters_of(layer, "core")}
        kinds |= {id(p): "magnitudes" for p in parameters_of(layer, "magnitude")}
        kinds |= {id(p): "factors" for module, part in layer.factors.owners for p in parameters_of(module, part)}
    groups, of_m = [], core_lr if magnitude_lr is None else magnitude_lr
    for kind, rate in (("cores", core_lr), ("factors", factor_lr), ("magnitudes", of_m), ("other", other_lr)):
        parameters = [p for p in model.parameters() if p.requires_grad and kinds.get(id(p), "other") == kind]
        settings = {"lr": lr if rate is None else rate, "weight_decay": 0.0 if kind == "magnitudes" else weight_decay}
        settings = {name: value for name, value in settings.items() if value is not None}
        if parameters:
            groups.append({"params": parameters, "name": kind, **settings})
    return groups
