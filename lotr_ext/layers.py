"""Adapted layers: LoTRLinear for nn.Linear, LoTRConv1D for transformers' Conv1D.

    y = base(x) + s ((drop(x) A) G) B^T

A layer holds its base, its core G and a reference to the factors A and B of its group.

Not here: a layer for any other base (wrapped.py) and for experts (experts.py), the factors
(factors.py), and how a call runs (core/dispatch.py).
"""

import itertools
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .checks import check_input, check_probability
from .core import dispatch, fallback
from .core.call import LayerCall, RowChoice
from .core.operators import accumulate_dtype
from .core.request import ADAPTER_OFF, state_of
from .factors import (
    LoTRFactor,
    LoTRFactors,
    Scaling,
    check_factors,
    factors_for,
    scaling_of,
    set_unregistered,
)
from .sharded_tensors import is_in_fsdp1, is_sharded

Layer = TypeVar("Layer", bound="LoTRLayer")


class _CoreAttribute:
    """Descriptor for `layer.core`: returns the parameter, or evaluates the module `core_form`.

    Not a property, which would refuse assignments: FSDP1 assigns plain tensors to `core`.
    """

    def __get__(self, layer: "LoTRLayer | None", owner: type | None = None) -> Tensor:
        if layer is None:
            return self
        core = layer._parameters.get("core")
        return layer.core_form() if core is None else core


