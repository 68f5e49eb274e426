"""The experts of a mixture: the time and memory that an adapter adds to the frozen ones.

    python -m bench.experts                   2,048 tokens, 32 experts of hidden 512 and 1,024
    python -m bench.experts --shapes 4096x2048x768x128x8x16 --dtypes bf16 --device cuda

A shape is tokens x hidden x intermediate x experts x top k x rank. A step is forward and backward.
The rivals are PEFT's LoRA by target_parameters, a LoRA per expert by grouped products, and
lotr_ext, all at one rank. They share random routing, and the frozen weights of one experts module
of Qwen3-MoE, which runs transformers' grouped products. The gradients of our adapter are compared
with the same module's in float64 first. peak: the most that a step has allocated at once.
"""

import argparse
import copy
import sys

import torch
from torch import Tensor, nn

from lotr_ext import LoTRConfig, apply_lotr

from .common import Case, check_error, dtype_of, error_of
from .model import trained, twin
from .program import Program
from .timing import Group, Step, training

RIVALS = ("frozen", "lora-peft", "lora-grouped", "lotr_ext")
PARAMETERS = ("gate_up_proj", "down_proj")
DIMENSIONS = ("m", "hidden", "inner", "experts", "top", "r")
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 2e-2}  # of the adapter's gradients against float64
CHECKED_TOKENS = 64


class Mixture(nn.Module):
    """Only the experts of a model, as `experts`: target_parameters begin with this name.

    x [m, hidden], index and weights [m, top k] -> [m, hidden].
    """

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def frozen_mixture(case: Case, dtype: torch.dtype, device: str) -> Mixture:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=case["hidden"],
        moe_intermediate_size=case["inner"],
        num_experts=case["experts"],
    )
    # A private name: transformers sets it only from an argument of full models.
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        experts = Qwen3MoeExperts(config).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    return Mixture(experts).requires_grad_(False)


class GroupedLoRA(nn.Module):
    """experts(x) with a LoRA per expert and matrix. Its products are grouped like the base's."""

    def __init__(self, experts: nn.Module, rank: int):
        super().__init__()
        self.experts = experts
        device = experts.down_proj.device
        for name in PARAMETERS:
            count, n, k = getattr(experts, name).shape
            A = torch.randn(count, rank, k, device=device) * k**-0.5
            B = torch.zeros(count, n, rank, device=device)
            self.register_parameter(f"{name}_A", nn.Parameter(A))
            self.register_parameter(f"{name}_B", nn.Parameter(B))

    def _linear(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        weight = getattr(self.experts, name)
        A = getattr(self, f"{name}_A").to(x.dtype)
        B = getattr(self, f"{name}_B").to(x.dtype)
        y = nn.functional.grouped_mm(x, weight.mT, offs=ends)
        u = nn.functional.grouped_mm(x, A.mT, offs=ends)
        return y + nn.functional.grouped_mm(u, B.mT, offs=ends)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        m, top = index.shape
        # The rows are sorted by expert: a grouped product takes rows ends[e - 1] to ends[e] for
        # expert e. The next expert begins at ends[e].
        next_expert = torch.arange(1, self.experts.num_experts + 1, device=x.device)
        expert_of_row, order = torch.sort(index.reshape(-1))
        ends = torch.searchsorted(expert_of_row, next_expert, out_int32=True)
        gate, up = self._linear("gate_up_proj", x[order // top], ends).chunk(2, -1)
        y = self._linear("down_proj", self.experts.act_fn(gate) * up, ends)
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        # The inverse of the sort: where each row of `index` is in y.
        position = torch.empty_like(order)
        position[order] = torch.arange(order.shape[0], device=order.device)
        return y[position].view(m, top, -1).sum(1)


def adapted(name: str, base: Mixture, rank: int) -> nn.Module:
    """Returns a rival on the weights of base. Each package initializes its adapter."""
    if name == "frozen":
        return base
    mixture = twin(base)
    targets = [f"experts.{parameter}" for parameter in PARAMETERS]
    if name == "lora-grouped":
        return GroupedLoRA(mixture.experts, rank)
    if name == "lora-peft":
        import peft

        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=[], target_parameters=targets
        )
        return peft.get_peft_model(mixture, config)
    return apply_lotr(mixture, LoTRConfig(rank=rank, target_parameters=targets))


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Sets parameters that start at zero to random values, so that no gradient vanishes."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(0, 0.5 if "core" in name else 0.02)


def gradient_error(model: nn.Module, x: Tensor, g: Tensor, routing: tuple[Tensor, Tensor]) -> float:
    """Returns the largest error of the adapter's gradients against the same module's in float64."""
    index, weights = (tensor[:CHECKED_TOKENS] for tensor in routing)
    gradients = []
    for module, dtype in ((model, x.dtype), (copy.deepcopy(model).double(), torch.float64)):
        y = module(x[:CHECKED_TOKENS].detach().to(dtype), index, weights.to(dtype))
        gradients.append(torch.autograd.grad(y, trained(module), g[:CHECKED_TOKENS].to(dtype)))
    return max(error_of(*pair) for pair in zip(*gradients, strict=True))


def build(case: Case, options: argparse.Namespace) -> Group:
    if case["top"] > case["experts"]:
        raise ValueError(
            f"shapes: expected a top k of at most the {case['experts']} experts, got {case['top']}"
        )
    dtype = dtype_of(case)
    device = options.device
    limit = TOLERANCE[case["dtype"]]
    torch.manual_seed(0)
    base = frozen_mixture(case, dtype, device)
    x = torch.randn(case["m"], case["hidden"], device=device).to(dtype).requires_grad_()
    g = torch.randn(case["m"], case["hidden"], device=device).to(dtype)
    scores, index = torch.rand(case["m"], case["experts"]).topk(case["top"])
    weights = scores / scores.sum(1, keepdim=True)
    routing = index.to(device), weights.to(device, dtype)

    def step_of(name: str) -> Step:
        model = adapted(name, base, case["r"])
        with torch.no_grad():  # before training, an adapter changes nothing
            error = error_of(model(x, *routing), base(x, *routing))
        check_error(f"{name} before training", error, limit)
        randomize(model)
        parameters = trained(model)
        facts: dict[str, float] = {"parameters": sum(p.numel() for p in parameters)}
        if name == "lotr_ext":
            error = gradient_error(model, x, g, routing)
            facts["error"] = check_error("gradients", error, limit)
        return training(lambda: model(x, *routing), g, (x, *parameters), facts=facts)

    return Group(options.rivals or RIVALS, step_of)


PROGRAM = Program(
    name="experts",
    doc=__doc__,
    rivals=RIVALS,
    build=build,
    title_format=(
        "{m} tokens, {experts} experts of hidden {hidden} and intermediate {inner}, "
        "top {top}, r {r}"
    ),
    dimensions=DIMENSIONS,
    shapes={
        "cpu": "2048x512x256x32x4x16,2048x1024x512x32x4x16",
        # The layers of Qwen3-30B-A3B, then of Mixtral.
        "cuda": "8192x2048x768x128x8x16,8192x4096x14336x8x2x16",
    },
    measurement_s=0.0,
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
