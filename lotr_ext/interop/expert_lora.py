"""Adapters of experts as LoRA, exact, in the forms that PEFT and servers read.

s B G_c^T A^T = s lora_B_c lora_A_c    with the core in lora_A: lora_A_c = (A G_c)^T [r_out, k], lora_B = B [n, r_out] for all c
                                       or in lora_B: lora_A = A^T [r_in, k] for all c, lora_B_c = B G_c^T [n, r_in]

"peft"          PEFT's target_parameters. Its wrappers of one experts module are nested; the last parameter's is the outermost:
                    <experts>.base_layer.lora_A.weight  [e r, k]   of gate_up_proj, beside down_proj's <experts>.lora_A.weight
                    <experts>.base_layer.lora_B.weight  [n, r e]   where the expert is the last index
"shared-outer"  gate_up shares lora_A over the experts and down shares lora_B; the shared one has one expert:
                    <experts>.gate_up_proj.lora_A.weight  [1, r, k]      .lora_B.weight  [e, n, r]
                    <experts>.down_proj.lora_A.weight     [e, r, k]      .lora_B.weight  [1, n, r]
                the layout of SGLang's --experts-shared-outer-loras and Megatron-Bridge (by the texts of their pull requests).
"vllm-shared"   The same factors with gate and up separate, as vLLM with enable_moe_shared_loras reads. i: intermediate size.
                    <experts>.w1.lora_A.weight  [1, r, k]      .lora_B.weight  [e, i, r]   gate
                    <experts>.w3.lora_A.weight  [1, r, k]      .lora_B.weight  [e, i, r]   up
                    <experts>.w2.lora_A.weight  [e, r, i]      .lora_B.weight  [1, k, r]   down
"per-expert"    A LoRA for each expert and projection, as in checkpoints that list their experts one by one:
                    <experts>.<c>.gate_proj.lora_A.weight  [r, k]    .lora_B.weight  [i, r]    and up_proj, down_proj
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..layers.experts import LoTRExperts
from ..layers.layer import LoTRLayer
from ..ops import accumulate_dtype

__all__ = ["FORMS", "HOSTS", "ExpertLoRA", "Host", "expert_lora", "expert_lora_factors", "expert_tensors"]

FORMS = ("peft", "shared-outer", "vllm-shared", "per-expert")


@dataclass(frozen=True)
class Host:
    """A server's names for the experts of a model class, where they differ from transformers' names.

    rename: a dotted part of module names, and its replacement. projections: gate, up and down of one expert. interleaved:
    the rows of gate_up_proj alternate between gate and up; otherwise gate is its first half.
    """

    rename: Mapping[str, str] = field(default_factory=dict)
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    interleaved: bool = False

    def named(self, experts: str) -> str:
        """The server's name of an experts module."""
        for old, new in self.rename.items():
            experts = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", experts)
        return experts


HOSTS: Mapping[str, Host] = {  # by transformers' model_type
    "mixtral": Host({"mlp.experts": "block_sparse_moe.experts"}, ("w1", "w3", "w2")),
    "gpt_oss": Host(interleaved=True),
}


@dataclass(frozen=True)
class ExpertLoRA:
    """One parameter's factors: A [e, r, k] and B [e, n, r], one of which may have a single expert for all;
    scaling * B_c @ A_c is added to W_c [n, k]. experts: e."""

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
        """The change of the weight, [e, n, k]."""
        return (self.scaling * self.B @ self.A).expand(self.experts, -1, -1)