class LoTRLayer(nn.Module):
    """Base class of adapted layers: y = base(x) + s ((drop(x) A) G) B^T.

    What a subclass may override, and what this class does:

        adapts             whether `from_linear` can adapt a module. Not defined here
        _take_base         keeps weight and bias of the module that `from_linear` adapts
        compute_base       base(x) = x W^T + bias
        _with_adapter      base and adapter in one call, from W and bias
        weight_matrix      W, which is the attribute `weight`
        _weight_to_write   W for `merge`, checked
        to_base            the module without its adapter
        called_module      the module whose forward computes the layer: the layer itself

    Attributes:
        factors: The pair of A and B.
        core: G [r_in, r_out], for experts [e, r_in, r_out]: a parameter, or the output of the
            module `core_form` (see `use_core`).
        scaling: s.
        dropout: The probability of dropping an element of the adapter's x in training.
        merged: Whether the weight contains the adapter.
        num_experts: 0, or the number of experts that have a core in this layer.
    """

    core = _CoreAttribute()
    in_features: int
    out_features: int
    factors: LoTRFactors
    num_experts = 0
    # With init "svd", the core that was subtracted from the weight. Not in state_dict.
    start_core: Tensor | None
    # The weight before a merge. Not in state_dict.
    weight_backup: Tensor | None

    @classmethod
    def from_linear(
        cls: type[Layer],
        linear: nn.Module,
        factors: LoTRFactors,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        scaling: Scaling = "auto",
        dropout: float = 0.0,
    ) -> Layer:
        """Adapts a linear layer. Uses its weight and bias, not copies, and freezes them.

        `LoTRWrapped` uses the module itself.

        Args:
            linear: The layer to adapt.
            factors: The pair of A and B, with the sizes of the layer.
            alpha: See `scaling_of`.
            rslora: See `scaling_of`.
            scaling: See `scaling_of`.
            dropout: In [0, 1). The probability of dropping an element of the adapter's x in
                training.

        Raises:
            TypeError: If linear is not a layer that this class adapts, or is adapted already; or if
                an argument has the wrong type.
            ValueError: If the factors have other sizes, or an argument has a wrong value.
        """
        # Adapting freezes all parameters inside, so an adapter that is already there would stop
        # training.
        adapter_types = (LoTRLayer, LoTRFactors, LoTRFactor)
        if not cls.adapts(linear) or any(isinstance(m, adapter_types) for m in linear.modules()):
            raise TypeError(
                f"linear: expected a linear layer that {cls.__name__} adapts, got "
                f"{type(linear).__name__}"
            )
        check_factors(factors)
        s = scaling_of(factors.rank, alpha, rslora, scaling)
        # Without __init__, which would make a new base.
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = features(linear)
        layer._take_base(linear)
        layer._add_adapter(factors, s, dropout, device_of(linear))
        # Not `train`, which would also change the modules inside the base.
        layer.training = linear.training
        return layer

    def _take_base(self, linear: nn.Module) -> None:
        """Takes over weight and bias. Keeps linear for `to_base`."""
        self.weight = linear.weight
        self.bias = linear.bias
        set_unregistered(self, "original", linear)

    def _add_adapter(
        self,
        factors: LoTRFactors,
        scaling: float,
        dropout: float,
        device: torch.device,
        lead: tuple[int, ...] = (),
    ) -> None:
        """Freezes the base and adds the adapter. Called once, when the layer has its base.

        Args:
            lead: The leading dimensions of the core.
        """
        check_probability("dropout", dropout)
        layer_sizes = (self.in_features, self.out_features)
        factor_sizes = (factors.in_features, factors.out_features)
        if layer_sizes != factor_sizes:
            raise ValueError(
                f"factors: expected (in_features, out_features) = {layer_sizes}, got {factor_sizes}"
            )
        # Only the layer may be on the meta device: it then gets its values from a file.
        A = factors.A.value
        if A.is_meta and device.type != "meta":
            raise ValueError(
                f"factors: expected values, as the layer has on {device}, got factors on the meta "
                f"device"
            )
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        # Zero, so that the adapted model starts as the base model.
        self.core = nn.Parameter(
            torch.zeros(*lead, factors.r_in, factors.r_out, device=device, dtype=A.dtype)
        )
        self.scaling = scaling
        self.dropout = float(dropout)
        self.merged = False
        self.register_buffer("start_core", None, persistent=False)
        self.register_buffer("weight_backup", None, persistent=False)
        # With one layer, a factor needs no sum of gradients (see `FactorCache`).
        factors.A.cache.layers += 1
        factors.B.cache.layers += 1
        # A child, so that a model built by hand owns A and B, and in `__dict__` for faster reads.
        self.factors = factors
        set_unregistered(self, "factors", factors)

    def leave_factors_to_owner(self) -> None:
        """Keeps only a plain reference to the factors, which another module registers.

        state_dict then contains them once.
        """
        self._modules.pop("factors")

    # ---- forward ---------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """Computes the layer.

        Args:
            input: x [..., in_features].

        Returns:
            [..., out_features].
        """
        # A call of `check_input` takes time in each layer, so it is skipped if the shape is right.
        if not isinstance(input, Tensor) or not input.dim() or input.shape[-1] != self.in_features:
            check_input(input, self.in_features)
        if self.merged:
            return self.compute_base(input)
        state = state_of(self)
        if state is None:
            return self._with_adapter(input, self.core, None)
        if state is ADAPTER_OFF:
            return self._without_adapter(input)
        choice = RowChoice.of_index(state.index_of(input), input)
        return self._with_adapter(input, state.cores, choice)

    def _with_adapter(self, x: Tensor, core: Tensor, choice: RowChoice | None) -> Tensor:
        """Computes the base and the adapter, here in one call with W and bias.

        Args:
            core: [r_in, r_out], or [c, r_in, r_out] with a choice.
            choice: Which core each row of x uses.
        """
        return self._dispatch(x, core, choice, weight=self.weight_matrix(), bias=self.bias)

    def _dispatch(
        self,
        x: Tensor,
        core: Tensor,
        choice: RowChoice | None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        base_output: Tensor | None = None,
    ) -> Tensor:
        """Adds the adapter to the base product of weight and bias, or to `base_output`."""
        factors = self.factors
        p = self.dropout if self.training else 0.0

        # A function of A and B, because sharded training gathers them around `read`.
        def compute(A: Tensor, B: Tensor) -> Tensor:
            call = LayerCall(x, weight, bias, A, B, core, self.scaling, p, base_output, choice)
            return dispatch.linear(call, factors.caches, self)

        return factors.read(compute)

    def _without_adapter(self, x: Tensor) -> Tensor:
        """Computes the base, and adds back what init "svd" subtracted from its weight."""
        y = self.compute_base(x)
        if self.start_core is None:
            return y
        A = self.factors.A.start
        B = self.factors.B.start
        # The PyTorch fallback is fast enough here: few forwards run without the adapter.
        return fallback.layer(
            LayerCall(x, None, None, A, B, self.start_core, self.scaling, base_output=y)
        )

    def compute_base(self, x: Tensor) -> Tensor:
        """Computes the layer without its adapter, with the current weight."""
        return nn.functional.linear(x, self.weight_matrix(), self.bias)

    def called_module(self) -> nn.Module:
        """Returns the module whose forward computes this layer. For experts in a host, the host."""
        return self

    def weight_matrix(self) -> Tensor:
        """Returns W [out_features, in_features] ([e, ..] for experts), which may be a view."""
        return self.weight

    def to_base(self) -> nn.Module:
        """Returns the plain layer with the current weight (with the adapter in it, if merged)."""
        self.add_start_back()
        base = self.original
        base.weight = self.weight
        base.bias = self.bias
        return base.train(self.training)

    # ---- parameters ------------------------------------------------------------------------------

    def core_source(self) -> nn.Module | None:
        """Returns the module that computes the core, None for a core that is a parameter."""
        if self._parameters.get("core") is not None:
            return None
        if "core_form" in self._modules:
            return self.core_form
        return self.parametrizations.core  # torch.nn.utils.parametrize

    def core_parameters(self) -> Iterator[nn.Parameter]:
        """Returns the core, or the parameters from which it is computed."""
        source = self.core_source()
        return iter([self._parameters["core"]]) if source is None else source.parameters()

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters of "A", "B" and "core", each with the name of its part."""
        for part, parameters in (
            ("A", self.factors.A.parameters()),
            ("B", self.factors.B.parameters()),
            ("core", self.core_parameters()),
        ):
            for parameter in parameters:
                yield part, parameter

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """Returns the parameters of A, B and the core."""
        return (parameter for _, parameter in self.parts())

    def set_trained(self, train: Collection[str]) -> None:
        """Trains the named parts of the adapter and freezes the others.

        Args:
            train: Some of "A", "B" and "core".

        Raises:
            ValueError: If train contains another name.
        """
        unknown = set(train) - {"A", "B", "core"}
        if unknown:
            raise ValueError(
                f"train: expected some of A, B, core, got {', '.join(sorted(unknown))}"
            )
        for part, parameter in self.parts():
            parameter.requires_grad_(part in train)

    def use_core(self, form: nn.Module) -> None:
        """Computes the core with a module, whose parameters are trained instead of the core.

        `lotr_ext.cores` has forms that share parameters between layers.

        Args:
            form: form() returns G [r_in, r_out].

        Raises:
            TypeError: If form is not a module.
            ValueError: If it returns something other than a tensor like the core, or if the layer
                has init "svd".
        """
        if self.start_core is not None:
            raise ValueError(
                'core: expected a layer that starts as its base, got one of init "svd"'
            )
        expected = _described(self.core)
        actual = _described(form())
        if actual != expected:
            raise ValueError(
                f"core: expected a {expected}, got a {actual} of {type(form).__name__}"
            )
        self.register_module("core_form", form)
        # Otherwise `core` would return the parameter, and state_dict would have it.
        self._parameters.pop("core", None)

    # ---- merging ---------------------------------------------------------------------------------

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Returns s B G^T A^T [.., out_features, in_features], which `merge` adds to W.

        float32, or float64 for float64 factors.
        """
        return self.factors.read(lambda A, B: fallback.delta_weight(A, B, self.core, self.scaling))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Returns W + s B G^T A^T as a new tensor, also if the layer is merged already."""
        weight = self.weight_matrix().detach()
        return weight.clone() if self.merged else plus(weight, self.delta_weight())

    @torch.no_grad()
    def merge(
        self, safe: bool = False, keep_backup: bool = True, dequantize: bool | torch.dtype = False
    ) -> None:
        """Adds the adapter to the weight. The layer then runs as a plain linear layer.

        Args:
            safe: Whether to check that the result is finite before anything is changed.
            keep_backup: Whether to keep a copy of W, so that `unmerge` restores it bit for bit.
                Without the copy, `unmerge` subtracts.
            dequantize: See `LoTRWrapped.merge`. Other layers have no quantized base, and ignore it.

        Raises:
            RuntimeError: If the layer is merged already.
            TypeError: If the base cannot be merged into, or if its weight is computed in each
                forward (weight_norm, parametrizations, pruning) or sharded (FSDP2, tensor
                parallelism).
            ValueError: If the result is not finite and safe is set.
        """
        if self.merged:
            raise RuntimeError("merge: expected an unmerged layer, got one that is merged already")
        weight = self._weight_to_write("merge")
        merged_weight = self.merged_weight()
        if safe:
            check_finite(merged_weight)
        # W + delta is rounded, so a subtraction would not restore W bit for bit.
        self.weight_backup = weight.detach().clone() if keep_backup else None
        weight.copy_(merged_weight)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Removes the adapter from the weight.

        Raises:
            RuntimeError: If the layer is not merged.
            TypeError: If the weight has become computed or sharded since the merge.
        """
        if not self.merged:
            raise RuntimeError("unmerge: expected a merged layer, got one that is not merged")
        weight = self._weight_to_write("unmerge")
        restored = self.weight_backup
        if restored is None:
            restored = plus(weight, -self.delta_weight())
        weight.copy_(restored)
        self.weight_backup = None
        self.merged = False

    def drop_backup(self) -> None:
        """Frees what `merge` keeps for `unmerge`."""
        self.weight_backup = None

    def _weight_to_write(self, caller: str) -> Tensor:
        """Returns `weight_matrix()`. Checks that a write to it is not lost.

        Raises:
            TypeError: If it is computed in each forward, or sharded.
        """
        check_plain(self, caller)
        return self.weight_matrix()

    def to_linear(self) -> nn.Linear:
        """Returns a plain nn.Linear that computes the same as this layer in eval mode.

        It shares no tensor with this layer.
        """
        return linear_of(self.merged_weight(), self.bias, self.training)

    @torch.no_grad()
    def add_start_back(self) -> None:
        """Undoes init "svd": adds to W the initial adapter, which was subtracted from it.

        Without the adapter, the layer then computes what its base did before.
        """
        # A merged weight contains the trained adapter, which takes the place of the initial one.
        if self.start_core is None or self.merged:
            return
        start = fallback.delta_weight(
            self.factors.A.start, self.factors.B.start, self.start_core, self.scaling
        )
        weight = self._weight_to_write("unload")
        weight.copy_(plus(weight, start))
        self.start_core = None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.merged:
            raise RuntimeError(
                f"state_dict: expected an unmerged layer at {prefix!r}, got a merged one. Its "
                f"weight contains the adapter, which would be saved twice. Unmerge it, or take the "
                f"adapter off with unload(model, merge=True)."
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.factors.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}, "
            f"merged={self.merged}"
        )


class LoTRLinear(LoTRLayer, nn.Linear):
    """y = x W^T + bias + s ((drop(x) A) G) B^T with W and bias frozen.

    x [..., in_features] -> [..., out_features]. The core starts at zero, so the layer starts as the
    plain linear layer. Equation and shapes: arXiv 2402.01376, section 3.

    state_dict: `weight` and `bias` as nn.Linear, `core`, and also `factors.A.value` and
    `factors.B.value` unless an owner registers the factors.

    Args:
        in_features: See nn.Linear, also for out_features, bias and device.
        rank: The rank of new factors, 8 if None.
        factors: An existing pair. Its rank is then used.
        alpha: See `scaling_of`.
        rslora: See `scaling_of`.
        scaling: See `scaling_of`.
        dropout: The probability of dropping an element of the adapter's x in training, in [0, 1).
        dtype: The dtype of weight and bias: float32, float64, bfloat16 or float16. torch's default
            dtype if None. New factors and the core are float32, or float64 for float64.

    Raises:
        TypeError, ValueError: If an argument has the wrong type or value. The message names it.
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
        scaling: Scaling = "auto",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factors = factors_for(factors, rank, (in_features, out_features), device, dtype)
        s = scaling_of(factors.rank, alpha, rslora, scaling)
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        # For `to_base`, which puts this layer's weight and bias into it.
        original = nn.Linear(in_features, out_features, bias=False, device="meta")
        set_unregistered(self, "original", original)
        self._add_adapter(factors, s, dropout, self.weight.device)

    @staticmethod
    def adapts(linear: object) -> bool:
        return isinstance(linear, nn.Linear)

    def _with_adapter(self, x: Tensor, core: Tensor, choice: RowChoice | None) -> Tensor:
        parameters = self._parameters  # faster than nn.Module.__getattr__, see LoTRFactors.read
        if "weight" not in parameters or "bias" not in parameters:
            return super()._with_adapter(x, core, choice)
        return self._dispatch(x, core, choice, weight=parameters["weight"], bias=parameters["bias"])


