"""Converts adapters: LoTR to LoRA and back, and the original LoTR implementation's checkpoints.

    python -m lotr_ext.convert lotr-to-lora SOURCE DESTINATION        for PEFT and servers, exact
    python -m lotr_ext.convert lora-to-lotr SOURCE DESTINATION --rank 16
    python -m lotr_ext.convert original-to-lotr FILE DESTINATION      a state dict of github.com/daskol/lotr

A LoTR of rank r on a layer is exactly a LoRA of rank r with lora_alpha = r:

    s B G_l^T A^T = lora_B lora_A    with lora_A = (A G_l)^T [r_out, K], lora_B = s B [N, r_out]
                                     or   lora_A = A^T [r_in, K],        lora_B = s B G_l^T [N, r_in], whichever is smaller

Only the size grows, because a LoRA stores its factors for each layer. After init "svd" the base weights are W minus the start
adapter; a LoRA for the unchanged W has to carry both, at twice the rank: [lora_B, -start_B] [lora_A; start_A].

Forms of experts (`experts=`), e experts, i the intermediate size:

    "peft"          PEFT's target_parameters: <experts>.lora_A.weight [e r, k], .lora_B.weight [n, r e], the expert as the last
                    index, of the last parameter; of the one before it <experts>.base_layer.lora_A.weight, ..
    "vllm-shared"   vLLM with enable_moe_shared_loras: <experts>.w1 (gate), .w3 (up) .lora_A.weight [1, r, k], .lora_B.weight
                    [e, i, r], .w2 (down) .lora_A.weight [e, r, i], .lora_B.weight [1, k, r]
    "per-expert"    vLLM without flags: <experts>.<c>.gate_proj.lora_A.weight [r, k], .lora_B.weight [i, r], up_proj, down_proj
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .adapted import layers_in
from .config import TASKS, LoTRConfig
from .core.operators import DTYPES, accumulate_dtype
from .files import (
    VERSION,
    checked_path,
    config_of_version_1,
    contents,
    json_in,
    put_file,
    put_tensors,
    read,
    start_key,
    tensors_in,
    unwrapped,
    warn_of_unsaved,
    write,
)
from .functional import check_dtype, check_number, check_rank
from .init import START, tucker2_of
from .layers import LoTRConv1D
from .targets import group_of, name_ends_with
from .tasks import TaskBank

__all__ = [
    "Conversion",
    "LoRA",
    "export_lora",
    "lora_to_lotr",
    "lotr_to_lora",
    "original_to_lotr",
    "read_lora",
]

Source = str | PathLike[str]
CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
FORMS = ("peft", "vllm-shared", "per-expert")


@dataclass(frozen=True)
class LoRA:
    """One layer's factors: A [r, K], B [N, r]; B A is added to W [N, K]. experts: of a 3-D weight [e, N, K], with A [e, r, K]
    and B [e, N, r], of which one may have a single expert for all; 0 for a linear layer."""

    A: Tensor
    B: Tensor
    experts: int = 0

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def sizes(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.A.shape[-1], self.B.shape[-2]


def _expect(true: object, name: object, expected: str, got: object) -> None:
    if not true:
        raise ValueError(f"{name}: expected {expected}, got {got}")


# ---- LoTR to LoRA ----------------------------------------------------------------------------------------------------


def export_lora(
    model: nn.Module, directory: Source, *, task: int | None = None, **options: Any
) -> dict[str, LoRA]:
    """Writes the adapter of a model as a PEFT LoRA: adapter_config.json and adapter_model.safetensors in a directory.

    `peft.PeftModel.from_pretrained(base, directory)` then gives the same outputs up to rounding, for the base model that
    `apply_lotr` was given. The model may be whatever `save_adapter` takes. modules_to_save are written, too.

    Args:
        model: an adapted model. With DistributedDataParallel all processes call this, and process 0 writes.
        directory: created if it does not exist.
        task: of the model's TaskBank, written instead of the adapter's cores. The model does not change.
        options: as for `lotr_to_lora`. base_model, fan_in_fan_out and hosts are the model's own if they are not given.

    Raises as `save_adapter` and `lotr_to_lora`. RuntimeError: a task of a model without a bank.
    """
    path, (inner, writes) = checked_path(directory, "directory"), unwrapped(model)
    document, tensors = contents(inner)
    if task is None:
        warn_of_unsaved(inner)
    else:
        tensors |= bank_of(inner).cores_of(task)
    model_config = getattr(inner, "config", None)
    options.setdefault("base_model", getattr(model_config, "_name_or_path", None))
    options.setdefault(
        "fan_in_fan_out", any(isinstance(layer, LoTRConv1D) for layer in layers_in(inner).values())
    )
    if (
        options.get("experts") in ("vllm-shared", "per-expert")
        and getattr(model_config, "model_type", None) in HOSTS
    ):
        options.setdefault("hosts", model_config.model_type)
    return _write_lora(path, document, tensors, **options) if writes else {}


def bank_of(model: nn.Module) -> TaskBank:
    """The model's TaskBank. Raises RuntimeError without one."""
    if (bank := getattr(model, "lotr_tasks", None)) is None:
        raise RuntimeError(
            "task: expected a model with a TaskBank, got one without. Create TaskBank(model, tasks) first."
        )
    return bank


