"""The private names of vLLM that this package uses, under names that say what for.

`python_tests/serving/test_vllm.py` uses each of them: a vLLM that moves or drops one fails there first, by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import vllm
import vllm.lora.utils as _utils
from torch import Tensor, nn
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import WorkerLoRAManager

__all__ = ["LINEAR_LAYERS", "check_version", "empty_stack", "path_of", "put_first", "refuse_first", "slots_of_tokens"]

TESTED = ("0.32.",)

# vLLM's wrappers of linear layers: one LoRA for the layer, or one for each of the modules that vLLM has packed into it
LINEAR_LAYERS: tuple[type[nn.Module], ...] = (
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    ColumnParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
)


def check_version() -> None:
    """RuntimeError for a version that the tests have not run, unless LOTR_VLLM_ANY=1."""
    if not vllm.__version__.startswith(TESTED) and os.environ.get("LOTR_VLLM_ANY") != "1":
        tested = ", ".join(f"{version}*" for version in TESTED)
        raise RuntimeError(
            f"LOTR_FACTORS: expected vLLM {tested}, which lotr_ext is tested with, got {vllm.__version__}; "
            "LOTR_VLLM_ANY=1 tries another version"
        )


def put_first(classes: tuple[type[nn.Module], ...]) -> None:
    """Lets vLLM's search for a layer's wrapper try these first."""
    _utils._all_lora_classes = (*classes, *_utils._all_lora_classes)


def refuse_first(check: Callable[[str], None]) -> None:
    """Calls check with an adapter's path before vLLM loads it; what it raises is the answer to the request."""
    load = WorkerLoRAManager._load_adapter

    def checked(self: WorkerLoRAManager, request: LoRARequest) -> object:
        check(path_of(request))
        return load(self, request)

    WorkerLoRAManager._load_adapter = checked


def path_of(request: LoRARequest) -> str:
    """The directory of an adapter."""
    return get_adapter_absolute_path(request.lora_path)


def slots_of_tokens(layer: nn.Module) -> Tensor | None:
    """The slot [tokens] (int64) of each token's adapter, -1 for none; None where no token of the batch has one."""
    wrapper = layer.punica_wrapper
    return None if wrapper.no_lora else wrapper.token_lora_indices


def empty_stack(slots: int, *size: int, like: Tensor) -> Tensor:
    """A tensor [slots, 1, ...] of that size in one element's memory: vLLM reads the shapes of its stacks, ours hold nothing."""
    return torch.zeros(1, dtype=like.dtype, device=like.device).expand(slots, 1, *size)
