"""Rivals from other packages: torch.compile, PEFT's LoRA, DoRA and VeRA, and kernels of Unsloth and LoRAFusion if installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from ..measure.names import named
from ..measure.shapes import DTYPES, Case
from .base import SCALING, Rival, Tensors, frozen_linear, lora_forward, lora_rival

_PACKAGES = {
    **dict.fromkeys(("lora-peft", "dora-peft", "vera-peft"), "peft"),
    "lora-unsloth": "unsloth",
    "lora-lorafusion": "lorafusion",
}


def missing_package(rival: str) -> str | None:
    """The missing package of a rival; None if it is installed."""
    package = _PACKAGES.get(rival)
    return package if package is not None and importlib.util.find_spec(package) is None else None


def require(option: str, rivals: Iterable[str]) -> None:
    """Raises ValueError for the first rival whose package is not installed."""
    for rival in rivals:
        missing = missing_package(rival)
        if missing is not None:
            raise ValueError(f"{option}: {rival} needs the package {missing}, which is not installed (pip install {missing})")


def obstacle(rival: str, case: Case, device: torch.device) -> str | None:
    """Why a rival cannot run a case; None if it can."""
    if rival in ("frozen-autotuned", "lora-autotuned") and device.type != "cuda":
        return "there is no search for the fastest product but on a GPU"
    if rival == "lotr_ext-fused":
        from lotr_ext.ops import planner

        of = case.r, DTYPES[case.dtype], device
        return planner.obstacle_to_kernels(*of) or planner.fused_obstacle(*of)
    if rival in ("lora-unsloth", "lora-lorafusion") and device.type != "cuda":
        return "its kernels need a GPU"
    if rival == "lora-unsloth" and case.has_bias():
        return "its kernel has no bias"
    if rival == "lora-lorafusion" and case.dtype == "fp32":
        return "its kernels take bf16 and fp16"
    return None


def lora_compiled(t: Tensors, case: Case) -> Rival:
    """Plain LoRA, compiled by torch.compile for this shape."""
    torch._dynamo.reset()  # else the compiler generalises over the cases before
    return lora_rival(named("lora-compiled"), t, lambda A, B: torch.compile(lora_forward(t, A, B), dynamic=False))


def autotuned(call: Callable) -> Callable:
    """Compiled by torch.compile for the first shape, with a search for the fastest product, generated or the library's."""
    return torch.compile(call, dynamic=False, mode="max-autotune-no-cudagraphs")


def frozen_autotuned(t: Tensors, case: Case) -> Rival:
    """The frozen layer after a search: the library's default choice of an algorithm is not always the fastest."""
    torch._dynamo.reset()
    return Rival("frozen autotuned", autotuned(lambda x: F.linear(x, t.weight, t.bias)), {})


def lora_autotuned(t: Tensors, case: Case) -> Rival:
    torch._dynamo.reset()
    return lora_rival("LoRA autotuned", t, lambda A, B: autotuned(lora_forward(t, A, B)))


def _with_peft(t: Tensors, config) -> nn.Module:
    from peft import get_peft_model

    model = nn.Sequential()
    model.add_module("layer", frozen_linear(t))
    return get_peft_model(model, config).base_model.model.layer


def lora_peft(t: Tensors, case: Case, dora: bool = False) -> Rival:
    from peft import LoraConfig

    layer = _with_peft(t, LoraConfig(r=case.r, lora_alpha=SCALING * case.r, target_modules=["layer"], use_dora=dora))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data, B.data = t.A.T.contiguous().clone(), t.B.clone()
    parameters = {"A": (A, True), "B": (B, False)}
    if dora:
        parameters["magnitude"] = layer.lora_magnitude_vector["default"].weight, False
    return Rival(named("dora-peft" if dora else "lora-peft"), layer, parameters)


def dora_peft(t: Tensors, case: Case) -> Rival:
    return lora_peft(t, case, dora=True)


def vera_peft(t: Tensors, case: Case) -> Rival:
    """y = x W^T + bias + b * (((x A) * d) B^T) with A and B frozen: d [r] and b [n] are trained."""
    from peft import VeraConfig

    layer = _with_peft(t, VeraConfig(r=case.r, target_modules=["layer"]))
    A, B = t.A.T.contiguous(), t.B.clone()
    layer.vera_A["default"], layer.vera_B["default"] = A, B
    d, b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    d.data, b.data = t.d.clone(), t.b.clone()
    return Rival(named("vera-peft"), layer, {"d": (d, False), "b": (b, False)}, frozen=(A, B))


def lora_unsloth(t: Tensors, case: Case) -> Rival:
    """LoRA_W of unsloth.kernels.fast_lora: library products with a backward written by hand, no bias."""
    LoRA_W = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    return lora_rival(named("lora-unsloth"), t, lambda A, B: lambda x: LoRA_W.apply(x[None], t.weight, None, A, B, SCALING)[0])


def lora_lorafusion(t: Tensors, case: Case) -> Rival:
    """fused_linear_lora of lorafusion.ops.lora_v1: the rank fused into a Triton product."""
    fused = importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora
    return lora_rival(named("lora-lorafusion"), t, lambda A, B: lambda x: fused(x, t.weight, A, B, SCALING, linear_bias=t.bias))
