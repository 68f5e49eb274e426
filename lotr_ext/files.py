"""save_adapter and load_adapter: an adapter in one directory, one JSON file and one safetensors file.

    lotr_adapter.json                   format version, configuration, layers, name and checksum of the other file
    lotr_adapter.<digits>.safetensors   the tensors, by their names in the adapted model's state_dict: `lotr_factors.<i>.value`,
                                        `<layer>.core`, `lotr_cores.*`, the tensors of modules_to_save; with init "svd" also
                                        `lotr_factors.<i>.start` and `<layer>.start_core`

A save writes the tensors under a new random name, then the JSON under a temporary one, and renames it over the old one: a
process that is killed before leaves the old adapter, one that is killed after it the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import __version__
from .adapted import adapted_layers, expect_unmerged, layers_in
from .config import DIAGONAL, LoTRConfig
from .factors import LoTRFactor
from .layers import LoTRLayer
from .model import install, set_start, unchanged_on_error
from .targets import saved_modules, select

__all__ = ["contents", "load_adapter", "load_into", "read", "save_adapter", "write"]

Model = TypeVar("Model", bound=nn.Module)
JSON_NAME, VERSION = "lotr_adapter.json", 2  # version 1: of lotr_ext 0.1.0 before its first release
_TENSORS = re.compile(r"lotr_adapter\.[0-9a-f]{16}\.safetensors")


# ---- files -----------------------------------------------------------------------------------------------------------


def checked_path(path: object, name: str) -> Path:
    """path as a Path; TypeError for anything else."""
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"{name}: expected a path, got {type(path).__name__} {path!r:.80}")
    return Path(path)


def expect_names(what: str, want: Collection[str], got: Collection[str]) -> None:
    """Raises ValueError unless `got`, names in a file, are those of the model."""
    missing, foreign = sorted(set(want) - set(got)), sorted(map(str, set(got) - set(want)))
    if missing or foreign:
        raise ValueError(
            f"{what}: expected the model's {len(want)}, got {len(got)}: missing {', '.join(missing[:5]) or 'none'}; not in the "
            f"model {', '.join(foreign[:5]) or 'none'}"
        )


def put_file(directory: Path, name: str, data: bytes) -> None:
    """Writes data into directory/name, whole or not at all."""
    temporary = directory / f"lotr.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, directory / name)
    finally:
        temporary.unlink(missing_ok=True)


def put_tensors(
    directory: Path, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> str:
    """Writes a safetensors file, whole or not at all, and returns its checksum. Creates the directory if needed."""
    from safetensors.torch import save

    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: expected a directory or a new path, got the file {directory}")
    data = save(
        {
            k: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, t in tensors.items()
        },
        metadata,
    )
    directory.mkdir(parents=True, exist_ok=True)
    put_file(directory, name, data)
    return hashlib.sha256(data).hexdigest()


def tensors_in(
    path: Path, name: str, sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. ValueError, with the argument's name, for any other file, or one with
    another checksum. Nothing in the file is ever executed."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        if sha256 is not None and (got := hashlib.sha256(data).hexdigest()) != sha256:
            raise ValueError(f"sha256 {got} instead of {sha256}: truncated, or another file")
        return load(data), json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get(
            "__metadata__"
        ) or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{name}: expected a safetensors file {path}, got {error}") from None


def checksum(tensors: Iterable[tuple[str, Tensor]], start: bytes = b"") -> str:
    """SHA-256 of start, and of the names, shapes, dtypes and values of tensors."""
    digest = hashlib.sha256(start)
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def json_in(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file. ValueError, with the argument's name, for any other file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: expected a JSON file {path}, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected a JSON object in {path}, got {content!r:.80}")
    return content


def write(directory: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter (`contents`) into a directory, which it creates if needed; other files in it stay. Raises ValueError:
    directory is a file; OSError: the disk, and the adapter that was there is unchanged."""
    try:
        before = _document(directory)["tensors_file"]
    except ValueError:
        before = None
    name = f"lotr_adapter.{secrets.token_hex(8)}.safetensors"  # random: no other save writes or removes it
    described = {
        **document,
        "tensors_file": name,
        "tensors_sha256": put_tensors(directory, name, tensors, {"format": "pt"}),
    }
    put_file(
        directory, JSON_NAME, (json.dumps(described, indent=2, allow_nan=False) + "\n").encode()
    )
    if before is not None:
        (directory / before).unlink(missing_ok=True)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of an adapter, checked: format, version, the types of entries, the tensors' checksum.

    Raises ValueError that names the file, what was expected and what was found.
    """
    document = _document(directory)
    return document, tensors_in(
        directory / document["tensors_file"], "directory", document["tensors_sha256"]
    )[0]


def _document(directory: Path) -> dict[str, Any]:
    """The content of the JSON file, checked, in the form of the newest version, with a LoTRConfig."""
    path = directory / JSON_NAME
    if not path.exists():
        raise ValueError(
            f"directory: expected a local folder with {JSON_NAME}, got {str(directory)!r}. Download an adapter from a hub "
            f"first (huggingface_hub.snapshot_download)."
        )
    content = json_in(path, "directory")
    kind, version = content.get("format"), content.get("format_version")
    if kind != "lotr" or version not in (1, VERSION):
        raise ValueError(
            f"{path}: expected format lotr of version up to {VERSION}, got {kind!r:.80} of version {version!r:.80}, written by "
            f"lotr_ext {content.get('lotr_ext_version')!r:.80}. A newer lotr_ext reads a newer version."
        )
    try:
        config, layers = content["config"], content["layers"]
        if config is not None:
            content["config"] = LoTRConfig.from_dict(
                config_of_version_1(config) if version == 1 else config
            )
        for name, entry in layers.items():
            A, B = (
                _factors_of_version_1(entry["factors"])
                if version == 1
                else (entry["A"], entry["B"])
            )
            numbers = {"scaling": float(entry["scaling"]), "dropout": float(entry["dropout"])}
            layers[name] = {
                **entry,
                **numbers,
                "A": A,
                "B": B,
                "experts": int(entry.get("experts", 0)),
            }
        if not _TENSORS.fullmatch(content["tensors_file"]):
            raise ValueError(
                f"tensors_file: expected lotr_adapter.<digits>.safetensors, got {content['tensors_file']!r}"
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected an adapter that save_adapter wrote, got {type(error).__name__} {error}"
        ) from None
    return content


def config_of_version_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 had a scaling None, which meant alpha / r with alpha = r; "auto" for other initial factors; and magnitudes."""
    found = dict(values)
    if found.pop("magnitude", False):
        raise ValueError("magnitude: expected False, got True, which this version does not have")
    found["train"] = [
        part for part in found.get("train", ("A", "B", "core")) if part != "magnitude"
    ]
    if found.get("init") == "gradient":
        found["init"] = "orthonormal"
    if found.get("scaling") is None:
        found["scaling"] = 1.0 if found.get("alpha") is None and not found.get("rslora") else "auto"
    elif found["scaling"] == "auto":
        rank = found.get("rank", 16)
        r = max(rank) if isinstance(rank, list) else rank
        found["scaling"] = 4.0 * (8 / r) ** (0.5 if found.get("core") in DIAGONAL else 1.5)
    return found


