"""The linear layers of vLLM with cores in the slots of adapters: y_i += ((x_i A) G_slot(i)) B^T.

Layers that share A or B hold one tensor. A layer's slots are `cores` [slots, r_in, r_out], which
include the scaling. x A is computed once for modules that share A and that vLLM has packed into one
layer (q, k and v into qkv_proj).

vLLM calls what this file replaces in this order:

    get_supported_lora_modules    once: the names of layers that get slots
    can_replace_layer             for each such layer: which class replaces it
    create_lora_weights           of the new layer: the slots
    _load_adapter                 when a task is requested: its file
    set_lora                      of each layer: the task goes into a slot
    _apply_lora_to_output         in each forward

With tensor parallelism each process has the rows of A or B that belong to its part of the weight,
cut by vLLM's rules for LoRA. The sum over processes that the base layer needs then includes the
adapter. All shapes are fixed and no value of the index is read on the host, so that a CUDA graph
may capture the forward.

This file imports private names of vLLM. python_tests/serving uses each of them, and fails if a
version moves or drops one.
"""

import os
from collections.abc import Callable, Collection, Iterable
from itertools import accumulate
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
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.utils import get_packed_modules_mapping

from ..core import fallback
from ..core.call import RowChoice
from ..core.kernel_support import kernel_obstacle
from . import EngineFactors, read_task

TESTED_VERSION = "0.32."
lotr = torch.ops.lotr

# vLLM's wrappers of linear layers: one LoRA for the layer, or one for each module packed into it.
LINEAR_LAYERS: tuple[type[nn.Module], ...] = (
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    ColumnParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
)


def install(factors: EngineFactors) -> None:
    """Makes vLLM load tasks over these factors into layers with cores.

    Raises:
        RuntimeError: If this version of vLLM is not tested, unless LOTR_VLLM_ANY=1.
    """
    is_tested = vllm.__version__.startswith(TESTED_VERSION)
    if not is_tested and os.environ.get("LOTR_VLLM_ANY") != "1":
        raise RuntimeError(
            f"vllm: expected version {TESTED_VERSION}*, with which lotr_ext is tested, got "
            f"{vllm.__version__}. Set LOTR_VLLM_ANY=1 to try another version."
        )
    # vLLM has no interface for other kinds of adapters. So this replaces its choice of layers, the
    # classes of layers, and the method that loads an adapter.
    _adapt_only({name.rpartition(".")[2] for name in factors.layers})
    # With the names of vLLM's classes, because vLLM compares the names of some.
    layer_classes = [
        type(base.__name__, (_LayerWithCores, base), {"lotr_factors": factors})
        for base in LINEAR_LAYERS
    ]
    # Before vLLM's classes, because vLLM uses the first one that can replace a layer.
    utils._all_lora_classes = (*layer_classes, *utils._all_lora_classes)

    def load(self: WorkerLoRAManager, request: LoRARequest) -> LoRAModel:
        path = utils.get_adapter_absolute_path(request.lora_path)
        cores = read_task(path, factors).to(self.lora_config.lora_dtype)
        layers = {
            name: layer
            for name, layer in self._adapter_manager.modules.items()
            if isinstance(layer, _LayerWithCores)
        }
        _check_layers(layers.values(), factors)
        # vLLM hands each layer's lora_A and lora_B to its `set_lora`. Here all layers share one
        # "LoRA" of rank 1: its lora_A is the vector of the task, from which each takes its span.
        weights = LoRALayerWeights(
            module_name="all", rank=1, lora_alpha=1, lora_a=cores, lora_b=cores, scaling=1.0
        )
        return LoRAModel(request.lora_int_id, rank=1, loras=dict.fromkeys(layers, weights))

    WorkerLoRAManager._load_adapter = load


def _adapt_only(names: Collection[str]) -> None:
    """Restricts vLLM's adapters to linear layers of these names, outside of experts.

    Otherwise vLLM would make slots for embeddings, the head and experts as well, and compute with
    them.
    """
    all_supported = manager.get_supported_lora_modules

    def selected_by_name(model: nn.Module) -> list[str]:
        packed = get_packed_modules_mapping(model)
        selected = [
            name
            for name in all_supported(model)
            if not {name, *packed.get(name, ())}.isdisjoint(names)
        ]
        if not selected:
            raise ValueError(
                f"LOTR_FACTORS: expected layers of the engine's model, got {sorted(names)} of "
                f"another base model. Export the factors from an adapter of this model."
            )
        return selected

    manager.get_supported_lora_modules = selected_by_name
    initialize = FusedMoEConfig.__post_init__

    def initialize_without_lora(self: FusedMoEConfig) -> None:
        # With True, vLLM would select kernels for experts with LoRA, which a CPU does not have.
        self.is_lora_enabled = False
        initialize(self)

    FusedMoEConfig.__post_init__ = initialize_without_lora


