"""save_adapter, load_adapter and push_to_hub: adapters between models, folders and hubs.

    save_adapter    a model -> `adapter_of`: an AdapterState -> its file
    load_adapter    the file -> an AdapterState -> `load_state`: adapts a plain model as the saved
                    one was, checks that the adapter fits, and only then copies its values

With init "svd" a layer has a start, which was subtracted from its base weight: A, B and a core. The
file has these three tensors next to the trained ones, so that a load can move the weight, too.

Not here: an adapter's file (adapter_state.py), what identifies a base model (base_model.py), models
in several processes (sharded.py).
"""

import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adapted import Model, adapted_layers, layers_in, unmerged_layers
from .adapter_state import AdapterState, LayerEntry
from .base_model import BaseModel, Gather, parameters_in_file, refuse_or_warn
from .config import LoTRConfig
from .cores import CoreAt
from .factors import LoTRFactor
from .layers import LoTRLayer
from .model import install, set_start, unchanged_on_error
from .old_files import start_key
from .sharded_tensors import copy_full, expect_full, full_shape, full_tensors_in, imported_class
from .storage import expect_names
from .targets import parameter_name, saved_in, select, tied_names

Strictness = bool | Literal["targets"]


def save_adapter(model: nn.Module, directory: str | PathLike[str]) -> None:
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

    Warns:
        UserWarning: If trained parameters are not saved: those that are neither the adapter's nor
            of modules_to_save, and tasks.
    """
    path = Path(directory)
    inner, writes = unwrap(model)
    # In every process, so that a model that cannot be saved is an error in all of them.
    adapter = adapter_of(inner)
    warn_of_unsaved(inner)
    if writes:
        adapter.write(path)


def load_adapter(
    model: Model,
    directory: str | PathLike[str],
    *,
    cast: bool = False,
    strict: Strictness = "targets",
) -> Model:
    """Loads a saved adapter into a model, and adapts the model first if needed.

    A plain base model is adapted as it was by `apply_lotr` when the adapter was saved. A model that
    is adapted already, by `apply_lotr` or by hand, must have the same layers, groups, shapes and
    dtypes. Its values are replaced in place (and with init "svd" the loaded start is subtracted
    from its base weights instead of the present one). Sharded models: `lotr_ext.sharded`.

    Args:
        model: The base model, or an adapted one.
        directory: A folder that `save_adapter` wrote, or the id of a repository on a hub
            ("user/name"), which huggingface_hub downloads.
        cast: Whether tensors of another dtype than the model's are accepted, and cast.
        strict: "targets" refuses a plain model in which the adapter's configuration selects more
            layers than the adapter has, and warns of another base model. True refuses both, False
            warns of both.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError, RuntimeError: If there is no such adapter; if its file is damaged or
            newer; if layers, shapes, dtypes or ties do not fit the model; if the model is merged or
            has a TaskBank. The model is then unchanged.

    Warns:
        UserWarning: If strict allows a difference.
    """
    load_state(model, AdapterState.read(local_folder(directory)), cast=cast, strict=strict)
    return model


# ---- a hub ---------------------------------------------------------------------------------------


def push_to_hub(model: nn.Module, repo_id: str, **options: Any) -> str:
    """Uploads a model's adapter to a repository on a hub, from which `load_adapter` loads it.

    Args:
        model: As for `save_adapter`.
        repo_id: "user/name". The repository is created if it does not exist.
        options: For `huggingface_hub.create_repo`, such as private and token.

    Returns:
        The address of the commit.

    Raises:
        ImportError: If huggingface_hub is not installed.
        TypeError, RuntimeError: As `save_adapter`.
    """
    from huggingface_hub import HfApi

    # With the token, which the upload needs as well as the creation.
    api = HfApi(token=options.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        api.create_repo(repo_id, exist_ok=True, **options)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def local_folder(directory: str | PathLike[str]) -> Path:
    """Returns the folder with an adapter, which is downloaded if directory is the id of a hub.

    Raises:
        TypeError: If directory is not a path.
        ValueError: If there is no such folder and no such repository.
    """
    path = Path(directory)
    is_id = isinstance(directory, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", directory)
    if path.exists() or not is_id:
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(directory, allow_patterns=["lotr_adapter*"]))
    except (ImportError, OSError, ValueError) as error:  # the hub's errors are OSError, ValueError
        raise ValueError(
            f"directory: expected a folder or the id of a repository on a hub, got {directory!r}: "
            f"no such folder, and {type(error).__name__} {error!s:.300}"
        ) from None


# ---- from a model --------------------------------------------------------------------------------


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
    tensors = {key: gather(tensor) for key, tensor in _tensors_of(model, entries).items()}
    for name, layer in layers.items():
        # Computed cores are in the file by value, too: conversions and vLLM need no form for them.
        if f"{name}.core" not in tensors:
            tensors[f"{name}.core"] = _full_core(layer, gather)
        if layer.start_core is not None:
            starts = (layer.factors.A.start, layer.factors.B.start, layer.start_core)
            tensors |= zip(_start_keys(name, entries[name]), map(gather, starts))
    config = getattr(model, "lotr_config", None)
    dtypes = {layer.factors.A.value.dtype for layer in layers.values()}
    if config is not None and len(dtypes) == 1:
        # model.to(dtype) has not changed the configuration.
        config = replace(config, adapter_dtype=dtypes.pop())
    return AdapterState(
        config=config,
        layers=entries,
        modules_to_save=tuple(saved_in(model)),
        base=BaseModel.of(model, gather),
        tensors=tensors,
        tied=_tied_to_saved(model),
    )


def _tied_to_saved(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of parameters that share memory with one of modules_to_save."""
    tied = tied_names(model)
    children = [child for module in saved_in(model).values() for child in module.modules()]
    return tuple(sorted({name for child in children for name in tied.get(child, ())}))


