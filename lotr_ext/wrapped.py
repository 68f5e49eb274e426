"""LoTRWrapped: an adapter around any other linear module, quantised ones too; and `adapt`, which picks a layer's class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .core.operators import accumulate_dtype
from .factors import LoTRFactors, Scaling
from .layers import (
    LoTRConv1D,
    LoTRLayer,
    LoTRLinear,
    check_plain,
    features,
    is_conv1d,
    linear_of,
    plus,
)

__all__ = ["LoTRWrapped", "adapt", "dequantizer", "has_plain_weight", "layer_class", "mergeable"]


def has_plain_weight(module: nn.Module) -> bool:
    """Whether products may read module.weight: a floating tensor that holds its values, and not codes of one byte."""
    weight = getattr(module, "weight", None)
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and weight.dtype.itemsize > 1
    )


def dequantizer(module: nn.Module) -> Callable[[], Tensor] | None:
    """A function that returns W [out_features, in_features] of a quantised module by the quantiser's own code; None if none is
    known.

    torchao, optimum-quanto: a tensor subclass with dequantize(). bitsandbytes: Linear4bit and Linear8bitLt. HQQ and others: a
    module with dequantize().
    """
    weight = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit" and weight.quant_state is not None:
        from bitsandbytes.functional import dequantize_4bit

        def dense() -> Tensor:
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                module.state_dict()  # restores the order of codes that an evaluation has packed for the CPU
            return dequantize_4bit(weight.data, weight.quant_state)

        return dense
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return None if scales is None else lambda: int8_vectorwise_dequant(weight.data, scales)
    if (
        isinstance(weight, Tensor)
        and not has_plain_weight(module)
        and type(weight).dequantize is not Tensor.dequantize
    ):
        return weight.dequantize
    own = getattr(module, "dequantize", None)
    return own if callable(own) else None


def matrix_of(base: nn.Module) -> Tensor:
    """W [n, k] of a base with a plain weight, a view of it. Raises TypeError for another base."""
    if not has_plain_weight(base) or not (isinstance(base, nn.Linear) or is_conv1d(base)):
        raise TypeError(
            f"merge: expected a base with a plain weight (nn.Linear, Conv1D), got {type(base).__name__}. Pass "
            f"dequantize=True to put a plain nn.Linear in the place of a quantised base, or use the model without merging."
        )
    return base.weight.t() if is_conv1d(base) else base.weight


@torch.no_grad()
def mergeable(base: nn.Module) -> Tensor:
    """W [n, k] of a base that returns x W^T + bias, up to rounding, for writing. Raises TypeError for another base.

    A base with a forward of its own or hooks is called on two rows of random numbers, in eval mode.
    """
    weight = matrix_of(base)
    check_plain(base, "merge")
    if type(base) is nn.Linear and not base._forward_hooks and not base._forward_pre_hooks:
        return weight
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(
        weight.device, weight.dtype
    )
    modes = [(module, module.training) for module in base.modules()]
    try:
        y = base.eval()(x)
    finally:
        for module, training in modes:
            module.training = training
    want = nnf.linear(x, weight, base.bias)
    bound = max(1e-4, 4 * torch.finfo(weight.dtype).eps) * want.abs().max().item()
    same_shape = isinstance(y, Tensor) and y.shape == want.shape
    if not same_shape or not torch.allclose(
        y.double(), want.double(), rtol=0, atol=bound, equal_nan=True
    ):
        raise TypeError(
            f"merge: expected a base that returns x W^T + bias, got {type(base).__name__}, which returns something else by its "
            f"forward or a hook. Use the model without merging."
        )
    return weight


class LoTRWrapped(LoTRLayer):
    """Any module with in_features and out_features, adapted: its own forward is called, and the adapter is added to its output.

    For quantised (torchao, bitsandbytes) and other special linear layers, such as those with hooks. state_dict: the base's keys
    under `base_layer.`, and `core`.
    """

    quantized_base: (
        nn.Module | None
    )  # while a dense layer replaces it; not a child, so not in state_dict

    @staticmethod
    def sizes_of(linear: nn.Module) -> tuple[int, int] | None:
        return features(linear)

    def _take_base(self, linear: nn.Module) -> None:
        self.base_layer = linear
        self.__dict__["quantized_base"] = None

    @property
    def weight(self) -> Tensor:
        """The base module's own weight, for code that asks for its device or dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base module's own bias."""
        return getattr(self.base_layer, "bias", None)

    def base(self, x: Tensor) -> Tensor:
        return self.base_layer(x)

    def _with_adapter(self, x: Tensor, core: Tensor, index: Tensor | None) -> Tensor:
        return self._run(x, core, index, base_output=self.base_layer(x))

    def matrix(self) -> Tensor:
        return matrix_of(self.base_layer)

    def _weight_to_write(self, caller: str) -> Tensor:
        check_plain(self.base_layer, caller)
        return self.matrix()

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W [out_features, in_features] of a quantised base. Raises TypeError if it cannot be made dense."""
        make = dequantizer(self.base_layer)
        if make is None:
            raise TypeError(
                f"merge: expected a base whose dense weight can be read (nn.Linear, Conv1D, torchao, bitsandbytes, or a module "
                f"with dequantize()), got {type(self.base_layer).__name__}. Use the model without merging."
            )
        weight = make()
        if not isinstance(weight, Tensor) or tuple(weight.shape) != (
            self.out_features,
            self.in_features,
        ):
            raise TypeError(
                f"merge: expected a dense [{self.out_features}, {self.in_features}], got {type(weight).__name__}"
            )
        return weight.detach()

    @torch.no_grad()
    def merge(
        self, safe: bool = False, keep_backup: bool = True, dequantize: bool | torch.dtype = False
    ) -> None:
        """As `LoTRLinear.merge`. With dequantize, a quantised base is replaced by a plain nn.Linear of its dense weight and the
        adapter, in that dtype (True: the bias's, or the dense weight's). keep_backup: keep the quantised base for unmerge.

        Raises as `LoTRLinear.merge`; TypeError also for a quantised base without dequantize, because it would round the adapter
        away, and for a base that returns something else than x W^T + bias.
        """
        if self.merged:
            raise RuntimeError("merge: expected an unmerged layer, got one that is merged already")
        if dequantize is False or has_plain_weight(self.base_layer):
            mergeable(self.base_layer)
            super().merge(safe, keep_backup)
            return
        dense, bias = self.dense_weight(), self.bias
        dtype = (
            dequantize
            if isinstance(dequantize, torch.dtype)
            else (dense if bias is None else bias).dtype
        )
        merged = plus(dense.to(accumulate_dtype(dense.dtype)), self.delta_weight()).to(dtype)
        if safe and not bool(merged.isfinite().all()):
            raise ValueError(
                "merge: expected a finite merged weight (safe=True), got NaN or infinite elements"
            )
        linear = linear_of(
            merged, None if bias is None else bias.detach().to(dtype, copy=True), self.training
        )
        self.__dict__["quantized_base"] = self.base_layer if keep_backup else None
        self.base_layer, self.merged, self.replaced = linear, True, True

    replaced = False  # whether a plain nn.Linear is in the place of a quantised base

    @torch.no_grad()
    def unmerge(self) -> None:
        """As `LoTRLinear.unmerge`. RuntimeError also for a quantised base that was merged without a backup."""
        if not self.replaced:
            super().unmerge()
            return
        if self.quantized_base is None:
            raise RuntimeError(
                "unmerge: expected the quantised base, got a layer merged with keep_backup=False"
            )
        self.base_layer, self.merged, self.replaced = (
            self.quantized_base.train(self.training),
            False,
            False,
        )
        self.__dict__["quantized_base"] = None

    def to_base(self) -> nn.Module:
        """The wrapped module, or the plain nn.Linear that replaces it."""
        self.give_start_back()
        return self.base_layer


def layer_class(module: nn.Module) -> type[LoTRLinear] | type[LoTRConv1D] | type[LoTRWrapped]:
    """LoTRLinear for an nn.Linear and LoTRConv1D for a Conv1D that compute a plain product, otherwise LoTRWrapped: for a
    quantised or computed weight, hooks, and a subclass with another forward."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    plain = (
        has_plain_weight(module)
        and "weight" in module._parameters
        and "forward" not in vars(module)
        and not any(hooks)
    )
    if plain and is_conv1d(module):
        return LoTRConv1D
    return (
        LoTRLinear
        if plain and isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        else LoTRWrapped
    )


def adapt(
    module: nn.Module,
    factors: LoTRFactors,
    *,
    alpha: float | None = None,
    rslora: bool = False,
    scaling: Scaling = "auto",
    dropout: float = 0.0,
) -> LoTRLinear | LoTRConv1D | LoTRWrapped:
    """Adapts module with the class that fits it (`layer_class`). Arguments and errors as for `LoTRLinear.from_linear`."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    return layer_class(module).from_linear(
        module, factors, alpha=alpha, rslora=rslora, scaling=scaling, dropout=dropout
    )
