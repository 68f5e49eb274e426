"""As `gloo_checks`, for transformers' expert parallelism: each process has its own experts and their cores."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from gloo_checks import refusal, whole
from mixtures import IDS, adapted, logits, loss, mixture
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from transformers.distributed import DistributedConfig

from lotr_ext import TaskBank, add_adapter, load_adapter, merge, mixed, per_example, save_adapter, unload, unmerge
from lotr_ext.interop import export_lora
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
    """The checkpoint, its experts in parts. attention: whether transformers' own plan cuts that, too. how: as transformers'
    ep_implementation, or "tensor" for a part of each expert."""
    size = dist.get_world_size()
    plan = None if attention or name == "GptOss" else WHOLE  # which has no plan for attention
    config = DistributedConfig(tp_size=size, tp_plan=plan)
    if how != "tensor":
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
    found = {"GptOss": differences(*pair(folder, "GptOss", **ATTENTION))}
    alone, cut = pair(folder, "Mixtral")
    experts = cut.model.layers[0].mlp.experts
    core, held = experts.lotr.down_proj.core, len(experts._parameters["down_proj"].to_local())
    sizes = [tuple(core.shape), tuple(core.to_local().shape), held]
    return found | {"Mixtral, experts alone": differences(alone, cut), "sizes": sizes}


def both(rank: int, folder: Path) -> dict:
    """Attention in parts by transformers' tensor parallelism, the experts by experts."""
    own = folder / "both"
    settings = {"attention": True, "sizes": {"num_key_value_heads": 4}, **ATTENTION}  # no fewer heads than processes
    names = ("Mixtral", "Qwen3Moe", "Olmoe")[: dist.get_world_size()]
    found = {name: differences(*pair(own, name, **settings)) for name in names}
    _, cut = pair(own, "Qwen3Moe", **settings)
    for parameter in trained(cut).values():
        parameter.detach().zero_()
    counts = [sent(model)[0] for model in (parted(own, "Qwen3Moe", attention=True).requires_grad_(False), cut)]
    return {"models": found, "counts": counts} | _files(rank, own, "Qwen3Moe", settings)


def tensors(rank: int, folder: Path) -> dict:
    """Each process has a part of each expert: of gate, up and down."""
    found = {"Mixtral": differences(*pair(folder, "Mixtral", how="tensor", **ATTENTION))}
    return {"models": found} | _files(rank, folder, "Mixtral", {"how": "tensor"})


def routes(rank: int, folder: Path) -> dict:
    """Either way in which transformers brings tokens to their experts, masked and exchanged. The router's bias sends no token
    to some experts, or to any expert of the last processes."""
    found = {}
    biases = {"one without tokens": [0.0, 9.0, 9.0, -99.0], "processes without tokens": [50.0, 50.0, 0.0, 0.0]}
    for how in ("all_reduce", "all_to_all"):
        for name, bias in biases.items():
            alone, cut = pair(folder, "GptOss", how=how, **ATTENTION)
            for model in (alone, cut):
                for layer in model.model.layers:
                    layer.mlp.router.bias.data.copy_(torch.tensor(bias))
            found[f"{name}, {how}"] = gradients(alone, cut)
            idle = whole(cut.model.layers[0].mlp.experts.lotr.gate_up_proj.core.grad)
    return found | {"idle": [bool(g.any()) for g in idle]}


def checkpoints(rank: int, folder: Path) -> dict:
    found, (alone, cut) = {}, pair(folder, "GptOss", **ATTENTION)
    for reentrant in (False, True):  # the second onto the gradients of the first
        for model in (alone, cut):
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        found[f"reentrant {reentrant}"] = gradients(alone, cut)
    return found


def sent(model: nn.Module) -> tuple[dict[str, int], int]:
    """Of one step: the collectives that gloo ran, by name, and how many numbers the exchanges of tokens sent."""
    model.enable_input_require_grads()  # the frozen base has a backward, too
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        loss(model).backward()
    events = profiled.profiler.kineto_results.events()
    counts = Counter(event.name() for event in events if event.name().startswith("gloo:"))
    shapes = [event.shapes()[1] for event in events if event.name() == "c10d::alltoall_base_"]
    return dict(counts), sum(math.prod(shape) for shape in shapes)


def sums(rank: int, folder: Path) -> dict:
    """Of the base alone and adapted, at 1 and at 3 layers."""
    found = {}
    for layers in (1, 3):
        own = folder / str(layers)
        _, cut = pair(own, "GptOss", sizes={"num_hidden_layers": layers}, **ATTENTION)
        for parameter in trained(cut).values():
            parameter.detach().zero_()  # or the router would take other experts than the base's
        found[f"base {layers}"], found[f"adapted {layers}"] = sent(parted(own, "GptOss").requires_grad_(False)), sent(cut)
    return found


