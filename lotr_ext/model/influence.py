"""`influence`: how each training example changes the loss of a query, from the gradients of the cores.

    score[q, i] = sum over layers l of  g_l(q)^T (H_l + d_l I)^-1 g_l(i)        H_l = 1/n sum_i g_l(i) g_l(i)^T

g_l(i) is the gradient of example i with respect to core l, r_in r_out numbers (`per_example`), so H_l is small enough to
invert exactly. This is LoGra (arXiv 2405.13954) with LoTR's A and B as the projections. d_l is a share of H_l's mean
eigenvalue. Without damping, the score is the plain dot product.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from ..compat import post_accumulate_hooks
from ..layers.gradient import Loss, check_loss
from ..layers.layer import LoTRLayer
from ..layers.parametrized import parameters_of
from ..layers.progress import progress_bar
from ..layers.sharded import holds_parts
from ..layers.untouched import untouched
from .adapted import adapted_layers, expect_merged
from .per_example import per_example
from .saving import unwrapped

__all__ = ["influence"]

_CASTS = ("ToCopyBackward", "ViewBackward", "ReshapeAliasBackward", "SqueezeBackward", "UnsqueezeBackward")
_MEAN = 1  # at::Reduction::Mean, as losses save it
Rows = Callable[[Any], int]


def influence(
    model: nn.Module,
    train: Iterable[Any],
    query: Iterable[Any] | None = None,
    *,
    loss: Loss,
    damping: float | None = 0.1,
    curvature: Loss | None = None,
    rows: Rows | None = None,
    progress: bool = True,
) -> Tensor:
    """Scores [queries, examples] of training examples, from their gradients with respect to the cores.

        scores = influence(model, train, query, loss=loss_sum)      # [queries, examples]
        suspicious = influence(model, train, loss=loss_sum)         # [examples]: each one's influence on itself

    A positive score means that a step on the example lowers the query's loss. The cores may be zero, as after `apply_lotr`. The
    model runs in its current mode, so call `model.eval()` first. Its state is restored afterwards, gradients included.

    Reads train twice (once without damping), batch by batch. Memory: (r_in r_out)^2 numbers per layer, r_in r_out numbers per
    query and layer, and the scores, all in float64.

    Args:
        model: a model from `apply_lotr` or built by hand, unmerged. A DistributedDataParallel is unwrapped: each process gets
            the scores and the curvature of its own train.
        train: batches. The scores are in their order.
        query: batches. None: the influence of each example on itself.
        loss: (model, batch) -> the loss, a scalar, summed over the examples of the batch.
        damping: d_l as a share of the mean eigenvalue of H_l, positive. None: the plain dot product.
        curvature: the loss whose gradients form H. None: `loss`, which gives the empirical Fisher matrix. A loss with labels
            sampled from the model's own prediction gives an estimate of the Gauss-Newton matrix.
        rows: batch -> the number of its examples, for a model that flattens its batch or has adapted experts.
        progress: show a progress bar in the terminal, if the lengths of train and query are known.

    Returns:
        float64, on the CPU.

    Raises:
        TypeError, ValueError, RuntimeError: no adapter, a merged one, or one held in parts; train or query that are no
            batches, are shuffled, have no example, or can be read only once; a loss that is no scalar, does not depend on any
            core, or has gradients that are not finite; magnitudes. Warns about a loss that is a mean, where this is visible.
    """
    model = unwrapped(model)
    layers = _checked(model, loss, damping, curvature)
    once = damping is None
    total = (1 if once else 2) * _length("train", train, once) + (0 if query is None else _length("query", query, True))
    with _cores_alone(model, layers), progress_bar("influence", max(1, total), progress and total > 0) as report:
        steps = iter(range(1, 1 + max(total, 1)))
        gradients = partial(_gradients, model, layers, rows, lambda: report(next(steps, total)))
        roots, n = (None, None) if once else _roots(gradients("train", train, curvature or loss), layers, damping)
        if query is None:
            parts = [_on_itself(found, roots) for found in gradients("train", train, loss)]
        else:
            projected = _projected(gradients("query", query, loss), layers, roots)
            parts = [_scores(projected, found) for found in gradients("train", train, loss)]
    return _joined(parts, n)


# ---- gradients -------------------------------------------------------------------------------------------------------


def _gradients(
    model: nn.Module, layers: dict[str, LoTRLayer], rows: Rows | None, done: Callable[[], None], name: str,
    batches: Iterable[Any], loss: Loss,
) -> Iterator[list[Tensor]]:  # fmt: skip
    """For each batch and layer, gradients [e, b, r_in r_out] in float64; e = 1, or the experts. name: for messages."""
    for i, batch in enumerate(batches):
        with per_example(model, batch=None if rows is None else rows(batch)) as found:
            value = loss(model, batch)
            check_loss(value)
            value.backward()
        model.zero_grad(set_to_none=True)
        if not found:
            raise ValueError("loss: expected one that depends on the adapted layers, got one that does not")
        norms = found.norms()
        if not bool(norms.isfinite().all()):
            raise ValueError(f"loss: expected finite gradients, got NaN or infinity in batch {i} of {name}")
        b = len(norms)
        if b > 1 and (mean := _mean(value)) is not None:
            _warn_of_mean(mean, b)
        yield [_flat(found[key]) if key in found else _none(layer, b) for key, layer in layers.items()]
        done()


def _flat(gradient: Tensor) -> Tensor:
    """[e, b, r_in r_out] in float64, from [b, r_in, r_out] or [b, e, r_in, r_out]."""
    return gradient.double().flatten(-2).reshape(len(gradient), -1, gradient.shape[-2:].numel()).transpose(0, 1)


def _none(layer: LoTRLayer, b: int) -> Tensor:
    """Zero gradients, for a layer that the loss of a batch does not depend on."""
    core = layer.core
    return core.new_zeros(core.shape[:-2].numel(), b, core.shape[-2:].numel(), dtype=torch.float64)


def _roots(batches: Iterator[list[Tensor]], layers: dict[str, LoTRLayer], damping: float) -> tuple[list[Tensor], int]:
    """The Cholesky factors [e, d, d] of H + damping mean eigenvalue I of each layer, and the number of examples."""
    sums: list[Tensor | None] = [None] * len(layers)
    n = 0
    for found in batches:
        n += found[0].shape[1]
        for l, g in enumerate(found):
            own = g.transpose(1, 2) @ g
            sums[l] = own if sums[l] is None else sums[l].add_(own)
    if n == 0:
        raise ValueError("train: expected at least one example, got none")
    roots = []
    for name, total in zip(layers, sums):
        total.div_(n)
        diagonal = total.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1, keepdim=True)
        diagonal += torch.where(mean > 0, damping * mean, 1.0)  # 1: experts without a token, whose gradients are all zero
        root, failed = torch.linalg.cholesky_ex(total)
        if bool(failed.any()):
            raise ValueError(f"damping: expected enough to invert the curvature of {name!r}, got {damping}; increase it")
        roots.append(root)
    return roots, n


# ---- scores ----------------------------------------------------------------------------------------------------------


def _on_itself(found: list[Tensor], roots: list[Tensor] | None) -> Tensor:
    """[b]: g^T H^-1 g of each example."""
    if roots is not None:
        found = [torch.linalg.solve_triangular(root, g.transpose(1, 2), upper=False) for g, root in zip(found, roots)]
        return sum(x.square().sum((0, 1)).cpu() for x in found)
    return sum(g.square().sum((0, 2)).cpu() for g in found)


def _projected(batches: Iterator[list[Tensor]], layers: dict[str, LoTRLayer], roots: list[Tensor] | None) -> list[Tensor]:
    """H^-1 g [e, d, queries] of each layer."""
    kept = list(batches)
    if not kept:
        raise ValueError("query: expected at least one example, got none")
    queries = [torch.cat(parts, 1).transpose(1, 2) for parts in zip(*kept)]
    return queries if roots is None else [torch.cholesky_solve(g, root) for g, root in zip(queries, roots)]


def _scores(projected: list[Tensor], found: list[Tensor]) -> Tensor:
    """[queries, b]"""
    return sum((g @ p).sum(0).t().cpu() for g, p in zip(found, projected))


def _joined(parts: list[Tensor], n: int | None) -> Tensor:
    """[queries, examples] of all batches. n: the number of examples in the first reading of train, or None."""
    if not parts:
        raise ValueError("train: expected at least one example, got none")
    scores = torch.cat(parts, -1)
    if n is not None and scores.shape[-1] != n:
        raise ValueError(f"train: expected the same examples at each reading, got {n} and then {scores.shape[-1]}")
    return scores


# ---- checks ----------------------------------------------------------------------------------------------------------


@contextmanager
def _cores_alone(model: nn.Module, layers: dict[str, LoTRLayer]) -> Iterator[None]:
    """Inside the context only the cores require grad. Restores the model afterwards."""
    cores = {p for layer in layers.values() for p in parameters_of(layer, "core")}
    with untouched(model), torch.enable_grad():
        for p in model.parameters():
            p.requires_grad_(p in cores)
        yield


def _checked(model: nn.Module, loss: object, damping: object, curvature: object) -> dict[str, LoTRLayer]:
    """The adapted layers."""
    layers = adapted_layers(model)
    expect_merged(layers, False, "influence")
    if holds_parts(model):
        raise TypeError("model: expected a whole one, got one held in parts (FSDP2, ZeRO-3, tensor parallel)")
    for name, layer in layers.items():
        if any(post_accumulate_hooks(p) for p in parameters_of(layer, "core")):
            raise ValueError(f"model: expected no post_accumulate_grad hooks, got one at the core of {name!r}; remove it first")
    for name, one in (("loss", loss), ("curvature", curvature)):
        if not callable(one) and (name, one) != ("curvature", None):
            raise TypeError(f"{name}: expected a function (model, batch) -> scalar tensor, got {type(one).__name__}")
    if damping is not None and (isinstance(damping, bool) or not isinstance(damping, (int, float))):
        raise TypeError(f"damping: expected a number or None, got {type(damping).__name__} {damping!r}")
    if damping is not None and not 0 < damping < float("inf"):
        raise ValueError(f"damping: expected a positive number, or None for the plain dot product, got {damping}")
    if damping is None and curvature is not None:
        raise ValueError("curvature: expected None without damping, got a loss; the plain dot product has no curvature")
    return layers


def _length(name: str, batches: Iterable[Any], once: bool) -> int:
    """The number of batches; 0 if unknown. once: they are read once, so an iterator is enough."""
    if not isinstance(batches, Iterable):
        raise TypeError(f"{name}: expected batches, got {type(batches).__name__}")
    if not once and isinstance(batches, Iterator):
        raise TypeError(
            f"{name}: expected batches that can be read twice, such as a list or a DataLoader, got {type(batches).__name__}"
        )
    if isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler):
        raise ValueError(f"{name}: expected batches in a fixed order, got a DataLoader with shuffle=True")
    try:
        return len(batches)
    except TypeError:
        return 0


def _mean(value: Tensor) -> str | None:
    """The name of the operator that made value as a mean; None if it is no mean, or this cannot be seen."""
    node = value.grad_fn
    while node is not None and node.name().startswith(_CASTS):
        node = node.next_functions[0][0]
    if node is None or not (node.name().startswith("MeanBackward") or getattr(node, "_saved_reduction", None) == _MEAN):
        return None
    return node.name()


def _warn_of_mean(name: str, b: int) -> None:
    warnings.warn(
        f"loss: expected a sum over the {b} examples of a batch, got a mean ({name}), which divides each gradient by the size "
        'of its batch; use reduction="sum", or multiply by the number of examples',
        stacklevel=5,
    )
