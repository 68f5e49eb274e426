"""Adapters of experts as LoRA, exact, in the two forms that others read.

s B G_c^T A^T = s lora_B_c lora_A_c    with the core in lora_A: lora_A_c = (A G_c)^T [r_out, k], lora_B = B [n, r_out] for all c
                                       or in lora_B: lora_A = A^T [r_in, k] for all c, lora_B_c = B G_c^T [n, r_in]

"peft"          PEFT's target_parameters. Its wrappers of one experts module lie one in another, the last parameter's outermost:
                    <experts>.base_layer.lora_A.weight  [e r, k]   of gate_up_proj, beside down_proj's <experts>.lora_A.weight
                    <experts>.base_layer.lora_B.weight  [n, r e]   where the expert is the last index
"shared-outer"  gate_up shares lora_A over the experts and down shares lora_B, what is shared having one expert:
                    <experts>.gate_up_proj.lora_A.weight  [1, r, k]      .lora_B.weight  [e, n, r]
                    <experts>.down_proj.lora_A.weight     [e, r, k]      .lora_B.weight  [1, n, r]
                as SGLang's --experts-shared-outer-loras and Megatron-Bridge have it (by the texts of their pull requests).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.experts import LoTRExperts
from ..ops import accumulate_dtype

__all__ = ["FORMS", "ExpertLoRA", "expert_lora", "expert_lora_factors", "expert_tensors"]

FORMS = ("peft", "shared-outer")


@dataclass(frozen=True)
class ExpertLoRA:
    """One parameter's factors: A [e, r, k] and B [e, n, r], of which one may have one expert for all; scaling * B_c @ A_c is
    added to W_c [n, k]. experts: e."""

    A: Tensor
    B: Tensor
    scaling: float
    experts: int

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def sizes(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.A.shape[2], self.B.shape[1]

    def delta(self) -> Tensor:
        """What is added to the weight, [e, n, k]."""
        return (self.scaling * self.B @ self.A).expand(self.experts, -1, -1)


def expert_lora(A: Tensor, B: Tensor, cores: Tensor, scaling: float, core: str | None = None) -> ExpertLoRA:
    """A [k, r_in], B [n, r_out], cores [e, r_in, r_out] as LoRA, made in float32 (float64 for float64), in the cores' dtype.

    core: "A" or "B", the side that takes the cores; None: the one with which the rank is the smaller.
    """
    if core not in ("A", "B", None):
        raise ValueError(f"core: expected 'A', 'B' or None, got {core!r}")
    wide, (e, r_in, r_out) = accumulate_dtype(cores.dtype), cores.shape
    if core is None:
        core = "A" if r_out <= r_in else "B"
    A, B, G = (t.detach().to(cores.device, wide) for t in (A, B, cores))
    pair = ((A @ G).mT, B.unsqueeze(0)) if core == "A" else (A.T.unsqueeze(0), B @ G.mT)
    return ExpertLoRA(*(t.to(cores.dtype).contiguous() for t in pair), float(scaling), e)


@torch.no_grad()
def expert_lora_factors(layer: LoTRExperts, core: str | None = None) -> ExpertLoRA:
    """The adapter of an experts' parameter as LoRA. core: as in `expert_lora`.

    Raises:
        TypeError: not adapted experts. ValueError: another side. RuntimeError: a layer on the meta device.
    """
    if not isinstance(layer, LoTRExperts):
        raise TypeError(f"layer: expected LoTRExperts, got {type(layer).__name__}")
    if layer.core.is_meta:
        raise RuntimeError("layer: expected tensors with values, got a layer on the meta device")
    return expert_lora(layer.factors.A, layer.factors.B, layer.core.detach(), layer.scaling, core)


def check_form(form: str) -> str:
    """form, if it is one."""
    if form not in FORMS:
        raise ValueError(f"experts: expected one of {', '.join(FORMS)}, got {form!r}")
    return form


def core_side(parameter: str, form: str) -> str | None:
    """Where the cores go: with shared outer factors the side that meets the intermediate size, else the smaller one."""
    return None if form == "peft" else "A" if parameter == "down_proj" else "B"


def expert_tensors(layers: Mapping[str, ExpertLoRA], form: str) -> dict[str, Tensor]:
    """The tensors by their keys. layers: by the full name of the parameter, those of a module in the order that it has them."""
    hosts: dict[str, list[str]] = {}
    for name in layers:
        hosts.setdefault(name.rpartition(".")[0], []).append(name)
    tensors: dict[str, Tensor] = {}
    for host, names in hosts.items():
        for depth, name in enumerate(reversed(names)):
            one, at = layers[name], ".".join([host, *["base_layer"] * depth]) if form == "peft" else name
            A, B = one.A, one.B
            if form == "peft":
                A = A.expand(one.experts, -1, -1).flatten(0, 1)
                B = B.expand(one.experts, -1, -1).permute(1, 2, 0).flatten(1)
            tensors |= {
                f"{at}.lora_{part}.weight": t.clone(memory_format=torch.contiguous_format) for part, t in (("A", A), ("B", B))
            }
    return tensors
