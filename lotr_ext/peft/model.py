"""PEFT's tuner for LoTR: finds the layers, owns the factors and writes the files.

PEFT's BaseTuner adds, switches, merges and removes adapters. PEFT calls these hooks, in the order
of this file:

    _pre_injection_hook                 once, before the first adapter: the owners of all factors
    inject_adapter                      adds an adapter: calls the next two
    _prepare_model                      finds layers and groups before anything changes
    _create_and_replace                 adapts one layer: its pair of factors, its core
    _cast_adapter_dtype                 after inject_adapter: makes half precision float32
    delete_adapter                      also removes the factors
    _check_merge_allowed                checks all layers before the first is merged
    _unload_and_optionally_merge        also undoes `block_bypasses`
    _enable_peft_forward_hooks          adapter_names: one adapter per row
    _get_adapter_state_dict             the tensors of a file
    _remove_adapter_name_from_key       their names in the file
    _remap_adapter_state_dict_for_load  their names in the model

BaseTuner expects all parameters of an adapter inside its layers. Here the tuner registers each
factor once, so the hooks do for factors what BaseTuner does for layers:

    base_model.lotr_factors.<adapter>.A_<group>.value       A of a group (by width A_<in_features>)
    base_model.lotr_factors.<adapter>.B_<group>.value       B of a group (by width B_<out_features>)
    base_model.model.<layer>.lotr_adapter.<adapter>.core    the core of a layer
    base_model.lotr_cores.<adapter>.<parameter>             instead of a core, if cores are computed

The files leave out the adapter's name, as PEFT does. The configuration's `layers` names the factors
of each layer.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..bypasses import block_bypasses, restore_bypasses
from ..config import place_of
from ..model import factor_names, make_cores, make_pair
from ..sharded_tensors import is_sharded
from ..storage import expect_names
from ..targets import (
    Target,
    in_groups,
    linear_obstacle,
    linear_target,
    names_of_modules,
    tied_names,
)
from ..wrapped import mergeable_weight
from .config import LoTRPeftConfig
from .layer import LoTRPeftAdapter, LoTRPeftLinear

BASE = "__base__"  # PEFT's name, in adapter_names, for rows without an adapter


def _prefix_of(adapter_name: str) -> re.Pattern[str]:
    """Returns a pattern for the part of a tensor's name like "lotr_factors.default."."""
    return re.compile(rf"\b(lotr_(?:factors|cores|adapter))\.{re.escape(adapter_name)}\.")


