"""Initial values of factors and cores.

    factors   orthonormal   A^T A = INIT_GAIN^2 I (or A A^T if r > d): the core's gradient does not
                            grow with the width
              normal        INIT_GAIN N(0, 1), as in the paper's code
              kaiming       INIT_GAIN U(-1/sqrt(d), 1/sqrt(d)), as A in LoRA
    cores     zero          delta W = 0, so the model starts unchanged
              identity      G = I. B starts at zero, so the model still starts unchanged, as in LoRA
    both      svd           the Tucker-2 factorization of the weights, subtracted from them
                            (`tucker2`)
    factors   gradient      the leading directions of the weights' gradients
                            (`start_from_gradients`)

Not here: which layers of a model start how (model.py).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import check_choice, check_tensor

# Multiplies the initial factors, and divides s by its cube (factors.scaling_of). It moves the best
# learning rate of LoTR onto LoRA's (docs/choosing.md): under Adam, without weight decay, a run
# does not change if factors, cores and learning rate are multiplied by any a, and s by a^-3.
INIT_GAIN = 0.4
FACTOR_INITS = ("orthonormal", "normal", "kaiming")
CORE_INITS = ("zero", "identity")


@torch.no_grad()
def fill_factor_(tensor: Tensor, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Fills a factor in place with INIT_GAIN times the values of an init. Draws nothing on meta.

    Values are drawn in float32 (float64 for float64) and cast once.

    Args:
        tensor: The factor [d, r].
        init: One of FACTOR_INITS.
        generator: On the tensor's device. torch's global one if None.

    Returns:
        The tensor.

    Raises:
        ValueError: If init is unknown, or tensor is not 2-D.
        TypeError: If the tensor's dtype is not floating.
    """
    check_choice("init", init, FACTOR_INITS)
    check_tensor("tensor", tensor, "d", "r")
    if tensor.is_meta:
        return tensor
    d, r = tensor.shape
    options = {
        "dtype": torch.float64 if tensor.dtype == torch.float64 else torch.float32,
        "device": tensor.device,
        "generator": generator,
    }
    if init == "kaiming":
        values = (2 * torch.rand(d, r, **options) - 1) / math.sqrt(d)
    elif init == "normal":
        values = torch.randn(d, r, **options)
    else:
        q, upper = torch.linalg.qr(torch.randn(max(d, r), min(d, r), **options))
        # The signs make q uniform over all matrices with orthonormal columns.
        q = q * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        # A factor with more columns than rows has orthonormal rows.
        values = q if r <= d else q.T
    return tensor.copy_(INIT_GAIN * values)


@torch.no_grad()
def fill_core_(tensor: Tensor, init: str) -> Tensor:
    """Fills a core in place with zeros, or with ones on the diagonal ("identity").

    Args:
        tensor: [r_in, r_out], or [e, r_in, r_out] for experts.
        init: One of CORE_INITS.

    Returns:
        The tensor.

    Raises:
        ValueError: If init is unknown.
    """
    check_choice("core_init", init, CORE_INITS)
    tensor.zero_()
    if init == "identity":
        tensor.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return tensor


# ---- from the weights ----------------------------------------------------------------------------

_DENSE_LIMIT = 640  # features up to which a dense decomposition takes a fraction of a second
_EXTRA_COLUMNS = 10  # columns of a subspace iteration in addition to those that are kept


def leading_vectors(blocks: Sequence[Tensor], r: int) -> Tensor:
    """Returns the r leading left singular vectors [d, r] of the matrix [block_1 .. block_L].

    Uses a dense decomposition if d or the number of columns is small, else subspace iteration.

    Args:
        blocks: [d, c_l] each, in float64.
    """
    d = blocks[0].shape[0]
    columns = sum(block.shape[1] for block in blocks)
    # With few columns, all of them are in the span of a small basis.
    if columns < d and r <= columns <= _DENSE_LIMIT:
        q, upper = torch.linalg.qr(torch.cat(list(blocks), 1))
        return q @ torch.linalg.svd(upper)[0][:, :r]
    # Few rows, or so many vectors that nine steps would cost as much as the decomposition.
    if d <= _DENSE_LIMIT or 8 * (r + _EXTRA_COLUMNS) >= d:
        gram = sum(block @ block.T for block in blocks)
        return torch.linalg.eigh(gram)[1].flip(1)[:, :r].contiguous()
    return _leading_vectors_by_iteration(blocks, r)


