"""As `gloo_checks`, for transformers' expert parallelism: each process has its own experts and their cores."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from gloo_checks import refusal, whole
from mixtures import adapted, logits, loss, mixture
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from transformers.distributed import DistributedConfig

from lotr_ext import load_adapter, merge, save_adapter, unload, unmerge
from nets import relative

FOUR = {"num_experts": 4}
MODELS = {"Mixtral": {}, "Qwen3Moe": FOUR, "Olmoe": FOUR, "GptOss": {}}
WHOLE = {f"model.layers.*.self_attn.{part}_proj": "replicate" for part in "qkvo"}  # a plan without attention
ATTENTION = {"target_modules": ["q_proj", "k_proj", "o_proj"]}


def base(folder: Path, name: str, **settings) -> nn.Module:
    """A checkpoint's model, in one process, in float64. Every process has the same."""
    model = mixture(name, torch.float64, **MODELS[name], **settings)
    if not (folder / name).exists() and dist.get_rank() == 0:
        model.save_pretrained(folder / name)
    dist.barrier()
    return model


def parted(folder: Path, name: str, *, attention: bool = False, how: str = "auto") -> nn.Module:
    """The checkpoint, its experts in parts. attention: whether transformers' own plan cuts that, too."""
    size = dist.get_world_size()
    plan = None if attention or name == "GptOss" else WHOLE  # which has no plan for attention
    config = DistributedConfig(tp_size=size, ep_size=size, tp_plan=plan, ep_implementation=how)
    kind = type(mixture(name, **MODELS[name]))
    model = kind.from_pretrained(folder / name, distributed_config=config, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def fill(model: nn.Module, seed: int = 7) -> nn.Module:
    """Gives each core the same values in all processes, whether it is whole or not."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".core"):
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)
    return model


def pair(folder: Path, name: str, *, attention: bool = False, how: str = "auto", sizes: dict | None = None, **settings):
    """(adapted in one process, adapted in parts). The factors of the second begin with other values in each process."""
    bases = base(folder, name, **(sizes or {})), parted(folder, name, attention=attention, how=how)
    found = []
    for model, seed in zip(bases, (0, 100 * dist.get_rank())):
        torch.manual_seed(seed)
        found.append(fill(adapted(name, torch.float64, model=model, random=False, **settings)))
    return tuple(found)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(alone: nn.Module, cut: nn.Module) -> float:
    """The largest relative difference of the gradients of one more backward."""
    for model in (alone, cut):
        loss(model).backward()
    want, got = trained(alone), trained(cut)
    assert want.keys() == got.keys()
    return max(relative(whole(p.grad), want[name].grad) for name, p in got.items())


def differences(alone: nn.Module, cut: nn.Module, steps: int = 3) -> dict[str, float]:
    """Of logits, of gradients, and of what some steps of AdamW make of the adapter."""
    found = {"logits": relative(logits(cut), logits(alone)), "gradients": gradients(alone, cut)}
    optimizers = [torch.optim.AdamW(trained(model).values(), lr=1e-2) for model in (alone, cut)]
    for step in range(steps):
        for model, optimizer in zip((alone, cut), optimizers):
            if step:
                optimizer.zero_grad()
                loss(model).backward()
            optimizer.step()
    want = trained(alone)
    return found | {"trained": max(relative(whole(p.detach()), want[name]) for name, p in trained(cut).items())}


def models(rank: int, folder: Path) -> dict:
    found = {name: differences(*pair(folder, name, **ATTENTION)) for name in MODELS}
    alone, cut = pair(folder, "Mixtral")
    experts = cut.model.layers[0].mlp.experts
    core, held = experts.lotr.down_proj.core, len(experts._parameters["down_proj"].to_local())
    sizes = [tuple(core.shape), tuple(core.to_local().shape), held]
    return found | {"experts alone": differences(alone, cut, steps=1), "sizes": sizes}
