"""State of a request: the contexts `disabled` and `mixed`, and their effect on calls inside them.

No module holds this state, so threads and asyncio tasks that share a model do not see each other's contexts. Each open context
is an `Opened`. The contexts in force for a call are

    in forward                     those open in this thread or task
    in a hook of backward          those of the thread that called backward, also in autograd's own threads
    in a checkpoint's region,      those in force when the region began in forward, and those that its own code
    run again in backward          opens: the context may be closed by then, and autograd may use another thread
    under torch.compile            the same, determined at each call of compiled code

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

from ..compat import carried, carry, checkpoint_regions, graph_task, is_compiling, run_unseen

if TYPE_CHECKING:
    from .mixture import Mixture

    Said = Mixture | Literal[False]

__all__ = ["NOW", "OFF", "InRequests", "in_force"]

OFF: Literal[False] = False  # the entry for a layer whose adapter a context switches off


class Opened:
    """An open context. layers: OFF or a Mixture for each layer. regions: the checkpointed regions in which it was opened."""

    def __init__(self, layers: Mapping[nn.Module, Said]):
        self.layers, self.open = layers, True
        self.regions = [weakref.ref(region) for region, _ in checkpoint_regions()]

    def inside(self, region: object) -> bool:
        """Whether it was opened by the code of region."""
        return any(ref() is region for ref in self.regions)


_opened: ContextVar[tuple[Opened, ...]] = ContextVar("lotr_ext.opened", default=())
_all: set[Opened] = set()  # of all threads
_kept: weakref.WeakKeyDictionary[object, tuple[Opened, ...]] = weakref.WeakKeyDictionary()  # in force where a region began
_lock = threading.RLock()


class _Answers(dict):
    """For a layer: (whether its adapter is off, its mixture) by the contexts in force. For NOW: whether any context may
    be in force, True or None. None is stored here while no context is open in any thread and no region can need one."""

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
    """Mixin of layers that contexts switch off or give a mixture. traced: the state from contexts that compiled code opens, for
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
        """The cores of several adapters, one per row of the batch, in an open context."""
        return self._state()[1]


class _Now:
    any = said_of


NOW = _Now()
_answers[NOW] = None


def _settle() -> None:
    """Stores None as the answer again if no context can be in force."""
    with _lock:
        if not _all and not _kept:
            _answers[NOW] = None


def _here() -> tuple[Opened, ...]:
    """The contexts open in this thread or task."""
    opened = _opened.get()
    if not opened and graph_task() >= 0:
        thread, opened = carried() or (0, ())
        opened = () if thread == threading.get_ident() else opened  # this thread's own are in its ContextVar
    return tuple(one for one in opened if one.open)


def _in_force() -> tuple[Opened, ...]:
    """The contexts in force for a call, the innermost last."""
    here = _here()
    if not here and not _kept:
        return ()
    regions = [] if is_inference_mode_enabled() else checkpoint_regions()  # without a graph there is no recomputation
    again = next((i for i, (_, recomputed) in enumerate(regions) if recomputed), len(regions))
    if again < len(regions):
        region = regions[again][0]
        here = (*_kept.get(region, ()), *(one for one in here if one.inside(region)))
    for region, _ in regions[:again]:
        if region not in _kept and (before := tuple(one for one in here if not one.inside(region))):
            _kept[region] = before
    return here


def _state_of(opened: tuple[Opened, ...], layer: nn.Module) -> tuple[bool, Mixture | None]:
    """Whether any context switches the adapter off, and the innermost mixture."""
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
    """Context in which each of these layers runs without its adapter (OFF) or with the cores of a Mixture."""
    if is_compiling():  # opened and closed inside of compiled code: Dynamo traces attributes of modules, not these tables
        with _traced(layers):
            yield
        return
    one = Opened(layers)
    try:
        with _lock:
            _all.add(one)
            _answers.pop(NOW, None)
        # without the closed ones: a context that another thread or task has closed stays in this one's ContextVar
        _put((*(other for other in _opened.get() if other.open), one))
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