def _check_layers(layers: Iterable["_LayerWithCores"], factors: EngineFactors) -> None:
    """Checks that the engine adapts all layers of factors. `_part` has checked their sizes.

    Raises:
        ValueError: If it does not.
    """
    adapted = {name for layer in layers for name in layer.base_layer.lotr_names}
    missing = [name for name in factors.layers if name not in adapted]
    # With pipeline parallelism, other processes have the other layers.
    if missing and get_pp_group().world_size == 1:
        raise ValueError(
            f"factors: expected layers of the engine's model that accept adapters, got "
            f"{missing[0]!r}. They belong to another base model, or the engine's "
            f"lora_target_modules exclude it."
        )


# ---- layers --------------------------------------------------------------------------------------


class Part(NamedTuple):
    """One module of a packed layer.

    Attributes:
        span: The slice of its core in the vector of a task.
        A: [k, r_in].
        B: [n, r_out].
        cores: [slots, r_in, r_out].
        columns: Its columns of the layer's output.
    """

    span: slice
    A: Tensor
    B: Tensor
    cores: Tensor
    columns: slice


class _LayerWithCores:
    """Mixin that replaces the adapter code of one of vLLM's wrappers, see `install`.

    Attributes:
        lotr_factors: The factors of all layers.
        lotr_parts: The modules of this layer that the adapter adapts.
        lotr_has_kernels: Whether lotr_ext's kernels support the dtype, rank and device.
    """

    lotr_factors: EngineFactors
    lotr_parts: list[Part]
    lotr_has_kernels: bool

    @classmethod
    def can_replace_layer(
        cls,
        source_layer: nn.Module,
        lora_config: Any,
        packed_modules_list: list[str],
        **options: Any,
    ) -> bool:
        """Whether this class replaces a layer, by the rules of vLLM's wrapper.

        If so, the layer gets `lotr_names`, the full names of its modules. `create_lora_weights`
        needs them, and only this call can compute them.

        Args:
            source_layer: The layer.
            lora_config: vLLM's LoRAConfig.
            packed_modules_list: The names of the modules that vLLM has packed into the layer.
            options: For vLLM's wrapper.
        """
        can_replace = super().can_replace_layer(
            source_layer=source_layer,
            lora_config=lora_config,
            packed_modules_list=packed_modules_list,
            **options,
        )
        if can_replace:
            parent, dot, child = source_layer.prefix.rpartition(".")
            children = packed_modules_list if len(packed_modules_list) > 1 else [child]
            source_layer.lotr_names = tuple(f"{parent}{dot}{name}" for name in children)
        return can_replace

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        """Makes the slots. vLLM calls it once.

        Args:
            max_loras: The number of slots.
            lora_config: vLLM's LoRAConfig.
            model_config: Not read.

        Raises:
            ValueError: If the engine shards LoRAs or computes them in a second stream, or if it has
                another base model.
        """
        if lora_config.fully_sharded_loras or self._enable_aux_cuda_stream:
            raise ValueError(
                "LOTR_FACTORS: expected an engine without fully_sharded_loras and without "
                "VLLM_LORA_ENABLE_DUAL_STREAM, which replace the code that adds the cores, got one "
                "with at least one of these. Start it with neither."
            )
        self.lora_config = lora_config
        sizes = tuple(self.output_slices if self.n_slices > 1 else (self.output_size,))
        columns = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes))]
        modules = zip(self.base_layer.lotr_names, columns, strict=True)
        self.lotr_parts = [
            self._part(name, packed_index, columns_of_module, max_loras)
            for packed_index, (name, columns_of_module) in enumerate(modules)
            if name in self.lotr_factors.layers
        ]
        rank = max((max(part.cores.shape[1:]) for part in self.lotr_parts), default=1)
        device = torch.device(self.device)
        self.lotr_has_kernels = kernel_obstacle(rank, lora_config.lora_dtype, device) is None
        # vLLM's stacks of LoRAs, one per packed module. It reads only their shapes, so all share
        # one element of memory.
        element = torch.zeros(1, dtype=lora_config.lora_dtype, device=device)
        like_A = element.expand(max_loras, 1, lora_config.max_lora_rank, 1)
        self.lora_a_stacked = (like_A,) * len(sizes)
        self.lora_b_stacked = (like_A.mT,) * len(sizes)

    def _part(self, name: str, packed_index: int, columns: slice, slots: int) -> Part:
        """Returns the part of an adapted module.

        Args:
            name: Its name in the base model.
            packed_index: Its index among the modules of this layer.
            columns: Its columns of the layer's output.
            slots: The number of slots.
        """
        entry = self.lotr_factors.layers[name]
        A = self._factor(entry.A, "A", packed_index)
        B = self._factor(entry.B, "B", packed_index)
        expected = (self.input_size, columns.stop - columns.start)
        if (len(A), len(B)) != expected:
            raise ValueError(
                f"LOTR_FACTORS: expected {expected} features at {name}, got {(len(A), len(B))} of "
                f"another base model. Export the factors from an adapter of this model."
            )
        return Part(
            span=self.lotr_factors.spans[name],
            A=A,
            B=B,
            cores=A.new_zeros(slots, A.shape[1], B.shape[1]),
            columns=columns,
        )

    def _factor(self, key: str, side: str, packed_index: int) -> Tensor:
        """Returns A [k, r_in] or B [n, r_out] for this process's part of the weight.

        Args:
            key: The name of the factor.
            side: "A" or "B".
            packed_index: The index of the packed module.
        """
        full = self.lotr_factors.tensors[key]
        rows = full if self.tp_size == 1 else self._rows_of_process(full, side, packed_index)
        # Layers that share a factor share its copy on the device, unless they need other rows.
        # Which rows a layer needs follows from its class, its sizes and the packed module.
        choice_of_rows = None
        if rows.shape != full.shape:
            choice_of_rows = (type(self).__name__, packed_index, self.input_size, self.output_size)
        dtype = self.lora_config.lora_dtype
        on_device = self.lotr_factors.on_device
        cache_key = (key, dtype, str(self.device), choice_of_rows)
        if cache_key not in on_device:
            on_device[cache_key] = rows.to(self.device, dtype).contiguous()
        return on_device[cache_key]

    def _rows_of_process(self, full: Tensor, side: str, packed_index: int) -> Tensor:
        """Returns this process's rows of A or B, by vLLM's rules for lora_A and lora_B."""
        if side == "A":
            return self._cut(self.slice_lora_a, full.T, packed_index).T
        return self._cut(self.slice_lora_b, full, packed_index)

    def _cut(self, rule: Callable[..., Any], matrix: Tensor, packed_index: int) -> Tensor:
        # vLLM's rules take a list for a packed layer, and a tensor for any other.
        if self.n_slices == 1:
            return rule(matrix)
        matrices: list[Tensor | None] = [None] * self.n_slices
        matrices[packed_index] = matrix
        return rule(matrices)[packed_index]

    def reset_lora(self, index: int) -> None:
        for part in self.lotr_parts:
            part.cores[index] = 0

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Writes a task into a slot.

        Args:
            index: The slot.
            lora_a: The vector of the task, see `install`. A matrix in a dummy adapter of vLLM,
                which leaves the slot at zero.
            lora_b: Not read.
        """
        if not isinstance(lora_a, Tensor) or lora_a.dim() != 1:
            self.reset_lora(index)
            return
        for part in self.lotr_parts:
            part.cores[index].copy_(lora_a[part.span].view(part.cores.shape[1:]))

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        if self.punica_wrapper.no_lora or not self.lotr_parts:
            return output
        x_rows = x.reshape(-1, x.shape[-1])
        y = output.view(-1, output.shape[-1])
        # The slot of each row, -1 for none.
        slots = self.punica_wrapper.token_lora_indices[: len(x_rows)]
        projections: dict[int, Tensor] = {}
        for part in self.lotr_parts:
            # Once for all modules that share A.
            if id(part.A) not in projections:
                projections[id(part.A)] = (
                    lotr.shrink(x_rows, part.A) if self.lotr_has_kernels else x_rows @ part.A
                )
            u = projections[id(part.A)]
            if self.lotr_has_kernels:
                # The cores include s.
                h = lotr.row_core(u, part.cores, index=slots, offs=None, tokens=None, scaling=1.0)
                lotr.expand_add_(y[:, part.columns], h, part.B)
            else:
                h = fallback.row_core(u, part.cores, 1.0, RowChoice(slots))
                y[:, part.columns].addmm_(h, part.B.T)
        return y.view(output.shape)
