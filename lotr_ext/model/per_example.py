"""`per_example`: the gradient of each example with respect to each core, from one backward.

    dG_i = s u_i^T (g_i B)      summed over the tokens of example i; u = x A, g = dL/dy

The batch runs as a batch of tasks does (`mixed`): row i takes the i-th of b cores, all of which are the layer's own core. The
operator `row_core` computes the gradient of each, and the core's own gradient is their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..compat import graph_task, is_compiling
from ..layers.layer import LoTRLayer
from ..layers.mixture import Mixture
from ..layers.request import in_force
from .adapted import adapted_layers, expect_merged, refuse_magnitudes
from .saving import unwrapped

__all__ = ["PerExampleGradients", "collecting", "layers_of", "per_example"]

Add = Callable[[nn.Module, Tensor], None]  # takes the gradients [b, ...] of one call of a layer


class PerExampleGradients(Mapping[str, Tensor]):
    """By layer name, in the model's order: gradients [batch, r_in, r_out] of the core, of experts [batch, e, r_in, r_out], in
    float32 (float64 for float64); or their Euclidean norms [batch], if only these are kept.

    Several backwards inside the context are one batch, in their order: micro-batches. A layer that is called several times
    before one backward has the sum of its calls; under reentrant checkpointing each region is a backward of its own. A layer
    that no backward has reached raises KeyError.
    """

    def __init__(self, layers: Mapping[str, nn.Module], norms_only: bool):
        self._layers, self._norms_only = layers, norms_only
        self._found: dict[nn.Module, list[Tensor]] = {}
        self._task: dict[nn.Module, int] = {}  # the backward that the last of a layer's parts is from

    def __getitem__(self, name: str) -> Tensor:
        parts = self._found[self._layers[name]]
        return torch.cat([_norms(part) for part in parts] if self._norms_only else parts)

    def __iter__(self) -> Iterator[str]:
        return (name for name, layer in self._layers.items() if layer in self._found)

    def __len__(self) -> int:
        return len(self._found)

    def norms(self) -> Tensor:
        """The norm [batch] of each example's gradient over all layers.

        Raises:
            RuntimeError: no gradients yet, or layers that saw another number of rows.
        """
        squares = {name: (self[name] if self._norms_only else _norms(self[name])).square() for name in self}
        if not squares:
            raise RuntimeError("norms: expected gradients, got none; call backward inside the context first")
        rows = {len(one): name for name, one in squares.items()}
        if len(rows) > 1:
            one, other = list(rows.items())[:2]
            raise RuntimeError(
                f"norms: expected as many rows in all layers, got {one[0]} in {one[1]!r} and {other[0]} in {other[1]!r}; "
                "if the model flattens its batch, give per_example(model, batch=...)"
            )
        return torch.stack([one.to(next(iter(squares.values())).device) for one in squares.values()]).sum(0).sqrt()

    def add(self, layer: nn.Module, gradient: Tensor) -> None:
        """Of one call of a layer, in its backward."""
        task, parts = graph_task(), self._found.setdefault(layer, [])
        if parts and self._task[layer] == task:
            if len(parts[-1]) != len(gradient):  # one row would be added to all rows of the other call
                name = next(name for name, one in self._layers.items() if one is layer)
                raise ValueError(
                    f"x: expected as many rows in all calls of {name!r} before one backward, got {len(parts[-1])} and "
                    f"{len(gradient)}; call backward after each forward"
                )
            parts[-1] = parts[-1] + gradient
            return
        if parts and self._norms_only:
            parts[-1] = _norms(parts[-1])  # no gradient outlives the next backward
        parts.append(gradient)
        self._task[layer] = task


def _norms(gradient: Tensor) -> Tensor:
    """[batch], of gradients [batch, ...] or of what are norms already."""
    return gradient if gradient.dim() == 1 else gradient.flatten(1).norm(dim=1)


class _OneARow(torch.autograd.Function):
    """core [...] -> [b, ...], every one the core itself; one for an empty batch. Its backward notes the gradient of each."""

    @staticmethod
    def forward(ctx, core: Tensor, b: int, add: Add, layer: nn.Module) -> Tensor:
        ctx.add, ctx.layer, ctx.b = add, layer, b
        return core.expand(max(1, b), *core.shape)  # row_core takes at least one core

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.add(ctx.layer, gradient.detach()[: ctx.b])
        return gradient.sum(0), None, None, None


def _cores(add: Add, layer: nn.Module, core: Tensor, b: int) -> Tensor:
    if is_compiling():
        raise RuntimeError(
            "per_example: expected a model that runs eagerly, got one inside torch.compile; call the model itself"
        )
    return _OneARow.apply(core, b, add, layer)


def layers_of(model: nn.Module, where: str) -> dict[str, LoTRLayer]:
    """The adapted layers, checked. where: the caller's name, for messages."""
    layers = adapted_layers(unwrapped(model))
    expect_merged(layers, False, where)
    refuse_magnitudes(layers, where)
    for name, layer in layers.items():
        if not layer.core.requires_grad:
            raise ValueError(
                f"model: expected cores that require grad, got a frozen one in {name!r}; requires_grad_() it first"
            )
    return layers


@contextmanager
def collecting(layers: Mapping[str, LoTRLayer], add: Add, batch: int | None = None) -> Iterator[None]:
    """Inside, each call of a layer computes its core's gradient for each of its rows, or of batch examples, and gives them to
    add in backward."""
    index = None if batch is None else torch.arange(batch, device="cpu")
    flat = batch is not None
    with in_force({layer: Mixture(partial(_cores, add, layer), layer.scaling, index, flat) for layer in layers.values()}):
        yield


@contextmanager
def per_example(model: nn.Module, *, batch: int | None = None, norms_only: bool = False) -> Iterator[PerExampleGradients]:
    """Inside the context, backward also gives the gradient of every example with respect to every core.

        with per_example(model) as gradients:
            loss_sum(model(x), target).backward()
        gradients["layers.0.q_proj"]        # [batch, r_in, r_out]

    The loss must be a sum over the examples. A mean over b examples gives gradients divided by b, and one over tokens mixes the
    examples' lengths in. Forward and backward run inside the context. All other gradients are as without it. It stores
    batch r_in r_out numbers per layer, and nothing of the weights' size.

    Args:
        model: a model from `apply_lotr` or built by hand, whose cores require grad. DistributedDataParallel is unwrapped: each
            process has the gradients of its own examples.
        batch: the number of examples. None: the first dimension of each layer's input. A model that flattens its batch, and one
            with adapted experts, need it; each example must then have the same number of tokens.
        norms_only: keep only the norms.

    Raises:
        TypeError: model is no nn.Module, or batch no int. ValueError: batch is below 1, a core is frozen, or an adapter has
            magnitudes; in backward, calls of a layer with different numbers of rows. RuntimeError: no adapter, a merged one,
            or a call inside torch.compile.
    """
    layers = layers_of(model, "per_example")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int)):
        raise TypeError(f"batch: expected an int or None, got {type(batch).__name__} {batch!r}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    found = PerExampleGradients(layers, norms_only)
    with collecting(layers, found.add, batch):
        yield found
