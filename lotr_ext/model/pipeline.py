"""PipelineStages: the pipeline stages of one process, and the replicas of A and B in them.

    gradient of A = sum over the stages of the gradients of their replicas, each of which is a sum over micro-batches

A layer and its core belong to one stage. A, B and parameters that make several cores (LoTRConfig.core) belong to every stage
with layers that read them. Their replicas start equal, and summing their gradients over the stages each step keeps them equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layers.cores import Cores
from ..layers.factors import LoTRFactor, LoTRFactors, same_values
from ..layers.merging import write_
from ..layers.sharded import Slot, all_results, gathered, in_parts, inside_wrappers, named_modules, parted_as
from ..ops import accumulate_dtype
from .adapted import layers_in
from .adapter_files import LayerEntry, Manifest
from .config import LoTRConfig
from .saved import cores_of, saved_modules
from .shared_factors import add_values

__all__ = ["PipelineStages", "expect_whole_model", "part_of"]

Contents = tuple[Manifest, dict[str, Tensor]]


class _Replica(NamedTuple):
    """The replicas of one tensor in a process. checksums: of their values. copies: their number."""

    shape: torch.Size
    dtype: torch.dtype
    trained: bool
    checksums: frozenset[str]
    copies: int

    @property
    def form(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {list(self.shape)}, {'trained' if self.trained else 'frozen'}"


class _Part(NamedTuple):
    """A process's description of its stages. fresh: whether their adapters are zero. cores: by the name of a Cores, for how
    many layers it was made and how many of them are in this process."""

    layers: list[str]
    saved: list[str]
    replicas: dict[str, _Replica]
    fresh: bool
    cores: dict[str, tuple[int, int]]


class PipelineStages(nn.ModuleList):
    """The stages of a pipeline (`torch.distributed.pipelining`) in this process. Pass it as the model to `save_adapter`,
    `load_adapter`, `lotr_parameters` and `parameter_groups`.

    Every process of the pipeline creates one, after `apply_lotr` and before DistributedDataParallel or `fully_shard`. Layers
    must have the same names as in the whole model. If all adapters are zero, as after `apply_lotr`, factors that differ get the
    values of the first process that has them. Factors that no layer of a stage reads are frozen in that stage.

    Args:
        stages: the modules of the stages, several for an interleaved schedule; also those without adapted layers.
        group: the processes with the stages of one pipeline; None: all.

    Raises:
        TypeError, ValueError, RuntimeError: no modules; a layer in two stages; factors of other shapes, dtypes or values than
            in another stage; tensors in parts or on the meta device. The error is raised in all processes.
    """

    def __init__(self, *stages: nn.Module, group: dist.ProcessGroup | None = None):
        parts = all_results("PipelineStages", lambda: _described(stages), group)
        _check(parts)
        super().__init__(stages)
        self.group, self.parts = group, parts
        self.rank = dist.get_rank(group) if len(self.parts) > 1 else 0
        self.layers = {name for part in self.parts for name in part.layers}
        self.saved = {name for part in self.parts for name in part.saved}
        replicas: dict[str, list[_Replica]] = {}
        for part in self.parts:
            for key, one in part.replicas.items():
                replicas.setdefault(key, []).append(one)
        self._slots: dict[str, list[Slot]] = {key: [] for key in sorted(replicas)}
        for stage in self.inner:
            for slot in _shared(stage):
                self._slots[slot.full].append(slot)
        self._make_equal(
            {key: own[0] for key, own in replicas.items() if len(frozenset().union(*(one.checksums for one in own))) > 1}
        )
        summed = {key: own[0] for key, own in replicas.items() if own[0].trained and sum(one.copies for one in own) > 1}
        self._summed = {key: summed[key] for key in self._slots if key in summed}
        for stage in self.inner:
            stage._lotr_is_stage = True
            for slot in _shared(stage, read=False):  # DistributedDataParallel would wait for their gradients
                slot.tensor.requires_grad_(False)

    @property
    def inner(self) -> list[nn.Module]:
        """The stages without wrappers such as DistributedDataParallel."""
        return [inside_wrappers(stage) for stage in self]

    def _first(self, key: str) -> int:
        """The first process of the group that has the tensor of that name."""
        return next(rank for rank, part in enumerate(self.parts) if key in part.replicas)

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def _make_equal(self, differing: dict[str, _Replica]) -> None:
        for key in sorted(differing):
            like, own = differing[key], self._slots[key]
            value = (
                torch.empty(like.shape, dtype=like.dtype, device=self._device) if not own else own[0].tensor.detach().clone()
            )
            if len(self.parts) > 1:
                dist.broadcast(value, group=self.group, group_src=self._first(key))
            for slot in own:
                write_(slot.tensor, value)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sums the gradients of each factor's replicas, in one all-reduce over the group for all factors. Every process must
        call it once per step: after the schedule's last micro-batch, before `clip_grad_norm_` and the optimizer."""
        wide = max((accumulate_dtype(one.dtype) for one in self._summed.values()), key=lambda t: t.itemsize, default=None)
        if wide is None:
            return
        own, there = [], []
        for key, one in self._summed.items():
            gradients = [gathered(s.tensor.grad).to(wide) for s in self._slots[key] if s.tensor.grad is not None]
            there.append(len(gradients))
            own.append(sum(gradients) if gradients else torch.zeros(one.shape, dtype=wide, device=self._device))
        total = torch.cat([torch.tensor(there, dtype=wide, device=self._device), *(t.reshape(-1) for t in own)])
        if len(self.parts) > 1:
            dist.all_reduce(total, group=self.group)
        counts, *sums = total.split([len(own), *(t.numel() for t in own)])
        for (key, one), count, value in zip(self._summed.items(), counts.tolist(), sums):
            for slot in self._slots[key] if count else ():  # a factor that no layer has read keeps no gradient
                slot.tensor.grad = parted_as(value.view(one.shape).to(one.dtype, copy=True), slot.tensor)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scales the gradients so that their norm over all stages, each factor counted once, is at most max_norm. Returns the
        norm, in every process. Call it after `reduce_gradients`, instead of torch.nn.utils.clip_grad_norm_, which only
        includes one stage."""
        norm_type = float(norm_type)
        elsewhere = {
            id(slot.tensor)
            for key in self._summed
            for i, slot in enumerate(self._slots[key])
            if i or self._first(key) != self.rank
        }
        parameters = [p for p in self.parameters() if p.grad is not None]
        counted = [gathered(p.grad) for p in parameters if id(p) not in elsewhere]
        norm = torch.nn.utils.get_total_norm(counted, norm_type).to(self._device, torch.float64)
        power = norm if norm_type == float("inf") else norm**norm_type
        if len(self.parts) > 1:
            dist.all_reduce(power, dist.ReduceOp.MAX if norm_type == float("inf") else dist.ReduceOp.SUM, group=self.group)
        norm = power if norm_type == float("inf") else power ** (1 / norm_type)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def gathered(self, where: str, own: Callable[[], Sequence[Contents]]) -> Contents:
        """The file contents of the whole model, in every process. own: returns those of this process's stages."""
        found = all_results(where, lambda: [(m, {k: t.detach().cpu() for k, t in ts.items()}) for m, ts in own()], self.group)
        most = max(map(len, found))
        return _joined([one[i] for i in range(most) for one in found if i < len(one)])


