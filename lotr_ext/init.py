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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

__all__ = ["CORE_INITS", "FACTOR_INITS", "START", "directions_of_gradients", "fill_core_", "fill_factor_", "tucker2"]

# Multiplies the initial factors, and divides s by its cube (linear.scaling_of). Under AdamW, A, B and G times a, the rate times
# a and s times a^-3 is exactly the same path, so this constant moves LoTR's best learning rate onto LoRA's (docs/choosing.md).
START = 0.4
CORE_INITS = ("zero", "identity")


def _orthonormal(d: int, r: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A random [d, r] with orthonormal columns, or rows when r > d; uniform over all of them (the sign of R's diagonal)."""
    if r > d:
        return _orthonormal(r, d, dtype, device, generator).T
    q, upper = torch.linalg.qr(torch.randn(d, r, dtype=dtype, device=device, generator=generator))
    return q * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(dtype)


def _normal(d: int, r: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randn(d, r, dtype=dtype, device=device, generator=generator)


def _kaiming(d: int, r: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return (2 * torch.rand(d, r, dtype=dtype, device=device, generator=generator) - 1) / math.sqrt(d)


_FILLS: dict[str, Callable[..., Tensor]] = {"orthonormal": _orthonormal, "normal": _normal, "kaiming": _kaiming}
FACTOR_INITS = tuple(_FILLS)


def fill_factor_(tensor: Tensor, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Fills a factor [d, r] in place with START times the values of an init, and returns it. Nothing is drawn on the meta
    device.

    Values are drawn in float32 (float64 for float64) and cast once. generator: of the tensor's device; None for torch's global
    one.

    Raises:
        ValueError: an unknown init, or a tensor that is not 2-D. TypeError: a dtype that is not floating.
    """
    if init not in _FILLS:
        raise ValueError(f"init: expected one of {', '.join(FACTOR_INITS)}, got {init!r}")
    if tensor.dim() != 2:
        raise ValueError(f"tensor: expected 2 dimensions [d, r], got shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"tensor: expected a floating dtype, got {tensor.dtype}")
    if tensor.is_meta:
        return tensor
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        return tensor.copy_(START * _FILLS[init](*tensor.shape, wide, tensor.device, generator))


def fill_core_(tensor: Tensor, init: str) -> Tensor:
    """Fills a core [r_in, r_out], or experts' [e, r_in, r_out], in place: "zero", or "identity" (ones on the diagonal).

    Raises:
        ValueError: an unknown init, or a tensor that is not 2-D or 3-D.
    """
    if init not in CORE_INITS:
        raise ValueError(f"core_init: expected one of {', '.join(CORE_INITS)}, got {init!r}")
    if tensor.dim() not in (2, 3):
        raise ValueError(f"tensor: expected 2 dimensions [r_in, r_out], or 3 with experts, got shape {tuple(tensor.shape)}")
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
    block = torch.randn(d, r + _MORE, dtype=torch.float64, device="cpu", generator=generator).to(side[0].device)
    for _ in range(9):
        block = torch.linalg.qr(sum(t @ (t.T @ block) for t in side))[0]
    small = torch.cat([block.T @ t for t in side], 1)
    return block @ torch.linalg.eigh(small @ small.T)[1].flip(1)[:, :r]


def padded(vectors: Tensor, r: int) -> Tensor:
    """[d, r], with unit vectors in the columns that vectors [d, c] lacks."""
    (d, c), unit = vectors.shape, torch.eye(len(vectors), dtype=vectors.dtype, device=vectors.device)
    return torch.cat([vectors, unit[:, torch.arange(max(r - c, 0), device=vectors.device) % d]], 1)


@torch.no_grad()
def tucker2(weights: Sequence[Tensor], rank: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The Tucker-2 factorisation of a stack of L weights [N, K]: W_l ~= B G_l^T A^T, least squares over all l at once.

    Returns A [K, r_in] and B [N, r_out] with orthonormal columns, and the cores G_l = A^T W_l^T B [L, r_in, r_out], in
    float64. HOSVD gives the start (De Lathauwer et al., 2000a), at most 20 steps of HOOI (2000b) improve A and B alternately.
    Exact if the stack has that multilinear rank. Beyond K (or N) the columns are unit vectors, and the cores zero there.
    """
    stack = [w.detach().double() for w in weights]
    n, k = stack[0].shape
    r_in, r_out = min(rank[0], k), min(rank[1], n)
    A, captured = leading([w.T for w in stack], r_in), -math.inf
    for _ in range(20):
        B = leading([w @ A for w in stack], r_out)
        A = leading([w.T @ B for w in stack], r_in)
        before, captured = captured, sum(float((A.T @ w.T @ B).square().sum()) for w in stack)
        if captured - before <= 1e-6 * captured:
            break
    cores = torch.zeros(len(stack), *rank, dtype=torch.float64, device=A.device)
    cores[:, :r_in, :r_out] = torch.stack([A.T @ w.T @ B for w in stack])
    return padded(A, rank[0]), padded(B, rank[1]), cores


# ---- from the gradients ----------------------------------------------------------------------------------------------


class _Tap(Function):
    """Returns y. Its backward adds the products of the layer's gradient g^T x with A and B: P += g^T (x A), T += x^T (g B)."""

    @staticmethod
    def forward(ctx, anchor: Tensor, y: Tensor, x: Tensor, A: Tensor, B: Tensor, P: Tensor, T: Tensor) -> Tensor:
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
    model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Any], loss: Callable[..., Tensor], progress: bool
) -> list[tuple[Tensor, Tensor]]:
    """(A or B, its new value) of all layers: START times the leading directions of the gradients dW_l = g^T x of their weights.

    Shared A and B span the leading directions of all their layers' dW_l side by side (HOSVD), by three steps of subspace
    iteration from a random start, each one pass over the batches:

        P_l = dW_l A = g^T (x A)      B <- leading left singular vectors of [P_1 .. P_L]
        T_l = dW_l^T B = x^T (g B)    A <- leading left singular vectors of [T_1 .. T_L]

    layers: by name, each with `factors`. Raises TypeError or ValueError as `lotr_ext.init_from_gradient`.
    """
    if not callable(loss):
        raise TypeError(f"loss: expected a function (model, batch) -> scalar tensor, got {type(loss).__name__}")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected a few batches, got {type(batches).__name__}")
    if not (batches := list(batches)):
        raise ValueError("batches: expected at least one, got none")
    generator, found, owners = torch.Generator("cpu").manual_seed(0), {}, {}
    for layer in layers.values():
        for factor in (layer.factors.A, layer.factors.B):
            if factor not in found:
                drawn = torch.empty(factor.features, min(factor.rank + 8, factor.features), device="cpu")
                found[factor] = fill_factor_(drawn, "orthonormal", generator).to(factor.value.device) / START
                owners[factor] = []
    for name, layer in layers.items():
        owners[layer.factors.A].append((name, "T"))
        owners[layer.factors.B].append((name, "P"))
    for step in range(3):
        sums = _pass(model, layers, found, batches, loss)
        for factor, names in owners.items():
            parts = [sums[name][part] for name, part in names]
            if dist.is_available() and dist.is_initialized():
                for part in parts:
                    dist.all_reduce(part)
            if not all(bool(part.isfinite().all()) for part in parts):
                raise ValueError(
                    f"loss: expected finite gradients, got NaN or infinity in one of {', '.join(n for n, _ in names)}"
                )
            if not any(bool(part.any()) for part in parts):
                raise ValueError(f"loss: expected a gradient for {', '.join(n for n, _ in names)}, got zero for all")
            found[factor] = leading([part.double() for part in parts], found[factor].shape[1]).to(found[factor])
        if progress:
            print(f"init_from_gradient: pass {step + 1} of 3 over {len(batches)} batches", flush=True)
    return [(factor.value, START * padded(new[:, : factor.rank].double(), factor.rank)) for factor, new in found.items()]


def _pass(
    model: nn.Module,
    layers: Mapping[str, Any],
    found: Mapping[nn.Module, Tensor],
    batches: list[Any],
    loss: Callable[..., Tensor],
) -> dict[str, dict[str, Tensor]]:
    """P and T of all layers over the batches. Buffers and the random state are as before afterwards."""
    sums, anchor = {}, torch.zeros((), device="cpu", requires_grad=True)
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(torch.random.fork_rng())
        for name, layer in layers.items():
            A, B = found[layer.factors.A], found[layer.factors.B]
            P, T = A.new_zeros(len(B), A.shape[1]), A.new_zeros(len(A), B.shape[1])
            sums[name] = {"P": P, "T": T}

            def tap(module: nn.Module, args: tuple, kwargs: dict, y: Tensor, own: tuple = (A, B, P, T)) -> Tensor:
                x = args[0] if args else next(iter(kwargs.values()))
                return _Tap.apply(anchor, y, x, *own) if torch.is_grad_enabled() else y

            stack.callback(layer.register_forward_hook(tap, with_kwargs=True).remove)
        try:
            for batch in batches:
                value = loss(model, batch)
                if not isinstance(value, Tensor):
                    raise TypeError(f"loss: expected a function that returns a tensor, got {type(value).__name__}")
                if value.numel() != 1:
                    raise ValueError(f"loss: expected one number per batch, got shape {tuple(value.shape)}")
                if not value.requires_grad or torch.autograd.grad(value, anchor, allow_unused=True)[0] is None:
                    raise ValueError(
                        "loss: expected one that depends on the adapted layers, got one in which none has a part. Under "
                        "checkpointing, use_reentrant=False is needed."
                    )
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
    return sums