class LoTRPeftModel(BaseTuner):
    """PEFT's tuner for LoTR.

    Attributes:
        lotr_factors: The factors of each adapter, by part and group.
        lotr_cores: The parameters of each adapter with computed cores.
    """

    uses_shared_state: bool = True
    prefix: str = "lotr_"
    tuner_layer_cls = LoTRPeftLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    lotr_factors: nn.ModuleDict
    lotr_cores: nn.ModuleDict

    # ---- adding an adapter -----------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.lotr_factors = nn.ModuleDict()
        self.lotr_cores = nn.ModuleDict()

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adds an adapter, as BaseTuner does. Factors of other adapters keep requires_grad."""
        were_trained = {
            parameter: parameter.requires_grad
            for parameter in chain(self.lotr_factors.parameters(), self.lotr_cores.parameters())
        }
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # BaseTuner does this only for parameters in the model, where the factors are not.
        for parameter, requires_grad in were_trained.items():
            parameter.requires_grad_(requires_grad)
        block_bypasses(self.model, LoTRPeftLinear)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Finds the layers and their groups before PEFT changes the model.

        Writes the layers, with the names of their factors, into the configuration, and keeps their
        groups for `_create_and_replace`, which gets one layer at a time.

        Raises:
            TypeError, ValueError: If a layer cannot be adapted.
        """
        targets = self._select(peft_config, model)
        in_groups(targets)  # raises if the layers of a group have several shapes
        self._groups = {target.name: target.group for target in targets}
        layers = []
        for target in targets:
            names = factor_names(target.group, target.sizes, peft_config.group_by)
            layers.append({"name": target.name, "factors": [f"lotr_factors.{n}" for n in names]})
        # Computed cores depend on the order of the layers, so a loaded adapter keeps its order.
        order = {entry["name"]: i for i, entry in enumerate(peft_config.layers or ())}
        if order.keys() == self._groups.keys():
            layers.sort(key=lambda entry: order[entry["name"]])
        peft_config.layers = layers
        self._check_adapter_names()

    def _select(self, peft_config: LoTRPeftConfig, model: nn.Module) -> list[Target]:
        """Returns the layers that a configuration selects, by PEFT's rules for names.

        As in PEFT, the names of all linear layers replace "all-linear" in the configuration. Layers
        in which an adapter would have no effect are left out of them. To select such a layer in any
        other way is an error.
        """
        tied = tied_names(model)
        is_all_linear = str(peft_config.target_modules).lower() == "all-linear"
        config = _maybe_include_all_linear_layers(peft_config, model)  # replaces "all-linear"
        # As in PEFT, modules inside adapted layers are skipped.
        inside_adapted = tuple(
            f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)
        )
        targets = []
        for module, names in names_of_modules(model).items():
            name = names[0]
            if name.startswith(inside_adapted) or not self._check_target_module_exists(
                config, name
            ):
                continue
            # PEFT would replace the layer only in the first of its places.
            if len(names) > 1:
                raise ValueError(
                    f"target_modules: expected layers in one place each, got one at "
                    f"{', '.join(names)}"
                )
            if isinstance(module, BaseTunerLayer) and not isinstance(module, LoTRPeftLinear):
                raise TypeError(
                    f"target_modules: expected layers without adapters of other methods, got "
                    f"{name!r} ({type(module).__name__})"
                )
            base = module.base_layer if isinstance(module, LoTRPeftLinear) else module
            obstacle = linear_obstacle(model, base, names, tied)
            if is_all_linear and obstacle is not None:
                config.target_modules.discard(name)
            else:
                targets.append(linear_target(names, base, obstacle, config.group_by))
        return targets

    def _check_adapter_names(self) -> None:
        """Checks that no adapter's name can be confused with a part of a tensor's name.

        With several adapters, PEFT leaves a tensor out of one adapter's file if a dotted part of
        the tensor's name is the name of another adapter.

        Raises:
            ValueError: If a name has a dot, or is also a part of the name of a tensor or an
                attribute of nn.ModuleDict.
        """
        # The parts around the names of layers, groups and the parameters of computed cores.
        names_of_tensors = ["model.lotr_adapter.core", "lotr_factors.value", "lotr_cores"]
        for config in self.peft_config.values():
            factors = {entry["name"]: entry["factors"] for entry in config.layers}
            names_of_tensors += chain(factors, *factors.values())
            cores = make_cores(
                config.to_lotr(), list(factors), device=torch.device("meta"), dtype=torch.float32
            )
            if cores is not None:
                names_of_tensors += cores.state_dict()
        parts = set(".".join(names_of_tensors).split("."))
        has_others = len(self.peft_config) > 1
        for name in self.peft_config:
            if "." in name or hasattr(nn.ModuleDict(), name) or (has_others and name in parts):
                raise ValueError(
                    f"adapter_name: expected a name without dots that is neither a part of a "
                    f"tensor's name nor an attribute of nn.ModuleDict, got {name!r}"
                )

    def _create_and_replace(
        self,
        peft_config: LoTRPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        """Adds an adapter to one layer, which is replaced if it has none yet."""
        layer = target
        if not isinstance(target, LoTRPeftLinear):
            layer = LoTRPeftLinear(target).train(target.training)
            # Not PEFT's _replace_module: it would also move adapters to the device of the weight,
            # which is the meta device if the layer is offloaded.
            setattr(parent, target_name, layer)
        if adapter_name not in self.lotr_factors:
            self.lotr_factors[adapter_name] = nn.ModuleDict()
        device, dtype = layer.device_and_dtype()
        factors = make_pair(
            self.lotr_factors[adapter_name],
            self._groups[current_key],
            (layer.in_features, layer.out_features),
            peft_config.to_lotr(),
            device=device,
            dtype=dtype,
        )
        form = self._core_form(peft_config, adapter_name, current_key, like=factors.A.value)
        layer.lotr_adapter[adapter_name] = LoTRPeftAdapter(factors, peft_config, form)
        layer.lotr_adapter.train(layer.training)

    def _core_form(
        self, peft_config: LoTRPeftConfig, adapter_name: str, name: str, like: Tensor
    ) -> nn.Module | None:
        """Returns the module that computes a layer's core, None if the core is a parameter.

        The computed cores of an adapter share parameters, which its first layer makes here.

        Args:
            peft_config: The adapter's configuration.
            adapter_name: The adapter.
            name: The layer.
            like: A tensor with the device and dtype of the parameters. It is on the meta device if
                PEFT loads with low_cpu_mem_usage.
        """
        if peft_config.core == "dense":
            return None
        if adapter_name not in self.lotr_cores:
            names = [entry["name"] for entry in peft_config.layers]
            self.lotr_cores[adapter_name] = make_cores(
                peft_config.to_lotr(), names, device=like.device, dtype=like.dtype
            )
        return self.lotr_cores[adapter_name].at(place_of(name), owned=False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Makes an adapter float32 if it has half precision, as PEFT does with its adapters."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        # BaseTuner's method casts only what is in the layers.
        owners = [owner for owner in (self.lotr_factors, self.lotr_cores) if adapter_name in owner]
        for parameter in chain.from_iterable(owner[adapter_name].parameters() for owner in owners):
            if autocast_adapter_dtype and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()

    # ---- deleting, merging and unloading ---------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for owner in (self.lotr_factors, self.lotr_cores):
            if adapter_name in owner:
                del owner[adapter_name]

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        # For all layers before the first is merged, so that an error leaves none of them merged.
        for name, module in self.model.named_modules():
            try:
                if isinstance(module, LoTRPeftLinear):
                    mergeable_weight(module.base_layer)
            except TypeError as error:
                raise TypeError(f"{error} ({name})") from None

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        restore_bypasses(model)
        return model

    # ---- one adapter per row ---------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Applies the adapter adapter_names[i] to row i of a batch inside the context.

        As in PEFT's LoRA, "__base__" applies none. Forward pre-hooks pass the names to the layers.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        # Activation checkpointing would recompute the layers in backward, outside of the context.
        if self.training:
            raise ValueError(
                "adapter_names: expected a model in eval mode, got one in training mode. Call "
                "model.eval() first."
            )
        # Checked here and not in each layer, because an adapter need not be in every layer.
        unknown = sorted(set(names) - {BASE, *self.lotr_factors})
        if unknown:
            raise ValueError(
                f"adapter_names: expected some of {', '.join(self.lotr_factors)}, {BASE}, got "
                f"{', '.join(unknown)}"
            )
        # `generate` repeats each row for its beams.
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]
        encoder = self._encoder_modules()
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, (LoTRPeftLinear, AuxiliaryTrainingWrapper)):
                    hook = _with_names(list(names) if module in encoder else repeated)
                    # The handle removes the hook when the context ends.
                    stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield

    def _encoder_modules(self) -> set[nn.Module]:
        """Returns the modules of the encoder, whose rows a beam search does not repeat."""
        if not hasattr(self.model, "get_encoder"):
            return set()
        encoder = self.model.get_encoder()
        # A model with only a decoder returns None or itself.
        return set() if encoder in (None, self.model) else set(encoder.modules())

    # ---- files -----------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Returns the tensors of an adapter's file, as BaseTuner does.

        Raises:
            RuntimeError: If a tensor is sharded. PEFT would save only one shard.
        """
        tensors = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for key, tensor in tensors.items():
            # ZeRO-3 leaves an empty tensor.
            if 0 in tensor.shape or is_sharded(tensor):
                raise RuntimeError(
                    f"save_pretrained: expected full tensors, got {key} of shape "
                    f"{list(tensor.shape)}, sharded. Gather a sharded model first, as accelerate's "
                    f"get_state_dict does, and pass the result as state_dict."
                )
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's method expects the adapter's name just before the last part. That is so only for a
        # dense core: a factor's name has the group in between.
        return _prefix_of(adapter_name).sub(r"\1.", key, count=1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns the tensors of a file by the model's names, as BaseTuner does.

        Raises:
            ValueError: If the file has other layers than the adapter. PEFT would only warn.
        """
        # Files of version 1 have lotr_factors.<group>.A for lotr_factors.A_<group>.value.
        renamed = {
            re.sub(r"(lotr_factors)\.(.+)\.([AB])$", r"\1.\3_\2.value", key): tensor
            for key, tensor in state_dict.items()
        }
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)
        expected = {key for key in model.state_dict() if _prefix_of(adapter_name).search(key)}
        # All of LoTR's tensors, also those for which the model has no layer. The others are biases
        # and modules_to_save.
        actual = {key for key in tensors if re.search(r"\blotr_(factors|cores|adapter)\.", key)}
        expect_names("adapter", expected, actual)
        return tensors


def _with_names(names: list[str]) -> Callable[..., tuple[tuple, dict[str, Any]]]:
    """Returns a forward pre-hook that adds adapter_names to the arguments."""
    return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": names})
