"""save_adapter: writes everything that was trained as safetensors and JSON into one directory.

Tensors have their names in the adapted model's state_dict: `lotr_factors.<group>.A` and `.B` per group, `<layer>.core` per
layer, with magnitudes `<layer>.magnitude`, with init "svd" `lotr_factors.<group>.start_A`, `.start_B` and `<layer>.start_core`,
and the parameters and buffers of modules_to_save. Format and writing: `adapter_files.py`; reading: `loading.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layers.factors import LoTRFactors
from ..layers.layer import LoTRLayer
from ..layers.sharded import Slot, agreed, holds_parts, inside_wrappers, whole, writing_rank
from . import adapter_files as files
from . import adapters
from .adapted import adapted_layers, layers_in
from .adapter_files import LayerEntry, Manifest
from .config import LoTRConfig
from .core_forms import CORES
from .fingerprint import fingerprint
from .parked import parked_adapter, parked_layers
from .pipeline import PipelineStages, expect_whole_model
from .saved import (
    BESIDE,
    adapter_slots,
    computed_tensors,
    configured,
    factor_prefix,
    module_prefixes,
    saved_modules,
    saved_tensors,
    ties_of,
)
from .stages import inner_model

__all__ = ["checked_path", "contents", "save_adapter", "unwrapped", "warn_of_unsaved", "write_adapter"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without its wrappers (DistributedDataParallel, FSDP1, DeepSpeed's engine, torch.compile) and without a
    SentenceTransformer around it, so that names have no prefixes."""
    return inner_model(inside_wrappers(model))


def checked_path(directory: object) -> Path:
    """directory as a Path; TypeError for anything else."""
    if not isinstance(directory, (str, PathLike)):
        raise TypeError(f"directory: expected a path, got {type(directory).__name__} {directory!r}")
    return Path(directory)


def save_adapter(model: nn.Module, directory: str | PathLike[str], *, name: str | None = None) -> None:
    """Writes the model's adapter and its modules_to_save into a directory, and replaces an adapter that is there already.

    name: which of several adapters (`add_adapter`); None: the active one.

    The model may be from `apply_lotr` or built by hand; compiled models are unwrapped. A merged adapter is saved as if it were
    not merged. A process that is killed during the save leaves the old or the new adapter, complete.

    DistributedDataParallel models are unwrapped too; if several processes call this, only process 0 writes. With FSDP, ZeRO-3
    or tensor parallelism all processes must call it (with FSDP1 for the FullyShardedDataParallel, with a pipeline for the
    `PipelineStages`): they gather the tensors, process 0 writes, and all wait for it.

    Warns about parameters that are trained beside the adapter and are not of modules_to_save: the directory lacks them.

    Raises:
        TypeError: no nn.Module, or no path. RuntimeError: no adapter, or one on the meta device; for a model in parts, an error
            in another process. ValueError: directory is a file.
    """
    warn_of_unsaved(model, "save_adapter")
    write_adapter(model, directory, name)


def warn_of_unsaved(model: object, caller: str) -> None:
    """Warns about trained parameters that an adapter's file lacks. `apply_lotr` had frozen them. Not of a model in parts."""
    if not isinstance(model, nn.Module) or holds_parts(inner := unwrapped(model)):
        return
    if beside := _trained_beside(inner):
        warnings.warn(
            f"lotr_ext: {caller} does not write {len(beside)} trained parameters that are neither the adapter's nor of "
            f"modules_to_save, such as {beside[0]}; name their modules in modules_to_save, or save them separately",
            stacklevel=3,
        )


def _trained_beside(model: nn.Module) -> list[str]:
    own = {id(p) for layer in layers_in(model).values() for p in layer.adapter_parameters()}
    own |= {id(p) for module in saved_modules(model).values() for p in module.parameters()}
    return [
        f"{at}.{name}" if at else name
        for at, owner in configured(model)
        for name, p in owner.named_parameters()
        if p.requires_grad and id(p) not in own and not name.startswith(BESIDE)
    ]


