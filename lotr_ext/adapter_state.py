"""An adapter apart from any model, and its file, `lotr_adapter.safetensors`.

    tensors     by their names in the adapted model's state_dict: `lotr_factors.<i>.value`,
                `<layer>.core`, `lotr_cores.*`, the tensors of modules_to_save; with init "svd" also
                `lotr_factors.<i>.start` and `<layer>.start_core`
    metadata    format "lotr", format_version, `adapter` (a JSON object: configuration, layers,
                modules_to_save and what is tied to them, base model) and `sha256`, a checksum of
                it and of the tensors

The file is replaced by one rename, so a process that is killed leaves the old or the new adapter.
Everything in it is checked for types, ranges and sizes before a model is touched.

Not here: how an adapter is taken from a model and put into one (files.py), how files are written
and read (storage.py), formats of older versions (old_files.py).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, old_files
from .base_model import BaseModel
from .checks import check_number, check_probability
from .config import LoTRConfig
from .core.operators import DTYPES
from .storage import (
    checksum,
    errors_of,
    expect_type,
    json_in,
    json_object,
    put_tensors,
    tensors_in,
)
from .targets import name_ends_with

FILE_NAME = "lotr_adapter.safetensors"
VERSION = "3"  # 1 and 2 were a JSON file next to a safetensors file


def _names_from_json(field: str, value: object) -> tuple[str, ...]:
    expect_type(field, value, list)
    for name in value:
        expect_type(field, name, str)
    return tuple(value)


@dataclass(frozen=True)
class LayerEntry:
    """One adapted layer.

    Attributes:
        A: The name of its factor A among the tensors.
        B: The name of its factor B.
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
    def from_json(value: object) -> "LayerEntry":
        """Returns the entry in a JSON object.

        Raises:
            TypeError, ValueError: If a field is missing, unknown, or of a wrong type or value.
        """
        expect_type("layers", value, dict)
        names = {item.name for item in fields(LayerEntry)}
        if not names - {"experts"} <= value.keys() <= names:
            raise ValueError(f"expected the fields {sorted(names)}, got {sorted(value)!r:.200}")
        entry = LayerEntry(**value)
        expect_type("A", entry.A, str)
        expect_type("B", entry.B, str)
        expect_type("experts", entry.experts, int)
        check_number("scaling", entry.scaling)
        check_probability("dropout", entry.dropout)
        if entry.A == entry.B:
            raise ValueError(f"B: expected another tensor than A, got {entry.B!r:.80}")
        if entry.experts < 0:
            raise ValueError(f"experts: expected at least 0, got {entry.experts}")
        # The kernels compute with it in float32.
        if abs(entry.scaling) > torch.finfo(torch.float32).max:
            raise ValueError(f"scaling: expected a float32 number, got {entry.scaling}")
        return replace(entry, scaling=float(entry.scaling), dropout=float(entry.dropout))


