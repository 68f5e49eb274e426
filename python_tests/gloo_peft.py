"""As `gloo_parts`, for the adapters that PEFT puts into a transformers model: FSDP1 trains, saves and loads them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import torch.distributed as dist
import transformers
from peft.utils.other import fsdp_auto_wrap_policy
from peft_toys import plain, randomize
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lotr_ext.interop.peft import LoTRPeftConfig
from nets import relative

STEPS, RATE = 3, 0.1
CASES = (("peft", "dense"), ("block", "dense"), ("block", "tucker"), ("root", "dense"), ("root", "tucker"))


def base() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=37, **sizes, num_key_value_heads=2, num_labels=3, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config).double().eval()


def made(core: str) -> peft.PeftModel:
    """The same model in each process, with cores that matter."""
    names = ["q_proj", "v_proj", "up_proj"]
    config = LoTRPeftConfig(rank=4, target_modules=names, modules_to_save=["score"], core=core)
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), config)
    randomize(model)
    return model


def wrapped(model: nn.Module, by: str) -> FullyShardedDataParallel:
    """by: "root", one unit; "block", each block one; "peft", as Trainer wraps PEFT's models: the trained head is one too."""
    policies = {"root": None, "block": ModuleWrapPolicy({LlamaDecoderLayer}), "peft": fsdp_auto_wrap_policy(model)}
    policy = policies[by]
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)


def output(model: nn.Module, rank: int, step: int) -> Tensor:
    ids = torch.randint(3, 37, (3, 7), generator=torch.Generator().manual_seed(10 * step + rank))
    return model(input_ids=ids).logits


def train(model: nn.Module, ranks: tuple[int, ...]) -> list[float]:
    """The loss by step of SGD, of the halves of the batch that these ranks have."""
    optimizer, found = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE), []
    for i in range(STEPS):
        optimizer.zero_grad()
        value = sum(output(model, r, i).square().mean() for r in ranks) / len(ranks)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


def mean_of_both(values: list[float]) -> list[float]:
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return (sums / dist.get_world_size()).tolist()


def full_state(net: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))


def state_of_first(net: nn.Module) -> dict[str, Tensor]:
    """As accelerate's get_state_dict and Trainer gather it, for process 0 alone; but for offload_to_cpu, with which torch reads
    freed memory where the model is on the CPU already."""
    with FullyShardedDataParallel.state_dict_type(net, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=True)):
        return net.state_dict()


def outputs_of_saved(net: nn.Module, model: peft.PeftModel, folder: Path) -> dict[str, Tensor]:
    """By the way to save a wrapped model: what an adapter loaded in one process gives."""
    first, found = dist.get_rank() == 0, {}
    model.save_pretrained(folder / "full", state_dict=full_state(net), is_main_process=first)
    state = state_of_first(net)
    if first and not isinstance(model.base_model.model.score.modules_to_save["default"], FullyShardedDataParallel):
        model.save_pretrained(folder / "by the first", state_dict=state)
    with FullyShardedDataParallel.summon_full_params(net, writeback=False):
        model.save_pretrained(folder / "summoned", is_main_process=first)
    dist.barrier()
    for at in folder.iterdir():
        with torch.no_grad():
            found[at.name] = output(peft.PeftModel.from_pretrained(base(), at), 0, 9)
    return found


def refusals(model: peft.PeftModel, folder: Path) -> list[str]:
    """Messages where the model inside is saved as it is, in either format, and the files that are left."""
    found = []
    for safe in (True, False):
        try:
            model.save_pretrained(folder, safe_serialization=safe)
            found.append("nothing")
        except RuntimeError as refusal:
            found.append(str(refusal))
    return found + [path.name for path in folder.glob("adapter_model*")]


def fsdp1(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    """By wrapped units and form of core: losses, and how far what is trained and saved is from what one process trains."""
    found = {}
    for by, core in CASES:
        model, at = made(core), folder / f"{by} {core}"
        net, alone = wrapped(model, by), plain(made(core), ["default"])
        before = output(alone, 0, 9).detach()
        entry = found[f"{by}, {core}"] = {"losses": mean_of_both(train(net, (rank,))), "alone": train(alone, (0, 1))}
        want = output(alone, 0, 9).detach()
        with torch.no_grad():
            trained = output(net, 0, 9)
        entry["trained"], entry["moved"] = relative(trained, want), relative(before, want)
        entry["saved"] = {way: relative(y, trained) for way, y in outputs_of_saved(net, model, at).items()}
        entry["refused"] = refusals(model, folder / f"{by} {core} parts {rank}")
    return found
