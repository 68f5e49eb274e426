"""The compiled library, and what every operator of it needs from Python: the version bump of arguments that it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from ..compat import below_in_place, private_write


def _load() -> None:
    library = Path(__file__).parent.with_name("_C.abi3.so")
    if not library.is_file():
        inside = library.relative_to(library.parents[1])
        for folder in sys.path:  # a checkout's folder comes before the packages where Python is started in it
            if (Path(folder) / inside).is_file():
                raise ImportError(
                    f"lotr_ext: expected the compiled extension {library}, got none; this source folder hides the package "
                    f"installed in {folder}: start Python in another folder, or as `python -P`"
                )
        raise ImportError(
            f"lotr_ext: expected the compiled extension {library}, got none; build it with "
            "`pip install --no-build-isolation -e .` (or `make setup`) in the project's folder"
        )
    torch.ops.load_library(str(library))


_load()
lotr = torch.ops.lotr


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over tokens and layers are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def refuse_gradients(name: str, *arguments, why: str = "") -> None:
    """Of operators that autograd has no formula for."""
    if any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        raise RuntimeError(
            f"lotr::{name}: expected tensors that need no gradient{why}, got one that requires grad; call it under "
            "torch.no_grad() or inside an autograd Function"
        )


_registrations = torch.library.Library("lotr", "IMPL")


def bump_versions(name: str) -> None:
    """Registers the layer that autograd expects of an in-place operator.

    The stable ABI does not bump the version of an argument that a kernel writes; without this, a tensor saved for backward
    and then written through one of these operators would give a wrong gradient in silence.
    """
    op = getattr(lotr, name).default
    written = [(i, a.name) for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def in_place(keyset, *args, **kwargs):
        values = [(label, args[i]) for i, label in written if i < len(args) and args[i] is not None]
        if torch.is_grad_enabled():
            labels = ", ".join(label for label, _ in values)
            refuse_gradients(name, *args, *kwargs.values(), why=f" (it writes {labels} in place)")
        with private_write():
            result = op.redispatch(keyset & below_in_place, *args, **kwargs)
        for _, value in values:
            torch.autograd.graph.increment_version(value)
        return result

    _registrations.impl(name, in_place, "ADInplaceOrView", with_keyset=True)
