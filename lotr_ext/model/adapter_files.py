"""An adapter on disk: one directory with a JSON file and a safetensors file, replaced atomically.

    lotr_adapter.json                   format version, configuration, layers, tensors, the other file's name and checksum
    lotr_adapter.<digits>.safetensors   the tensors, under a unique name: 16 random hexadecimal digits

A save writes the tensors first, then the JSON under a temporary name, and renames it over the old one. This rename is atomic: a
process killed before it leaves the old adapter, one killed after it the new one. Of several saves, the last rename wins. If the
tensors that a JSON names are gone, a reader reads the JSON again.

A save also removes tensors that no JSON names and no other save is writing. Each save locks its files (flock) until it is done,
and the kernel releases the lock of a killed process. On a file system without locks, the files of a killed save remain.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..files import folder, lock, parse_json, placed, read_bytes
from ..layers.cores import FORMS
from ..layers.settings import Settings
from ..layers.sharded import in_parts
from ..ops.planner import DTYPES
from .config import LoTRConfig
from .core_forms import CORES, make_cores

__all__ = [
    "FORMAT_VERSION",
    "LayerEntry",
    "Manifest",
    "check_shapes",
    "manifest_of",
    "read",
    "serialized",
    "tensors_of",
    "write",
]

FORMAT, FORMAT_VERSION = "lotr", 1
JSON_NAME = "lotr_adapter.json"
_TENSORS_NAME = re.compile(r"lotr_adapter\.[0-9a-f]{16}\.safetensors")
_ALL_PROCESSES = "of a model in parts call save_adapter in every process, with what wraps the model"


@dataclass(frozen=True)
class LayerEntry:
    """One adapted layer. factors: the state_dict prefix of its LoTRFactors, or of the two LoTRFactor that it consists of.
    experts: their number, 0 for a linear layer."""

    factors: str | tuple[str, str]
    in_features: int
    out_features: int
    scaling: float
    dropout: float
    experts: int = 0

    def tensor(self, part: str) -> str:
        """The full name of "A", "B", "start_A" or "start_B"."""
        if isinstance(self.factors, str):
            return f"{self.factors}.{part}"
        return f"{self.factors[part[-1] == 'B']}.{'start' if part.startswith('start') else 'value'}"


@dataclass(frozen=True)
class Manifest:
    """The content of the JSON file. config: None for a model that was built by hand. modules_to_save: full names. base: by
    layer name, a fingerprint of the base weights of a few layers (`lotr_ext.model.fingerprint`). tied: other names in the model
    of tensors of modules_to_save, as from `saved.ties`; None if they are not known."""

    config: LoTRConfig | None
    layers: dict[str, LayerEntry]
    modules_to_save: tuple[str, ...]
    base: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str | None] | None = None


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _written(entry: LayerEntry) -> dict[str, Any]:
    return {key: value for key, value in vars(entry).items() if key != "experts" or value}


def _described(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {name: {"shape": list(t.shape), "dtype": _dtype_name(t)} for name, t in sorted(tensors.items())}


def _named(directory: Path) -> str | None:
    """The name of the tensors' file in the directory's JSON, or None."""
    try:
        return parse_json(read_bytes(directory / JSON_NAME)).get("tensors_file")
    except (OSError, ValueError, AttributeError):
        return None


def _remove_leftovers(directory: Path, replaced: str | None) -> None:
    """Removes tensors that no JSON names and no save is writing. replaced: the file that the replaced JSON named."""
    for path in directory.iterdir():
        if not _TENSORS_NAME.fullmatch(path.name):
            continue
        with suppress(OSError), open(path, "r+b") as file:
            # once the lock is free, the save is done or killed, so no JSON will name the file later
            if (lock(file, wait=False) or path.name == replaced) and path.name != _named(directory):
                path.unlink()


def serialized(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file of tensors, on any device; several may be views of one storage."""
    from safetensors.torch import save

    stored, seen = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        stored[name] = value.clone() if place in seen else value  # the format has no shared memory
        seen.add(place)
    return save(stored, metadata={"format": "pt"})


