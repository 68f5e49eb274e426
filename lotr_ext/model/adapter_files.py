"""An adapter on disk: one directory with a JSON file and a safetensors file, replaced as a whole.

    lotr_adapter.json                   format version, configuration, layers, tensors, the other file's name and checksum
    lotr_adapter.<digits>.safetensors   the tensors, under a name that no other save has: 16 random digits

The tensors are written first; then the JSON is written under a temporary name and renamed over the old one. That rename is the
one moment at which the new adapter takes the old one's place: a kill before it leaves the old adapter whole, a kill after it
the new one; of several savers the last to rename wins. Who loads reads the JSON again where the tensors that it named are gone.

A saver removes what is named by no JSON and written by nobody: each saver holds a lock (flock) on its files until it is done,
and the kernel takes the lock from one that is killed. Where a file system has no locks, what a kill leaves stays.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..layers.layer import check_settings
from ..version import __version__
from .config import LoTRConfig

__all__ = ["FORMAT_VERSION", "LayerEntry", "Manifest", "placed", "put_file", "read", "together", "write"]

FORMAT, FORMAT_VERSION = "lotr", 1
JSON_NAME = "lotr_adapter.json"
_TENSORS_NAME = re.compile(r"lotr_adapter\.[0-9a-f]{16}\.safetensors")
_LEFTOVER = re.compile(r"lotr_adapter\..*\.tmp")


@dataclass(frozen=True)
class LayerEntry:
    """One adapted layer. factors: the state_dict prefix of its LoTRFactors, or of the two LoTRFactor that make it. experts: how
    many, 0 for a layer that is none."""

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
    """What the JSON file says. config: None for a model that was built by hand. modules_to_save: full names. base: what
    identifies the base weights of a few layers, by name (`lotr_ext.model.fingerprint`)."""

    config: LoTRConfig | None
    layers: dict[str, LayerEntry]
    modules_to_save: tuple[str, ...]
    base: Mapping[str, str] = field(default_factory=dict)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _written(entry: LayerEntry) -> dict[str, Any]:
    return {key: value for key, value in vars(entry).items() if key != "experts" or value}


def _described(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {name: {"shape": list(t.shape), "dtype": _dtype_name(t)} for name, t in sorted(tensors.items())}


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(file: BinaryIO, *, wait: bool) -> bool:
    """Whether this process has the file's lock now. False where another has it, or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def together(directory: Path) -> Iterator[None]:
    """Inside, nobody else who asks for it reads or writes several files of directory: they belong together."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _temporary(directory: Path, name: str) -> tuple[Path, BinaryIO]:
    """A new file of a name of its own, locked."""
    while True:
        path = directory / f"{name}.{secrets.token_hex(8)}.tmp"
        file = open(path, "xb")
        _lock(file, wait=True)
        if path.exists():
            return path, file
        file.close()  # another saver took it for a leftover before it was locked


@contextmanager
def placed(directory: Path, name: str, data: bytes) -> Iterator[None]:
    """Puts data into directory/name, whole or not at all. Inside the context other savers take it for that of one at work."""
    temporary, file = _temporary(directory, name)
    with file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, directory / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(directory)
        yield


def put_file(directory: Path, name: str, data: bytes) -> None:
    """data in directory/name, whole or not at all."""
    with placed(directory, name, data):
        pass


def _named(directory: Path) -> str | None:
    """The tensors' file that the JSON in directory names, if there is one."""
    try:
        return json.loads((directory / JSON_NAME).read_bytes()).get("tensors_file")
    except (OSError, ValueError, AttributeError):
        return None


def _remove_leftovers(directory: Path, replaced: str | None) -> None:
    """Removes what no JSON names and nobody is writing. replaced: what a JSON named that is there no longer."""
    for path in directory.iterdir():
        if not (_TENSORS_NAME.fullmatch(path.name) or _LEFTOVER.fullmatch(path.name)):
            continue
        with suppress(OSError), open(path, "r+b") as file:
            # its saver is done or dead once the lock is free, so a JSON that does not name it now never will
            if (_lock(file, wait=False) or path.name == replaced) and path.name != _named(directory):
                path.unlink()


def write(directory: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter into directory, which is made if need be; other files in it are left alone. Others may save to it and
    load from it meanwhile, in this process and in others.

    Raises:
        ValueError: directory is a file. OSError: the disk.
    """
    from safetensors.torch import save

    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: expected a directory or a new path, got the file {directory}")
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata={"format": "pt"})
    digest = hashlib.sha256(data).hexdigest()
    tensors_name = f"lotr_adapter.{secrets.token_hex(8)}.safetensors"  # a checksum would be another's, too, who saves the same
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "lotr_ext_version": __version__,
        "config": None if manifest.config is None else manifest.config.to_dict(),
        "layers": {name: _written(entry) for name, entry in manifest.layers.items()},
        "modules_to_save": list(manifest.modules_to_save),
        "base_weights": dict(manifest.base),
        "tensors_file": tensors_name,
        "tensors_sha256": digest,
        "tensors": _described(tensors),
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    replaced = _named(directory)
    with placed(directory, tensors_name, data), placed(directory, JSON_NAME, text.encode()):
        pass
    _remove_leftovers(directory, replaced)


def read(directory: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """The adapter in directory, checked: format and version, each entry's type, the tensors' checksum, shapes and dtypes.

    Raises:
        ValueError: saying which file, what was expected and what came. Nothing in the files is ever executed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path, missing = directory / JSON_NAME, None
    while True:
        content = _content(directory)
        manifest, name = _manifest(path, content), _entry(path, content, "tensors_file", str)
        if not _TENSORS_NAME.fullmatch(name):
            raise ValueError(f"{path}: expected tensors_file like lotr_adapter.<16 hex digits>.safetensors, got {name!r}")
        file = directory / name
        try:
            data = file.read_bytes()
            break
        except OSError as error:
            if name == missing or not isinstance(error, FileNotFoundError):
                raise ValueError(f"{path}: expected {name} beside it, got {_found(directory)} ({error.strerror})") from None
            missing = name  # unless a save has taken its place since: then the JSON names another one now
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


def _content(directory: Path) -> dict[str, Any]:
    """What the JSON file says, of this format and version."""
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
        sizes["experts"] = _entry(path, {"experts": 0, **entry}, "experts", int)
        numbers = {key: _entry(path, entry, key, int | float) for key in ("scaling", "dropout")}
        try:
            check_settings(alpha=None, rslora=False, **numbers)
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
    return Manifest(config, layers, tuple(saved), base)


def describe(tensor: Tensor) -> str:
    """For messages: "float32 [16, 4]"."""
    return f"{_dtype_name(tensor)} {list(tensor.shape)}"


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of that form without memory: what a checkpoint is compared with before a model has the real one."""
    return torch.empty(shape, dtype=dtype, device="meta")
