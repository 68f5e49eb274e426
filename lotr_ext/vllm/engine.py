"""vLLM's linear layers with cores in the slots of adapters: y_i += ((x_i A) G_slot(i)) B^T.

Layers that share A or B hold one tensor. A layer's slots are `cores` [slots, r_in, r_out], which include the scaling. x A is
computed once for modules that share A and that vLLM has packed into one layer. Under tensor parallelism each process has the
rows of A or B that belong to its part of the weight, cut by vLLM's own rules for LoRA. The sum over processes that the base
layer needs serves the adapter too. All shapes are fixed and no value of the index is read on the host, so a CUDA graph may
capture the forward.

This file imports private names of vLLM. python_tests/serving uses each of them, and names one that a version moves or drops.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
import vllm
import vllm.lora.model_manager as manager
import vllm.lora.utils as utils
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
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.utils import get_packed_modules_mapping

from ..core import fallback
from ..core.kernel_support import kernel_obstacle
from . import Factors, read_task

__all__ = ["install"]

TESTED = "0.32."
lotr = torch.ops.lotr

# vLLM's wrappers of linear layers: one LoRA for the layer, or one for each module that vLLM packs into it
LINEAR_LAYERS: tuple[type[nn.Module], ...] = (
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    ColumnParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
)


def install(factors: Factors) -> None:
    """Makes vLLM load tasks over these factors into layers with cores.

    Raises RuntimeError for a version of vLLM that is not tested, unless LOTR_VLLM_ANY=1.
    """
    if not vllm.__version__.startswith(TESTED) and os.environ.get("LOTR_VLLM_ANY") != "1":
        raise RuntimeError(
            f"vllm: expected version {TESTED}*, with which lotr_ext is tested, got {vllm.__version__}. Set LOTR_VLLM_ANY=1 to "
            f"try another version."
        )
    _adapt_only({name.rpartition(".")[2] for name in factors.layers})
    shared: dict[tuple[Any, ...], Tensor] = {}
    utils._all_lora_classes = (
        *(_native(base, factors, shared) for base in LINEAR_LAYERS),
        *utils._all_lora_classes,
    )

    def load(self: WorkerLoRAManager, request: LoRARequest) -> LoRAModel:
        cores = read_task(get_adapter_absolute_path(request.lora_path), factors)
        _check_layers(self, factors)
        return _as_adapter(self, request.lora_int_id, cores)

    WorkerLoRAManager._load_adapter = load


def _adapt_only(names: Collection[str]) -> None:
    """Restricts vLLM to linear layers of these names. Otherwise it has slots for embeddings, the head and experts too, and
    computes with them."""
    every = manager.get_supported_lora_modules

    def supported(model: nn.Module) -> list[str]:
        packed = get_packed_modules_mapping(model)
        found = [
            name for name in every(model) if not {name, *packed.get(name, ())}.isdisjoint(names)
        ]
        if not found:
            raise ValueError(
                f"LOTR_FACTORS: expected layers of the engine's model, got {sorted(names)} of another base model"
            )
        return found

    manager.get_supported_lora_modules = supported
    begin = FusedMoEConfig.__post_init__

    def begin_plain(self: FusedMoEConfig) -> None:
        self.is_lora_enabled = False  # if True, vLLM selects kernels for experts with LoRA, which do not exist on a CPU
        begin(self)

    FusedMoEConfig.__post_init__ = begin_plain


# ---- tasks as adapters -----------------------------------------------------------------------------------------------


def _as_adapter(adapters: WorkerLoRAManager, number: int, cores: Tensor) -> LoRAModel:
    """An adapter of that number that passes the vector of all cores as lora_A to each layer with cores."""
    cores = cores.to(adapters.lora_config.lora_dtype)
    same = LoRALayerWeights("all", 1, 1, cores, cores, scaling=1.0)
    own = [
        name
        for name, module in adapters._adapter_manager.modules.items()
        if hasattr(module, "lotr_parts")
    ]
    return LoRAModel(number, 1, dict.fromkeys(own, same))


def _check_layers(adapters: WorkerLoRAManager, factors: Factors) -> None:
    """Raises ValueError unless the engine adapts all layers of factors; `create_lora_weights` has checked their sizes."""
    modules = adapters._adapter_manager.modules.values()
    own = {
        name
        for module in modules
        if isinstance(module, _Native)
        for name in module.base_layer.lotr_names
    }
    missing = [name for name in factors.layers if name not in own]
    if (
        missing and get_pp_group().world_size == 1
    ):  # with pipeline parallelism: a layer of another process
        raise ValueError(
            f"factors: expected layers of the engine's model that take adapters, got {missing[0]!r}. They belong to another "
            f"base model, or the engine's lora_target_modules exclude it."
        )


# ---- layers ----------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """One module of a packed layer: its factors A [k, r_in] and B [n, r_out], cores [slots, r_in, r_out], the slice of its core
    in a task's vector, and its columns of the layer's output."""

    span: slice
    A: Tensor
    B: Tensor
    cores: Tensor
    columns: slice


class _Native:
    """Replaces the adapter code of one of vLLM's wrappers. `_native` sets the class's two attributes.

    lotr_shared: A and B by name, dtype, device and part of the weight. lotr_kernels: whether kernels for the ranks exist;
    otherwise torch's products are used.
    """

    lotr_factors: Factors
    lotr_shared: dict[tuple[Any, ...], Tensor]

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        if lora_config.fully_sharded_loras:
            raise ValueError(
                "fully_sharded_loras: expected False with LOTR_FACTORS, got True: each process holds A and B"
            )
        self.lora_config = lora_config
        factors, dtype = self.lotr_factors, lora_config.lora_dtype
        names = self.base_layer.lotr_names
        sizes = tuple(self.output_slices if self.n_slices > 1 else (self.output_size,))
        self.lotr_parts: list[Part | None] = []
        at = 0
        for name, size in zip(names, sizes, strict=True):
            part = None
            if name in factors.layers:
                A, B = (
                    self._factor(key, side, len(self.lotr_parts), dtype)
                    for key, side in zip(factors.layers[name], "AB")
                )
                if (len(A), len(B)) != (self.input_size, size):
                    raise ValueError(
                        f"LOTR_FACTORS: expected {(self.input_size, size)} features at {name}, got {(len(A), len(B))} of "
                        f"another base model"
                    )
                cores = torch.zeros(
                    max_loras, *factors.core_shape(name), dtype=dtype, device=self.device
                )
                part = Part(factors.spans[name], A, B, cores, slice(at, at + size))
            self.lotr_parts.append(part)
            at += size
        self.output_slices = sizes
        widest = max(
            (max(part.cores.shape[1:]) for part in self.lotr_parts if part is not None), default=1
        )
        self.lotr_kernels = kernel_obstacle(widest, dtype, torch.device(self.device)) is None
        # vLLM reads only the shapes of these stacks, so they have one element's memory
        like, rank = torch.zeros(1, dtype=dtype, device=self.device), lora_config.max_lora_rank
        ranks = [factors.core_shape(name)[0] if name in factors.layers else 1 for name in names]
        self.lora_a_stacked = tuple(like.expand(max_loras, 1, rank, r_in) for r_in in ranks)
        self.lora_b_stacked = tuple(like.expand(max_loras, 1, 1, rank) for _ in ranks)

    def _factor(self, key: str, side: str, place: int, dtype: torch.dtype) -> Tensor:
        """A [k, r_in] or B [n, r_out] for this process's part of the weight. place: index of the packed module."""
        whole = self.lotr_factors.tensors[key]
        own = whole if self.tp_size == 1 else self._own_rows(whole, side, place)
        cut = (
            None
            if own.shape == whole.shape
            else (type(self).__name__, place, self.input_size, self.output_size)
        )
        of = (key, dtype, str(self.device), cut)
        if of not in self.lotr_shared:
            self.lotr_shared[of] = own.to(self.device, dtype).contiguous()
        return self.lotr_shared[of]

    def _own_rows(self, whole: Tensor, side: str, place: int) -> Tensor:
        """This process's rows, by vLLM's rule for lora_A [r, k] or lora_B [n, r]."""
        given, cut = (whole.T, self.slice_lora_a) if side == "A" else (whole, self.slice_lora_b)
        if self.n_slices > 1:
            packed: list[Tensor | None] = [None] * self.n_slices
            packed[place] = given
            found = cut(packed)[place]
        else:
            found = cut(given)
        return found.T if side == "A" else found

    def reset_lora(self, index: int) -> None:
        for part in self.lotr_parts:
            if part is not None:
                part.cores[index] = 0

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """lora_a: the vector of a task's cores, from `_as_adapter`; vLLM's dummy adapters, which are zero, pass matrices."""
        if not isinstance(lora_a, Tensor) or lora_a.dim() != 1:
            return self.reset_lora(index)
        for part in self.lotr_parts:
            if part is not None:
                part.cores[index].copy_(lora_a[part.span].view(part.cores.shape[1:]))

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        if self.punica_wrapper.no_lora or not any(self.lotr_parts):
            return output
        slots = self.punica_wrapper.token_lora_indices  # [tokens], -1 for none
        tokens, y = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1])
        shrunk: dict[int, Tensor] = {}
        for part in self.lotr_parts:
            if part is None:
                continue
            if (u := shrunk.get(id(part.A))) is None:
                u = shrunk[id(part.A)] = (
                    lotr.shrink(tokens, part.A) if self.lotr_kernels else tokens @ part.A
                )
            index = slots[: len(tokens)]
            if self.lotr_kernels:
                h = lotr.row_core(u, part.cores, index, None, None, 1.0)
                lotr.expand_add_(y[:, part.columns], h, part.B)
            else:
                y[:, part.columns].addmm_(fallback.row_core(u, part.cores, 1.0, index), part.B.T)
        return y.view(output.shape)


def _native(
    base: type[nn.Module], factors: Factors, shared: dict[tuple[Any, ...], Tensor]
) -> type[nn.Module]:
    """The class of layers with cores for one of vLLM's wrappers."""

    def can_replace_layer(
        cls: type, source_layer: nn.Module, lora_config: Any, packed_modules_list: list, **rest: Any
    ) -> bool:
        asked: Mapping[str, Any] = {
            "lora_config": lora_config,
            "packed_modules_list": packed_modules_list,
            **rest,
        }
        if not base.can_replace_layer(source_layer=source_layer, **asked):
            return False
        host, _, own = source_layer.prefix.rpartition(".")
        names = packed_modules_list if len(packed_modules_list) > 1 else [own]
        source_layer.lotr_names = tuple(f"{host}.{name}" if host else name for name in names)
        return True

    body = {
        "can_replace_layer": classmethod(can_replace_layer),
        "lotr_factors": factors,
        "lotr_shared": shared,
    }
    return type(base.__name__, (_Native, base), body)  # vLLM compares the names of some classes
