"""LoTRWrapped: an adapter around any other linear module, such as a quantized one.

    y = base_layer(x) + s ((drop(x) A) G) B^T

Also `adapt`, which chooses the class that fits a module, and functions that read W of a base.

Not here: layers that compute x W^T themselves (layers.py), and merging of models (merging.py).
"""

import torch
from torch import Tensor, nn

from .core.call import RowChoice
from .core.operators import accumulate_dtype
from .factors import LoTRFactors, Scaling, set_unregistered
from .layers import (
    LoTRConv1D,
    LoTRLayer,
    LoTRLinear,
    check_finite,
    check_plain,
    features,
    is_conv1d,
    linear_of,
    plus,
)


class LoTRWrapped(LoTRLayer):
    """Any module with in_features and out_features, adapted: y = base_layer(x) + adapter(x).

    For quantized layers (torchao, bitsandbytes) and other special linear layers, such as those with
    hooks: the base's forward is called.

    state_dict: The base's keys under `base_layer.`, `core`, and also `factors.A.value` and
    `factors.B.value` unless an owner registers the factors.

    Attributes:
        base_layer: The wrapped module. While a quantized one is merged, the plain nn.Linear that
            replaces it.
        replaced: Whether `base_layer` is such a replacement.
        quantized_base: The module that is replaced, for `unmerge`. None if `replaced` is False, or
            if no backup was kept. It is not registered, so state_dict does not contain it.
    """

    replaced = False

    @staticmethod
    def adapts(linear: object) -> bool:
        return features(linear) is not None

    def _take_base(self, linear: nn.Module) -> None:
        self.base_layer = linear
        set_unregistered(self, "quantized_base", None)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that reads its device or dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(self.base_layer, "bias", None)

    def compute_base(self, x: Tensor) -> Tensor:
        return self.base_layer(x)

    def _with_adapter(self, x: Tensor, core: Tensor, choice: RowChoice | None) -> Tensor:
        return self._dispatch(x, core, choice, base_output=self.base_layer(x))

    def weight_matrix(self) -> Tensor:
        return matrix_of(self.base_layer)

    def _weight_to_write(self, caller: str) -> Tensor:
        check_plain(self.base_layer, caller)
        return self.weight_matrix()

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Returns W [out_features, in_features] of a quantized base.

        Raises:
            TypeError: If it cannot be computed.
        """
        weight = _dequantized(self.base_layer)
        shape = (self.out_features, self.in_features)
        # Broadcasting would accept a weight of other shapes without an error.
        if not isinstance(weight, Tensor) or weight.shape != shape:
            raise TypeError(
                f"merge: expected a base whose dense weight {list(shape)} can be read (nn.Linear, "
                f"Conv1D, torchao, bitsandbytes, or a module with dequantize()), got "
                f"{type(self.base_layer).__name__}. Use the model without merging."
            )
        return weight.detach()

    @torch.no_grad()
    def merge(
        self, safe: bool = False, keep_backup: bool = True, dequantize: bool | torch.dtype = False
    ) -> None:
        """Adds the adapter to the weight, as `LoTRLayer.merge` does.

        Args:
            safe: As for `LoTRLayer.merge`.
            keep_backup: Whether to keep W, or the quantized base, for `unmerge`.
            dequantize: Whether to replace a quantized base by a plain nn.Linear, or the dtype of
                that layer. True: the dtype of the bias, or of the dense weight.

        Raises:
            RuntimeError, TypeError, ValueError: As for `LoTRLayer.merge`.
            TypeError: If the base is quantized and dequantize is False, because rounding would
                remove the adapter; or if it returns something other than x W^T + bias.
        """
        # After an earlier merge the base is a plain nn.Linear, and LoTRLayer.merge raises.
        if dequantize is False or has_plain_weight(self.base_layer):
            mergeable_weight(self.base_layer)  # raises if it is not mergeable
            super().merge(safe, keep_backup)
        else:
            self._merge_into_new_linear(safe, keep_backup, dequantize)

    def _merge_into_new_linear(
        self, safe: bool, keep_backup: bool, dequantize: bool | torch.dtype
    ) -> None:
        dense = self.dense_weight()
        bias = self.bias
        if isinstance(dequantize, torch.dtype):
            dtype = dequantize
        else:
            dtype = dense.dtype if bias is None else bias.dtype
        # Added before the cast to dtype, so that the sum is rounded only once.
        merged = plus(dense.to(accumulate_dtype(dense.dtype)), self.delta_weight()).to(dtype)
        if safe:
            check_finite(merged)
        replacement = linear_of(merged, bias, self.training)
        # Nothing after this line can fail, so the layer changes completely or not at all.
        set_unregistered(self, "quantized_base", self.base_layer if keep_backup else None)
        self.base_layer = replacement
        self.merged = True
        self.replaced = True

    def drop_backup(self) -> None:
        """Frees the copy of the weight, and the quantized base."""
        super().drop_backup()
        set_unregistered(self, "quantized_base", None)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Removes the adapter from the weight, or restores the quantized base.

        Raises:
            RuntimeError, TypeError: As for `LoTRLayer.unmerge`.
            RuntimeError: If a quantized base was merged without a backup.
        """
        if not self.replaced:
            super().unmerge()
            return
        if self.quantized_base is None:
            raise RuntimeError(
                "unmerge: expected the quantized base, got a layer merged with keep_backup=False"
            )
        self.base_layer = self.quantized_base.train(self.training)
        self.merged = False
        self.replaced = False
        set_unregistered(self, "quantized_base", None)

    def to_base(self) -> nn.Module:
        """Returns the wrapped module, or the plain nn.Linear that replaces it."""
        self.add_start_back()
        return self.base_layer


