"""vLLM's linear layers with cores in the slots: y_i += ((x_i A) G_slot(i)) B^T.

Layers that share A or B hold one tensor. A layer's slots are `cores` [slots, r_in, r_out], which include the scaling. x A is
computed once for modules that share A and that vLLM has packed into one layer. Under tensor parallelism each
process has the rows of A or B that belong to its part of the weight, cut by vLLM's own rules for LoRA. The sum over processes
that the base layer needs serves the adapter too.

All shapes are fixed and no value of the index is read on the host, so a CUDA graph may capture the forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...ops import planner
from ...ops.composite import rows
from . import engine
from .files import Factors

__all__ = ["native_layers"]


class Part(NamedTuple):
    """One module of a packed layer: its factors A [k, r_in] and B [n, r_out], cores [slots, r_in, r_out], the slice
    of its core in a task's vector, and its columns of the layer's output."""

    span: slice
    A: Tensor
    B: Tensor
    cores: Tensor
    columns: slice


class _Native:
    """Replaces the adapter code of one of vLLM's wrappers. `native_layers` sets the class's two attributes.

    lotr_shared: A and B by name, dtype, device and part of the weight. lotr_kernels: whether kernels for the ranks exist;
    otherwise torch's products are used.
    """

    lotr_factors: Factors
    lotr_shared: dict[tuple[Any, ...], Tensor]

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        if lora_config.fully_sharded_loras:
            raise ValueError(
                "fully_sharded_loras: expected False with LOTR_FACTORS, got True; each process holds A and B whole"
            )
        self.lora_config = lora_config
        factors, dtype = self.lotr_factors, lora_config.lora_dtype
        names = self.base_layer.lotr_names
        sizes = self.output_slices if self.n_slices > 1 else (self.output_size,)
        self.lotr_parts: list[Part | None] = []
        at = 0
        for name, size in zip(names, sizes, strict=True):
            part = None
            if name in factors.layers:
                A, B = (self._factor(key, side, len(self.lotr_parts), dtype) for key, side in zip(factors.layers[name], "AB"))
                if (len(A), len(B)) != (self.input_size, size):
                    raise ValueError(
                        f"LOTR_FACTORS: expected {(self.input_size, size)} features at {name}, got {(len(A), len(B))}; they "
                        "belong to another base model"
                    )
                cores = torch.zeros(max_loras, *factors.core_shape(name), dtype=dtype, device=self.device)
                part = Part(factors.spans[name], A, B, cores, slice(at, at + size))
            self.lotr_parts.append(part)
            at += size
        self.output_slices = tuple(sizes)
        widest = max((max(part.cores.shape[1:]) for part in self.lotr_parts if part is not None), default=1)
        self.lotr_kernels = planner.obstacle_to_kernels(widest, dtype, torch.device(self.device)) is None
        ranks = [factors.core_shape(name) if name in factors.layers else (1, 1) for name in names]
        like = torch.empty(0, dtype=dtype, device=self.device)
        rank = lora_config.max_lora_rank
        self.lora_a_stacked = tuple(engine.empty_stack(max_loras, rank, r_in, like=like) for r_in, _ in ranks)
        self.lora_b_stacked = tuple(engine.empty_stack(max_loras, 1, rank, like=like) for _ in ranks)

    def _factor(self, key: str, side: str, place: int, dtype: torch.dtype) -> Tensor:
        """A [k, r_in] or B [n, r_out] for this process's part of the weight. place: index of the packed module."""
        whole = self.lotr_factors.tensors[key]
        own = whole if self.tp_size == 1 else self._own_rows(whole, side, place)
        cut = None if own.shape == whole.shape else (type(self).__name__, place, self.input_size, self.output_size)
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
        """lora_a: a task's vector of cores, from `loading.native`; vLLM's dummy adapters, which are zero, pass matrices."""
        if not isinstance(lora_a, Tensor) or lora_a.dim() != 1:
            return self.reset_lora(index)
        for part in self.lotr_parts:
            if part is not None:
                part.cores[index].copy_(lora_a[part.span].view(part.cores.shape[1:]))

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        slots = engine.slots_of_tokens(self)
        if slots is None or not any(self.lotr_parts):
            return output
        tokens, y = rows(x), rows(output)
        shrunk: dict[int, Tensor] = {}
        for part in self.lotr_parts:
            if part is None:
                continue
            u = shrunk.get(id(part.A))
            if u is None:
                u = shrunk[id(part.A)] = ops.shrink(tokens, part.A) if self.lotr_kernels else tokens @ part.A
            h = ops.row_core(u, part.cores, index=slots[: len(tokens)])
            if self.lotr_kernels:
                ops.expand_add_(y[:, part.columns], h, part.B)
            else:
                y[:, part.columns].addmm_(h, part.B.T)
        return y.view(output.shape)


def native_layers(factors: Factors) -> tuple[type[nn.Module], ...]:
    """Classes for `engine.put_first`, one for each of vLLM's wrappers of linear layers."""
    shared: dict[tuple[Any, ...], Tensor] = {}
    return tuple(_native(base, factors, shared) for base in engine.LINEAR_LAYERS)


def _native(base: type[nn.Module], factors: Factors, shared: dict[tuple[Any, ...], Tensor]) -> type[nn.Module]:
    def can_replace_layer(cls: type, source_layer: nn.Module, lora_config: Any, packed_modules_list: list, **rest: Any) -> bool:
        asked = {"source_layer": source_layer, "lora_config": lora_config, "packed_modules_list": packed_modules_list, **rest}
        if not base.can_replace_layer(**asked):
            return False
        host, _, own = source_layer.prefix.rpartition(".")
        names = packed_modules_list if len(packed_modules_list) > 1 else [own]
        source_layer.lotr_names = tuple(f"{host}.{name}" if host else name for name in names)
        return True

    body = {"can_replace_layer": classmethod(can_replace_layer), "lotr_factors": factors, "lotr_shared": shared}
    return type(base.__name__, (_Native, base), body)  # vLLM compares the names of some classes
