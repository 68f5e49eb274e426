"""The tuner that PEFT creates for a LoTRPeftConfig. Imported by `lotr_ext.interop.peft`.

    lotr_factors.<adapter>.<group>.A, .B       owned here, once per group; with group_by="width" .A_<in_features>.value, ..
    model.<layer>.lotr_adapter.<adapter>.core  owned by the layers (`peft_layer.py`), and .magnitude
    lotr_cores.<adapter>.<parameter>           instead of those, if the cores are not dense: the parameters of all cores

On disk the adapter's name is left out, as PEFT does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ..layers.cores import Cores
from ..layers.factors import LoTRFactors
from ..layers.merging import MergeNotice
from ..layers.sharded import named_modules
from ..model.adapter_files import LayerEntry
from ..model.core_forms import form_at, make_cores
from ..model.effect import effect_of, warn_of_skipped
from ..model.experts import expert_sizes, parameter_name, place, release
from ..model.peft_files import described_layers
from ..model.scope import attach_scope, detach_scope
from ..model.shared_factors import SharedFactors, factors_by_part, width_names
from ..model.sizes import check_memory
from ..model.starts import set_fast_paths
from ..model.targets import Target, can_be_child, features, name_ends_with, select
from ..ops.planner import DTYPES, HALVES
from .peft_config import LoTRPeftConfig
from .peft_experts import LoTRPeftExperts, hosts
from .peft_layer import LoTRPeftLinear, check_whole
from .peft_shared import add_weighted, loaded_into_shared, mixed_batch, shared_factors


def _entry(target: Target, config: LoTRPeftConfig) -> LayerEntry:
    """The entry of a layer in the files of `save_adapter`."""
    sizes = (target.in_features, target.out_features)
    owners = width_names(*sizes) if config.group_by == "width" else (target.group,)
    names = tuple(f"lotr_factors.{owner}" for owner in owners)
    experts = 0 if target.parameter is None else expert_sizes(target.module, target.parameter)[0]
    return LayerEntry(names if len(names) > 1 else names[0], *sizes, 1.0, 0.0, experts)


def _in_order_of(saved: list[dict[str, Any]] | None, layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers in the order of a loaded adapter's, if they are the same: the order in which its file has their cores."""
    at = {str(layer.get("name")): i for i, layer in enumerate(saved or ()) if isinstance(layer, dict)}
    return sorted(layers, key=lambda layer: at[layer["name"]]) if at.keys() == {layer["name"] for layer in layers} else layers


def _keys_of(adapter_name: str) -> re.Pattern[str]:
    """A pattern that matches the names of an adapter's tensors in the model's state_dict, and no other names."""
    name = re.escape(adapter_name)
    return re.compile(rf"lotr_(factors|cores)\.{name}\.|\.lotr_adapter\.{name}\.")