def lotr_to_lora(source: Source, directory: Source, **options: Any) -> dict[str, LoRA]:
    """Writes the LoTR adapter in `source`, by `save_adapter` or by PEFT, as a PEFT LoRA. No model is needed.

    Args:
        source: a directory with a LoTR adapter.
        directory: created if it does not exist.
        task_type: PEFT's, such as "CAUSAL_LM"; None for a plain PeftModel.
        experts: the form of adapted experts: "peft", or for servers "vllm-shared" or "per-expert", which PEFT does not read. An
            exported adapter with experts has no dropout: PEFT has none for them.
        hosts: a server's names for the experts, where they differ: a model type in `HOSTS`, such as "mixtral".
        base_model: where the base model is, for base_model_name_or_path, which PEFT's AutoPeftModel and vLLM's resolver of
            folders read.
        fan_in_fan_out: of the configuration; PEFT corrects a wrong one, with a warning.

    Returns:
        The LoRA layers by name; of experts by the name of the parameter.

    Raises TypeError, ValueError: no such adapter, directory is a file or the source of PEFT's files, or an unknown option.
    """
    path, own = checked_path(directory, "directory"), checked_path(source, "source")
    document, tensors = (
        _read_peft(own)
        if (own / CONFIG_NAME).is_file() and not list(own.glob("lotr_adapter.*"))
        else read(own)
    )
    other = path.resolve() != own.resolve() or not (own / CONFIG_NAME).exists()
    _expect(other, "directory", "another one than source, whose files have the same names", path)
    return _write_lora(path, document, tensors, **options)


def _as_lora(
    A: Tensor, B: Tensor, core: Tensor, scaling: float, side: str | None = None
) -> tuple[Tensor, Tensor]:
    """(lora_A [.., r, K], lora_B [.., N, r]) in float32 (float64). side: the one that the core is multiplied into, "A" or "B";
    None: the one with the smaller rank. The other one has no dimension of experts."""
    wide = accumulate_dtype(core.dtype)
    A, B, core = (t.detach().to(core.device, wide) for t in (A, B, core))
    if side == "A" or (side is None and core.shape[-1] <= core.shape[-2]):
        return (A @ core).mT, scaling * B
    return A.mT, scaling * B @ core.mT


