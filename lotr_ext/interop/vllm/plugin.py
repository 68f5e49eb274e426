"""vLLM's entry point (`vllm.general_plugins`), called once in each of its processes."""

from __future__ import annotations

import os
from functools import cache

__all__ = ["register"]


@cache
def register() -> None:
    """Serves tasks over the factors in the folder that LOTR_FACTORS names; without it, vLLM stays as it is.

    Raises:
        RuntimeError: a version of vLLM without tests. ValueError: no such folder.
    """
    where = os.environ.get("LOTR_FACTORS")
    if not where:
        return
    from . import engine
    from .files import check_task, read_factors
    from .layers import native_layers

    engine.check_version()
    factors = read_factors(where)
    checksum = factors.checksum
    engine.put_first(native_layers(factors))
    engine.refuse_first(lambda path: check_task(path, factors, checksum))
