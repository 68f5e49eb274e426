"""load_adapter: loads an adapter written by `save_adapter`, or by PEFT for a LoTRPeftConfig, into a plain or adapted model."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..layers.cores import FORMS, Cores
from ..layers.factors import LoTRFactor, LoTRFactors, same_values
from ..layers.layer import LoTRLayer
from ..layers.merging import write_
from ..layers.packed import expert_parameters
from ..layers.parametrized import state_of
from ..layers.placement import home
from ..layers.sharded import agreed, holds_parts, whole
from ..layers.uninterrupted import uninterrupted
from . import adapters
from .adapted import adapted_layers, expect_merged, layers_in
from .adapter_files import LayerEntry, Manifest, empty
from .apply import install
from .config import LoTRConfig
from .core_forms import CORES, make_cores
from .experts import CHILD, expert_sizes, why_not
from .fingerprint import warn_of_another_base
from .loading_checks import by_factors, check_names, check_not_meta, check_tensors, expected_tensors
from .names import place_of
from .peft_files import read_either
from .pipeline import PipelineStages, expect_whole_model, part_of
from .saved import (
    adapter_slots,
    computed_tensors,
    factor_prefix,
    fitted_to_parametrizations,
    module_prefixes,
    of_adapted_part,
    parts,
    saved_modules,
    saved_tensors,
    with_ties,
)
from .saving import checked_path, unwrapped
from .shared_factors import factors_by_part, width_names
from .starts import check_start, set_start
from .targets import Selection, features, select

__all__ = ["load_adapter"]

Model = TypeVar("Model", bound=nn.Module)


def load_adapter(
    model: Model,
    directory: str | PathLike[str],
    *,
    cast: bool = False,
    name: str | None = None,
    share_factors: str | None = None,
) -> Model:
    """Loads a saved adapter into a model, and adapts the model first if needed.

    A plain base model, or the one part of it that was adapted, is adapted as it was by `apply_lotr` when the adapter was saved.
    A model that is adapted already, by `apply_lotr` or by hand, must have the same layers, groups, shapes and dtypes. Its
    values are replaced in place (and with init "svd" the loaded start is subtracted from its base weights instead of its own).

    With FSDP or ZeRO-3 the model must be adapted already; with tensor parallelism it need not be. Every process calls this,
    reads the files and keeps its own parts.

    Args:
        model: the base model, on any device.
        directory: a folder written by `save_adapter`, or by PEFT for a LoTRPeftConfig.
        cast: accept tensors of another dtype than the model's, and cast them.
        name: which of several adapters (`add_adapter`) to load into; it is added if it does not exist. None: the active one.
            A plain model's first adapter gets this name.
        share_factors: for a name that is added, the adapter whose A and B it shares. The file must contain the same values.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError, RuntimeError: no such adapter; a truncated, foreign or newer file; layers, shapes or dtypes that
            do not fit the model; a merged model. The model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    expect_whole_model(model, "load_adapter")
    if name is not None:
        adapters.check_name(name)
    target, stages = unwrapped(model), model if isinstance(model, PipelineStages) else None
    together = stages is not None or holds_parts(target)
    manifest, tensors = agreed("load_adapter", lambda: read_either(checked_path(directory)), together=together)
    if stages is not None:
        _fill_stages(stages, manifest, tensors, cast)
        return model
    if name is not None and any(isinstance(m, LoTRLayer) for m in target.modules()):
        if name != adapters.active_adapter(target):
            _load_parked(target, manifest, tensors, cast, name, share_factors)
            return model
    if share_factors is not None:
        raise ValueError(f"share_factors: expected the name of a new adapter with it, got name={name!r}")
    if any(isinstance(m, LoTRLayer) for m in target.modules()):
        with whole(model, adapter_slots(target), write=True):
            agreed("load_adapter", lambda: _fill_adapted(target, manifest, tensors, cast), together=together)
    else:
        target = _adapt_and_fill(model, target, manifest, tensors, cast)
    if name is not None:
        adapters.rename_active(target, name)
    return model


