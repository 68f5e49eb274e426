"""LoTR adapters as PEFT LoRA adapters, exact: from a model (`export_lora`) or from a saved adapter (`lotr_to_lora`).

    s B G_l^T A^T = s lora_B lora_A    with lora_A = (A G_l)^T [r_out, K], lora_B = B [N, r_out]
                                       or   lora_A = A^T [r_in, K],        lora_B = B G_l^T [N, r_in], whichever is smaller

So a LoTR of rank r on a layer is a LoRA of rank r, and every program that reads LoRA can read it. Only the size grows, because
a LoRA stores its factors for each layer. After init "svd" the base weights are W minus the start adapter; a LoRA for the
unchanged W has to carry both, at twice the rank: [lora_B, -start_B] [lora_A; start_A].

With magnitudes the result is a DoRA of PEFT: W + s lora_B lora_A, and therefore c, is the same in both.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..files import folder, placed, read_bytes, together
from ..layers.checks import check_dimension
from ..layers.experts import LoTRExperts
from ..layers.hosted import LoTRHostedExperts
from ..layers.layer import LoTRLayer
from ..layers.linear import LoTRConv1D
from ..layers.sharded import Slot, agreed, gathered, holds_parts, whole, writing_rank
from ..model.adapted import adapted_layers
from ..model.adapter_files import JSON_NAME, Manifest, serialized
from ..model.config import check_task
from ..model.core_forms import CORES
from ..model.experts import parameter_name
from ..model.peft_files import read_either
from ..model.saved import adapter_slots, saved_modules, saved_tensors, ties_of, without_ties
from ..model.saving import checked_path, unwrapped, warn_of_unsaved
from ..model.tasks import cores_and_scalings
from ..ops import accumulate_dtype
from .expert_lora import (
    ExpertLoRA,
    Host,
    check_form,
    check_values,
    core_side,
    expert_lora,
    expert_tensors,
    host_of,
)
from .lora_files import LoRALayer
from .lora_names import exact_targets, full_names, outermost, patterns, warn_of_moved, with_names

__all__ = ["export_lora", "lora_factors", "lotr_to_lora"]

_PREFIX = "base_model.model."
_Layer = TypeVar("_Layer", LoRALayer, ExpertLoRA)


def _pair(A: Tensor, B: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """(lora_A [r, K], lora_B [N, r]) in the form with the smaller rank."""
    r_in, r_out = core.shape
    return ((A @ core).T, B) if r_out <= r_in else (A.T, B @ core.T)


def _lora_pair(A: Tensor, B: Tensor, core: Tensor, start: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of a layer, contiguous, in core's dtype and on its device. start: the initial A, B and core."""
    wide = accumulate_dtype(core.dtype)
    lora_A, lora_B = _pair(*(t.detach().to(core.device, wide) for t in (A, B, core)))
    if start is not None:
        start_A, start_B = _pair(*(t.to(core.device, wide) for t in start))
        lora_A, lora_B = torch.cat([lora_A, start_A]), torch.cat([lora_B, -start_B], 1)
    kept = {"dtype": core.dtype, "memory_format": torch.contiguous_format, "copy": True}  # the factors may be the layer's own
    return lora_A.to(**kept), lora_B.to(**kept)


@torch.no_grad()
def lora_factors(layer: LoTRLayer) -> tuple[Tensor, Tensor]:
    """A layer's adapter as LoRA factors: scaling * lora_B @ lora_A is its change of the original weight.

    Returns:
        lora_A [r, K] and lora_B [N, r], contiguous, in the adapter's dtype (products are made in fp32, fp64 for fp64);
        r = min(r_in, r_out), twice that after init "svd".

    Raises:
        TypeError: not an adapted layer. RuntimeError: a layer on the meta device.
    """
    if not isinstance(layer, LoTRLayer):
        raise TypeError(f"layer: expected a LoTRLayer, got {type(layer).__name__}")
    if isinstance(layer, LoTRExperts):
        raise TypeError(f"layer: expected a linear layer, got {type(layer).__name__}; expert_lora_factors takes it")
    check_values(layer)
    return _with_core(layer, layer.core.detach())


def _with_core(layer: LoTRLayer, core: Tensor) -> tuple[Tensor, Tensor]:
    """`lora_factors` with another core."""
    factors = layer.factors
    start = None if layer.start_core is None else (factors.start_A, factors.start_B, layer.start_core)
    return _lora_pair(factors.A, factors.B, core, start)


