"""vLLM's entry point (`vllm.general_plugins`), called once in each of its processes."""

from __future__ import annotations

import os
from functools import cache

__all__ = ["register"]


@cache
def register() -> None:
    """Serves tasks over the factors in the folder LOTR_FACTORS; if it is not set, vLLM is not changed.

    Raises:
        RuntimeError: a version of vLLM that is not tested. ValueError: no such folder.
    """
    if not os.environ.get("LOTR_FACTORS"):
        return
    from . import engine
    from .layers import native_layers
    from .loading import load_task, served

    engine.check_version()
    factors, _ = served()
    engine.adapt_only({name.rpartition(".")[2] for name in factors.layers})
    engine.put_first(native_layers(factors))
    engine.load_first(load_task)
