"""Converts many LoRAs of one base model to one adapter with a task per LoRA.

Each group of layers has one pair A, B for all LoRAs t:

    D_tl / |D_t| ~= B G_tl^T A^T        least squares over all t and l of the group at once

D_tl is the change of layer l by LoRA t, a product of its two factors that is never formed. |D_t| is
its norm over all layers. Divided by it, all LoRAs count alike: what is minimized is the sum of
their squared relative errors. "Compress then Serve" (arXiv 2407.00066) has one pair per layer.

The LoRAs' files are read one group at a time, so memory holds one group's factors, of all LoRAs.
"""

import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter_state import AdapterState
from ..config import LoTRConfig
from ..init import INIT_GAIN
from ..storage import FilePath, put_tensors
from ..task_files import task_format_of
from .lora import LoRA, LoRAFolder
from .to_lotr import (
    ConvertedLayer,
    converted_adapter,
    groups_of,
    relative_error,
    tucker2_of_loras,
)


@dataclass(frozen=True)
class BankConversion:
    """What `loras_to_bank` wrote.

    Attributes:
        config: The configuration of the adapter in the destination.
        files: The task file of each LoRA, by its folder's name.
        errors: The relative error |D_t - approximation| / |D_t| of each LoRA, by the same name.
    """

    config: LoTRConfig
    files: dict[str, Path]
    errors: dict[str, float]


class LoRACollection:
    """The layers and norms of many LoRAs. Factors are read from the files on access.

    Attributes:
        folders: The LoRAs, by the name of their folder.
        sizes: (in_features, out_features) of each layer that one of them adapts.
        norms: |D_t| of each LoRA, over all its layers.
    """

    def __init__(self, sources: Sequence[FilePath]):
        if isinstance(sources, str) or len(sources) < 1:
            raise ValueError(f"sources: expected a list of folders, got {sources!r:.80}")
        self.folders: dict[str, LoRAFolder] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.norms: dict[str, float] = {}
        for source in sources:
            name = Path(source).resolve().name
            if name in self.folders:
                raise ValueError(
                    f"sources: expected folders of different names, which the tasks' files get, "
                    f"got {name!r} twice"
                )
            folder = LoRAFolder(source)
            if folder.saved:
                raise ValueError(
                    f"sources: expected LoRAs without modules_to_save, because a task is only its "
                    f"cores, got {min(folder.saved)} in {folder.path}"
                )
            self.norms[name] = 0.0
            for layer in folder.names:
                lora = folder.layer(layer)
                if self.sizes.setdefault(layer, lora.sizes) != lora.sizes:
                    raise ValueError(
                        f"sources: expected LoRAs of one base model, got {layer!r} of "
                        f"{self.sizes[layer]} and of {lora.sizes} in {folder.path}"
                    )
                self.norms[name] = math.hypot(self.norms[name], lora.norm)
            self.folders[name] = folder

    def of_layers(self, layers: Sequence[str]) -> dict[tuple[str, str], LoRA]:
        """Returns the factors of these layers by (the folder's name, layer).

        Each product is divided by the norm |D_t| of its folder's LoRA.
        """
        loras = {}
        for name, folder in self.folders.items():
            for layer in layers:
                if layer in folder.names:
                    lora = folder.layer(layer)
                    # A LoRA of zeros has norm 0.
                    loras[name, layer] = replace(lora, B=lora.B / (self.norms[name] or 1.0))
        return loras


@torch.no_grad()
def loras_to_bank(
    sources: Sequence[FilePath],
    directory: FilePath,
    *,
    rank: int | tuple[int, int] | str,
    group_by: str | dict[str, str] = "layer",
    dtype: torch.dtype = torch.float32,
) -> BankConversion:
    """Writes many LoRAs of one base model as one adapter, and each LoRA as a task over its pairs.

        model = load_adapter(base, directory)
        bank = TaskBank(model, 1000)
        task = bank.add(directory / "tasks" / "french.safetensors")    # of the LoRA in "french"

    The LoRAs may differ in their layers, ranks, alphas and rslora. The adapter's cores are zero, so
    without a task the model is the base model. New tasks can be trained as cores over these pairs.

    Args:
        sources: Folders with LoRAs that PEFT saved. A task is named after its folder.
        directory: The adapter is written here, and the tasks into its folder "tasks".
        rank: r, or (r_in, r_out), for all groups. Or "auto=0.95" for the smallest rank that keeps
            this share of the LoRAs' squared norms, on average over the LoRAs.
        group_by: "layer", "shape", "block", "name" or a mapping, as in LoTRConfig.
        dtype: The dtype of A, B and the cores.

    Returns:
        The errors of the LoRAs, and the files.

    Raises:
        TypeError, ValueError: If `read_lora` refuses a source, or an argument has a wrong type or
            value.
        ValueError: If a source has modules_to_save or layers of other sizes, or two sources have
            one name.
    """
    share = _share_of(rank)
    collection = LoRACollection(sources)
    config = LoTRConfig(
        rank=rank if share is None else 1,
        group_by=group_by,
        adapter_dtype=dtype,
        target_modules=sorted(collection.sizes),
    )
    groups = groups_of(collection.sizes, config)
    if share is not None:
        config = replace(config, rank=_rank_that_keeps(share, collection, groups.values()))
    return _write(Path(directory), collection, groups, config)


