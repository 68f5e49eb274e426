"""load_adapter: from a file into a model.

    a folder, or a hub  ->  an AdapterState (adapter_state.py)  ->  `load_state`:

        adapt   a plain model, as the saved one was
        check   that layers, shared factors, ties, tensors and the base model fit
        copy    values, scalings and dropout

All that can fail comes before the copies, which cannot be undone. With init "svd" a layer has a
start: A, B and a core that were subtracted from its base weight. The file has these three next to
the trained ones, so that a load can change the weight, too.

Not here: the way from a model to a file (saving.py), models in several processes (sharded.py).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .adapted import Model, layers_in, unmerged_layers
from .adapter_state import AdapterState
from .base_model import Gather, refuse_or_warn
from .config import LoTRConfig
from .factors import LoTRFactor
from .layers import LoTRLayer
from .model import install, set_start, unchanged_on_error
from .saving import start_keys, stored_tensors, tied_to_saved
from .sharded_tensors import copy_full, expect_full, full_shape
from .storage import FilePath, expect_names
from .targets import parameter_name, select

Strictness = bool | Literal["targets"]


def load_adapter(
    model: Model,
    directory: FilePath,
    *,
    cast: bool = False,
    strict: Strictness = "targets",
) -> Model:
    """Loads a saved adapter into a model, and adapts the model first if needed.

    A plain base model is first adapted as `apply_lotr` had adapted the saved one. A model that is
    adapted already, by `apply_lotr` or by hand, must have the same layers, groups, shapes and
    dtypes, and its values are replaced in place. With init "svd", its start is added back to the
    base weights and the loaded one is subtracted. Sharded models: `lotr_ext.sharded`.

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
        OSError: If the path cannot be looked up, for example without permission.

    Warns:
        UserWarning: If strict allows a difference.
    """
    load_state(model, AdapterState.read(local_folder(directory)), cast=cast, strict=strict)
    return model


def local_folder(directory: FilePath) -> Path:
    """Returns the folder with an adapter, downloaded if directory is the id of a hub's repository.

    Raises:
        TypeError: If directory is not a path.
        ValueError: If there is no such folder and no such repository.
    """
    path = Path(directory)
    may_be_id = isinstance(directory, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", directory)
    if path.exists() or not may_be_id:
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(directory, allow_patterns=["lotr_adapter*"]))
    except (ImportError, OSError, ValueError) as error:  # the hub's errors are OSError, ValueError
        raise ValueError(
            f"directory: expected a folder or the id of a repository on a hub, got {directory!r}: "
            f"no such folder, and {type(error).__name__} {error!s:.300}"
        ) from None


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
        model: Plain or adapted, not wrapped.
        state: The adapter.
        cast: As for `load_adapter`, as is strict.
        gather: Returns the full tensor of one that may be sharded.
    """
    if not isinstance(strict, bool) and strict != "targets":
        raise ValueError(f'strict: expected True, False or "targets", got {strict!r}')
    with unchanged_on_error(model):
        if not layers_in(model):
            _adapt_as_saved(model, state, refuse_other_targets=bool(strict))
        layers = unmerged_layers(model, "load_adapter")
        _check_can_load(model, layers)
        expect_names("layers", layers, state.layers)
        _check_order(model, layers, state)
        _check_sharing(layers, state)
        _check_ties(model, state)
        model_tensors = stored_tensors(model, state.layers)
        _check_tensors(model_tensors | _tensors_like_starts(layers, state), layers, state, cast)
        state.base.check(model, gather, refuse=strict is True)
    _copy_to(model, layers, state, model_tensors)


# ---- adapting a plain model ----------------------------------------------------------------------


def _adapt_as_saved(model: nn.Module, state: AdapterState, refuse_other_targets: bool) -> None:
    """Adapts a plain model as the saved one was. Values are copied later."""
    config = state.config
    if config is None:
        raise ValueError(
            "model: expected one with LoTR layers like the one that the adapter was saved "
            "from, which was built by hand, got one without. Adapt it in the same way first."
        )
    modules = dict(model.named_modules())
    linear = [name for name, entry in state.layers.items() if not entry.experts]
    missing = [name for name in linear if name not in modules]
    # `select` would find that, too, and show a regular expression with all names.
    if missing:
        raise ValueError(
            f"model: expected the {len(state.layers)} layers of the adapter, got a "
            f"{type(model).__name__} without {', '.join(missing[:5])}. Load it into the base "
            f"model that it was trained on."
        )
    selection = select(model, _exact_config(state, linear))
    left_out = _check_targets(model, state, refuse_other_targets)
    install(model, selection)
    # What the user chose, not the names of all layers with which the model was adapted here.
    model.lotr_config = config
    model.lotr_left_out = left_out


def _exact_config(state: AdapterState, linear: list[str]) -> LoTRConfig:
    """Returns the configuration that selects exactly the layers and groups of the adapter."""
    experts = [parameter_name(name) for name, entry in state.layers.items() if entry.experts]
    # A mapping gives a layer one group for both factors. With "width", A and B have different
    # groups.
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


def _check_targets(model: nn.Module, state: AdapterState, refuse: bool) -> dict[str, list[str]]:
    """Refuses a plain model in which the configuration selects more layers, or warns of it.

    Returns:
        The layers that the configuration matches and that get no adapter, by reason.
    """
    # By shape, because a mapping in the configuration has no group for an extra layer.
    selection = select(model, replace(state.config, group_by="shape"))
    extra = [target.name for target in selection.targets if target.name not in state.layers]
    if extra:
        message = (
            f"layers: expected a model in which the adapter's configuration selects its "
            f"{len(state.layers)} layers, got one with {len(extra)} more, such as {extra[0]}. "
            f"Load it into the base model that it was trained on, or pass strict=False to "
            f"leave these layers without an adapter."
        )
        refuse_or_warn(message, refuse, stacklevel=7)
        selection.left_out["not in the loaded adapter"] = extra
    return selection.left_out