@dataclass(frozen=True)
class AdapterState:
    """An adapter apart from any model, as a file has it.

    Attributes:
        config: The configuration, None for a model that was built by hand.
        layers: The adapted layers by name, in the model's order.
        modules_to_save: The names of fully trained modules.
        base: What identifies the base model.
        tensors: The full tensors by name.
        tied: The parameters that share memory with one of modules_to_save. None if not known.
    """

    config: LoTRConfig | None
    layers: dict[str, LayerEntry]
    modules_to_save: tuple[str, ...]
    base: BaseModel
    tensors: dict[str, Tensor]
    tied: tuple[str, ...] | None = None

    # ---- JSON ------------------------------------------------------------------------------------

    @property
    def document(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON."""
        return {
            "lotr_ext_version": __version__,
            "config": None if self.config is None else self.config.to_dict(),
            "layers": {name: asdict(entry) for name, entry in self.layers.items()},
            "modules_to_save": list(self.modules_to_save),
            "tied": None if self.tied is None else list(self.tied),
            "base": asdict(self.base),
        }

    @staticmethod
    def from_document(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "AdapterState":
        """Returns the adapter of a document and its tensors.

        Args:
            document: As `document` returns it. base, tied and lotr_ext_version may be absent.
            tensors: By name.

        Raises:
            TypeError, ValueError: If a field is missing or has a wrong type or value, or if the
                sizes of tensors do not fit each other or the configuration. The message names the
                field.
        """
        expect_type("layers", document.get("layers"), dict)
        config = document.get("config")
        if config is not None:
            expect_type("config", config, dict)
            with errors_of("config"):
                config = LoTRConfig.from_dict(config)
        layers = {}
        for name, value in document["layers"].items():
            with errors_of(f"layers, {name!r:.200}"):
                layers[name] = LayerEntry.from_json(value)
        tied = document.get("tied")
        state = AdapterState(
            config,
            layers,
            _names_from_json("modules_to_save", document.get("modules_to_save")),
            BaseModel.from_json(document.get("base", {})),
            dict(tensors),
            None if tied is None else _names_from_json("tied", tied),
        )
        state._check_sizes()
        state._check_config()
        return state

    def _check_sizes(self) -> None:
        """Checks that the sizes of tensors fit each other and the configuration."""
        if not self.layers:
            raise ValueError("layers: expected at least one, got none")
        for name, entry in self.layers.items():
            A, B, core = (self._floating(key) for key in (entry.A, entry.B, f"{name}.core"))
            lead = [entry.experts] if entry.experts else []  # each expert has a core
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

    # ---- files -----------------------------------------------------------------------------------

    @staticmethod
    def read(directory: Path) -> "AdapterState":
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
                    f"directory: expected a folder with {FILE_NAME}, got {_what_is_at(directory)}"
                )
            document, tensors = old_files.read(path)
        with errors_of(str(path)):
            return AdapterState.from_document(document, tensors)

    def write(self, directory: Path) -> None:
        """Writes the adapter into a directory, which is created if needed. Other files in it stay.

        Raises:
            ValueError: If directory is a file.
            OSError: If the disk refuses. An adapter that was there is then unchanged.
        """
        text = json.dumps(self.document, allow_nan=False)  # NaN is not JSON
        # In the order of the checksum, see `_document_of`.
        tensors = {key: tensor.detach().cpu() for key, tensor in sorted(self.tensors.items())}
        metadata = {
            "format": "lotr",
            "format_version": VERSION,
            "adapter": text,
            "sha256": checksum(tensors.items(), text.encode()),
        }
        put_tensors(directory, FILE_NAME, tensors, metadata)
        # Afterwards: `read` prefers the new file, so a killed process leaves one or the other.
        old_files.remove(directory)


def _document_of(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the JSON object and the tensors of a file, and checks its checksum."""
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
            f"{path}: expected sha256 {metadata.get('sha256')!s:.80}, got {actual}. The file is "
            f"damaged."
        )
    return json_object(text, "directory", path), tensors


def _what_is_at(directory: Path) -> str:
    """Says what stands in place of an adapter's folder, and what to do."""
    if directory.is_file():
        return f"the file {directory}. Pass the folder that save_adapter wrote."
    if not directory.exists():
        return f"{directory}, which does not exist. Pass the folder that save_adapter wrote."
    if (directory / "adapter_config.json").is_file():
        return _adapter_of_peft(directory)
    if (directory / "config.json").is_file():
        return (
            f"{directory}, where save_pretrained or a Trainer wrote a model. They write no LoTR "
            f"adapter: pass a folder that save_adapter wrote, and train with "
            f"lotr_ext.trainer.AdapterCheckpoints to have adapters in checkpoints."
        )
    return f"{directory}, which has no adapter. Pass the folder that save_adapter wrote."


def _adapter_of_peft(directory: Path) -> str:
    try:
        method = json_in(directory / "adapter_config.json", "directory").get("peft_type")
    except ValueError:
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