def _factors_of_version_1(factors: str | list[str]) -> tuple[str, str]:
    """The names of A and B: of a pair's two tensors, or of two modules."""
    return (
        (f"{factors}.A", f"{factors}.B")
        if isinstance(factors, str)
        else (f"{factors[0]}.value", f"{factors[1]}.value")
    )


def start_key(key: str) -> str:
    """The name of a factor's start; version 1 had a pair's in one module."""
    owner, _, own = key.rpartition(".")
    return f"{owner}.start" if own == "value" else f"{owner}.start_{own}"


# ---- save ------------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Writes the model's adapter and its modules_to_save into a directory, and replaces an adapter that is there already.

    The model may be from `apply_lotr` or built by hand; DistributedDataParallel (process 0 writes) and compiled models are
    unwrapped. A merged adapter is saved as if it were not merged. A process that is killed during the save leaves the old or
    the new adapter, complete. Sharded models (FSDP2, ZeRO-3): `lotr_ext.sharded`.

    Warns about trained parameters that the directory lacks: those beside the adapter and modules_to_save, and tasks. Raises
    TypeError: no path, or tensors in parts; RuntimeError: no adapter, or one on the meta device; ValueError: a file.
    """
    path, (inner, writes) = checked_path(directory, "directory"), unwrapped(model)
    document, tensors = contents(inner)
    warn_of_unsaved(inner)
    if writes:
        write(path, document, tensors)


def unwrapped(model: nn.Module, *engines: Any) -> tuple[nn.Module, bool]:
    """(the model in DistributedDataParallel, torch.compile and engines, whether this process writes its files)."""
    writes = True
    while isinstance(model, (nn.parallel.DistributedDataParallel, *engines)) or hasattr(
        model, "_orig_mod"
    ):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            writes = dist.get_rank(model.process_group) == 0
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model, writes


def warn_of_unsaved(model: nn.Module) -> None:
    """Warns about what is trained and not in the adapter's file."""
    own = {id(p) for layer in layers_in(model).values() for p in layer.adapter_parameters()}
    config = getattr(model, "lotr_config", None)
    own |= {
        id(p)
        for m in (saved_modules(model, config) if config else {}).values()
        for p in m.parameters()
    }
    beside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if beside:
        warnings.warn(
            f"lotr_ext: save_adapter does not write {len(beside)} trained parameters that are neither the adapter's nor of "
            f"modules_to_save, such as {beside[0]}. Name their modules in modules_to_save, or save them separately, tasks with "
            f"model.lotr_tasks.save(task, path).",
            stacklevel=3,
        )