def lora_of(
    document: Mapping[str, Any], tensors: Mapping[str, Tensor], form: str = "peft"
) -> dict[str, LoRA]:
    """The layers of a saved adapter (`lotr_ext.files.read`) as LoRA by name; of experts by the parameter's name. All of one
    rank, because some servers read no patterns of ranks."""
    found = {}
    for name, entry in document["layers"].items():
        A, B, core = (tensors[key] for key in (entry["A"], entry["B"], f"{name}.core"))
        start = [
            tensors.get(key)
            for key in (start_key(entry["A"]), start_key(entry["B"]), f"{name}.start_core")
        ]
        experts, side = entry.get("experts", 0), None
        name = re.sub(r"(^|\.)lotr\.([^.]+)$", r"\1\2", name) if experts else name
        if experts and form == "vllm-shared":  # the side of the intermediate size
            side = "A" if name.endswith("down_proj") else "B"
        pair = _as_lora(A, B, core, entry["scaling"], side)
        if start[0] is not None:
            start_A, start_B = _as_lora(*start, entry["scaling"])
            pair = torch.cat([pair[0], start_A]), torch.cat([pair[1], -start_B], 1)
        if experts:
            pair = tuple(t if t.dim() == 3 else t.unsqueeze(0) for t in pair)
        found[name] = LoRA(*(t.to(core.dtype).contiguous() for t in pair), experts)
    rank = max(layer.rank for layer in found.values())
    more = {name: rank - layer.rank for name, layer in found.items()}
    return {
        n: LoRA(pad(one.A, (0, 0, 0, more[n])), pad(one.B, (0, more[n])), one.experts)
        for n, one in found.items()
    }


def _write_lora(
    directory: Path,
    document: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    task_type: str | None = None,
    experts: str = "peft",
    hosts: str | None = None,
    base_model: str | None = None,
    fan_in_fan_out: bool = False,
) -> dict[str, LoRA]:
    for name, value, known in (
        ("experts", experts, FORMS),
        ("task_type", task_type, TASKS),
        ("hosts", hosts, HOSTS),
    ):
        _expect(value in (*known, None), name, f"one of {', '.join(known)}", repr(value))
    layers, modules = lora_of(document, tensors, experts), set(document["modules_to_save"])
    saved = {
        key: t for key, t in tensors.items() if any(key.startswith(f"{name}.") for name in modules)
    }
    rank = next(iter(layers.values())).rank
    linear = sorted(name for name, layer in layers.items() if not layer.experts)
    stacked = {name: layer for name, layer in layers.items() if layer.experts}
    # full names; a name without a dot would match the end of other modules' names
    targets: list[str] | str = (
        linear if all("." in name for name in linear) else "|".join(map(re.escape, linear))
    )
    if stacked and experts != "peft":  # servers expect names of modules
        parts = sorted({name.rpartition(".")[2] for name in stacked})
        targets = (
            [*targets, *parts]
            if isinstance(targets, list)
            else "|".join([targets, *(rf".*\.{p}" for p in parts)])
        )
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "inference_mode": True,
        "base_model_name_or_path": base_model or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0
        if stacked
        else max(entry["dropout"] for entry in document["layers"].values()),
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": targets,
        "modules_to_save": sorted(
            n for n in modules if not any(n.startswith(f"{other}.") for other in modules)
        )
        or None,
        **({"target_parameters": sorted(stacked)} if stacked and experts == "peft" else {}),
    }
    named = {
        f"{name}.lora_{part}.weight": getattr(layers[name], part)
        for name in linear
        for part in "AB"
    }
    named |= _expert_tensors(stacked, experts, HOSTS[hosts] if hosts else Host()) | saved
    put_folder(
        directory,
        TENSORS_NAME,
        {f"base_model.model.{key}": tensor for key, tensor in named.items()},
        config,
    )
    return layers


