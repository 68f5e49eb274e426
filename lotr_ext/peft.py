"""LoTR as a method of PEFT. Importing this module registers it:

    from lotr_ext.peft import LoTRPeftConfig
    model = peft.get_peft_model(model, LoTRPeftConfig(rank=16, target_modules=["query", "value"]))

PEFT's functions then work as for its own methods: save_pretrained, from_pretrained, add_adapter, set_adapter, delete_adapter,
disable_adapter, merge_adapter, unmerge_adapter, merge_and_unload, modules_to_save, adapter_names. A process that loads such an
adapter must import this module first. PEFT's registry is a closed enum, so `register_peft_method` refuses "lotr"; the mappings
behind it take any string.

    base_model.lotr_factors.<adapter>.A_<group>.value       A of a group, and B_<group>; by width A_<width>, B_<width>
    base_model.model.<layer>.lotr_adapter.<adapter>.core    the core of a layer
    base_model.lotr_cores.<adapter>.<parameter>             instead of those, if `core` is not "dense"

The files leave out the adapter's name, as PEFT does.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.config import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .bypasses import block_bypasses, restore_bypasses
from .config import NOT_HERE, LoTRConfig, check_names, place_of
from .core import dispatch, fallback
from .core.operators import DTYPES, accumulate_dtype
from .factors import LoTRFactors
from .init import fill_core_
from .layers import features, is_conv1d
from .model import cores_of, pair_of
from .old_files import config_of_version_1
from .sharded_tensors import is_sharded
from .storage import expect_names
from .targets import Target, check_layer, check_targets, group_of, tied_names, why_not_adapted
from .wrapped import LoTRWrapped, layer_class, mergeable

__all__ = ["LoTRPeftConfig", "LoTRPeftLinear", "LoTRPeftModel"]

if tuple(map(int, re.findall(r"\d+", peft.__version__)[:2])) < (0, 21):
    raise ImportError(
        f"lotr_ext.peft: expected PEFT 0.21 or later, got {peft.__version__}. Run pip install -U peft."
    )

BASE = "__base__"  # PEFT's name, in adapter_names, for rows without an adapter


# ---- configuration ---------------------------------------------------------------------------------------------------


class _PeftType(str):
    """A string in place of a member of PEFT's enum: it prints like one, and has a value."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"PeftType.{self.value}"

    @property
    def value(self) -> str:
        return str.__str__(self)


LOTR = _PeftType("LOTR")
# Fields of the first version that may be in a file. share_factors can be ignored, because its files contain A and B.
_FORMER = ("magnitude", "use_dora", "share_factors", "target_parameters")
_SAME = (
    "rank",
    "alpha",
    "rslora",
    "scaling",
    "dropout",
    "group_by",
    "init",
    "core_init",
    "core",
    "train",
)  # as in LoTRConfig