def _whole(tensor: Tensor) -> Tensor:
    """tensor, if it is whole."""
    if hasattr(tensor, "ds_id") or any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__):
        raise TypeError(
            "model: expected whole tensors, got a model held in parts. Save it with lotr_ext.sharded.save_adapter."
        )
    return tensor


@torch.no_grad()
def contents(
    model: nn.Module, tensor_of: Callable[[Tensor], Tensor] = _whole
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(document, tensors) of an adapter's files, for `write`. tensor_of: returns the whole tensor of one that may be in parts.

    Raises RuntimeError: no adapter, or one on the meta device.
    """
    layers, config = adapted_layers(model), getattr(model, "lotr_config", None)
    entries, own = _described(model, layers)
    tensors = {key: tensor_of(tensor) for key, tensor in own.items()}
    if nowhere := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise RuntimeError(
            f"model: expected tensors with values, got {nowhere[0]} on the meta device"
        )
    if config is not None:
        dtypes = {layer.factors.A.value.dtype for layer in layers.values()}
        config = (
            replace(config, adapter_dtype=dtypes.pop()) if len(dtypes) == 1 else config
        )  # model.to(dtype) changes it
    document = {
        "format": "lotr",
        "format_version": VERSION,
        "lotr_ext_version": __version__,
        "config": None if config is None else config.to_dict(),
        "layers": entries,
        "modules_to_save": list(saved_modules(model, config)) if config else [],
    }
    return document, tensors


def _described(
    model: nn.Module, layers: Mapping[str, LoTRLayer]
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The entries of the layers, and the tensors of the adapter and of modules_to_save, by name. Tied ones are there once."""
    names = {m: f"{name}.value" for name, m in model.named_modules() if isinstance(m, LoTRFactor)}
    entries, tensors = {}, {}
    for name, layer in layers.items():
        for factor in (layer.factors.A, layer.factors.B):
            tensors |= {names[factor]: factor.value, start_key(names[factor]): factor.start}
        entries[name] = {
            "A": names[layer.factors.A],
            "B": names[layer.factors.B],
            "scaling": float(layer.scaling),
            "dropout": layer.dropout,
            "experts": getattr(layer, "num_experts", 0),
        }
        tensors |= {f"{name}.core": layer.core, f"{name}.start_core": layer.start_core}
        if "core_form" in layer._modules:
            tensors |= {
                f"{name}.core_form.{key}": t
                for key, t in layer.core_form.state_dict(keep_vars=True).items()
            }
    config, whole = (
        getattr(model, "lotr_config", None),
        {"lotr_cores": getattr(model, "lotr_cores", nn.Module())},
    )
    for name, module in (whole | saved_modules(model, config) if config else whole).items():
        tensors |= {
            f"{name}.{key}": value for key, value in module.state_dict(keep_vars=True).items()
        }
    seen: set[int] = set()
    kept = {
        k: t
        for k, t in tensors.items()
        if isinstance(t, Tensor) and id(t) not in seen and not seen.add(id(t))
    }
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


@torch.no_grad()
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
    layers, groups = layers_in(model), {}
    for name, entry in document["layers"].items():
        layers[name].dropout = entry["dropout"]
        groups.setdefault((entry["A"], entry["B"]), []).append(name)
    for (A, B), names in groups.items():
        group = [layers[name] for name in names]
        if group[0].start_core is not None:
            set_start(group, None)
        for name in names:
            layers[name].scaling = document["layers"][name]["scaling"]
        if start_key(A) in tensors:
            cores = torch.stack([tensors[f"{name}.start_core"] for name in names])
            set_start(group, (tensors[start_key(A)], tensors[start_key(B)], cores))
    for key, target in targets.items():
        write_(target, tensors[key])


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
    experts = [
        re.sub(r"(^|\.)lotr\.([^.]+)$", r"\1\2", name)
        for name, entry in entries.items()
        if entry["experts"]
    ]
    exact = replace(
        config,
        target_modules="|".join(linear) or None,
        target_parameters=experts or None,
        exclude_modules=None,
        group_by="width"
        if config.group_by == "width"
        else {n: f"{e['A']} {e['B']}" for n, e in entries.items()},
        init="kaiming" if config.init == "svd" else config.init,
    )
    selection = select(model, exact)
    install(model, exact, selection)
    model.lotr_config, model.lotr_left_out = config, {}
    for layer in layers_in(model).values():
        layer.set_trained(config.train)


def _check(
    model: nn.Module, document: Mapping[str, Any], tensors: Mapping[str, Tensor], cast: bool
) -> dict[str, Tensor]:
    """The model's parameters and buffers by their names in the file. Raises unless the file fits, whose starts may differ."""
    layers, entries, config = (
        adapted_layers(model),
        document["layers"],
        getattr(model, "lotr_config", None),
    )
    expect_unmerged(layers, "load_adapter")
    if hasattr(model, "lotr_tasks"):
        raise RuntimeError(
            "load_adapter: expected a model without a TaskBank, got one with a bank, whose tasks would change with the "
            "factors. Load the adapter first, or del model.lotr_tasks."
        )
    expect_names("layers", layers, entries)
    if config is not None and config.core != "dense" and list(entries) != list(layers):
        raise ValueError(
            "layers: expected the model's order, on which computed cores depend, got another in the adapter"
        )
    described, own = _described(model, layers)
    pairs = {(entries[name][part], described[name][part]) for name in layers for part in "AB"}
    if not len({file for file, _ in pairs}) == len({here for _, here in pairs}) == len(pairs):
        raise ValueError(
            "layers: expected factors that layers share as in the model, got other groups in the adapter"
        )
    to_file = {here: file for file, here in pairs}
    targets = {
        to_file.get(key, key): t
        for key, t in own.items()
        if not key.endswith((".start", ".start_core"))
    }
    starts: dict[str, Tensor] = {}
    for name, layer in layers.items():
        A, B = layer.factors.A, layer.factors.B
        if any(hasattr(module, "parametrizations") for module in (layer, A, B)):
            raise TypeError(
                f"{name}: expected an adapter without parametrizations, got one. Remove them before loading."
            )
        like = {
            start_key(entries[name]["A"]): A.value,
            start_key(entries[name]["B"]): B.value,
            f"{name}.start_core": layer.core,
        }
        if not like.keys().isdisjoint(tensors):
            layer._weight_to_write("load_adapter")
            starts |= like
    _check_tensors(targets | starts, tensors, cast)
    computed = {
        f"{name}.core" for name, layer in layers.items() if layer._parameters.get("core") is None
    }
    return {key: tensor for key, tensor in targets.items() if key not in computed}


def _check_tensors(
    targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], cast: bool
) -> None:
    """Raises ValueError for tensors of other names, shapes or, without cast, dtypes than the model's."""
    expect_names("tensors", targets, tensors)
    for key, want in targets.items():
        got = tensors[key]
        shape = tuple(getattr(want, "ds_shape", want.shape))
        if shape != tuple(got.shape) or (want.dtype != got.dtype and not cast):
            raise ValueError(
                f"{key}: expected {want.dtype} {list(shape)} as in the model, got {got.dtype} {list(got.shape)}. For "
                f"another dtype pass cast=True; for another rank load the adapter into the plain model, after unload(model)."
            )
        if want.is_meta:
            raise RuntimeError(
                f"load_adapter: expected a model with values, got {key} on the meta device. Materialise it first."
            )