def _start_keys(name: str, entry: LayerEntry) -> tuple[str, str, str]:
    """Returns the names of A, B and the core with which a layer started by init "svd"."""
    return start_key(entry.A), start_key(entry.B), f"{name}.start_core"


def _entries_of(model: nn.Module, layers: Mapping[str, LoTRLayer]) -> dict[str, LayerEntry]:
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


def _tensors_of(model: nn.Module, entries: Mapping[str, LayerEntry]) -> dict[str, Tensor]:
    """Returns the tensors that a file has of a model and that a load replaces, by name.

    They may be sharded. A core that a module computes is absent, and so are starts.
    """
    tensors: dict[str, object] = {}
    modules: dict[str, nn.Module] = {}  # all of whose tensors belong to the adapter
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
    # A tied tensor keeps only its first name. A module's extra state is not a tensor.
    first_names: dict[Tensor, str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            first_names.setdefault(tensor, name)
    return {name: tensor for tensor, name in first_names.items()}


def _full_core(layer: LoTRLayer, gather: Gather) -> Tensor:
    """Returns the core, which a module computes from full parameters, or which layers share."""
    source = layer.core_source()
    if source is None:
        return gather(layer.core)
    if isinstance(source, CoreAt):
        with full_tensors_in(source.cores, gather):
            return source.cores.make(source.index)
    with full_tensors_in(source, gather):
        return source()


def unwrap(model: nn.Module) -> tuple[nn.Module, bool]:
    """Takes a model out of DistributedDataParallel, torch.compile and DeepSpeed's engine.

    Returns:
        The model, and whether this process writes its files.
    """
    writes = True
    wrappers = (
        nn.parallel.DistributedDataParallel,
        imported_class("deepspeed.runtime.engine", "DeepSpeedEngine"),
    )
    while hasattr(model, "_orig_mod") or isinstance(model, wrappers):
        # torch.compile's wrapper passes `module` on to what it wraps, so its name comes first.
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


# ---- into a model --------------------------------------------------------------------------------


@torch.no_grad()
def load_state(
    model: nn.Module,
    state: AdapterState,
    *,
    cast: bool = False,
    strict: Strictness = "targets",
    gather: Gather = expect_full,
) -> None:
    """Loads an adapter into a model, as `load_adapter` does.

    Args:
        model: Not wrapped.
        state: The adapter.
        cast: As for `load_adapter`, as is strict.
        gather: Returns the full tensor of one that may be sharded.
    """
    if not isinstance(strict, bool) and strict != "targets":
        raise ValueError(f'strict: expected True, False or "targets", got {strict!r}')
    # All that can fail comes before the copies, which cannot be undone.
    with unchanged_on_error(model):
        if not layers_in(model):
            _adapt_as_saved(model, state, refuse_other_targets=bool(strict))
        model_tensors = _matching_tensors(model, state, cast)
        state.base.check(model, gather, refuse=strict is True)
    _copy_to(model, state, model_tensors)


def _adapt_as_saved(model: nn.Module, state: AdapterState, refuse_other_targets: bool) -> None:
    """Adapts a plain model as the saved one was."""
    config = state.config
    if config is None:
        raise ValueError(
            "model: expected one with LoTR layers like the one that the adapter was saved "
            "from, which was built by hand, got one without. Adapt it in the same way first."
        )
    modules = dict(model.named_modules())
    linear = [name for name, entry in state.layers.items() if not entry.experts]
    missing = [name for name in linear if name not in modules]
    # Before `select`, whose error would show a regular expression with all names.
    if missing:
        raise ValueError(
            f"model: expected the {len(state.layers)} layers of the adapter, got a "
            f"{type(model).__name__} without {', '.join(missing[:5])}. Load it into the base "
            f"model that it was trained on."
        )
    selection = select(model, _exact_config(state, linear))
    _check_targets(model, state, refuse_other_targets)
    install(model, selection)
    # What the user chose, not the names of all layers with which the model was adapted here.
    model.lotr_config = config
    model.lotr_left_out = {}


def _exact_config(state: AdapterState, linear: list[str]) -> LoTRConfig:
    """Returns the configuration that selects exactly the layers and groups of the adapter."""
    experts = [parameter_name(name) for name, entry in state.layers.items() if entry.experts]
    # With "width", other layers share a layer's A than share its B, which no mapping can express.
    pairs = {name: f"{entry.A} {entry.B}" for name, entry in state.layers.items()}
    return replace(
        state.config,
        # An expression for full names. A list would also match other names that end with one.
        target_modules="|".join(map(re.escape, linear)) or None,
        target_parameters=experts or None,
        exclude_modules=None,
        group_by="width" if state.config.group_by == "width" else pairs,
        init="kaiming",  # the cheapest: loaded values replace the factors
    )


def _check_targets(model: nn.Module, state: AdapterState, refuse: bool) -> None:
    """Refuses a plain model in which the configuration selects more layers, or warns of it."""
    # The groups do not matter here, and a mapping to groups lacks the layers that are too many.
    selection = select(model, replace(state.config, group_by="shape"))
    extra = [target.name for target in selection.targets if target.name not in state.layers]
    if extra:
        message = (
            f"layers: expected a model in which the adapter's configuration selects its "
            f"{len(state.layers)} layers, got one with {len(extra)} more, such as {extra[0]}. "
            f"Load it into the base model that it was trained on, or pass strict=False to "
            f"leave these layers without an adapter."
        )
        refuse_or_warn(message, refuse)


def _matching_tensors(model: nn.Module, state: AdapterState, cast: bool) -> dict[str, Tensor]:
    """Checks that the adapter fits an adapted model, and returns what it replaces.

    Returns:
        The parameters and buffers of the model by the names of the adapter's tensors.
    """
    layers = unmerged_layers(model, "load_adapter")
    _check_can_load(model, layers)
    expect_names("layers", layers, state.layers)
    _check_order(model, layers, state)
    _check_sharing(layers, state)
    _check_ties(model, state)
    # By the names in the file, where factors may have other names than in the model.
    model_tensors = _tensors_of(model, state.layers)
    expected = model_tensors | _expected_starts(state, layers)
    # A file has the value of every core, also where the model computes it from parameters.
    names = expected.keys() | {f"{name}.core" for name in layers}
    expect_names("tensors", names, state.tensors)
    for key, tensor in expected.items():
        _check_tensor(key, tensor, state.tensors[key], cast)
    return model_tensors


def _check_can_load(model: nn.Module, layers: Mapping[str, LoTRLayer]) -> None:
    """Checks that the values of an adapted model may be replaced."""
    # A task is only cores. With other factors it would compute something else.
    if hasattr(model, "lotr_tasks"):
        raise RuntimeError(
            "load_adapter: expected a model without a TaskBank, got one with a bank. Load "
            "the adapter first, or del model.lotr_tasks."
        )
    for name, layer in layers.items():
        # Of a parametrized tensor, a copy would change a value that is computed anew.
        modules = (layer, layer.factors.A, layer.factors.B)
        if any(hasattr(module, "parametrizations") for module in modules):
            raise TypeError(
                f"{name}: expected an adapter without parametrizations, got one. Remove them "
                f"before loading."
            )


def _check_order(model: nn.Module, layers: Mapping[str, LoTRLayer], state: AdapterState) -> None:
    config = getattr(model, "lotr_config", None)
    has_computed_cores = config is not None and config.core != "dense"
    if has_computed_cores and list(state.layers) != list(layers):
        raise ValueError(
            "layers: expected the model's order, on which computed cores depend, got another "
            "one in the adapter"
        )


def _check_sharing(layers: Mapping[str, LoTRLayer], state: AdapterState) -> None:
    """Checks that layers share the same factors in the model and in the file."""
    pairs: set[tuple[LoTRFactor, str]] = set()
    for name, layer in layers.items():
        entry = state.layers[name]
        pairs |= {(layer.factors.A, entry.A), (layer.factors.B, entry.B)}
    factors = {factor for factor, _ in pairs}
    names = {name for _, name in pairs}
    # Equal numbers mean that each factor has one name and each name one factor.
    if not len(factors) == len(names) == len(pairs):
        raise ValueError(
            f"layers: expected layers that share {len(factors)} factors as in the model, got "
            f"others that share {len(names)} in the adapter"
        )


def _check_ties(model: nn.Module, state: AdapterState) -> None:
    """Checks that the model ties parameters of modules_to_save as the saved one did."""
    if state.tied is None:
        return
    tied = _tied_to_saved(model)
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    saved_tied = sorted(name for name in present if name in state.tied)
    if saved_tied != list(tied):
        # Of two tied parameters only one is in the file. The other would keep the base's value.
        raise ValueError(
            f"modules_to_save: expected parameters tied as in the model, to "
            f"{', '.join(tied) or 'no other'}, got {', '.join(saved_tied) or 'no other'} in the "
            f"adapter. Load it into the base model that it was trained on."
        )


def _expected_starts(state: AdapterState, layers: Mapping[str, LoTRLayer]) -> dict[str, Tensor]:
    """Returns for each start of init "svd" a tensor of the model with its shape and dtype."""
    starts: dict[str, Tensor] = {}
    for name, layer in layers.items():
        keys = _start_keys(name, state.layers[name])
        if state.tensors.keys().isdisjoint(keys):
            continue
        core = layer._parameters.get("core")
        if core is None:
            raise ValueError(f"{name}: expected a computed core, got one that starts by init 'svd'")
        # Raises here, before anything changes, if the start could not be subtracted from W.
        layer._weight_to_write("load_adapter")
        starts |= zip(keys, (layer.factors.A.value, layer.factors.B.value, core))
    return starts


def _check_tensor(key: str, target: Tensor, tensor: Tensor, cast: bool) -> None:
    """Checks that a tensor of a file fits the model's."""
    shape = full_shape(target)
    if shape != tuple(tensor.shape) or (target.dtype != tensor.dtype and not cast):
        raise ValueError(
            f"{key}: expected {target.dtype} {list(shape)} as in the model, got {tensor.dtype} "
            f"{list(tensor.shape)}. For another dtype pass cast=True; for another rank load the "
            f"adapter into the plain model, after unload(model)."
        )
    # torch copies into such a tensor without an error and without an effect.
    if target.is_meta:
        raise RuntimeError(
            f"load_adapter: expected a model with values, got {key} on the meta device. "
            f"Materialize it first."
        )


def _copy_to(model: nn.Module, state: AdapterState, model_tensors: Mapping[str, Tensor]) -> None:
    """Copies scalings, dropout, starts and values into an adapted model that fits."""
    layers = layers_in(model)
    # For all layers before the next loop, which replaces scalings and shared starts: a start is
    # given back with the scaling and the factors with which it was subtracted.
    for layer in layers.values():
        layer.give_start_back()
    for name, entry in state.layers.items():
        layer = layers[name]
        layer.scaling = entry.scaling
        layer.dropout = entry.dropout
        layer.factors.A.start = None
        layer.factors.B.start = None
        start_keys = _start_keys(name, entry)
        if start_keys[0] in state.tensors:
            set_start(layer, *(state.tensors[key] for key in start_keys))
    for key, tensor in model_tensors.items():
        copy_full(tensor, state.tensors[key])
    config = getattr(model, "lotr_config", None)
    first = next(iter(state.layers.values()))
    # An equal configuration stays: its alpha says more than the number that follows from it.
    if config is not None and (config.s, config.dropout) != (first.scaling, first.dropout):
        model.lotr_config = replace(
            config, alpha=None, rslora=False, scaling=first.scaling, dropout=first.dropout
        )
