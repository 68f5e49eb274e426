"""Adapted layers: LoTRLinear replaces nn.Linear, LoTRConv1D transformers' Conv1D."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..autograd.call import Call, call_linear
from ..autograd.tensor_parallel import is_dtensor
from .checks import check_dtype
from .factors import LoTRFactors
from .layer import LoTRLayer
from .magnitude import no_magnitude
from .parallel_styles import move_hooks
from .quantized import is_conv1d
from .settings import Settings
from .sharded import whole_shape

Layer = TypeVar("Layer", bound="AdaptsModule")


def _held(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return vars(module), module._parameters, module._buffers, module._modules


def _hand_over(source: nn.Module, target: nn.Module, names: frozenset[str]) -> None:
    """Gives target the attributes, parameters, buffers and modules of these names that source has."""
    for to, held in zip(_held(target), _held(source)):
        to.update({name: held[name] for name in names if name in held})
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set & names


class AdaptsModule(LoTRLayer):
    """Base class of layers that adapt one existing module."""

    _base_class: type[nn.Module] = nn.Linear
    _base_further: frozenset[str] = frozenset()  # attributes, tensors and modules that others have set on the module
    _keeps_module = False  # instead of its tensors

    @classmethod
    def from_linear(
        cls: type[Layer],
        linear: nn.Module,
        factors: LoTRFactors,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        scaling: float | Literal["auto"] | None = None,
        dropout: float = 0.0,
        magnitude: bool = False,
    ) -> Layer:
        """Adapts linear: uses its weight and bias themselves, not copies (LoTRWrapped: the module), and freezes them.

        Raises:
            TypeError, ValueError: another kind of module, one that is adapted already, factors of other sizes, or an argument
                of the wrong type or value.
        """
        return cls.adapting(linear, factors, Settings(alpha, rslora, scaling, dropout, magnitude))

    @classmethod
    def adapting(cls: type[Layer], linear: nn.Module, factors: LoTRFactors, settings: Settings) -> Layer:
        """`from_linear` with checked settings."""
        cls._check_unadapted(linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = cls._sizes_of(linear)
        cls._check_factors(factors, layer.in_features, layer.out_features)
        device = cls._device_of(linear) or factors.A.device
        cls._check_device(factors, device)
        if settings.magnitude and (why := no_magnitude(linear)) is not None:
            raise ValueError(f"magnitude: expected a layer whose rows can be measured, got {why}; adapt it without")
        layer._take(linear)
        move_hooks(linear, layer)
        layer._attach(factors, device, settings)
        layer._base_class = type(linear)
        if not (cls._keeps_module or is_dtensor(linear.weight)):  # tensor parallelism sets attributes of its own
            linear.requires_grad_(False)
            layer._base_further = frozenset(n for held in _held(linear) for n in held if not hasattr(layer, n))
            _hand_over(linear, layer, layer._base_further)
        return layer.train(linear.training)

    @classmethod
    def _sizes_of(cls, linear: nn.Module) -> tuple[int, int]:
        """(in_features, out_features). Raises TypeError for another kind of module."""
        raise TypeError(f"{cls.__name__} must define _sizes_of")

    @staticmethod
    def _device_of(linear: nn.Module) -> torch.device | None:
        """The device of linear's tensors; None for a module without tensors."""
        return linear.weight.device

    def _take(self, linear: nn.Module) -> None:
        """Takes over linear's weight and bias, or the module."""
        self.weight, self.bias = linear.weight, linear.bias

    def _give_back(self, **attributes: object) -> nn.Module:
        """A module of the adapted one's class with its weight, bias and attributes, without what an init moved out of it."""
        base = self._base_class.__new__(self._base_class)
        nn.Module.__init__(base)
        base.weight, base.bias = self.weight, self.bias
        vars(base).update(attributes)
        _hand_over(self, base, self._base_further)
        move_hooks(self, base)
        self._give_start_back()
        return base.train(self.training)

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear that computes the same as this layer in eval mode, and shares no tensor with it."""
        weight = self._merged_weight().clone(memory_format=torch.contiguous_format)
        return self._plain(weight, None if self.bias is None else self.bias.detach().clone())

    def _plain(self, weight: Tensor, bias: Tensor | None) -> nn.Linear:
        """A frozen nn.Linear with these tensors, not copies."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return linear.train(self.training)


