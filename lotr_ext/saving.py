"""save_adapter and push_to_hub: from a model to a file.

    a model  ->  `adapter_of`: an AdapterState  ->  its file (adapter_state.py)

Where a model has the values of its adapter:

    factors             A and B, which layers share
    cores               a parameter of each layer; or computed, by the module `core_form` of a layer
                        or from the parameters of model.lotr_cores
    starts              with init "svd", the A, B and core that were subtracted from a base weight
    modules_to_save     all of their parameters and buffers

Not here: the way back (loading.py), what identifies a base model (base_model.py), models in several
processes (sharded.py).
"""

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adapted import adapted_layers, layers_in
from .adapter_state import AdapterState, LayerEntry, start_key
from .base_model import BaseModel, Gather, parameters_in_file
from .cores import CoreAt
from .factors import LoTRFactor
from .layers import LoTRLayer
from .sharded_tensors import expect_full, full_tensors_in, imported_class
from .storage import FilePath
from .targets import saved_in, tied_names


def save_adapter(model: nn.Module, directory: FilePath) -> None:
    """Writes a model's adapter and its modules_to_save into a directory, atomically.

    An adapter that is there already is replaced. A merged adapter is saved as if it were not
    merged. Sharded models (FSDP2, ZeRO-3): `lotr_ext.sharded`.

    Args:
        model: From `apply_lotr` or built by hand. DistributedDataParallel (process 0 writes) and
            compiled models are unwrapped.
        directory: Created if it does not exist.

    Raises:
        TypeError: If directory is not a path, or a tensor is sharded.
        RuntimeError: If the model has no adapter, or torch cannot copy it from the meta device.
        FileExistsError: If directory is a file.
        OSError: If a file cannot be written. The directory then has the old adapter or the new one.

    Warns:
        UserWarning: If trained parameters are not saved: those that are neither the adapter's nor
            of modules_to_save, and tasks.
    """
    path = Path(directory)
    inner, writes = unwrap(model)
    # In every process, so that all of them raise for a model that cannot be saved.
    adapter = adapter_of(inner)
    warn_of_unsaved(inner)
    if writes:
        adapter.write(path)


