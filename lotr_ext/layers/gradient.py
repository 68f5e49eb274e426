"""Factors from the gradients of the layers' weights, without computing one of these gradients.

With x [m, k] a layer's input and g [m, n] the gradient of its output, dW_l = g^T x [n, k] is summed over batches and processes.
Shared A and B should span the leading directions of all their layers' dW_l side by side (HOSVD, De Lathauwer et al.,
2000a). The products of dW_l with thin matrices from either side need only the adapter's own products:

    P_l = dW_l A = g^T (x A)    [n, q_in]        B <- leading left singular vectors of [P_1 .. P_L]
    T_l = dW_l^T B = x^T (g B)  [k, q_out]       A <- leading left singular vectors of [T_1 .. T_L]

It starts with random A and B and repeats this three times (subspace iteration) with q = r + 8 columns, of which the first r are
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from .. import ops
from ..compat import post_accumulate_hooks, running_function
from ..ops import accumulate_dtype, planner
from ..ops.composite import rows, to
from .init import fill_factor_
from .merging import write_
from .placement import home
from .progress import progress_bar
from .sharded import agreed, holds_parts
from .tucker import leading, padded
from .untouched import untouched

__all__ = ["PASSES", "Key", "Loss", "Probed", "check_loss", "expect_whole", "leading_directions", "write_factors"]

PASSES, OVERSAMPLE = 3, 8
_WHERE = "the start from the gradient"
Loss = Callable[[nn.Module, Any], Tensor]
Key = tuple[str, Hashable]  # of a factor: "A" or "B", and its name


class Probed(NamedTuple):
    """A layer for which factors are computed from the gradient of its weight. A, B: names of its factors, with these ranks."""

    module: nn.Module
    in_features: int
    out_features: int
    A: Hashable
    B: Hashable
    ranks: tuple[int, int]

    @property
    def sides(self) -> tuple[tuple[Key, int, int], ...]:
        """Key, width and rank of A and of B."""
        return (("A", self.A), self.in_features, self.ranks[0]), (("B", self.B), self.out_features, self.ranks[1])


class Looks:
    """P [n, q_in] and T [k, q_out] of one layer, in float32 (float64 for float64), for given A [k, q_in] and B [n, q_out]."""

    def __init__(self, A: Tensor, B: Tensor):
        self.A, self.B = A, B
        self.P, self.T = B.new_zeros(len(B), A.shape[1]), A.new_zeros(len(A), B.shape[1])

    def add(self, x: Tensor, g: Tensor) -> None:
        """x [..., k], g [..., n] of one call."""
        g = rows(g)
        x = rows(to(x, g.dtype))
        self.P, self.T = _added(self.P, g, _projected(x, self.A)), _added(self.T, x, _projected(g, self.B))


def _kernels(t: Tensor, rank: int) -> bool:
    return type(t) is Tensor and planner.obstacle_to_kernels(rank, t.dtype, t.device) is None


def _projected(x: Tensor, A: Tensor) -> Tensor:
    """x A, in x's dtype."""
    return ops.shrink(x, A) if _kernels(x, A.shape[1]) else x @ to(A, x.dtype)


