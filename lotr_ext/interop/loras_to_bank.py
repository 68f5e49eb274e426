"""Converts many LoRA adapters to one pair of factors per group and one task per adapter (after Share, arXiv 2602.06043).

    D_il = s_il lora_B_il lora_A_il = U_il V_il^T ~= B G_il^T A^T      adapter i, layer l; least squares over all i and l

The deltas of all adapters in a group are one stack, factorised by Tucker-2 (`layers/tucker.py`) without forming a delta.
Adapters are read one at a time, several times. Only A, B and square roots of the two Gram matrices stay in memory:

    sum_il D_il^T D_il [k, k]      sum_il D_il D_il^T [n, n]

The roots have at most 2 k and 2 n columns; a QR reduces them. A root has twice the digits of its Gram matrix.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..layers.checks import check_dtype, check_rank
from ..layers.factors import LoTRFactors
from ..layers.tucker import POWERS, leading, padded
from ..model.adapter_files import Manifest, write
from ..model.tasks import task_metadata
from .adapter import LoTRAdapter, assembled, check_range, group_names
from .from_lora import Report, low_rank_pair
from .lora_files import LoRAAdapter, read_lora
from .tucker import compressed, fitted, norms, stacked

__all__ = ["BankConversion", "loras_to_bank", "names_of"]

Source = str | PathLike[str] | LoRAAdapter
_MOST_SWEEPS, _TOLERANCE = 8, 1e-4  # of HOOI: a sweep reads all adapters twice
_TASK = re.compile(r"[^/\x00-\x1f]{1,200}")


@dataclass(frozen=True)
class BankConversion(LoTRAdapter):
    """The factors, as an adapter that starts as the base model and trains only cores; and the tasks over them.

    tasks: `<layer>.core` [r_in, r_out] by name. errors: |D_il - B G_il^T A^T| / |D_il| by task and layer; task_errors and
    group_errors: the same over all layers of a task, and over a group's stack. lora_parameters: the number in all LoRAs.
    """

    tasks: dict[str, dict[str, Tensor]]
    errors: dict[str, dict[str, float]]
    task_errors: dict[str, float]
    group_errors: dict[str, float]
    lora_parameters: int

    @property
    def parameters(self) -> int:
        """The number in the factors and the tasks' cores."""
        factors = sum(t.numel() for name, t in self.tensors.items() if name.startswith("lotr_factors."))
        return factors + sum(t.numel() for cores in self.tasks.values() for t in cores.values())

    def save(self, directory: str | PathLike[str]) -> None:
        """Writes the adapter for `load_adapter`, and beside it `<task>.task.safetensors` for `TaskBank.add`.

        Raises:
            ValueError: directory is a file. OSError: the disk.
        """
        owners = {}
        for group, names in self.groups.items():
            entry, tensors = self.layers[names[0]], {part: self.tensors[f"lotr_factors.{group}.{part}"] for part in "AB"}
            owners[group] = LoTRFactors(entry.in_features, entry.out_features, self.config.ranks, device="meta")
            owners[group].load_state_dict(tensors, assign=True)
        metadata = task_metadata([entry.scaling for entry in self.layers.values()], owners)
        files = {f"{name}.task.safetensors": safetensors.torch.save(cores, metadata) for name, cores in self.tasks.items()}
        write(Path(directory), Manifest(self.config, self.layers, ()), self.tensors, files)


