"""DeepSpeed's ZeRO in each stage, on the CPU: trained, saved, loaded again and gone on with, against plain SGD in one process.
Run by test_deepspeed.py in one and in two processes."""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import peft
import pytest
import torch
import torch.distributed as dist
from gloo_checks import batch, loss, output, refusal
from stacks import base, make, trained_grads
from torch import nn
from toys import plain, randomize

import lotr_ext.interop.peft as lotr_peft
from lotr_ext import LoTRConfig, apply_lotr, load_adapter, merge, save_adapter
from lotr_ext.model import adapter_files
from lotr_ext.model.saving import contents
from nets import relative

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # an extension for speed, which takes minutes to compile

STEPS, RATE = 3, 0.05
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tucker": {"core": "tucker"},
    "few": {"core": "few"},
    "a factor a width": {"group_by": "width"},
}


def joined() -> int:
    """The number of processes; one that was started alone gets a group of its own."""
    if not dist.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_world_size()


def settings_of(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 6,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # even small tensors in parts
        "gradient_clipping": 0.0,  # 1.0 by default
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def engine_of(model: nn.Module, stage: int, kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> Any:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings_of(stage))[0]


def train(engine: Any, rank: int, first: int, count: int) -> list[float]:
    """The mean loss over all processes' batches by step."""
    found = []
    for i in range(first, first + count):
        value = loss(engine, batch(rank, i))
        engine.backward(value)
        engine.step()
        value = value.detach().clone()
        dist.all_reduce(value)
        found.append(value.item() / dist.get_world_size())
    return found


def train_alone(model: nn.Module, world: int, count: int) -> list[float]:
    """The same by the definition in plain torch and float64, with SGD written out. model: in float64; it is changed."""
    found = []
    for i in range(count):
        net = plain(copy.deepcopy(model))
        mean = sum(net(batch(rank, i).double()).square().mean() for rank in range(world)) / world
        mean.backward()
        found.append(mean.item())
        gradients = trained_grads(net)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.sub_(RATE * gradients[name])
    return found


def stages(rank: int, folder: Path) -> dict[str, dict]:
    """By stage and form of core, as gloo_parts.around."""
    world, found = joined(), {}
    every = ((3, SETTINGS), (2, ("dense", "few")), (1, ("tucker",)), (0, ("dense",)))
    fewer = ((3, ("dense", "tucker", "a factor a width")), (2, ("few",)))  # `through_peft` has stages 1 and 0
    for stage, forms in every if world == 1 else fewer:  # for time: one process does all
        for form in forms:
            settings, name = SETTINGS[form], f"{stage}, {form}"
            engine, alone = engine_of(make(**settings), stage), make(**settings).double()
            entry = found[name] = {"losses": train(engine, rank, 0, STEPS), "alone": train_alone(alone, world, STEPS)}
            save_adapter(engine, folder / name)
            dist.barrier()  # with whole tensors process 0 writes, and no other waits for it
            trained = output(engine)
            entry["trained"] = relative(trained, alone(batch(0, 9).double()).detach())
            entry["saved"] = relative(output(load_adapter(base(), folder / name)), trained.double())
            other = engine_of(make(**settings), stage)
            train(other, rank, STEPS, 1)
            entry["other"] = relative(output(other), trained.double())
            load_adapter(other, folder / name)
            entry["loaded"] = relative(output(other), trained.double())
            # a step takes the values that were loaded, and not the optimizer's copies of others
            entry["goes on"] = [train(net, rank, STEPS, 2) for net in (engine, other)]
            save_adapter(other.module, again := folder / f"{name}, again {rank if stage < 3 else 0}")
            tensors = adapter_files.read(again)[1]
            entry["whole"] = all(t.numel() for t in tensors.values())
    return found


def by_peft(core: str = "dense") -> nn.Module:
    config = lotr_peft.LoTRPeftConfig(rank=4, target_modules=["q", "k", "v", "up"], modules_to_save=["head"], core=core)
    model = peft.get_peft_model(base(), config)
    randomize(model)
    return model


def through_peft(rank: int, folder: Path) -> dict[str, dict]:
    """LoTRPeftConfig by stage and form of core, against SGD in one process; saved, loaded into one process, and continued."""
    world, found = joined(), {}
    for stage, core in ((3, "dense"), (3, "tucker"), (2, "dense"), (1, "dense"), (0, "tucker")):
        name = f"{stage}, {core}"
        model, alone = by_peft(core), by_peft(core)
        engine = engine_of(model, stage)
        entry = found[name] = {"losses": train(engine, rank, 0, STEPS), "alone": []}
        optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=RATE)
        for i in range(STEPS):
            optimizer.zero_grad()
            mean = sum(loss(alone, batch(r, i)) for r in range(world)) / world
            mean.backward()
            optimizer.step()
            entry["alone"].append(mean.item())
        at, trained, parts = folder / f"peft {name}", output(engine), folder / f"parts {name} {rank}"
        # as Trainer does, and accelerate's get_state_dict; in process 0
        state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else None
        if rank == 0:
            model.save_pretrained(at, state_dict=state)
        dist.barrier()
        loaded = peft.PeftModel.from_pretrained(base(), at, is_trainable=True)
        entry["saved"] = relative(output(loaded), trained.double())
        entry["goes on"] = [train(net, rank, STEPS, 2) for net in (engine, engine_of(loaded, stage))]
        if stage == 3:
            with pytest.raises(RuntimeError, match="save_pretrained: expected whole tensors, got"):
                model.save_pretrained(parts)
        entry["left"] = [path.name for path in parts.glob("*.safetensors")]
    return found