def _added(total: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """total + x^T u, in place if our kernel runs."""
    if not _kernels(x, u.shape[1]) or total.dtype != accumulate_dtype(x.dtype):
        return total + to(x.t() @ u, total.dtype)
    ops.factor_grad_(total, x, u)
    return total


class Tap(Function):
    """Returns y and records the layer's gradient: backward calls looks.add(x, g). anchor: makes y part of a graph even if
    nothing in the model requires a gradient; its gradient is 0."""

    @staticmethod
    def forward(ctx, anchor: Tensor, y: Tensor, x: Tensor, looks: Looks) -> Tensor:
        ctx.x, ctx.looks = x.detach(), looks
        return y.detach()  # not a view: models add to a layer's output in place

    @staticmethod
    def backward(ctx, g: Tensor):
        ctx.looks.add(ctx.x, g)
        return torch.zeros((), device="cpu"), g, None, None


class Taps:
    """The hooks that pass each call of a layer through a Tap.

    reentrant: whether a layer was called inside a Function's forward, as by reentrant checkpointing. The layer's graph is then
    built in that Function's backward, by an inner backward that torch allows only in `.backward()`.
    """

    def __init__(self, looks: Mapping[str, Looks]):
        self.looks, self.reentrant = looks, False
        self.anchor = torch.zeros((), device="cpu", requires_grad=True)

    @contextmanager
    def on(self, layers: Mapping[str, Probed]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.module.register_forward_hook(self._hook(self.looks[name]), with_kwargs=True).remove)
            yield

    def _hook(self, looks: Looks) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                self.reentrant = self.reentrant or running_function() is not None
                return y
            x = args[0] if args else next(iter(kwargs.values()))
            return Tap.apply(self.anchor, y, x, looks)

        return hook

    def backward(self, value: Tensor, model: nn.Module) -> None:
        """Backward from the loss `value` to all taps. No parameter and no batch keeps a gradient."""
        if not self.reentrant:
            torch.autograd.grad(value, self.anchor, allow_unused=True)
            return
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for name, p in trained:
            if post_accumulate_hooks(p):
                raise ValueError(
                    f"model: expected no post_accumulate_grad hooks under reentrant checkpointing, got one at {name!r}, which "
                    "may take an optimizer's step; remove it until the start is found, or checkpoint with use_reentrant=False"
                )
        with ExitStack() as stack:
            for _, p in trained:
                stack.callback(p.register_post_accumulate_grad_hook(_drop_gradient).remove)
            for leaf in _leaves(value) - {p for _, p in trained}:
                stack.callback(setattr, leaf, "grad", leaf.grad)
                leaf.grad = None
            value.backward()


def _leaves(value: Tensor) -> set[Tensor]:
    """The leaves of value's graph, including a batch that requires a gradient."""
    waiting, seen, found = [value.grad_fn], {None}, set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            if node.name() == "torch::autograd::AccumulateGrad":
                found.add(node.variable)
    return found


def _drop_gradient(p: Tensor) -> None:
    p.grad = None


def _freeze(model: nn.Module, layers: Mapping[str, Probed]) -> None:
    """Freezes parameters that only these layers have, so that backward does not compute their gradients."""
    own = {module for layer in layers.values() for module in layer.module.modules()}
    read_elsewhere = {p for module in model.modules() if module not in own for p in module._parameters.values()}
    for module in own:
        for p in module._parameters.values():
            if p is not None and p not in read_elsewhere:
                p.requires_grad_(False)


def _random(layers: Mapping[str, Probed]) -> dict[Key, Tensor]:
    """A random start of every factor, equal in all processes, in float32 (float64 for float64), on its layer's device."""
    found: dict[Key, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        weights = (p.dtype for p in layer.module.parameters() if p.is_floating_point())
        wide = accumulate_dtype(next(weights, torch.float32))
        for key, width, rank in layer.sides:
            if key not in found:
                drawn = torch.empty(width, min(rank + OVERSAMPLE, width), dtype=wide, device="cpu")
                found[key] = fill_factor_(drawn, "orthonormal", generator).to(home(layer.module))
    return found


def leading_directions(
    model: nn.Module, layers: Mapping[str, Probed], batches: Iterable[Any] | None, loss: Loss | None, progress: bool
) -> dict[Key, Tensor]:
    """A [k, r_in] and B [n, r_out] with orthonormal columns for every factor of the model's layers, float64. model: one that
    `expect_whole` accepts.

    With torch.distributed, every process calls this with its own batches, and all get the same result.

    Raises:
        TypeError, ValueError: no batches; a loss that is not a function, returns no scalar, or does not depend on any layer; a
            gradient that is not finite, or zero for all layers of a factor.
    """
    with untouched(model):
        kept = agreed(_WHERE, lambda: _checked(batches, loss))
        factors = _random(layers)
        _freeze(model, layers)
        with progress_bar("looks at gradients", PASSES * len(kept), progress) as report:
            for n in range(PASSES):
                looks = {}
                for name, layer in layers.items():
                    looks[name] = Looks(*(factors[key].to(home(layer.module)) for key, _, _ in layer.sides))
                before = n * len(kept)
                agreed(_WHERE, partial(_look, model, layers, looks, kept, loss, lambda i, before=before: report(before + i)))
                if dist.is_available() and dist.is_initialized():
                    for look in looks.values():
                        dist.all_reduce(look.P)
                        dist.all_reduce(look.T)
                factors = _directions(layers, looks, factors)
    ranks = {key: rank for layer in layers.values() for key, _, rank in layer.sides}
    return {key: padded(factor[:, : ranks[key]].double(), ranks[key]) for key, factor in factors.items()}


def _look(
    model: nn.Module,
    layers: Mapping[str, Probed],
    looks: Mapping[str, Looks],
    batches: Iterable[Any],
    loss: Loss,
    done: Callable[[int], None],
) -> None:
    """One pass over this process's batches. done: called with the number of batches done."""
    taps = Taps(looks)
    with torch.enable_grad(), taps.on(layers):
        for i, batch in enumerate(batches, 1):
            value = loss(model, batch)
            check_loss(value, taps.reentrant)
            taps.backward(value, model)
            done(i)


def _checked(batches: Iterable[Any] | None, loss: Loss | None) -> list[Any]:
    """The batches as a list."""
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected a few batches for a start from the gradient, got {type(batches).__name__}")
    if not callable(loss):
        raise TypeError(f"loss: expected a function (model, batch) -> scalar tensor, got {type(loss).__name__}")
    kept = list(batches)
    if not kept:
        raise ValueError("batches: expected at least one for a start from the gradient, got none")
    return kept


def expect_whole(model: nn.Module) -> None:
    """TypeError for a model from which a start cannot be computed: wrapped, compiled or held in parts."""
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod")
    if wrapped or holds_parts(model):
        state = "wrapped or compiled" if wrapped else "held in parts"
        raise TypeError(
            f"model: expected a plain, whole one for a start from the gradient, got {type(model).__name__}, {state}"
        )


def check_loss(value: object, reentrant: bool = False) -> None:
    """Raises TypeError or ValueError unless value is a scalar tensor with a graph. reentrant: for the hint."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss: expected a function that returns a tensor, got one that returns {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"loss: expected one number per batch, got shape {tuple(value.shape)}")
    if not value.requires_grad:
        hint = "; reentrant checkpointing needs an input that requires grad, or use_reentrant=False" if reentrant else ""
        raise ValueError(f"loss: expected one that depends on the adapted layers, got one in which none has a part{hint}")


def _directions(layers: Mapping[str, Probed], looks: Mapping[str, Looks], old: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """For each factor the leading left singular vectors of its sums, with the same number and device as before."""
    seen: dict[Key, dict[str, Tensor]] = {key: {} for key in old}
    for name, layer in layers.items():
        for (key, _, _), sums in zip(layer.sides, (looks[name].T, looks[name].P)):
            if not torch.isfinite(sums).all():
                raise ValueError(f"loss: expected finite gradients, got NaN or infinity in {name!r}")
            seen[key][name] = sums.to(old[key].device, torch.float64)
    for parts in seen.values():
        if not any(bool(part.any()) for part in parts.values()):
            raise ValueError(f"loss: expected a gradient for at least one of {', '.join(parts)}, got zero for all")
    return {key: leading(list(parts.values()), old[key].shape[1]).to(old[key]) for key, parts in seen.items()}


def write_factors(layers: Mapping[nn.Module, Probed], found: Mapping[Key, Tensor]) -> None:
    """A and B of adapted layers <- found."""
    for layer, probed in layers.items():
        for factor, (key, _, _) in zip((layer.factors.A, layer.factors.B), probed.sides):
            write_(factor, found[key])