def _leading_vectors_by_iteration(blocks: Sequence[Tensor], r: int) -> Tensor:
    """Computes `leading_vectors` by nine steps from a fixed random block.

    The result is exact for a matrix of rank at most r + _EXTRA_COLUMNS.
    """
    # From a seed, so that the same weights give the same factors in every process.
    generator = torch.Generator("cpu").manual_seed(0)
    subspace = torch.randn(
        len(blocks[0]), r + _EXTRA_COLUMNS, dtype=torch.float64, device="cpu", generator=generator
    ).to(blocks[0].device)
    for _ in range(9):
        subspace = torch.linalg.qr(sum(block @ (block.T @ subspace) for block in blocks))[0]
    projected = torch.cat([subspace.T @ block for block in blocks], 1)
    rotation = torch.linalg.eigh(projected @ projected.T)[1].flip(1)
    return subspace @ rotation[:, :r]


def padded(vectors: Tensor, r: int) -> Tensor:
    """Returns vectors [d, c] as [d, r], c <= r, with unit vectors in the columns past c."""
    d, c = vectors.shape
    unit = torch.eye(d, dtype=vectors.dtype, device=vectors.device)
    missing = torch.arange(r - c, device=vectors.device) % d
    return torch.cat([vectors, unit[:, missing]], 1)


