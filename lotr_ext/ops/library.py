"""Loads the compiled library, and adds to its operators what C++ cannot register: shapes, version counters, checks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..compat import below_in_place, private_write


def _load() -> None:
    library = Path(__file__).parent.with_name("_C.abi3.so")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # with a name: python -m lotr_ext.info prints one line on it, and no traceback
        raise ImportError(f"lotr_ext: {_obstacle(library, error.__cause__ or error)}", name="lotr_ext") from None


def _obstacle(library: Path, error: BaseException) -> str:
    """Why the library cannot be loaded, and what to do."""
    build = "`pip install --no-build-isolation -e .` (or `make setup`) in the project's folder"
    if library.is_file():
        return f"expected a compiled extension that loads, got {error}; build it again with {build}"
    if not library.parent.is_dir():
        return f"expected a package in a folder, got {library.parent}: no library loads from an archive; install it with pip"
    inside = library.relative_to(library.parents[1])
    for folder in sys.path:  # a checkout's folder comes before the packages where Python is started in it
        if (Path(folder) / inside).is_file():
            return (
                f"expected the compiled extension {library}, got none; this source folder hides the package installed in "
                f"{folder}: start Python in another folder, or as `python -P`"
            )
    return f"expected the compiled extension {library}, got none; build it with {build}"


_load()
lotr = torch.ops.lotr


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tokens and layers: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def refuse_gradients(name: str, *arguments, why: str = "") -> None:
    """Raises if an argument requires grad; for operators without a gradient formula."""
    if any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        raise RuntimeError(
            f"lotr::{name}: expected tensors that need no gradient{why}, got one that requires grad; call it under "
            "torch.no_grad() or inside an autograd Function"
        )


def check_tensors(name: str, args: tuple, kwargs: dict | None = None, *, values: bool = False, apart: bool = False) -> None:
    """Checks that no tensor is missing and that all are on the device of the first. `Check::arguments` of csrc/torch/arg.h does
    the same for kernels in C++; this one also serves the functions of shapes, which the dispatcher calls if any tensor is on
    meta.

    values: also checks that each tensor has memory for all its elements; for kernels in Python. apart: the tensors may be on
    several devices, if all or none are on meta.
    """
    first, packet = None, name.partition(".")[0]
    for i, argument in enumerate(_operator(name)._schema.arguments):
        value, label = args[i] if i < len(args) else (kwargs or {}).get(argument.name), f"lotr::{packet}: {argument.name}"
        if value is None and str(argument.type) == "Tensor":
            raise RuntimeError(f"{label}: expected a tensor, got None")
        if not isinstance(value, Tensor):
            continue
        if first is None:
            first = argument.name, value.device
        if value.is_meta != (first[1].type == "meta") if apart else value.device != first[1]:
            raise RuntimeError(f"{label}: expected the device of {first[0]} ({first[1]}), got {value.device}")
        if values and type(value) in (Tensor, torch.nn.Parameter) and value.numel() and not value.is_meta:
            reach = value.storage_offset() + sum((n - 1) * step for n, step in zip(value.shape, value.stride())) + 1
            if value.untyped_storage().nbytes() < reach * value.element_size():
                got = f"a storage of {value.untyped_storage().nbytes()} bytes: it was freed or made shorter"
                raise RuntimeError(f"{label}: expected a tensor with memory for shape {list(value.shape)}, got {got}")


def _operator(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(lotr, packet), overload or "default")


def shapes(name: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as an operator's fake kernel, which gives shapes for tensors without values. The tensors
    are checked first, so the function may assume that all are on one device."""

    def register(function: Callable) -> Callable:
        def checked(*args, **kwargs):
            check_tensors(name, args, kwargs)
            return function(*args, **kwargs)

        torch.library.register_fake(f"lotr::{name}", checked)
        return function

    return register


def without_shapes(name: str) -> None:
    """Registers a fake kernel that raises; for operators that never appear in compiled graphs."""

    @shapes(name)
    def _(*args, **kwargs):
        device = next(t for t in args if isinstance(t, Tensor)).device
        raise RuntimeError(f"lotr::{name}: expected tensors with values, got tensors without, on {device}")


_registrations = torch.library.Library("lotr", "IMPL")


def bump_versions(name: str) -> None:
    """Registers the kernel that bumps the version counters of the arguments that an in-place operator writes.

    The stable ABI does not bump them. Without this, a backward that saved a tensor before it was written would silently compute
    a wrong gradient.
    """
    op = getattr(lotr, name).default
    written = _written(op)

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
    refuse_negative(name)


def _written(op: torch._ops.OpOverload) -> list[tuple[int, str]]:
    """Position and name of the arguments that an operator writes."""
    return [(i, a.name) for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def refuse_negative(name: str) -> None:
    """Registers how an operator that writes handles views with the negative bit (`torch._neg_view`): an error by name for an
    argument that it writes, a resolved copy for the others. The dispatcher's own fallback serves only operators that return
    what they write.

    Of `.products` overloads the kernel is at autograd's keys, because those come before the key of negative views.
    """
    op = _operator(name)
    written = _written(op)
    keys, run = (("AutogradCPU", "AutogradCUDA"), op.decompose) if name.endswith(".products") else (("Negative",), op)

    def negative(*args, **kwargs):
        for i, label in written:
            if i < len(args) and args[i] is not None and args[i].is_neg():
                raise RuntimeError(
                    f"{op._schema.name}: {label}: expected a tensor with its own values (it is written in place), got a view "
                    "that negates another's; call resolve_neg()"
                )
        return run(*(a.resolve_neg() if isinstance(a, Tensor) else a for a in args), **kwargs)

    for key in keys:
        _registrations.impl(name, negative, key)
