"""Names of modules in a PEFT LoRA configuration: target_modules, rank_pattern, modules_to_save."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

__all__ = ["exact_targets", "full_names", "outermost", "patterns", "with_names"]


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
