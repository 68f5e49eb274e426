"""Converts a LoTR adapter, or one task, to an exact LoRA for PEFT and servers.

A LoTR of rank r on a layer is a LoRA of rank r with lora_alpha = r, in the smaller of two forms:

    s B G_l^T A^T = lora_B lora_A  with  lora_A = (A G_l)^T [r_out, k], lora_B = s B [n, r_out]
                                   or    lora_A = A^T [r_in, k],        lora_B = s B G_l^T [n, r_in]

Only the size grows, because a LoRA stores its factors for each layer.

With init "svd", training starts from an adapter that is subtracted from W. A LoRA for the original
W is the trained adapter minus the start, at twice the rank: [lora_B, -start_B] [lora_A; start_A].
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapted import layers_in
from ..adapter_state import AdapterState, LayerEntry, start_key
from ..checks import check_choice
from ..config import TASKS, LoTRConfig
from ..core.operators import accumulate_dtype
from ..layers import LoTRConv1D
from ..old_files import config_of_version_1, factor_names
from ..saving import adapter_of, unwrap, warn_of_unsaved
from ..storage import FilePath, errors_of
from ..targets import parameter_name
from .hosts import EXPERT_FORMS, SERVER_NAMES, ServerNames, expert_tensors
from .lora import (
    CONFIG_NAME,
    TENSORS_NAME,
    LoRA,
    base_name,
    modules_of,
    put_folder,
    read_config,
    read_peft_tensors,
)


def export_lora(
    model: nn.Module, directory: FilePath, *, task: int | None = None, **options: Any
) -> dict[str, LoRA]:
    """Writes the adapter of a model as a PEFT LoRA.

    `peft.PeftModel.from_pretrained(base, directory)` then gives the same outputs up to rounding,
    for the base model that `apply_lotr` was given. modules_to_save are written, too.

    Args:
        model: An adapted model, or whatever else `save_adapter` takes. With DistributedDataParallel
            all processes call this, and process 0 writes.
        directory: Created if it does not exist.
        task: A task of the model's TaskBank, which is written instead of the adapter's cores.
        options: As for `lotr_to_lora`. base_model, fan_in_fan_out and, in the servers' forms, hosts
            default to the model's.

    Returns:
        The layers by name, as for `lotr_to_lora`. Empty in a process that does not write.

    Raises:
        AttributeError: If a task is given and the model has no TaskBank.
        TypeError, ValueError, RuntimeError, OSError: As for `save_adapter` and `lotr_to_lora`.
    """
    path = Path(directory)
    inner, writes = unwrap(model)
    adapter = adapter_of(inner)
    if task is None:
        warn_of_unsaved(inner)
    else:
        adapter = replace(adapter, tensors=adapter.tensors | inner.lotr_tasks.cores_of(task))
    options.setdefault("base_model", adapter.base.name)
    has_conv1d = any(isinstance(layer, LoTRConv1D) for layer in layers_in(inner).values())
    options.setdefault("fan_in_fan_out", has_conv1d)
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    if options.get("experts") in ("vllm-shared", "per-expert") and model_type in SERVER_NAMES:
        options.setdefault("hosts", model_type)
    return _write_lora(path, adapter, **options) if writes else {}


def lotr_to_lora(source: FilePath, directory: FilePath, **options: Any) -> dict[str, LoRA]:
    """Writes a saved LoTR adapter as a PEFT LoRA. No model is needed.

    Args:
        source: A folder with a LoTR adapter, by `save_adapter` or by PEFT.
        directory: Created if it does not exist.
        task_type: PEFT's name of the task, such as "CAUSAL_LM". None for a plain PeftModel.
        experts: The form of adapted experts: "peft", or for servers "vllm-shared" or "per-expert",
            which PEFT does not read. An exported adapter with experts has no dropout, because PEFT
            has none for them.
        hosts: The base's model type, such as "mixtral", if servers name its experts differently
            (`SERVER_NAMES`).
        base_model: Where the base model is, for base_model_name_or_path. PEFT's AutoPeftModel and
            vLLM's resolver of folders read it.
        fan_in_fan_out: For the configuration. PEFT corrects a wrong value, with a warning.

    Returns:
        The LoRA layers by name. Experts have the name of their parameter.

    Raises:
        TypeError: If an option is unknown, or a path is not a path.
        ValueError: If there is no such adapter, directory is the source of PEFT's files, or an
            option has an unknown value.
        FileExistsError: If directory is a file.
        OSError: If a file cannot be written. The directory then has no adapter_config.json, so that
            none of its files is read.
    """
    path = Path(directory)
    folder = Path(source)
    # If a folder has an adapter of PEFT and one of `save_adapter`, the second one is converted.
    is_by_peft = (folder / CONFIG_NAME).is_file() and not list(folder.glob("lotr_adapter.*"))
    adapter = _read_lotr_of_peft(folder) if is_by_peft else AdapterState.read(folder)
    if is_by_peft and path.resolve() == folder.resolve():
        raise ValueError(
            f"directory: expected another one than source, because the files have the same names, "
            f"got {path}"
        )
    return _write_lora(path, adapter, **options)


def _read_lotr_of_peft(directory: Path) -> AdapterState:
    """Returns a LoTR adapter that PEFT saved (`lotr_ext.peft`)."""
    content = read_config(directory, "LOTR")
    settings = ("rank", "alpha", "rslora", "scaling", "dropout", "core", "magnitude")
    values = {name: content[name] for name in settings if name in content}
    config = LoTRConfig.from_dict(config_of_version_1(values))
    # PEFT's files have the parameters of computed cores instead of the cores. Trained biases would
    # be lost, because the LoRA has none.
    bias = content.get("bias", "none")
    if config.core != "dense" or bias != "none":
        raise ValueError(
            f"{directory}: expected dense cores and no biases, got core {config.core!r}, "
            f"bias {bias!r}"
        )
    tensors = {
        base_name(key).replace(".lotr_adapter.core", ".core"): tensor
        for key, tensor in read_peft_tensors(directory).items()
    }
    with errors_of(f"source {directory}"):
        layers = {
            entry["name"]: LayerEntry(*factor_names(entry["factors"]), config.s, config.dropout)
            for entry in content["layers"]
        }
        # Checks that the tensors are complete, and fit the layers and ranks.
        return AdapterState.from_document(
            {
                "config": config.to_dict(),
                "layers": {name: asdict(entry) for name, entry in layers.items()},
                "modules_to_save": modules_of(tensors, content.get("modules_to_save")),
            },
            tensors,
        )


# ---- the folder ----------------------------------------------------------------------------------


def _write_lora(
    directory: Path,
    adapter: AdapterState,
    *,
    task_type: str | None = None,
    experts: str = "peft",
    hosts: str | None = None,
    base_model: str | None = None,
    fan_in_fan_out: bool = False,
) -> dict[str, LoRA]:
    """Writes an adapter as a LoRA, with the options of `lotr_to_lora`."""
    check_choice("experts", experts, EXPERT_FORMS)
    check_choice("task_type", task_type, (*TASKS, None))
    check_choice("hosts", hosts, (*SERVER_NAMES, None))
    layers = _lora_layers(adapter, experts)
    linear = {name: layer for name, layer in layers.items() if not layer.experts}
    stacked = {name: layer for name, layer in layers.items() if layer.experts}
    inside_saved = tuple(f"{name}." for name in adapter.modules_to_save)
    # A module inside another one is saved with it.
    outermost = {name for name in adapter.modules_to_save if not name.startswith(inside_saved)}
    rank = next(iter(layers.values())).rank  # all have the same
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "inference_mode": True,
        "base_model_name_or_path": base_model or None,
        "r": rank,
        "lora_alpha": rank,  # alpha / r = 1: the scaling is in the factors
        # PEFT refuses dropout with target_parameters.
        "lora_dropout": 0.0 if stacked else max(e.dropout for e in adapter.layers.values()),
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": _target_modules(linear, stacked, experts),
        "modules_to_save": sorted(outermost) or None,
    }
    if stacked and experts == "peft":
        config["target_parameters"] = sorted(stacked)
    written = expert_tensors(stacked, experts, SERVER_NAMES.get(hosts, ServerNames()))
    for name, layer in sorted(linear.items()):
        written[f"{name}.lora_A.weight"] = layer.A
        written[f"{name}.lora_B.weight"] = layer.B
    written |= {key: t for key, t in adapter.tensors.items() if key.startswith(inside_saved)}
    put_folder(
        directory,
        TENSORS_NAME,
        {f"base_model.model.{key}": tensor for key, tensor in written.items()},
        config,
    )
    return layers


def _target_modules(
    linear: Mapping[str, LoRA], stacked: Mapping[str, LoRA], experts: str
) -> list[str] | str:
    """Returns target_modules of PEFT's configuration: full names, or a regular expression.

    PEFT matches a name in a list with the ends of modules' names, so a name without a dot could
    match other modules, too.
    """
    # PEFT finds experts by target_parameters. Servers expect the ends of their names here.
    endings = sorted({name.rpartition(".")[2] for name in stacked if experts != "peft"})
    if all("." in name for name in linear):
        return [*sorted(linear), *endings]
    expressions = [rf".*\.{ending}" for ending in endings]
    return "|".join([*map(re.escape, sorted(linear)), *expressions])


# ---- the layers ----------------------------------------------------------------------------------


def _lora_layers(adapter: AdapterState, form: str) -> dict[str, LoRA]:
    """Returns the layers of a saved adapter by name. Experts have the name of their parameter.

    All have one rank, because some servers do not read patterns of ranks.

    Args:
        adapter: The adapter.
        form: The form of experts.
    """
    layers = {}
    for name, entry in adapter.layers.items():
        # Without a configuration, the model was built by hand, and its experts are LoTRExperts.
        if entry.experts and adapter.config is None:
            raise ValueError(
                f"experts: expected those of a transformers model, got LoTRExperts at {name!r}. No "
                f"form of a LoRA has them."
            )
        target = parameter_name(name) if entry.experts else name
        layers[target] = _lora_layer(adapter, name, form)
    rank = max(layer.rank for layer in layers.values())
    for name, layer in layers.items():
        lacking = rank - layer.rank
        # Rows of zeros in A, and columns of zeros in B, leave the product as it is.
        layers[name] = replace(
            layer,
            A=nn.functional.pad(layer.A, (0, 0, 0, lacking)),
            B=nn.functional.pad(layer.B, (0, lacking)),
        )
    return layers


def _lora_layer(adapter: AdapterState, name: str, form: str) -> LoRA:
    """Returns one layer of a saved adapter, minus its start if it has one."""
    entry = adapter.layers[name]
    tensors = adapter.tensors
    core = tensors[f"{name}.core"]
    r_in, r_out = core.shape[-2:]
    is_vllm_shared = entry.experts > 0 and form == "vllm-shared"
    # vLLM shares the factor on the side of the hidden size. So the core goes to the other one: to B
    # of gate and up, to A of down. Elsewhere, it goes where the rank becomes smaller.
    into_A = name.endswith("down_proj") if is_vllm_shared else r_out <= r_in
    A, B = _lora_factors(tensors[entry.A], tensors[entry.B], core, entry.scaling, into_A)
    if start_key(entry.A) in tensors:
        start_A, start_B = _lora_factors(
            tensors[start_key(entry.A)],
            tensors[start_key(entry.B)],
            tensors[f"{name}.start_core"],
            entry.scaling,
            into_A,
        )
        A = torch.cat([A, start_A])
        B = torch.cat([B, -start_B], 1)
    if entry.experts:
        # The factor without the core has no dimension of experts yet. It becomes [1, ..].
        A = A.reshape(-1, *A.shape[-2:])
        B = B.reshape(-1, *B.shape[-2:])
    return LoRA(A.to(core.dtype).contiguous(), B.to(core.dtype).contiguous(), entry.experts)


def _lora_factors(
    A: Tensor, B: Tensor, core: Tensor, scaling: float, into_A: bool
) -> tuple[Tensor, Tensor]:
    """Returns lora_A [.., r, k] and lora_B [.., n, r] in float32 (float64 for float64).

    Args:
        A: [k, r_in].
        B: [n, r_out].
        core: [r_in, r_out], or [e, r_in, r_out] for experts.
        scaling: s.
        into_A: Whether the core is multiplied into A, else into B.
    """
    # Wide, so that the result is rounded only once.
    wide = accumulate_dtype(core.dtype)
    A, B, core = (tensor.detach().to(core.device, wide) for tensor in (A, B, core))
    if into_A:
        return (A @ core).mT, scaling * B
    return A.mT, scaling * B @ core.mT
