"""An adapter on disk: one directory with a JSON file and a safetensors file, replaced as a whole.

    lotr_adapter.json                    format version, configuration, layers, tensors, and the other file's name
    lotr_adapter.<sha256>.safetensors    the tensors, named by the first 16 digits of their checksum

The tensors are written first, under a name that no older JSON names; then the JSON is written under a temporary name and
renamed over the old one. That rename is the one moment at which the new adapter takes the old one's place: a kill before it
leaves the old adapter whole, a kill after it the new one. What a kill leaves lying around, the next save removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layers.layer import check_settings
from .config import LoTRConfig

__all__ = ["FORMAT_VERSION", "LayerEntry", "Manifest", "put_file", "read", "write"]

FORMAT, FORMAT_VERSION = "lotr", 1
JSON_NAME = "lotr_adapter.json"
_TENSORS_NAME = re.compile(r"lotr_adapter\.[0-9a-f]{16}\.safetensors")
_LEFTOVER = re.compile(r"lotr_adapter\..*\.tmp")


@dataclass(frozen=True)
class LayerEntry:
    """One adapted layer. factors: the state_dict prefix of its LoTRFactors."""

    factors: str
    in_features: int
    out_features: int
    scaling: float
    dropout: float


@dataclass(frozen=True)
class Manifest:
    """What the JSON file says. config: None for a model that was built by hand. modules_to_save: full names."""

    config: LoTRConfig | None
    layers: dict[str, LayerEntry]
    modules_to_save: tuple[str, ...]


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _described(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {name: {"shape": list(t.shape), "dtype": _dtype_name(t)} for name, t in sorted(tensors.items())}


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_file(directory: Path, name: str, data: bytes) -> None:
    """data in directory/name, whole or not at all."""
    temporary = directory / f"{name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, directory / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(directory)


def write(directory: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter into directory, which is made if need be; other files in it are left alone.

    Raises:
        ValueError: directory is a file. OSError: the disk.
    """
    from safetensors.torch import save

    from .. import __version__

    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: expected a directory or a new path, got the file {directory}")
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata={"format": "pt"})
    digest = hashlib.sha256(data).hexdigest()
    tensors_name = f"lotr_adapter.{digest[:16]}.safetensors"
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "lotr_ext_version": __version__,
        "config": None if manifest.config is None else manifest.config.to_dict(),
        "layers": {name: vars(entry) for name, entry in manifest.layers.items()},
        "modules_to_save": list(manifest.modules_to_save),
        "tensors_file": tensors_name,
        "tensors_sha256": digest,
        "tensors": _described(tensors),
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    put_file(directory, tensors_name, data)
    put_file(directory, JSON_NAME, text.encode())
    for old in directory.iterdir():
        if old.name != tensors_name and (_TENSORS_NAME.fullmatch(old.name) or _LEFTOVER.fullmatch(old.name)):
            old.unlink(missing_ok=True)


def read(directory: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """The adapter in directory, checked: format and version, each entry's type, the tensors' checksum, shapes and dtypes.

    Raises:
        ValueError: saying which file, what was expected and what came. Nothing in the files is ever executed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = directory / JSON_NAME
    if not path.is_file():
        raise ValueError(f"directory: expected a LoTR adapter with {JSON_NAME}, got {directory}, which has {_found(directory)}")
    try:
        content = json.loads(path.read_bytes())
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
    manifest = _manifest(path, content)
    name = _entry(path, content, "tensors_file", str)
    if not _TENSORS_NAME.fullmatch(name):
        raise ValueError(f"{path}: expected tensors_file like lotr_adapter.<16 hex digits>.safetensors, got {name!r}")
    file = directory / name
    if not file.is_file():
        raise ValueError(f"{path}: expected {name} beside it, got {_found(directory)}")
    data = file.read_bytes()
    digest, want = hashlib.sha256(data).hexdigest(), _entry(path, content, "tensors_sha256", str)
    if digest != want:
        raise ValueError(f"{file}: expected sha256 {want}, got {digest} ({len(data)} bytes): truncated, or another file")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got something else ({error})") from None
    described = _entry(path, content, "tensors", dict)
    if _described(tensors) != described:
        raise ValueError(f"{file}: expected tensors {described}, got {_described(tensors)}")
    return manifest, tensors


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


def _manifest(path: Path, content: Mapping[str, Any]) -> Manifest:
    try:
        config = None if content.get("config") is None else LoTRConfig.from_dict(_entry(path, content, "config", dict))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a valid config, got one with {error}") from None
    layers = {}
    for name, entry in _entry(path, content, "layers", dict).items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: expected layer {name!r} to be an object, got {entry!r}")
        sizes = {key: _entry(path, entry, key, int) for key in ("in_features", "out_features")}
        numbers = {key: _entry(path, entry, key, int | float) for key in ("scaling", "dropout")}
        try:
            check_settings(alpha=None, rslora=False, **numbers)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected valid settings for layer {name!r}, got {error}") from None
        layers[name] = LayerEntry(_entry(path, entry, "factors", str), **sizes, **{k: float(v) for k, v in numbers.items()})
    if not layers:
        raise ValueError(f"{path}: expected at least one layer, got none")
    saved = _entry(path, content, "modules_to_save", list)
    if not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{path}: expected modules_to_save to be names, got {saved!r}")
    return Manifest(config, layers, tuple(saved))


def describe(tensor: Tensor) -> str:
    """For messages: "float32 [16, 4]"."""
    return f"{_dtype_name(tensor)} {list(tensor.shape)}"


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of that form without memory: what a checkpoint is compared with before a model has the real one."""
    return torch.empty(shape, dtype=dtype, device="meta")
