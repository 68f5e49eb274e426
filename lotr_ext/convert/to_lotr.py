"""Converts a LoRA, or a checkpoint of the original implementation, to a LoTR adapter."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter_state import AdapterState, LayerEntry
from ..base_model import BaseModel
from ..config import LoTRConfig
from ..init import INIT_GAIN, tucker2_from_products
from ..storage import FilePath
from ..targets import Target, group_of, in_groups
from .lora import LoRA, modules_of, read_lora, read_tensors

GROUPS_OF_ONE_SHAPE = ("shape", "block", "name", "layer")


class ConvertedLayer(NamedTuple):
    """A layer with the factors of its group."""

    A: Tensor  # [k, r_in]
    B: Tensor  # [n, r_out]
    core: Tensor  # [r_in, r_out]
    group: str


@dataclass(frozen=True)
class Conversion:
    """A LoTR adapter that was converted.

    Attributes:
        adapter: The adapter without a model, as in its file.
        errors: |D_l - s B G_l^T A^T| / |D_l| by layer, where D_l is the change of its weight.
    """

    adapter: AdapterState
    errors: dict[str, float]

    def save(self, directory: FilePath) -> None:
        """Writes the adapter for `lotr_ext.load_adapter`.

        Raises:
            FileExistsError: If directory is a file.
            OSError: If a file cannot be written. The directory then has the old adapter or the new
                one.
        """
        self.adapter.write(Path(directory))


def converted_adapter(
    config: LoTRConfig, layers: Mapping[str, ConvertedLayer], saved: Mapping[str, Tensor]
) -> AdapterState:
    """Returns the adapter of converted layers.

    Args:
        config: The configuration of the adapter.
        layers: By name. Layers of one group have the same A and B.
        saved: The tensors of modules_to_save by name.
    """
    entries = {}
    tensors = {}
    for name, layer in layers.items():
        # No model exists yet, so these are not its names. Loading finds them in the entries.
        A = f"lotr_factors.{layer.group}.A"
        B = f"lotr_factors.{layer.group}.B"
        entries[name] = LayerEntry(A, B, config.s, config.dropout)
        tensors |= {A: layer.A, B: layer.B, f"{name}.core": layer.core}
    cast = {key: tensor.to(config.adapter_dtype) for key, tensor in tensors.items()}
    return AdapterState(
        config=config,
        layers=entries,
        modules_to_save=tuple(modules_of(saved, config.modules_to_save)),
        base=BaseModel(),
        tensors=cast | dict(saved),
    )


# ---- LoRA ----------------------------------------------------------------------------------------


@torch.no_grad()
def lora_to_lotr(
    source: FilePath,
    *,
    rank: int | tuple[int, int],
    group_by: str | Mapping[str, str] = "shape",
    dtype: torch.dtype = torch.float32,
) -> Conversion:
    """Converts a PEFT LoRA to a LoTR adapter.

    Save the result with `.save(directory)` and load it with `lotr_ext.load_adapter`.

    The changes of a group's weights, stacked, are factorized by Tucker-2 in float64: HOSVD, then a
    few steps of HOOI. S LoRAs of rank r in a group are exact at rank S r (arXiv 2402.01376 calls
    LoTR a generalization of LoRA in this sense). A and B are INIT_GAIN times orthonormal and s is
    "auto", so training can continue at LoRA's learning rate. At a lower rank, read the errors of
    the result: a layer with an error near 1 has lost its adapter.

    Args:
        source: A folder. modules_to_save are copied.
        rank: r, or (r_in, r_out), for all groups.
        group_by: "shape", "block", "name", "layer" or a mapping from layer names, as in LoTRConfig.
        dtype: The dtype of the result.

    Raises:
        TypeError, ValueError: If `read_lora` refuses the source, or an argument has a wrong type or
            value.
    """
    layers, saved, peft_config = read_lora(source)
    # PEFT may list heads that the model does not have, which loading would refuse.
    endings = peft_config.get("modules_to_save") or ()
    config = LoTRConfig(
        rank=rank,
        group_by=group_by,
        adapter_dtype=dtype,
        target_modules=sorted(layers),
        modules_to_save=[ending for ending in endings if modules_of(saved, [ending])] or None,
        dropout=peft_config.get("lora_dropout") or 0.0,
    )
    converted = {}
    errors = {}
    sizes = {name: layer.sizes for name, layer in layers.items()}
    for group, names in groups_of(sizes, config).items():
        A, B, cores = tucker2_of_loras([layers[name] for name in names], config.ranks)
        for name, core in zip(names, cores, strict=True):
            errors[name] = relative_error(float(core.norm()), layers[name].norm)
            converted[name] = ConvertedLayer(
                INIT_GAIN * A, INIT_GAIN * B, core / (INIT_GAIN**2 * config.s), group
            )
    return Conversion(converted_adapter(config, converted, saved), errors)


def groups_of(sizes: Mapping[str, tuple[int, int]], config: LoTRConfig) -> dict[str, list[str]]:
    """Returns the layers' names by group.

    Args:
        sizes: (in_features, out_features) by layer.
        config: Its group_by is one of GROUPS_OF_ONE_SHAPE, or a mapping.

    Raises:
        TypeError, ValueError: If it is another one, lacks a layer, or joins several shapes.
    """
    group_by = config.group_by
    if not isinstance(group_by, dict) and group_by not in GROUPS_OF_ONE_SHAPE:
        raise ValueError(
            f"group_by: expected {', '.join(GROUPS_OF_ONE_SHAPE)} or a mapping, with one shape per "
            f"pair, got {group_by!r}"
        )
    # Without modules: no model is needed, because these groups depend only on names and shapes.
    targets = [
        Target((name,), None, shape, group_of(name, None, shape, group_by))
        for name, shape in sizes.items()
    ]
    return {group: [t.name for t in members] for group, members in in_groups(targets).items()}


def tucker2_of_loras(
    loras: Sequence[LoRA], ranks: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `tucker2` of the products D_l = B_l A_l of LoRAs, which are not formed.

    Below, V is A_l^T and U is B_l, each in a basis of few columns, so D_l = U V^T.

    Returns:
        A [k, r_in] and B [n, r_out], orthonormal, and the cores [l, r_in, r_out], in float64.
    """
    input_basis, inputs = _in_basis([lora.A.mT for lora in loras], ranks[0])
    output_basis, outputs = _in_basis([lora.B for lora in loras], ranks[1])
    pairs = list(zip(inputs, outputs, strict=True))
    # With U = Q R, D^T = (V R^T) Q^T. So V R^T, which has few columns, has the leading directions.
    blocks = [V @ torch.linalg.qr(U, mode="r").R.mT for V, U in pairs]

    A, B, cores = tucker2_from_products(
        blocks,
        right=lambda A: [U @ (V.mT @ A) for V, U in pairs],  # all D_l A
        left=lambda B: [V @ (U.mT @ B) for V, U in pairs],  # all D_l^T B
        n=len(outputs[0]),
        rank=ranks,
    )
    return input_basis @ A, output_basis @ B, cores


