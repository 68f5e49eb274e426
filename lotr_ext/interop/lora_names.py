"""Names of modules in a PEFT LoRA configuration: target_modules, rank_pattern, modules_to_save."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterable, Mapping

from torch import nn

__all__ = ["exact_targets", "full_names", "outermost", "patterns", "warn_of_moved", "with_names"]


def exact_targets(names: Iterable[str], model: nn.Module) -> list[str] | str:
    """target_modules that by PEFT's rules match `names` and nothing else: last parts, full names, or else a regex."""
    want = set(names)
    everything = [name for name, _ in model.named_modules() if not name.startswith("lotr_factors")]
    for endings in ({name.rpartition(".")[2] for name in want}, want):
        found = {name for name in everything if any(name == e or name.endswith(f".{e}") for e in endings)}
        if found == want:
            return sorted(endings)
    return "|".join(map(re.escape, sorted(want)))


def full_names(names: Iterable[str]) -> list[str] | str:
    """target_modules of exactly these modules, without the model: full names, since SGLang takes no regex. A name without a dot
    would match the end of other modules' names."""
    names = sorted(names)
    return names if all("." in name for name in names) else "|".join(map(re.escape, names))


def outermost(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def patterns(values: Mapping[str, float], common: float) -> dict[str, float]:
    """The values other than `common` by full name. PEFT matches every name that ends so; if one of these has another value, the
    key is an anchored pattern instead."""
    found = {}
    for name, value in values.items():
        if value != common:
            alone = all(v == value or not re.match(rf"(.*\.)?({name})$", other) for other, v in values.items())
            found[name if alone else f"^{re.escape(name)}"] = value
    return found


def with_names(targets: list[str] | str, names: set[str]) -> list[str] | str:
    """target_modules that also match modules of these names."""
    if isinstance(targets, str):
        return "|".join([targets, *(rf".*\.{re.escape(name)}" for name in sorted(names))])
    return sorted({*targets, *names})


def warn_of_moved(names: Iterable[str], model: nn.Module) -> None:
    """Warns of the layers whose adapters PEFT does not read back: if a model's experts were separate layers in transformers 4,
    PEFT takes names such as gate_proj for those of experts, also in a dense block and in a shared expert."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        if kind is None or mapping.get_checkpoint_conversion_mapping(kind) is None:
            return
        peft, conversion = map(importlib.import_module, ("peft", "peft.utils.transformers_weight_conversion"))
    except ImportError:  # an older transformers or PEFT, which moves nothing, or none
        return
    ends = {name.rpartition(".")[2] for name in names}
    config = peft.LoraConfig(target_modules=sorted(ends))
    try:
        conversion.convert_peft_config_for_transformers(config, model, None)
        moved = ends - set(config.target_modules)
    except ValueError:  # only one of two layers that are one parameter of the experts
        moved = ends
    lost = [name for name in names if name.rpartition(".")[2] in moved]
    if lost:
        warnings.warn(
            f"lotr_ext: export_lora: PEFT {peft.__version__} takes layers named {', '.join(sorted(moved))} in a model of type "
            f"{kind!r} for experts. It will not load the adapters of {lost[0]!r} and {len(lost) - 1} more, which the file has. "
            "For PEFT, exclude these layers, merge the adapter, or save it with LoTRPeftConfig",
            stacklevel=6,
        )
