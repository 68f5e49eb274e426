"""save_adapter and load_adapter: an adapter in one directory, one JSON file and one safetensors file.

    lotr_adapter.json                   format version, configuration, layers, name and checksum of the other file
    lotr_adapter.<digits>.safetensors   the tensors, by their names in the adapted model's state_dict: `lotr_factors.<i>.value`,
                                        `<layer>.core`, `lotr_cores.*`, the tensors of modules_to_save; with init "svd" also
                                        `lotr_factors.<i>.start` and `<layer>.start_core`

A save writes the tensors under a new random name, then the JSON under a temporary one, and renames it over the old one: a
process that is killed before leaves the old adapter, one that is killed after it the new one. Saves to one directory lock it,
and each removes what killed ones have left.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import __version__
from .config import DIAGONAL, LoTRConfig
from .functional import check_number, check_probability
from .linear import LoTRFactor, LoTRLayer
from .model import adapted_layers, expect_unmerged, install, layers_in, set_start, unchanged_on_error
from .targets import BESIDE, saved_modules, select

__all__ = ["contents", "load_adapter", "load_into", "read", "save_adapter", "write"]

Model = TypeVar("Model", bound=nn.Module)
JSON_NAME, VERSION = "lotr_adapter.json", 2  # version 1: of lotr_ext 0.1.0 before its first release
_TENSORS = re.compile(r"lotr_adapter\.[0-9a-f]{16}\.safetensors")
_LEFTOVER = re.compile(rf"lotr\.[0-9a-f]{{16}}\.tmp|{_TENSORS.pattern}")


# ---- files -----------------------------------------------------------------------------------------------------------


def checked_path(path: object, name: str) -> Path:
    """path as a Path; TypeError for anything else."""
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"{name}: expected a path, got {type(path).__name__} {path!r:.80}")
    return Path(path)


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. OSError for anything else: opening a FIFO would wait for a writer."""
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        return file.read()


def put_file(directory: Path, name: str, data: bytes) -> None:
    """Writes data into directory/name, whole or not at all. OSError names the file."""
    temporary = directory / f"lotr.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb", buffering=0) as file:  # unbuffered: close would write again what a full disk refused
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        os.replace(temporary, directory / name)
    except OSError as error:
        text = f"cannot write it ({error.strerror}); what was there before is unchanged"
        raise OSError(error.errno, text, str(directory / name)) from error
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)  # the new name on the disk, too
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensors_of(data: bytes, path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata in the content of a safetensors file. ValueError, with the argument's name, for others."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:  # KeyError: a dtype that torch has not
        raise ValueError(f"{name}: expected a safetensors file, got {path} with something else ({error})") from None
    return tensors, json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}