def put_folder(
    directory: Path, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Writes both files of an adapter. A killed process leaves no configuration, never the old one beside new tensors."""
    if directory.is_dir():
        (directory / CONFIG_NAME).unlink(missing_ok=True)
    put_tensors(directory, name, tensors, {"format": "pt"})
    put_file(directory, CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


# ---- experts ---------------------------------------------------------------------------------------------------------


class Host(NamedTuple):
    """A server's names for the experts of a model type: rename: a part of the module's name and its replacement; projections:
    gate, up and down of one expert; interleaved: whether the rows of gate_up_proj alternate between gate and up."""

    rename: tuple[str, str] | None = None
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    interleaved: bool = False


HOSTS = {  # by transformers' model_type
    "mixtral": Host(("mlp.experts", "block_sparse_moe.experts"), ("w1", "w3", "w2")),
    "gpt_oss": Host(interleaved=True),
}


def _expert_tensors(layers: Mapping[str, LoRA], form: str, host: Host) -> dict[str, Tensor]:
    """The tensors by their keys. layers: by the parameter's full name, those of a module in the module's order."""
    modules: dict[str, dict[str, LoRA]] = {}
    for name, one in layers.items():
        experts, _, parameter = name.rpartition(".")
        modules.setdefault(experts, {})[parameter] = one
    tensors: dict[str, Tensor] = {}
    for experts, parameters in modules.items():
        at = experts.replace(*host.rename) if host.rename else experts
        for depth, (parameter, one) in enumerate(reversed(parameters.items())):
            A, B = (t.expand(one.experts, -1, -1) for t in (one.A, one.B))
            if form == "peft":
                pairs = {
                    ".".join([at, *["base_layer"] * depth]): (
                        A.flatten(0, 1),
                        B.permute(1, 2, 0).flatten(1),
                    )
                }
            elif form == "vllm-shared":
                pairs = {
                    f"{at}.{key}": pair
                    for key, pair in _projections(parameter, one.A, one.B, form, host).items()
                }
            else:
                parts = _projections(parameter, A, B, form, host)
                pairs = {
                    f"{at}.{c}.{key}": (A[c], B[c])
                    for c in range(one.experts)
                    for key, (A, B) in parts.items()
                }
            tensors |= {
                f"{key}.lora_{part}.weight": t
                for key, pair in pairs.items()
                for part, t in zip("AB", pair)
            }
    return tensors


def _projections(
    parameter: str, A: Tensor, B: Tensor, form: str, host: Host
) -> dict[str, tuple[Tensor, Tensor]]:
    """gate, up and down by the server's names."""
    gate, up, down = ("w1", "w3", "w2") if form == "vllm-shared" else host.projections
    if parameter == "down_proj":
        return {down: (A, B)}
    if parameter == "gate_up_proj":
        halves = (B[:, ::2], B[:, 1::2]) if host.interleaved else B.chunk(2, 1)
        return {gate: (A, halves[0]), up: (A, halves[1])}
    _expect(
        form != "vllm-shared",
        "experts",
        "'per-expert' or 'peft' for experts that are not gated",
        f"{form!r} for {parameter}",
    )
    return {up: (A, B)}


# ---- reading LoRA, and LoTR of PEFT ----------------------------------------------------------------------------------

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")
# What a LoRA may have beyond x W^T plus two factors; a LoTR adapter cannot hold it.
_NOT_PLAIN = (
    *(
        "use_dora",
        "lora_bias",
        "target_parameters",
        "trainable_token_indices",
        "layer_replication",
        "alora_invocation_tokens",
    ),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "bias"),
)
_MOVED_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # inits


def _read_config(directory: Path, kind: str) -> dict[str, Any]:
    config = json_in(directory / CONFIG_NAME, "source")
    got = config.get("peft_type", "LORA")
    _expect(
        str(got).rpartition(".")[2] == kind,
        directory / CONFIG_NAME,
        f"peft_type {kind}",
        f"{got!r:.80}",
    )
    return config