@dataclass
class LoTRPeftConfig(PeftConfig):
    """What to adapt and how, for `peft.get_peft_model`. Checked at construction.

    Attributes:
        rank, or r as PEFT's other methods call it: an int or (r_in, r_out); 16 if neither is given. r then equals rank.
        alpha, rslora, scaling: "auto" by default, with which LoRA's learning rate fits; `lotr_ext.factors.scaling_of`. A saved
            configuration has the number.
        dropout, group_by, init, core, core_init, train: as in `lotr_ext.LoTRConfig`. group_by is no callable (it cannot be
            saved), and init not "svd", which changes the base weights that PEFT's adapters share.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in `peft.LoraConfig`. None for
            target_modules: PEFT's default for LoRA and the model's type.
        bias: "none", "all", or "lotr_only" to train the adapted layers' biases.
        layers: the adapted layers with the names of their factors. Written when layers are adapted.

    Raises TypeError, ValueError: a field of the wrong type or value.
    """

    rank: int | tuple[int, int] | None = field(
        default=None, metadata={"help": "r, or (r_in, r_out); None: r"}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "the adapter is scaled by alpha / r"}
    )
    rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(r)"})
    scaling: float | str = field(
        default="auto", metadata={"help": "the scaling itself, or auto, instead of alpha"}
    )
    dropout: float = field(default=0.0, metadata={"help": "on the adapter's x"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names or a regular expression"}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names or a regular expression"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "indices of layers to adapt"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "the name before a layer's index"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules to be trained whole and saved"}
    )
    bias: str = field(default="none", metadata={"help": "none, all or lotr_only"})
    group_by: str | dict[str, str] = field(
        default="shape", metadata={"help": "which layers share A and B"}
    )
    init: str = field(default="orthonormal", metadata={"help": "how A and B start"})
    core_init: str = field(default="zero", metadata={"help": "how the cores start"})
    core: str = field(
        default="dense", metadata={"help": "a core a layer, or how all are made of fewer numbers"}
    )
    train: list[str] = field(
        default_factory=lambda: ["A", "B", "core"], metadata={"help": "which parts are trained"}
    )
    layers: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "written when layers are adapted"}
    )
    r: int | tuple[int, int] | None = field(
        default=None, metadata={"help": "another name for rank"}
    )

    def __new__(cls, *_: Any, **given: Any) -> LoTRPeftConfig:
        # PEFT drops and reports what an old file has and this class lacks, if it is not refused
        check_names((n for n, value in given.items() if value or n not in _FORMER), cls)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOTR
        ranks = {
            tuple(r) if isinstance(r, list) else r for r in (self.rank, self.r) if r is not None
        }
        if len(ranks) > 1:
            raise ValueError(
                f"r: expected rank = {self.rank!r}, or one of them alone, got {self.r!r}"
            )
        self.rank = self.r = ranks.pop() if ranks else 16
        if callable(self.group_by) or callable(self.core) or self.core == "custom":
            raise ValueError(
                f"group_by, core: expected what can be saved, got {self.group_by!r}, {self.core!r}"
            )
        if self.init == "svd":
            raise ValueError(
                'init: expected one that does not change the base weights, got "svd". Use apply_lotr for it.'
            )
        if self.bias not in ("none", "all", "lotr_only"):
            raise ValueError(f"bias: expected one of none, all, lotr_only, got {self.bias!r}")
        self.train = list(self.to_lotr().train)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform: expected None beside a regular expression, got {self.layers_to_transform!r}. Give names "
                f"as target_modules, or put the layers into the expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern: expected it with layers_to_transform, got {self.layers_pattern!r} alone"
            )

    def to_lotr(self) -> LoTRConfig:
        """The same settings for `apply_lotr`, without targets and modules_to_save."""
        return LoTRConfig(**{name: getattr(self, name) for name in _SAME})

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with the scaling as a number: what "auto" means may change, what a saved adapter computes may not."""
        return {**super().to_dict(), "scaling": self.to_lotr().s, "alpha": None, "rslora": False}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """As PEFT's. Also reads the files of the first version, in which "auto" was without START."""
        if kwargs.get("scaling") in (None, "auto"):
            kwargs["scaling"] = config_of_version_1({**kwargs, "rank": kwargs.get("rank") or 16})[
                "scaling"
            ]
        for name in _FORMER:
            value = kwargs.pop(name, None)
            if value and name != "share_factors":
                raise TypeError(
                    f"{name}: expected nothing, because this version does not have it, got "
                    f"{value!r}. {NOT_HERE[name]}"
                )
        return super().from_peft_type(**kwargs)


# ---- layers ----------------------------------------------------------------------------------------------------------