def _in_basis(blocks: Sequence[Tensor], rank: int) -> tuple[Tensor, list[Tensor]]:
    """Returns an orthonormal basis of the columns of all blocks [d, c_l], and the blocks in it.

    With c columns in all, the factorization has c dimensions instead of d. The basis is the
    identity [d, d] if that is no gain (c >= d), or if c < rank.
    """
    columns = torch.cat(list(blocks), 1)
    if columns.shape[1] < rank or columns.shape[1] >= len(columns):
        return torch.eye(len(columns), dtype=columns.dtype), list(blocks)
    basis, coordinates = torch.linalg.qr(columns)
    return basis, list(coordinates.split([block.shape[1] for block in blocks], 1))


def relative_error(captured: float, norm: float) -> float:
    """Returns the relative error of a projection.

    Args:
        captured: The norm of the projection.
        norm: The norm of what was projected.
    """
    if norm == 0:
        return 0.0
    # Rounding may give -1e-16.
    return math.sqrt(max(0.0, 1 - (captured / norm) ** 2))


# ---- the original implementation -----------------------------------------------------------------

ORIGINAL_KEY = re.compile(r"(?P<name>.+)\.lotr\.(?P<part>lhs|mid|rhs)")


@torch.no_grad()
def original_to_lotr(
    source: FilePath, *, scale: float = 1.0, modules_to_save: Sequence[str] | None = None
) -> Conversion:
    """Converts the adapter in a state dict of the original implementation (github.com/daskol/lotr).

        y += (scale / r) x rhs mid lhs

    with <layer>.lotr.rhs [in_features, r] = A, .mid [r, r] = G and .lhs [r, out_features] = B^T.

    Args:
        source: A file of torch.save or safetensors.
        scale: The argument of its LoTRLinear, which the checkpoint does not contain.
        modules_to_save: Name endings of fully trained modules (a head), which are copied.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the file has no such layers, if parts are missing or do not fit, if layers
            have several ranks or dtypes, or if scale is not finite.
    """
    state = read_tensors(Path(source))
    parts: dict[str, dict[str, Tensor]] = {}
    for key in state:
        if match := ORIGINAL_KEY.fullmatch(key):
            parts.setdefault(match["name"], {})[match["part"]] = state[key]
    if not parts:
        raise ValueError(
            f"source: expected tensors <layer>.lotr.lhs, .mid and .rhs, got {len(state)} others"
        )
    layers = _original_layers(parts)
    ranks = {len(layer.core) for layer in layers.values()}
    dtypes = {tensor.dtype for layer in parts.values() for tensor in layer.values()}
    if len(ranks) > 1 or len(dtypes) > 1:
        raise ValueError(
            f"source: expected layers of one rank and dtype, "
            f"got ranks {sorted(ranks)}, {sorted(map(str, dtypes))}"
        )
    rank = ranks.pop()
    config = LoTRConfig(
        rank=rank,
        scaling=scale / rank,
        adapter_dtype=dtypes.pop(),
        target_modules=sorted(layers),
        modules_to_save=modules_to_save,
        group_by={name: layer.group for name, layer in layers.items()},
        init="normal",
    )
    saved = {key: state[key] for key in state if modules_of([key], modules_to_save)}
    return Conversion(converted_adapter(config, layers, saved), dict.fromkeys(layers, 0.0))


