"""Adapted layers: LoTRLinear in nn.Linear's place, LoTRConv1D in transformers' Conv1D's, LoTRWrapped around anything else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .factors import LoTRFactors, check_rank
from .layer import LoTRLayer, check_settings
from .layer_call import call_wrapped
from .ops import accumulate_dtype

DEFAULT_RANK = 8


class LoTRLinear(LoTRLayer, nn.Linear):
    """y = x W^T + bias + s ((drop(x) A) G) B^T with W and bias frozen: x [..., in_features] -> [..., out_features].

    rank: that of the factors, or of a new pair (8 by default) where factors is None. alpha, rslora, scaling: s is scaling if
    given, else alpha / r, with rslora alpha / sqrt(r); alpha = None means s = 1. r is max(r_in, r_out). dropout: the
    probability of dropping an element of x on the adapter's way, in [0, 1), in training.
    dtype: that of weight and bias; a new pair of factors and the core are float32 (float64 beside float64 weights).
    The core starts at zero, so the layer starts as the plain linear layer. Equation and shapes: arXiv 2402.01376, section 3.
    Raises TypeError or ValueError naming the argument, expected and got.

    state_dict: `weight`, `bias` (as nn.Linear), `core`; and `factors.A`, `factors.B` unless an owner registers the factors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | tuple[int, int] | None = None,
        *,
        bias: bool = True,
        factors: LoTRFactors | None = None,
        alpha: float | None = None,
        rslora: bool = False,
        scaling: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        settings = check_settings(alpha=alpha, rslora=rslora, scaling=scaling, dropout=dropout)
        if factors is None:
            wide = accumulate_dtype(dtype or torch.get_default_dtype())
            factors = LoTRFactors(in_features, out_features, DEFAULT_RANK if rank is None else rank, device=device, dtype=wide)
        elif rank is not None and check_rank(rank) != (factors.r_in, factors.r_out):
            raise ValueError(f"rank: expected that of factors, {factors.rank}, or None, got {rank}")
        self._check_factors(factors, in_features, out_features)
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._attach(factors, self.weight, settings)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        factors: LoTRFactors,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        scaling: float | None = None,
        dropout: float = 0.0,
    ) -> LoTRLinear:
        """Adapts linear: takes over its weight and bias, the very tensors, and freezes them."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        if isinstance(linear, LoTRLayer):
            raise TypeError("linear: expected a plain nn.Linear, got a layer that is adapted already")
        settings = check_settings(alpha=alpha, rslora=rslora, scaling=scaling, dropout=dropout)
        cls._check_factors(factors, linear.in_features, linear.out_features)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._attach(factors, linear.weight, settings)
        return layer.train(linear.training)

    def _base(self, x: Tensor) -> Tensor:
        return nnf.linear(x, self.weight, self.bias)

    def _matrix(self) -> Tensor:
        return self.weight

    def to_base(self) -> nn.Linear:
        """A plain nn.Linear of the base weight and bias as they stand (with the adapter in them if merged)."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        self._give_start_back(linear.weight)
        return linear.train(self.training)

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear that computes what this layer computes in eval mode; shares nothing with it."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self._merged_weight().clone(), requires_grad=False)
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)


class LoTRConv1D(LoTRLayer):
    """transformers' Conv1D (GPT-2), adapted: a linear layer whose weight is stored as [in_features, out_features].

    state_dict keys as the original's (`weight`, `bias`) and `core`; attributes nf, nx kept.
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        factors: LoTRFactors,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        scaling: float | None = None,
        dropout: float = 0.0,
    ) -> LoTRConv1D:
        """Adapts a Conv1D: takes over its weight and bias, the very tensors, and freezes them."""
        settings = check_settings(alpha=alpha, rslora=rslora, scaling=scaling, dropout=dropout)
        nx, nf = linear.weight.shape
        cls._check_factors(factors, nx, nf)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features, layer.nx, layer.nf = nx, nf, nx, nf
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._base_class = type(linear)
        layer._attach(factors, linear.weight, settings)
        return layer.train(linear.training)

    def _base(self, x: Tensor) -> Tensor:
        return nnf.linear(x, self.weight.mT, self.bias)

    def _matrix(self) -> Tensor:
        return self.weight.mT

    def to_base(self) -> nn.Module:
        """The plain Conv1D again, of the base weight and bias as they stand."""
        layer = self._base_class.__new__(self._base_class)
        nn.Module.__init__(layer)
        layer.nx, layer.nf, layer.weight, layer.bias = self.nx, self.nf, self.weight, self.bias
        self._give_start_back(layer.weight)
        return layer.train(self.training)

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear that computes what this layer computes in eval mode; shares nothing with it."""
        linear = nn.Linear(self.nx, self.nf, bias=False, device="meta")
        linear.weight = nn.Parameter(self._merged_weight().contiguous(), requires_grad=False)
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)


class LoTRWrapped(LoTRLayer):
    """Any module with in_features and out_features, adapted: its own forward is called, its weight never read.

    For quantised and other special linear layers. state_dict: the base's keys under `base_layer.`, and `core`.
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        factors: LoTRFactors,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        scaling: float | None = None,
        dropout: float = 0.0,
    ) -> LoTRWrapped:
        """Adapts linear, which becomes `base_layer`, frozen."""
        settings = check_settings(alpha=alpha, rslora=rslora, scaling=scaling, dropout=dropout)
        for name in ("in_features", "out_features"):
            if not isinstance(getattr(linear, name, None), int):
                got = getattr(linear, name, None)
                raise TypeError(f"linear: expected a module with an int {name}, got {type(linear).__name__} with {got!r}")
        cls._check_factors(factors, linear.in_features, linear.out_features)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.base_layer = linear.requires_grad_(False)
        like = next((t for t in (*linear.parameters(), *linear.buffers())), factors.A)
        layer._attach(factors, like, settings)
        return layer.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The base module's own weight, for code that asks for its device or dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base module's own bias."""
        return getattr(self.base_layer, "bias", None)

    def _base(self, x: Tensor) -> Tensor:
        return self.base_layer(x)

    def _call(self, x: Tensor, A: Tensor, B: Tensor, adapter) -> Tensor:
        return call_wrapped(x, self.base_layer, A, B, adapter)

    def _matrix(self) -> Tensor:
        raise TypeError(
            f"merge: expected an nn.Linear or Conv1D base, got {type(self.base_layer).__name__}, "
            "whose stored weight is its own affair"
        )

    def to_base(self) -> nn.Module:
        """The wrapped module."""
        return self.base_layer


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D, told by its form: transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def adapt(
    module: nn.Module,
    factors: LoTRFactors,
    *,
    alpha: float | None = None,
    rslora: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> LoTRLayer:
    """module as an adapted layer of the class that fits it. A subclass of nn.Linear with a forward of its own is wrapped."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    floating = getattr(getattr(module, "weight", None), "is_floating_point", bool)()
    kind = LoTRLinear if plain and floating else LoTRConv1D if is_conv1d(module) else LoTRWrapped
    return kind.from_linear(module, factors, alpha=alpha, rslora=rslora, scaling=scaling, dropout=dropout)