def _adapt_and_fill(
    model: nn.Module, target: nn.Module, manifest: Manifest, tensors: dict[str, Tensor], cast: bool
) -> nn.Module:
    """Adapts a plain model as the file says, and loads its values. target: the model without its wrapper. Returns the module
    that was adapted: target, or the part of it that the file names."""
    at, manifest, tensors = of_adapted_part(manifest, tensors)
    part = dict(target.named_modules()).get(at)
    if part is None:
        raise ValueError(f"layers: expected a model with the adapted part {at!r}, got a {type(target).__name__} without")
    tensors = _fitted(part, manifest, tensors)
    selection, cores = _check_plain(part, manifest, tensors, cast)
    with uninterrupted():
        _install(part, manifest, selection, cores, tensors)
        with whole(model, adapter_slots(target), write=True):
            _fill(part, manifest, _in_order_of(cores, manifest, tensors))
    return part


def _fill_stages(stages: PipelineStages, manifest: Manifest, tensors: dict[str, Tensor], cast: bool) -> None:
    """Loads each stage's part of the file."""

    def checked() -> list[tuple[Manifest, dict[str, Tensor]]]:
        check_names(stages.layers, set(manifest.layers))
        if stages.saved != set(manifest.modules_to_save):
            want, got = sorted(stages.saved), sorted(manifest.modules_to_save)
            raise ValueError(f"modules_to_save: expected {want} as in the model, got {got}")
        own = [part_of(manifest, tensors, one) for one in inner]
        own = [(part, _fitted(one, part, values)) for one, (part, values) in zip(inner, own)]
        for one, (part, values) in zip(inner, own):
            _check_adapted(one, part, values, cast)
        return own

    inner = [unwrapped(stage) for stage in stages]
    with ExitStack() as gathered:
        for stage, one in zip(stages, inner):
            gathered.enter_context(whole(stage, adapter_slots(one), write=True))
        checked_parts = agreed("load_adapter", checked)
        with uninterrupted():
            for one, own in zip(inner, checked_parts):
                _fill(one, *own)


def _fill_adapted(model: nn.Module, manifest: Manifest, tensors: dict[str, Tensor], cast: bool) -> None:
    tensors = _fitted(model, manifest, tensors)
    _check_adapted(model, manifest, tensors, cast)
    with uninterrupted():
        _fill(model, manifest, tensors)


@uninterrupted()
def _load_parked(
    model: nn.Module,
    manifest: Manifest,
    tensors: dict[str, Tensor],
    cast: bool,
    name: str,
    share_factors: str | None,
) -> None:
    new = name not in adapters.adapter_names(model)
    if new:
        if manifest.config is None:
            raise ValueError(
                f"adapter: expected one saved from an apply_lotr model, to be added as {name!r}, got a hand-built one"
            )
        fields = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "group_by")
        config = replace(manifest.config, **{field: getattr(model.lotr_config, field) for field in fields})
        adapters.add_adapter(model, name, config, share_factors=share_factors)
    elif share_factors is not None:
        raise ValueError(f"share_factors: expected the name of a new adapter with it, got name={name!r}")
    try:
        with adapters.in_use(model, name):
            if new:
                _hold_magnitudes_as_saved(model, tensors)
            if share_factors is not None:
                _check_same_factors(model, _fitted(model, manifest, tensors), share_factors)
            _fill_adapted(model, manifest, tensors, cast)
    except BaseException:
        if new:
            adapters.delete_adapter(model, name)
        raise