def _share_of(rank: object) -> float | None:
    """Returns the share 0.95 of "auto=0.95", None if rank is a number or a pair."""
    if not isinstance(rank, str):
        return None
    match = re.fullmatch(r"auto=(\d*\.?\d+)", rank)
    if match is None or not 0 < float(match[1]) <= 1:
        raise ValueError(
            f"rank: expected a number, a pair, or auto=SHARE with a share above 0 and up to 1, "
            f"got {rank!r}"
        )
    return float(match[1])


def _rank_that_keeps(share: float, collection: LoRACollection, groups: Iterable[list[str]]) -> int:
    """Returns the smallest rank at which pairs keep this share of the LoRAs' squared norms.

    One factorization per group shows all ranks: its directions are in descending order, so a pair
    of rank r is about the first r columns of A and B, and keeps the leading r x r block of each
    core. Summed cumulatively over rows and columns, a core's squares give that block's squared norm
    at (r, r).
    """
    kept_by_group: list[Tensor] = []  # the squared norms that rank 1, 2, .. keeps of each group
    for layers in groups:
        loras = list(collection.of_layers(layers).values())
        # As many directions as the LoRAs have columns, but none beyond the wider side. The factor
        # of the narrower side is padded.
        full = min(sum(lora.rank for lora in loras), max(loras[0].sizes))
        _, _, cores = tucker2_of_loras(loras, (full, full))
        kept_by_group.append(cores.square().sum(0).cumsum(0).cumsum(1).diagonal())
    most = max(map(len, kept_by_group))
    kept = torch.zeros(most, dtype=torch.float64)
    for by_rank in kept_by_group:
        # A group keeps everything at its largest rank, and so at any rank beyond it.
        kept += nn.functional.pad(by_rank, (0, most - len(by_rank)), value=float(by_rank[-1]))
    # A margin for rounding, which would otherwise decide at which rank a share of 1 is kept.
    is_enough = kept >= (share - 1e-9) * kept[-1]
    return int(is_enough.nonzero()[0]) + 1


def _write(
    directory: Path, collection: LoRACollection, groups: Mapping[str, list[str]], config: LoTRConfig
) -> BankConversion:
    """Factorizes a collection, and writes the adapter and one task per LoRA."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        layers = [layer for names in groups.values() for layer in names]
        shape = (len(layers), len(collection.folders), *config.ranks)
        # In a temporary file, because the cores of a large collection may not fit into memory. They
        # start at zero, and stay zero where a LoRA does not adapt a layer.
        cores = torch.from_file(
            str(Path(temporary) / "cores"),
            shared=True,
            size=math.prod(shape),
            dtype=config.adapter_dtype,
        ).view(shape)
        adapter, errors = _factorize(collection, groups, config, dict(zip(layers, cores)))
        adapter.write(directory)
        # Once for all tasks, because it takes a checksum of A and B.
        metadata = task_format_of(adapter).metadata()
        files = {}
        for index, name in enumerate(collection.folders):
            task = {f"{layer}.core": cores[i, index] for i, layer in enumerate(layers)}
            files[name] = directory / "tasks" / f"{name}.safetensors"
            put_tensors(files[name], task, metadata)
    return BankConversion(config, files, errors)


def _factorize(
    collection: LoRACollection,
    groups: Mapping[str, list[str]],
    config: LoTRConfig,
    cores: Mapping[str, Tensor],
) -> tuple[AdapterState, dict[str, float]]:
    """Finds the pair of each group, and the cores of each LoRA over it.

    Args:
        collection: The LoRAs.
        groups: The names of the layers by group.
        config: The configuration of the adapter.
        cores: By layer, [loras, r_in, r_out]. Filled here with the cores of the LoRAs.

    Returns:
        The adapter, with zero cores, and the relative error of each LoRA.
    """
    converted = {}
    # For each LoRA, the share of |D_t|^2 that its cores keep.
    captured = dict.fromkeys(collection.folders, 0.0)
    index_of_lora = {name: index for index, name in enumerate(collection.folders)}
    for group, layers in groups.items():
        loras = collection.of_layers(layers)
        A, B, group_cores = tucker2_of_loras(list(loras.values()), config.ranks)
        for (name, layer), core in zip(loras, group_cores, strict=True):
            captured[name] += float(core.square().sum())
            # Undoes the division by |D_t| in `of_layers`. A, B and s will multiply the core by
            # INIT_GAIN^2 s.
            task_core = collection.norms[name] / (INIT_GAIN**2 * config.s) * core
            cores[layer][index_of_lora[name]] = task_core  # cast to the adapter's dtype
        without_task = ConvertedLayer(
            INIT_GAIN * A, INIT_GAIN * B, torch.zeros(config.ranks), group
        )
        converted |= dict.fromkeys(layers, without_task)
    errors = {
        name: relative_error(norm * math.sqrt(captured[name]), norm)
        for name, norm in collection.norms.items()
    }
    return converted_adapter(config, converted, {}), errors
