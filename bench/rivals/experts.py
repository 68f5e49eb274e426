"""The experts of one mixture layer with each rival's adapters: transformers' module with one set of weights for all."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lotr_ext.ops.grouped import grouped_mm

from ..measure.bounds import DIRECTIONS
from ..measure.names import named
from ..measure.session import bytes_text, time_text

FLOOR, PEFT, GROUPED, OURS = "frozen", "lora-peft", "lora-grouped", "lotr_ext"
LABELS = {
    FLOOR: "frozen experts",
    PEFT: f"{named(PEFT)}, target_parameters",
    GROUPED: "LoRA by grouped products",
    OURS: named(OURS),
}
PARAMETERS = ("gate_up_proj", "down_proj")
HEADS = ("", *DIRECTIONS, "over frozen", "of PEFT's", "peak", "parameters")
# of two layers that a user would meet, Qwen3-30B-A3B's and Mixtral's, the GPU's; tokens x hidden x intermediate x e x top k x r
SHAPES = {"cpu": "2048x512x256x32x4x16,2048x1024x512x32x4x16", "cuda": "8192x2048x768x128x8x16,8192x4096x14336x8x2x16"}


class Mixture(nn.Module):
    """The experts alone, under the name that target_parameters know: x [m, hidden], index and weights [m, top_k] -> as x."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def frozen(hidden: int, intermediate: int, experts: int, dtype: torch.dtype, device: torch.device) -> Mixture:
    """Experts of Qwen3-MoE, with transformers' grouped products, or one product per expert where those do not run (float64)."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts)
    config._experts_implementation = "eager" if dtype == torch.float64 else "grouped_mm"
    with torch.device(device):
        module = Qwen3MoeExperts(config).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    return Mixture(module).requires_grad_(False)


class GroupedLoRA(nn.Module):
    """y = experts(x) with a LoRA per expert and matrix; both products are grouped like the base's. A is random, B given."""

    def __init__(self, experts: nn.Module, rank: int):
        super().__init__()
        self.experts = experts
        for name in PARAMETERS:
            e, n, k = getattr(experts, name).shape
            like = {"dtype": torch.float32 if experts.down_proj.dtype != torch.float64 else torch.float64}
            like["device"] = experts.down_proj.device
            self.register_parameter(f"{name}_A", nn.Parameter(torch.randn(e, rank, k, **like) * k**-0.5))
            self.register_parameter(f"{name}_B", nn.Parameter(torch.zeros(e, n, rank, **like)))

    def _linear(self, name: str, x: Tensor, offs: Tensor) -> Tensor:
        A, B = (getattr(self, f"{name}_{part}").to(x.dtype) for part in "AB")
        return grouped_mm(x, getattr(self.experts, name), offs) + grouped_mm(grouped_mm(x, A, offs), B, offs)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        (m, top_k), e = index.shape, self.experts.num_experts
        expert, order = torch.sort(index.reshape(-1))
        offs = torch.searchsorted(expert, torch.arange(1, e + 1, device=x.device), out_int32=True)
        y = self.experts._apply_gate(self._linear("gate_up_proj", x[order // top_k], offs))
        y = self._linear("down_proj", y, offs) * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        return y[back].view(m, top_k, -1).sum(1)


def shared_copy(first: Mixture) -> Mixture:
    """Another module with the same weights, not copies."""
    return Mixture(copy.deepcopy(first.experts, {id(p): p for p in first.experts.parameters()}))


def rivals(first: Mixture, rank: int) -> dict[str, nn.Module]:
    """All rivals at one rank, on first's weights; each package initialises its adapters."""
    import peft

    from lotr_ext import LoTRConfig, apply_lotr

    targets = [f"experts.{name}" for name in PARAMETERS]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=targets)
    return {
        FLOOR: first,
        PEFT: peft.get_peft_model(shared_copy(first), config),
        GROUPED: GroupedLoRA(shared_copy(first).experts, rank),
        OURS: apply_lotr(shared_copy(first), LoTRConfig(rank=rank, target_parameters=targets)),
    }


def row_of(result: dict, results: list[dict]) -> list[str]:
    """Label, times, excess over the frozen experts, excess over PEFT's excess, peak, parameters."""
    by = {r["rival"]: r for r in results}
    excess = result["step"]["excess"][1]
    of_peft = "" if result["rival"] in (FLOOR, PEFT) else f"{excess / by[PEFT]['step']['excess'][1]:.2f}"
    times = [time_text(result[direction]["seconds"][1]) for direction in DIRECTIONS]
    more = "" if result["rival"] == FLOOR else f"{excess:.1%}"
    return [LABELS[result["rival"]], *times, more, of_peft, bytes_text(result["peak_bytes"]), f"{result['parameters']:,}"]