class LoTRPeftCore(nn.Module):
    """One adapter in one layer: its core [r_in, r_out], the factors of its group, scaling and dropout.

    form: the module that computes the core, if the core is not a parameter.
    """

    def __init__(self, factors: LoTRFactors, config: LoTRPeftConfig, form: nn.Module | None = None):
        super().__init__()
        like = factors.A.value
        if form is None:
            self.core = nn.Parameter(
                torch.empty(factors.r_in, factors.r_out, device=like.device, dtype=like.dtype)
            )
            fill_core_(self.core, config.core_init)
        self.scaling, self.dropout, self.trained = (
            config.to_lotr().s,
            config.dropout,
            tuple(config.train),
        )
        self.__dict__.update(
            factors=factors, form=form
        )  # plain references: the tuner registers them, once

    def forward(self, x: Tensor, W: Tensor | None, bias: Tensor | None, y: Tensor | None) -> Tensor:
        """x W^T + bias + s ((drop(x) A) G) B^T; with y, another base's output, y + s (..). ZeRO-3 gathers the core around this
        call."""
        core, p = self.matrix(), self.dropout if self.training else 0.0
        caches = self.factors.caches

        def run(A: Tensor, B: Tensor) -> Tensor:
            return dispatch.linear(
                x, W, bias, A, B, core, self.scaling, p, base_output=y, caches=caches, layer=self
            )

        return self.factors.read(run)

    def matrix(self) -> Tensor:
        """G [r_in, r_out]."""
        return self.core if self.form is None else self.form()

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s B G^T A^T [n, k] in float32 (float64 for float64)."""
        return self.factors.read(
            lambda A, B: fallback.delta_weight(A, B, self.matrix(), self.scaling)
        )

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of A, B and the core, each with the name of its part."""
        core = self if self.form is None else self.form.cores
        for part, module in (("A", self.factors.A), ("B", self.factors.B), ("core", core)):
            yield from ((part, parameter) for parameter in module.parameters())

    def extra_repr(self) -> str:
        return f"rank={self.factors.rank}, scaling={self.scaling:g}" + (
            f", dropout={self.dropout}" if self.dropout else ""
        )