def names_of(folders: Sequence[str | PathLike[str]]) -> dict[str, Path]:
    """A name for each folder: its path without the leading and trailing parts that all folders share, but at least one part.

    Raises:
        ValueError: no folders, or the same one twice.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]  # without "..", which is no part of a name
    if not paths:
        raise ValueError("sources: expected folders of LoRA adapters, got none")
    parts = [path.parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError(f"sources: expected different folders, got {next(p for p in paths if paths.count(p) > 1)} twice")
    while len(parts) > 1 and len({own[:1] for own in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [own[1:] for own in parts]
    while len(parts) > 1 and len({own[-1:] for own in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [own[:-1] for own in parts]
    names = ["-".join(own if len(parts) > 1 else own[-1:]) for own in parts]
    return dict(zip(names, paths, strict=True)) if len(set(names)) == len(names) else {
        f"{i}-{name}": path for i, (name, path) in enumerate(zip(names, paths, strict=True))
    }  # fmt: skip


@torch.no_grad()
def loras_to_bank(
    sources: Mapping[str, Source] | Sequence[str | PathLike[str]],
    *,
    rank: int | tuple[int, int],
    group_by: str | Mapping[str, str] = "shape",
    dtype: torch.dtype = torch.float32,
    report: Report = lambda what, done: None,
) -> BankConversion:
    """PEFT LoRA adapters of one base model as shared factors, and for each a task of `r_in r_out` numbers per layer.

    Args:
        sources: folders of LoRA adapters, or results of `read_lora`, by the name of their task; or folders, whose tasks are
            named after them (`names_of`). Adapters may differ in rank and scaling, not in their layers.
        rank: r, or (r_in, r_out), for all groups. Exact if at least the sum of a group's LoRA ranks.
        group_by: "shape", "block", "name" or a mapping from layer names, as in LoTRConfig; or "layer": separate factors for
            each layer, which all tasks share.
        dtype: of the result. The work is done in float64.
        report: called with the current step and the fraction of the work that is done.

    Returns:
        The factors and tasks: `.save(directory)`, then `lotr_ext.load_adapter(model, directory)`, `bank = TaskBank(model, n)`
        and `bank.add(directory / "<task>.task.safetensors")`. Scaling 1: the LoRAs' own are in the cores.

    Raises:
        TypeError, ValueError: no sources; one that `read_lora` refuses, that has other layers than the first, or
            modules_to_save, which a bank does not keep per task; a name that no file can have; a rank above what any
            group can use.
    """
    if dtype is None:
        raise TypeError("dtype: expected that of the new adapter, got None")
    check_dtype(dtype)
    ranks, stream = check_rank(rank), _Stream(sources if isinstance(sources, Mapping) else names_of(sources), report)
    stream.look(group_by)
    most = max(max(stream.ranks[group], sum(stream.sizes[group])) for group in stream.groups)
    if max(ranks) > most:
        raise ValueError(f"rank: expected at most {most}, beyond which no group can use any, got {rank}")
    return _conversion(stream, _factors(stream, ranks), rank, stream.group_by, dtype)


class _Stream:
    """The adapters, read one after the other, as often as needed.

    groups: layer names; sizes: (k, n); ranks: the sum of the LoRA ranks; by group, after `look`."""

    def __init__(self, sources: Mapping[str, Source], report: Report):
        if not sources:
            raise ValueError("sources: expected LoRA adapters, got none")
        for name in sources:
            if not isinstance(name, str) or not _TASK.fullmatch(name) or name in (".", ".."):
                raise ValueError(f"sources: expected names of tasks that a file can have, got {name!r}")
        self.sources, self.report, self.passes = sources, report, 0
        self.layers: dict[str, tuple[int, int]] = {}
        self.groups: dict[str, list[str]] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.ranks: dict[str, int] = {}
        self.group_by: str | Mapping[str, str] = {}
        self.parameters, self.dropout = 0, 0.0

    def adapters(self, what: str) -> Iterator[tuple[str, LoRAAdapter]]:
        """Yields each adapter, checked, with the name of its task. what: the step, for the report."""
        for i, (name, source) in enumerate(self.sources.items()):
            self.report(f"{what}: {name}", (self.passes + i / len(self.sources)) / (2 * _MOST_SWEEPS + 3))
            try:
                adapter = source if isinstance(source, LoRAAdapter) else read_lora(source)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{name}: {error}") from None
            self._check(name, {layer: own.sizes for layer, own in adapter.layers.items()}, adapter)
            yield name, adapter
            del adapter  # before the next one is read
        self.passes += 1

    def _check(self, name: str, layers: dict[str, tuple[int, int]], adapter: LoRAAdapter) -> None:
        if adapter.saved or adapter.modules_to_save:
            found = ", ".join(adapter.modules_to_save or sorted(adapter.saved))
            raise ValueError(
                f"{name}: expected a LoRA without modules_to_save, which a bank does not keep per task, got {found}"
            )
        self.layers = self.layers or layers
        if layers != self.layers:
            first, differ = next(iter(self.sources)), set(layers.items()) ^ set(self.layers.items())
            layer = min(layer for layer, _ in differ)
            raise ValueError(
                f"{name}: expected the layers and sizes of {first}, got {len(layers)} for {len(self.layers)}; {layer} has "
                f"(in, out) {layers.get(layer, 'none')} for {self.layers.get(layer, 'none')}"
            )

    def look(self, group_by: str | Mapping[str, str]) -> None:
        """The first pass over all adapters: raises for adapters that cannot be converted, and finds the groups."""
        for _, adapter in self.adapters("reads"):
            if not self.groups:
                own = {layer: f"{i}_{layer.replace('.', '_')}" for i, layer in enumerate(sorted(self.layers))}
                self.group_by = own if group_by == "layer" else group_by
                for layer, group in group_names(self.layers, self.group_by).items():
                    self.groups.setdefault(group, []).append(layer)
                    self.sizes[group], self.ranks[group] = self.layers[layer], 0
                self.dropout = adapter.dropout
            for group, layers in self.groups.items():
                self.ranks[group] += sum(adapter.layers[layer].rank for layer in layers)
            self.parameters += sum(layer.A.numel() + layer.B.numel() for layer in adapter.layers.values())
            del adapter

    def stacks(self, what: str) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """(task, group, U [L, n, r], V [L, k, r]) in float64, for each adapter and group."""
        for name, adapter in self.adapters(what):
            for group, layers in self.groups.items():
                pairs = [low_rank_pair(adapter.layers[layer]) for layer in layers]
                yield name, group, stacked([u for u, _ in pairs]), stacked([v for _, v in pairs])
            del adapter

    def roots(self, what: str, part: str, other: Mapping[str, Tensor] | None = None) -> dict[str, list[Tensor]]:
        """For each group, matrices whose columns' Gram matrix is sum_il D_il^T P D_il for part "A", or sum_il D_il P D_il^T for
        "B". P is the projection onto other, the factor of the other side; None: the identity."""
        found: dict[str, list[Tensor]] = {group: [] for group in self.groups}
        for _, group, U, V in self.stacks(what):
            own, across = (V, U.mT) if part == "A" else (U, V.mT)
            columns = found[group]
            columns.append(compressed(own, across if other is None else across @ other[group]))
            if sum(t.shape[1] for t in columns) > 2 * columns[0].shape[0]:
                columns[:] = [torch.linalg.qr(torch.cat(columns, 1).T, mode="r")[1].T.contiguous()]
        return found


def _factors(stream: _Stream, ranks: tuple[int, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [k, r_in] and B [n, r_out] with orthonormal columns for each group: HOSVD, improved by sweeps of HOOI until the
    relative error of each group falls by less than the tolerance."""
    r_in = {group: min(ranks[0], k) for group, (k, _) in stream.sizes.items()}
    r_out = {group: min(ranks[1], n) for group, (_, n) in stream.sizes.items()}
    roots = stream.roots("HOSVD", "A")
    total = {group: sum(float(t.square().sum()) for t in columns) for group, columns in roots.items()}
    A = {group: leading(columns, r_in[group]) for group, columns in roots.items()}
    B: dict[str, Tensor] = {}
    errors = dict.fromkeys(stream.groups, math.inf)
    for sweep in range(1, _MOST_SWEEPS + 1):
        powers = 1 if B else POWERS
        roots = stream.roots(f"B, sweep {sweep}", "B", A)
        B = {group: leading(columns, r_out[group], B.get(group), powers) for group, columns in roots.items()}
        roots = stream.roots(f"A, sweep {sweep}", "A", B)
        A = {group: leading(columns, r_in[group], A[group], 1) for group, columns in roots.items()}
        before, errors = errors, {}
        for group, columns in roots.items():
            kept = sum(float((A[group].T @ t).square().sum()) for t in columns)
            errors[group] = math.sqrt(max(0.0, 1 - kept / total[group])) if total[group] > 0 else 0.0
        if all(before[group] - error <= _TOLERANCE for group, error in errors.items()):
            break
    return {group: (A[group], B[group]) for group in stream.groups}