def expect_whole_model(model: nn.Module, where: str) -> None:
    """Raises RuntimeError for a single stage of a pipeline."""
    if hasattr(inside_wrappers(model), "_lotr_is_stage"):
        raise RuntimeError(
            f"{where}: expected a whole model or a PipelineStages, got a stage of a pipeline; pass the PipelineStages, in "
            "every process"
        )


# ---- what the processes must agree on --------------------------------------------------------------------------------


def _shared(stage: nn.Module, *, read: bool = True) -> Iterator[Slot]:
    """The factors of a stage and the parameters that make several of its cores, each tensor once. read: those that its layers
    read, or the others."""
    layers, seen = layers_in(stage).values(), set()
    of_layers = {
        id(module) for layer in layers for module in (*(module for module, _ in layer.factors.owners), cores_of(layer))
    }
    for at, owner in named_modules(stage):
        if isinstance(owner, LoTRFactors | LoTRFactor | Cores) and (id(owner) in of_layers) == read:
            for inner, module in owner.named_modules():
                for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        yield Slot(".".join(part for part in (at, inner, name) if part), module, name)


def _described(stages: Sequence[nn.Module]) -> _Part:
    if not stages:
        raise TypeError("stages: expected at least one module, got none")
    layers: list[str] = []
    saved: list[str] = []
    replicas: dict[str, _Replica] = {}
    cores: dict[str, tuple[int, int]] = {}
    fresh = True
    for stage in stages:
        if not isinstance(stage, nn.Module):
            raise TypeError(f"stages: expected modules, got {type(stage).__name__}; for a PipelineStage pass its submod")
        inner = inside_wrappers(stage)
        for name, tensor in inner.named_parameters():
            if tensor.requires_grad and (tensor.is_meta or in_parts(tensor)):
                got = "on the meta device" if tensor.is_meta else "held in parts"
                raise RuntimeError(
                    f"stages: expected whole tensors with values, got {name} {got}; create PipelineStages after they have "
                    "values and before they are sharded"
                )
        own = layers_in(inner)
        layers += own
        saved += saved_modules(inner)
        fresh = fresh and not any(bool(layer.core.any()) and bool(layer.factors.B.any()) for layer in own.values())
        made = [found for layer in own.values() if isinstance(found := cores_of(layer), Cores)]
        for name, module in named_modules(inner):
            if isinstance(module, Cores):
                cores[name] = len(module.places), cores.get(name, (0, 0))[1] + sum(one is module for one in made)
        for slot in _shared(inner):
            digest = hashlib.sha256()
            add_values(digest, slot.full, slot.tensor)
            old = replicas.get(slot.full)
            checksums = frozenset({digest.hexdigest()}) | (frozenset() if old is None else old.checksums)
            new = _Replica(
                slot.tensor.shape, slot.tensor.dtype, slot.tensor.requires_grad, checksums, 1 if old is None else old.copies + 1
            )
            if old is not None and old.form != new.form:
                raise ValueError(_differ(slot.full, old.form, new.form, "this process"))
            replicas[slot.full] = new
    return _Part(layers, saved, replicas, fresh, cores)