class LoTRLinear(AdaptsModule, nn.Linear):
    """y = x W^T + bias + s ((drop(x) A) G) B^T with W and bias frozen: x [..., in_features] -> [..., out_features].

    rank: of the factors, or of a new pair (8 by default) if factors is None. alpha, rslora, scaling: s is scaling if
    given ("auto": 4 (8 / r)^1.5), otherwise alpha / r, with rslora alpha / sqrt(r); alpha = None means alpha = r. r is
    max(r_in, r_out). dropout: the probability of dropping an element of the adapter's x in training, in [0, 1).
    dtype: that of weight and bias, float32, float64, bfloat16 or float16, torch's default if None; a new pair of factors and
    the core are float32 (float64 beside float64 weights).
    magnitude: whether the layer trains a length for each row of W + s B G^T A^T (DoRA, arXiv 2402.09353). After the weight has
    changed, call `reset_magnitude`.
    The core starts at zero, so the layer starts as the plain linear layer. Equation and shapes: arXiv 2402.01376, section 3.
    Raises TypeError or ValueError naming the argument, expected and got.

    state_dict: `weight`, `bias` (as nn.Linear), `core`, with magnitudes `magnitude`; and `factors.A`, `factors.B` unless an
    owner registers the factors.
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
        scaling: float | Literal["auto"] | None = None,
        dropout: float = 0.0,
        magnitude: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        settings = Settings(alpha, rslora, scaling, dropout, magnitude)
        check_dtype(dtype)
        factors = self._factors_for(factors, rank, (in_features, out_features), device, dtype)
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._check_device(factors, self.weight.device)
        self._attach(factors, self.weight.device, settings)

    @classmethod
    def _sizes_of(cls, linear: nn.Module) -> tuple[int, int]:
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        return linear.in_features, linear.out_features

    def _base(self, x: Tensor) -> Tensor:
        return nnf.linear(x, self.weight, self.bias)

    def _call(self, x: Tensor, call: Call, A: Tensor, B: Tensor) -> Tensor:
        own = self._parameters
        weight, bias = (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (self.weight, self.bias)
        return call_linear(x, weight, bias, A, B, call)

    def _matrix(self) -> Tensor:
        return self.weight

    def to_base(self) -> nn.Linear:
        """A plain nn.Linear, of the class that was adapted, with the current base weight and bias (which include the adapter if
        merged).

        TypeError for a weight or bias that is no longer a parameter (weight_norm, spectral_norm, parametrizations, pruning).
        """
        self._check_base()
        return self._give_back(in_features=self.in_features, out_features=self.out_features)


class LoTRConv1D(AdaptsModule):
    """transformers' Conv1D (GPT-2), adapted: a linear layer whose weight is stored as [in_features, out_features].

    state_dict keys as the original's (`weight`, `bias`) and `core`; attributes nf, nx kept.
    """

    @classmethod
    def _sizes_of(cls, linear: nn.Module) -> tuple[int, int]:
        if not is_conv1d(linear):
            raise TypeError(f"linear: expected transformers' Conv1D, got {type(linear).__name__}")
        return tuple(whole_shape(linear.weight))

    def _take(self, linear: nn.Module) -> None:
        super()._take(linear)
        self.nx, self.nf = self.in_features, self.out_features

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # Conv1D's name of the argument

    def _base(self, x: Tensor) -> Tensor:
        return nnf.linear(x, self.weight.t(), self.bias)

    def _matrix(self) -> Tensor:
        return self.weight.t()

    def to_base(self) -> nn.Module:
        """A plain Conv1D with the current base weight and bias. TypeError as `LoTRLinear.to_base`."""
        self._check_base()
        return self._give_back(nx=self.nx, nf=self.nf)
