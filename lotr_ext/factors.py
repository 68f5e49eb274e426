"""The factors A and B that the layers of a group share, and the scaling s of their product.

    delta W_l = s B G_l^T A^T      A [in_features, r_in], B [out_features, r_out], G_l [r_in, r_out]

Each factor is a separate module, so that sharded training can gather and reduce it once for all of
its layers, and so that one A can be paired with several B. Sharded training gathers a module's
parameters around its call. So layers do not read A and B as attributes: they pass what they compute
with them to `LoTRFactors.read`.

Not here: the layers, which hold the cores G_l (layers.py).
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import check_dimension, check_dtype, check_number, check_rank
from .core.dispatch import Caches
from .core.factor_cache import FactorCache
from .core.operators import accumulate_dtype
from .init import INIT_GAIN, fill_factor_

Scaling = float | Literal["auto"]
DEFAULT_RANK = 8


def scaling_of(
    rank: int | tuple[int, int],
    alpha: float | None = None,
    rslora: bool = False,
    scaling: Scaling = "auto",
    diagonal: bool = False,
) -> float:
    """Returns the scaling s of an adapter.

    "auto" is 4 (8 / r)^1.5 / INIT_GAIN^3. INIT_GAIN = 0.4 is the constant by which the initial
    factors are multiplied. With "auto", a learning rate that suits LoRA suits LoTR at every rank
    (docs/choosing.md).

    Args:
        rank: r, or (r_in, r_out), of which the larger one is r.
        alpha: If given, s is alpha / r, and "auto" does not apply.
        rslora: Whether s is alpha / sqrt(r) (arXiv 2312.03732). alpha is r if it is not given.
        scaling: s itself, or "auto".
        diagonal: Whether the cores are diagonal. "auto" is then 4 (8 / r)^0.5 / INIT_GAIN^3,
            because their products have fewer terms by a factor of r.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If rank is below 1, if alpha or scaling is not finite, or if scaling is given
            together with alpha or rslora.
    """
    if not isinstance(rslora, bool):
        raise TypeError(f"rslora: expected a bool, got {type(rslora).__name__} {rslora!r}")
    r = max(check_rank(rank))
    if scaling != "auto":
        check_number("scaling", scaling)
        if alpha is not None or rslora:
            raise ValueError(
                f"scaling: expected no alpha or rslora, which cannot be combined with it, got "
                f"scaling={scaling}, alpha={alpha}, rslora={rslora}. Pass one of them."
            )
        return float(scaling)
    if alpha is None and not rslora:
        exponent = 0.5 if diagonal else 1.5
        return 4.0 * (8 / r) ** exponent / INIT_GAIN**3
    numerator = r if alpha is None else alpha
    check_number("alpha", numerator)
    return numerator / (math.sqrt(r) if rslora else r)


def set_unregistered(module: nn.Module, name: str, value: object) -> None:
    """Sets `module.name` to a value that has modules or tensors, without registering them.

    `setattr` would make them children of the module: state_dict would contain them twice, and
    `.to()` and `train()` would reach modules that belong to others. An attribute in `__dict__` is
    also read without nn.Module.__getattr__, which costs 0.6 us.

    Args:
        module: The module that gets the attribute.
        name: The attribute.
        value: Its value.
    """
    module.__dict__[name] = value


class LoTRFactor(nn.Module):
    """One factor [features, rank]: an A [in_features, r_in] or a B [out_features, r_out].

    A factor may be in several pairs (`LoTRFactors.of`). Its gradient is one float32 sum (float64
    for float64) over all layers, so autograd sees one gradient per backward. Layers with the same
    A share u = x A, even if their B differ.

    Args:
        features: in_features for an A, out_features for a B.
        rank: The number of columns.
        init: "orthonormal" (orthonormal columns, or rows if the rank exceeds the features),
            "normal" (N(0, 1), as in the paper's code) or "kaiming", times INIT_GAIN.
        device: As for torch.empty.
        dtype: float32, float64, bfloat16 or float16. torch's default dtype if None.

    Attributes:
        value: The parameter [features, rank].

    Raises:
        TypeError, ValueError: If an argument has the wrong type or value. The message names it.

    Warns:
        UserWarning: If the rank exceeds the features.
    """

    # With init "svd", the factor that was subtracted from the weights. Not in state_dict.
    start: Tensor | None

    def __init__(
        self,
        features: int,
        rank: int,
        *,
        init: str = "orthonormal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_dimension("features", features)
        check_dimension("rank", rank)
        check_dtype(dtype)
        super().__init__()
        # Columns beyond the features depend on the others: they cost memory and express nothing.
        if rank > features:
            warnings.warn(
                f"lotr_ext: rank {rank} exceeds {features} features; a lower rank gives the same "
                f"functions",
                stacklevel=2,
            )
        self.features = features
        self.rank = rank
        self.value = nn.Parameter(torch.empty(features, rank, device=device, dtype=dtype))
        self.register_buffer("start", None, persistent=False)
        self.cache = FactorCache()
        fill_factor_(self.value, init)

    def forward(self, operation: Callable[[Tensor], Any]) -> Any:
        """Returns operation(value). Sharded training gathers the value around this call."""
        return operation(self.value)

    def extra_repr(self) -> str:
        return f"features={self.features}, rank={self.rank}"


class LoTRFactors(nn.Module):
    """The pair A [in_features, r_in] and B [out_features, r_out] of a group (arXiv 2402.01376).

    state_dict: `A.value`, `B.value`.

    Args:
        in_features: The in_features of the layers.
        out_features: The out_features of the layers.
        rank: An int, or (r_in, r_out).
        init: See `LoTRFactor`, also for device, dtype, errors and warnings.

    Attributes:
        A: The `LoTRFactor` [in_features, r_in].
        B: The `LoTRFactor` [out_features, r_out].
        rank: An int if r_in = r_out, else the pair.
        caches: The cache of A and that of B. All layers with one of these factors share its cache.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | tuple[int, int],
        *,
        init: str = "orthonormal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_dimension("in_features", in_features)
        check_dimension("out_features", out_features)
        r_in, r_out = check_rank(rank)
        super().__init__()
        A = LoTRFactor(in_features, r_in, init=init, device=device, dtype=dtype)
        B = LoTRFactor(out_features, r_out, init=init, device=device, dtype=dtype)
        self._set_pair(A, B)

    @staticmethod
    def of(A: LoTRFactor, B: LoTRFactor) -> "LoTRFactors":
        """Returns the pair of two existing factors, which may also be in other pairs.

        Raises:
            TypeError: If A or B is not a LoTRFactor, or if their dtypes differ.
            ValueError: If A is B.
        """
        for name, factor in (("A", A), ("B", B)):
            if not isinstance(factor, LoTRFactor):
                raise TypeError(f"{name}: expected a LoTRFactor, got {type(factor).__name__}")
        if A is B:
            raise ValueError("B: expected another factor than A, got the same one")
        if A.value.dtype != B.value.dtype:
            raise TypeError(f"B: expected dtype {A.value.dtype}, as A has, got {B.value.dtype}")
        pair = LoTRFactors.__new__(LoTRFactors)
        nn.Module.__init__(pair)
        pair._set_pair(A, B)
        return pair

    def _set_pair(self, A: LoTRFactor, B: LoTRFactor) -> None:
        # Children, for parameters() and state_dict, and in `__dict__`, from which `read` is faster.
        self.A = A
        self.B = B
        set_unregistered(self, "A", A)
        set_unregistered(self, "B", B)
        self.caches = Caches(A.cache, B.cache)
        self.in_features = A.features
        self.out_features = B.features
        self.r_in = A.rank
        self.r_out = B.rank
        self.rank = A.rank if A.rank == B.rank else (A.rank, B.rank)

    def read(self, operation: Callable[[Tensor, Tensor], Any]) -> Any:
        """Returns operation(A, B). Gathers sharded A and B around the call.

        Shard each LoTRFactor, not the pair.

        Args:
            operation: In a forward, it returns a tensor. It holds x and its other tensors itself:
                if they were arguments, FSDP2 would wrap each x in a new tensor, and layers could
                not recognize that they have the same x.
        """
        A = self.A
        B = self.B
        # Plain parameters are read from nn.Module's dictionary, here and in the layers. Calls of
        # the modules would cost 7 us per layer (bench.host, one token), and reads by
        # nn.Module.__getattr__ 0.6 us each.
        A_value = A._parameters.get("value")
        B_value = B._parameters.get("value")
        # The modules are called if parametrize computes a value, which is then not in the
        # dictionary, or if they have hooks, in which FSDP2 and ZeRO-3 gather. The calls are nested,
        # because the operation needs both values at the same time.
        if A_value is None or B_value is None or A._forward_pre_hooks or B._forward_pre_hooks:
            return A(lambda value: B(partial(operation, value)))
        return operation(A_value, B_value)


def check_factors(factors: object) -> None:
    """Checks that factors are a pair of A and B."""
    if not isinstance(factors, LoTRFactors):
        raise TypeError(f"factors: expected LoTRFactors, got {type(factors).__name__}")


def factors_for(
    factors: LoTRFactors | None,
    rank: int | tuple[int, int] | None,
    sizes: tuple[int, int],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> LoTRFactors:
    """Returns the factors of a new layer of sizes (in_features, out_features).

    Args:
        factors: Returned if given.
        rank: The rank of new factors, 8 if None. If factors are given, None or their rank.
        sizes: (in_features, out_features).
        device: The device of new factors.
        dtype: The dtype of the layer. New factors are float32, or float64 for float64.

    Raises:
        TypeError: If factors are not LoTRFactors, or the dtype is not one in which layers compute.
        ValueError: If rank is not the rank of the factors.
    """
    check_dtype(dtype)
    if factors is None:
        new_rank = DEFAULT_RANK if rank is None else rank
        factors_dtype = accumulate_dtype(dtype or torch.get_default_dtype())
        return LoTRFactors(*sizes, new_rank, device=device, dtype=factors_dtype)
    check_factors(factors)
    if rank is not None and check_rank(rank) != (factors.r_in, factors.r_out):
        raise ValueError(f"rank: expected {factors.rank}, the rank of factors, or None, got {rank}")
    return factors
