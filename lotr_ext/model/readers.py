"""Finds code that reads a layer's weight instead of calling the layer: it would ignore an adapter in the layer.

`how_read` reads the source of the class that has the layer. `hook_fusing` disables methods that copy the weights of adapted
layers into new layers (diffusers' fuse_qkv_projections, resize_token_embeddings), since the new layers would have no adapter.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from tokenize import TokenError
from types import FunctionType
from typing import Any, NoReturn

from torch import nn

from ..layers.layer import LoTRLayer

__all__ = ["How", "hook_fusing", "how_read", "unhook_fusing"]

# Classes that read a weight on one of two paths of their forward, or whose source may be missing.
_MAMBAS = (
    *("MambaMixer", "Mamba2Mixer", "FalconMambaMixer", "FalconH1Mixer", "BambaMixer", "JambaMambaMixer"),
    *("ZambaMambaMixer", "Zamba2MambaMixer", "NemotronHMamba2Mixer", "GraniteMoeHybridMambaLayer"),
)
_READERS = {"MultiheadAttention": {"out_proj"}, **{name: {"x_proj", "dt_proj", "out_proj"} for name in _MAMBAS}}
# Layers whose weight, but no adapter, the model divides by a power of two when it enters eval mode.
_DIVIDED = {"RwkvSelfAttention": "output", "RwkvFeedForward": "value"}
_HARMLESS = {"dtype", "device", "shape", "ndim", "size", "requires_grad", "is_meta", "is_cuda"}
_NOT_IN_FORWARD = ("init", "reset", "load", "save", "convert")  # in the names of methods that no forward calls


class How(Enum):
    """ONLY: the forward reads the weight and nothing in the class calls the layer. ALSO: some method reads it."""

    ONLY = "reads its weight without calling it"
    ALSO = "may read its weight without calling it"


@dataclass
class _Method:
    """A method's uses of self's children. reads: of `self.<child>.weight`; uses: other uses of `self.<child>`; names: all
    attribute names, of any object."""

    reads: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)


def _is_own(node: ast.AST | None, me: str) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me


def _method(function: FunctionType) -> _Method:
    """The _Method of a function, by its source; an empty one if it has no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, TokenError):  # no source, or text that is no Python, as in a notebook
        return _Method()
    found, me = _Method(), next(iter(inspect.unwrap(function).__code__.co_varnames), "self")  # unwrapped, as its source is
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.names.add(node.attr)
        if not _is_own(node, me) or not isinstance(node.ctx, ast.Load):
            continue
        above = parents.get(node)
        if not isinstance(above, ast.Attribute):
            found.uses.add(node.attr)
        elif above.attr == "weight" and isinstance(above.ctx, ast.Load) and not _reads_metadata(above, parents):
            found.reads.add(node.attr)
    return found


