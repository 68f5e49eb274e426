"""An adapter apart from any model, and its file, `lotr_adapter.safetensors`.

    tensors     by their names in the adapted model's state_dict: `lotr_factors.<i>.value`,
                `<layer>.core`, `lotr_cores.*`, the tensors of modules_to_save; with init "svd" also
                `lotr_factors.<i>.start` and `<layer>.start_core`
    metadata    format "lotr", format_version, `adapter` (a JSON object: configuration, layers,
                modules_to_save and what is tied to them, base model) and `sha256`, a checksum of
                it and of the tensors

The file is replaced by one rename, so a process that is killed leaves the old or the new adapter.
Everything in it is checked for types, ranges and sizes before a model is touched.

Not here: how an adapter is taken from a model (saving.py) and put into one (loading.py), how files
are written and read (storage.py), formats of older versions (old_files.py).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, old_files
from .base_model import BaseModel
from .checks import check_number, check_probability
from .config import LoTRConfig, place_of
from .core.operators import DTYPES
from .cores import FORMS
from .storage import checksum, errors_of, put_tensors, tensors_in

FILE_NAME = "lotr_adapter.safetensors"
VERSION = "3"  # 1 and 2 were a JSON file next to a safetensors file

# What a folder without an adapter may have instead, and what to do with it.
_OTHER_FILES = {
    "adapter_config.json": "an adapter of PEFT. Load it with peft.PeftModel.from_pretrained (after "
    "import lotr_ext.peft if it is a LoTR), or convert it with lotr_ext.convert.lora_to_lotr or "
    "lotr_to_lora.",
    "config.json": "a model of save_pretrained or of a Trainer, which write no LoTR adapter. Train "
    "with lotr_ext.trainer.AdapterCheckpoints to have adapters in checkpoints.",
}


def start_key(key: str) -> str:
    """Returns the name of a factor's start in a file. key is the name of the factor's value there.

    `lotr_factors.0.value` -> `lotr_factors.0.start`; in version 1, where one module had both
    factors, `lotr_factors.0.A` -> `lotr_factors.0.start_A`.
    """
    owner, _, name = key.rpartition(".")
    return f"{owner}.start" if name == "value" else f"{owner}.start_{name}"


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
    def from_json(layer: str, values: Mapping[str, Any]) -> "LayerEntry":
        """Returns the entry in a JSON object.

        Args:
            layer: The name of the layer, for the error.
            values: The JSON object.

        Raises:
            TypeError, ValueError: If a field is missing or unknown, or s or dropout has a wrong
                value.
        """
        entry = LayerEntry(**values)
        check_number(f"{layer}.scaling", entry.scaling)
        check_probability(f"{layer}.dropout", entry.dropout)
        # The kernels compute with it in float32, where a larger number would be infinite.
        if abs(entry.scaling) > torch.finfo(torch.float32).max:
            raise ValueError(f"{layer}.scaling: expected a float32 number, got {entry.scaling}")
        # Some languages write 2.0 as 2 in JSON, and s in the file of a task is compared as text.
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
            "modules_to_save": self.modules_to_save,
            "tied": self.tied,
            "base": asdict(self.base),
        }

    @staticmethod
    def from_document(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "AdapterState":
        """Returns the adapter of a document and its tensors.

        Args:
            document: As `document` returns it. base, tied and lotr_ext_version may be absent.
            tensors: By name.

        Raises:
            AttributeError, LookupError, OverflowError, TypeError, ValueError: If a field is missing
                or has a wrong type or value, or if the sizes of tensors do not fit each other or
                the configuration.
        """
        config = document["config"]
        tied = document.get("tied")
        state = AdapterState(
            config=None if config is None else LoTRConfig.from_dict(config),
            layers={
                name: LayerEntry.from_json(name, entry)
                for name, entry in document["layers"].items()
            },
            modules_to_save=tuple(document["modules_to_save"]),
            base=BaseModel.from_json(document.get("base", {})),
            tensors=dict(tensors),
            tied=None if tied is None else tuple(tied),
        )
        state._check_sizes()
        return state

    def _check_sizes(self) -> None:
        """Checks that the sizes of tensors fit each other and the configuration."""
        if not self.layers:
            raise ValueError("layers: expected at least one, got none")
        for name, entry in self.layers.items():
            A, B, core = (self.tensors[key] for key in (entry.A, entry.B, f"{name}.core"))
            ranks = (A.shape[-1], B.shape[-1]) if self.config is None else self.config.ranks
            # Each expert has a core.
            lead = [entry.experts] if entry.experts else []
            expected = [[len(A), ranks[0]], [len(B), ranks[1]], [*lead, *ranks]]
            shapes = [list(tensor.shape) for tensor in (A, B, core)]
            dtypes = {A.dtype, B.dtype, core.dtype}
            if shapes != expected or not dtypes.issubset(DTYPES.values()):
                raise ValueError(
                    f"layers, {name!r}: expected floating A, B and core of shapes {expected}, by "
                    f"the ranks of the configuration, got {shapes}, {sorted(map(str, dtypes))}"
                )
        if self.config is not None and self.config.core != "custom":
            self._check_computed_cores(self.config)

    def _check_computed_cores(self, config: LoTRConfig) -> None:
        """Checks the parameters of computed cores. With dense cores there must be none."""
        expected = {}
        if config.core in FORMS:
            # On meta nothing is allocated: a file of a few bytes may name a rank that would need
            # gigabytes.
            with torch.device("meta"):
                cores = FORMS[config.core]([place_of(name) for name in self.layers], config.rank)
            expected = {
                name: list(tensor.shape)
                for name, tensor in cores.state_dict(prefix="lotr_cores.").items()
            }
        actual = {
            name: list(tensor.shape)
            for name, tensor in self.tensors.items()
            if name.startswith("lotr_cores.")
        }
        if actual != expected:
            raise ValueError(
                f"lotr_cores: expected {expected} for core {config.core!r} and rank "
                f"{config.rank}, got {actual}"
            )

    # ---- files -----------------------------------------------------------------------------------

    @staticmethod
    def read(directory: Path) -> "AdapterState":
        """Reads the adapter in a directory, also one of an older version.

        Raises:
            ValueError: If there is none, or a damaged or newer one. The message names the file or
                the directory, what was expected and what was found.
            OSError: If the directory cannot be looked up, for example without permission.
        """
        path = directory / FILE_NAME
        old_path = directory / old_files.JSON_NAME
        if path.exists():
            document, tensors = _document_of(path)
        elif old_path.exists():
            document, tensors = old_files.read(old_path)
        else:
            raise ValueError(
                f"directory: expected a folder with {FILE_NAME}, got {_what_is_at(directory)}"
            )
        # The checksum rules out damage, but not mistakes of another program that wrote the file.
        with errors_of(str(directory)):
            return AdapterState.from_document(document, tensors)

    def write(self, directory: Path) -> None:
        """Writes the adapter into a directory, which is created if needed. Other files in it stay.

        Raises:
            FileExistsError: If directory is a file.
            OSError: If a file cannot be written. An adapter that was there is then unchanged,
                unless only the removal of an older version's files failed: the new one is then in
                place.
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
        put_tensors(directory / FILE_NAME, tensors, metadata)
        # Last: `read` prefers the new file, so both may be there if the process is killed before.
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
    with errors_of(str(path)):
        return json.loads(text), tensors


def _what_is_at(directory: Path) -> str:
    """Describes what is there instead of an adapter's folder, and says what to do."""
    for name, other in _OTHER_FILES.items():
        if (directory / name).is_file():
            return f"{directory}, which has {other}"
    kind = "has no adapter" if directory.is_dir() else "is not a folder"
    return f"{directory}, which {kind}. Pass the folder that save_adapter wrote."