def push_to_hub(model: nn.Module, repo_id: str, **options: Any) -> str:
    """Uploads a model's adapter to a repository on a hub, from which `load_adapter` loads it.

    Args:
        model: As for `save_adapter`. If several processes train it, only process 0 may call this:
            the others write no file, and would upload an empty folder.
        repo_id: "user/name". The repository is created if it does not exist.
        options: For `huggingface_hub.create_repo`, such as private and token.

    Returns:
        The URL of the commit.

    Raises:
        ImportError: If huggingface_hub is not installed.
        TypeError, RuntimeError: As for `save_adapter`.
    """
    from huggingface_hub import HfApi

    # With the token, which the upload needs as well as the creation.
    api = HfApi(token=options.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        api.create_repo(repo_id, exist_ok=True, **options)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


# ---- the adapter of a model ----------------------------------------------------------------------


@torch.no_grad()
def adapter_of(model: nn.Module, gather: Gather = expect_full) -> AdapterState:
    """Returns the adapter of a model.

    Args:
        model: An adapted model, not wrapped.
        gather: Returns the full tensor of one that may be sharded.

    Raises:
        TypeError: If a tensor is sharded, with the default gather.
        RuntimeError: If the model has no adapter.
    """
    layers = adapted_layers(model)
    entries = _entries_of(model, layers)
    # All processes gather in the same order, which is the model's.
    tensors = {key: gather(tensor) for key, tensor in stored_tensors(model, entries).items()}
    for name, layer in layers.items():
        # A file has the value of every core, so that conversions and vLLM need not compute it.
        if f"{name}.core" not in tensors:
            tensors[f"{name}.core"] = _full_core(layer, gather)
        if layer.start_core is not None:
            start = (layer.factors.A.start, layer.factors.B.start, layer.start_core)
            tensors |= zip(start_keys(name, entries[name]), map(gather, start))
    config = getattr(model, "lotr_config", None)
    dtypes = {layer.factors.A.value.dtype for layer in layers.values()}
    if config is not None and len(dtypes) == 1:
        # model.to(dtype) casts the factors, and leaves the configuration as it was.
        config = replace(config, adapter_dtype=dtypes.pop())
    return AdapterState(
        config=config,
        layers=entries,
        modules_to_save=tuple(saved_in(model)),
        base=BaseModel.of(model, gather),
        tensors=tensors,
        tied=tied_to_saved(model),
    )


def _entries_of(model: nn.Module, layers: Mapping[str, LoTRLayer]) -> dict[str, LayerEntry]:
    """Returns the entry of each layer. A factor is named after the module that registers it."""
    names = {m: name for name, m in model.named_modules() if isinstance(m, LoTRFactor)}
    return {
        name: LayerEntry(
            A=f"{names[layer.factors.A]}.value",
            B=f"{names[layer.factors.B]}.value",
            scaling=float(layer.scaling),
            dropout=layer.dropout,
            experts=layer.num_experts,
        )
        for name, layer in layers.items()
    }


def stored_tensors(model: nn.Module, entries: Mapping[str, LayerEntry]) -> dict[str, Tensor]:
    """Returns the tensors of a model that a save reads and a load overwrites, by name.

    They may be sharded. Starts and computed cores are absent: a file has them, too, but a load does
    not copy them into a tensor of the model.

    Args:
        model: An adapted model.
        entries: The names of A and B of each layer, in which a file may differ from the model.
    """
    tensors: dict[str, object] = {}
    modules: dict[str, nn.Module] = {}  # their state dicts are stored
    for name, layer in layers_in(model).items():
        tensors[entries[name].A] = layer.factors.A.value
        tensors[entries[name].B] = layer.factors.B.value
        if layer.core_source() is None:
            tensors[f"{name}.core"] = layer.core
        if "core_form" in layer._modules:
            modules[f"{name}.core_form"] = layer.core_form
    if hasattr(model, "lotr_cores"):
        modules["lotr_cores"] = model.lotr_cores
    modules |= saved_in(model)
    for name, module in modules.items():
        tensors |= module.state_dict(prefix=f"{name}.", keep_vars=True)
    # A tied tensor keeps only its first name. A state dict may also have extra state that is
    # not a tensor.
    first_names: dict[Tensor, str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            first_names.setdefault(tensor, name)
    return {name: tensor for tensor, name in first_names.items()}


def _full_core(layer: LoTRLayer, gather: Gather) -> Tensor:
    """Returns the core of a layer: gathered, or computed from gathered parameters."""
    source = layer.core_source()
    if source is None:
        return gather(layer.core)
    if isinstance(source, CoreAt):
        with full_tensors_in(source.cores, gather):
            return source.cores.make(source.index)
    with full_tensors_in(source, gather):
        return source()


def start_keys(name: str, entry: LayerEntry) -> tuple[str, str, str]:
    """Returns the names, in a file, of the A, B and core with which init "svd" started a layer."""
    return start_key(entry.A), start_key(entry.B), f"{name}.start_core"


def tied_to_saved(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of parameters that share memory with one of modules_to_save."""
    tied = tied_names(model)  # by module
    inside = [module for saved in saved_in(model).values() for module in saved.modules()]
    return tuple(sorted({name for module in inside for name in tied.get(module, ())}))


# ---- wrappers, and what is not saved -------------------------------------------------------------


def unwrap(model: nn.Module) -> tuple[nn.Module, bool]:
    """Takes a model out of DistributedDataParallel, torch.compile and DeepSpeed's engine.

    Returns:
        The model, and whether this process writes its files: with a wrapper for several processes,
        only process 0 does.
    """
    writes = True
    wrappers = (
        nn.parallel.DistributedDataParallel,
        imported_class("deepspeed.runtime.engine", "DeepSpeedEngine"),
    )
    while hasattr(model, "_orig_mod") or isinstance(model, wrappers):
        # torch.compile's wrapper also has `module` if the wrapped model has, so it comes first.
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            writes = dist.get_rank(getattr(model, "process_group", None)) == 0
            model = model.module
    return model, writes


def warn_of_unsaved(model: nn.Module) -> None:
    """Warns about what is trained and absent from the adapter's file."""
    saved = parameters_in_file(model)
    unsaved = [n for n, p in model.named_parameters() if p.requires_grad and p not in saved]
    if unsaved:
        warnings.warn(
            f"lotr_ext: save_adapter does not write {len(unsaved)} trained parameters that are "
            f"neither the adapter's nor of modules_to_save, such as {unsaved[0]}. Name their "
            f"modules in modules_to_save, or save them separately, tasks with "
            f"model.lotr_tasks.save(task, path).",
            stacklevel=3,
        )