# ---- which class ---------------------------------------------------------------------------------


def layer_class(module: nn.Module) -> type[LoTRLinear] | type[LoTRConv1D] | type[LoTRWrapped]:
    """Returns the class that adapts a module.

    LoTRLinear for an nn.Linear and LoTRConv1D for a Conv1D that compute a plain product. Otherwise
    LoTRWrapped: for a quantized weight, a computed weight or bias, hooks, and another forward.
    """
    has_hooks = bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    # What is not a parameter is computed in each forward (weight_norm, parametrizations).
    is_computed = not {"weight", "bias"} <= module._parameters.keys()
    # accelerate replaces `forward` on the module object.
    if has_hooks or is_computed or not has_plain_weight(module) or "forward" in vars(module):
        return LoTRWrapped
    if is_conv1d(module):
        return LoTRConv1D
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return LoTRLinear
    return LoTRWrapped


def adapt(
    module: nn.Module,
    factors: LoTRFactors,
    *,
    alpha: float | None = None,
    rslora: bool = False,
    scaling: Scaling = "auto",
    dropout: float = 0.0,
) -> LoTRLinear | LoTRConv1D | LoTRWrapped:
    """Adapts a module with the class that `layer_class` returns for it.

    Args:
        module: A linear layer.
        factors: See `LoTRLinear.from_linear`, also for the others.

    Raises:
        TypeError, ValueError: As for `LoTRLinear.from_linear`.
    """
    return layer_class(module).from_linear(
        module, factors, alpha=alpha, rslora=rslora, scaling=scaling, dropout=dropout
    )


# ---- the weight of a base ------------------------------------------------------------------------


def has_plain_weight(module: nn.Module) -> bool:
    """Whether products may read module.weight: a floating tensor of values, not one-byte codes."""
    weight = getattr(module, "weight", None)
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and weight.dtype.itemsize > 1
    )


def _dequantized(module: nn.Module) -> Tensor | None:
    """Returns W [out_features, in_features] of a quantized module, computed by its quantizer.

    bitsandbytes has functions for it. Others have a method dequantize(), of the weight if it is a
    tensor subclass (torchao, optimum-quanto) or of the module (HQQ). Returns None if there is none.
    """
    weight = getattr(module, "weight", None)
    weight_type = type(weight).__name__
    if weight_type == "Params4bit" and weight.quant_state is not None:
        return _dequantized_4bit(module)
    if weight_type == "Int8Params":
        return _dequantized_8bit(module)
    if isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize()
    method = getattr(module, "dequantize", None)
    return method() if callable(method) else None


def _dequantized_4bit(module: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        # An evaluation on the CPU has packed the codes. A call of state_dict restores their order.
        module.state_dict()
    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def _dequantized_8bit(module: nn.Module) -> Tensor | None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight = module.weight
    # The first forward moves the scales from the weight to the module's state.
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return None if scales is None else int8_vectorwise_dequant(weight.data, scales)


def matrix_of(base: nn.Module) -> Tensor:
    """Returns W [n, k] of a base with a plain weight: the parameter, or its transposed view.

    Raises:
        TypeError: If the base is not an nn.Linear or Conv1D with a plain weight.
    """
    if not has_plain_weight(base) or not (isinstance(base, nn.Linear) or is_conv1d(base)):
        raise TypeError(
            f"merge: expected a base with a plain weight (nn.Linear, Conv1D), got "
            f"{type(base).__name__}. Pass dequantize=True to put a plain nn.Linear in the place of "
            f"a quantized base, or use the model without merging."
        )
    return base.weight.t() if is_conv1d(base) else base.weight


@torch.no_grad()
def mergeable_weight(base: nn.Module) -> Tensor:
    """Returns W [n, k] of a base if an adapter can be merged into it.

    The base must return x W^T + bias. One that has hooks, or is not exactly nn.Linear, is called on
    two rows of random numbers to check that.

    Raises:
        TypeError: If the base returns something else, or its weight is not plain.
    """
    weight = matrix_of(base)
    check_plain(base, "merge")
    if type(base) is nn.Linear and not base._forward_hooks and not base._forward_pre_hooks:
        return weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    y = base(x)
    expected = nn.functional.linear(x, weight, base.bias)
    # The base may round differently, for example if a hook splits its product. The bound is of the
    # finite values: NaN would be an error of allclose, and infinity would accept any output.
    bound = (
        max(1e-4, 4 * torch.finfo(weight.dtype).eps)
        * expected.nan_to_num(0, 0, 0).abs().max().item()
    )
    is_same = (
        isinstance(y, Tensor)
        and y.shape == expected.shape
        and torch.allclose(y.double(), expected.double(), rtol=0, atol=bound, equal_nan=True)
    )
    if not is_same:
        raise TypeError(
            f"merge: expected a base that returns x W^T + bias, got {type(base).__name__}, which "
            f"returns something else because of its forward or a hook. Use the model without "
            f"merging, or in eval mode if the base has dropout."
        )
    return weight