def resumes(rank: int, folder: Path) -> dict[str, dict]:
    """DeepSpeed's own checkpoint, with the moments of the optimizer, by stage and method: the losses of a run that goes
    on, and of a new engine that goes on from the checkpoint."""
    world, found = joined(), {}
    for stage in range(4):
        for name, made in (("apply_lotr", make), ("peft", by_peft)):
            if world > 1 and stage < 3 and (stage % 2 == 1) == (name == "apply_lotr"):
                continue  # for time: one process does all
            at = folder / f"checkpoint {stage} {name}"
            engine = engine_of(made(), stage, torch.optim.AdamW)
            train(engine, rank, 0, STEPS)
            engine.save_checkpoint(str(at), exclude_frozen_parameters=True)
            other = engine_of(made(), stage, torch.optim.AdamW)
            train(other, rank, STEPS, 1)
            other.load_checkpoint(str(at), load_module_strict=False)
            losses = [train(net, rank, STEPS, 2) for net in (engine, other)]
            found[f"{stage} {name}"] = {"goes on": losses, "resumed": relative(output(other), output(engine).double())}
    return found


def refusals(rank: int, folder: Path) -> dict[str, str]:
    """Messages of what cannot be done with ZeRO-3."""
    joined()
    engine, found = engine_of(make(), 3), {}
    attempts = {"merge": lambda: merge(engine.module), "state_dict": lambda: write_parts(engine, folder / "parts")}
    found |= {name: refusal(attempt) for name, attempt in attempts.items()}
    found["left"] = sorted(path.name for path in folder.glob("parts/*"))
    return found


def partitioned_first(rank: int, folder: Path) -> dict[str, Any]:
    """A base that ZeRO-3 holds in parts from the beginning, as transformers loads one under a DeepSpeed configuration."""
    world = joined()
    with deepspeed.zero.Init(config_dict_or_path=settings_of(3)):
        parts = base()
    assert not parts.blocks[0].q.weight.numel()
    config = LoTRConfig(rank=4, target_modules=["q", "k", "v", "up"], modules_to_save=["head"])
    with pytest.raises(ValueError, match='expected whole weights for "svd"'):
        apply_lotr(parts, replace(config, init="svd"))
    model = apply_lotr(parts, config)
    randomize(model)
    engine, alone = engine_of(model, 3), make().double()
    losses = train(engine, rank, 0, STEPS)
    save_adapter(engine, folder / "partitioned first")
    loaded = relative(output(load_adapter(base(), folder / "partitioned first")), output(engine).double())
    return {"losses": losses, "alone": train_alone(alone, world, STEPS), "loaded": loaded}


def write_parts(engine: Any, directory: Path) -> None:
    """What each version before wrote: the tensors as they are."""
    adapter_files.write(directory, *contents(engine.module))
