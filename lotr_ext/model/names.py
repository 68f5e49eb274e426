"""Names of modules and parameters: matching by endings, suggestions for misspelt names, a layer's block and its group, and
parameters that share memory."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Place", "closest", "group_name", "name_ends_with", "place_of", "tied_names"]


def name_ends_with(name: str, ending: str) -> bool:
    """Whether `ending` is the name's last dotted part or parts: "query" matches "layer.0.query", not "layer.0.my_query"."""
    return f".{name}".endswith(f".{ending}")


class Place(NamedTuple):
    """A layer's place, as "model.layers.3" and "self_attn.q_proj"."""

    layer: str
    kind: str


def place_of(name: str) -> Place:
    """Splits a layer's name after its first number; without a number, layer is "" and kind the whole name."""
    found = re.fullmatch(r"((?:.*?\.)??\d+)(?:\.(.*))?", name)
    return Place("", name) if found is None else Place(found[1], found[2] or "")


def group_name(name: str, sizes: tuple[int, int], group_by: str) -> str:
    """The group of a layer of sizes (in_features, out_features). group_by: "shape", "width", "name" or "block"."""
    shape = f"{sizes[0]}x{sizes[1]}"
    if group_by in ("shape", "width"):  # with "width", two shared factors form the pair of each shape
        return shape
    part = name.rpartition(".")[2] if group_by == "name" else place_of(name).layer.replace(".", "_")
    return f"{part}_{shape}" if part else shape


def closest(wanted: str, names: Iterable[str]) -> str:
    """For messages: the endings most similar to wanted, as "; the closest are 'q_proj', 'k_proj'", or ""."""
    parts = wanted.count(".") + 1
    endings = {".".join(name.split(".")[-parts:]) for name in names}
    endings = sorted(ending for ending in endings if ending and not ending.isdigit())
    found = difflib.get_close_matches(wanted, endings, cutoff=0.6)
    return f"; the closest {'is' if len(found) == 1 else 'are'} {', '.join(map(repr, found))}" if found else ""


def _identity(parameter: Tensor) -> object:
    """A key that is equal for parameters that share memory. Meta tensors and subclasses are compared as objects."""
    plain = type(parameter) in (Tensor, nn.Parameter) and not parameter.is_meta and parameter.numel() > 0
    return ("memory", parameter.device, parameter.data_ptr()) if plain else id(parameter)


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """For each module that shares a parameter with another one, by id(module): the other owners' parameter names."""
    owners: dict[object, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            owners.setdefault(_identity(parameter), []).append((module, f"{name}.{own}" if name else own))
    tied: dict[int, list[str]] = {}
    for shared in owners.values():
        for module, _ in shared:
            others = [name for other, name in shared if other is not module]
            if others:
                tied.setdefault(id(module), []).extend(others)
    return tied