def write_adapter(model: nn.Module, directory: str | PathLike[str], name: str | None = None) -> None:
    """`save_adapter` without the warning, for callers that write what is trained beside the adapter."""
    stages = model if isinstance(model, PipelineStages) else [model]
    inner = [unwrapped(stage) for stage in stages]
    joined = stages is model
    together = joined or (isinstance(model, nn.Module) and holds_parts(inner[0]))

    def check() -> tuple[Path, list[list[Slot]], dict[str, str | None]]:
        if not joined:
            expect_whole_model(model, "save_adapter")
            adapted_layers(inner[0])  # raises if there are none
        return checked_path(directory), [adapter_slots(one) for one in inner], {} if joined else ties_of(inner[0])

    def write() -> None:
        manifest, tensors = contents(inner[0], name, tied) if found is None else found
        if writing_rank(model, together):
            files.write(path, manifest, tensors)

    path, slots, tied = agreed("save_adapter", check, together=together)
    with ExitStack() as gathered:
        for stage, own in zip(stages, slots):
            gathered.enter_context(whole(stage, own))
        found = stages.gathered("save_adapter", lambda: [_contents(one, name, {}) for one in inner]) if joined else None
        agreed("save_adapter", write, together=together)


@torch.no_grad()
def contents(
    model: nn.Module, name: str | None = None, tied: Mapping[str, str | None] | None = None
) -> tuple[Manifest, dict[str, Tensor]]:
    """The manifest and tensors of an adapter's file. name: None for the active one. tied: `ties_of` a model that was gathered
    since. The tensors are not copied.

    Raises:
        RuntimeError: no adapter, or one on the meta device. TypeError, ValueError: no adapter of that name.
    """
    adapted_layers(model)  # raises if there are none
    return _contents(model, name, ties_of(model) if tied is None else tied)


def _contents(model: nn.Module, name: str | None, tied: Mapping[str, str | None]) -> tuple[Manifest, dict[str, Tensor]]:
    layers = layers_in(model)
    prefixes, saved = module_prefixes(model, layers), saved_modules(model)
    config, beside = _config_of(model, layers), saved_tensors(saved)
    tensors: dict[str, Tensor] = {}
    if name is None or name == adapters.active_adapter(model):
        held = [(m.factors, m.core, m.magnitude, m.scaling, m.dropout) for m in layers.values()]
        tensors |= computed_tensors(layers, prefixes)
    else:
        parked = parked_adapter(model, name)
        held = parked_layers(model, parked)
        if parked.made is not None:
            tensors |= {f"{CORES}.{key}": t for key, t in parked.made.state_dict(keep_vars=True).items()}
        config, beside = parked.config, dict(zip(beside, parked.saved, strict=True))
    entries = {}
    for (at, layer), (factors, core, magnitude, scaling, dropout) in zip(layers.items(), held, strict=True):
        prefix = factor_prefix(prefixes, layer.factors)
        entry = entries[at] = LayerEntry(
            prefix, layer.in_features, layer.out_features, float(scaling), dropout, getattr(layer, "num_experts", 0)
        )
        for part in ("A", "B", "start_A", "start_B"):
            if entry.tensor(part) not in tensors and (value := getattr(factors, part)) is not None:
                tensors[entry.tensor(part)] = value
        tensors[f"{at}.core"] = core
        if magnitude is not None:
            tensors[f"{at}.magnitude"] = magnitude
        if layer.start_core is not None:
            tensors[f"{at}.start_core"] = layer.start_core
    tensors |= beside
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise RuntimeError(f"model: expected tensors with values, got {key} on the meta device")
    return Manifest(_as_it_is(config, held), entries, tuple(saved), fingerprint(layers), tied), tensors


def _config_of(model: nn.Module, layers: Mapping[str, LoTRLayer]) -> LoTRConfig | None:
    """The config of a model, or of its only adapted part. None for layers built by hand, several parts, or a part whose cores
    are computed, which cannot be loaded without it."""
    owners = [owner for _, owner in configured(model)]
    if len(owners) != 1:
        return None
    (owner,) = owners
    whole_part = owner.lotr_config.core == "dense" and len(layers_in(owner)) == len(layers)
    return owner.lotr_config if owner is model or whole_part else None


def _as_it_is(config: object, held: Iterable[tuple[LoTRFactors, Tensor, Tensor | None, float, float]]) -> LoTRConfig | None:
    """config with the dtype that the adapter has now, which `model.to(dtype)` changes; None for a model built by hand."""
    if not isinstance(config, LoTRConfig):
        return None
    dtypes = {t.dtype for factors, core, *_ in held for t in (factors.A, factors.B, core)}
    return replace(config, adapter_dtype=dtypes.pop()) if len(dtypes) == 1 else config
