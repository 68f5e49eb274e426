"""init_from_gradient, for a model that is adapted already. For a new adapter use init "gradient" of `apply_lotr`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from ..layers.experts import LoTRExperts
from ..layers.gradient import Loss, Probed, expect_whole, leading_directions, write_factors
from ..layers.layer import LoTRLayer
from ..layers.merging import check_is_parameter
from ..layers.sharded import agreed
from .adapted import adapted_layers
from .apply import disabled

__all__ = ["init_from_gradient"]

Model = TypeVar("Model", bound=nn.Module)


def init_from_gradient(model: Model, batches: Iterable[Any], loss: Loss, *, progress: bool = True) -> Model:
    """Starts A and B of an adapted model from the gradients of its weights. The cores are zero, so its output does not change.

    A and B get orthonormal columns that span the leading directions of the gradients of all layers that share them. The
    gradients themselves are never formed: three passes over the batches compute two skinny products per layer and side in
    addition to forward and backward. Everything else is restored, also if a batch fails: buffers (BatchNorm's statistics),
    modes, requires_grad and .grad of the parameters, and the generators of torch, Python and NumPy. `apply_lotr` does the same
    with init "gradient".

    Args:
        model: from `apply_lotr` or built by hand, in the mode (train or eval) in which the gradients are to be computed.
        batches: a few batches, each used three times.
        loss: (model, batch) -> the loss, a scalar.
        progress: show a progress bar in the terminal.

    With torch.distributed, every process must call this with its own batches: the gradients are summed over processes, and all
    get the same A and B. An error in one process ends the call in all.

    Raises:
        TypeError, ValueError, RuntimeError: no adapter, or one of experts; a model that is merged, wrapped, compiled or in
            parts; a core that is not zero; a factor that is no parameter; no batches; a loss that is no scalar or does not
            depend on any adapted layer; gradients that are not finite, or zero for all layers of a factor. The model is
            unchanged then.
    """
    layers, probed = agreed("init_from_gradient", lambda: _probed(model))
    with disabled(model):
        found = leading_directions(model, {n: probed[layer] for n, layer in layers.items()}, batches, loss, progress)
    write_factors(probed, found)
    return model


def _probed(model: nn.Module) -> tuple[dict[str, LoTRLayer], dict[nn.Module, Probed]]:
    """The adapted layers, checked."""
    layers = adapted_layers(model)
    expect_whole(model)
    for name, layer in layers.items():
        if isinstance(layer, LoTRExperts):
            raise TypeError(f"model: expected linear layers for a start from the gradient, got experts in {name!r}")
        if bool(layer.core.any()):
            raise ValueError(f"core: expected zero for a start from the gradient, got other values in {name!r}")
        for owner, part in layer.factors.owners:
            check_is_parameter(owner, part, "init_from_gradient", name)
    probed = {}
    for layer in layers.values():
        A, B = layer.factors.A, layer.factors.B
        probed[layer] = Probed(layer, layer.in_features, layer.out_features, id(A), id(B), (A.shape[1], B.shape[1]))
    return layers, probed