# ---- checks --------------------------------------------------------------------------------------


def _check_can_load(model: nn.Module, layers: Mapping[str, LoTRLayer]) -> None:
    """Checks that the values of an adapted model may be replaced."""
    # A task is only cores. With other factors it would compute something else.
    if hasattr(model, "lotr_tasks"):
        raise RuntimeError(
            "load_adapter: expected a model without a TaskBank, got one with a bank. Load "
            "the adapter first, or del model.lotr_tasks."
        )
    for name, layer in layers.items():
        # A parametrized tensor is computed in each read, so a copy into it would be lost.
        if any(hasattr(m, "parametrizations") for m in (layer, layer.factors.A, layer.factors.B)):
            raise TypeError(
                f"{name}: expected an adapter without parametrizations, got one. Remove them "
                f"before loading."
            )


def _check_order(model: nn.Module, layers: Mapping[str, LoTRLayer], state: AdapterState) -> None:
    """Checks that layers with computed cores, which depend on the order, have the file's order."""
    config = getattr(model, "lotr_config", None)
    if config is not None and config.core != "dense" and list(state.layers) != list(layers):
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
    """Checks that the model ties parameters of modules_to_save as the saved one did.

    Of two tied parameters only one is in the file. In a model that does not tie them, the other
    would keep the base's value.
    """
    if state.tied is None:  # the file is of a version that did not store it
        return
    tied = tied_to_saved(model)
    # Names that the model lacks do not matter, such as a head's.
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # Not an intersection: a set would raise for a list in a damaged file.
    saved_tied = sorted(name for name in present if name in state.tied)
    if saved_tied != list(tied):
        raise ValueError(
            f"modules_to_save: expected parameters tied as in the model, to "
            f"{', '.join(tied) or 'no other'}, got {', '.join(saved_tied) or 'no other'} in the "
            f"adapter. Load it into the base model that it was trained on."
        )


def _tensors_like_starts(layers: Mapping[str, LoTRLayer], state: AdapterState) -> dict[str, Tensor]:
    """Returns, by the name of each start in the file, a tensor of the shape and dtype it must have.

    Raises:
        TypeError: If a start could not be subtracted from the weight of its layer, or the model's
            could not be added back.
    """
    like_starts: dict[str, Tensor] = {}
    for name, layer in layers.items():
        keys = start_keys(name, state.layers[name])
        has_start = not state.tensors.keys().isdisjoint(keys)
        if has_start or layer.start_core is not None:
            layer._weight_to_write("load_adapter")  # for its check
        # A layer with a computed core has no start, so a file with one has a name too many.
        if has_start and layer.core_source() is None:
            like_starts |= zip(keys, (layer.factors.A.value, layer.factors.B.value, layer.core))
    return like_starts


def _check_tensors(
    expected: Mapping[str, Tensor],
    layers: Mapping[str, LoTRLayer],
    state: AdapterState,
    cast: bool,
) -> None:
    """Checks that the adapter has the tensors of an adapted model.

    Args:
        expected: Tensors of the model, by the names in the file, with the right shape and dtype.
        layers: The layers by name.
        state: The adapter.
        cast: Whether dtypes may differ.
    """
    # A file has the value of every core, also where the model computes it from parameters.
    names = expected.keys() | {f"{name}.core" for name in layers}
    expect_names("tensors", names, state.tensors)
    for key, target in expected.items():
        tensor = state.tensors[key]
        shape = full_shape(target)
        if shape != tuple(tensor.shape) or (target.dtype != tensor.dtype and not cast):
            raise ValueError(
                f"{key}: expected {target.dtype} {list(shape)} as in the model, got {tensor.dtype} "
                f"{list(tensor.shape)}. For another dtype pass cast=True; for another rank load "
                f"the adapter into the plain model, after unload(model)."
            )
        # torch copies into a meta tensor without an error and without an effect.
        if target.is_meta:
            raise RuntimeError(
                f"load_adapter: expected a model with values, got {key} on the meta device. "
                f"Materialize it first."
            )


# ---- copying -------------------------------------------------------------------------------------


def _copy_to(
    model: nn.Module,
    layers: Mapping[str, LoTRLayer],
    state: AdapterState,
    model_tensors: Mapping[str, Tensor],
) -> None:
    """Copies scalings, dropout, starts and values into an adapted model that fits.

    Args:
        model: The model.
        layers: Its layers by name.
        state: The adapter.
        model_tensors: The model's tensors by the names in the file.
    """
    # In all layers first: a start is added back with the scaling and factors with which it was
    # subtracted, and the next loop replaces them.
    for layer in layers.values():
        layer.add_start_back()
    for name, entry in state.layers.items():
        layer = layers[name]
        layer.scaling = entry.scaling
        layer.dropout = entry.dropout
        layer.factors.A.start = None
        layer.factors.B.start = None
        keys = start_keys(name, entry)
        if keys[0] in state.tensors:
            set_start(layer, *(state.tensors[key] for key in keys))
    for key, target in model_tensors.items():
        copy_full(target, state.tensors[key])
    config = getattr(model, "lotr_config", None)
    first = next(iter(state.layers.values()))
    # An equal configuration stays, because alpha tells a reader more than the scaling does.
    if config is not None and (config.s, config.dropout) != (first.scaling, first.dropout):
        model.lotr_config = replace(
            config, alpha=None, rslora=False, scaling=first.scaling, dropout=first.dropout
        )