def tensors_in(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `tensors_of`, of a file."""
    try:
        return tensors_of(read_bytes(path), path, name)
    except OSError as error:
        raise ValueError(f"{name}: expected a safetensors file, got {path} ({error.strerror})") from None


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """One save at a time. Gives False on a file system without locks. The kernel releases a killed process's lock."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def write(directory: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter (`contents`) into a directory, which it creates if needed; other files in it stay. Raises ValueError:
    directory is a file; OSError: the disk, and the adapter that was there is unchanged."""
    from safetensors.torch import save

    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: expected a directory or a new path, got the file {directory}")
    data = save(
        {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, {"format": "pt"}
    )
    name = f"lotr_adapter.{secrets.token_hex(8)}.safetensors"  # random: two saves of equal tensors must not share it
    described = {**document, "tensors_file": name, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(described, indent=2, allow_nan=False) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory) as alone:
        put_file(directory, name, data)
        try:
            put_file(directory, JSON_NAME, text.encode())
        except BaseException:
            (directory / name).unlink(missing_ok=True)
            raise
        for path in directory.iterdir() if alone else ():
            if _LEFTOVER.fullmatch(path.name) and path.name != name:
                path.unlink(missing_ok=True)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of an adapter, checked: format, version, each entry's type, the tensors' checksum.

    Raises ValueError that names the file, what was expected and what was found. Nothing in the files is ever executed.
    """
    path, missing = directory / JSON_NAME, None
    while True:
        document = _document(directory)
        name, want = (_entry(path, document, key, str) for key in ("tensors_file", "tensors_sha256"))
        if not _TENSORS.fullmatch(name):
            raise ValueError(f"{path}: expected tensors_file like lotr_adapter.<16 hex digits>.safetensors, got {name!r}")
        try:
            data = read_bytes(directory / name)
            break
        except OSError as error:
            if name == missing or not isinstance(error, FileNotFoundError):
                raise ValueError(f"{path}: expected {name} beside it, got {_found(directory)} ({error.strerror})") from None
            missing = name  # a save may have replaced it meanwhile: then the JSON now names another file
    if (got := hashlib.sha256(data).hexdigest()) != want:
        raise ValueError(
            f"{directory / name}: expected sha256 {want}, got {got} ({len(data)} bytes): truncated, or another file"
        )
    return document, tensors_of(data, directory / name, "directory")[0]


def _document(directory: Path) -> dict[str, Any]:
    """The content of the JSON file, checked, in the form of the newest version."""
    path = directory / JSON_NAME
    try:
        content = json.loads(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"directory: expected a local folder with {JSON_NAME}, got {str(directory)!r}, which has {_found(directory)}. Only "
            f"local folders are read: download an adapter from a hub first (huggingface_hub.snapshot_download)."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file, got something else ({error})") from None
    if not isinstance(content, dict) or content.get("format") != "lotr":
        got = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f'{path}: expected "format": "lotr", got {got!r:.80}')
    if content.get("format_version") not in (1, VERSION) or isinstance(content["format_version"], bool):
        raise ValueError(
            f"{path}: expected format_version up to {VERSION}, got {content.get('format_version')!r:.80}, written by lotr_ext "
            f"{content.get('lotr_ext_version')!r:.80}. A newer lotr_ext reads it."
        )
    _check_document(path, content)
    return content


def _entry(path: Path, content: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise ValueError(f"{path}: expected {key!r} to be {' or '.join(k.__name__ for k in kinds)}, got {value!r:.80}")
    return value


def _check_document(path: Path, content: dict[str, Any]) -> None:
    """Checks each entry's type; makes config a LoTRConfig, and an entry of version 1 one of version 2."""
    old, layers = content["format_version"] == 1, _entry(path, content, "layers", dict)
    try:
        if content.setdefault("config", None) is not None:
            values = _entry(path, content, "config", dict)
            content["config"] = LoTRConfig.from_dict(config_of_version_1(values) if old else values)
        for name in layers:
            entry = layers[name] = {"experts": 0, **_entry(path, layers, name, dict)}
            if old:
                entry |= _factors_of_version_1(_entry(path, entry, "factors", (str, list)))
            for key, kind in {"A": str, "B": str, "in_features": int, "out_features": int, "experts": int}.items():
                _entry(path, entry, key, kind)
            check_number("scaling", entry.get("scaling"))
            check_probability("dropout", entry.get("dropout"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a valid adapter, got one with {error}") from None
    saved = _entry(path, content, "modules_to_save", list)
    if not layers or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{path}: expected layers, and modules_to_save by name, got {len(layers)} layers and {saved!r:.80}")


def config_of_version_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 had a scaling None, which meant alpha / r with alpha = r; "auto" for other initial factors; and magnitudes."""
    found = dict(values)
    if found.pop("magnitude", False):
        raise ValueError("magnitude: expected False, got True, which this version does not have")
    found["train"] = [part for part in found.get("train", ("A", "B", "core")) if part != "magnitude"]
    if found.get("init") == "gradient":
        found["init"] = "orthonormal"
    if found.get("scaling") is None:
        found["scaling"] = 1.0 if found.get("alpha") is None and not found.get("rslora") else "auto"
    elif found["scaling"] == "auto":
        rank = found.get("rank", 16)
        r = max(rank) if isinstance(rank, list) else rank
        found["scaling"] = 4.0 * (8 / r) ** (0.5 if found.get("core") in DIAGONAL else 1.5)
    return found


def _factors_of_version_1(factors: str | list) -> dict[str, str]:
    """The names of A and B: of a pair's two tensors, or of two modules."""
    A, B = (f"{factors}.A", f"{factors}.B") if isinstance(factors, str) else (f"{one}.value" for one in factors)
    return {"A": A, "B": B}


def start_key(key: str) -> str:
    """The name of a factor's start; version 1 had a pair's in one module."""
    owner, _, own = key.rpartition(".")
    return f"{owner}.start" if own == "value" else f"{owner}.start_{own}"


def _found(directory: Path) -> str:
    if not directory.is_dir():
        return "a file in its place" if directory.exists() else "no such directory"
    return ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "no files"


# ---- save ------------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Writes the model's adapter and its modules_to_save into a directory, and replaces an adapter that is there already.

    The model may be from `apply_lotr` or built by hand; DistributedDataParallel (process 0 writes) and compiled models are
    unwrapped. A merged adapter is saved as if it were not merged. A process that is killed during the save leaves the old or
    the new adapter, complete. Sharded models (FSDP2, ZeRO-3): `lotr_ext.sharded`.

    Warns about trained parameters that the directory lacks: those beside the adapter and modules_to_save, and tasks. Raises
    TypeError: no path, or tensors in parts; RuntimeError: no adapter, or one on the meta device; ValueError: a file.
    """
    path, inner, writes = checked_path(directory, "directory"), model, True
    while isinstance(inner, nn.parallel.DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        writes = writes and (hasattr(inner, "_orig_mod") or dist.get_rank(inner.process_group) == 0)
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    document, tensors = contents(inner)
    warn_of_unsaved(inner)
    if writes:
        write(path, document, tensors)


def warn_of_unsaved(model: nn.Module) -> None:
    """Warns about what is trained and not in the adapter's file."""
    own = {id(p) for layer in layers_in(model).values() for p in layer.adapter_parameters()}
    config = getattr(model, "lotr_config", None)
    own |= {id(p) for m in (saved_modules(model, config) if config else {}).values() for p in m.parameters()}
    beside = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own and not n.startswith(BESIDE)]
    if beside:
        warnings.warn(
            f"lotr_ext: save_adapter does not write {len(beside)} trained parameters that are neither the adapter's nor of "
            f"modules_to_save, such as {beside[0]}. Name their modules in modules_to_save, or save them separately.",
            stacklevel=3,
        )
    bank = getattr(model, "lotr_tasks", None)
    if bank is not None and len(bank) and any(p.requires_grad for p in bank.parameters()):
        tasks = ", ".join(str(task) for task in bank.taken.nonzero().flatten().tolist())
        warnings.warn(
            f"lotr_ext: save_adapter does not write the tasks {tasks} of the model's TaskBank, which are trained. Save each "
            f"with model.lotr_tasks.save(task, path).",
            stacklevel=3,
        )


def _whole(tensor: Tensor) -> Tensor:
    """tensor, if it is whole."""
    if hasattr(tensor, "ds_id") or any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__):
        raise TypeError("model: expected whole tensors, got a model held in parts. Save it with lotr_ext.sharded.save_adapter.")
    return tensor


@torch.no_grad()
def contents(model: nn.Module, tensor_of: Callable[[Tensor], Tensor] = _whole) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(document, tensors) of an adapter's files, for `write`. tensor_of: returns the whole tensor of one that may be in parts.

    Raises RuntimeError: no adapter, or one on the meta device.
    """
    layers, config = adapted_layers(model), getattr(model, "lotr_config", None)
    entries, own = _described(model, layers)
    tensors = {key: tensor_of(tensor) for key, tensor in own.items()}
    if nowhere := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise RuntimeError(f"model: expected tensors with values, got {nowhere[0]} on the meta device")
    if config is not None:
        dtypes = {layer.factors.A.value.dtype for layer in layers.values()}
        config = replace(config, adapter_dtype=dtypes.pop()) if len(dtypes) == 1 else config  # model.to(dtype) changes it
    document = {
        "format": "lotr",
        "format_version": VERSION,
        "lotr_ext_version": __version__,
        "config": None if config is None else config.to_dict(),
        "layers": entries,
        "modules_to_save": list(saved_modules(model, config)) if config else [],
    }
    return document, tensors


def _described(model: nn.Module, layers: Mapping[str, LoTRLayer]) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The entries of the layers, and the tensors of the adapter and of modules_to_save, by name. Tied ones are there once."""
    names = {m: f"{name}.value" for name, m in model.named_modules() if isinstance(m, LoTRFactor)}
    entries, tensors = {}, {}
    for name, layer in layers.items():
        for factor in (layer.factors.A, layer.factors.B):
            if factor not in names:
                raise RuntimeError(f"model: expected it to register the factors of {name!r}, got factors that no module owns")
            tensors |= {names[factor]: factor.value, start_key(names[factor]): factor.start}
        entries[name] = {
            "A": names[layer.factors.A],
            "B": names[layer.factors.B],
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "scaling": float(layer.scaling),
            "dropout": layer.dropout,
            "experts": getattr(layer, "num_experts", 0),
        }
        tensors |= {f"{name}.core": layer.core, f"{name}.start_core": layer.start_core}
        if "core_form" in layer._modules:
            tensors |= {f"{name}.core_form.{key}": t for key, t in layer.core_form.state_dict(keep_vars=True).items()}
    config, whole = getattr(model, "lotr_config", None), {"lotr_cores": getattr(model, "lotr_cores", nn.Module())}
    for name, module in (whole | saved_modules(model, config) if config else whole).items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict(keep_vars=True).items()}
    seen: set[int] = set()
    kept = {k: t for k, t in tensors.items() if isinstance(t, Tensor) and id(t) not in seen and not seen.add(id(t))}
    return entries, kept


# ---- load ------------------------------------------------------------------------------------------------------------


def load_adapter(model: Model, directory: str | PathLike[str], *, cast: bool = False) -> Model:
    """Loads a saved adapter into a model, and adapts the model first if needed.

    A plain base model is adapted as it was by `apply_lotr` when the adapter was saved. A model that is adapted already, by
    `apply_lotr` or by hand, must have the same layers, groups, shapes and dtypes. Its values are replaced in place (and with
    init "svd" the loaded start is subtracted from its base weights instead of its own).

    directory: a local folder written by `save_adapter`. cast: accept tensors of another dtype than the model's, and cast them.
    Returns the same model. Sharded models: `lotr_ext.sharded`.
    Raises TypeError, ValueError or RuntimeError, with the model unchanged: no such adapter; a truncated, foreign or newer file;
    layers, shapes or dtypes that do not fit the model; a merged model, or one with a TaskBank.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    document, tensors = read(checked_path(directory, "directory"))
    load_into(model, document, tensors, cast=cast)
    return model


def load_into(
    model: nn.Module,
    document: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    cast: bool = False,
    write_: Callable[[Tensor, Tensor], object] = lambda target, value: target.copy_(value),
) -> None:
    """`load_adapter` of what `read` returned. write_: puts a whole value into a tensor of the model that may be in parts."""
    with unchanged_on_error(model):
        if not layers_in(model):
            _adapt(model, document)
        targets = _check(model, document, tensors, cast)
    _fill(model, document, tensors, targets, write_)


def _adapt(model: nn.Module, document: Mapping[str, Any]) -> None:
    """Adapts a plain model as the file's was."""
    config, entries = document["config"], document["layers"]
    if config is None:
        raise ValueError(
            "model: expected one with LoTR layers like the one that the adapter was saved from, which was built by hand, got "
            "one without. Adapt it in the same way first."
        )
    modules = dict(model.named_modules())
    if missing := [n for n, entry in entries.items() if not entry["experts"] and n not in modules]:
        raise ValueError(
            f"model: expected the {len(entries)} layers of the adapter, got a {type(model).__name__} without "
            f"{', '.join(missing[:5])}. Load it into the base model that it was trained on."
        )
    linear = [re.escape(name) for name, entry in entries.items() if not entry["experts"]]
    experts = [re.sub(r"(^|\.)lotr\.([^.]+)$", r"\1\2", name) for name, entry in entries.items() if entry["experts"]]
    exact = replace(
        config,
        target_modules="|".join(linear) or None,
        target_parameters=experts or None,
        exclude_modules=None,
        group_by="width" if config.group_by == "width" else {n: f"{e['A']} {e['B']}" for n, e in entries.items()},
        init="kaiming" if config.init == "svd" else config.init,
    )
    selection = select(model, exact)
    install(model, exact, selection)
    model.lotr_config, model.lotr_left_out = config, {}
    for layer in layers_in(model).values():
        layer.set_trained(config.train)


def _check(
    model: nn.Module, document: Mapping[str, Any], tensors: Mapping[str, Tensor], cast: bool
) -> dict[str, Tensor | None]:
    """The model's tensor for each tensor of the file; None for one that is computed. Raises unless the file fits."""
    layers, entries, config = adapted_layers(model), document["layers"], getattr(model, "lotr_config", None)
    expect_unmerged(layers, "load_adapter")
    if hasattr(model, "lotr_tasks"):
        raise RuntimeError(
            "load_adapter: expected a model without a TaskBank, got one with a bank, whose tasks would change with the "
            "factors. Load the adapter first, or del model.lotr_tasks."
        )
    dense = config is None or config.core == "dense"  # computed cores depend on the order; a converted LoRA has its own order
    if (sorted if dense else list)(entries) != (sorted if dense else list)(layers):
        missing, extra = sorted(set(entries) - set(layers)), sorted(set(layers) - set(entries))
        raise ValueError(
            f"layers: expected the adapter's {len(entries)} layers in their order, got the model's {len(layers)}: not in the "
            f"model {', '.join(missing[:5]) or 'none'}; not in the adapter {', '.join(extra[:5]) or 'none'}"
        )
    described, own = _described(model, layers)
    for name, entry in described.items():
        keys = [key for key in ("in_features", "out_features", "experts") if entry[key] != entries[name][key]]
        if keys:
            want, got = (", ".join(f"{key} {of[key]}" for key in keys) for of in (entry, entries[name]))
            raise ValueError(f"{name}: expected {want} as in the model, got {got} in the adapter")
    pairs = {(entries[name][part], described[name][part], part) for name in layers for part in "AB"}
    if not len({file for file, _, _ in pairs}) == len({here for _, here, _ in pairs}) == len(pairs):
        raise ValueError("layers: expected factors that layers share as in the model, got other groups in the adapter")
    for file, here, part in pairs:
        found = {tensors[file].shape[-1]} if file in tensors and tensors[file].dim() else set()
        found |= set() if document["config"] is None else {document["config"].ranks[part == "B"]}
        if wrong := found - {(rank := getattr(own[here], "ds_shape", own[here].shape)[1])}:
            raise ValueError(
                f"rank: expected {rank} as in the model ({here}), got {max(wrong)} in the adapter. Load it into the plain "
                f"model: call unload(model) first."
            )
    saved = sorted(saved_modules(model, config)) if config else []
    if saved != sorted(document["modules_to_save"]):
        raise ValueError(f"modules_to_save: expected {saved} as in the model, got {sorted(document['modules_to_save'])}")
    to_file = {here: file for file, here, _ in pairs} | {start_key(here): start_key(file) for file, here, _ in pairs}
    targets: dict[str, Tensor | None] = {to_file.get(key, key): tensor for key, tensor in own.items()}
    for name, layer in layers.items():  # starts: those of the file, whatever the model's are
        A, B = layer.factors.A, layer.factors.B
        starts = {start_key(entries[name][part]): factor.value for part, factor in (("A", A), ("B", B))}
        starts[f"{name}.start_core"] = layer.core
        if has_start := not starts.keys().isdisjoint(tensors):
            layer._weight_to_write("load_adapter")
        targets = {k: t for k, t in targets.items() if k not in starts} | (starts if has_start else {})
        if hasattr(layer, "parametrizations") or "value" not in A._parameters or "value" not in B._parameters:
            raise TypeError(f"{name}: expected an adapter without parametrizations, got one. Remove them before loading.")
    _check_tensors(targets, tensors, cast)
    return targets | {f"{name}.core": None for name, layer in layers.items() if layer._parameters.get("core") is None}


def _check_tensors(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], cast: bool) -> None:
    """Raises ValueError for tensors of other names, shapes or, without cast, dtypes than the model's."""
    missing, foreign = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    if missing or foreign:
        raise ValueError(
            f"adapter: expected the model's {len(targets)} tensors, got {len(tensors)}: missing "
            f"{', '.join(missing[:5]) or 'none'}; not in the model {', '.join(foreign[:5]) or 'none'}"
        )
    for key, want in targets.items():
        got = tensors[key]
        shape = tuple(getattr(want, "ds_shape", want.shape))
        if shape != tuple(got.shape) or (want.dtype != got.dtype and not cast):
            advice = ". Pass cast=True to convert it." if shape == tuple(got.shape) else ""
            raise ValueError(
                f"{key}: expected {want.dtype} {list(shape)} as in the model, got {got.dtype} {list(got.shape)} in the "
                f"adapter{advice}"
            )
        if want.is_meta:
            raise RuntimeError(
                f"load_adapter: expected a model with values, got {key} on the meta device. Materialise it first."
            )


@torch.no_grad()
def _fill(
    model: nn.Module,
    document: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Tensor | None],
    write_: Callable[[Tensor, Tensor], object],
) -> None:
    """Writes the file's values, which `_check` has accepted, into the model."""
    layers, entries = layers_in(model), document["layers"]
    groups: dict[tuple[str, str], list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault((entry["A"], entry["B"]), []).append(name)
    for (A, B), names in groups.items():
        group = [layers[name] for name in names]
        if group[0].start_core is not None:
            set_start(group, None)
        for name, layer in zip(names, group):
            layer.scaling, layer.dropout = entries[name]["scaling"], float(entries[name]["dropout"])
        if start_key(A) in tensors:
            cores = torch.stack([tensors[f"{name}.start_core"] for name in names])
            set_start(group, (tensors[start_key(A)], tensors[start_key(B)], cores))
    for key, target in targets.items():
        if target is not None and ".start" not in key:
            write_(target, tensors[key])
