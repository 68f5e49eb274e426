"""Cores as a vLLM adapter, for engines with and without the plugin."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from . import engine
from .files import Factors, read_factors, read_task

__all__ = ["check_layers", "expanded", "load_task", "native", "served"]


@cache
def served() -> tuple[Factors, str] | None:
    """The factors in the folder LOTR_FACTORS, and their checksum; None if it is not set."""
    where = os.environ.get("LOTR_FACTORS")
    if not where:
        return None
    factors = read_factors(where)
    return factors, factors.checksum


def check_layers(adapters: engine.Adapters, factors: Factors) -> None:
    """Raises ValueError unless the engine's model has the layers of factors, of the same sizes, and adapts them."""
    sizes, complete = engine.sizes_of_layers(adapters), engine.has_all_blocks()
    for name, (A, B) in factors.layers.items():
        if name not in sizes and not complete:
            continue
        if name not in sizes:
            raise ValueError(
                f"factors: expected layers of the engine's model that take adapters, got {name!r}; they belong to another "
                "base model, or the engine's lora_target_modules exclude it"
            )
        want, got = sizes[name], (factors.tensors[A].shape[0], factors.tensors[B].shape[0])
        if want != got:
            raise ValueError(f"factors: expected {want} features at {name}, got {got}; they belong to another base model")


def native(adapters: engine.Adapters, number: int, cores: Tensor) -> engine.LoRAModel:
    """An adapter for the plugin's layers. cores: one vector, by `Factors.spans`."""
    return engine.adapter_of_vector(adapters, number, cores)


def expanded(adapters: engine.Adapters, number: int, factors: Factors, cores: Tensor) -> engine.LoRAModel:
    """An adapter for vLLM's own layers: lora_A = A^T [r_in, k], lora_B = B (s G)^T [n, r_in]."""
    rank = max(factors.core_shape(name)[0] for name in factors.layers)
    if rank > engine.max_rank(adapters):
        raise ValueError(f"max_lora_rank: expected at least {rank}, the factors' r_in, got {engine.max_rank(adapters)}")
    layers, dtype = {}, torch.float32
    for name, span in factors.spans.items():
        A, B = (factors.tensors[key] for key in factors.layers[name])
        layers[name] = (A.T, B.to(dtype) @ cores[span].view(factors.core_shape(name)).to(dtype).T)
    return engine.adapter(adapters, number, layers, rank)


def load_task(adapters: engine.Adapters, request: engine.LoRARequest) -> engine.LoRAModel:
    """The task in a request's folder, for the plugin's layers."""
    factors, checksum = served()
    cores = read_task(engine.path_of(request), factors, checksum)
    check_layers(adapters, factors)
    return native(adapters, request.lora_int_id, cores)