class LoTRConv1D(LoTRLayer):
    """An adapted Conv1D of transformers (GPT-2), whose weight is [in_features, out_features].

    state_dict: As for `LoTRLinear`, with `weight` as in the original.
    """

    @staticmethod
    def adapts(linear: object) -> bool:
        return is_conv1d(linear)

    def weight_matrix(self) -> Tensor:
        return self.weight.t()


# ---- weights and cores ---------------------------------------------------------------------------


def plus(weight: Tensor, delta: Tensor) -> Tensor:
    """Returns weight + delta in weight's dtype, summed in float32 or wider and cast once."""
    wide = torch.promote_types(accumulate_dtype(weight.dtype), delta.dtype)
    return (weight.to(wide) + delta.to(weight.device, wide)).to(weight.dtype)


def linear_of(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    """Returns a frozen nn.Linear that holds a weight, and a copy of a bias in the weight's dtype.

    Args:
        weight: [out_features, in_features].
        bias: [out_features], or None.
        training: Whether the layer is in training mode.
    """
    out_features, in_features = weight.shape
    # On the meta device, so that no weight is allocated and filled only to be replaced.
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    return linear.train(training)


def check_finite(merged_weight: Tensor) -> None:
    """Checks a merged weight, for safe=True."""
    if not bool(merged_weight.isfinite().all()):
        raise ValueError(
            "merge: expected a finite merged weight (safe=True), got NaN or infinite elements"
        )


def check_plain(module: nn.Module, caller: str, name: str = "weight") -> None:
    """Checks that a write to a weight of a module is not lost.

    Args:
        module: The module.
        caller: The public function that the message names.
        name: The name of the weight.

    Raises:
        TypeError: If the weight is computed in each forward, or sharded.
    """
    weight = module._parameters.get(name)
    if weight is None:
        raise TypeError(
            f"{caller}: expected a {name} that is a parameter, got one that is computed in each "
            f"forward. Remove the reparametrization first "
            f"(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or "
            f"prune.remove)."
        )
    if type(weight) is not nn.Parameter or is_sharded(weight) or is_in_fsdp1(module):
        raise TypeError(
            f"{caller}: expected a full, plain {name}, got {type(weight).__name__}, sharded or in "
            f"another format. Save the adapter, and load it onto the model in one process."
        )


def _described(core: object) -> str:
    """Returns what a core and its replacement must have in common, as text."""
    if not isinstance(core, Tensor):
        return type(core).__name__
    return f"tensor {list(core.shape)}, {core.dtype}, on {core.device}"


# ---- modules that are adapted --------------------------------------------------------------------


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D, which may not be installed: checks its attributes."""
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and getattr(module, "weight", None) is not None
    )


def features(module: nn.Module) -> tuple[int, int] | None:
    """Returns (in_features, out_features), None for a module that cannot be adapted."""
    if is_conv1d(module):
        return tuple(module.weight.shape)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of a module's tensors, on which it computes. The CPU if it has none.

    accelerate keeps the tensors of an offloaded module on the meta device, and moves them to the
    device of its hook for each forward.
    """
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    if tensor is None:
        return torch.device("cpu")
    if tensor.is_meta and hasattr(module, "_hf_hook"):  # accelerate's
        return torch.device(module._hf_hook.execution_device)
    return tensor.device
