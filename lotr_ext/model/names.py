"""Names of modules and parameters: whether one ends with another, and which ones a misspelt one may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["closest", "name_ends_with"]


def name_ends_with(name: str, ending: str) -> bool:
    """Whether `ending` is the name's last dotted part or parts: "query" matches "layer.0.query", not "layer.0.my_query"."""
    return f".{name}".endswith(f".{ending}")


def closest(wanted: str, names: Iterable[str], at_most: int = 3) -> str:
    """For messages: which endings of the names are the most like wanted, "; the closest are 'q_proj', 'k_proj'", or nothing."""
    parts = wanted.count(".") + 1
    endings = {".".join(name.split(".")[-parts:]) for name in names}
    endings = sorted(ending for ending in endings if ending and not ending.isdigit())
    found = difflib.get_close_matches(wanted, endings, at_most, cutoff=0.6)
    return f"; the closest {'is' if len(found) == 1 else 'are'} {', '.join(map(repr, found))}" if found else ""
