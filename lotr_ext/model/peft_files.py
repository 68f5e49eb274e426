"""Reads and writes, without PEFT, the folder that PEFT writes for a LoTRPeftConfig. Uses the Manifest of `adapter_files`.

adapter_config.json          the configuration, and `layers`: each layer's factors and sizes, in the model's order
adapter_model.safetensors    base_model.lotr_factors.<group>.A, .B; base_model.lotr_cores.<parameter>;
                             base_model.model.<layer>.lotr_adapter.core, .magnitude; base_model.model.<module of
                             modules_to_save>...
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import folder, parse_json, placed, read_bytes, together
from ..layers.cores import FORMS
from ..layers.settings import Settings
from . import adapter_files
from .adapter_files import JSON_NAME, LayerEntry, Manifest, check_shapes, manifest_of, serialized, tensors_of
from .config import LoTRConfig, check_task
from .core_forms import CORES, form_at, make_cores
from .experts import parameter_name
from .names import name_ends_with
from .saved import of_adapted_part, without_ties

__all__ = ["described_layers", "lotr_to_peft", "read_either"]

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
_OWN = re.compile(r"base_model\.model\.(?P<layer>.+)\.lotr_adapter\.(?P<part>core|magnitude)")
_SHARED = re.compile(r"base_model\.(?P<name>lotr_(?:factors|cores)\..+)")
SAME = ("rank", "alpha", "rslora", "scaling", "dropout", "group_by", "init", "core_init", "core", "train", "magnitude")


def described_layers(layers: Mapping[str, LayerEntry]) -> list[dict[str, Any]]:
    """The list `layers` of the configuration: a list, since PEFT sorts keys, and cores that layers share need their order."""
    told = ("factors", "in_features", "out_features", "experts")
    return [{"name": name, **{key: getattr(entry, key) for key in told}} for name, entry in layers.items()]


def read_either(directory: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """The adapter in directory, written by `save_adapter` or by PEFT.

    Raises:
        ValueError: as `adapter_files.read`; a PEFT folder of another method, or with biases.
    """
    if (directory / JSON_NAME).exists() or not (directory / CONFIG_NAME).exists():
        return adapter_files.read(directory)
    path = directory / CONFIG_NAME
    with together(directory):
        try:
            content = parse_json(read_bytes(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: expected JSON, got something else ({error})") from None
        kind = content.get("peft_type") if isinstance(content, dict) else None
        if kind != "LOTR":
            raise ValueError(
                f"{path}: expected peft_type 'LOTR', got {kind!r}; convert a LoRA with python -m lotr_ext.convert "
                f"lora-to-lotr {directory} DESTINATION"
            )
        try:
            stored = tensors_of(directory / TENSORS_NAME, read_bytes(directory / TENSORS_NAME))
        except OSError as error:
            raise ValueError(f"{path}: expected {TENSORS_NAME} beside it, got none ({error.strerror})") from None
    try:
        return _adapter(path, content, stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _adapter(path: Path, content: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[Manifest, dict[str, Tensor]]:
    if content.get("bias", "none") != "none":
        raise ValueError(f"bias: expected 'none', got {content['bias']!r}: the files of save_adapter have no biases")
    if not isinstance(content.get("layers"), list) or not all(isinstance(one, dict) for one in content["layers"]):
        raise ValueError(
            "layers: expected the adapted layers, got none: the folder was written by an earlier version; load it with PEFT "
            "and save it again"
        )
    tensors = {_name(key): tensor for key, tensor in stored.items()}
    settings = {name: content[name] for name in SAME if name in content}
    checked = LoTRConfig(**{name: tuple(v) if name == "rank" and isinstance(v, list) else v for name, v in settings.items()})
    own = {"scaling": Settings.of(checked).scale(checked.rank), "dropout": checked.dropout}
    layers = {str(one.get("name")): {**one, **own} for one in content["layers"]}
    known = {f"{name}.{part}" for name in layers for part in ("core", "magnitude")}
    saved = [key for key in tensors if key not in known and not key.startswith(("lotr_factors.", f"{CORES}."))]
    modules = _modules(saved, content.get("modules_to_save"))
    adapters = [t for key, t in tensors.items() if key.startswith("lotr_factors.")]
    config = {
        **settings,
        "target_modules": [name for name, one in layers.items() if not one.get("experts")] or None,
        "target_parameters": [parameter_name(name) for name, one in layers.items() if one.get("experts")] or None,
        "modules_to_save": modules or None,
        "adapter_dtype": str(adapters[0].dtype).removeprefix("torch.") if adapters else "float32",
    }
    manifest = manifest_of(path, {"config": config, "layers": layers, "modules_to_save": modules, "tied": {}})
    if manifest.config.core in FORMS:
        tensors |= _made(manifest, tensors)
    check_shapes(manifest, tensors)
    return manifest, tensors


def _name(key: str) -> str:
    """The name in `save_adapter`'s files of a tensor of PEFT's file."""
    if (found := _OWN.fullmatch(key)) is not None:
        return f"{found['layer']}.{found['part']}"
    if (found := _SHARED.fullmatch(key)) is not None:
        return found["name"]
    if not key.startswith("base_model.model.") or ".lotr_adapter." in key:
        raise ValueError(f"adapter: expected factors, cores and modules_to_save, got {key}")
    return key.removeprefix("base_model.model.")


def _modules(saved: list[str], endings: object) -> list[str]:
    """The modules of modules_to_save that own the tensors of these names."""
    if not isinstance(endings or [], list) or not all(isinstance(ending, str) for ending in endings or []):
        raise ValueError(f"modules_to_save: expected a list of names, got {endings!r}")
    modules = []
    for key in saved:
        parts = key.split(".")
        around = [".".join(parts[:i]) for i in range(1, len(parts))]
        found = [name for name in around if any(name_ends_with(name, ending) for ending in endings or [])]
        if not found:
            raise ValueError(f"adapter: expected factors, cores and modules_to_save, got {key}")
        modules += [name for name in found if name not in modules]
    return modules


@torch.no_grad()
def _made(manifest: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The core of each layer, computed from the file's tensors."""
    form = make_cores(manifest.config, list(manifest.layers), "meta")
    stored = {key: tensors.get(f"{CORES}.{key}") for key in form.state_dict()}
    for key, want in form.state_dict().items():
        if (got := stored[key]) is None or got.shape != want.shape or not got.is_floating_point():
            got = "none" if got is None else f"{got.dtype} {list(got.shape)}"
            raise ValueError(f"{CORES}.{key}: expected floating values {list(want.shape)} as configured, got {got}")
    form.load_state_dict(stored, assign=True)
    return {f"{name}.core": form_at(form, name)().clone() for name in manifest.layers}


