"""Adapts a model, and takes the adapter off: apply_lotr, disabled, init_from_gradient, unload.

After `apply_lotr(model, config)`, every targeted linear layer is a `LoTRLayer` in its old place. It
keeps its state_dict keys (under `base_layer.` if it is wrapped, see wrapped.py) and gets `core`. An
experts module stays, and gets its adapters as a child. The model registers each A and B once
(adapted.py), the layers only refer to them.

    select (targets.py)   finds the layers and their groups, and checks them
    make_pair             makes A and B of a group
    _adapt_target         puts an adapted layer into each place of a target, and makes its core
    install               does this for all groups, freezes the rest, blocks what would bypass the
                          adapter (bypasses.py) and starts the checks of first_step.py

Not here: the selection (targets.py), merging (merging.py), reports (reports.py), files (saving.py,
loading.py).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import (
    Model,
    adapted_layers,
    attach,
    detach_all,
    layers_in,
    unmerged_layers,
)
from .bypasses import block_bypasses, restore_bypasses
from .config import GroupBy, LoTRConfig, place_of
from .core import fallback
from .core.request import ADAPTER_OFF, open_request
from .cores import FORMS, Cores
from .factors import LoTRFactor, LoTRFactors
from .first_step import watch
from .init import INIT_GAIN, CapturedGradient, fill_core_, start_from_gradients, tucker2
from .layers import LoTRLayer, device_of, plus
from .merging import merge_layers, unmerge
from .targets import Selection, Target, heads, select
from .transformers_experts import adapt_parameter
from .wrapped import LoTRWrapped, adapt, layer_class, matrix_of

# ---- apply ---------------------------------------------------------------------------------------


def apply_lotr(model: Model, config: LoTRConfig) -> Model:
    """Adapts a model in place: y = x W^T + bias + s ((x A) G_l) B^T (arXiv 2402.01376).

    Each targeted layer l gets a core G_l [r_in, r_out], and each group of layers shares one pair of
    A [k, r_in] and B [n, r_out], all in config.adapter_dtype. With target_parameters, each expert
    of a transformers mixture gets a core. All other parameters are frozen, except modules_to_save.
    The output does not change at first (with init "svd", except for one rounding of each weight).
    Use the learning rate that you would use for LoRA.

    Args:
        model: Any nn.Module with nn.Linear layers, transformers' Conv1D, or named modules that have
            in_features and out_features. Quantized layers, and layers with hooks, parametrizations
            or another forward, are wrapped, and their forward is called. A layer that is registered
            in several places stays one layer.
        config: Which layers are adapted, and how.

    Returns:
        The same model. If an error is raised, it is unchanged.

    Raises:
        TypeError: If the model is wrapped, compiled or sharded; or a target is not linear, or has a
            DTensor; or the experts have an unknown format.
        ValueError: If a name matches nothing, or no layer can be adapted; if a target shares its
            weight with another module, or is read without being called
            (nn.MultiheadAttention.out_proj); if the layers of a group have different shapes; if
            "svd" cannot read a weight; if modules_to_save has a quantized parameter; or if
            task_type needs a head and none is known.
        RuntimeError: If the model has an adapter already, from lotr_ext or PEFT.

    Warns:
        UserWarning: If a known head stays frozen, or if the rank exceeds the width of a layer.
    """
    selection = select(model, config)
    with unchanged_on_error(model):
        install(model, selection)
    frozen = [
        name
        for name, head in heads(model).items()
        if not any(p.requires_grad for p in head.parameters())
    ]
    if frozen:
        warnings.warn(
            f"lotr_ext: frozen heads: {', '.join(frozen)}. A new head keeps its random values. "
            f"Train it with modules_to_save={frozen}.",
            stacklevel=2,
        )
    return model


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Removes an adapter that an exception inside the context has left incomplete."""
    was_plain = not layers_in(model)
    trained_before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:  # also an interrupt
        if was_plain:
            without_adapters(model, layers_in(model))
        for p, requires_grad in trained_before:
            p.requires_grad_(requires_grad)
        raise