def _tensors_of_peft(directory: Path) -> dict[str, Tensor]:
    """The tensors in PEFT's file; base_model.model. is left out of the names."""
    old = directory / "adapter_model.bin"
    tensors = _load(
        old
        if old.is_file() and not (directory / TENSORS_NAME).is_file()
        else directory / TENSORS_NAME
    )
    return {
        key.removeprefix("base_model.").removeprefix("model."): tensor
        for key, tensor in tensors.items()
    }


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of safetensors or torch.save. No code in it is executed."""
    if path.suffix == ".safetensors":
        return tensors_in(path, "source")[0]
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes torch.load raise errors of any kind
        raise ValueError(
            f"source: expected tensors by torch.save in {path}, got {type(error).__name__} {error}"
        ) from None
    right = isinstance(tensors, Mapping) and all(isinstance(t, Tensor) for t in tensors.values())
    _expect(right, path, "a dictionary of tensors", type(tensors).__name__)
    return dict(tensors)


def _modules_of(keys: Iterable[str], endings: Iterable[str] | None) -> list[str]:
    """The modules that own tensors of these names and that one of the endings (modules_to_save) matches."""
    around = {".".join(key.split(".")[:i]) for key in keys for i in range(1, key.count(".") + 1)}
    return sorted(
        name for name in around if any(name_ends_with(name, ending) for ending in endings or ())
    )


def read_lora(source: Source) -> tuple[dict[str, LoRA], dict[str, Tensor], dict[str, Any]]:
    """Reads and checks a PEFT LoRA: its layers by name, the tensors of modules_to_save, and the configuration.
    Raises ValueError: no such adapter; another method than LoRA; a LoRA with more than its two factors (DoRA, biases,
    embeddings, weights moved by its init); factors missing, of shapes that do not fit, or not finite.
    """
    directory = checked_path(source, "source")
    config, saved, factors = _read_config(directory, "LORA"), {}, {}
    for name in _NOT_PLAIN:
        value, nothing = config.get(name), (None, False, "none", [], {})
        _expect(
            value in nothing,
            name,
            "a LoRA of two factors a layer, which LoTR can hold",
            f"{value!r:.80}",
        )
    init = str(config.get("init_lora_weights"))
    advice = (
        f"{init!r}. Save the adapter with PEFT's path_initial_model_for_weight_conversion first."
    )
    plain = not init.lower().startswith(_MOVED_WEIGHTS)
    _expect(plain, "init_lora_weights", "an init that leaves the base weights as they are", advice)
    for name, tensor in _tensors_of_peft(directory).items():
        if (found := _KEY.fullmatch(name)) is not None:
            factors.setdefault(found["name"], {})[found["part"]] = tensor
        else:
            known = _modules_of([name], config.get("modules_to_save"))
            _expect(known, "adapter", "lora_A, lora_B and modules_to_save", f"also {name}")
            saved[name] = tensor
    _expect(factors, "adapter", "tensors <layer>.lora_A.weight and .lora_B.weight", "none")
    return (
        {name: _lora_layer(name, parts, config) for name, parts in factors.items()},
        saved,
        config,
    )


def _lora_layer(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoRA:
    _expect(set(parts) == {"A", "B"}, name, "lora_A and lora_B", f"only lora_{next(iter(parts))}")
    A, B = parts["A"], parts["B"]
    fit = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] and A.numel() and B.numel()
    _expect(fit, name, "lora_A [r, K] and lora_B [N, r]", f"{tuple(A.shape)} and {tuple(B.shape)}")
    finite = all(t.is_floating_point() and bool(t.isfinite().all()) for t in (A, B))
    _expect(
        finite,
        name,
        "finite floating values",
        f"{A.dtype}, {B.dtype} or values that are not finite",
    )
    patterns = config.get("alpha_pattern") or {}
    own = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    check_number("lora_alpha", alpha := next(own, config.get("lora_alpha")))
    return LoRA(
        A.double(),
        alpha / (math.sqrt(A.shape[0]) if config.get("use_rslora") else A.shape[0]) * B.double(),
    )


def _read_peft(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A LoTR adapter that PEFT saved (`lotr_ext.peft`), in the form of `lotr_ext.files.read`."""
    content, tensors, layers = _read_config(directory, "LOTR"), {}, {}
    names = ("rank", "alpha", "rslora", "scaling", "dropout", "core", "magnitude")
    values = {
        name: tuple(v) if isinstance(v := content[name], list) else v
        for name in names
        if name in content
    }
    config = LoTRConfig.from_dict(config_of_version_1(values))
    plain = config.core == "dense" and content.get("bias", "none") == "none"
    _expect(
        plain,
        directory,
        "dense cores and no biases",
        f"core {config.core!r}, bias {content.get('bias')!r}",
    )
    for key, tensor in _tensors_of_peft(directory).items():
        key = key.replace(".lotr_adapter.core", ".core")
        tensors[re.sub(r"^(lotr_factors\..+\.[AB])$", r"\1.value", key)] = (
            tensor  # the first version's name
        )
    for one in content["layers"]:
        name, factors = one["name"], one["factors"]
        A, B = (f"{factors}.A", f"{factors}.B") if isinstance(factors, str) else factors
        layers[name] = {
            "A": f"{A}.value",
            "B": f"{B}.value",
            "scaling": config.s,
            "dropout": config.dropout,
            "experts": 0,
        }
    used = {
        key for name, entry in layers.items() for key in (entry["A"], entry["B"], f"{name}.core")
    }
    saved = _modules_of(tensors.keys() - used, content.get("modules_to_save"))
    return {"layers": layers, "modules_to_save": saved}, tensors


