"""save_adapter and load_adapter: an adapter in one safetensors file, `lotr_adapter.safetensors`.

    tensors     by their names in the adapted model's state_dict: `lotr_factors.<i>.value`,
                `<layer>.core`, `lotr_cores.*`, the tensors of modules_to_save; with init "svd" also
                `lotr_factors.<i>.start` and `<layer>.start_core`
    metadata    format "lotr", format_version, `adapter` (a JSON object: configuration, layers,
                modules_to_save, base model) and `sha256`, a checksum of this JSON and of the tensors

The file is replaced by one rename, so a process that is killed leaves the old or the new adapter.

Not here: how files are written and read (storage.py), formats of older versions (old_files.py).
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import __version__, old_files
from .adapted import adapted_layers, expect_unmerged, layers_in
from .config import LoTRConfig
from .core.operators import DTYPES
from .cores import CoreAt
from .factors import LoTRFactor
from .functional import check_number, check_probability
from .layers import LoTRLayer
from .model import clear_start, cores_of, install, set_start, unchanged_on_error
from .old_files import start_key
from .sharded_tensors import copy_full, expect_full, full_shape, full_tensors_in, is_sharded
from .storage import (
    checked_path,
    checksum,
    expect_names,
    json_object,
    put_tensors,
    read_bytes,
    tensors_in,
)
from .targets import Selection, name_ends_with, saved_modules, select

__all__ = ["AdapterState", "LayerEntry", "load_adapter", "push_to_hub", "save_adapter"]

Model = TypeVar("Model", bound=nn.Module)
Gather = Callable[[Tensor], Tensor]
Strictness = bool | Literal["targets"]

FILE_NAME = "lotr_adapter.safetensors"
VERSION = "3"  # 1: lotr_ext 0.1.0; 1 and 2: a JSON file and a safetensors file (old_files.py)


# ---- an adapter as data --------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerEntry:
    """One adapted layer.

    Attributes:
        A: The name of its factor A among the tensors, as B is of its factor B.
        scaling: s.
        dropout: In [0, 1).
        experts: The number of experts, 0 for a linear layer.
    """

    A: str
    B: str
    scaling: float
    dropout: float
    experts: int = 0

    @staticmethod
    def from_json(value: object) -> LayerEntry:
        """Returns the entry in a JSON object.

        Raises:
            TypeError, ValueError: If a field is missing, unknown, or of a wrong type or value.
        """
        known = {item.name for item in fields(LayerEntry)}
        if not isinstance(value, dict) or not known - {"experts"} <= value.keys() <= known:
            raise ValueError(
                f"expected an object with {', '.join(sorted(known))}, got {value!r:.200}"
            )
        entry = LayerEntry(**value)
        for name in (entry.A, entry.B):
            if not isinstance(name, str):
                raise TypeError(f"A, B: expected the name of a tensor, got {name!r:.80}")
        if entry.A == entry.B:
            raise ValueError(f"B: expected another tensor than A, got {entry.B!r:.80}")
        check_number("scaling", entry.scaling)
        if abs(entry.scaling) > torch.finfo(torch.float32).max:
            raise ValueError(f"scaling: expected a float32 number, got {entry.scaling}")
        check_probability("dropout", entry.dropout)
        if isinstance(entry.experts, bool) or not isinstance(entry.experts, int):
            raise TypeError(f"experts: expected an int, got {entry.experts!r:.80}")
        if entry.experts < 0:
            raise ValueError(f"experts: expected at least 0, got {entry.experts}")
        return replace(entry, scaling=float(entry.scaling), dropout=float(entry.dropout))


@dataclass(frozen=True)
class BaseModel:
    """What identifies the base model: its name if known, and a few values of frozen parameters."""

    name: str | None = None
    values: dict[str, list[float]] = field(default_factory=dict)

    @staticmethod
    def from_json(value: object) -> BaseModel:
        """Returns what a JSON object has.

        Raises:
            TypeError, ValueError: If a field is unknown, or of a wrong type or value.
        """
        if not isinstance(value, dict) or not value.keys() <= {"name", "values"}:
            raise ValueError(f"base: expected an object with name and values, got {value!r:.200}")
        base = BaseModel(**value)
        if base.name is not None and not isinstance(base.name, str):
            raise TypeError(f"base.name: expected a string or null, got {base.name!r:.80}")
        if not isinstance(base.values, dict):
            raise TypeError(f"base.values: expected an object, got {base.values!r:.80}")
        for name, numbers in base.values.items():
            if not isinstance(numbers, list):
                raise TypeError(
                    f"base.values: expected a list for {name!r:.80}, got {numbers!r:.80}"
                )
            for number in numbers:
                check_number(f"base.values, {name:.80}", number)
        return base

    def difference(self, model: nn.Module, gather: Gather) -> str | None:
        """Says in what a model's base is another one. Returns None if no difference is found.

        Values may differ by the rounding to bfloat16. Parameters that the model lacks, or has in a
        quantised format, are skipped.
        """
        moved = _moved_parameters(layers_in(model))
        parameters = dict(model.named_parameters())
        for name, expected in self.values.items():
            parameter = parameters.get(name)
            if parameter is None or id(parameter) in moved or not _is_sampled(parameter):
                continue
            actual = _sample(gather(parameter))
            if actual is None or not _all_close(actual, expected):
                return (
                    f"base: expected the model that the adapter was trained on "
                    f"({self.name or 'its name is not known'}), got "
                    f"{_name_of(model) or type(model).__name__}, in which {name} is "
                    f"{actual} instead of {expected}. Load the adapter into its base model."
                )
        return None


@dataclass(frozen=True)
class AdapterState:
    """An adapter apart from any model, as a file has it.

    Attributes:
        config: The configuration, None for a model that was built by hand.
        layers: The adapted layers by name, in the model's order.
        modules_to_save: The names of fully trained modules.
        base: What identifies the base model.
        tensors: The full tensors by name.
    """

    config: LoTRConfig | None
    layers: dict[str, LayerEntry]
    modules_to_save: tuple[str, ...]
    base: BaseModel
    tensors: dict[str, Tensor]

    # ---- JSON ------------------------------------------------------------------------------------

    @property
    def document(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON."""
        return {
            "lotr_ext_version": __version__,
            "config": None if self.config is None else self.config.to_dict(),
            "layers": {name: asdict(entry) for name, entry in self.layers.items()},
            "modules_to_save": list(self.modules_to_save),
            "base": asdict(self.base),
        }

    @staticmethod
    def from_document(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterState:
        """Returns the adapter of a document and its tensors.

        Args:
            document: As `document` returns it. base and lotr_ext_version may be absent.
            tensors: By name.

        Raises:
            TypeError, ValueError: If a field is missing or has a wrong type or value, or if the
                sizes of tensors do not fit each other or the configuration. The message names the
                field.
        """
        for name, kind in (("layers", dict), ("modules_to_save", list)):
            if not isinstance(document.get(name), kind):
                raise TypeError(
                    f"{name}: expected a {kind.__name__}, got {document.get(name)!r:.80}"
                )
        config = document.get("config")
        if config is not None:
            if not isinstance(config, dict):
                raise TypeError(f"config: expected an object or null, got {config!r:.80}")
            try:
                config = LoTRConfig.from_dict(config)
            except (TypeError, ValueError) as error:
                raise type(error)(f"config: {error}") from None
        layers = {}
        for name, value in document["layers"].items():
            try:
                layers[name] = LayerEntry.from_json(value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layers, {name!r:.200}: {error}") from None
        modules = document["modules_to_save"]
        for name in modules:
            if not isinstance(name, str):
                raise TypeError(f"modules_to_save: expected names, got {name!r:.80}")
        base = BaseModel.from_json(document.get("base", {}))
        state = AdapterState(config, layers, tuple(modules), base, dict(tensors))
        state._check_sizes()
        state._check_config()
        return state

    def _check_sizes(self) -> None:
        """Checks that the sizes of tensors fit each other and the configuration."""
        if not self.layers:
            raise ValueError("layers: expected at least one, got none")
        for name, entry in self.layers.items():
            A, B, core = (self._floating(key) for key in (entry.A, entry.B, f"{name}.core"))
            lead = [entry.experts] if entry.experts else []
            if A.dim() != 2 or B.dim() != 2 or core.shape != (*lead, A.shape[1], B.shape[1]):
                raise ValueError(
                    f"layers, {name!r}: expected A [k, r_in], B [n, r_out] and a core "
                    f"{[*lead, 'r_in', 'r_out']}, got {list(A.shape)}, {list(B.shape)} and "
                    f"{list(core.shape)}"
                )

    def _check_config(self) -> None:
        """Checks that the configuration fits the tensors."""
        if self.config is None:
            return
        for name, entry in self.layers.items():
            ranks = self.tensors[entry.A].shape[1], self.tensors[entry.B].shape[1]
            if self.config.ranks != ranks:
                raise ValueError(
                    f"config.rank: expected {ranks} as the tensors of {name!r} have, got "
                    f"{self.config.rank}"
                )
        has_computed_cores = any(key.startswith("lotr_cores.") for key in self.tensors)
        if has_computed_cores != (self.config.core != "dense"):
            expected = "another form" if has_computed_cores else '"dense"'
            raise ValueError(
                f"config.core: expected {expected} as the tensors have, got {self.config.core!r}"
            )
        for name in self.modules_to_save:
            endings = self.config.modules_to_save or ()
            if not any(name_ends_with(name, ending) for ending in endings):
                raise ValueError(
                    f"modules_to_save: expected names that the configuration has, got {name!r:.80}"
                )

    def _floating(self, key: str) -> Tensor:
        if key not in self.tensors:
            raise ValueError(f"tensors: expected {key!r}, got none of this name")
        if self.tensors[key].dtype not in DTYPES.values():
            raise TypeError(
                f"{key}: expected one of {', '.join(DTYPES)}, got {self.tensors[key].dtype}"
            )
        return self.tensors[key]

    def sizes(self, layer: str) -> tuple[int, int]:
        """Returns (in_features, out_features) of a layer."""
        entry = self.layers[layer]
        return self.tensors[entry.A].shape[0], self.tensors[entry.B].shape[0]

    # ---- files -----------------------------------------------------------------------------------

    @staticmethod
    def read(directory: Path) -> AdapterState:
        """Reads the adapter in a directory, also one of an older version.

        Raises:
            TypeError, ValueError: If there is none, or a damaged or newer one. The message names
                the file, what was expected and what was found.
        """
        path = directory / FILE_NAME
        if path.exists():
            document, tensors = _document_of(path)
        else:
            path = directory / old_files.JSON_NAME
            if not path.exists():
                raise ValueError(
                    f"directory: expected a folder with {FILE_NAME}, got {_kind(directory)}"
                )
            document, tensors = old_files.read(path)
        try:
            return AdapterState.from_document(document, tensors)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    def write(self, directory: Path) -> None:
        """Writes the adapter into a directory, which is created if needed. Other files in it stay.

        Raises:
            ValueError: If directory is a file.
            OSError: If the disk refuses. An adapter that was there is then unchanged.
        """
        text = json.dumps(self.document, allow_nan=False)
        metadata = {
            "format": "lotr",
            "format_version": VERSION,
            "adapter": text,
            "sha256": checksum(sorted(self.tensors.items()), text.encode()),
        }
        put_tensors(directory, FILE_NAME, self.tensors, metadata)
        old_files.remove(directory)

    # ---- models ----------------------------------------------------------------------------------

    @staticmethod
    @torch.no_grad()
    def from_model(model: nn.Module, gather: Gather = expect_full) -> AdapterState:
        """Returns the adapter of a model.

        Args:
            model: An adapted model, not wrapped.
            gather: Returns the full tensor of one that may be sharded.

        Raises:
            TypeError: If a tensor is sharded, with the default gather.
            RuntimeError: If the model has no adapter, or one on the meta device.
        """
        layers = adapted_layers(model)
        config = getattr(model, "lotr_config", None)
        tensors = {}
        for key, tensor in _tensors_of(model, layers).items():
            tensors[key] = gather(tensor)
        for name, layer in layers.items():
            if f"{name}.core" not in tensors:
                tensors[f"{name}.core"] = _computed_core(layer, gather)
        for key, tensor in tensors.items():
            if tensor.is_meta:
                raise RuntimeError(
                    f"model: expected tensors with values, got {key} on the meta device"
                )
        if config is not None:  # model.to(dtype) does not change it
            dtypes = {layer.factors.A.value.dtype for layer in layers.values()}
            if len(dtypes) == 1:
                config = replace(config, adapter_dtype=dtypes.pop())
        modules = () if config is None else tuple(saved_modules(model, config))
        base = BaseModel(_name_of(model), _values_of(model, layers, gather))
        return AdapterState(config, _entries_of(model, layers), modules, base, tensors)

    @torch.no_grad()
    def load_into(
        self,
        model: nn.Module,
        *,
        cast: bool = False,
        strict: Strictness = "targets",
        gather: Gather = expect_full,
        copy: Callable[[Tensor, Tensor], None] = copy_full,
    ) -> None:
        """Loads the adapter into a model that is not wrapped, as `load_adapter` does.

        Args:
            cast: As for `load_adapter`, as is strict.
            gather: Returns the full tensor of one that may be sharded.
            copy: Copies a full value into a tensor of the model.
        """
        if not isinstance(strict, bool) and strict != "targets":
            raise ValueError(f'strict: expected True, False or "targets", got {strict!r}')
        differences: list[str] = []
        with unchanged_on_error(model):
            if not layers_in(model):
                self._adapt(model, strict, differences)
            targets = self._check_fits(model, cast)
            difference = self.base.difference(model, gather)
            if difference is not None and strict is True:
                raise ValueError(difference)
        for message in (*differences, difference):
            if message is not None:
                warnings.warn(f"lotr_ext: {message}", stacklevel=4)
        self._copy_to(model, targets, copy)

    def _adapt(self, model: nn.Module, strict: Strictness, differences: list[str]) -> None:
        """Adapts a plain model as the saved one was."""
        config = self.config
        if config is None:
            raise ValueError(
                "model: expected one with LoTR layers like the one that the adapter was saved "
                "from, which was built by hand, got one without. Adapt it in the same way first."
            )
        modules = dict(model.named_modules())
        linear = [name for name, entry in self.layers.items() if not entry.experts]
        missing = [name for name in linear if name not in modules]
        if missing:
            raise ValueError(
                f"model: expected the {len(self.layers)} layers of the adapter, got a "
                f"{type(model).__name__} without {', '.join(missing[:5])}. Load it into the base "
                f"model that it was trained on."
            )
        exact = self._exact_config(linear)
        selection = select(model, exact)
        for target in selection.targets:
            if target.name in self.layers and target.sizes != self.sizes(target.name):
                raise ValueError(
                    f"{target.name}: expected (in_features, out_features) = {target.sizes} as in "
                    f"the model, got {self.sizes(target.name)} in the adapter"
                )
        self._check_core_sizes()
        message = self._other_targets(model)
        if message is not None:
            if strict:
                raise ValueError(message)
            differences.append(message)
        install(model, exact, selection)
        model.lotr_config = config
        model.lotr_left_out = {}
        for layer in layers_in(model).values():
            layer.set_trained(config.train)

    def _exact_config(self, linear: list[str]) -> LoTRConfig:
        """Returns the configuration that selects exactly the layers and groups of the adapter."""
        experts = [
            re.sub(r"(^|\.)lotr\.([^.]+)$", r"\1\2", name)
            for name, entry in self.layers.items()
            if entry.experts
        ]
        group_by: str | dict[str, str] = "width"
        if self.config.group_by != "width":
            group_by = {name: f"{entry.A} {entry.B}" for name, entry in self.layers.items()}
        return replace(
            self.config,
            target_modules="|".join(map(re.escape, linear)) or None,
            target_parameters=experts or None,
            exclude_modules=None,
            group_by=group_by,
            init="kaiming" if self.config.init == "svd" else self.config.init,
        )

    def _other_targets(self, model: nn.Module) -> str | None:
        """Says which layers the configuration selects in a plain model and the adapter lacks."""
        selection: Selection = select(model, replace(self.config, group_by="shape"))
        extra = [target.name for target in selection.targets if target.name not in self.layers]
        if not extra:
            return None
        return (
            f"layers: expected a model in which the adapter's configuration selects its "
            f"{len(self.layers)} layers, got one with {len(extra)} more, such as {extra[0]}. Load "
            f"it into the base model that it was trained on, or pass strict=False to leave these "
            f"layers without an adapter."
        )

    def _check_core_sizes(self) -> None:
        """Checks the parameters of computed cores before memory is allocated for them."""
        meta = torch.device("meta")
        dtype = self.config.adapter_dtype
        cores = cores_of(self.config, list(self.layers), device=meta, dtype=dtype)
        expected = {} if cores is None else cores.state_dict(prefix="lotr_cores.")
        actual = {key: t for key, t in self.tensors.items() if key.startswith("lotr_cores.")}
        expect_names("tensors", expected, actual)
        for key, tensor in expected.items():
            if tensor.shape != actual[key].shape:
                raise ValueError(
                    f"{key}: expected {list(tensor.shape)} by the configuration, got "
                    f"{list(actual[key].shape)}"
                )

    def _check_fits(self, model: nn.Module, cast: bool) -> dict[str, Tensor]:
        """Checks that the adapter fits an adapted model.

        Returns:
            The parameters and buffers of the model by the names of the adapter's tensors.
        """
        layers = adapted_layers(model)
        config = getattr(model, "lotr_config", None)
        expect_unmerged(layers, "load_adapter")
        if hasattr(model, "lotr_tasks"):
            raise RuntimeError(
                "load_adapter: expected a model without a TaskBank, got one with a bank, whose "
                "tasks would change with the factors. Load the adapter first, or del "
                "model.lotr_tasks."
            )
        expect_names("layers", layers, self.layers)
        is_computed = config is not None and config.core != "dense"
        if is_computed and list(self.layers) != list(layers):
            raise ValueError(
                "layers: expected the model's order, on which computed cores depend, got another "
                "one in the adapter"
            )
        names = self._names_in_file(_entries_of(model, layers))
        targets = {}
        for key, tensor in _tensors_of(model, layers).items():
            if not key.endswith((".start", ".start_core")):
                targets[names.get(key, key)] = tensor
        expected = {**targets, **self._expected_starts(layers)}
        computed_shapes = {}
        for name, layer in layers.items():
            if any(hasattr(m, "parametrizations") for m in (layer, *_factors_of(layer))):
                raise TypeError(
                    f"{name}: expected an adapter without parametrizations, got one. Remove them "
                    f"before loading."
                )
            if f"{name}.core" not in targets:
                computed_shapes[f"{name}.core"] = (layer.factors.r_in, layer.factors.r_out)
        expect_names("tensors", expected.keys() | computed_shapes.keys(), self.tensors)
        for key, tensor in expected.items():
            _check_tensor(key, tensor, self.tensors[key], cast)
        return targets

    def _names_in_file(self, entries: Mapping[str, LayerEntry]) -> dict[str, str]:
        """Returns the names in the file of the model's factors.

        Raises:
            ValueError: If layers share other factors in the file than in the model.
        """
        names: dict[str, str] = {}
        for layer, entry in entries.items():
            saved = self.layers[layer]
            for in_model, in_file in ((entry.A, saved.A), (entry.B, saved.B)):
                if names.setdefault(in_model, in_file) != in_file:
                    raise ValueError(
                        f"layers, {layer!r}: expected factors shared as in the model, got "
                        f"{in_file!r} and {names[in_model]!r} for one factor of the model"
                    )
        if len(set(names.values())) != len(names):
            raise ValueError(
                f"layers: expected {len(names)} factors as in the model, got "
                f"{len(set(names.values()))} that more layers share"
            )
        return names

    def _expected_starts(self, layers: Mapping[str, LoTRLayer]) -> dict[str, Tensor]:
        """Returns tensors of the model whose shapes and dtypes the starts of init "svd" have."""
        starts: dict[str, Tensor] = {}
        for name, layer in layers.items():
            entry = self.layers[name]
            own = {
                start_key(entry.A): layer.factors.A.value,
                start_key(entry.B): layer.factors.B.value,
                f"{name}.start_core": layer._parameters.get("core"),
            }
            if not own.keys().isdisjoint(self.tensors):
                if own[f"{name}.start_core"] is None:
                    raise ValueError(
                        f"{name}: expected a computed core, got one that starts by init 'svd'"
                    )
                layer._weight_to_write("load_adapter")
                starts.update(own)
        return starts

    def _copy_to(
        self,
        model: nn.Module,
        targets: Mapping[str, Tensor],
        copy: Callable[[Tensor, Tensor], None],
    ) -> None:
        """Copies scalings, dropout, starts and values into an adapted model that fits."""
        layers = layers_in(model)
        groups: dict[tuple[str, str], list[str]] = {}
        for name, entry in self.layers.items():
            layers[name].dropout = entry.dropout
            groups.setdefault((entry.A, entry.B), []).append(name)
        for (A, B), names in groups.items():
            group = [layers[name] for name in names]
            if group[0].start_core is not None:
                clear_start(group)
            for name in names:
                layers[name].scaling = self.layers[name].scaling
            if start_key(A) in self.tensors:
                cores = torch.stack([self.tensors[f"{name}.start_core"] for name in names])
                set_start(group, (self.tensors[start_key(A)], self.tensors[start_key(B)], cores))
        for key, target in targets.items():
            copy(target, self.tensors[key])
        config = getattr(model, "lotr_config", None)
        if config is not None:
            model.lotr_config = self._config_after_loading(config)

    def _config_after_loading(self, config: LoTRConfig) -> LoTRConfig:
        """Returns the model's configuration with the scaling and dropout of the adapter."""
        if self.config is not None:
            names = ("alpha", "rslora", "scaling", "dropout")
            return replace(config, **{name: getattr(self.config, name) for name in names})
        entry = next(iter(self.layers.values()))
        return replace(
            config, alpha=None, rslora=False, scaling=entry.scaling, dropout=entry.dropout
        )


def _document_of(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the JSON object and the tensors of a file, whose checksum is right."""
    tensors, metadata = tensors_in(path, "directory")
    kind = metadata.get("format")
    version = metadata.get("format_version")
    if kind != "lotr" or version != VERSION:
        raise ValueError(
            f"{path}: expected format lotr of version {VERSION}, got {kind!r:.80} of version "
            f"{version!r:.80}. A newer lotr_ext reads a newer version."
        )
    text = metadata.get("adapter", "")
    actual = checksum(sorted(tensors.items()), text.encode())
    if actual != metadata.get("sha256"):
        raise ValueError(
            f"{path}: expected sha256 {metadata.get('sha256')!s:.80}, got {actual}: the file is damaged"
        )
    return json_object(text, "directory", path), tensors


def _kind(directory: Path) -> str:
    """Says what stands in place of an adapter's folder, and what reads it."""
    if directory.is_file():
        return f"the file {directory}. Pass the folder that save_adapter wrote."
    config = directory / "adapter_config.json"
    if not config.is_file():
        return f"{str(directory)!r}"
    try:
        method = json.loads(read_bytes(config)).get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        method = None
    if method == "LOTR":
        return (
            f"a LoTR adapter of PEFT in {directory}. Import lotr_ext.peft and load it with "
            f"peft.PeftModel.from_pretrained, or write a LoRA with lotr_ext.convert.lotr_to_lora."
        )
    if method == "LORA":
        return (
            f"a LoRA of PEFT in {directory}. Load it with peft.PeftModel.from_pretrained, or "
            f"convert it first with lotr_ext.convert.lora_to_lotr."
        )
    return (
        f"an adapter of PEFT ({method!r:.40}) in {directory}. Load it with "
        f"peft.PeftModel.from_pretrained."
    )


# ---- what a model has ----------------------------------------------------------------------------


def _factors_of(layer: LoTRLayer) -> tuple[LoTRFactor, LoTRFactor]:
    return layer.factors.A, layer.factors.B


def _names_of_factors(model: nn.Module) -> dict[nn.Module, str]:
    return {m: f"{name}.value" for name, m in model.named_modules() if isinstance(m, LoTRFactor)}


def _entries_of(model: nn.Module, layers: Mapping[str, LoTRLayer]) -> dict[str, LayerEntry]:
    names = _names_of_factors(model)
    entries = {}
    for name, layer in layers.items():
        A, B = _factors_of(layer)
        experts = layer.num_experts
        scaling = float(layer.scaling)
        entries[name] = LayerEntry(names[A], names[B], scaling, layer.dropout, experts)
    return entries


def _tensors_of(model: nn.Module, layers: Mapping[str, LoTRLayer]) -> dict[str, Tensor]:
    """Returns the tensors of the adapter and of modules_to_save, which may be sharded, by name.

    Tied ones occur once. A core that is computed by a module is absent.
    """
    names = _names_of_factors(model)
    tensors: dict[str, Tensor | None] = {}
    for name, layer in layers.items():
        for factor in _factors_of(layer):
            tensors[names[factor]] = factor.value
            tensors[start_key(names[factor])] = factor.start
        if _core_source(layer) is None:
            tensors[f"{name}.core"] = layer.core
        tensors[f"{name}.start_core"] = layer.start_core
        form = layer._modules.get("core_form")
        if form is not None:
            tensors.update(_prefixed(f"{name}.core_form", form))
    cores = getattr(model, "lotr_cores", None)
    if cores is not None:
        tensors.update(_prefixed("lotr_cores", cores))
    config = getattr(model, "lotr_config", None)
    if config is not None:
        for name, module in saved_modules(model, config).items():
            tensors.update(_prefixed(name, module))
    distinct: dict[int, str] = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            distinct.setdefault(id(tensor), key)
    return {key: tensors[key] for key in distinct.values()}


def _prefixed(name: str, module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict(prefix=f"{name}.", keep_vars=True)


def _core_source(layer: LoTRLayer) -> nn.Module | None:
    """Returns the module that computes the core, None for a core that is a parameter."""
    if layer._parameters.get("core") is not None:
        return None
    if "parametrizations" in layer._modules:
        return layer.parametrizations["core"]
    return layer.core_form


def _computed_core(layer: LoTRLayer, gather: Gather) -> Tensor:
    """Returns the core that a module computes, from full parameters if they are sharded."""
    source = _core_source(layer)
    if isinstance(source, CoreAt):
        with full_tensors_in(source.cores, gather):
            return source.cores.make(source.index)
    with full_tensors_in(source, gather):
        return source()


# ---- the base model ------------------------------------------------------------------------------

_PARAMETERS, _VALUES = 8, 4  # how many frozen parameters are sampled, and values of each


def _name_of(model: nn.Module) -> str | None:
    """Returns where a transformers model was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _sample(tensor: Tensor) -> list[float] | None:
    """Returns values at fixed places of a full tensor, None if they are not finite."""
    last = tensor.numel() - 1
    places = sorted({last * i // (_VALUES - 1) for i in range(_VALUES)})
    values = tensor.detach().reshape(-1)[places].double().tolist()
    return values if all(map(math.isfinite, values)) else None


def _all_close(actual: list[float], expected: list[float]) -> bool:
    """Whether two samples are equal up to the rounding to bfloat16."""
    if len(actual) != len(expected):
        return False
    return all(math.isclose(a, b, rel_tol=2.0**-7, abs_tol=1e-6) for a, b in zip(actual, expected))


def _moved_parameters(layers: Mapping[str, LoTRLayer]) -> set[int]:
    """Returns the ids of base parameters that a merge or init "svd" has changed."""
    moved: set[int] = set()
    for layer in layers.values():
        if layer.merged or layer.start_core is not None:
            moved.update(id(p) for p in layer.parameters())
            moved.update(id(p) for p in getattr(layer, "host", layer).parameters())
    return moved


def _is_sampled(parameter: Tensor) -> bool:
    is_plain = type(parameter) is nn.Parameter or is_sharded(parameter)
    is_float = parameter.is_floating_point() and parameter.dtype.itemsize >= 2
    return is_plain and is_float and not parameter.is_meta and math.prod(full_shape(parameter)) > 0


def _values_of(
    model: nn.Module, layers: Mapping[str, LoTRLayer], gather: Gather
) -> dict[str, list[float]]:
    """Returns a few values of frozen parameters of the base model, by the parameter's name."""
    changed = _moved_parameters(layers)
    for layer in layers.values():
        changed.update(id(p) for p in layer.adapter_parameters())
    config = getattr(model, "lotr_config", None)
    if config is not None:
        for module in saved_modules(model, config).values():
            changed.update(id(p) for p in module.parameters())
    frozen = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in changed and not parameter.requires_grad and _is_sampled(parameter)
    ]
    matrices = [item for item in frozen if len(full_shape(item[1])) > 1]
    candidates = matrices or frozen
    step = max(1, math.ceil(len(candidates) / _PARAMETERS))
    values = {}
    for name, parameter in candidates[::step]:
        numbers = _sample(gather(parameter))
        if numbers is not None:
            values[name] = numbers
    return values


# ---- save, load and share ------------------------------------------------------------------------


def save_adapter(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Writes a model's adapter and its modules_to_save into a directory, atomically.

    An adapter that is there already is replaced. A merged adapter is saved as if it were not
    merged. Sharded models (FSDP2, ZeRO-3): `lotr_ext.sharded`.

    Args:
        model: From `apply_lotr` or built by hand. DistributedDataParallel (process 0 writes) and
            compiled models are unwrapped.
        directory: Created if it does not exist.

    Raises:
        TypeError: If directory is not a path, or a tensor is sharded.
        RuntimeError: If the model has no adapter, or one on the meta device.
        ValueError: If directory is a file.

    Warns:
        UserWarning: If trained parameters are not saved: those that are neither the adapter's nor
            of modules_to_save, and tasks.
    """
    path = checked_path(directory, "directory")
    inner, writes = unwrapped(model)
    state = AdapterState.from_model(inner)
    warn_of_unsaved(inner)
    if writes:
        state.write(path)


def load_adapter(
    model: Model,
    directory: str | PathLike[str],
    *,
    cast: bool = False,
    strict: Strictness = "targets",
) -> Model:
    """Loads a saved adapter into a model, and adapts the model first if needed.

    A plain base model is adapted as it was by `apply_lotr` when the adapter was saved. A model that
    is adapted already, by `apply_lotr` or by hand, must have the same layers, groups, shapes and
    dtypes. Its values are replaced in place (and with init "svd" the loaded start is subtracted
    from its base weights instead of the present one). Sharded models: `lotr_ext.sharded`.

    Args:
        model: The base model, or an adapted one.
        directory: A folder that `save_adapter` wrote, or the id of a repository on a hub
            ("user/name"), which huggingface_hub downloads.
        cast: Whether tensors of another dtype than the model's are accepted, and cast.
        strict: "targets" refuses a plain model in which the adapter's configuration selects more
            layers than the adapter has, and warns of another base model. True refuses both, False
            warns of both.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError, RuntimeError: If there is no such adapter; if its file is damaged or
            newer; if layers, shapes or dtypes do not fit the model; if the model is merged or has a
            TaskBank. The model is then unchanged.

    Warns:
        UserWarning: If strict allows a difference.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    path = local_folder(directory)
    AdapterState.read(path).load_into(model, cast=cast, strict=strict)
    return model


def push_to_hub(model: nn.Module, repo_id: str, **options: Any) -> str:
    """Uploads a model's adapter to a repository on a hub, from which `load_adapter` loads it.

    Args:
        model: As for `save_adapter`.
        repo_id: "user/name". The repository is created if it does not exist.
        options: For `huggingface_hub.create_repo`, such as private and token.

    Returns:
        The address of the commit.

    Raises:
        ImportError: If huggingface_hub is not installed.
        TypeError, RuntimeError: As `save_adapter`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        api.create_repo(repo_id, exist_ok=True, **options)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def local_folder(directory: str | PathLike[str]) -> Path:
    """Returns the folder with an adapter, which is downloaded if directory is the id of a hub.

    Raises:
        TypeError: If directory is not a path.
        ValueError: If there is no such folder and no such repository.
    """
    path = checked_path(directory, "directory")
    is_id = isinstance(directory, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", directory)
    if path.exists() or not is_id:
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(directory, allow_patterns=["lotr_adapter*"]))
    except (ImportError, OSError, ValueError) as error:  # the hub's errors are OSError, ValueError
        raise ValueError(
            f"directory: expected a folder or the id of a repository on a hub, got {directory!r}: "
            f"no such folder, and {type(error).__name__} {error!s:.300}"
        ) from None


def unwrapped(model: nn.Module, *engines: Any) -> tuple[nn.Module, bool]:
    """Takes a model out of DistributedDataParallel, torch.compile and the classes `engines`.

    Returns:
        The model, and whether this process writes its files.
    """
    writes = True
    wrappers = (nn.parallel.DistributedDataParallel, *engines)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            writes = dist.get_rank(model.process_group) == 0
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model, writes


def warn_of_unsaved(model: nn.Module) -> None:
    """Warns about what is trained and absent from the adapter's file."""
    saved: set[int] = set()
    for layer in layers_in(model).values():
        saved.update(id(p) for p in layer.adapter_parameters())
    config = getattr(model, "lotr_config", None)
    if config is not None:
        for module in saved_modules(model, config).values():
            saved.update(id(p) for p in module.parameters())
    unsaved = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if unsaved:
        warnings.warn(
            f"lotr_ext: save_adapter does not write {len(unsaved)} trained parameters that are "
            f"neither the adapter's nor of modules_to_save, such as {unsaved[0]}. Name their "
            f"modules in modules_to_save, or save them separately, tasks with "
            f"model.lotr_tasks.save(task, path).",
            stacklevel=3,
        )


def _check_tensor(key: str, target: Tensor, tensor: Tensor, cast: bool) -> None:
    """Checks that a tensor of a file fits the model's."""
    shape = full_shape(target)
    if shape != tuple(tensor.shape) or (target.dtype != tensor.dtype and not cast):
        raise ValueError(
            f"{key}: expected {target.dtype} {list(shape)} as in the model, got {tensor.dtype} "
            f"{list(tensor.shape)}. For another dtype pass cast=True; for another rank load the "
            f"adapter into the plain model, after unload(model)."
        )
    if target.is_meta:
        raise RuntimeError(
            f"load_adapter: expected a model with values, got {key} on the meta device. "
            f"Materialise it first."
        )
