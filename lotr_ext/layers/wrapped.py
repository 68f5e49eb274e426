"""LoTRWrapped, an adapter around a module that stays, and the choice of a layer's class (`layer_class`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ..autograd.call import Call, add_adapter, call_packed, compute_dtype
from ..autograd.magnitude import scaled
from ..compat import is_compiling
from ..ops import accumulate_dtype
from .factors import LoTRFactors
from .layer import LoTRLayer
from .linear import AdaptsModule, LoTRConv1D, LoTRLinear
from .magnitude import Stored, stored_in
from .merging import MergeNotice, check_is_parameter, refuse_fsdp2
from .own_forward import dense_view, has_own_forward, returns_product
from .placement import home
from .quantized import dense_weight, dequantizer, has_plain_weight, is_conv1d, one_layer, ready_to_train
from .settings import Settings
from .sharded import whole_shape
from .uninterrupted import uninterrupted

__all__ = ["LoTRWrapped", "adapt", "layer_class"]


class LoTRWrapped(AdaptsModule):
    """Any module with in_features and out_features, adapted: its own forward is called.

    For quantised (torchao, bitsandbytes) and other special linear layers, such as those with hooks. In training with many
    tokens, the product of a base whose weight can be made dense and the adapter run as one layer (`quantized.one_layer`).
    state_dict: the base's keys under `base_layer.`, and `core`.
    """

    _keeps_module = True
    quantized_base: nn.Module | None
    replaced = False  # whether a plain nn.Linear is in the base's place

    @classmethod
    def _sizes_of(cls, linear: nn.Module) -> tuple[int, int]:
        if is_conv1d(linear):
            return tuple(whole_shape(linear.weight))
        for name in ("in_features", "out_features"):
            if not isinstance(got := getattr(linear, name, None), int):
                raise TypeError(f"linear: expected a module with an int {name}, got {type(linear).__name__} with {got!r}")
        return linear.in_features, linear.out_features

    @staticmethod
    def _device_of(linear: nn.Module) -> torch.device | None:
        return None if next(iter((*linear.parameters(), *linear.buffers())), None) is None else home(linear)

    def _take(self, linear: nn.Module) -> None:
        self.base_layer = linear.requires_grad_(False)
        self.__dict__["quantized_base"] = None  # the base while merged; not a child, so not in the state_dict

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

    def _mixed_base(self) -> Callable[[Tensor], Tensor]:
        return self._base

    def _call(self, x: Tensor, call: Call, A: Tensor, B: Tensor) -> Tensor:
        base = self.base_layer
        if torch.is_grad_enabled() and not is_compiling():  # a compiled graph would specialise on the number of tokens
            ready_to_train(base)
            dense = one_layer(base, x) if compute_dtype(x) is None else None
            if dense is not None:
                return call_packed(x, dense, base.bias, base, A, B, call)
        return add_adapter(x, base(x), A, B, call)

    def _call_scaled(self, x: Tensor, call: Call, A: Tensor, B: Tensor) -> Tensor:
        y = self._call(x, call, A, B)
        return scaled(y, self.bias, self.rows_of(self.stored(), A, B, call), call)

    def stored(self) -> Stored:
        return stored_in(self.base_layer)

    def _matrix(self) -> Tensor:
        if self.in_place or self.replaced:
            return dense_view(self.base_layer)
        raise TypeError(self.why_not_mergeable(False))

    # ---- merging: into the base's own weight, or, if that is quantised, into a dense layer that replaces the base ------------

    @property
    def holder(self) -> nn.Module:
        return self.base_layer

    def check_parameter(self, part: str, where: str, name: str = "") -> None:
        check_is_parameter(self.base_layer, part, where, name)

    @property
    def in_place(self) -> bool:
        """Whether merging writes to the base's own weight."""
        return not self.replaced and dense_view(self.base_layer) is not None and dequantizer(self.base_layer) is None

    @property
    def unmerges_by_backup(self) -> bool:
        return not self.in_place or super().unmerges_by_backup

    def why_not_mergeable(self, dequantize: bool | torch.dtype, name: str = "a layer") -> str | None:
        """Why the layer cannot be merged; None if it can."""
        got = f"{name} over {type(self.base_layer).__name__}"
        if self.in_place:
            if self.base_layer.weight.is_meta:
                return f"merge: expected tensors with values, got {got} on the meta device"
            if returns_product(self.base_layer):
                return None
            return (
                f"merge: expected a base that returns x W^T + bias, got {got}, which returns something else, by its forward or "
                "a hook; use the model without merging"
            )
        if dequantizer(self.base_layer) is None:
            return (
                "merge: expected a base whose dense weight can be read (nn.Linear, Conv1D, torchao, bitsandbytes, or a module "
                f"with dequantize()), got {got}; use the model without merging, or put a dense layer in the base's place first"
            )
        if dequantize is False:
            return (
                f"merge: expected an nn.Linear or Conv1D base, got {got}, whose quantised weight would round the adapter away; "
                "dequantize=True puts a plain nn.Linear in its place"
            )
        return None

    def to_linear(self) -> nn.Linear:
        """As `LoTRLinear.to_linear`. TypeError for a base that cannot be merged into."""
        if not self.merged and (why := self.why_not_mergeable(False)) is not None:
            raise TypeError(why)
        return super().to_linear()

    @torch.no_grad()
    def merged_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain frozen nn.Linear: the base's dequantised weight plus the adapter, summed in float32 and cast once.

        dtype: of weight and bias; None for the bias's dtype, or without a bias the dtype in which the quantiser returns W.
        """
        weight, bias = dense_weight(self.base_layer, self.in_features, self.out_features), self.bias
        dtype = dtype or (weight if bias is None else bias).dtype
        merged = self._joined(weight.to(accumulate_dtype(weight.dtype)), self.delta_weight()).to(dtype)
        return self._plain(merged, None if bias is None else bias.detach().to(dtype, copy=True))

    @torch.no_grad()
    def merge(self, safe: bool = False, keep_backup: bool = True, dequantize: bool | torch.dtype = False) -> None:
        """Adds the adapter into a plain weight, as `LoTRLinear.merge`. If the weight is quantised and `dequantize` is set,
        replaces the base by a plain nn.Linear of the dequantised weight and the adapter.

        dequantize: True, or the dtype of the nn.Linear. keep_backup: keep the quantised base, so that unmerge can restore it.
        RuntimeError if merged already; TypeError for a quantised base without dequantize, one that cannot be made dense, and a
        plain one that does not return x W^T + bias; ValueError with safe, if the result has a non-finite element. Nothing is
        changed then.
        """
        if self.merged:
            raise RuntimeError("merge: expected an unmerged layer, got one that is merged already")
        why = self.why_not_mergeable(dequantize)
        if why is not None:
            raise TypeError(why)
        if self.in_place:
            super().merge(safe, keep_backup)
            return
        refuse_fsdp2(self.base_layer, "merge")
        linear = self.merged_linear(None if dequantize is True else dequantize)
        if safe and not bool(torch.isfinite(linear.weight).all()):
            raise ValueError("merge: expected a finite merged weight (safe=True), got NaN or infinite elements")
        with uninterrupted():
            self.__dict__["quantized_base"] = self.base_layer if keep_backup else None
            self.base_layer, self.replaced, self.merged, self.notice = linear, True, True, MergeNotice()
        if self.norms is not None:
            self.norms.forget()  # else they would hold the quantised weight

    @torch.no_grad()
    def unmerge(self) -> None:
        """As `LoTRLinear.unmerge`. Restores a quantised base, on the layer's current device and in its current mode.

        RuntimeError if it is not merged, or a quantised base was merged without a backup.
        """
        if self.in_place:
            super().unmerge()
            return
        if not self.merged:
            raise RuntimeError("unmerge: expected a merged layer, got one that is not merged")
        if self.quantized_base is None:
            raise RuntimeError("unmerge: expected the quantised base, got a layer merged with keep_backup=False")
        base, device = self.quantized_base, self.base_layer.weight.device
        if home(base) != device:  # the model has been moved since
            base = base.to(device)
        with uninterrupted():
            self.base_layer, self.replaced, self.merged = base.train(self.training), False, False
            self.quantized_base = None
            self.__dict__.pop("notice", None)

    def to_base(self) -> nn.Module:
        """The wrapped module, or the plain nn.Linear that replaces it."""
        return self.base_layer


def adapt(
    module: nn.Module,
    factors: LoTRFactors,
    *,
    alpha: float | None = None,
    rslora: bool = False,
    scaling: float | Literal["auto"] | None = None,
    dropout: float = 0.0,
    magnitude: bool = False,
) -> LoTRLayer:
    """Adapts module with the class that fits it (`layer_class`). Arguments as for `LoTRLinear.from_linear`."""
    return layer_class(module).adapting(module, factors, Settings(alpha, rslora, scaling, dropout, magnitude))


def layer_class(module: nn.Module) -> type[AdaptsModule]:
    """LoTRLinear for an nn.Linear, LoTRConv1D for a Conv1D, otherwise LoTRWrapped: also for a quantised weight and for a
    subclass of nn.Linear with another forward."""
    linear = isinstance(module, nn.Linear) and not has_own_forward(module)
    known = LoTRLinear if linear else LoTRConv1D if is_conv1d(module) else None
    return LoTRWrapped if known is None or not has_plain_weight(module) else known