# ---- to LoTR ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """A LoTR adapter that was converted. errors: |D_l - s B G_l^T A^T| / |D_l| by layer, D_l the change of its weight."""

    config: LoTRConfig
    document: dict[str, Any]
    tensors: dict[str, Tensor]
    errors: dict[str, float]

    def save(self, directory: Source) -> None:
        """Writes the adapter for `lotr_ext.load_adapter`. Raises ValueError: directory is a file; OSError: the disk."""
        write(checked_path(directory, "directory"), self.document, self.tensors)


Layers = Mapping[str, tuple[Tensor, Tensor, Tensor, str]]  # A, B, core and group by name


def _converted(
    config: LoTRConfig, layers: Layers, saved: dict[str, Tensor], errors: dict[str, float]
) -> Conversion:
    entries, tensors = {}, {}
    for name, (A, B, core, group) in layers.items():
        factors = {part: f"lotr_factors.{group}.{part}" for part in "AB"}
        entries[name] = {**factors, "scaling": config.s, "dropout": config.dropout}
        tensors |= {factors["A"]: A, factors["B"]: B, f"{name}.core": core}
    tensors = {key: t.to(config.adapter_dtype) for key, t in tensors.items()}
    document = {
        "format": "lotr",
        "format_version": VERSION,
        "config": config.to_dict(),
        "layers": entries,
    }
    document["modules_to_save"] = _modules_of(saved, config.modules_to_save)
    return Conversion(config, document, tensors | saved, errors)


@torch.no_grad()
def lora_to_lotr(
    source: Source,
    *,
    rank: int | tuple[int, int],
    group_by: str | Mapping[str, str] = "shape",
    dtype: torch.dtype = torch.float32,
) -> Conversion:
    """A PEFT LoRA as LoTR of this rank: `.save(directory)`, then `lotr_ext.load_adapter(model, directory)`.

    The changes of a group's weights, stacked, are factorised by Tucker-2 in float64: HOSVD, then a few steps of HOOI. S LoRAs
    of rank r in a group are exact at rank S r (arXiv 2402.01376 calls LoTR a generalisation of LoRA in this sense). A and B are
    START times orthonormal, and s is "auto", so training can go on at LoRA's rate. At a lower rank read the result's
    errors: near 1, a layer has lost its adapter.

    Args:
        source: a directory. modules_to_save are copied.
        rank: r, or (r_in, r_out), for all groups.
        group_by: "shape", "block", "name", "layer" or a mapping from layer names, as in LoTRConfig.
        dtype: of the result.

    Raises TypeError, ValueError: a source that `read_lora` refuses; a wrong rank, grouping or dtype.
    """
    check_dtype(dtype)
    ranks, (layers, saved, content) = check_rank(rank), read_lora(source)
    endings = [
        ending for ending in content.get("modules_to_save") or () if _modules_of(saved, [ending])
    ]
    own = {
        "target_modules": sorted(layers),
        "modules_to_save": endings or None,
        "dropout": content.get("lora_dropout") or 0.0,
    }
    config = LoTRConfig(rank=rank, group_by=group_by, adapter_dtype=dtype, **own)
    _expect(
        config.group_by != "width",
        "group_by",
        "shape, block, name, layer or a mapping",
        f"{group_by!r}, whose pairs have several shapes",
    )
    groups, found, errors = {}, {}, {}
    for name, layer in layers.items():
        groups.setdefault(group_of(name, nn.Identity(), layer.sizes, config.group_by), []).append(
            name
        )
    for group, names in groups.items():
        shapes = {layers[name].sizes for name in names}
        _expect(
            len(shapes) == 1, "group_by", f"layers of one shape in group {group!r}", sorted(shapes)
        )
        U, V = (
            [layers[name].B for name in names],
            [layers[name].A.mT for name in names],
        )  # D_l = U_l V_l^T is not formed
        side = [v @ torch.linalg.qr(u, mode="r")[1].mT for u, v in zip(U, V)]
        right, left = partial(_products, U, V), partial(_products, V, U)
        A, B, cores = tucker2_of(side, right, left, len(U[0]), ranks)
        for name, core, half in zip(names, cores, side):
            whole = half.norm()
            errors[name] = (
                math.sqrt(max(0.0, 1 - float(core.norm() / whole) ** 2)) if whole > 0 else 0.0
            )
            found[name] = (START * A, START * B, core / (START**2 * config.s), group)
    return _converted(config, found, saved, errors)


