"""The common part of all adapted layers: settings, the forward pass, merging."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as nnf

from ..autograd.bank import core_form_of
from ..autograd.call import Call, call_linear
from ..autograd.magnitude import scaled_linear
from ..autograd.tensor_parallel import cut_of, is_dtensor
from ..ops import accumulate_dtype
from ..ops.composite import delta_weight
from .checks import check_rank
from .core import HasCore
from .factors import LoTRFactors
from .magnitude import HasMagnitude, Stored, with_lengths
from .merging import Merges, check_is_parameter, plus, refuse_fsdp2, write_
from .mixture import Mixture, call_mixed, cores_of, index_for
from .parametrized import parameters_of
from .request import NOW, InRequests
from .settings import Settings
from .sharded import agree_over, in_place_of
from .uninterrupted import uninterrupted

DEFAULT_RANK = 8


class LoTRLayer(InRequests, HasCore, HasMagnitude, Merges):
    """Base class of adapted layers. Subclasses define `_base` (the plain forward), `_matrix` (W [n, k], a view) and `to_base`.

    core [r_in, r_out]: the layer's own parameter, or the output of `core_form`. factors: the shared pair. scaling: s. magnitude
    [n]: the length of each row of W + s B G^T A^T, or None.
    start_core: if an init moved part of W into the adapter, the initial core (a buffer outside state_dict).
    """

    in_features: int
    out_features: int
    start_core: Tensor | None
    _cut_with_base = ("weight", "bias")  # the parameters that stay DTensors

    @property
    def disabled(self) -> bool:
        """Whether the adapter is off, by this attribute or by an open `disabled` context."""
        return self._state()[0]

    @disabled.setter
    def disabled(self, off: bool) -> None:
        self._off = off

    def _replicate_for_data_parallel(self) -> LoTRLayer:
        """A replica for nn.DataParallel. It stores whether the adapter is off: its thread does not have this one's contexts."""
        replica, (off, mixture) = super()._replicate_for_data_parallel(), self._state()
        if mixture is not None:
            raise RuntimeError("model: expected one that is called as it is, got nn.DataParallel, which cuts the batch up")
        replica.disabled = off
        return replica

    @staticmethod
    def _check_unadapted(linear: object) -> None:
        """TypeError for a layer with an adapter inside. Adapting freezes all parameters of a layer, so the adapter inside and
        its group would stop training."""
        if not isinstance(linear, nn.Module):
            raise TypeError(f"linear: expected an nn.Module, got {type(linear).__name__}")
        for module in linear.modules():
            if isinstance(module, LoTRFactors | HasCore):  # also PEFT's cores
                raise TypeError(f"linear: expected a plain layer, got {type(linear).__name__}, which is adapted already")

    @classmethod
    def _factors_for(
        cls,
        factors: LoTRFactors | None,
        rank: int | tuple[int, int] | None,
        sizes: tuple[int, int],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> LoTRFactors:
        """The factors of a new layer of sizes (in_features, out_features): the given ones, or new ones in float32 (float64)."""
        if factors is None:
            wide = accumulate_dtype(dtype or torch.get_default_dtype())
            factors = LoTRFactors(*sizes, DEFAULT_RANK if rank is None else rank, device=device, dtype=wide)
        elif rank is not None and check_rank(rank) != (factors.r_in, factors.r_out):
            raise ValueError(f"rank: expected that of factors, {factors.rank}, or None, got {rank}")
        cls._check_factors(factors, *sizes)
        return factors

    @staticmethod
    def _check_factors(factors: object, in_features: int, out_features: int) -> None:
        if not isinstance(factors, LoTRFactors):
            raise TypeError(f"factors: expected LoTRFactors, got {type(factors).__name__}")
        want, got = (in_features, out_features), (factors.in_features, factors.out_features)
        if want != got:
            raise ValueError(f"factors: expected (in_features, out_features) = {want}, got {got}")

    @staticmethod
    def _check_device(factors: LoTRFactors, device: torch.device) -> None:
        """Raises ValueError for factors on the meta device for a layer with values. Other devices may differ."""
        if factors.A.is_meta and device.type != "meta":
            raise ValueError(f"factors: expected values, as the layer has on {device}, got factors on the meta device")

    def _attach(self, factors: LoTRFactors, device: torch.device, settings: Settings) -> None:
        """Adds the adapter to a layer that has its base parameters; device is the core's."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.scaling = settings.scale(factors.rank)
        self.dropout, self.merged = settings.dropout, False
        self.strategy: str | None = None
        self.core = nn.Parameter(self._zero_core(factors, device))
        self.register_buffer("start_core", None, persistent=False)
        self.register_buffer("weight_backup", None, persistent=False)
        factors._group.join()
        self.factors = factors  # registered, so that a model built by hand owns A and B
        if settings.magnitude:
            self.hold_magnitude(nn.Parameter(torch.empty(self.out_features, device=device, dtype=factors.A.dtype)))
            self.reset_magnitude()
        agree_over(getattr(self, "weight", None), self.adapter_parameters())

    def _zero_core(self, factors: LoTRFactors, device: torch.device) -> Tensor:
        return torch.zeros(factors.r_in, factors.r_out, device=device, dtype=factors.A.dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's. `parallelize_module` registers all parameters as DTensors: those of the adapter stay plain tensors
        that all processes have, so the layer can run on local tensors."""
        if is_dtensor(param):
            if "." in name:  # of a child module
                return
            value = param.detach() if name in self._cut_with_base else param.detach().full_tensor()
            param = in_place_of(self._parameters.get(name), param, value)
        super().register_parameter(name, param)
        if name == "weight" and is_dtensor(param) and "merged" in self.__dict__:
            if self.norms is not None:
                raise ValueError(f"magnitude: expected whole weights, got a DTensor {tuple(param.shape)}; use magnitude=False")
            if (form := core_form_of(self)) is not None and not any(True for _ in form.parameters()):
                self.__dict__["core_form"] = self.release_core_form()  # RowwiseParallel expects a weight in every child
            agree_over(param, self.adapter_parameters())

    def leave_factors_to_owner(self) -> None:
        """Keeps a plain reference to the factors, which another module registers. Then state_dict names them once, and a block
        can be sharded without them."""
        if "factors" in self._modules:
            self.__dict__["factors"] = self._modules.pop("factors")

    def forward(self, input: Tensor) -> Tensor:
        x = input  # nn.Linear's name for it, by which code may pass it
        if type(x) is Proxy:
            return self._symbolic(x)
        shape = x.shape
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"x: expected a last dimension of in_features = {self.in_features}, got shape {tuple(shape)}")
        if self.merged:
            if self.notice is not None:
                self.notice.warn(self.adapter_parameters())
            return self._base(x)
        off, mixture = (self._off, None) if NOW.any is None and not self.traced else self._state()
        if off:
            if self.start_core is None:
                return self._base(x)
            return self._call(x, Call(self.start_core, self.scaling), self.factors.start_A, self.factors.start_B)
        # Parameters are read from nn.Module's dictionaries, here, in factors and in _call: its __getattr__ costs 11 us per
        # layer and step (bench.host, one token).
        parameters, modules = self._parameters, self._modules
        core = parameters["core"] if "core" in parameters else self.core
        factors = modules["factors"] if "factors" in modules else self.factors
        call = Call(core, self.scaling, self.dropout if self.training else 0.0, factors._group, self, self.strategy)
        run = self._call if self.norms is None else self._call_scaled
        return factors(partial(run, x, call) if mixture is None else partial(self._call_mixed, x, call, mixture))

    def _symbolic(self, x: Proxy) -> Proxy:
        """The forward as torch.fx records it: torch's own products of the base and the adapter, in their current state.

        Raises:
            ValueError: magnitudes, a core that is no parameter, or inside `mixed`.
        """
        off, mixture = self._state()
        if self.merged or (off and self.start_core is None):
            return self._base(x)
        core, A, B = self._parameters.get("core"), self.factors.A, self.factors.B
        if off:
            core, A, B = self.start_core, self.factors.start_A, self.factors.start_B
        elif mixture is not None or core is None or self.norms is not None:
            why = "a batch of several adapters" if mixture is not None else "a computed core" if core is None else "magnitudes"
            raise ValueError(
                f"x: expected a tensor in a layer with {why}, got a torch.fx.Proxy; merge first, or use torch.export"
            )
        dropped = nnf.dropout(x, self.dropout) if self.dropout and self.training and not off else x
        core, A, B = (Proxy(x.tracer.create_arg(t), x.tracer).to(x.dtype) for t in (core, A, B))
        return self._base(x) + (dropped @ A @ core @ B.transpose(0, 1)) * self.scaling

    def _call(self, x: Tensor, call: Call, A: Tensor, B: Tensor) -> Tensor:
        return call_linear(x, self._matrix(), self.bias, A, B, call)

    def _call_scaled(self, x: Tensor, call: Call, A: Tensor, B: Tensor) -> Tensor:
        return scaled_linear(x, self._matrix(), self.bias, A, B, call, self.rows_of(self.stored(), A, B, call))

    def stored(self) -> Stored:
        """The base's weight, as `HasMagnitude.rows_of` takes it."""
        return self.weight, self._matrix

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """m <- |W_n + F_n A^T|, so that the layer computes the same as without magnitudes. Call it after the weight of a
        layer that was built by hand is loaded.

        RuntimeError for a layer without magnitudes.
        """
        if self.norms is None:
            raise RuntimeError("reset_magnitude: expected a layer with magnitudes, got one without; give magnitude=True")
        call = Call(self.core, self.scaling)
        self.magnitude.copy_(self.factors(lambda A, B: self.rows_of(self.stored(), A, B, call).norm))

    def _call_mixed(self, x: Tensor, call: Call, mixture: Mixture, A: Tensor, B: Tensor) -> Tensor:
        b = x.shape[0] if mixture.index is None else len(mixture.index)
        cores, call.scaling = cores_of(mixture, call.core, b), mixture.scaling
        if self.norms is not None:
            raise ValueError("model: expected adapters without magnitudes for a batch of several adapters, got magnitude=True")
        return call_mixed(x, self._mixed_base(), A, B, cores, index_for(mixture, x), call)

    def _mixed_base(self) -> Callable[[Tensor], Tensor] | tuple[Tensor, Tensor | None]:
        """The base of a call with a core for each row, as `call_mixed` takes it."""
        return self._matrix(), self.bias

    def _base(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _base")

    def _matrix(self) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _matrix")

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of A, B, the core and the magnitudes; for a computed part those that compute it."""
        for module, name in self.factors.owners:
            yield from parameters_of(module, name)
        yield from parameters_of(self, "core")
        yield from parameters_of(self, "magnitude")

    def set_trained(self, train: Collection[str]) -> None:
        """Sets requires_grad of "core" and "magnitude", if they are parameters of the layer."""
        for part in ("core", "magnitude"):
            for parameter in parameters_of(self, part):
                parameter.requires_grad_(part in train)

    # ---- merging -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """s B G^T A^T [.., out_features, in_features] in float32 (float64 for float64 factors), which merge adds to W before
        magnitudes scale the rows of the sum."""
        return self.factors(lambda A, B: delta_weight(A, B, self.core, self.scaling))

    @torch.no_grad()
    def _merged_weight(self) -> Tensor:
        """W + s B G^T A^T, with magnitudes (m / c) of it, in float32 (or wider) and cast once; W if merged already."""
        weight = self._local_matrix().detach()
        if self.merged:
            return weight
        return self._joined(weight, self._local_delta())

    def _joined(self, weight: Tensor, delta: Tensor) -> Tensor:
        return plus(weight, delta) if self.norms is None else with_lengths(weight, delta, self.magnitude)

    @property
    def unmerges_by_backup(self) -> bool:
        """Whether unmerge needs a copy of the base."""
        return self.norms is not None

    def _local_matrix(self) -> Tensor:
        """W [n, k], or this process's part of it."""
        matrix = self._matrix()
        return matrix.to_local() if is_dtensor(matrix) else matrix

    def _local_delta(self) -> Tensor:
        """The delta that merge adds to `_local_matrix`."""
        if not is_dtensor(matrix := self._matrix()):
            return self.delta_weight()
        of_A, of_B = cut_of(matrix).rows
        return self.factors(lambda A, B: delta_weight(A[of_A], B[of_B], self.core, self.scaling))

    def _weight_to_write(self, where: str) -> Tensor:
        """W [n, k], or this process's part of it, as a view of its parameter. Raises TypeError if it is not a parameter,
        RuntimeError if FSDP2 holds it in parts."""
        self.check_parameter("weight", where)
        refuse_fsdp2(self.holder, where)
        return self._local_matrix()

    def _check_base(self) -> None:
        """Raises TypeError unless the plain layer can take over weight and bias."""
        for name in ("weight", "bias"):
            self.check_parameter(name, "to_base")

    @property
    def holder(self) -> nn.Module:
        """The module that has weight and bias."""
        return self

    def check_parameter(self, part: str, where: str, name: str = "") -> None:
        """TypeError unless the weight or bias is a parameter. name: the layer's, where: the caller's, for the message."""
        check_is_parameter(self, part, where, name)

    @torch.no_grad()
    def merge(self, safe: bool = False, keep_backup: bool = True) -> None:
        """Adds the adapter into the weight: delta and sum in float32, cast once. The layer then runs as a plain linear one.

        safe: raise ValueError, without a change, if the result has a non-finite element. keep_backup: keep a copy of W, so
        that unmerge restores it bit for bit; without, unmerge subtracts, and raises for a layer with magnitudes.
        RuntimeError if merged already or held in parts by FSDP2; TypeError for a base that cannot be merged into, and for a
        weight that is no longer a parameter (weight_norm, spectral_norm, parametrizations, pruning). A backward through an
        earlier forward then raises.
        """
        if self.merged:
            raise RuntimeError("merge: expected an unmerged layer, got one that is merged already")
        weight, merged = self._weight_to_write("merge"), self._merged_weight()
        if safe and not bool(torch.isfinite(merged).all()):
            raise ValueError("merge: expected a finite merged weight (safe=True), got NaN or infinite elements")
        with uninterrupted():
            self._write_merged(weight, merged, keep_backup)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Removes the adapter from the weight. RuntimeError if it is not merged, or has magnitudes and no backup."""
        if not self.merged:
            raise RuntimeError("unmerge: expected a merged layer, got one that is not merged")
        if self.unmerges_by_backup and self.weight_backup is None:
            raise RuntimeError(
                "unmerge: expected a copy of the weight, got a layer with magnitudes merged with keep_backup=False"
            )
        weight = self._weight_to_write("unmerge")
        restored = plus(weight, self._local_delta(), -1) if self.weight_backup is None else self.weight_backup
        with uninterrupted():
            self._write_back(weight, restored)
            self.merged = False

    @torch.no_grad()
    def _give_start_back(self) -> None:
        """Adds the part of W that an init moved into the start adapter back to W, before the adapter is removed."""
        if self.start_core is None or self.merged:
            return
        start = delta_weight(self.factors.start_A, self.factors.start_B, self.start_core, self.scaling)
        matrix = self._matrix()
        write_(matrix, plus(matrix, start))
        self.start_core = None

    # ---- state -------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            raise RuntimeError(f"load_state_dict: expected an unmerged layer at {prefix!r}, got a merged one; unmerge it first")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if self.merged:
            raise RuntimeError(
                f"state_dict: expected an unmerged layer at {prefix!r}, got a merged one, whose weight has the adapter in it "
                "beside its core; unmerge it, or take the adapter off with unload(model, merge=True)"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        parts = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.factors.rank}"
        parts += f", scaling={self.scaling:g}" + (", magnitude=True" if self.norms is not None else "")
        if self.dropout:
            parts += f", dropout={self.dropout}"
        return parts + (", merged" if self.merged else "") + (", disabled" if self.disabled else "")
