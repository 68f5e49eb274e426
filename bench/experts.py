"""A mixture's experts: the time and memory that an adapter adds to the frozen ones, forward and backward.

    python -m bench.experts                   2,048 tokens; 32 experts of hidden 512 and 1,024; top 4, r = 16
    python -m bench.experts --shapes 4096x2048x768x128x8x16 --dtypes bf16 --device cuda

A shape is tokens x hidden x intermediate x experts x top k x rank. Rivals share the frozen weights of one experts module of
Qwen3-MoE, run by transformers' grouped products: PEFT's LoRA by target_parameters, a LoRA an expert by grouped products, and
lotr_ext, all at one rank. The routing is random and the same for all. The gradients of our adapter are compared with the same
module's in float64 first. peak: the most that a step has allocated at once.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .common import Case, Group, Program, check_error, error_of, peak_bytes, sizes, training
from .rivals import chosen, dtype_of, trained

NAMES = ("frozen", "lora-peft", "lora-grouped", "lotr_ext")
PARAMETERS = ("gate_up_proj", "down_proj")
KEY = ("m", "hidden", "inner", "experts", "top", "r")
# on a GPU the layers of Qwen3-30B-A3B and of Mixtral
SHAPES = {
    "cpu": "2048x512x256x32x4x16,2048x1024x512x32x4x16",
    "cuda": "8192x2048x768x128x8x16,8192x4096x14336x8x2x16",
}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 2e-2}  # of the adapter's gradients against float64


def cases(options: argparse.Namespace) -> list[Case]:
    found = options.shapes or sizes(*KEY)(SHAPES[options.device])
    if bad := [case for case in found if case["top"] > case["experts"]]:
        raise ValueError(
            f"shapes: expected a top k of at most the {bad[0]['experts']} experts, got {bad[0]['top']}"
        )
    return found


class Mixture(nn.Module):
    """The experts alone, under the name that target_parameters know: x [m, hidden], index and weights [m, top k] -> as x."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def frozen(case: Case, dtype: torch.dtype, device: str) -> Mixture:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = {
        "hidden_size": case["hidden"],
        "moe_intermediate_size": case["inner"],
        "num_experts": case["experts"],
    }
    config = Qwen3MoeConfig(**sizes)
    config._experts_implementation = (
        "grouped_mm"  # private: transformers sets it from an argument of whole models alone
    )
    with torch.device(device):
        module = Qwen3MoeExperts(config).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    return Mixture(module).requires_grad_(False)


class GroupedLoRA(nn.Module):
    """experts(x) with a LoRA per expert and matrix; its products are grouped like the base's."""

    def __init__(self, experts: nn.Module, rank: int):
        super().__init__()
        self.experts = experts
        for name in PARAMETERS:
            e, n, k = getattr(experts, name).shape
            like = {"dtype": torch.float32, "device": experts.down_proj.device}
            self.register_parameter(
                f"{name}_A", nn.Parameter(torch.randn(e, rank, k, **like) * k**-0.5)
            )
            self.register_parameter(f"{name}_B", nn.Parameter(torch.zeros(e, n, rank, **like)))

    def _linear(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        weight, A, B = (
            getattr(self.experts, name),
            *(getattr(self, f"{name}_{part}").to(x.dtype) for part in "AB"),
        )
        grouped_mm = nn.functional.grouped_mm
        y, u = grouped_mm(x, weight.mT, offs=ends), grouped_mm(x, A.mT, offs=ends)
        return y + grouped_mm(u, B.mT, offs=ends)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        (m, top), e = index.shape, self.experts.num_experts
        expert, order = torch.sort(index.reshape(-1))
        ends = torch.searchsorted(expert, torch.arange(1, e + 1, device=x.device), out_int32=True)
        gate, up = self._linear("gate_up_proj", x[order // top], ends).chunk(2, -1)
        y = self._linear("down_proj", self.experts.act_fn(gate) * up, ends) * weights.reshape(-1)[
            order
        ].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        return y[back].view(m, top, -1).sum(1)


def adapted(name: str, first: Mixture, rank: int) -> nn.Module:
    """One rival on first's weights; each package initialises its adapter."""
    if name == "frozen":
        return first
    mixture = Mixture(copy.deepcopy(first.experts, {id(p): p for p in first.experts.parameters()}))
    targets = [f"experts.{parameter}" for parameter in PARAMETERS]
    if name == "lora-grouped":
        return GroupedLoRA(mixture.experts, rank)
    if name == "lora-peft":
        import peft

        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=[], target_parameters=targets
        )
        return peft.get_peft_model(mixture, config)
    from lotr_ext import LoTRConfig, apply_lotr

    return apply_lotr(mixture, LoTRConfig(rank=rank, target_parameters=targets))


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Random values for parameters that start at zero, so that no gradient vanishes."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(0, 0.5 if "core" in name else 0.02)


def gradient_error(model: nn.Module, x: Tensor, g: Tensor, routing: tuple[Tensor, Tensor]) -> float:
    """The largest error of the adapter's gradients against the same module's in float64, on 64 tokens."""
    wide = copy.deepcopy(model).double()
    found = []
    for one, dtype in ((model, x.dtype), (wide, torch.float64)):
        index, weights = (part[:64] for part in routing)
        one(x[:64].detach().to(dtype), index, weights.to(dtype)).backward(g[:64].to(dtype))
        found.append([p.grad for p in trained(one)])
        for parameter in trained(one):
            parameter.grad = None
    return max(error_of(*pair) for pair in zip(*found, strict=True))


def build(case: Case, options: argparse.Namespace) -> Group:
    m, dtype, device = case["m"], dtype_of(case), options.device
    torch.manual_seed(0)
    first = frozen(case, dtype, device)
    x, g = (torch.randn(m, case["hidden"], device=device).to(dtype) for _ in range(2))
    x.requires_grad_()
    scores, index = torch.rand(m, case["experts"]).topk(case["top"])
    routing = index.to(device), (scores / scores.sum(1, keepdim=True)).to(device, dtype)
    steps = {}
    for name in chosen(options.rivals, NAMES, NAMES):
        model = adapted(name, first, case["r"])
        with torch.no_grad():  # an adapter starts as no change
            error = error_of(model(x, *routing), first(x, *routing))
        check_error(f"{name} before training", error, TOLERANCE[case["dtype"]])
        randomize(model)
        parameters = trained(model)
        facts: dict[str, Any] = {"parameters": sum(p.numel() for p in parameters)}
        if name == "lotr_ext":
            facts["error"] = check_error(
                "gradients", gradient_error(model, x, g, routing), TOLERANCE[case["dtype"]]
            )
        steps[name] = training(
            lambda model=model: model(x, *routing), g, (x, *parameters), facts=facts
        )
        steps[name].run()
        facts["peak_bytes"] = peak_bytes(steps[name].run, device)
    return Group(steps)


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", type=sizes(*KEY), help="MxHxIxExTxR, comma-separated")


FORM = "{m} tokens, {experts} experts of hidden {hidden} and intermediate {inner}, top {top}, r {r}"
PROGRAM = Program("experts", __doc__, cases, build, FORM, slice_s=0.0, options=more_options)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