def _products(U: Sequence[Tensor], V: Sequence[Tensor], A: Tensor) -> list[Tensor]:
    """U_l V_l^T A for each l."""
    return [u @ (v.mT @ A) for u, v in zip(U, V)]


_ORIGINAL = re.compile(r"(?P<name>.+)\.lotr\.(?P<part>lhs|mid|rhs)")


@torch.no_grad()
def original_to_lotr(
    source: Source, *, scale: float = 1.0, modules_to_save: Sequence[str] | None = None
) -> Conversion:
    """The adapter in a state dict of a model with layers of the original implementation (github.com/daskol/lotr):

        <layer>.lotr.rhs [in_features, r] = A, .mid [r, r] = G, .lhs [r, out_features] = B^T      y += (scale / r) x rhs mid lhs

    Args:
        source: a file of torch.save or safetensors.
        scale: the argument of its LoTRLinear, which the checkpoint does not contain; their default is 1.
        modules_to_save: endings of names of modules that were trained whole (a head): copied.

    Raises TypeError, ValueError: no such layers; parts missing or of shapes that do not fit; layers of several ranks or dtypes;
    no such modules_to_save; a scale that is not a finite number.
    """
    check_number("scale", scale)
    state, parts, firsts = _load(checked_path(source, "source")), {}, {}
    for key, tensor in state.items():
        if (found := _ORIGINAL.fullmatch(key)) is not None:
            parts.setdefault(found["name"], {})[found["part"]] = tensor
    _expect(parts, "source", "tensors <layer>.lotr.lhs, .mid and .rhs", f"{len(state)} others")
    layers = {name: _original_layer(name, layer, firsts) for name, layer in parts.items()}
    ranks, dtypes = (
        {len(layer["mid"]) for layer in parts.values()},
        {t.dtype for one in parts.values() for t in one.values()},
    )
    one = len(ranks) == len(dtypes) == 1
    _expect(
        one,
        "source",
        "layers of one rank and dtype",
        f"ranks {sorted(ranks)}, {sorted(map(str, dtypes))}",
    )
    for ending in modules_to_save or ():
        known = _modules_of(state, [ending])
        _expect(
            known,
            "modules_to_save",
            "names of modules in the checkpoint",
            f"{ending!r}, which matches none",
        )
    rank, groups = ranks.pop(), {name: group for name, (_, _, _, group) in layers.items()}
    own = {
        "target_modules": sorted(layers),
        "modules_to_save": modules_to_save,
        "group_by": groups,
        "init": "normal",
    }
    config = LoTRConfig(rank=rank, scaling=scale / rank, adapter_dtype=dtypes.pop(), **own)
    saved = {key: t for key, t in state.items() if _modules_of([key], list(modules_to_save or ()))}
    return _converted(config, layers, saved, dict.fromkeys(layers, 0.0))