def _check_whole(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for tensors of other shapes than the layers and the configuration have: sharded training keeps only
    parts of them, or empty tensors."""
    for name, entry in manifest.layers.items():
        A, B = (tensors[entry.tensor(part)].shape[-1:] for part in "AB")
        r_in, r_out = (*A, *B) if manifest.config is None else manifest.config.ranks
        core = (entry.experts, r_in, r_out) if entry.experts else (r_in, r_out)
        wanted = {entry.tensor("A"): (entry.in_features, r_in), entry.tensor("B"): (entry.out_features, r_out)}
        if f"{name}.magnitude" in tensors:
            wanted[f"{name}.magnitude"] = (entry.out_features,)
        for key, want in (wanted | {f"{name}.core": core}).items():
            if tuple(tensors[key].shape) != want or 0 in want:
                raise ValueError(f"{key}: expected shape {list(want)}, got {list(tensors[key].shape)}; {_ALL_PROCESSES}")
    for key, tensor in tensors.items():
        if in_parts(tensor):
            raise ValueError(f"{key}: expected a whole tensor, got a part of shape {list(tensor.shape)}; {_ALL_PROCESSES}")


def write(
    directory: Path, manifest: Manifest, tensors: Mapping[str, Tensor], beside: Mapping[str, bytes] | None = None
) -> None:
    """Writes an adapter into directory and creates it if needed; other files in it stay. Other threads and processes may save
    to it and load from it at the same time. beside: content of additional files, by name.

    Raises:
        ValueError: directory is a file, or a tensor is only a part. OSError: the disk; the directory is then unchanged.
    """
    _check_whole(manifest, tensors)
    data = serialized(tensors)
    digest = hashlib.sha256(data).hexdigest()
    tensors_name = f"lotr_adapter.{secrets.token_hex(8)}.safetensors"  # random: two saves of equal tensors must not share it
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "lotr_ext_version": __version__,
        "config": None if manifest.config is None else manifest.config.to_dict(),
        "layers": {name: _written(entry) for name, entry in manifest.layers.items()},
        "modules_to_save": list(manifest.modules_to_save),
        "base_weights": dict(manifest.base),
        **({} if manifest.tied is None else {"tied": dict(manifest.tied)}),
        "tensors_file": tensors_name,
        "tensors_sha256": digest,
        "tensors": _described(tensors),
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with folder(directory):
        replaced = _named(directory)
        with placed(directory, {**(beside or {}), tensors_name: data, JSON_NAME: text.encode()}):
            pass
    _remove_leftovers(directory, replaced)


def read(directory: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """The adapter in directory, checked: format and version, each entry's type, the tensors' checksum, shapes and dtypes.

    Raises:
        ValueError: names the file, what was expected and what was found. Nothing in the files is ever executed.
    """
    path, missing = directory / JSON_NAME, None
    while True:
        content = _content(directory)
        manifest, name = manifest_of(path, content), _entry(path, content, "tensors_file", str)
        if not _TENSORS_NAME.fullmatch(name):
            raise ValueError(f"{path}: expected tensors_file like lotr_adapter.<16 hex digits>.safetensors, got {name!r}")
        file = directory / name
        try:
            data = read_bytes(file)
            break
        except OSError as error:
            if name == missing or not isinstance(error, FileNotFoundError):
                raise ValueError(f"{path}: expected {name} beside it, got {_found(directory)} ({error.strerror})") from None
            missing = name  # a save may have replaced it meanwhile: then the JSON now names another file
    digest, want = hashlib.sha256(data).hexdigest(), _entry(path, content, "tensors_sha256", str)
    if digest != want:
        raise ValueError(f"{file}: expected sha256 {want}, got {digest} ({len(data)} bytes): truncated, or another file")
    tensors = tensors_of(file, data)
    described = _entry(path, content, "tensors", dict)
    if _described(tensors) != described:
        raise ValueError(f"{file}: expected tensors {described}, got {_described(tensors)}")
    try:
        check_shapes(manifest, tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return manifest, tensors


def tensors_of(file: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors in the content of a safetensors file. Raises ValueError for other content."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:  # KeyError: a dtype that torch has not
        raise ValueError(f"{file}: expected a safetensors file, got something else ({error})") from None


def check_shapes(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Checks that a saved adapter has all tensors, in the shapes of its configuration and layers.

    Raises:
        ValueError: names the missing tensors, or the wrong shape or dtype.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in manifest.layers.items():
        if (manifest.config is not None and manifest.config.magnitude) or f"{name}.magnitude" in tensors:
            shapes[f"{name}.magnitude"] = (entry.out_features,)
        for start in ("", "start_"):
            keys = [entry.tensor(f"{start}A"), entry.tensor(f"{start}B"), f"{name}.{start}core"]
            if not start or any(key in tensors for key in keys):
                shapes |= dict(zip(keys, _shapes_of(manifest.config, entry, tensors), strict=True))
    if manifest.config is not None and manifest.config.core in FORMS:
        cores = make_cores(manifest.config, list(manifest.layers), "meta")
        shapes |= {f"{CORES}.{key}": tuple(t.shape) for key, t in cores.state_dict().items()}
    if missing := sorted(set(shapes) - set(tensors)):
        raise ValueError(f"adapter: expected the tensors of its {len(manifest.layers)} layers, got a file with missing "
                         f"{', '.join(missing[:5])}")  # fmt: skip
    for key, shape in shapes.items():
        got = tensors[key]
        if tuple(got.shape) != shape or got.dtype not in DTYPES.values():
            raise ValueError(f"{key}: expected floating values {list(shape)} as configured, got {got.dtype} {list(got.shape)}")


def _shapes_of(config: LoTRConfig | None, entry: LayerEntry, tensors: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """The shapes of a layer's A, B and core. In a model built by hand, A and B have the ranks."""
    if config is not None:
        r_in, r_out = config.ranks
    else:
        found = (tensors.get(entry.tensor(part)) for part in "AB")
        r_in, r_out = (-1 if t is None or t.dim() != 2 else t.shape[1] for t in found)
    core = (entry.experts, r_in, r_out) if entry.experts else (r_in, r_out)
    return [(entry.in_features, r_in), (entry.out_features, r_out), core]


def _content(directory: Path) -> dict[str, Any]:
    """The content of the JSON file, checked for format and version."""
    path = directory / JSON_NAME
    try:
        content = parse_json(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"directory: expected a LoTR adapter with {JSON_NAME}, got {directory}, which has {_found(directory)}"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got {error.strerror!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f'{path}: expected "format": "{FORMAT}", got {got!r}')
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {content.get('format_version')!r}, written by lotr_ext "
            f"{content.get('lotr_ext_version')}"
        )
    return content


def _found(directory: Path) -> str:
    if not directory.is_dir():
        return "no such directory" if not directory.exists() else "a file in its place"
    names = sorted(p.name for p in directory.iterdir())
    return "no files" if not names else ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _entry(path: Path, content: Mapping[str, Any], key: str, kind: type) -> Any:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{path}: expected {key!r} to be {getattr(kind, '__name__', kind)}, got {value!r}")
    return value


def _factors(path: Path, entry: Mapping[str, Any]) -> str | tuple[str, str]:
    found = _entry(path, entry, "factors", str | list)
    if isinstance(found, list):
        if len(found) != 2 or not all(isinstance(prefix, str) for prefix in found):
            raise ValueError(f"{path}: expected 'factors' to be a prefix or two, got {found!r}")
        return found[0], found[1]
    return found


def manifest_of(path: Path, content: Mapping[str, Any]) -> Manifest:
    try:
        config = None if content.get("config") is None else LoTRConfig.from_dict(_entry(path, content, "config", dict))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a valid config, got one with {error}") from None
    layers = {}
    for name, entry in _entry(path, content, "layers", dict).items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: expected layer {name!r} to be an object, got {entry!r}")
        sizes = {key: _entry(path, entry, key, int) for key in ("in_features", "out_features")}
        sizes["experts"] = _entry(path, {"experts": 0, **entry}, "experts", int)
        numbers = {key: _entry(path, entry, key, int | float) for key in ("scaling", "dropout")}
        try:
            Settings(**numbers)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected valid settings for layer {name!r}, got {error}") from None
        layers[name] = LayerEntry(_factors(path, entry), **sizes, **{k: float(v) for k, v in numbers.items()})
    if not layers:
        raise ValueError(f"{path}: expected at least one layer, got none")
    saved = _entry(path, content, "modules_to_save", list)
    if not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{path}: expected modules_to_save to be names, got {saved!r}")
    base = _entry(path, {"base_weights": {}, **content}, "base_weights", dict)
    if not all(isinstance(value, str) for value in base.values()):
        raise ValueError(f"{path}: expected base_weights to be strings, got {base!r}")
    tied = None if content.get("tied") is None else _entry(path, content, "tied", dict)
    if not all(of is None or isinstance(of, str) for of in (tied or {}).values()):
        raise ValueError(f"{path}: expected tied to be names by name, got {tied!r}")
    return Manifest(config, layers, tuple(saved), base, tied)


def describe(tensor: Tensor) -> str:
    """For messages: "float32 [16, 4]"."""
    return f"{_dtype_name(tensor)} {list(tensor.shape)}"


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without memory, to compare a checkpoint with before the model has the real tensor."""
    return torch.empty(shape, dtype=dtype, device="meta")
