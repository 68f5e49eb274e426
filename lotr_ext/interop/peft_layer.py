"""The adapted layer of PEFT's tuner, on lotr_ext's operators. Imported by `lotr_ext.interop.peft`.

    y = base(x) + sum over active adapters a of  s_a ((drop(x) A_a) G_a) B_a^T

The layer owns a core for each adapter. The tuner owns A and B of each group, and a core refers to its pair. The
first active adapter runs with the base product (`call.call_linear`) where the base is a plain nn.Linear or Conv1D; more
adapters, and adapters over other bases, are added to the base's output (`call.add_adapter`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..autograd.call import Call, add_adapter, call_linear
from ..autograd.magnitude import row_lengths, scaled, scaled_linear
from ..layers.core import HasCore
from ..layers.cores import CoreAt, Cores
from ..layers.factors import LoTRFactor, LoTRFactors
from ..layers.functional import explain_call
from ..layers.init import fill_core_
from ..layers.magnitude import HasMagnitude, Stored, stored_in, with_lengths
from ..layers.merging import Merges, check_is_parameter, plus, refuse_fsdp2
from ..layers.mixture import Mixture, call_mixed, cores_of, index_for
from ..layers.own_forward import dense_view, has_own_forward, returns_product
from ..layers.parametrized import parameters_of
from ..layers.placement import home
from ..layers.quantized import is_conv1d
from ..layers.request import NOW, InRequests
from ..layers.settings import Settings
from ..layers.sharded import in_parts, named_modules
from ..layers.uninterrupted import uninterrupted
from ..model.targets import features, needs_wrap
from ..ops.composite import delta_weight
from ..ops.planner import Plan
from .peft_config import LoTRPeftConfig


class LoTRCore(HasCore, HasMagnitude):
    """One adapter in one layer: its core [r_in, r_out], of experts [e, r_in, r_out], its magnitudes, factors, scaling and
    dropout.

    form: the module that computes the core, if the core is not a parameter.
    """

    start_core = None
    in_use = True  # whether a forward scope may fold it; of adapters that share B only the active ones

    def __init__(
        self, factors: LoTRFactors, config: LoTRPeftConfig, num_experts: int | None = None, form: CoreAt | None = None
    ):
        super().__init__()
        self.scaling = Settings.of(config).scale(factors.rank)
        self.dropout, self.trained = config.dropout, tuple(config.train)
        shape = (factors.r_in, factors.r_out)
        if num_experts is not None:
            self.num_experts, shape = num_experts, (num_experts, *shape)
        held = form
        if held is None:
            held = nn.Parameter(torch.empty(shape, device=factors.A.device, dtype=factors.A.dtype))
            fill_core_(held, config.core_init)
        self.hold_core(held)
        self.__dict__["factors"] = factors  # not registered here: the tuner registers it

    @torch.no_grad()
    def measure(self, stored: Stored) -> None:
        """Adds magnitudes, at least in float32: the lengths of W's rows with the adapter."""
        device = torch.device("meta") if self.factors.A.is_meta else stored[0].device
        weight = stored[1]().to(device)
        lengths = self(lambda A, B, call: row_lengths(weight, A, B, call.core, call.scaling))
        self.hold_magnitude(nn.Parameter(lengths))

    def parameters_by_part(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of A, B, the core and the magnitudes by part; for a parametrized part those that compute it."""
        own = (self, "core"), (self, "magnitude")
        for part, (owner, name) in zip(("A", "B", "core", "magnitude"), (*self.factors.owners, *own)):
            yield from ((part, parameter) for parameter in parameters_of(owner, name))

    def forward(self, operation: Callable[[Tensor, Tensor, Call], Tensor]) -> Tensor:
        """operation(A, B, call): the only way to read the core, A and B, so that ZeRO-3 gathers them around this call."""
        return self.factors(lambda A, B: operation(A, B, self.call()))

    def call(self) -> Call:
        """The current Call of this adapter."""
        p = self.dropout if self.training else 0.0
        return Call(self.core, self.scaling, p, self.factors._group, self)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s B G^T A^T [n, k] in float32 (float64 for float64)."""
        return self(lambda A, B, call: delta_weight(A, B, call.core, call.scaling))

    def extra_repr(self) -> str:
        parts = f"rank={self.factors.rank}, scaling={self.scaling:g}"
        return parts + (f", dropout={self.dropout}" if self.dropout else "")


def own_weight(base: nn.Module) -> Tensor | None:
    """W [n, k] of a base that computes x W^T + bias and nothing else. None if only its forward can read the weight: a
    quantised one, or one that ZeRO-3 gathers for the forward."""
    return None if parametrize.is_parametrized(base) or has_own_forward(base) else dense_view(base)


class LoTRPeftLinear(InRequests, Merges, BaseTunerLayer):
    """A linear layer with LoTR adapters by name: x [..., in_features] -> [..., out_features].

    state_dict: the base's keys under `base_layer.`, `lotr_adapter.<name>.core`, and with magnitudes `.magnitude`. Merging sums
    in fp32 and casts once, from the weight as it was before the first merge, which is kept so that unmerge restores it bit for
    bit.
    """

    adapter_layer_names: tuple[str, ...] = ("lotr_adapter",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features(base_layer)
        self._start()

    def _start(self) -> None:
        """Initial attributes, without an adapter."""
        self.lotr_adapter = nn.ModuleDict()
        self._disable_adapters, self._active_adapter = False, []
        self.merged_adapters: list[str] = []
        self.register_buffer("weight_backup", None, persistent=False)

    def add(self, adapter_name: str, factors: LoTRFactors, config: LoTRPeftConfig, form: CoreAt | None = None) -> None:
        """Adds a new adapter of that name. form: as for LoTRCore."""
        self.lotr_adapter[adapter_name] = self._core(factors, config, form).train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.magnitude:
            self.lotr_adapter[adapter_name].measure(stored_in(self.base_layer))

    def _core(self, factors: LoTRFactors, config: LoTRPeftConfig, form: CoreAt | None) -> LoTRCore:
        return LoTRCore(factors, config, form=form)

    def place(self) -> tuple[torch.device, torch.dtype]:
        """The base layer's device and dtype; if accelerate offloads it, the device to which it is moved for a forward."""
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        return home(self.base_layer) if device.type == "meta" else device, dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As BaseTunerLayer's, but keeps the dtype. PEFT calls it after it has loaded values into tensors without memory
        (low_cpu_mem_usage): a cast would round them, and A and B, which the tuner owns, would not follow."""
        device = self.place()[0] if device is None else device
        own = self.lotr_adapter[adapter_name] if adapter_name in self.lotr_adapter else None
        if own is not None and device is not None and not any(parameter.is_meta for parameter in own.parameters()):
            own.to(device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names: expected None in a call of a layer, got names; give them to the model")
        if (NOW.any is not None or self.traced) and not self.disable_adapters:
            off, mixture = self._state()
            if off:
                return self.base_layer(x, *args, **kwargs)
            if mixture is not None:
                return self._mixed(x, mixture, *args, **kwargs)
        cores = list(self._running(warn=True).values())
        if not cores:
            return self.base_layer(x, *args, **kwargs)
        base, y = self.base_layer, None
        plain = not (args or kwargs) and not needs_wrap(base)
        if plain and (weight := own_weight(base)) is not None:
            core = cores.pop(0)
            y = core(partial(self._call, x, weight, core))
        else:
            y = base(x, *args, **kwargs)
        for core in cores:
            y = core(partial(self._add, x, y, core))
        return y

    def _call(self, x: Tensor, weight: Tensor, core: LoTRCore, A: Tensor, B: Tensor, call: Call) -> Tensor:
        bias = self.base_layer.bias
        if core.norms is None:
            return call_linear(x, weight, bias, A, B, call)
        return scaled_linear(x, weight, bias, A, B, call, core.rows_of(stored_in(self.base_layer), A, B, call))

    def _add(self, x: Tensor, y: Tensor, core: LoTRCore, A: Tensor, B: Tensor, call: Call) -> Tensor:
        y = add_adapter(x, y, A, B, call)
        if core.norms is None:
            return y
        bias = getattr(self.base_layer, "bias", None)
        return scaled(y, bias, core.rows_of(stored_in(self.base_layer), A, B, call), call)

    def _mixed(self, x: Tensor, mixture: Mixture, *args: Any, **kwargs: Any) -> Tensor:
        """The forward of a batch with an adapter per row, over the same factors."""
        held = self.lotr_adapter[mixture.adapter]

        def run(A: Tensor, B: Tensor, call: Call) -> Tensor:
            cores, call.scaling = cores_of(mixture, call.core, len(mixture.index)), mixture.scaling
            return call_mixed(x, lambda x: self.base_layer(x, *args, **kwargs), A, B, cores, index_for(mixture, x), call)

        return held(run)

    def _running(self, warn: bool = False) -> dict[str, LoTRCore]:
        """The adapters that a call runs, by name: the active ones; none if they are merged or disabled. warn: for a call, which
        unmerges what is disabled, and warns of a merged adapter that is not trained."""
        if warn and self.disable_adapters and self.merged:
            self.unmerge()
        if warn and self.merged and self.notice is not None:
            merged = (self.lotr_adapter[name] for name in self.merged_adapters)
            self.notice.warn((p for core in merged for _, p in core.parameters_by_part()), stacklevel=6)
        if self.disable_adapters or self.merged:
            return {}
        return {name: self.lotr_adapter[name] for name in self.active_adapters if name in self.lotr_adapter}

    def explain(self, x: Tensor, device: torch.device | str | None = None) -> dict[str, Plan]:
        """What each active adapter runs for x and why, in order, as `lotr_ext.explain`. Empty if only the base runs."""
        weight = None if needs_wrap(self.base_layer) else own_weight(self.base_layer)
        base = None if weight is None else (weight, self.base_layer.bias)
        found = {}
        for name, core in self._running().items():
            found[name] = explain_call(x, core.factors, core.call(), None if found else base, device)
        return found

    # ---- which adapters are active and trained -----------------------------------------------------------------------

    def _train_only(self, names: Sequence[str]) -> None:
        trained = []
        for name, core in self.lotr_adapter.items():
            for part, parameter in core.parameters_by_part():
                parameter.requires_grad_(False)
                trained += [parameter] * (name in names and part in core.trained)
        for parameter in trained:  # last: A and B may belong to several adapters
            parameter.requires_grad_(True)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_alone(names, "set_adapter")
        self._train_only([] if inference_mode else names)
        for name, core in self.lotr_adapter.items():
            core.in_use = name in names
        self._active_adapter = names

    def _check_alone(self, names: Sequence[str], where: str) -> None:
        """Raises ValueError if one of several adapters has magnitudes: they scale the sum of W and one adapter."""
        own = [name for name in names if name in self.lotr_adapter]
        if len(own) > 1 and (one := next((n for n in own if self.lotr_adapter[n].norms is not None), None)) is not None:
            raise ValueError(f"{where}: expected an adapter with magnitudes alone, got {one!r} among {', '.join(own)}")

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            self._train_only([])

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            if name in self.lotr_adapter:
                core = self.lotr_adapter[name]
                for part, parameter in core.parameters_by_part():
                    parameter.requires_grad_(requires_grad and part in core.trained)

    # ---- merging -----------------------------------------------------------------------------------------------------

    def mergeable_weight(self) -> Tensor:
        """A view of the base's W [n, k]. Raises TypeError if the base cannot be merged into, RuntimeError if FSDP2
        holds it in parts."""
        weight, base = own_weight(self.base_layer), type(self.base_layer).__name__
        if weight is None and (own := dense_view(self.base_layer)) is not None and returns_product(self.base_layer):
            weight = own
        if weight is None:
            raise TypeError(
                f"merge: expected a plain nn.Linear or Conv1D base, got {base}, which has no dense weight to add to; use the "
                "model without merging"
            )
        check_is_parameter(self.base_layer, "weight", "merge")
        return expect_values(self.base_layer, weight)

    @torch.no_grad()
    def merged_weight(self, names: Sequence[str], safe: bool) -> Tensor:
        """W [n, k] plus the adapters of these names. safe: raises ValueError if the result is not finite."""
        start = self.mergeable_weight() if self.weight_backup is None else self.weight_backup
        delta, merged = 0.0, start
        for name in names:
            delta = delta + self.lotr_adapter[name].delta()
            m = self.lotr_adapter[name].magnitude
            merged = plus(start, delta) if m is None else with_lengths(start, delta, m)
            if safe and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return merged

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lotr_adapter]
        if not names:
            return
        self._check_alone([*self.merged_adapters, *names], "merge")
        merged = self.merged_weight([*self.merged_adapters, *names], safe_merge)
        with uninterrupted():
            self._write_merged(self.mergeable_weight(), merged)
            self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with uninterrupted():
            self._write_back(self.mergeable_weight(), self.weight_backup)
            self.merged_adapters.clear()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What merging adds without magnitudes, s B G^T A^T, in the layout and dtype of the base's weight: [n, k], or [k, n]
        for Conv1D."""
        core = self.lotr_adapter[adapter_name]
        delta = core.delta()
        if core.norms is not None:
            W = stored_in(self.base_layer)[1]().detach().to(delta.dtype)
            delta = with_lengths(W, delta, core.magnitude) - W
        delta = delta.to(self.weight.dtype)
        return delta.mT.contiguous() if is_conv1d(self.base_layer) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "lotr." + super().__repr__()


def expect_values(owner: nn.Module, weight: Tensor) -> Tensor:
    """Returns weight without a graph, with the parameter's version counter, so that autograd sees a change. Raises RuntimeError
    if FSDP2 holds owner in parts, TypeError if weight is on the meta device."""
    refuse_fsdp2(owner, "merge")
    if weight.is_meta:
        raise TypeError("merge: expected a weight with values, got one on the meta device, which accelerate may offload")
    return weight.detach()


def check_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """RuntimeError if a tensor to be saved is a part: of ZeRO-3, which leaves shape (0,), or of FSDP1, which leaves no shape of
    more than one dimension. A model inside of FSDP1's wrapper cannot gather what that wrapper holds."""
    modules = dict(named_modules(model))
    for key, tensor in state.items():
        owner, _, name = key.rpartition(".")
        module = modules.get(owner)
        matrix = isinstance(module, (LoTRFactors, LoTRFactor, LoTRCore, Cores)) and name != "magnitude"
        matrix = matrix or (name == "weight" and module is not None and features(module) is not None)
        if in_parts(tensor) or 0 in tensor.shape or (matrix and tensor.ndim < 2):
            raise RuntimeError(
                f"save_pretrained: expected whole tensors, got {key} of shape {list(tensor.shape)}; gather a model in parts "
                "(ZeRO-3, FSDP) in every process, as accelerate's get_state_dict does, and give the result as state_dict"
            )