def install(model: nn.Module, selection: Selection) -> None:
    """Adapts the layers that `select` returned for a plain model.

    Args:
        model: The plain model. Call this inside `unchanged_on_error`.
        selection: From `select`, for this model.
    """
    config = selection.config
    # First, because it reads the plain weights and may raise.
    starts = _svd_starts(selection) if config.init == "svd" else {}
    cores = make_cores(
        config,
        [target.name for target in selection.targets],
        device=device_of(selection.targets[0].module),
        dtype=config.adapter_dtype,
    )
    # From here on the model changes.
    model.requires_grad_(False)
    for module in selection.saved.values():
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # integers have no gradient
    all_factors: dict[str, LoTRFactor] = {}  # the keys are from `factor_names`
    for group, targets in selection.groups.items():
        factors = make_pair(
            all_factors,
            group,
            targets[0].sizes,
            config,
            device=device_of(targets[0].module),
            dtype=config.adapter_dtype,
        )
        for target in targets:
            layer = _adapt_target(model, target, factors, cores, config)
            if target.name in starts:
                set_start(layer, *starts[target.name])
    # After the layers: the owner of what is attached may depend on where they are.
    attach(model, "lotr_factors", nn.ModuleList(all_factors.values()))
    if cores is not None:
        attach(model, "lotr_cores", cores)
    for layer in adapted_layers(model).values():
        layer.set_trained(config.train)
    if callable(config.group_by):
        # It cannot be pickled or saved, but the groups that it returned can.
        config = replace(config, group_by={t.name: t.group for t in selection.targets})
    model.lotr_config = config
    model.lotr_left_out = selection.left_out
    block_bypasses(model)
    watch(model)


def factor_names(group: str, sizes: tuple[int, int], group_by: GroupBy) -> list[str]:
    """Returns the names of A and B of a group of layers.

    Args:
        group: The group.
        sizes: (in_features, out_features) of its layers.
        group_by: As in the configuration. With "width", the layers of one in_features share A, and
            those of one out_features share B.
    """
    if group_by == "width":
        return [f"A_{sizes[0]}", f"B_{sizes[1]}"]
    return [f"A_{group}", f"B_{group}"]