class LoTRPeftLinear(nn.Module, BaseTunerLayer):
    """A linear layer with LoTR adapters by name: y = base(x) + the sum over active adapters of s ((drop(x) A) G) B^T.

    x [..., in_features] -> [..., out_features]. The first active adapter runs with the base's product where the base is a plain
    nn.Linear or Conv1D; others are added to the base's output. state_dict: the base's keys under `base_layer.`,
    `lotr_adapter.<name>.core`.
    """

    adapter_layer_names: tuple[str, ...] = ("lotr_adapter",)
    weight_backup: Tensor | None  # the weight before the first merge: not part of state_dict

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features(base_layer)
        self.lotr_adapter = nn.ModuleDict()
        self._disable_adapters, self._active_adapter = False, []
        self.merged_adapters: list[str] = []
        self.register_buffer("weight_backup", None, persistent=False)

    def place(self) -> tuple[torch.device, torch.dtype]:
        """The base's device and dtype; if accelerate offloads it, the device to which it is moved for a forward."""
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        if device.type == "meta":
            device = torch.device(
                getattr(getattr(self.base_layer, "_hf_hook", None), "execution_device", None)
                or device
            )
        return device, dtype if dtype in DTYPES.values() else torch.float32

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """As BaseTunerLayer's, without its cast to the base's dtype. PEFT calls it after loading into tensors without
        memory."""
        device = self.place()[0] if device is None else device
        core = self.lotr_adapter[adapter_name] if adapter_name in self.lotr_adapter else None
        if core is not None and not any(p.is_meta for _, p in core.parts()):
            for module in (core, core.factors, *([] if core.form is None else [core.form.cores])):
                module.to(device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if names is not None and not self.disable_adapters:
            return self._mixed(x, names, self.base_layer(x, *args, **kwargs))
        active = [] if self.disable_adapters or self.merged else self.active_adapters
        cores = [self.lotr_adapter[name] for name in active if name in self.lotr_adapter]
        if cores and not args and not kwargs and layer_class(self.base_layer) is not LoTRWrapped:
            y = cores.pop(0)(x, self.matrix(), self.base_layer.bias, None)
        else:
            y = self.base_layer(x, *args, **kwargs)
        for core in cores:
            y = core(x, None, None, y)
        return y

    def _mixed(self, x: Tensor, names: Sequence[str], y: Tensor) -> Tensor:
        """y, the base's output, plus for row i of x the adapter names[i]."""
        if len(names) != len(x):
            raise ValueError(
                f"adapter_names: expected one name for each of the {len(x)} rows, got {len(names)}"
            )
        if self.merged:
            raise ValueError(
                "adapter_names: expected unmerged adapters, got merged ones. Call unmerge_adapter first."
            )
        for name in dict.fromkeys(names):
            if name in self.lotr_adapter:
                rows = torch.tensor(
                    [i for i, own in enumerate(names) if own == name], device=x.device
                )
                y = y.index_copy(0, rows, self.lotr_adapter[name](x[rows], None, None, y[rows]))
        return y

    # ---- which adapters are active and trained -----------------------------------------------------------------------

    def _train_only(self, names: Sequence[str]) -> None:
        for core in self.lotr_adapter.values():
            for _, parameter in core.parts():
                parameter.requires_grad_(False)
        self.set_requires_grad(names)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._train_only([] if inference_mode else names)
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled
        self._train_only(self.active_adapters if enabled else [])

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.lotr_adapter:
                core = self.lotr_adapter[name]
                for part, parameter in core.parts():
                    parameter.requires_grad_(requires_grad and part in core.trained)

    # ---- merging -----------------------------------------------------------------------------------------------------

    def matrix(self) -> Tensor:
        """W [n, k], a view of the base's weight."""
        return self.base_layer.weight.t() if is_conv1d(self.base_layer) else self.base_layer.weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight as it was before the first merge: summed in float32, cast once.
        Raises TypeError: a base without a plain weight. ValueError: with safe_merge, a sum that is not finite.
        """
        names = [
            name
            for name in check_adapters_to_merge(self, adapter_names)
            if name in self.lotr_adapter
        ]
        if not names:
            return
        weight = mergeable(self.base_layer).detach()
        start = weight if self.weight_backup is None else self.weight_backup
        merged = start.to(accumulate_dtype(start.dtype))
        for name in (*self.merged_adapters, *names):
            merged = merged + self.lotr_adapter[name].delta().to(merged.device)
            if safe_merge and not bool(merged.isfinite().all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )  # PEFT's words
        if self.weight_backup is None:
            self.weight_backup = weight.clone()
        weight.copy_(merged)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the weight as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        mergeable(self.base_layer).detach().copy_(self.weight_backup)
        self.weight_backup = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """s B G^T A^T in the layout and dtype of the base's weight: [n, k], or [k, n] for Conv1D."""
        delta = self.lotr_adapter[adapter_name].delta().to(self.weight.dtype)
        return delta.mT.contiguous() if is_conv1d(self.base_layer) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "lotr." + super().__repr__()


# ---- the model -------------------------------------------------------------------------------------------------------


def _keys_of(adapter_name: str) -> re.Pattern[str]:
    """Matches the names of an adapter's tensors in the model's state_dict, and no others."""
    name = re.escape(adapter_name)
    return re.compile(rf"lotr_(factors|cores)\.{name}\.|\.lotr_adapter\.{name}\.")


class LoTRPeftModel(BaseTuner):
    """PEFT's tuner for LoTR. It owns A and B of each adapter's groups; a layer's core refers to its pair."""

    uses_shared_state: bool = True
    prefix: str = "lotr_"
    tuner_layer_cls = LoTRPeftLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    lotr_factors: nn.ModuleDict
    lotr_cores: nn.ModuleDict

    def _layers(self) -> dict[str, LoTRPeftLinear]:
        return {name: m for name, m in self.model.named_modules() if isinstance(m, LoTRPeftLinear)}

    # ---- adding an adapter -------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.lotr_factors, self.lotr_cores = nn.ModuleDict(), nn.ModuleDict()

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As BaseTuner's. The factors of other adapters keep their requires_grad."""
        before = [
            (p, p.requires_grad)
            for owned in (self.lotr_factors, self.lotr_cores)
            for p in owned.parameters()
        ]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        block_bypasses(self.model, adapted=LoTRPeftLinear)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        restore_bypasses(model)
        return model

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Finds the layers and their groups, and raises for those that cannot be adapted, before PEFT changes the model."""
        if not isinstance(peft_config, LoTRPeftConfig):
            raise TypeError(
                f"peft_config: expected LoTRPeftConfig, got {type(peft_config).__name__}"
            )
        tied, layers, targets = tied_names(model), [], []
        everything = str(peft_config.target_modules).lower() == "all-linear"
        config = _maybe_include_all_linear_layers(peft_config, model)  # writes the names into it
        for name, module in self._matching(config, model).items():
            module = module.base_layer if isinstance(module, LoTRPeftLinear) else module
            sizes, reason = features(module), why_not_adapted(model, module, [name], tied)
            if everything and reason is not None:
                config.target_modules.discard(name)
                continue
            check_layer(name, module, sizes, reason)
            targets.append(
                target := Target(
                    (name,), module, sizes, group_of(name, module, sizes, config.group_by)
                )
            )
            shared = sizes if config.group_by == "width" else (target.group, target.group)
            layers.append(
                {
                    "name": name,
                    "factors": [f"lotr_factors.{part}_{of}" for part, of in zip("AB", shared)],
                }
            )
        if not targets:
            return  # PEFT raises a detailed error
        check_targets(targets, config.to_lotr())
        self._groups = {target.name: target.group for target in targets}
        at = {str(layer.get("name")): i for i, layer in enumerate(config.layers or ())}
        if at.keys() == self._groups.keys():  # a loaded adapter: computed cores are in its order
            layers.sort(key=lambda layer: at[layer["name"]])
        peft_config.layers = layers
        self._check_adapter_names()

    def _matching(self, config: LoTRPeftConfig, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that config targets, by name."""
        modules = dict(model.named_modules())
        inside = tuple(f"{name}." for name, m in modules.items() if isinstance(m, BaseTunerLayer))
        names = [
            n
            for n in modules
            if n and not n.startswith(inside) and self._check_target_module_exists(config, n)
        ]
        places: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            places.setdefault(id(module), []).append(name)
        for name in names:
            if isinstance(modules[name], BaseTunerLayer) and not isinstance(
                modules[name], LoTRPeftLinear
            ):
                kind = type(modules[name]).__name__
                raise TypeError(
                    f"target_modules: expected layers without adapters of other methods, got {name!r} ({kind})"
                )
            if len(at := places[id(modules[name])]) > 1:
                raise ValueError(
                    f"target_modules: expected layers in one place each, got one at {', '.join(at)}"
                )
        return {name: modules[name] for name in names}

    def _check_adapter_names(self) -> None:
        """PEFT leaves out of an adapter's file each tensor whose name contains another adapter's name as a part."""
        parts = {
            part for name in (*self._groups, *self._layers()) for part in name.split(".")
        } | set(self._groups.values())
        parts |= {group for groups in self.lotr_factors.values() for group in groups}
        for name in self.peft_config:
            if (
                "." in name
                or hasattr(nn.ModuleDict, name)
                or (len(self.peft_config) > 1 and name in parts)
            ):
                raise ValueError(
                    f"adapter_name: expected a name without dots that no adapted module, group or method of nn.ModuleDict has, "
                    f"got {name!r}"
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
        known = isinstance(target, LoTRPeftLinear)
        layer = target if known else LoTRPeftLinear(target).train(target.training)
        config, sizes, (device, dtype) = (
            peft_config.to_lotr(),
            (layer.in_features, layer.out_features),
            layer.place(),
        )
        if adapter_name not in self.lotr_factors:
            self.lotr_factors[adapter_name] = nn.ModuleDict()
        owned, group = self.lotr_factors[adapter_name], self._groups[current_key]
        factors, form = pair_of(owned, group, sizes, config, device=device, dtype=dtype), None
        if config.core != "dense":
            if adapter_name not in self.lotr_cores:
                like, names = factors.A.value, [one["name"] for one in peft_config.layers]
                self.lotr_cores[adapter_name] = cores_of(
                    config, names, device=like.device, dtype=like.dtype
                )
            form = self.lotr_cores[adapter_name].at(place_of(current_key), owned=False)
        layer.lotr_adapter[adapter_name] = LoTRPeftCore(factors, peft_config, form).train(
            layer.training
        )
        if not known:
            setattr(
                parent, target_name, layer
            )  # PEFT's _replace_module would move the core to an offloaded weight's device

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for owned in (self.lotr_factors, self.lotr_cores) if autocast_adapter_dtype else ():
            for module in owned[adapter_name].modules() if adapter_name in owned else ():
                for name, old in list(module.named_parameters(recurse=False)):
                    if old.dtype in (torch.bfloat16, torch.float16):
                        setattr(
                            module,
                            name,
                            nn.Parameter(old.detach().float(), requires_grad=old.requires_grad),
                        )

    # ---- removing it -------------------------------------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for owned in (self.lotr_factors, self.lotr_cores):
            if adapter_name in owned:
                del owned[adapter_name]

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, layer in self._layers().items():
            try:
                mergeable(layer.base_layer)
            except TypeError as error:
                raise TypeError(f"{error} ({name})") from None

    # ---- an adapter a row --------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Inside, row i of a batch has the adapter adapter_names[i], or none for "__base__", as in PEFT's LoRA."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "adapter_names: expected a model in eval mode, got one in training mode. Call model.eval() first."
            )
        if unknown := sorted(set(names) - {BASE, *self.lotr_factors}):
            raise ValueError(
                f"adapter_names: expected some of {', '.join(self.lotr_factors)}, {BASE}, got {', '.join(unknown)}"
            )
        beams = kwargs.get("num_beams")
        repeated = [name for name in names for _ in range(beams if isinstance(beams, int) else 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        # a beam search does not repeat the encoder's rows
        of_encoder = set() if encoder in (None, self.model) else set(encoder.modules())
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, (LoTRPeftLinear, AuxiliaryTrainingWrapper)):
                    hook = _naming(list(names) if module in of_encoder else repeated)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    # ---- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As BaseTuner's. Raises RuntimeError for tensors held in parts, instead of saving a part."""
        ours = _keys_of(adapter_name)
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        found = {
            key: tensor
            for key, tensor in found.items()
            if ours.search(key) or key.endswith(".bias")
        }
        for key, tensor in found.items():
            if 0 in tensor.shape or is_sharded(tensor):
                raise RuntimeError(
                    f"save_pretrained: expected full tensors, got {key} of shape "
                    f"{list(tensor.shape)}, sharded. Gather a sharded model first, as accelerate's "
                    f"get_state_dict does, and pass the result as state_dict."
                )
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if _keys_of(adapter_name).search(key):
            return re.sub(
                rf"(lotr_(?:factors|cores|adapter))\.{re.escape(adapter_name)}\.",
                r"\1.",
                key,
                count=1,
            )
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As BaseTuner's. Raises ValueError for an adapter of other layers, where PEFT only warns."""
        # the first version's names of A and B
        state_dict = {
            re.sub(r"(lotr_factors)\.(.+)\.([AB])$", r"\1.\3_\2.value", key): t
            for key, t in state_dict.items()
        }
        renamed = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        want = {key for key in model.state_dict() if _keys_of(adapter_name).search(key)}
        got = {key for key in renamed if re.search(r"\.lotr_adapter\.|lotr_(factors|cores)\.", key)}
        expect_names("adapter", want, got)
        return renamed


def _naming(names: list[str]) -> Callable[..., tuple[tuple, dict[str, Any]]]:
    return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": names})


PEFT_TYPE_TO_CONFIG_MAPPING[LOTR] = LoTRPeftConfig
PEFT_TYPE_TO_TUNER_MAPPING[LOTR] = LoTRPeftModel
PEFT_TYPE_TO_PREFIX_MAPPING[LOTR] = LoTRPeftModel.prefix