def _original_layers(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, ConvertedLayer]:
    """Returns the layers by name.

    Every layer of a checkpoint has its copy of A and B. Layers with equal copies form a group.
    """
    layers: dict[str, ConvertedLayer] = {}
    groups: dict[str, ConvertedLayer] = {}  # the first layer of each
    for name, tensors in parts.items():
        # A missing part is refused below, because the shape of the empty tensor does not fit.
        lhs, mid, rhs = (tensors.get(part, torch.empty(0)) for part in ("lhs", "mid", "rhs"))
        shapes = [list(tensor.shape) for tensor in (lhs, mid, rhs)]
        r = shapes[1][0] if len(shapes[1]) == 2 else 0
        if r < 1 or shapes != [[r, *lhs.shape[-1:]], [r, r], [*rhs.shape[:1], r]]:
            raise ValueError(
                f"{name}: expected lotr.lhs [r, out], .mid [r, r] and .rhs [in, r], got {shapes}"
            )
        B = lhs.mT.contiguous()
        group = f"{len(rhs)}x{len(B)}_{len(groups)}"
        for existing, layer in groups.items():
            if torch.equal(layer.A, rhs) and torch.equal(layer.B, B):
                group = existing
        layers[name] = ConvertedLayer(rhs, B, mid, group)
        groups.setdefault(group, layers[name])
    return layers