def tasks(rank: int, folder: Path) -> dict:
    """A bank of tasks over experts in parts, each row of the batch and each token of its own task, masked and exchanged."""
    found, row, gen = {}, torch.tensor([1, -1, 0]), torch.Generator().manual_seed(3)
    token = torch.randint(-1, 2, IDS.shape, generator=gen)
    for how in ("auto", "tensor"):
        name = "Mixtral" if how == "tensor" else "GptOss"
        alone, cut = pair(folder, name, how=how, **ATTENTION)
        banks = [TaskBank(model, 3) for model in (alone, cut)]
        shapes = {n: core.shape[1:] for n, core in zip(banks[0]._layers, banks[0].cores)}
        for _ in range(2):
            one = {f"{n}.core": torch.randn(shape, generator=gen, dtype=torch.float64) for n, shape in shapes.items()}
            for bank in banks:
                bank.add(one)
        for what, index in {"rows": row, "tokens": token}.items():
            for model in (alone, cut):
                model.lotr_tasks.requires_grad_().zero_grad()
                with mixed(model, index):
                    found[f"{how} {what} {model is cut}"] = logits(model)
                    loss(model).backward()
            apart, here = found.pop(f"{how} {what} True"), found.pop(f"{how} {what} False")
            found[f"{how} {what}"] = relative(apart, here)
            grads = [relative(whole(a.grad), b.grad) for a, b in zip(banks[1].cores, banks[0].cores)]
            found[f"{how} {what}, gradients"] = max(grads)
        combined = [bank.combine({0: 0.5, 1: 2.0}) for bank in banks]
        banks[1].save(combined[1], folder / f"{how}.safetensors")
        banks[0].replace(0, folder / f"{how}.safetensors")
        banks[1].replace(0, banks[1].cores_of(combined[1]))
        same = zip(banks[0].cores_of(0).values(), banks[1].cores_of(0).values())
        found[f"{how} moved"] = max(relative(whole(b), a) for a, b in same)
    return found


def files(rank: int, folder: Path) -> dict:
    """Saved, loaded by one process and into models in parts, merged and unmerged, and taken off."""
    return _files(rank, folder, "GptOss", {"how": "all_to_all", **ATTENTION})  # transformers' eager needs it without an adapter


def _files(rank: int, folder: Path, name: str, settings: dict) -> dict:
    alone, cut = pair(folder, name, **settings)
    saved, of_one, want = folder / f"{name}-adapter", folder / f"{name}-of-one-{rank}", logits(alone)

    def error(model: nn.Module) -> float:
        return relative(logits(model), want)

    save_adapter(cut, saved)
    save_adapter(alone, of_one)
    sizes, attention = settings.get("sizes", {}), settings.get("attention", False)
    found = {
        "in one": error(load_adapter(base(folder, name, **sizes), saved)),
        "in parts": error(load_adapter(fill(pair(folder, name, **settings)[1], 9), of_one)),
        "onto parts": error(load_adapter(parted(folder, name, attention=attention), saved)),
    }
    for form in ("peft", "vllm-shared"):
        exported = [folder / f"{name}-{form}-{model}" for model in ("cut", rank)]
        for model, to in zip((cut, alone), exported):
            export_lora(model, to, experts=form, base_model="base")
        one, other = ((to / "adapter_model.safetensors").read_bytes() for to in exported)
        found[form] = one == other
    weights = {n: p for n, p in cut.named_parameters() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    before = {n: p.to_local().clone() for n, p in weights.items()}
    merge(cut)
    found["merged"] = error(cut)
    at, layer = "model.layers.1.mlp.experts.gate_up_proj", alone.model.layers[1].mlp.experts.lotr.gate_up_proj
    delta = layer.delta_weight().mT if layer.transposed else layer.delta_weight()
    found["weight"] = relative(whole(cut.get_parameter(at).detach()), alone.get_parameter(at) + delta)
    unmerge(cut)
    found["bits"] = all(torch.equal(p.to_local(), before[n]) for n, p in weights.items()) and len(before) == 4
    return found | {"unmerged": error(cut), "taken off": error(unload(cut, merge=True))}


def refusals(rank: int, folder: Path) -> dict:
    """Each raises in all processes; the last is called by one alone, whose partners end."""
    uneven = mixture("Qwen3Moe", torch.float64)  # of 5 experts
    uneven.save_pretrained(folder / "uneven")  # process 0 alone writes
    dist.barrier()
    size = dist.get_world_size()
    config = DistributedConfig(tp_size=size, ep_size=size, tp_plan=WHOLE)
    found = {"uneven": refusal(lambda: type(uneven).from_pretrained(folder / "uneven", distributed_config=config))}
    _, cut = pair(folder, "Mixtral")
    eight = adapted("Mixtral", torch.float64, model=mixture("Mixtral", torch.float64, num_local_experts=8))
    save_adapter(eight, folder / f"8-{rank}")
    before = [whole(p.detach()).clone() for p in trained(cut).values()]
    found["others, in parts"] = refusal(lambda: load_adapter(cut, folder / f"8-{rank}"))
    found["unchanged"] = all(torch.equal(whole(p.detach()), old) for p, old in zip(trained(cut).values(), before))
    found["others, onto parts"] = refusal(lambda: load_adapter(parted(folder, "Mixtral"), folder / f"8-{rank}"))
    found["named"] = refusal(lambda: add_adapter(cut, "other", share_factors="default"))
    with per_example(cut, batch=len(IDS)):
        found["per_example"] = refusal(lambda: loss(cut))
    found["optimizer"] = refusal(lambda: TaskBank(cut, 1).optimizer(torch.optim.AdamW))
    strange = parted(folder, "Mixtral")
    experts = strange.model.layers[0].mlp.experts
    grid = init_device_mesh("cpu", (1, size))
    twice = distribute_tensor(experts.down_proj.detach().full_tensor(), grid, [Shard(0), Shard(1)])
    experts.down_proj = nn.Parameter(twice)
    found["cut twice"] = refusal(lambda: adapted("Mixtral", torch.float64, model=strange))
    found["alone"] = refusal(lambda: save_adapter(cut, folder / "alone")) if rank == 0 else ""
    return found
