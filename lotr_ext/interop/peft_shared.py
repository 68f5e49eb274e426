"""Adapters of PEFT's tuner over the same factors: mixed batches (`adapter_names=`) and weighted sums. Imported by
`lotr_ext.interop.peft`.

A config with share_factors gives an adapter the SharedFactors of another. Mixed batches run as those of `lotr_ext.mixed` do
(`layers/mixture.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..layers.factors import LoTRFactors, same_values
from ..layers.mixture import Mixture, mixture_of
from ..layers.request import OFF, in_force
from ..layers.sums import Rule, check_weights
from ..model.shared_factors import SharedFactors, factors_by_part
from ..model.targets import Target
from .peft_config import LoTRPeftConfig
from .peft_experts import LoTRPeftExperts
from .peft_layer import LoTRPeftLinear

BASE = "__base__"  # PEFT's name for rows without an adapter
_EXACT = ("linear", "cat", "svd")  # of adapters over the same factors
_METHODS = {"ties": "ties", "dare_linear": "dare", "dare_ties": "dare_ties", "magnitude_prune": "magnitude_prune"}


def shared_factors(tuner: BaseTuner, config: LoTRPeftConfig, targets: Sequence[Target]) -> SharedFactors | None:
    """The factors that a new adapter shares; None if it has its own.

    Raises:
        ValueError: no such adapter, or one without the new one's groups or rank.
    """
    name = config.share_factors
    if name is None or not tuner.lotr_factors:
        return None
    if name not in tuner.lotr_factors:
        raise ValueError(f"share_factors: expected one of {', '.join(tuner.lotr_factors)}, got {name!r}")
    shared: SharedFactors = tuner.lotr_factors[name]
    missing = sorted(tuner._owners - set(shared))
    if missing:
        raise ValueError(
            f"share_factors: expected an adapter with factors for {missing[0]}, got {name!r} with {', '.join(shared)}"
        )
    ranks = {part: getattr(module, attribute).shape[1] for part, module, attribute in factors_by_part(shared)}
    wanted = config.rank if isinstance(config.rank, tuple) else (config.rank, config.rank)
    if (got := (ranks["A"], ranks["B"])) != wanted:
        raise ValueError(f"rank: expected {got} as in the shared factors of {name!r}, got {wanted}")
    for target in targets:
        own = shared[target.group] if target.group in shared else None
        sizes = (target.in_features, target.out_features)
        if isinstance(own, LoTRFactors) and (own.in_features, own.out_features) != sizes:
            raise ValueError(f"share_factors: expected factors of sizes {sizes} for {target.name}, got those of {name!r}")
    return shared


def loaded_into_shared(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Replaces the tensors of an adapter that shares factors by the model's factors. model: PEFT's, with the adapter added.

    Raises:
        ValueError: other values than the model's.
    """
    factors: nn.ModuleDict = model.base_model.lotr_factors
    others = [name for name, own in factors.items() if name != adapter_name and own is factors[adapter_name]]
    if not others:
        return {}
    found = {}
    for name, owner in factors[adapter_name].named_parameters():
        key = f"base_model.lotr_factors.{adapter_name}.{name}"
        if not same_values(tensors[key].to(owner), owner.detach()):
            raise ValueError(
                f"share_factors: expected the values of {others[0]!r} for {name}, got others; set share_factors to null in its "
                "adapter_config.json to load it with factors of its own"
            )
        found[key] = owner
    return found


def _same_factors(tuner: BaseTuner, names: Sequence[str], argument: str) -> None:
    """Raises ValueError for an adapter that does not exist or has other factors than the first."""
    for name in names:
        if name not in tuner.lotr_factors:
            raise ValueError(f"{argument}: expected some of {', '.join(tuner.lotr_factors)}, got {name!r}")
        if tuner.lotr_factors[name] is not tuner.lotr_factors[names[0]]:
            raise ValueError(
                f"{argument}: expected adapters over the same factors, got {names[0]!r} and {name!r}, which have their own; "
                f"add adapters with LoTRPeftConfig(share_factors={names[0]!r})"
            )


def _no_magnitudes(tuner: BaseTuner, names: Sequence[str], argument: str) -> None:
    for name in names:
        if tuner.peft_config[name].magnitude:
            raise ValueError(f"{argument}: expected adapters without magnitudes, got {name!r} with; make it the active one")


# ---- mixed batches ---------------------------------------------------------------------------------------------------


