"""Initial values of factors and cores.

factors   orthonormal   A^T A = START^2 I (or A A^T where r > d): the core's gradient does not grow with the width
          normal        START N(0, 1), as in the paper's code
          kaiming       START U(-1/sqrt(d), 1/sqrt(d)), as LoRA's A
cores     zero          delta W = 0, so the model starts unchanged
          identity      G = I, and B starts at zero so that the model still starts unchanged (as LoRA does)
both      svd           the weights' own Tucker-2 factorisation, subtracted from the weights (`tucker2`)
factors   gradient      the leading directions of the weights' gradients (`directions_of_gradients`, init_from_gradient)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

__all__ = [
    "CORE_INITS",
    "FACTOR_INITS",
    "START",
    "directions_of_gradients",
    "fill_core_",
    "fill_factor_",
    "tucker2",
]

# Multiplies the initial factors, and divides s by its cube (linear.scaling_of). Under AdamW, A, B and G times a, the rate times
# a and s times a^-3 is exactly the same path, so this constant moves LoTR's best learning rate onto LoRA's (docs/choosing.md).
START = 0.4
FACTOR_INITS = ("orthonormal", "normal", "kaiming")
CORE_INITS = ("zero", "identity")


@torch.no_grad()
def fill_factor_(tensor: Tensor, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Fills a factor [d, r] in place with START times the values of an init, and returns it. Nothing is drawn on the meta
    device.

    Values are drawn in float32 (float64 for float64) and cast once. generator: of the tensor's device; None for torch's global
    one.
    Raises ValueError: an unknown init, or a tensor that is not 2-D. TypeError: a dtype that is not floating.
    """
    if init not in FACTOR_INITS:
        raise ValueError(f"init: expected one of {', '.join(FACTOR_INITS)}, got {init!r}")
    if tensor.dim() != 2:
        raise ValueError(f"tensor: expected 2 dimensions [d, r], got shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"tensor: expected a floating dtype, got {tensor.dtype}")
    if tensor.is_meta:
        return tensor
    (d, r), wide = tensor.shape, torch.float64 if tensor.dtype == torch.float64 else torch.float32
    drawn = {"dtype": wide, "device": tensor.device, "generator": generator}
    if init == "kaiming":
        values = (2 * torch.rand(d, r, **drawn) - 1) / math.sqrt(d)
    elif init == "normal":
        values = torch.randn(d, r, **drawn)
    else:  # the sign of R's diagonal makes Q uniform over all matrices with orthonormal columns
        q, upper = torch.linalg.qr(torch.randn(max(d, r), min(d, r), **drawn))
        q = q * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(wide)
        values = q if r <= d else q.T
    return tensor.copy_(START * values)


def fill_core_(tensor: Tensor, init: str) -> Tensor:
    """Fills a core [r_in, r_out], or experts' [e, r_in, r_out], in place: "zero", or "identity" (ones on the diagonal).
    Raises ValueError: an unknown init, or a tensor that is not 2-D or 3-D.
    """
    if init not in CORE_INITS:
        raise ValueError(f"core_init: expected one of {', '.join(CORE_INITS)}, got {init!r}")
    if tensor.dim() not in (2, 3):
        raise ValueError(
            f"tensor: expected 2 dimensions [r_in, r_out], or 3 with experts, got shape {tuple(tensor.shape)}"
        )
    with torch.no_grad():
        tensor.zero_()
        if init == "identity":
            tensor.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return tensor


# ---- from the weights ------------------------------------------------------------------------------------------------

_DENSE = 640  # features; up to here a dense decomposition takes a fraction of a second
_MORE = 10  # columns of a subspace iteration beyond those that are kept


def leading(side: Sequence[Tensor], r: int) -> Tensor:
    """The r leading left singular vectors [d, r] of all of side ([d, c_l] each, float64), which lie side by side.

    Dense if d or the columns are few. Otherwise nine steps of subspace iteration from a fixed random block, which are exact
    for a rank of at most r + 10.
    """
    d, columns = side[0].shape[0], sum(t.shape[1] for t in side)
    if r <= columns < d and columns <= _DENSE:
        q, upper = torch.linalg.qr(torch.cat(list(side), 1))
        return q @ torch.linalg.svd(upper)[0][:, :r]
    if d <= _DENSE or 8 * (r + _MORE) >= d:
        return torch.linalg.eigh(sum(t @ t.T for t in side))[1].flip(1)[:, :r].contiguous()
    generator = torch.Generator("cpu").manual_seed(0)
    block = torch.randn(d, r + _MORE, dtype=torch.float64, device="cpu", generator=generator).to(
        side[0].device
    )
    for _ in range(9):
        block = torch.linalg.qr(sum(t @ (t.T @ block) for t in side))[0]
    small = torch.cat([block.T @ t for t in side], 1)
    return block @ torch.linalg.eigh(small @ small.T)[1].flip(1)[:, :r]


def padded(vectors: Tensor, r: int) -> Tensor:
    """[d, r], with unit vectors in the columns that vectors [d, c] lacks."""
    (d, c), unit = (
        vectors.shape,
        torch.eye(len(vectors), dtype=vectors.dtype, device=vectors.device),
    )
    return torch.cat([vectors, unit[:, torch.arange(max(r - c, 0), device=vectors.device) % d]], 1)


@torch.no_grad()
def tucker2(weights: Sequence[Tensor], rank: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The Tucker-2 factorisation of a stack of L weights [N, K]: W_l ~= B G_l^T A^T, least squares over all l at once.

    Returns A [K, r_in] and B [N, r_out] with orthonormal columns, and the cores G_l = A^T W_l^T B [L, r_in, r_out], in
    float64. HOSVD gives the start (De Lathauwer et al., 2000a), at most 20 steps of HOOI (2000b) improve A and B alternately.
    Exact if the stack has that multilinear rank. Beyond K (or N) the columns are unit vectors, and the cores zero there.
    """
    stack = [w.detach().double() for w in weights]
    right, left = (lambda A: [w @ A for w in stack]), (lambda B: [w.T @ B for w in stack])
    return tucker2_of([w.T for w in stack], right, left, len(stack[0]), rank)


def tucker2_of(
    side: Sequence[Tensor],
    right: Callable[[Tensor], list[Tensor]],
    left: Callable[[Tensor], list[Tensor]],
    n: int,
    rank: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`tucker2` of matrices W_l [n, k] that are known by their products: right(A) is all W_l A, left(B) all W_l^T B. side: for
    each l a matrix [k, c_l] with the left singular vectors and the singular values of W_l^T."""
    A, captured = leading(side, min(rank[0], len(side[0]))), -math.inf
    for _ in range(20):
        B = leading(right(A), min(rank[1], n))
        halves = left(B)
        A = leading(halves, A.shape[1])
        before, captured = captured, sum(float((A.T @ half).square().sum()) for half in halves)
        if captured - before <= 1e-9 * captured:
            break
    cores = torch.zeros(len(side), *rank, dtype=torch.float64, device=A.device)
    cores[:, : A.shape[1], : B.shape[1]] = torch.stack([A.T @ half for half in left(B)])
    return padded(A, rank[0]), padded(B, rank[1]), cores


# ---- from the gradients ----------------------------------------------------------------------------------------------


class _Tap(Function):
    """Returns y. Its backward adds the products of the layer's gradient g^T x with A and B: P += g^T (x A), T += x^T (g B)."""

    @staticmethod
    def forward(
        ctx, anchor: Tensor, y: Tensor, x: Tensor, A: Tensor, B: Tensor, P: Tensor, T: Tensor
    ) -> Tensor:
        ctx.held = x.detach(), A, B, P, T
        return y.detach()  # not a view: models add to a layer's output in place

    @staticmethod
    def backward(ctx, g: Tensor):
        x, A, B, P, T = ctx.held
        x, g2 = (t.reshape(-1, t.shape[-1]).to(P.dtype) for t in (x, g))
        P += g2.T @ (x @ A)
        T += x.T @ (g2 @ B)
        return torch.zeros((), device="cpu"), g, None, None, None, None, None


def directions_of_gradients(
    model: nn.Module, layers: Collection[Any], batches: Iterable[Any], loss: Callable[..., Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """(A or B, its new value) of all layers: START times the leading directions of the gradients dW_l = g^T x of their weights.

    Shared A and B span the leading directions of all their layers' dW_l side by side (HOSVD), by three steps of subspace
    iteration from a random start, each one pass over the batches:

        P_l = dW_l A = g^T (x A)      B <- leading left singular vectors of [P_1 .. P_L]
        T_l = dW_l^T B = x^T (g B)    A <- leading left singular vectors of [T_1 .. T_L]

    layers: each with `factors`. Raises TypeError or ValueError as `lotr_ext.init_from_gradient`.
    """
    if not (batches := list(batches)):
        raise ValueError("batches: expected at least one, got none")
    generator, found = torch.Generator("cpu").manual_seed(0), {}
    for factor in (factor for layer in layers for factor in (layer.factors.A, layer.factors.B)):
        if factor not in found:
            drawn = torch.empty(
                factor.features, min(factor.rank + 8, factor.features), device="cpu"
            )
            found[factor] = (
                fill_factor_(drawn, "orthonormal", generator).to(factor.value.device) / START
            )
    for _ in range(3):
        for factor, parts in _pass(model, layers, found, batches, loss).items():
            if dist.is_available() and dist.is_initialized():
                for part in parts:
                    dist.all_reduce(part)
            if not all(bool(part.isfinite().all()) for part in parts) or not any(
                bool(part.any()) for part in parts
            ):
                raise ValueError(
                    "loss: expected finite gradients for each group of layers, not all zero, got others"
                )
            found[factor] = leading([part.double() for part in parts], found[factor].shape[1]).to(
                found[factor]
            )
    return [
        (factor.value, START * padded(new[:, : factor.rank].double(), factor.rank))
        for factor, new in found.items()
    ]


def _pass(
    model: nn.Module,
    layers: Collection[Any],
    found: Mapping[nn.Module, Tensor],
    batches: list[Any],
    loss: Callable[..., Tensor],
) -> dict[nn.Module, list[Tensor]]:
    """For each A the T of its layers, and for each B their P, over the batches. Buffers and the random state are as before."""
    sums, anchor = (
        {factor: [] for factor in found},
        torch.zeros((), device="cpu", requires_grad=True),
    )
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(torch.random.fork_rng())
        for layer in layers:
            A, B = found[layer.factors.A], found[layer.factors.B]
            P, T = A.new_zeros(len(B), A.shape[1]), A.new_zeros(len(A), B.shape[1])
            sums[layer.factors.A].append(T), sums[layer.factors.B].append(P)

            def tap(
                module: nn.Module, args: tuple, kwargs: dict, y: Tensor, own: tuple = (A, B, P, T)
            ) -> Tensor:
                x = args[0] if args else next(iter(kwargs.values()))
                return _Tap.apply(anchor, y, x, *own) if torch.is_grad_enabled() else y

            stack.callback(layer.register_forward_hook(tap, with_kwargs=True).remove)
        try:
            for batch in batches:
                value = loss(model, batch)
                if not isinstance(value, Tensor) or value.numel() != 1:
                    got = (
                        f"shape {list(value.shape)}"
                        if isinstance(value, Tensor)
                        else type(value).__name__
                    )
                    raise TypeError(
                        f"loss: expected a function (model, batch) -> scalar tensor, got {got}"
                    )
                if (
                    not value.requires_grad
                    or torch.autograd.grad(value, anchor, allow_unused=True)[0] is None
                ):
                    raise ValueError(
                        "loss: expected one that depends on the adapted layers, got one in which none has a part. Under "
                        "checkpointing, use_reentrant=False is needed."
                    )
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
    return sums