def _reads_metadata(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether code reads only properties of a weight, such as its dtype, or compares it."""
    above = parents.get(node)
    while isinstance(above, ast.Attribute) and above.attr == "data":
        node, above = above, parents.get(above)
    if isinstance(above, ast.Attribute):
        return above.attr in _HARMLESS
    return isinstance(above, ast.Compare) or (
        isinstance(above, ast.Call) and isinstance(above.func, ast.Name) and above.func.id in ("isinstance", "hasattr")
    )


@functools.cache
def _methods(cls: type) -> dict[str, _Method]:
    """The class's own and inherited methods, except nn.Module's."""
    found: dict[str, FunctionType] = {}
    for base in cls.__mro__:
        if base not in (nn.Module, object):
            for name, value in vars(base).items():
                if inspect.isfunction(value):
                    found.setdefault(name, value)
    return {name: _method(function) for name, function in found.items()}


@functools.cache
def _called_by_forward(cls: type) -> frozenset[str]:
    """forward and all methods of the class that it calls, directly or not."""
    methods, found, left = _methods(cls), set(), ["forward"]
    while left:
        name = left.pop()
        if name in methods and name not in found:
            found.add(name)
            left += methods[name].names & methods.keys()
    return frozenset(found)


def how_read(parent: nn.Module, child: str) -> tuple[str, How] | None:
    """The name of the parent's class, and how certainly it reads its child's weight without calling it; None if it does not."""
    cls = type(parent)
    known = next((base.__name__ for base in cls.__mro__ if child in _READERS.get(base.__name__, ())), None)
    if known is not None:
        return known, How.ONLY
    if _DIVIDED.get(cls.__name__) == child and getattr(getattr(parent, "config", None), "rescale_every", 0) > 0:
        return "RwkvModel in eval mode (unless its config.rescale_every is 0)", How.ONLY
    methods = _methods(cls)
    readers = {name for name, m in methods.items() if child in m.reads and not any(part in name for part in _NOT_IN_FORWARD)}
    if readers & _called_by_forward(cls) and not any(child in m.uses for m in methods.values()):
        return cls.__name__, How.ONLY
    if isinstance(parent, nn.TransformerEncoderLayer):
        return None  # apply_lotr turns its fast path off
    return (cls.__name__, How.ALSO) if any(not _is_fusing(name) for name in readers) else None


# ---- methods that would lose an adapter ------------------------------------------------------------------------------


def _is_fusing(name: str) -> bool:
    return "fuse" in name.split("_")


class Refused:
    """Replaces a method that would copy the weights of adapted layers, or replace a layer, without its adapter; raises when
    called."""

    def __init__(self, name: str, layer: str):
        self.name, self.layer = name, layer

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"{self.name}: expected layers without an adapter, which would be lost, got {self.layer!r} with one; call "
            "unload(model, merge=True) first, which merges the adapter into the weights"
        )


def _fusing(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Each module with a method that fuses adapted layers, the method's name, and one of the layers. Such a method reads the
    weight of an adapted child, or calls such a method of an inner module."""
    named, below = dict(model.named_modules()), {}
    for name, module in named.items():
        for method, uses in _methods(type(module)).items() if _has_fusing(type(module)) else ():
            if _is_fusing(method):
                layer = next((c for c, m in module.named_children() if c in uses.reads and isinstance(m, LoTRLayer)), None)
                if layer is not None:
                    layer = f"{name}.{layer}" if name else layer
                    below[name, method] = layer
                    yield module, method, layer
    for name, module in named.items() if below else ():
        for method, uses in _methods(type(module)).items() if _has_fusing(type(module)) else ():
            inside = (at for (at, inner), at_layer in below.items() if inner in uses.names and _is_inside(at, name))
            if _is_fusing(method) and (name, method) not in below and (at := next(inside, None)) is not None:
                yield module, method, next(layer for (where, _), layer in below.items() if where == at)


def _is_inside(name: str, of: str) -> bool:
    return name != of and (not of or name.startswith(f"{of}."))


@functools.cache
def _has_fusing(cls: type) -> bool:
    return any(_is_fusing(name) for base in cls.__mro__ for name, value in vars(base).items() if inspect.isfunction(value))


def _resizing(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Each transformers model with an adapted output layer, as `_fusing`: resize_token_embeddings makes a new layer."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in model.modules():
        if hasattr(module, "resize_token_embeddings") and hasattr(module, "get_output_embeddings"):
            head = module.get_output_embeddings()
            if isinstance(head, LoTRLayer):
                yield module, "resize_token_embeddings", names[id(head)]


def hook_fusing(model: nn.Module) -> None:
    """Replaces methods that would drop the adapter by Refused."""
    for module, method, layer in [*_fusing(model), *_resizing(model)]:
        module.__dict__[method] = Refused(method, layer)


def unhook_fusing(model: nn.Module) -> None:
    """Undoes hook_fusing."""
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if isinstance(value, Refused)]:
            del module.__dict__[name]