def make_pair(
    all_factors: MutableMapping[str, LoTRFactor] | nn.ModuleDict,
    group: str,
    sizes: tuple[int, int],
    config: LoTRConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> LoTRFactors:
    """Returns the pair of A and B for a group of layers, and makes what does not exist yet.

    Args:
        all_factors: The factors of all groups so far, with keys from `factor_names`. New factors
            are added to it.
        group: The group.
        sizes: (in_features, out_features) of its layers.
        config: The configuration.
        device: The device of new factors.
        dtype: The dtype of new factors.
    """
    # "kaiming" is the cheapest: `set_start` overwrites the values.
    init = "kaiming" if config.init == "svd" else config.init
    A_name, B_name = factor_names(group, sizes, config.group_by)
    for name, features, rank in zip((A_name, B_name), sizes, config.ranks):
        if name not in all_factors:
            all_factors[name] = LoTRFactor(features, rank, init=init, device=device, dtype=dtype)
            # With identity cores, B = 0 lets the model start unchanged, as in LoRA.
            if name == B_name and config.core_init == "identity":
                nn.init.zeros_(all_factors[name].value)
    return LoTRFactors.of(all_factors[A_name], all_factors[B_name])


def _adapt_target(
    model: nn.Module, target: Target, factors: LoTRFactors, cores: Cores | None, config: LoTRConfig
) -> LoTRLayer:
    """Puts an adapted layer, with its first core, into all places of a target."""
    if target.parameter is not None:
        layer = adapt_parameter(
            target.module, target.parameter, factors, scaling=config.s, dropout=config.dropout
        )
    else:
        layer = adapt(target.module, factors, scaling=config.s, dropout=config.dropout)
        for name in target.names:
            model.set_submodule(name, layer)
    # `install` registers the factors once, with the model.
    layer.leave_factors_to_owner()
    if cores is None:
        fill_core_(layer.core, config.core_init)
    else:
        layer.use_core(cores.at(place_of(target.name), owned=False))
    return layer


def make_cores(
    config: LoTRConfig, names: Sequence[str], *, device: torch.device, dtype: torch.dtype
) -> Cores | None:
    """Makes the Cores of the layers of these names. Returns None if each layer has a dense core.

    Args:
        config: The configuration.
        names: The names of the layers, in the model's order.
        device: The device of the cores. On "meta", nothing is allocated.
        dtype: The dtype of the cores.

    Raises:
        TypeError, ValueError: If core is not a form of `lotr_ext.cores`, or the form does not
            support the configuration's rank or core_init.
    """
    if config.core == "dense":
        return None
    if config.core == "custom":
        raise ValueError(
            'core: expected a name or a callable, got "custom" from a saved adapter. Pass the '
            "original callable."
        )
    form = FORMS[config.core] if isinstance(config.core, str) else config.core
    # Otherwise the form would use the caller's default device, which may be meta.
    with torch.device("meta" if device.type == "meta" else "cpu"):
        cores = form([place_of(name) for name in names], config.rank)
    if not isinstance(cores, Cores):
        raise TypeError(
            f"core: expected a callable that returns lotr_ext.cores.Cores, got "
            f"{type(cores).__name__}"
        )
    if config.core_init == "identity":
        cores.begin_as_identity()
    return cores.to(device=device, dtype=dtype)


# ---- init "svd" ----------------------------------------------------------------------------------


@torch.no_grad()
def _svd_starts(selection: Selection) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Returns (A, B, core) of each layer: the Tucker-2 factorization of its group's weights.

    A and B are INIT_GAIN times orthonormal factors, the same tensors for all layers of a group.
    """
    for target in selection.targets:
        if layer_class(target.module) is LoTRWrapped:
            raise ValueError(
                f'init: expected weights that "svd" can read and write, got {target.name!r} '
                f"({type(target.module).__name__})"
            )
    config = selection.config
    starts = {}
    for targets in selection.groups.values():
        weights = [matrix_of(target.module) for target in targets]
        A, B, cores = tucker2(weights, config.ranks)
        pair = (INIT_GAIN * A, INIT_GAIN * B)
        for target, core in zip(targets, cores):
            # The adapter multiplies the core by s, and by INIT_GAIN in A and again in B.
            starts[target.name] = (*pair, core / (INIT_GAIN**2 * config.s))
    return starts


@torch.no_grad()
def set_start(layer: LoTRLayer, A: Tensor, B: Tensor, core: Tensor) -> None:
    """Sets the initial A, B and core of a layer for init "svd", once. Its output does not change.

    The weight is reduced by s B G^T A^T, which the adapter adds.

    Args:
        layer: A layer whose weight has not been reduced yet.
        A: [k, r_in]. The factors belong to all layers of the group, so each of these must get the
            same A and B.
        B: [n, r_out].
        core: [r_in, r_out].
    """
    for factor, value in ((layer.factors.A, A), (layer.factors.B, B)):
        factor.start = value.to(factor.value)
        factor.value.copy_(factor.start)
    # All three rounded to the parameters' dtype, because what is subtracted must be what the layer
    # adds.
    layer.start_core = core.to(layer.core)
    layer.core.copy_(layer.start_core)
    weight = layer._weight_to_write("init")
    delta = fallback.delta_weight(
        layer.factors.A.start, layer.factors.B.start, layer.start_core, layer.scaling
    )
    weight.copy_(plus(weight, -delta))


# ---- without the adapter -------------------------------------------------------------------------


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Computes without the adapter inside the context. modules_to_save keep their current values.

    The context applies to the thread that opened it, and to the backwards that it starts.

    Raises:
        RuntimeError: If the model has no adapter, or a merged one.
    """
    layers = unmerged_layers(model, "disabled")
    with open_request(dict.fromkeys(layers.values(), ADAPTER_OFF)):
        yield model


def init_from_gradient(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> CapturedGradient:
    """Starts A and B of an adapted model from the gradients of its weights.

    A and B span the leading directions of the gradients of all layers that share them. The cores
    stay zero, so the output does not change. The gradients are never formed: four passes over the
    batches compute two thin products per layer. Buffers, .grad, requires_grad and torch's random
    state are restored. With torch.distributed, every process calls this with its batches, and all
    get the same A and B.

    Args:
        model: An adapted model whose cores are zero. If an error is raised, it is unchanged.
        batches: A few. Each is used four times.
        loss: (model, batch) -> a scalar.

    Returns:
        The share of the gradients' squared norm that the new A and B capture, in total and per
        layer. Larger ranks capture more. It does not predict the loss after training
        (docs/choosing).

    Raises:
        TypeError: If experts are adapted.
        ValueError: If a core is not zero; if there are no batches; if the loss depends on no
            adapted layer; or if the gradients are not finite, or all zero.
        RuntimeError: If the model has no adapter, or a merged one; or if the loss is not a scalar.
    """
    layers = unmerged_layers(model, "init_from_gradient")
    # With zero cores, the adapted model computes as the base, whose gradients are used below.
    for name, layer in layers.items():
        if layer.num_experts:
            raise TypeError(
                f"model: expected linear layers for a start from the gradient, got experts in "
                f"{name!r}"
            )
        if bool(layer.core.any()):
            raise ValueError(
                f"core: expected zero for a start from the gradient, got other values in {name!r}"
            )
    with open_request(dict.fromkeys(layers.values(), ADAPTER_OFF)):
        return start_from_gradients(model, layers, batches, loss)


# ---- unload --------------------------------------------------------------------------------------


def unload(model: Model, *, merge: bool = False, dequantize: bool | torch.dtype = False) -> Model:
    """Removes the adapter: plain layers in their old places, no factors, no cores.

    modules_to_save keep their current values, and frozen parameters stay frozen. Hooks on adapted
    layers are removed with the layers.

    Args:
        model: An adapted model.
        merge: Whether to merge the adapter into the weights. Otherwise the layers get the base's
            weights (with init "svd" up to one rounding).
        dequantize: As for `merge`.

    Returns:
        The same model. If it is an adapted layer itself, the plain layer. If an error is raised, it
        is unchanged.

    Raises:
        TypeError: If an adapted layer has no plain form (LoTRExperts).
        TypeError, ValueError, RuntimeError: As for `merge` and `unmerge`.
    """
    layers = adapted_layers(model)
    # Checked before any layer is merged or changed.
    for name, layer in layers.items():
        # `LoTRLayer.to_base` returns what a layer keeps as `original`, which LoTRExperts lack.
        if type(layer).to_base is LoTRLayer.to_base and not hasattr(layer, "original"):
            raise TypeError(
                f"unload: expected layers with a plain form, got {name!r}, a {type(layer).__name__}"
            )
        # Init "svd" has changed the weight, and `to_base` writes to it again.
        if layer.start_core is not None:
            layer._weight_to_write("unload")
    if merge:
        merge_layers(
            model,
            {name: layer for name, layer in layers.items() if not layer.merged},
            dequantize=dequantize,
        )
    elif any(layer.merged for layer in layers.values()):
        unmerge(model)
    return without_adapters(model, layers)


def without_adapters(model: Model, layers: Mapping[str, LoTRLayer]) -> Model:
    """Puts the plain layers back: the part of `unload` after its checks."""
    # By layer, because a layer with several names has one base.
    bases = {layer: layer.to_base() for layer in layers.values()}
    restore_bypasses(model)
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if name and isinstance(layer, LoTRLayer):
            model.set_submodule(name, bases[layer])
    detach_all(model)
    # If the model is an adapted layer itself, there is no place to put the plain one.
    return bases.get(model, model)