@contextmanager
def mixed_batch(tuner: BaseTuner, names: object, num_beams: object = None) -> Iterator[None]:
    """Inside, row i of a batch has the adapter names[i], or none for "__base__", as in PEFT's LoRA. num_beams: of a beam
    search, which repeats the rows, except in an encoder.

    Raises:
        TypeError, ValueError: no list of names, an adapter that is unknown or has other factors than the first, training mode,
            or a merged model.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names: expected a list of names, one per row, got {names!r}")
    if not names:
        raise ValueError("adapter_names: expected a name for each row of the batch, got none")
    if tuner.training:
        raise ValueError("adapter_names: expected a model in eval mode, as PEFT does, got one in training mode")
    kinds = [name for name in dict.fromkeys(names) if name != BASE]
    _same_factors(tuner, kinds, "adapter_names")
    _no_magnitudes(tuner, kinds, "adapter_names")
    layers = tuner._adapted()
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"adapter_names: expected unmerged adapters, got {name!r} merged; call unmerge_adapter first")
        if isinstance(layer, LoTRPeftExperts):
            raise ValueError(f"adapter_names: expected adapters of linear layers, got {name!r}, a parameter of experts")
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    own, inside = list(names), _of_encoder(tuner.model)
    repeated = [name for name in names for _ in range(beams)]
    said = {layer: _said_of(layer, kinds, own if layer in inside else repeated) for layer in layers.values()}
    with ExitStack() as stack:
        for module in tuner.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's modules_to_save, which take names themselves
                hook = _naming(own if module in inside else repeated)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.enter_context(in_force(said))
        yield


def _of_encoder(model: nn.Module) -> set[nn.Module]:
    """The modules of an encoder, whose rows a beam search does not repeat."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return set() if encoder is None or encoder is model else set(encoder.modules())


def _naming(names: list[str]) -> Any:
    return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": names})


def _said_of(layer: LoTRPeftLinear, kinds: Sequence[str], names: Sequence[str]) -> Mixture | Any:
    """The mixture of a layer, in which adapters that the layer lacks count as the base; OFF if it lacks all."""
    own = [name for name in kinds if name in layer.lotr_adapter]
    if not own:
        return OFF
    parts = [(layer.lotr_adapter[name].core, layer.lotr_adapter[name].scaling) for name in own]
    index = torch.tensor([own.index(name) if name in own else -1 for name in names], device="cpu")
    return mixture_of(parts, index, own[0])


# ---- weighted sums ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def add_weighted(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
    majority: str,
    svd_rank: int | None,
) -> None:
    """Adds the weighted sum of adapters; see `LoTRPeftModel.add_weighted_adapter`."""
    if isinstance(adapters, str) or not adapters or len(adapters) != len(weights):
        raise ValueError(f"weights: expected one for each of the adapters {adapters!r}, got {weights!r}")
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"adapters: expected each once, got {adapters!r}")
    weights = check_weights("weights", dict(zip(adapters, weights, strict=True)))
    _same_factors(tuner, list(adapters), "adapters")
    _no_magnitudes(tuner, adapters, "adapters")
    if combination_type not in (*_EXACT, *_METHODS):
        raise ValueError(f"combination_type: expected one of {', '.join((*_EXACT, *_METHODS))}, got {combination_type!r}")
    rule = Rule(density=None)
    if combination_type in _METHODS:
        seed = int(torch.randint(2**62, ())) if combination_type.startswith("dare") else 0
        rule = Rule(_METHODS[combination_type], density, seed, majority)
    first: LoTRPeftConfig = tuner.peft_config[adapters[0]]
    if svd_rank is not None and svd_rank != first.rank:
        raise ValueError(f"svd_rank: expected None or {first.rank}, at which the sum is exact, got {svd_rank}")
    wrappers = [module for module in tuner.modules() if isinstance(module, ModulesToSaveWrapper)]
    if any(sum(name in wrapper.modules_to_save for name in adapters) > 1 for wrapper in wrappers):
        raise ValueError("adapters: expected at most one with modules_to_save, for which no sum is defined, got several")
    targets = {str(tuner.peft_config[name].target_modules) for name in adapters}
    layers = [layer for layer in tuner._adapted().values() if any(name in layer.lotr_adapter for name in adapters)]
    if any(name not in layer.lotr_adapter for layer in layers for name in adapters):
        raise ValueError(f"adapters: expected adapters of the same layers, got target_modules {' and '.join(sorted(targets))}")
    scaling = layers[0].lotr_adapter[adapters[0]].scaling
    several = [[(own.core, own.scaling) for own in (layer.lotr_adapter[name] for layer in layers)] for name in adapters]
    summed = rule.sum_of_cores(several, list(weights.values()), [scaling] * len(layers))
    config = copy.deepcopy(first)
    config.share_factors, config.train, config.core, config.core_init = adapters[0], ["core"], "dense", "zero"
    config.alpha, config.rslora, config.scaling, config.inference_mode = None, False, scaling, True
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except BaseException:
        del tuner.peft_config[adapter_name]
        raise
    for layer, value in zip(layers, summed, strict=True):
        core = layer.lotr_adapter[adapter_name]
        core.core.copy_(value)
        core.requires_grad_(False)