def export_lora(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    task_type: str | None = None,
    experts: str = "peft",
    hosts: str | Mapping[str, str] | None = None,
    base_model: str | None = None,
    pad_rank: int | None = None,
    task: int | None = None,
) -> None:
    """Writes the model's adapter as a PEFT LoRA adapter: adapter_config.json and adapter_model.safetensors in a directory.

    `peft.PeftModel.from_pretrained(base, directory)` then gives the same outputs up to rounding, for the base model that
    `apply_lotr` was given. It also writes modules_to_save. lora_alpha / r is the largest scaling of all layers; the lora_B of a
    layer with another scaling is multiplied by the quotient. r is the largest rank, with patterns for layers of lower ranks.
    An adapter with magnitudes becomes a DoRA (use_dora), which PEFT reads and most servers do not.

    All processes together export a model that is held in parts, as `save_adapter` saves it.

    Args:
        model: an adapted model, merged or not, from `apply_lotr` or built by hand.
        directory: created if it does not exist.
        task_type: PEFT's, such as "SEQ_CLS" or "CAUSAL_LM"; None for a plain PeftModel.
        experts: the form of adapted experts (`expert_lora.py`): "peft"; or for servers "shared-outer", "vllm-shared" or
            "per-expert", which PEFT does not read. An exported adapter with experts has no dropout: PEFT has none for them.
        hosts: how a server names the experts' modules: a model type that `HOSTS` knows, such as "mixtral", or parts of module
            names and their replacements. None: as the model's type says in "vllm-shared" and "per-expert", unchanged otherwise.
        base_model: where the base model is, for base_model_name_or_path. None: the path or name that the model was loaded from.
        pad_rank: pads all factors with zeros to this rank. None: each layer keeps its own.
        task: of the model's TaskBank, written instead of the active adapter's cores. The model does not change.

    Raises:
        TypeError: no nn.Module, or experts of a mixture built by hand. RuntimeError: no adapter, or one on the meta device; of
            a model in parts an error in another process; a task of a model without a bank. ValueError: directory is a file,
            task_type or experts is unknown, a layer has a rank above pad_rank or is in two places, some layers have magnitudes
            and others none, or no such task.

    Warns:
        UserWarning: base_model is not known. PEFT and vLLM's resolver of folders need it to find the base by themselves.
            A layer whose adapter PEFT does not read back from any file. Also as `save_adapter`.
    """
    warn_of_unsaved(model, "export_lora")
    check_form(experts)
    task_type = check_task(task_type)
    inner, directory = unwrapped(model), checked_path(directory)
    host = host_of(hosts, experts, getattr(getattr(inner, "config", None), "model_type", None))
    together = isinstance(inner, nn.Module) and holds_parts(inner)

    def write() -> None:
        saved, also = _beside(inner, tied)
        entries, stacked, config = _as_lora(inner, experts, also, task)
        config |= {"task_type": task_type, "base_model_name_or_path": base}
        if writing_rank(model, together):
            _write(directory, _Export(entries, stacked, experts, host, pad_rank), saved, config)

    slots, tied = agreed("export_lora", lambda: _checked(inner, task), together=together)
    base = _base_model(base_model or loaded_from(inner))
    with whole(model, slots):
        agreed("export_lora", write, together=together)


def _checked(model: nn.Module, task: int | None) -> tuple[list[Slot], dict[str, str | None]]:
    """The places of the tensors to export, and the ties of modules_to_save. Raises without an adapter or the task."""
    layers = adapted_layers(model)
    if task is not None:
        cores_and_scalings(model, layers, task, "export_lora")
    return adapter_slots(model), ties_of(model)