def expert_lora(A: Tensor, B: Tensor, cores: Tensor, scaling: float, core: str | None = None) -> ExpertLoRA:
    """A [k, r_in], B [n, r_out], cores [e, r_in, r_out] as LoRA, made in float32 (float64 for float64), in the cores' dtype.

    core: "A" or "B", the side into which the cores are multiplied; None: the side that gives the smaller rank.
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
    check_values(layer)
    return expert_lora(layer.factors.A, layer.factors.B, layer.core.detach(), layer.scaling, core)


def check_values(layer: LoTRLayer) -> None:
    """Raises RuntimeError for a layer on the meta device."""
    if layer.core.is_meta:
        raise RuntimeError("layer: expected tensors with values, got a layer on the meta device")


def check_form(form: str) -> str:
    """Returns form, or raises ValueError for an unknown one."""
    if form not in FORMS:
        raise ValueError(f"experts: expected one of {', '.join(FORMS)}, got {form!r}")
    return form


def host_of(hosts: str | Mapping[str, str] | None, form: str, model_type: str | None) -> Host:
    """The names to write. hosts: a model_type, {part of module names: replacement}, or None for the model's own names where
    a form is for servers alone."""
    if hosts is None:
        return HOSTS.get(model_type or "", Host()) if form in ("vllm-shared", "per-expert") else Host()
    if isinstance(hosts, str):
        if hosts not in HOSTS:
            raise ValueError(f"hosts: expected one of {', '.join(HOSTS)}, or names by name, got {hosts!r}")
        return HOSTS[hosts]
    if not isinstance(hosts, Mapping) or not all(isinstance(name, str) and name for pair in hosts.items() for name in pair):
        raise TypeError(f"hosts: expected a model type, or parts of module names by name, got {hosts!r}")
    return Host(dict(hosts))


def core_side(parameter: str, form: str) -> str | None:
    """The side of the cores: with shared outer factors the one of the intermediate size, otherwise the smaller one."""
    return None if form in ("peft", "per-expert") else "A" if parameter == "down_proj" else "B"


def expert_tensors(layers: Mapping[str, ExpertLoRA], form: str, host: Host) -> dict[str, Tensor]:
    """The tensors by their keys. layers: by the parameter's full name, those of a module in the module's order."""
    modules: dict[str, dict[str, ExpertLoRA]] = {}
    for name, one in layers.items():
        experts, _, parameter = name.rpartition(".")
        modules.setdefault(experts, {})[parameter] = one
    tensors: dict[str, Tensor] = {}
    for experts, parameters in modules.items():
        at = host.named(experts)
        for depth, (parameter, one) in enumerate(reversed(parameters.items())):
            if form == "peft":
                pairs = {".".join([at, *["base_layer"] * depth]): _flat(one)}
            elif form == "shared-outer":
                pairs = {f"{at}.{parameter}": (one.A, one.B)}
            else:
                parts = _projections(parameter, one, form, host)
                pairs = parts if form == "vllm-shared" else _one_by_one(parts, one.experts)
                pairs = {f"{at}.{key}": pair for key, pair in pairs.items()}
            for key, (A, B) in pairs.items():
                for part, tensor in (("A", A), ("B", B)):
                    tensors[f"{key}.lora_{part}.weight"] = tensor.clone(memory_format=torch.contiguous_format)
    return tensors


_Pair = tuple[Tensor, Tensor]


def _flat(one: ExpertLoRA) -> _Pair:
    """The factors in PEFT's layout: A [e r, k] and B [n, r e]."""
    A, B = one.A.expand(one.experts, -1, -1), one.B.expand(one.experts, -1, -1)
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def _projections(parameter: str, one: ExpertLoRA, form: str, host: Host) -> dict[str, _Pair]:
    """gate, up and down by the server's names."""
    gate, up, down = ("w1", "w3", "w2") if form == "vllm-shared" else host.projections
    if parameter == "down_proj":
        return {down: (one.A, one.B)}
    if parameter == "gate_up_proj":
        halves = (one.B[:, ::2], one.B[:, 1::2]) if host.interleaved else one.B.chunk(2, 1)
        return {gate: (one.A, halves[0]), up: (one.A, halves[1])}
    if form == "vllm-shared":
        raise ValueError(
            f"experts: expected gated experts (gate_up_proj) for {form!r}, got {parameter}; 'per-expert' and 'peft' take them"
        )
    return {up: (one.A, one.B)}


def _one_by_one(parts: Mapping[str, _Pair], experts: int) -> dict[str, _Pair]:
    spread = {key: (A.expand(experts, -1, -1), B.expand(experts, -1, -1)) for key, (A, B) in parts.items()}
    return {f"{c}.{key}": (A[c], B[c]) for c in range(experts) for key, (A, B) in spread.items()}