def _conversion(
    stream: _Stream,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    rank: int | tuple[int, int],
    group_by: str | Mapping[str, str],
    dtype: torch.dtype,
) -> BankConversion:
    ranks, tasks, errors = check_rank(rank), {name: {} for name in stream.sources}, {name: {} for name in stream.sources}
    lost: dict[tuple[str, str], tuple[float, float]] = {}  # squared error and squared norm, by task and group
    for task, group, U, V in stream.stacks("cores"):
        own, residuals = fitted(U, V, *factors[group])
        whole = norms(U, V)
        lost[task, group] = float(residuals.square().sum()), float(whole.square().sum())
        cores = torch.zeros(len(own), *ranks, dtype=dtype)
        cores[:, : own.shape[1], : own.shape[2]] = own
        for layer, core, residual, norm in zip(stream.groups[group], cores, residuals, whole, strict=True):
            tasks[task][f"{layer}.core"] = core.clone()
            errors[task][layer] = float(residual / norm) if norm > 0 else 0.0
    for own in tasks.values():
        check_range(own)
    config, layers, tensors = assembled(
        stream.groups,
        stream.layers,
        {group: (padded(A, ranks[0]), padded(B, ranks[1])) for group, (A, B) in factors.items()},
        {layer: torch.zeros(ranks) for layer in stream.layers},
        dtype,
        rank=rank,
        dropout=stream.dropout,
        group_by=group_by,
        train=("core",),
    )
    by_task = {task: _relative([own for (name, _), own in lost.items() if name == task]) for task in tasks}
    by_group = {group: _relative([own for (_, name), own in lost.items() if name == group]) for group in stream.groups}
    return BankConversion(config, layers, tensors, {}, tasks, errors, by_task, by_group, stream.parameters)


def _relative(parts: Sequence[tuple[float, float]]) -> float:
    lost, total = (sum(own) for own in zip(*parts, strict=True))
    return math.sqrt(lost / total) if total > 0 else 0.0
