"""Adapted layers: LoTRLinear for nn.Linear, LoTRConv1D for transformers' Conv1D. wrapped.py has the one for any other base.

A layer holds its base, its core G [r_in, r_out] and a reference to the factors A and B, which all layers of a group share.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import autograd, ops
from .functional import check_dimension, check_dtype, check_input, check_number, check_probability, check_rank
from .init import START, fill_factor_

__all__ = ["LoTRConv1D", "LoTRFactor", "LoTRFactors", "LoTRLayer", "LoTRLinear", "scaling_of"]

OFF = "off"  # the state of a request that switches a layer's adapter off; autograd.requesting
Scaling = float | Literal["auto"]
T = TypeVar("T", bound="LoTRLayer")


def scaling_of(
    rank: int | tuple[int, int],
    alpha: float | None = None,
    rslora: bool = False,
    scaling: Scaling = "auto",
    diagonal: bool = False,
) -> float:
    """s at this rank: r, or the larger of (r_in, r_out).

    "auto" is 4 (8 / r)^1.5 / START^3, with diagonal cores, whose products have a factor r fewer terms, 4 (8 / r)^0.5 / START^3.
    START = 0.4 is the constant by which the initial factors are multiplied: together they let the learning rate of a LoRA serve
    every rank (docs/choosing.md). alpha: s is alpha / r, with rslora alpha / sqrt(r) (arXiv 2312.03732), and "auto" does not
    apply. A number is s.
    Raises TypeError, ValueError: a value of the wrong type, or scaling together with alpha or rslora.
    """
    if not isinstance(rslora, bool):
        raise TypeError(f"rslora: expected a bool, got {type(rslora).__name__} {rslora!r}")
    r = max(check_rank(rank))
    if scaling != "auto":
        if isinstance(scaling, str):
            raise ValueError(f'scaling: expected a number or "auto", got {scaling!r}')
        check_number("scaling", scaling)
        if alpha is not None or rslora:
            raise ValueError(f"scaling: expected it alone, got {scaling} with alpha={alpha}, rslora={rslora}")
        return float(scaling)
    if alpha is None and not rslora:
        return 4.0 * (8 / r) ** (0.5 if diagonal else 1.5) / START**3
    alpha = r if alpha is None else alpha
    check_number("alpha", alpha)
    return alpha / (math.sqrt(r) if rslora else r)


# ---- factors ---------------------------------------------------------------------------------------------------------


class LoTRFactor(nn.Module):
    """One factor [features, rank]: an A of layers with that many in_features, or a B of layers with that many out_features.

    It may be in several pairs: `LoTRFactors.of(A, B)`. Its gradient is one float32 sum (float64 for float64) over all layers,
    and autograd sees one gradient a backward. Layers with the same A share u = x A, even if their B differ.

    init: "orthonormal" (orthonormal columns; rows when the rank exceeds the features), "normal" (N(0, 1), the paper's) or
    "kaiming", times START. dtype: float32, float64, bfloat16 or float16, torch's default if None. State: `value`.
    Raises TypeError or ValueError that names the argument; warns about a rank above the features.
    """

    start: Tensor | None  # with init "svd", the factor that was subtracted from the weights: not part of state_dict

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
        if rank > features:
            warnings.warn(
                f"lotr_ext: rank {rank} exceeds {features} features; a lower rank gives the same functions", stacklevel=2
            )
        self.features, self.rank = features, rank
        self.value = nn.Parameter(torch.empty(features, rank, device=device, dtype=dtype))
        self.register_buffer("start", None, persistent=False)
        self.state = autograd.FactorState()
        fill_factor_(self.value, init)

    def forward(self, operation: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns operation(value). Sharded training gathers the value around this call."""
        return operation(self.value)

    def extra_repr(self) -> str:
        return f"features={self.features}, rank={self.rank}"


class LoTRFactors(nn.Module):
    """The pair A [in_features, r_in] and B [out_features, r_out] of a group of layers (arXiv 2402.01376).

    rank: an int, or (r_in, r_out). init, device, dtype, errors and warnings: as for LoTRFactor. State: `A.value`, `B.value`.
    Attributes: A, B; in_features, out_features, r_in, r_out; rank, an int if r_in = r_out, else the pair.
    """

    rank: int | tuple[int, int]

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
        self.A = LoTRFactor(in_features, r_in, init=init, device=device, dtype=dtype)
        self.B = LoTRFactor(out_features, r_out, init=init, device=device, dtype=dtype)
        self._describe()

    @staticmethod
    def of(A: LoTRFactor, B: LoTRFactor) -> LoTRFactors:
        """The pair of two existing factors, which may also be in other pairs. Raises TypeError or ValueError for anything
        else."""
        for name, factor in (("A", A), ("B", B)):
            if not isinstance(factor, LoTRFactor):
                raise TypeError(f"{name}: expected a LoTRFactor, got {type(factor).__name__}")
        if A is B:
            raise ValueError("B: expected another factor than A, got the same one")
        if A.value.dtype != B.value.dtype:
            raise TypeError(f"B: expected dtype {A.value.dtype}, as A has, got {B.value.dtype}")
        pair = LoTRFactors.__new__(LoTRFactors)
        nn.Module.__init__(pair)
        pair.A, pair.B = A, B
        pair._describe()
        return pair

    def _describe(self) -> None:
        A, B = self.A, self.B
        self.in_features, self.out_features, self.r_in, self.r_out = A.features, B.features, A.rank, B.rank
        self.rank = A.rank if A.rank == B.rank else (A.rank, B.rank)
        self.__dict__.update(self._modules)  # A and B are read without nn.Module.__getattr__

    def read(self, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Returns operation(A, B). Sharded training gathers A and B around this call: shard each LoTRFactor, not the pair.

        The operation holds x and its other tensors itself. If they were arguments, FSDP2 would wrap each x in a new tensor, and
        siblings could not recognise it.
        """
        A, B = self.A, self.B
        if A._forward_pre_hooks or B._forward_pre_hooks:
            return A(lambda A: B(partial(operation, A)))
        # Two calls of modules would cost 7 us a layer, and nn.Module.__getattr__ costs 0.6 us a read (bench.host, one token):
        # so here and in the layers, parameters that are plain ones are read from nn.Module's own dictionary.
        own_A, own_B = A._parameters, B._parameters
        return operation(own_A["value"] if "value" in own_A else A.value, own_B["value"] if "value" in own_B else B.value)


# ---- layers ----------------------------------------------------------------------------------------------------------


class _Core:
    """`layer.core`: the parameter, or the output of the module `core_form`. Without __set__, so assignments register a
    parameter."""

    def __get__(self, layer: LoTRLayer | None, owner: type | None = None) -> Tensor:
        if layer is None:
            return self
        core = layer._parameters.get("core")
        return layer.core_form() if core is None else core


class LoTRLayer(nn.Module):
    """Base class of adapted layers: y = base(x) + s ((drop(x) A) G) B^T.

    factors: the pair of A and B. core [r_in, r_out] (experts: [e, r_in, r_out]): the layer's own parameter, or the output of
    `core_form`. scaling: s. dropout: the probability of dropping an element of the adapter's x in training. merged: whether the
    weight contains the adapter.
    Subclasses define `base` (the plain forward), `matrix` (W [n, k], a view of the weight) and `to_base`.
    """

    core = _Core()
    in_features: int
    out_features: int
    factors: LoTRFactors
    start_core: Tensor | None  # with init "svd", the core that was subtracted from the weight: not part of state_dict
    weight_backup: Tensor | None  # the weight before a merge: not part of state_dict

    @classmethod
    def from_linear(
        cls: type[T],
        linear: nn.Module,
        factors: LoTRFactors,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        scaling: Scaling = "auto",
        dropout: float = 0.0,
    ) -> T:
        """Adapts linear: uses its weight and bias themselves (LoTRWrapped: the module), not copies, and freezes them.
        Raises TypeError, ValueError: another kind of module, factors of other sizes, or an argument of the wrong type or value.
        """
        sizes = cls.sizes_of(linear) if isinstance(linear, nn.Module) else None
        # adapting freezes all parameters inside: those of an adapter there would stop training
        if sizes is None or any(isinstance(m, (LoTRLayer, LoTRFactors, LoTRFactor)) for m in linear.modules()):
            raise TypeError(f"linear: expected a linear layer that {cls.__name__} adapts, got {type(linear).__name__}")
        s = scaling_of(getattr(factors, "rank", 1), alpha, rslora, scaling)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = sizes
        layer._take(linear)
        tensor = next(iter((*linear.parameters(), *linear.buffers())), None)
        layer._adapt(factors, s, dropout, torch.device("cpu") if tensor is None else tensor.device)
        return layer.train(linear.training)

    @staticmethod
    def sizes_of(linear: nn.Module) -> tuple[int, int] | None:
        """(in_features, out_features) of a module that this class adapts; None for another one."""
        raise TypeError("from_linear: expected a class that adapts a module, such as LoTRLinear")

    def _take(self, linear: nn.Module) -> None:
        """Takes over weight and bias. Keeps linear, unregistered, for `to_base`."""
        self.weight, self.bias = linear.weight, linear.bias
        self.__dict__["adapted"] = linear

    def _adapt(
        self, factors: LoTRFactors, scaling: float, dropout: float, device: torch.device, lead: tuple[int, ...] = ()
    ) -> None:
        """Adds the adapter to a layer that has its base parameters, and freezes these. lead: leading dimensions of the core."""
        check_probability("dropout", dropout)
        if not isinstance(factors, LoTRFactors):
            raise TypeError(f"factors: expected LoTRFactors, got {type(factors).__name__}")
        want, got = (self.in_features, self.out_features), (factors.in_features, factors.out_features)
        if want != got:
            raise ValueError(f"factors: expected (in_features, out_features) = {want}, got {got}")
        if factors.A.value.is_meta and device.type != "meta":
            raise ValueError(f"factors: expected values, as the layer has on {device}, got factors on the meta device")
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        like = factors.A.value
        self.core = nn.Parameter(torch.zeros(*lead, factors.r_in, factors.r_out, device=device, dtype=like.dtype))
        self.scaling, self.dropout, self.merged = scaling, float(dropout), False
        self.register_buffer("start_core", None, persistent=False)
        self.register_buffer("weight_backup", None, persistent=False)
        for factor in (factors.A, factors.B):
            factor.state.layers += 1
        self.factors = factors  # registered, so that a model built by hand owns A and B
        self.__dict__["factors"] = factors  # read without nn.Module.__getattr__

    def leave_factors_to_owner(self) -> None:
        """Keeps a plain reference to the factors, which another module registers. state_dict then names them once."""
        self._modules.pop("factors")

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if not isinstance(input, Tensor) or input.shape[-1:] != (self.in_features,):
            check_input(input, self.in_features)
        if self.merged:
            return self.base(input)
        own, index = self._parameters, None
        core = own["core"] if "core" in own else self.core
        if autograd.open_requests:
            state = autograd.requests().get(self)
            if state is OFF:
                return self._without_adapter(input)
            if state is not None:
                core, index = state(input)
        W, bias, y = self._operands(input)
        factors, run, s, p = self.factors, autograd.lotr_linear, self.scaling, self.dropout if self.training else 0.0
        states = factors.A.state, factors.B.state
        return factors.read(lambda A, B: run(input, W, bias, A, B, core, s, p, y, index, states, self))

    def _operands(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(W, bias, None), or (None, None, y) with the output y of a base that computes its own product."""
        return self.matrix(), self.bias, None

    def _without_adapter(self, x: Tensor) -> Tensor:
        y, start = self.base(x), self.start_core
        if start is None:
            return y
        return ops.layer(x, None, None, self.factors.A.start, self.factors.B.start, start, self.scaling, y=y)

    def base(self, x: Tensor) -> Tensor:
        """The layer without its adapter, on W as it is now."""
        return nnf.linear(x, self.matrix(), self.bias)

    def matrix(self) -> Tensor:
        """W [out_features, in_features], a view of the weight."""
        raise TypeError(f"{type(self).__name__} must define matrix")

    def to_base(self) -> nn.Module:
        """The plain layer, with the current weight, which contains the adapter if it is merged."""
        raise TypeError(f"{type(self).__name__} must define to_base")

    # ---- parameters --------------------------------------------------------------------------------------------------

    def core_parameters(self) -> Iterator[nn.Parameter]:
        """The core, or the parameters that it is computed from."""
        core = self._parameters.get("core")
        if core is not None:
            yield core
        elif (form := self.__dict__.get("core_form") or self._modules.get("core_form")) is not None:
            yield from form.parameters()
        else:  # torch.nn.utils.parametrize
            yield from self.parametrizations.core.parameters()

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of A, B and the core, each with the name of its part."""
        owned = ("A", self.factors.A.parameters()), ("B", self.factors.B.parameters()), ("core", self.core_parameters())
        for part, parameters in owned:
            yield from ((part, parameter) for parameter in parameters)

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of A, B and the core."""
        return (parameter for _, parameter in self.parts())

    def set_trained(self, train: Collection[str]) -> None:
        """Sets requires_grad of "A", "B" and "core": True for those in train."""
        if unknown := sorted(set(train) - {"A", "B", "core"}):
            raise ValueError(f"train: expected some of A, B, core, got {', '.join(unknown)}")
        for part, parameter in self.parts():
            parameter.requires_grad_(part in train)

    def use_core(self, form: nn.Module) -> None:
        """Replaces the core by a module: form() returns G [r_in, r_out], and its parameters are trained instead of G.

        `lotr_ext.cores` has forms that share parameters over layers.
        Raises TypeError, ValueError: no module, or one that returns something else than a tensor like the core; a layer of init
        "svd".
        """
        if not isinstance(form, nn.Module):
            raise TypeError(f"core: expected a module whose forward returns it, got {type(form).__name__}")
        if self.start_core is not None:
            raise ValueError('core: expected a layer that starts as its base, got one of init "svd"')
        with torch.no_grad():
            before, new = self.core, form()
        want = tuple(before.shape), before.dtype, before.device
        got = (tuple(new.shape), new.dtype, new.device) if isinstance(new, Tensor) else type(new).__name__
        if want != got:
            raise ValueError(f"core: expected shape, dtype and device {want}, got {got} of {type(form).__name__}")
        self._parameters.pop("core", None)
        self.core_form = form

    # ---- merging -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """s B G^T A^T [.., out_features, in_features] in float32 (float64 for float64 factors), which merge adds to W."""
        return self.factors.read(lambda A, B: ops.delta_weight(A, B, self.core, self.scaling))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s B G^T A^T as a new tensor: summed in float32 (or wider) and cast once. W itself if it is merged already."""
        weight = self.matrix().detach()
        return weight.clone() if self.merged else plus(weight, self.delta_weight())

    @torch.no_grad()
    def merge(self, safe: bool = False, keep_backup: bool = True) -> None:
        """Adds the adapter into the weight. The layer then runs as a plain linear one.

        safe: raise ValueError, without a change, if the result is not finite. keep_backup: keep a copy of W, so that unmerge
        restores it bit for bit; without, unmerge subtracts.
        Raises RuntimeError: merged already. TypeError: a base that cannot be merged into, or a weight that is no parameter
        (weight_norm, parametrizations, pruning) or held in parts (FSDP2, tensor parallelism).
        """
        if self.merged:
            raise RuntimeError("merge: expected an unmerged layer, got one that is merged already")
        weight = self._weight_to_write("merge")
        merged = self.merged_weight()
        if safe and not bool(merged.isfinite().all()):
            raise ValueError("merge: expected a finite merged weight (safe=True), got NaN or infinite elements")
        self.weight_backup = weight.detach().clone() if keep_backup else None
        weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Removes the adapter from the weight. RuntimeError if it is not merged."""
        if not self.merged:
            raise RuntimeError("unmerge: expected a merged layer, got one that is not merged")
        weight = self._weight_to_write("unmerge")
        weight.copy_(plus(weight, -self.delta_weight()) if self.weight_backup is None else self.weight_backup)
        self.weight_backup, self.merged = None, False

    def _weight_to_write(self, where: str) -> Tensor:
        """matrix(), for a write. Raises TypeError where that would be lost."""
        check_plain(self, where)
        return self.matrix()

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear that computes the same as this layer in eval mode, and shares no tensor with it."""
        return linear_of(self.merged_weight(), None if self.bias is None else self.bias.detach().clone(), self.training)

    @torch.no_grad()
    def give_start_back(self) -> None:
        """Adds what init "svd" moved out of W back to it, before the adapter is removed."""
        if self.start_core is not None and not self.merged:
            start = ops.delta_weight(self.factors.A.start, self.factors.B.start, self.start_core, self.scaling)
            weight = self._weight_to_write("unload")
            weight.copy_(plus(weight, start))
            self.start_core = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.merged:
            raise RuntimeError(
                f"state_dict: expected an unmerged layer at {prefix!r}, got a merged one, whose weight contains the adapter "
                f"beside its core. Unmerge it, or take the adapter off with unload(model, merge=True)."
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        parts = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.factors.rank}"
        parts += f", scaling={self.scaling:g}" + (f", dropout={self.dropout}" if self.dropout else "")
        return parts + (", merged" if self.merged else "")


def plus(weight: Tensor, delta: Tensor) -> Tensor:
    wide = torch.promote_types(ops.accumulate_dtype(weight.dtype), delta.dtype)
    return (weight.to(wide) + delta.to(weight.device, wide)).to(weight.dtype)


def linear_of(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    """A frozen nn.Linear that holds these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear.train(training)


def check_plain(module: nn.Module, where: str) -> None:
    """Raises TypeError where a write to the module's weight would be lost: a computed weight, or one in parts."""
    weight = module._parameters.get("weight")
    if weight is None:
        raise TypeError(
            f"{where}: expected a weight that is a parameter, got one that is computed in each forward. Remove the "
            f"reparametrisation first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or prune.remove)."
        )
    if type(weight) is not nn.Parameter or getattr(module, "_is_fsdp_managed_module", False) or hasattr(weight, "ds_id"):
        raise TypeError(
            f"{where}: expected a whole, plain weight, got {type(weight).__name__} held in parts or in another format. Save "
            f"the adapter, and load it onto the model in one process."
        )


class LoTRLinear(LoTRLayer, nn.Linear):
    """y = x W^T + bias + s ((drop(x) A) G) B^T with W and bias frozen: x [..., in_features] -> [..., out_features].

    rank: of a new pair of factors, 8 by default; factors: an existing pair. alpha, rslora, scaling: `scaling_of`. dropout: the
    probability of dropping an element of the adapter's x in training, in [0, 1). dtype: that of weight and bias, float32,
    float64, bfloat16 or float16, torch's default if None; new factors and the core are float32 (float64 beside float64
    weights). The core starts at zero, so the layer starts as the plain linear layer. Equation and shapes: arXiv 2402.01376,
    section 3.
    Raises TypeError or ValueError that names the argument.

    state_dict: `weight`, `bias` (as nn.Linear), `core`; and `factors.A.value`, `factors.B.value` unless an owner registers the
    factors.
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
        check_dtype(dtype)
        check_probability("dropout", dropout)
        factors = factors_for(factors, rank, (in_features, out_features), device, dtype)
        s = scaling_of(factors.rank, alpha, rslora, scaling)
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._adapt(factors, s, dropout, self.weight.device)

    @staticmethod
    def sizes_of(linear: nn.Module) -> tuple[int, int] | None:
        return (linear.in_features, linear.out_features) if isinstance(linear, nn.Linear) else None

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor | None, None]:
        own = self._parameters
        if "weight" in own and "bias" in own:
            return own["weight"], own["bias"], None
        return self.weight, self.bias, None

    def matrix(self) -> Tensor:
        return self.weight

    def to_base(self) -> nn.Linear:
        linear = self.__dict__.get("adapted")
        if linear is None:
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        return _given_back(self, linear)


class LoTRConv1D(LoTRLayer):
    """transformers' Conv1D (GPT-2), adapted: a linear layer whose weight is stored as [in_features, out_features].

    state_dict keys as the original's (`weight`, `bias`) and `core`.
    """

    @staticmethod
    def sizes_of(linear: nn.Module) -> tuple[int, int] | None:
        return features(linear) if is_conv1d(linear) else None

    def matrix(self) -> Tensor:
        return self.weight.t()

    def to_base(self) -> nn.Module:
        return _given_back(self, self.__dict__["adapted"])


def _given_back(layer: LoTRLayer, linear: nn.Module) -> nn.Module:
    """linear with the layer's weight and bias."""
    layer.give_start_back()
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear.train(layer.training)


def factors_for(
    factors: LoTRFactors | None,
    rank: int | tuple[int, int] | None,
    sizes: tuple[int, int],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> LoTRFactors:
    """The factors of a new layer of sizes (in_features, out_features): the given ones, or new ones in float32 (float64)."""
    if factors is None:
        wide = ops.accumulate_dtype(dtype or torch.get_default_dtype())
        return LoTRFactors(*sizes, 8 if rank is None else rank, device=device, dtype=wide)
    if not isinstance(factors, LoTRFactors):
        raise TypeError(f"factors: expected LoTRFactors, got {type(factors).__name__}")
    if rank is not None and check_rank(rank) != (factors.r_in, factors.r_out):
        raise ValueError(f"rank: expected that of factors, {factors.rank}, or None, got {rank}")
    return factors


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D, by its attributes, because transformers may not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features), or None for a module that cannot be adapted."""
    if is_conv1d(module):
        return tuple(module.weight.shape)
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return found if all(isinstance(size, int) for size in found) else None
