"""Puts adapters into whole models: apply_lotr, disabled. `merging.py` merges them and takes them out.

After `apply_lotr(model, config)` every targeted layer is a `LoTRLayer` in its old place, with its old state_dict keys and
`core`. The factors of all groups are registered once, as `model.lotr_factors[group]`; the layers hold unregistered references.
So state_dict has `lotr_factors.<group>.A`, `lotr_factors.<group>.B` and `<layer>.core` beside the base model's keys; with
group_by="width" `lotr_factors.A_<in_features>.value` and `lotr_factors.B_<out_features>.value`. Parameters that make the cores
of several layers (LoTRConfig.core) are registered once, as `model.lotr_cores`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..autograd.tensor_parallel import is_dtensor
from ..layers.cores import Cores
from ..layers.factors import LoTRFactors
from ..layers.gradient import Loss, write_factors
from ..layers.init import fill_core_
from ..layers.layer import LoTRLayer
from ..layers.merging import write_
from ..layers.placement import home
from ..layers.request import OFF, in_force
from ..layers.settings import Settings
from ..layers.sharded import agree_over
from ..layers.uninterrupted import uninterrupted
from ..layers.wrapped import LoTRWrapped, layer_class
from .adapted import adapted_layers, expect_merged
from .batching import hook_batching
from .config import LoTRConfig
from .core_forms import form_at, make_cores
from .experts import adapt_parameter
from .first_step import expect_training
from .heads import warn_of_frozen_heads, with_head
from .readers import hook_fusing
from .save_hook import hook_saving, tell_holder
from .scope import attach_scope
from .shared_factors import SharedFactors
from .sizes import check_memory
from .stages import inner_model
from .starts import Start, directions, probed_layers, set_fast_paths, set_start, svd_starts
from .targets import Selection, Target, select

__all__ = ["apply_lotr", "disabled", "install"]

Model = TypeVar("Model", bound=nn.Module)


def apply_lotr(
    model: Model,
    config: LoTRConfig,
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    progress: bool = True,
) -> Model:
    """Adapts a model in place: y = x W^T + bias + s ((x A) G_l) B^T for each targeted layer l (arXiv 2402.01376), and with
    target_parameters for each expert of a transformers mixture.

    The layers' weights and all other parameters are frozen, except modules_to_save. Each group gets one pair A [K, r_in],
    B [N, r_out] and each layer a core [r_in, r_out], in config.adapter_dtype. The model's output does not change at first (with
    init "svd" except for one rounding of each weight).

    Args:
        model: any nn.Module with nn.Linear layers, transformers' Conv1D, or named modules that have in_features and
            out_features (those are wrapped, and their own forward is called). Layers with hooks or parametrizations are
            wrapped too. A layer that is registered in several places stays one layer. In a SentenceTransformer the
            transformers model inside is adapted, and names are relative to it.
        config: what to adapt and how.
        batches: for a start from the gradient only, as in `init_from_gradient`. If they are given and neither A nor B is
            trained, the default init becomes "gradient".
        loss: for a start from the gradient only, as in `init_from_gradient`.
        progress: whether a start from the gradient shows a progress bar.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError, RuntimeError: a model that is adapted already, wrapped or compiled; targets, exclusions or
            modules_to_save that match nothing; a target that is not linear, that shares its weight with another module, or
            whose weight is read without it being called (nn.MultiheadAttention.out_proj); experts of an unknown format, or of a
            class that takes no implementations of experts; groups of mixed shapes; "svd" on weights that cannot be read;
            "gradient" without batches and loss, or an error of `init_from_gradient`. The model is unchanged then.
    """
    if (inner := inner_model(model)) is not model:
        apply_lotr(inner, config, batches=batches, loss=loss, progress=progress)
        _adapt_around(model, inner)
        return model
    config = with_head(model, config)
    if batches is not None and config.init == "orthonormal" and not {"A", "B"} & set(config.train):
        config = replace(config, init="gradient")
    selection = select(model, config)
    probed = probed_layers(selection, config) if config.init == "gradient" else {}
    for name, given in (("batches", batches), ("loss", loss)):
        if given is not None and not probed:
            raise ValueError(f'{name}: expected None without init "gradient", got {type(given).__name__} with {config.init!r}')
    check_memory(selection.targets, config)
    cores = make_cores(config, [t.name for t in selection.targets], home(selection.targets[0].module))
    found = directions(model, probed, batches, loss, progress) if probed else {}
    starts = svd_starts(selection, config) if config.init == "svd" else None
    with uninterrupted():
        install(model, config, selection, starts, cores)
        write_factors({model.get_submodule(name): one for name, one in probed.items()}, found)
    warn_of_frozen_heads(model)
    return model


def _adapt_around(model: nn.Module, inner: nn.Module) -> None:
    """What holds `inner`, which is adapted: all of it is frozen, and its modules save and load the adapter."""
    own = {id(p) for p in inner.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in own)
    for module in model.modules():
        tell_holder(inner, module)


def install(
    model: Model,
    config: LoTRConfig,
    selection: Selection,
    starts: dict[str, Start] | None,
    cores: Cores | None = None,
) -> Model:
    """Adapts the layers of a selection. starts: with init "svd" the adapters that are subtracted from the weights. cores: None
    for dense ones."""
    model.requires_grad_(False)
    for module in selection.saved.values():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    shared = SharedFactors()
    for group, targets in selection.groups.items():
        first = targets[0]
        sizes = first.in_features, first.out_features
        factors = shared.pair(group, sizes, config, home(first.module), config.adapter_dtype)
        layers = [_replace(model, target, factors, config) for target in targets]
        for target, layer in zip(targets, layers) if cores is not None else ():
            layer.hold_core(form_at(cores, target.name))
        if starts is not None:
            set_start(layers, starts[group])
            write_(factors.A, factors.start_A)
            write_(factors.B, factors.start_B)
            for layer in layers:
                write_(layer.core, layer.start_core)
                if config.magnitude:
                    layer.reset_magnitude()
    shared.set_trained(config.train)
    model.lotr_factors = shared
    parts = (w for t in selection.targets if is_dtensor(w := getattr(t.module, t.parameter or "weight", None)))
    agree_over(next(parts, None), (*shared.parameters(), *(() if cores is None else cores.parameters())))
    if cores is not None:
        model.lotr_cores = cores
    if callable(config.group_by):  # a callable cannot be pickled or saved; the groups that it returned can
        config = replace(config, group_by={t.name: t.group for t in selection.targets})
    model.lotr_config = config
    set_fast_paths(model, off=True)
    attach_scope(model)
    hook_saving(model)
    hook_fusing(model)
    hook_batching(model)
    expect_training(model)
    return model


def _replace(model: nn.Module, target: Target, factors: LoTRFactors, config: LoTRConfig) -> LoTRLayer:
    settings = Settings.of(config)
    if target.parameter is not None:
        layer = adapt_parameter(target.module, target.parameter, factors, settings)
    else:
        kind = LoTRWrapped if target.wrap else layer_class(target.module)
        layer = kind.adapting(target.module, factors, settings)
    layer.leave_factors_to_owner()
    fill_core_(layer.core, config.core_init)
    layer.set_trained(config.train)
    for name in target.names if target.parameter is None else ():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layer


# ---- adapted models --------------------------------------------------------------------------------------------------


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Inside the context the model computes without the adapter (modules_to_save stay as they are now).

    The context applies to the thread or asyncio task that opened it, and to checkpoint recomputation of its forwards.

    Raises:
        TypeError, RuntimeError: no adapter, or a merged one (unmerge it first).
    """
    layers = adapted_layers(model)
    expect_merged(layers, False, "disabled")
    with in_force(dict.fromkeys(layers.values(), OFF)):
        yield model