# ---- written ---------------------------------------------------------------------------------------------------------


def lotr_to_peft(
    source: str | PathLike[str], directory: str | PathLike[str], *, task_type: str | None = None
) -> dict[str, LayerEntry]:
    """Writes the adapter in `source` in PEFT's format, for `PeftModel.from_pretrained`. Needs no model.

    Returns:
        The layers, by name.

    Raises:
        ValueError: no such adapter; directory is a file; an unknown task_type; an adapter that PEFT does not support: of a
            model built by hand, with a start in the base weights (init "svd"), with cores from a callable, or with several
            scalings or dropouts.
        OSError: the disk.
    """
    task_type = check_task(task_type)
    manifest, tensors = read_either(Path(source))
    config = manifest.config
    if config is None:
        raise ValueError("source: expected an adapter from apply_lotr, got one of a model built by hand")
    if any(key.endswith((".start_core", ".start_A", ".start_B", ".start")) for key in tensors):
        raise ValueError('source: expected another init than "svd", whose start is part of the base weights, got "svd"')
    if config.core == "custom":
        raise ValueError('source: expected cores of a named form, got "custom"')
    if (part := of_adapted_part(manifest, {})[0]) != "":
        raise ValueError(
            f"source: expected an adapter of the whole model, got one of its part {part!r}; save the adapter of this part alone"
        )
    same = {(entry.scaling, entry.dropout) for entry in manifest.layers.values()}
    if len(same) > 1:
        raise ValueError(f"source: expected one scaling and dropout for all layers, got {sorted(same)}")
    (scaling, dropout), experts = same.pop(), [n for n, entry in manifest.layers.items() if entry.experts]
    beside, also = _beside(manifest, tensors)
    saved = sorted({*manifest.modules_to_save, *also})
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name in SAME}
    linear = [name for name in manifest.layers if name not in experts]
    content = {
        "peft_type": "LOTR",
        "inference_mode": True,
        "task_type": task_type,
        "base_model_name_or_path": None,
        "bias": "none",
        **values,
        "r": config.rank,
        "alpha": None,
        "rslora": False,
        "scaling": scaling,
        "dropout": dropout,
        "init": config.init if config.init != "gradient" else "orthonormal",  # the values are in the file
        "target_modules": "|".join(map(re.escape, linear)) if linear else None,
        "target_parameters": [parameter_name(name) for name in experts] or None,
        "modules_to_save": [n for n in saved if not any(n.startswith(f"{other}.") for other in saved)] or None,
        "layers": described_layers(manifest.layers),
    }
    stored = _stored(manifest, tensors) | {f"base_model.model.{key}": t for key, t in beside.items()}
    text = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    with folder(Path(directory)), together(Path(directory)):
        with placed(Path(directory), {TENSORS_NAME: serialized(stored), CONFIG_NAME: text}, apart=CONFIG_NAME):
            pass
    return manifest.layers


def _stored(manifest: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by PEFT's names."""
    shared = {entry.tensor(part) for entry in manifest.layers.values() for part in "AB"}
    made = manifest.config.core in FORMS
    stored = {f"base_model.{key}": t for key, t in tensors.items() if key in shared or (made and key.startswith(f"{CORES}."))}
    if not made:
        stored |= {f"base_model.model.{name}.lotr_adapter.core": tensors[f"{name}.core"] for name in manifest.layers}
    if manifest.config.magnitude:
        stored |= {f"base_model.model.{name}.lotr_adapter.magnitude": tensors[f"{name}.magnitude"] for name in manifest.layers}
    return stored


def _beside(manifest: Manifest, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """`without_ties` of the file's modules_to_save."""
    saved = tuple(f"{name}." for name in manifest.modules_to_save)
    return without_ties({key: t for key, t in tensors.items() if saved and key.startswith(saved)}, manifest.tied or {})