def _original_layer(
    name: str, parts: Mapping[str, Tensor], firsts: dict[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, str]:
    """A, B, the core and the group of a layer. firsts: the factors of each group; layers with equal ones share a group."""
    missing = sorted({"lhs", "mid", "rhs"} - set(parts))
    _expect(not missing, name, "lotr.lhs, .mid and .rhs", f"none of {', '.join(missing)}")
    lhs, mid, rhs = (parts[part] for part in ("lhs", "mid", "rhs"))
    fit = (
        all(t.dim() == 2 for t in parts.values())
        and mid.shape == (rhs.shape[1], lhs.shape[0])
        and len(mid) == len(mid.mT)
    )
    shapes = ", ".join(f"{part} {tuple(t.shape)}" for part, t in sorted(parts.items()))
    _expect(fit, name, "lhs [r, out], mid [r, r], rhs [in, r]", shapes)
    known = (
        group for group, (A, B) in firsts.items() if torch.equal(A, rhs) and torch.equal(B, lhs)
    )
    group = next(known, f"{len(rhs)}x{lhs.shape[1]}_{len(firsts)}")
    firsts.setdefault(group, (rhs, lhs))
    return rhs, lhs.mT.contiguous(), mid, group


# ---- the command -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m lotr_ext.convert", description="Convert adapters to LoTR and back."
    )
    commands = top.add_subparsers(dest="command", required=True)
    help_of = {
        "lotr-to-lora": "Convert a LoTR adapter's directory to an exact LoRA for PEFT and servers.",
        "lora-to-lotr": "Convert a PEFT LoRA's directory to LoTR, and print each layer's error.",
        "original-to-lotr": "Convert a file with a state dict of github.com/daskol/lotr to LoTR.",
    }
    lora, lotr, original = (
        commands.add_parser(name, help=text, description=text) for name, text in help_of.items()
    )
    for one in (lora, lotr, original):
        one.add_argument("source")
        one.add_argument("destination", help="directory for the new adapter, created if missing")
    lora.add_argument("--task-type", help="PEFT's task type, such as SEQ_CLS or CAUSAL_LM")
    lora.add_argument("--fan-in-fan-out", action="store_true", help="for GPT-2's Conv1D layers")
    lora.add_argument(
        "--experts",
        choices=FORMS,
        default="peft",
        help="the form of a mixture's experts (default peft)",
    )
    lora.add_argument(
        "--hosts",
        choices=tuple(HOSTS),
        help="the model type, if a server has its own names for its experts",
    )
    lora.add_argument("--base-model", help="the base model's path, for base_model_name_or_path")
    lotr.add_argument(
        "--rank",
        type=int,
        nargs="+",
        required=True,
        metavar="R",
        help="the rank, or r_in and r_out",
    )
    lotr.add_argument(
        "--group-by",
        choices=("shape", "block", "name"),
        default="shape",
        help="which layers share A and B",
    )
    lotr.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the new adapter")
    original.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="the scale that its layers were made with (default 1)",
    )
    original.add_argument(
        "--modules-to-save",
        nargs="+",
        metavar="NAME",
        help="fully trained modules, such as classifier",
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 with a message on stderr if the input cannot be converted; then nothing was written."""
    options = vars(parser().parse_args(arguments))
    command, source, destination = (
        options.pop(name) for name in ("command", "source", "destination")
    )
    try:
        if command == "lotr-to-lora":
            layers = lotr_to_lora(source, destination, **options)
            lines = [
                f"{name}  {one.sizes[0]} x {one.sizes[1]}  rank {one.rank}"
                for name, one in layers.items()
            ]
        else:
            if command == "lora-to-lotr":
                rank = options["rank"] if len(options["rank"]) > 1 else options["rank"][0]
                found = lora_to_lotr(
                    source, **{**options, "rank": rank, "dtype": DTYPES[options["dtype"]]}
                )
            else:
                found = original_to_lotr(source, **options)
            found.save(destination)
            lines = [f"{name}  error {error:.2e}" for name, error in found.errors.items()]
    except (TypeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*lines, f"{len(lines)} layers -> {destination}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
