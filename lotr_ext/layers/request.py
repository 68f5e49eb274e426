"""State of a request: the contexts `disabled` and `mixed`, and what they change for the calls that are made inside of them.

No module holds this state, so threads and asyncio tasks that share a model do not see each other's contexts. Each open context
is an `Opened`. The contexts in force for a call are

    in forward                     those that this thread or task has open
    in a hook of backward          the same, also in a thread of autograd's own: those of the thread that called backward
    in a checkpoint's region,      those that were in force where the region began in forward, and those that its own code
    run again in backward          opens: the context may be left by then, and autograd may run it in another thread
    under torch.compile            the same, found anew at each call of compiled code

Contexts may be closed in any order, also by another thread: each removes itself, and restores no earlier state.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal

from torch import is_inference_mode_enabled, nn
from torch.compiler import is_compiling

from ..compat import carried, carry, checkpoint_regions, graph_task, run_unseen

if TYPE_CHECKING:
    from .mixture import Mixture

    Said = Mixture | Literal[False]

__all__ = ["NOW", "OFF", "InRequests", "in_force"]

OFF: Literal[False] = False  # what a context says of a layer that it switches off


class Opened:
    """An open context. layers: OFF or a Mixture for each layer. regions: the checkpointed regions in which it was opened."""

    def __init__(self, layers: Mapping[nn.Module, Said]):
        self.layers, self.open = layers, True
        self.regions = [weakref.ref(region) for region, _ in checkpoint_regions()]

    def inside(self, region: object) -> bool:
        """Whether the code of region opened it."""
        return any(ref() is region for ref in self.regions)


_opened: ContextVar[tuple[Opened, ...]] = ContextVar("lotr_ext.opened", default=())
_all: set[Opened] = set()  # of all threads
_kept: weakref.WeakKeyDictionary[object, tuple[Opened, ...]] = weakref.WeakKeyDictionary()  # in force where a region began
_lock = threading.RLock()


class _Answers(dict):
    """For a layer: (whether its adapter is off, its mixture), as the contexts in force say. For NOW: whether any context may
    be in force, True or None. That None is stored here while no context is open anywhere and no region can need one again."""

    def __missing__(self, asked: object) -> tuple[bool, Mixture | None] | bool | None:
        if isinstance(asked, nn.Module):
            return _state_of(_in_force(), asked)
        if _here() or _kept:
            return True
        _settle()
        return None


run_unseen(_Answers.__missing__)
_answers = _Answers()

# The getter is a C function. So Dynamo treats the property as an attribute and guards on its value at each call of compiled
# code. While no context is open, NOW.any makes no Python call.
said_of = property(_answers.__getitem__)


class InRequests:
    """Mixin of a layer that contexts switch off or give a mixture. traced: what contexts that compiled code opens change for
    the layer; () otherwise. _off: whether an attribute of the layer switches it off."""

    traced: tuple[Said, ...] = ()
    _off, _said = False, said_of

    def _state(self) -> tuple[bool, Mixture | None]:
        """(whether the adapter is off, its mixture)"""
        off, mixture = self._said
        for said in self.traced:
            off, mixture = off or said is OFF, mixture if said is OFF else said
        return off or self._off, mixture

    @property
    def mixture(self) -> Mixture | None:
        """The cores of several adapters, one a row of the batch, in an open context."""
        return self._state()[1]


class _Now:
    any = said_of


NOW = _Now()
_answers[NOW] = None


def _settle() -> None:
    """Makes the answer None again where it can only be that."""
    with _lock:
        if not _all and not _kept:
            _answers[NOW] = None


def _here() -> tuple[Opened, ...]:
    """What is open in this thread or task."""
    opened = _opened.get()
    if not opened and graph_task() >= 0:
        thread, opened = carried() or (0, ())
        opened = () if thread == threading.get_ident() else opened  # this thread's own are in its ContextVar
    return tuple(one for one in opened if one.open)


def _in_force() -> tuple[Opened, ...]:
    """The contexts that are in force for a call made now, the innermost last."""
    here = _here()
    if not here and not _kept:
        return ()
    regions = [] if is_inference_mode_enabled() else checkpoint_regions()  # without a graph nothing is run again
    again = next((i for i, (_, recomputed) in enumerate(regions) if recomputed), len(regions))
    if again < len(regions):
        region = regions[again][0]
        here = (*_kept.get(region, ()), *(one for one in here if one.inside(region)))
    for region, _ in regions[:again]:
        if region not in _kept and (before := tuple(one for one in here if not one.inside(region))):
            _kept[region] = before
    return here


def _state_of(opened: tuple[Opened, ...], layer: nn.Module) -> tuple[bool, Mixture | None]:
    """Off if any context says so, and the innermost mixture."""
    off, mixture = False, None
    for one in opened:
        said = one.layers.get(layer)
        if said is OFF:
            off = True
        elif said is not None:
            mixture = said
    return off, mixture


@contextmanager
def in_force(layers: Mapping[nn.Module, Said]) -> Iterator[None]:
    """Inside, each of these layers is called without its adapter (OFF) or with the cores of a Mixture."""
    if is_compiling():  # opened and closed inside of compiled code: Dynamo traces attributes of modules, not these tables
        with _traced(layers):
            yield
        return
    one = Opened(layers)
    try:
        with _lock:
            _all.add(one)
            _answers.pop(NOW, None)
        _put((*_opened.get(), one))
        yield
    finally:
        one.open = False
        _all.discard(one)
        _put(tuple(other for other in _opened.get() if other is not one))
        _settle()


def _put(opened: tuple[Opened, ...]) -> None:
    _opened.set(opened)
    carry((threading.get_ident(), opened))


@contextmanager
def _traced(layers: Mapping[nn.Module, Said]) -> Iterator[None]:
    before = [(layer, layer.traced) for layer in layers]
    try:
        for layer, said in layers.items():
            layer.traced = (*layer.traced, said)
        yield
    finally:
        for layer, traced in before:
            layer.traced = traced
