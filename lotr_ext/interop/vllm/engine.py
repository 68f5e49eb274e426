"""The private names of vLLM that this package uses, under descriptive names.

`python_tests/serving` uses each of them: if a vLLM version moves or drops one, these tests name it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import vllm
import vllm.lora.model_manager as _manager
import vllm.lora.utils as _utils
from torch import Tensor, nn
from vllm.distributed import get_pp_group
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.utils import get_packed_modules_mapping

__all__ = [
    "LINEAR_LAYERS",
    "Adapters",
    "LoRAModel",
    "LoRARequest",
    "adapt_only",
    "adapter",
    "adapter_of_vector",
    "adapters_of",
    "check_version",
    "client_and_names",
    "empty_stack",
    "has_all_blocks",
    "load_first",
    "max_rank",
    "names_in_use",
    "path_of",
    "put_first",
    "sizes_of_layers",
    "slots_of_tokens",
]

Adapters = WorkerLoRAManager  # holds a worker's adapters

TESTED = ("0.32.",)

# vLLM's wrappers of linear layers: one LoRA for the layer, or one for each module that vLLM packs into it
LINEAR_LAYERS: tuple[type[nn.Module], ...] = (
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    ColumnParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
)


def check_version() -> None:
    """Raises RuntimeError for a version of vLLM that is not tested, unless LOTR_VLLM_ANY=1."""
    if not vllm.__version__.startswith(TESTED) and os.environ.get("LOTR_VLLM_ANY") != "1":
        tested = ", ".join(f"{version}*" for version in TESTED)
        raise RuntimeError(
            f"vllm: expected version {tested}, which lotr_ext is tested with, got {vllm.__version__}; "
            "set LOTR_VLLM_ANY=1 to try another version"
        )


def adapt_only(names: Collection[str]) -> None:
    """Restricts vLLM to linear layers of these names. Otherwise it has slots for embeddings, the head and experts too, and
    computes with them."""
    every = _manager.get_supported_lora_modules

    def supported(model: nn.Module) -> list[str]:
        packed = get_packed_modules_mapping(model)
        found = [name for name in every(model) if not {name, *packed.get(name, ())}.isdisjoint(names)]
        if not found:
            raise ValueError(f"LOTR_FACTORS: expected layers of the engine's model, got {sorted(names)}; another base model's?")
        return found

    _manager.get_supported_lora_modules = supported
    begin = FusedMoEConfig.__post_init__

    def begin_plain(self: FusedMoEConfig) -> None:
        self.is_lora_enabled = False  # if True, vLLM selects kernels for experts with LoRA, which do not exist on a CPU
        begin(self)

    FusedMoEConfig.__post_init__ = begin_plain


def put_first(classes: tuple[type[nn.Module], ...]) -> None:
    """Makes vLLM's search for a layer's wrapper try these first."""
    _utils._all_lora_classes = (*classes, *_utils._all_lora_classes)


def load_first(load: Callable[[Adapters, LoRARequest], LoRAModel | None]) -> None:
    """Makes vLLM load adapters by `load`; if it returns None, the previous loader is used. An error of load is the
    answer to the request."""
    before = WorkerLoRAManager._load_adapter

    def loaded(self: Adapters, request: LoRARequest) -> LoRAModel:
        own = load(self, request)
        return before(self, request) if own is None else own

    WorkerLoRAManager._load_adapter = loaded


def path_of(request: LoRARequest) -> str:
    """The directory of an adapter."""
    return get_adapter_absolute_path(request.lora_path)


def adapters_of(worker: Any) -> Adapters | None:
    """The adapters of one of vLLM's workers; None without enable_lora."""
    return getattr(worker.model_runner, "lora_manager", None)


def adapter(adapters: Adapters, number: int, layers: Mapping[str, tuple[Tensor, Tensor]], rank: int) -> LoRAModel:
    """An adapter of that number with alpha / r = 1. layers: lora_A and lora_B by transformers' names."""
    mapper = getattr(adapters._adapter_manager.model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    dtype, made = adapters.lora_config.lora_dtype, {}
    for layer, (A, B) in layers.items():
        name, _ = parse_fine_tuned_lora_name(f"base_model.model.{layer}.lora_A.weight", mapper)
        made[name] = LoRALayerWeights(name, rank, rank, A.to(dtype), B.to(dtype), scaling=1.0)
    return LoRAModel(number, rank, made)


def adapter_of_vector(adapters: Adapters, number: int, vector: Tensor) -> LoRAModel:
    """An adapter of that number that passes the vector as lora_A to each of `layers.native_layers`."""
    vector = vector.to(adapters.lora_config.lora_dtype)
    same = LoRALayerWeights("all", 1, 1, vector, vector, scaling=1.0)
    own = [name for name, module in adapters._adapter_manager.modules.items() if hasattr(module, "lotr_parts")]
    return LoRAModel(number, 1, dict.fromkeys(own, same))


def sizes_of_layers(adapters: Adapters) -> dict[str, tuple[int, int]]:
    """(in_features, out_features), of the unsharded layer, by name, of the layers that take adapters."""
    manager = adapters._adapter_manager
    found = {}
    for name, module in manager.modules.items():
        if isinstance(module, LINEAR_LAYERS):
            base, packed = module.base_layer, manager.packed_modules.get(name)
            for own, size in zip(packed or [name], _outputs(base, packed is not None), strict=True):
                found[own] = (base.input_size, size)
    return found


def _outputs(base: nn.Module, packed: bool) -> list[int]:
    if not packed:
        return [base.output_size]
    if isinstance(base, QKVParallelLinear):  # output_sizes counts replicated keys and values
        heads = (base.total_num_heads * base.head_size, base.total_num_kv_heads * base.head_size)
        return [*heads, base.total_num_kv_heads * base.v_head_size]
    return base.output_sizes


def has_all_blocks() -> bool:
    """False under pipeline parallelism."""
    return get_pp_group().world_size == 1


def max_rank(adapters: Adapters) -> int:
    """The maximal rank of vLLM's own LoRA slots."""
    return adapters.lora_config.max_lora_rank


def names_in_use(engine: Any) -> set[str]:
    """The names of the adapters of unfinished requests. engine: an LLMEngine or an AsyncLLM."""
    return {state.lora_name for state in engine.output_processor.request_states.values() if state.lora_name is not None}


def client_and_names(state: Any) -> tuple[Any, dict[str, LoRARequest]]:
    """From an HTTP server's state: its engine, and the adapters by the names in requests."""
    return state.engine_client, state.openai_serving_models.lora_requests


def slots_of_tokens(layer: nn.Module) -> Tensor | None:
    """The slot [tokens] (int64) of each token's adapter, -1 for none; None if no token of the batch has one."""
    wrapper = layer.punica_wrapper
    return None if wrapper.no_lora else wrapper.token_lora_indices


def empty_stack(slots: int, *size: int, like: Tensor) -> Tensor:
    """A tensor [slots, 1, ...] of that size in one element's memory: vLLM reads only the shapes of these stacks."""
    return torch.zeros(1, dtype=like.dtype, device=like.device).expand(slots, 1, *size)