def _differ(key: str, want: str, got: str, where: str) -> str:
    return (
        f"stages: expected {key} to be {want} in all stages, got {got} in {where}; call apply_lotr with one "
        "configuration and seed everywhere, or load one adapter"
    )


def _check(parts: Sequence[_Part]) -> None:
    """Raises the same error in all processes, since all have the same parts."""
    at: dict[str, int] = {}
    known: dict[str, tuple[int, _Replica]] = {}
    fresh = all(part.fresh for part in parts)
    for rank, part in enumerate(parts):
        for name in (*part.layers, *part.saved):
            if name in at:
                raise ValueError(
                    f"stages: expected each layer in one stage, got {name!r} in processes {at[name]} and {rank}; give the "
                    "layers of a stage the names that they have in the whole model"
                )
            at[name] = rank
        for key, one in part.replicas.items():
            first, like = known.setdefault(key, (rank, one))
            if one.form != like.form:
                raise ValueError(_differ(key, like.form, f"{one.form}", f"process {rank}"))
            if not fresh and len(one.checksums | like.checksums) > 1:
                raise ValueError(_differ(key, f"the same as in process {first}", "other values", f"process {rank}"))
    for name in {name for part in parts for name in part.cores}:
        places = next(part.cores[name][0] for part in parts if name in part.cores)
        layers = sum(part.cores[name][1] for part in parts if name in part.cores)
        if layers > places:
            raise ValueError(
                f"stages: expected {name} to make the cores of all {layers} layers, got one for {places} layers; call "
                "apply_lotr on the whole model, then split it into stages"
            )


# ---- files -----------------------------------------------------------------------------------------------------------


def _joined_config(configs: Sequence[LoTRConfig], layers: Mapping[str, LayerEntry]) -> LoTRConfig | None:
    """The config of the whole model. The configs of stages that were adapted separately name only their own layers."""
    if not configs or configs.count(configs[0]) == len(configs):
        return configs[0] if configs else None
    saved = tuple(dict.fromkeys(name for config in configs for name in config.modules_to_save or ())) or None
    group_by = configs[0].group_by
    if isinstance(group_by, Mapping):
        group_by = {name: group for config in configs for name, group in config.group_by.items()}
    linear = tuple(name for name, entry in layers.items() if not entry.experts) or None
    return replace(configs[0], target_modules=linear, exclude_modules=None, modules_to_save=saved, group_by=group_by)


def _joined(found: Sequence[Contents]) -> Contents:
    """The file contents of the whole model, joined from those of all stages.

    Raises:
        ValueError: a factor with different values in two stages.
    """
    layers, tensors, saved, base = {}, {}, (), {}
    for manifest, own in found:
        for key, tensor in own.items():
            if key in tensors and not same_values(tensors[key], tensor):
                raise ValueError(
                    f"save_adapter: expected the same {key} in all stages, got different values; call reduce_gradients before "
                    "each optimizer step, and use the same optimizer settings in all processes"
                )
            tensors.setdefault(key, tensor)
        layers, saved, base = layers | manifest.layers, saved + manifest.modules_to_save, {**base, **manifest.base}
    configs = [manifest.config for manifest, _ in found if manifest.config is not None]
    return Manifest(_joined_config(configs, layers), layers, saved, base), tensors


def part_of(manifest: Manifest, tensors: Mapping[str, Tensor], stage: nn.Module) -> Contents:
    """The part of the whole model's file contents that a stage needs."""
    own, beside = layers_in(stage), saved_modules(stage)
    layers = {name: entry for name, entry in manifest.layers.items() if name in own}
    saved = tuple(name for name in manifest.modules_to_save if name in beside)
    kept = {entry.tensor(part) for entry in layers.values() for part in ("A", "B", "start_A", "start_B")}
    away = {f"{name}." for name in (*manifest.layers, *manifest.modules_to_save) if name not in layers and name not in saved}
    away |= {entry.tensor(part) for entry in manifest.layers.values() for part in ("A", "B", "start_A", "start_B")} - kept
    return Manifest(manifest.config, layers, saved, manifest.base), {
        k: t for k, t in tensors.items() if not k.startswith(tuple(away))
    }