def _beside(model: nn.Module, tied: Mapping[str, str | None]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of modules_to_save, and of modules that share some of them: in PEFT each module has its own."""
    return without_ties(saved_tensors(saved_modules(model)), tied, model)


def _as_lora(
    model: nn.Module, form: str, also: list[str], task: int | None
) -> tuple[dict[str, LoRALayer], dict[str, ExpertLoRA], dict[str, Any]]:
    """The adapted layers of a model, its experts, and their entries for adapter_config.json. also: as from `_beside`."""
    layers, saved = adapted_layers(model), saved_modules(model)
    _check_places(model)
    entries, stacked = {}, {}
    values = zip(layers.items(), *cores_and_scalings(model, layers, task, "export_lora"), strict=True)
    for (name, layer), core, scaling in values:
        check_values(layer)
        core = gathered(core)
        if isinstance(layer, LoTRHostedExperts):
            side = core_side(layer.parameter, form)
            stacked[parameter_name(name)] = expert_lora(layer.factors.A, layer.factors.B, core, scaling, side)
        elif isinstance(layer, LoTRExperts):
            raise TypeError(
                f"model: expected experts of transformers, got {name!r}, a LoTRExperts; expert_lora_factors has its LoRA"
            )
        else:
            entries[name] = LoRALayer(*_with_core(layer, core), scaling, layer.magnitude)
    if form == "peft":
        warn_of_moved(entries, model)
    layers = {name: layers[name] for name in entries}
    config = {
        "lora_dropout": 0.0 if stacked else max(layer.dropout for layer in layers.values()),
        "fan_in_fan_out": bool(layers) and all(isinstance(layer, LoTRConv1D) for layer in layers.values()),
        "target_modules": exact_targets(layers, model) if layers else [],
        "modules_to_save": outermost({*saved, *also}) or None,
    }
    return entries, stacked, config


def _check_places(model: nn.Module) -> None:
    """ValueError for a layer in two places: PEFT would put the adapter into one of them."""
    first: dict[int, str] = {}
    for at, module in model.named_modules():
        for child, layer in module._modules.items():
            if (
                isinstance(layer, LoTRLayer)
                and (other := first.setdefault(id(layer), name := f"{at}.{child}".lstrip("."))) != name
            ):
                raise ValueError(f"model: expected layers in one place each, got one at {other} and {name}; merge the adapter")


def lotr_to_lora(
    source: str | PathLike[str],
    directory: str | PathLike[str],
    *,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    experts: str = "peft",
    hosts: str | Mapping[str, str] | None = None,
    base_model: str | None = None,
    pad_rank: int | None = None,
) -> dict[str, LoRALayer | ExpertLoRA]:
    """Writes the LoTR adapter in `source`, by `save_adapter` or by PEFT, as a PEFT LoRA adapter; no model is needed.

    Args:
        source: a directory with a LoTR adapter.
        directory: created if it does not exist.
        task_type: as in `export_lora`.
        fan_in_fan_out: the value in the LoRA's configuration; PEFT corrects a wrong one, with a warning.
        experts: as in `export_lora`.
        hosts: as in `export_lora`; without a model, None changes no name.
        base_model: as in `export_lora`.
        pad_rank: as in `export_lora`.

    Returns:
        The LoRA layers, by name; of experts by the name of the parameter. Without padding.

    Raises:
        ValueError: no such adapter, directory is a file or a source that PEFT has saved, task_type or experts is unknown, or a
            layer has a rank above pad_rank.
    """
    check_form(experts)
    task_type = check_task(task_type)
    host = host_of(hosts, experts, None)
    manifest, tensors = read_either(Path(source))
    directory = checked_path(directory)
    if directory.resolve() == Path(source).resolve() and not (Path(source) / JSON_NAME).exists():
        raise ValueError(f"directory: expected another one than source, whose files have the same names, got {directory}")
    entries, stacked, saved = lora_of(manifest, tensors, experts)
    saved, also = without_ties(saved, manifest.tied or {})
    config: dict[str, Any] = {
        "task_type": task_type,
        "base_model_name_or_path": _base_model(base_model),
        "lora_dropout": 0.0 if stacked else max(entry.dropout for entry in manifest.layers.values()),
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": full_names(entries),
        "modules_to_save": outermost({*manifest.modules_to_save, *also}) or None,
    }
    _write(directory, _Export(entries, stacked, experts, host, pad_rank), saved, config)
    return entries | stacked


def lora_of(
    manifest: Manifest, tensors: Mapping[str, Tensor], experts: str
) -> tuple[dict[str, LoRALayer], dict[str, ExpertLoRA], dict[str, Tensor]]:
    """A saved adapter as LoRA: the layers by name, experts by the parameter's name, and what was trained beside them."""
    entries, stacked = {}, {}
    for name, entry in manifest.layers.items():
        parts = [tensors[key] for key in (entry.tensor("A"), entry.tensor("B"), f"{name}.core")]
        if entry.experts:
            at = parameter_name(name)
            stacked[at] = expert_lora(*parts, entry.scaling, core_side(at.rpartition(".")[2], experts))
            continue
        start = [tensors.get(k) for k in (entry.tensor("start_A"), entry.tensor("start_B"), f"{name}.start_core")]
        pair = _lora_pair(*parts, None if start[0] is None else tuple(start))
        entries[name] = LoRALayer(*pair, entry.scaling, tensors.get(f"{name}.magnitude"))
    known = {f"{name}.{part}" for name in manifest.layers for part in ("core", "start_core", "magnitude")}
    own = {f"{e.tensor(part).rpartition('.')[0]}." for e in manifest.layers.values() for part in "AB"}
    own |= {f"{name}.{made}." for name in manifest.layers for made in ("parametrizations.core", "core_form")} | {f"{CORES}."}
    return entries, stacked, {k: v for k, v in tensors.items() if k not in known and not k.startswith(tuple(own))}


def loaded_from(model: nn.Module) -> str | None:
    """The path or name from which transformers loaded a model; None if it is not recorded."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _base_model(name: str | None) -> str | None:
    if not name:
        warnings.warn(
            "lotr_ext: base_model: expected where the base model is, got nothing; base_model_name_or_path is left empty, so "
            "PEFT's AutoPeftModel and vLLM's resolver of folders will not find the base",
            UserWarning,
            stacklevel=3,
        )
    return name or None


class _Export(NamedTuple):
    """The LoRA layers to write, by name (experts by the parameter's name), in a form and under a server's names."""

    layers: dict[str, LoRALayer]
    experts: dict[str, ExpertLoRA]
    form: str
    host: Host
    pad_rank: int | None


def _padded(name: str, one: _Layer, rank: int | None) -> _Layer:
    """A layer padded with zeros to that rank: A in its second to last dimension, B in its last."""
    more = 0 if rank is None else check_dimension("pad_rank", rank) - one.rank
    if more < 0:
        raise ValueError(f"pad_rank: expected at least {one.rank}, the rank of {name}, got {rank}")
    return replace(one, A=nnf.pad(one.A, (0, 0, 0, more)), B=nnf.pad(one.B, (0, more))) if more else one


def _at_scaling(one: _Layer, scaling: float) -> _Layer:
    """The same layer at another scaling: the rest is multiplied into B."""
    if one.scaling == scaling:
        return one
    wide = accumulate_dtype(one.B.dtype)
    return replace(one, B=(one.B.to(wide) * (one.scaling / scaling)).to(one.B.dtype), scaling=scaling)


def _write(directory: Path, export: _Export, saved: dict[str, Tensor], config: dict[str, Any]) -> None:
    # TGI and older versions of vLLM read r and lora_alpha alone: they compute lora_alpha / r for all layers
    scaling = max((one.scaling for one in (*export.layers.values(), *export.experts.values())), key=abs) or 1.0
    layers, stacked = (
        {name: _padded(name, _at_scaling(one, scaling), export.pad_rank) for name, one in part.items()}
        for part in (export.layers, export.experts)
    )
    tensors: dict[str, Tensor] = {}
    plain = [name for name, layer in layers.items() if layer.magnitude is None]
    if 0 < len(plain) < len(layers):
        raise ValueError(f"model: expected magnitudes in all layers or in none, got {plain[0]!r} without, impossible in DoRA")
    for name, layer in layers.items():
        tensors |= {f"{_PREFIX}{name}.lora_A.weight": layer.A, f"{_PREFIX}{name}.lora_B.weight": layer.B}
        if layer.magnitude is not None:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = layer.magnitude
    beside = expert_tensors(stacked, export.form, export.host) | saved
    tensors |= {f"{_PREFIX}{key}": value for key, value in beside.items()}
    everything = layers | stacked
    r = max(layer.rank for layer in everything.values())
    ranks = patterns({name: layer.rank for name, layer in everything.items()}, r)
    if stacked and export.form == "peft":
        config["target_parameters"] = sorted(stacked)
    elif stacked:  # servers expect names of modules
        config["target_modules"] = with_names(config["target_modules"], {name.rpartition(".")[2] for name in stacked})
    config = {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": r,
        "lora_alpha": _number(scaling * r),
        "rank_pattern": ranks,
        "alpha_pattern": {name: _number(scaling * rank) for name, rank in ranks.items()},
        "bias": "none",
        **({"use_dora": True} if layers and not plain else {}),
        **config,
    }
    data, text = serialized(tensors), (json.dumps(config, indent=2) + "\n").encode()
    with folder(directory), together(directory):
        path = directory / "adapter_config.json"
        try:
            apart = None if read_bytes(path) == text else path.name  # never one's tensors with another's scaling
        except OSError:
            apart = path.name
        with placed(directory, {"adapter_model.safetensors": data, path.name: text}, apart=apart):
            pass


def _number(value: float) -> float:
    """value as an int if it is whole: some readers of LoRA expect an int."""
    return int(value) if float(value).is_integer() else float(value)