def _fitted(model: nn.Module, manifest: Manifest, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors in the form that the model's parametrizations need."""
    layers = layers_in(model)
    tensors = _in_order_of(getattr(model, CORES, None), manifest, tensors)
    return fitted_to_parametrizations(layers, module_prefixes(model, layers), manifest, tensors)


def _in_order_of(cores: object, manifest: Manifest, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those of the file's Cores in the order of the model's layers. The file has them in its own order, and
    another version of a model's class may define its layers in another one."""
    places = [place_of(name) for name in manifest.layers]
    if not isinstance(cores, Cores) or cores.places == places or set(cores.places) != set(places):
        return tensors
    state = {key.removeprefix(f"{CORES}."): t for key, t in tensors.items() if key.startswith(f"{CORES}.")}
    return tensors | {f"{CORES}.{key}": t for key, t in cores.in_order_of(places, state).items()}


def _check_same_factors(model: nn.Module, tensors: dict[str, Tensor], share_factors: str) -> None:
    names = {id(m): name for name, m in model.named_modules() if isinstance(m, LoTRFactors | LoTRFactor)}
    for _, module, name in factors_by_part(model.lotr_factors):
        key, have = f"{names[id(module)]}.{name}", getattr(module, name).detach().cpu()
        saved = tensors.get(key)
        if saved is None or not same_values(saved, have):
            raise ValueError(f"share_factors: expected the values of {key} to be those of {share_factors!r}, got others")


def _check_adapted(model: nn.Module, manifest: Manifest, tensors: dict[str, Tensor], cast: bool) -> None:
    layers = layers_in(model)
    prefixes = module_prefixes(model, layers)
    check_names(set(layers), set(manifest.layers))
    expect_merged(layers, False, "load_adapter")
    for name, entry in manifest.layers.items():
        layer = layers[name]
        check_not_meta(name, layer)
        want, got = (layer.in_features, layer.out_features), (entry.in_features, entry.out_features)
        if want != got:
            raise ValueError(f"{name}: expected (in_features, out_features) {want} as in the model, got {got} in the adapter")
        want, got = getattr(layer, "num_experts", 0), entry.experts
        if want != got:
            raise ValueError(f"{name}: expected {want} experts as in the model, got {got} in the adapter")
        want, got = factor_prefix(prefixes, layer.factors), entry.factors
        if want != got:
            raise ValueError(f"{name}: expected factors {want!r} as in the model, got {got!r} in the adapter")
    saved = saved_modules(model)
    if set(saved) != set(manifest.modules_to_save):
        raise ValueError(f"modules_to_save: expected {sorted(saved)} as in the model, got {sorted(manifest.modules_to_save)}")
    own = {name: (layer.factors.A, layer.factors.B, layer.core, layer.magnitude) for name, layer in layers.items()}
    expected = expected_tensors(manifest, own.__getitem__, tensors)
    tensors = with_ties(model, saved, manifest, tensors)
    check_tensors(expected | computed_tensors(layers, prefixes) | saved_tensors(saved), tensors, cast)
    for names in by_factors(manifest.layers).values():
        if manifest.layers[names[0]].tensor("start_A") in tensors or layers[names[0]].start_core is not None:
            check_start(model, {name: layers[name] for name in names})


def _check_plain(
    model: nn.Module, manifest: Manifest, tensors: dict[str, Tensor], cast: bool
) -> tuple[Selection, Cores | None]:
    """The arguments of `install` for a plain model: the selected layers, and the Cores that make their cores.

    Raises:
        ValueError: an adapter that does not fit the model.
    """
    config = manifest.config
    if config is None:
        raise ValueError(
            "adapter: expected a model with LoTR layers like the one that it was saved from, built by hand or in several "
            "parts, got one without; adapt it in the same way first"
        )
    modules = dict(model.named_modules())
    found = {name for name, entry in manifest.layers.items() if _module_name(name, entry) in modules}
    check_names(found, set(manifest.layers))
    for name, entry in manifest.layers.items():
        module = modules[_module_name(name, entry)]
        _check_sizes(name, entry, module)
        check_not_meta(name, module)
    selection = _selection(model, manifest, config)
    check_names({t.name for t in selection.targets}, set(manifest.layers))
    if set(selection.saved) != set(manifest.modules_to_save):
        want, got = sorted(manifest.modules_to_save), sorted(selection.saved)
        raise ValueError(f"modules_to_save: expected {want} in the model, got {got}")
    r_in, r_out = config.ranks

    def like(name: str) -> tuple[Tensor | None, ...]:
        entry = manifest.layers[name]
        core = (entry.experts, r_in, r_out) if entry.experts else (r_in, r_out)
        shapes = (entry.in_features, r_in), (entry.out_features, r_out), core
        dtype = tensors[f"{name}.magnitude"].dtype if config.magnitude else None
        magnitude = empty((entry.out_features,), dtype) if config.magnitude else None
        return *(empty(shape, config.adapter_dtype) for shape in shapes), magnitude

    cores = make_cores(config, [t.name for t in selection.targets], "meta") if config.core in FORMS else None
    expected = expected_tensors(manifest, like, tensors)
    if cores is not None:
        expected |= {f"{CORES}.{key}": t for key, t in cores.state_dict(keep_vars=True).items()}
    check_tensors(expected | saved_tensors(selection.saved), with_ties(model, selection.saved, manifest, tensors), cast)
    return selection, cores


def _module_name(name: str, entry: LayerEntry) -> str:
    """The name of the module that a layer adapts; for experts, the module that has the parameter and contains the adapter."""
    return name if not entry.experts else name.rpartition(f"{CHILD}.")[0].rstrip(".")


def _check_sizes(name: str, entry: LayerEntry, module: nn.Module) -> None:
    if not entry.experts:
        want, found, what = (entry.in_features, entry.out_features), features(module), "(in_features, out_features)"
    else:
        own = name.rpartition(".")[2]
        there = own in expert_parameters(module)
        if not there or (got := why_not(module, own)) is not None:
            got = got if there else "no such parameter"
            raise ValueError(f"{name}: expected experts with a parameter {own}, got {got}")
        want, found = (entry.experts, entry.in_features, entry.out_features), expert_sizes(module, own)
        what = "(experts, in_features, out_features)"
    if found != want:
        raise ValueError(f"{name}: expected {what} {want} as in the adapter, got {found} in the model")


def _selection(model: nn.Module, manifest: Manifest, config: LoTRConfig) -> Selection:
    """`select` for exactly the layers and groups of a file."""
    groups: dict[str, str] = {}
    for name, entry in manifest.layers.items():
        if config.group_by == "width":
            want = tuple(f"lotr_factors.{own}" for own in width_names(entry.in_features, entry.out_features))
            if entry.factors != want:
                raise ValueError(f"{name}: expected factors {want!r}, got {entry.factors!r}")
            continue
        owner, _, groups[name] = entry.factors.rpartition(".") if isinstance(entry.factors, str) else ("", "", "")
        if owner != "lotr_factors":
            raise ValueError(f"{name}: expected factors under lotr_factors, got {entry.factors!r}")
    linear = [re.escape(name) for name, entry in manifest.layers.items() if not entry.experts]
    experts = [
        f"{_module_name(name, entry)}.{name.rpartition('.')[2]}" for name, entry in manifest.layers.items() if entry.experts
    ]
    these = {"target_modules": "|".join(linear) or None, "target_parameters": experts or None, "exclude_modules": None}
    return select(model, replace(config, **these, group_by="width" if config.group_by == "width" else groups))


def _install(
    model: nn.Module, manifest: Manifest, selection: Selection, cores: Cores | None, tensors: dict[str, Tensor]
) -> None:
    config = manifest.config
    plain = replace(config, init="kaiming", core_init="zero", train=("A", "B", "core"), core="dense")
    if cores is not None:
        cores = cores.to_empty(device=home(selection.targets[0].module))
    install(model, plain, selection, None, cores)
    if cores is not None:
        cores.requires_grad_("core" in config.train)
    model.lotr_config = config if config.core in FORMS else replace(config, core="dense")
    model.lotr_factors.set_trained(config.train)
    _hold_magnitudes_as_saved(model, tensors)
    for layer in adapted_layers(model).values():
        layer.set_trained(config.train)


def _hold_magnitudes_as_saved(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives new magnitudes the dtype of the file's: PEFT's over half-precision factors are float32."""
    for name, layer in adapted_layers(model).items():
        if (saved := tensors.get(f"{name}.magnitude")) is not None and layer.magnitude is not None:
            layer.hold_magnitude(nn.Parameter(layer.magnitude.detach().to(saved.dtype)))


@torch.no_grad()
def _fill(model: nn.Module, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    layers = layers_in(model)
    warn_of_another_base(model, manifest.base)
    for names in by_factors(manifest.layers).values():
        group, start = [layers[name] for name in names], None
        start_A, start_B = (manifest.layers[names[0]].tensor(f"start_{part}") for part in "AB")
        if start_A in tensors:
            cores = torch.stack([tensors[f"{name}.start_core"] for name in names])
            start = tensors[start_A], tensors[start_B], cores
        scalings = [manifest.layers[name].scaling for name in names]
        if start is not None or group[0].start_core is not None:
            set_start(group, start, scalings)
        for layer, name, scaling in zip(group, names, scalings, strict=True):
            layer.scaling, layer.dropout = scaling, manifest.layers[name].dropout
    prefixes = module_prefixes(model, layers)
    plain = {f"{name}.{part}": getattr(m, part) for m, name, part in parts(layers, prefixes) if not state_of(m, part)}
    for key, value in (plain | computed_tensors(layers, prefixes) | saved_tensors(saved_modules(model))).items():
        write_(value, tensors[key])
