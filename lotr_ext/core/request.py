"""Requests: contexts inside which layers use the cores of tasks, or no adapter.

A request gives each layer that it concerns a state, which is one of

    None          the layer uses its core, as without a request
    ADAPTER_OFF   the layer computes its base only
    tasks         state.cores [tasks, r_in, r_out], for experts [tasks, e, r_in, r_out], and
                  state.index_of(x): the task of each row or token of an input x, -1 for none

`disabled` and `use_tasks` open a request. It applies to the thread that opened it and to the
backwards that this thread starts: torch stores it in a thread-local, which autograd copies into its
backward threads. So a checkpoint recomputes in the same request if backward is called inside the
context.

Not here: what a state means to a layer (layers.py, experts.py) and where it is set (model.py,
tasks.py).
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from . import _torch_private as private

ADAPTER_OFF = "off"

_KEY = "lotr"  # in torch's thread-local dictionary

# Requests that are open in any thread. A layer skips the thread-local lookup if there are none.
_open_requests: set[object] = set()


@contextlib.contextmanager
def open_request(states: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Opens a request in which `state_of(module)` is states[module].

    A module that `states` does not name keeps its state from the enclosing request.
    """
    outer = current_request()
    # A token and not a count, because threads add and discard at the same time.
    token = object()
    private.set_thread_local(_KEY, {**outer, **states})
    _open_requests.add(token)
    try:
        yield
    finally:
        _open_requests.discard(token)
        private.set_thread_local(_KEY, outer)


def current_request() -> Mapping[nn.Module, Any]:
    """Returns the states of all modules in the current request, empty outside a request."""
    if _open_requests and private.has_thread_local(_KEY):
        return private.get_thread_local(_KEY)
    return {}


def state_of(module: nn.Module) -> Any:
    """Returns the state of a module in the current request, None if it has none."""
    if not _open_requests:
        return None
    return current_request().get(module)