@torch.no_grad()
def tucker2(weights: Sequence[Tensor], rank: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the Tucker-2 factorization of a stack of weights: W_l ~= B G_l^T A^T.

    Least squares over all l at once. HOSVD gives the start (De Lathauwer et al., 2000a). At most 20
    steps of HOOI (2000b) then improve B and A in turn, see `tucker2_from_products`. The result is
    exact if the stack has that multilinear rank.

    Args:
        weights: L matrices [n, k].
        rank: (r_in, r_out). Columns of A past k, and of B past n, are unit vectors, with zeros in
            the cores.

    Returns:
        A [k, r_in] and B [n, r_out] with orthonormal columns, and the cores G_l = A^T W_l^T B
        [L, r_in, r_out], all in float64.
    """
    stack = [weight.detach().double() for weight in weights]
    return tucker2_from_products(
        [weight.T for weight in stack],
        right=lambda A: [weight @ A for weight in stack],
        left=lambda B: [weight.T @ B for weight in stack],
        n=len(stack[0]),
        rank=rank,
    )


def tucker2_from_products(
    blocks: Sequence[Tensor],
    right: Callable[[Tensor], list[Tensor]],
    left: Callable[[Tensor], list[Tensor]],
    n: int,
    rank: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `tucker2` of matrices W_l [n, k] that it reads only through products with them.

    So each W_l may itself be a product of smaller matrices (convert/to_lotr.py).

    Args:
        blocks: For each l a matrix [k, c_l] that has the same left singular vectors and singular
            values as W_l^T, such as W_l^T itself.
        right: right(A) returns all W_l A.
        left: left(B) returns all W_l^T B.
        n: Rows of the matrices.
        rank: As for `tucker2`.
    """
    A = leading_vectors(blocks, min(rank[0], len(blocks[0])))
    captured = -math.inf
    # Each half-step computes the best factor given the other one, so `captured` never falls.
    for _ in range(20):
        B = leading_vectors(right(A), min(rank[1], n))
        products = left(B)
        A = leading_vectors(products, A.shape[1])
        previous = captured
        captured = sum(float((A.T @ product).square().sum()) for product in products)
        if captured - previous <= 1e-9 * captured:
            break
    cores = torch.zeros(len(blocks), *rank, dtype=torch.float64, device=A.device)
    cores[:, : A.shape[1], : B.shape[1]] = torch.stack([A.T @ product for product in products])
    return padded(A, rank[0]), padded(B, rank[1]), cores


# ---- from the gradients --------------------------------------------------------------------------

_ITERATIONS = 3  # of the subspace iteration; each is one pass over the batches
_EXTRA_DIRECTIONS = 8  # columns of the iteration in addition to a factor's rank
_PROBES = 32  # random vectors that estimate what A does not capture


class CapturedGradient(NamedTuple):
    """The share of the gradients' squared norm that A and B capture, from 0 to 1.

    A higher rank captures more. The part outside A is estimated, to about 10 %.

    Attributes:
        total: The share over all adapted layers.
        layers: The share of each layer, by its name.
    """

    total: float
    layers: dict[str, float]


class _GradientProducts:
    """Products of one layer's gradient dW = g^T x with V and U, summed over the batches.

    Args:
        layer: The layer.
        V: [k, c_V].
        U: [n, c_U].

    Attributes:
        right: dW V = g^T (x V) [n, c_V].
        left: dW^T U = x^T (g U) [k, c_U].
    """

    def __init__(self, layer: nn.Module, V: Tensor, U: Tensor):
        self.layer = layer
        self.V = V
        self.U = U
        self.right = V.new_zeros(len(U), V.shape[1])
        self.left = V.new_zeros(len(V), U.shape[1])

    def tap(
        self, anchor: Tensor, layer: nn.Module, args: tuple, kwargs: dict[str, Tensor], y: Tensor
    ) -> Tensor:
        """Adds the anchor to the layer's output. The backward of the sum calls `add`.

        Args:
            anchor: A zero that requires a gradient, so that autograd computes g. The other
                arguments are a forward hook's.
        """
        # In a part of the model that runs under no_grad, a layer has no backward.
        if not torch.is_grad_enabled():
            return y
        # x is the first argument, by position or by name.
        inputs = (*args, *kwargs.values())
        tapped = y + anchor
        tapped.register_hook(partial(self.add, inputs[0].detach()))
        return tapped

    def add(self, x: Tensor, g: Tensor) -> None:
        """Adds the products for an input x [.., k] and the gradient g [.., n] of its output."""
        x_rows = x.reshape(-1, x.shape[-1]).to(self.V.dtype)
        g_rows = g.reshape(-1, g.shape[-1]).to(self.V.dtype)
        self.right.add_(g_rows.T @ (x_rows @ self.V))
        self.left.add_(x_rows.T @ (g_rows @ self.U))


def start_from_gradients(
    model: nn.Module,
    layers: Mapping[str, Any],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> CapturedGradient:
    """Sets A and B to INIT_GAIN times the leading directions of the gradients dW_l = g^T x.

    Shared A and B span the leading directions of all their layers' dW_l, by three steps of subspace
    iteration from a random start. A step is one pass over the batches, in which both products are
    with the A and B of the step before:

        P_l = dW_l A = g^T (x A)      B <- leading left singular vectors of [P_1 .. P_L]
        T_l = dW_l^T B = x^T (g B)    A <- leading left singular vectors of [T_1 .. T_L]

    A fourth pass measures what they capture: |B^T dW_l A|^2 / |dW_l|^2.

    Args:
        model: The adapted model, whose adapter must be off.
        layers: Its adapted layers by name.
        batches: Each is used four times.
        loss: (model, batch) -> a scalar.

    Raises:
        TypeError, ValueError: As `lotr_ext.init_from_gradient`.
    """
    # Four passes read them, and an iterator would be empty after the first.
    batches = list(batches)
    if not batches:
        raise ValueError("batches: expected at least one, got none")
    generator = torch.Generator("cpu").manual_seed(0)
    factors = dict.fromkeys(
        factor for layer in layers.values() for factor in (layer.factors.A, layer.factors.B)
    )
    directions = {factor: _random_directions(factor, generator) for factor in factors}
    for _ in range(_ITERATIONS):
        all_products = [
            _GradientProducts(layer, directions[layer.factors.A], directions[layer.factors.B])
            for layer in layers.values()
        ]
        _sum_over_batches(all_products, model, batches, loss)
        blocks: dict[nn.Module, list[Tensor]] = {factor: [] for factor in directions}
        for products in all_products:
            blocks[products.layer.factors.A].append(products.left.double())
            blocks[products.layer.factors.B].append(products.right.double())
        for factor, factor_blocks in blocks.items():
            _check_gradients(factor_blocks)
            previous = directions[factor]
            directions[factor] = leading_vectors(factor_blocks, previous.shape[1]).to(previous)

    kept_directions = {factor: vectors[:, : factor.rank] for factor, vectors in directions.items()}
    captured = _captured(model, layers, kept_directions, batches, loss)
    with torch.no_grad():
        for factor, vectors in kept_directions.items():
            factor.value.copy_(INIT_GAIN * padded(vectors.double(), factor.rank))
    return captured


def _random_directions(factor: nn.Module, generator: torch.Generator) -> Tensor:
    """Returns random orthonormal columns [features, c] on the factor's device.

    c is the factor's rank plus _EXTRA_DIRECTIONS, at most its features.
    """
    columns = min(factor.rank + _EXTRA_DIRECTIONS, factor.features)
    drawn = torch.empty(factor.features, columns, device="cpu")
    # The iteration needs columns of length 1, without INIT_GAIN.
    return fill_factor_(drawn, "orthonormal", generator).to(factor.value.device) / INIT_GAIN


def _check_gradients(blocks: list[Tensor]) -> None:
    is_finite = all(bool(block.isfinite().all()) for block in blocks)
    if not is_finite or not any(bool(block.any()) for block in blocks):
        raise ValueError(
            "loss: expected finite gradients for each group of layers, not all zero, got gradients "
            "that are zero, NaN or infinite"
        )


def _captured(
    model: nn.Module,
    layers: Mapping[str, Any],
    directions: Mapping[nn.Module, Tensor],
    batches: list[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> CapturedGradient:
    """Returns the shares |B^T dW_l A|^2 / |dW_l|^2, by one pass over the batches.

    |dW|^2 = |dW A|^2 + |dW (1 - A A^T)|^2. The second part is the mean of |dW z|^2 over random z
    that are orthogonal to A, so the error is relative to what A does not capture.
    """
    generator = torch.Generator("cpu").manual_seed(1)
    all_products = []
    for layer in layers.values():
        A = directions[layer.factors.A]
        probes = torch.randn(len(A), _PROBES, device="cpu", generator=generator).to(A)
        probes -= A @ (A.T @ probes)
        all_products.append(
            _GradientProducts(layer, torch.cat([A, probes], 1), directions[layer.factors.B])
        )
    _sum_over_batches(all_products, model, batches, loss)

    captured: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name, products in zip(layers, all_products):
        in_A, outside = products.right.double().tensor_split([-_PROBES], dim=1)
        captured[name] = float((products.U.double().T @ in_A).square().sum())
        norms[name] = float(in_A.square().sum() + outside.square().sum() / _PROBES)
    # A layer may have no gradient at all. Not all layers, see `_check_gradients`.
    shares = {name: captured[name] / norm if norm else 0.0 for name, norm in norms.items()}
    return CapturedGradient(sum(captured.values()) / sum(norms.values()), shares)


def _sum_over_batches(
    all_products: Sequence[_GradientProducts],
    model: nn.Module,
    batches: list[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> None:
    """Computes the products of each layer, summed over the batches and all processes.

    autograd computes the gradient of an output only if a tensor before it requires one, and the
    weights are frozen. So each layer adds to its output the `anchor`, a zero that requires one.

    Restores the buffers and the random state.
    """
    anchor = torch.zeros((), device="cpu", requires_grad=True)
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(torch.random.fork_rng())
        for buffer in model.buffers():  # a batch norm, for example, counts the batches
            stack.callback(buffer.copy_, buffer.detach().clone())
        for products in all_products:
            hook = partial(products.tap, anchor)
            stack.enter_context(products.layer.register_forward_hook(hook, with_kwargs=True))
        for batch in batches:
            (gradient,) = torch.autograd.grad(loss(model, batch), anchor, allow_unused=True)
            # If no layer has a part in the loss, or if a checkpoint hides its part.
            if gradient is None:
                raise ValueError(
                    "loss: expected one that depends on the adapted layers, got one in which none "
                    "has a part. Under checkpointing, use_reentrant=False is needed."
                )
    # The batches of the processes differ, but all processes need the same A and B.
    if dist.is_available() and dist.is_initialized():
        for products in all_products:
            dist.all_reduce(products.right)
            dist.all_reduce(products.left)