class LoTRPeftModel(BaseTuner):
    """PEFT's tuner for LoTR. A model that `apply_lotr` refuses is refused here too, before any change."""

    uses_shared_state: bool = True
    prefix: str = "lotr_"
    tuner_layer_cls = LoTRPeftLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _adapted(self) -> dict[str, LoTRPeftLinear]:
        """The adapted layers by their name in the base model. Private, because other attributes are looked up in the model."""
        return {name: m for name, m in self.model.named_modules() if isinstance(m, LoTRPeftLinear)}

    # ---- adding an adapter -------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.lotr_factors, self.lotr_cores = nn.ModuleDict(), nn.ModuleDict()
        self._groups: dict[str, str] = {}
        self._parameters_found: list[Target] = []
        self._owners: set[str] = set()
        self._cores: Cores | None = None
        self._shared: SharedFactors | None = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As BaseTuner's. The factors and cores of other adapters keep their requires_grad."""
        before = [(p, p.requires_grad) for shared in (self.lotr_factors, self.lotr_cores) for p in shared.parameters()]
        layers = set(self._adapted())
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self._take_back(adapter_name, layers)
            raise
        finally:
            self._groups, self._owners, self._cores, self._shared = {}, set(), None, None
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        set_fast_paths(self.model, off=True, adapted=LoTRPeftLinear)
        attach_scope(self.model)

    def _take_back(self, adapter_name: str, layers: set[str]) -> None:
        """Undoes an injection that failed halfway. layers: those that were adapted before it."""
        for shared in (self.lotr_factors, self.lotr_cores):
            if adapter_name in shared:
                del shared[adapter_name]
        adapted = self._adapted()
        for host in hosts(layer for name, layer in adapted.items() if name not in layers):
            release(host)
        for name, layer in adapted.items():
            if name not in layers and not isinstance(layer, LoTRPeftExperts):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, layer.base_layer)
            elif name in layers and adapter_name in layer.lotr_adapter:
                del layer.lotr_adapter[adapter_name]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None and peft_config.target_parameters:
            peft_config.target_modules = set()
        try:
            return super()._prepare_adapter_config(peft_config, model_config)
        except ValueError as error:
            kind = model_config.get("model_type")
            raise ValueError(
                f'target_modules: expected names (["q_proj", "v_proj"]), a regular expression or "all-linear", got None for a '
                f"model of type {kind!r}, for which PEFT knows none ({error})"
            ) from None

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Finds the targets' groups and raises for layers that cannot be adapted, before PEFT changes the model."""
        if not isinstance(peft_config, LoTRPeftConfig):
            raise TypeError(f"peft_config: expected LoTRPeftConfig, got {type(peft_config).__name__}")
        everything = str(peft_config.target_modules).lower() == "all-linear"
        config = _maybe_include_all_linear_layers(peft_config, model)
        if everything:  # these are names now
            reasons = {name: effect_of(model, model.get_submodule(name), [name]).none for name in sorted(config.target_modules)}
            warn_of_skipped({name: why for name, why in reasons.items() if why is not None}, stacklevel=9)
            config.target_modules = {name for name, why in reasons.items() if why is None}
        names = self._matching(config, dict(model.named_modules()))
        if not names and not config.target_parameters:
            return  # PEFT raises a detailed error
        patterns = "|".join(map(re.escape, names)) or None
        lotr = config.to_lotr(patterns, config.target_parameters)
        targets = select(model, lotr).targets
        check_memory(targets, lotr)
        for target in targets:
            if len(target.names) > 1:
                raise ValueError(f"target_modules: expected layers in one place each, got one at {', '.join(target.names)}")
        self._groups = {target.name: target.group for target in targets}
        peft_config.layers = _in_order_of(
            peft_config.layers, described_layers({target.name: _entry(target, config) for target in targets})
        )
        self._parameters_found = [target for target in targets if target.parameter is not None]
        self._owners = set(self._groups.values())
        if config.group_by == "width":
            self._owners = {name for t in targets for name in width_names(t.in_features, t.out_features)}
        self._shared = shared_factors(self, config, targets)
        self._cores = make_cores(config.to_lotr(), [layer["name"] for layer in peft_config.layers], "cpu")
        self._check_adapter_names(config)

    def _matching(self, config: LoTRPeftConfig, modules: dict[str, nn.Module]) -> list[str]:
        """The checked names of the modules that config targets."""
        inside = tuple(f"{name}." for name, m in modules.items() if isinstance(m, BaseTunerLayer))
        names = [
            name for name in modules if name and not name.startswith(inside) and self._check_target_module_exists(config, name)
        ]
        for name in names:
            module, kind = modules[name], type(modules[name]).__name__
            if isinstance(module, BaseTunerLayer) and not isinstance(module, LoTRPeftLinear):
                raise TypeError(f"target_modules: expected layers without adapters of other methods, got {name!r} ({kind})")
            if features(module) is None:
                raise TypeError(
                    "target_modules: expected nn.Linear, Conv1D or a module with in_features and out_features, got "
                    f"{name!r} ({kind})"
                )
        wanted = config.target_modules
        none = not names and not config.target_parameters
        if none and isinstance(wanted, str) and any(name_ends_with(name, wanted) for name in modules):
            raise ValueError(
                f"target_modules: expected names of modules, got {wanted!r}, which matches none; a string is a regular "
                f"expression for the full name: for all names that end so give [{wanted!r}]"
            )
        return names

    def _check_adapter_names(self, config: LoTRPeftConfig) -> None:
        """Refuses ambiguous names: PEFT drops keys from an adapter's file that contain another adapter's name as a part."""
        for name in self.peft_config:
            if not can_be_child(name):
                raise ValueError(
                    f"adapter_name: expected a name without dots that nn.ModuleDict does not use itself, got {name!r}"
                )
        if len(self.peft_config) < 2:
            return
        names = {*self._groups, *self._adapted(), *(config.modules_to_save or ())}
        parts = {part for name in names for part in name.split(".")} | self._owners
        parts |= {group for pairs in self.lotr_factors.values() for group in pairs}
        for name in self.peft_config:
            if name in parts:
                raise ValueError(f"adapter_name: expected a name that no adapted module or group has, got {name!r}")

    def _create_and_replace(
        self,
        peft_config: LoTRPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        known = isinstance(target, LoTRPeftLinear)
        layer = target if known else LoTRPeftLinear(target).train(target.training)
        factors = self._factors(adapter_name, self._groups[current_key], layer, peft_config)
        if self._cores is not None and adapter_name not in self.lotr_cores:
            self.lotr_cores[adapter_name] = self._cores.to(factors.A.device, factors.A.dtype)
        layer.add(adapter_name, factors, peft_config, None if self._cores is None else form_at(self._cores, current_key))
        if not known:
            # PEFT's _replace_module would move the core to an offloaded weight's meta device
            setattr(parent, target_name, layer)

    def _inject_parameters(
        self, peft_config: LoTRPeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapts the experts' parameters that `_prepare_model` has found. Returns their names."""
        for target in self._parameters_found:
            experts, own = place(target.module), target.parameter
            if own not in experts:
                experts[own] = LoTRPeftExperts(target.module, own).train(target.module.training)
            layer = experts[own]
            layer.add(adapter_name, self._factors(adapter_name, target.group, layer, peft_config), peft_config)
        return [parameter_name(target.name) for target in self._parameters_found]

    def _factors(self, adapter_name: str, group: str, layer: LoTRPeftLinear, config: LoTRPeftConfig) -> LoTRFactors:
        """The adapter's pair of factors for a group, created with its first layer in that layer's dtype."""
        if adapter_name not in self.lotr_factors:
            self.lotr_factors[adapter_name] = SharedFactors() if self._shared is None else self._shared
        device, dtype = layer.place()
        sizes, dtype = (layer.in_features, layer.out_features), dtype if dtype in DTYPES.values() else torch.float32
        return self.lotr_factors[adapter_name].pair(group, sizes, config.to_lotr(), device, dtype)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for _, module, name in factors_by_part(self.lotr_factors[adapter_name]) if autocast_adapter_dtype else ():
            old = getattr(module, name)
            if old.dtype in HALVES:
                setattr(module, name, nn.Parameter(old.detach().float(), requires_grad=old.requires_grad))
        cores = self.lotr_cores[adapter_name] if autocast_adapter_dtype and adapter_name in self.lotr_cores else None
        if cores is not None and next(cores.parameters()).dtype in HALVES:
            cores.float()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        attach_scope(self.model)  # it folds the active adapters' cores

    # ---- removing it -------------------------------------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        del self.lotr_factors[adapter_name]
        if adapter_name in self.lotr_cores:
            del self.lotr_cores[adapter_name]
        attach_scope(self.model)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, layer in self._adapted().items():
            try:
                layer.mergeable_weight()
            except TypeError as error:
                raise TypeError(f"{error} ({name})") from None

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges all layers, or none on an error."""
        before = {layer: list(layer.merged_adapters) for layer in self._adapted().values()}
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            for layer, names in before.items():
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise
        notice = MergeNotice()
        for layer in before:
            layer.notice = notice

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
            for layer in self._adapted().values() if safe_merge else ():  # check all before the first is removed
                wanted = layer.active_adapters if adapter_names is None else adapter_names
                names = [name for name in wanted if name in layer.lotr_adapter and name not in layer.merged_adapters]
                layer.merged_weight([*layer.merged_adapters, *names], safe=True)
        experts = [layer for layer in self._adapted().values() if isinstance(layer, LoTRPeftExperts)]
        for layer in experts if merge else ():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for host in hosts(experts):
            release(host)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        detach_scope(model)
        set_fast_paths(model, off=False)
        return model

    # ---- several adapters over the same factors (`peft_shared.py`) ---------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if (names := kwargs.get("adapter_names")) is None:
            yield
            return
        with mixed_batch(self, names, kwargs.get("num_beams")):
            yield

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        density: float | None = None,
        majority_sign_method: str = "total",
        svd_rank: int | None = None,
        **svd: Any,
    ) -> None:
        """Adds a weighted sum of adapters over the same factors. "linear", "cat" and "svd" are the exact sum, at the same rank;
        "ties", "dare_linear", "dare_ties" and "magnitude_prune" are PEFT's methods, applied to the cores. svd: without effect.

        Raises:
            TypeError, ValueError: an argument that does not fit, or adapters with different factors. Nothing is changed then.
        """
        if adapter_name not in self.peft_config:  # as PEFT's
            add_weighted(self, adapters, weights, adapter_name, combination_type, density, majority_sign_method, svd_rank)

    # ---- what is on disk ---------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LoTRPeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors in a state_dict of the whole model. PEFT calls this in every process before it writes.

        BaseTuner's method searches for the modules' names, which contain FSDP1's wrappers. The state_dict's names do not, so
        it would silently find nothing in a wrapped block.
        """
        ours = _keys_of(adapter_name)
        found = {key: tensor for key, tensor in state_dict.items() if ours.search(key)}
        copies = {key: tensor for key, tensor in state_dict.items() if f".modules_to_save.{adapter_name}." in key}
        check_whole(model, {**found, **copies})
        every = (f"{name}.{own}" for name, m in named_modules(model) for own, p in m._parameters.items() if p is not None)
        missing = sorted(key for key in every if ours.search(key) and key not in found)
        if found and missing:  # processes that do not write have none at all
            raise RuntimeError(
                f"state_dict: expected all of the adapter's tensors, got {len(found)} without {missing[0]}; frozen ones belong "
                "to it too, so gather them as well"
            )
        biases = (key for key in state_dict if config.bias != "none" and key.endswith(".bias"))
        if config.bias == "lotr_only":
            layers = {f"{name}.base_layer.bias" for name, m in named_modules(model) if isinstance(m, LoTRPeftLinear)}
            biases = (key for key in biases if key in layers)
        return {**found, **{key: state_dict[key] for key in biases}}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for shared in ("lotr_factors", "lotr_cores"):
            head, found, tail = key.partition(f"{shared}.{adapter_name}.")
            if found and head in ("", "base_model."):
                return f"{head}{shared}.{tail}"
        head, found, tail = key.rpartition(f".lotr_adapter.{adapter_name}.")  # a parametrized core has longer keys
        if found:
            return f"{head}.lotr_adapter.{tail}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """BaseTuner's renaming. Also raises for an adapter of other layers, where PEFT only warns."""
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        ours = _keys_of(adapter_name)
        want = {key for key in model.state_dict() if ours.search(key)}
        got = {key for key in renamed if re.search(r"\.lotr_adapter\.|lotr_(factors|cores)\.", key)}
        if want != got:
            missing, foreign = sorted(want - got), sorted(got - want)
            raise ValueError(
                f"adapter: expected the model's {len(want)} LoTR tensors, got {len(got)}: missing "
                f"{', '.join(missing[:3]) or 'none'}; not in the model {', '.join(foreign[:3]) or 'none'}"
            )
        return renamed | loaded_into_shared(model, adapter_name, renamed)
