"""transformers' Trainer with AdapterCheckpoint, whose model others hold in parts: stopped and resumed. Run by test_deepspeed.py
and test_accelerate.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from gloo_checks import batch
from stacks import base
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from toys import randomize

from lotr_ext import LoTRConfig, apply_lotr, load_adapter, save_adapter
from lotr_ext.interop.trainer import FOLDER, AdapterCheckpoint
from nets import relative

STEPS, STOP = 4, 2


class WithLoss(nn.Module):
    """A stack as Trainer calls it: rows of x -> y and its loss."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        return {"loss": y.square().mean(), "y": y}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(0, 9))["y"]


def adapted() -> WithLoss:
    config = LoTRConfig(rank=4, target_modules=["q", "k", "v", "up"], modules_to_save=["head"])
    model = apply_lotr(WithLoss(base()), config)
    randomize(model)
    return model


def rows() -> list[dict[str, Tensor]]:
    """An epoch of STOP steps: Trainer resumes with a step more than asked for within an epoch."""
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(16, generator=generator)} for _ in range(6 * STOP * dist.get_world_size())]


def trainer(steps: int, folder: Path, **settings: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=STOP, per_device_train_batch_size=6, learning_rate=0.05,
        lr_scheduler_type="constant", use_cpu=True, max_grad_norm=0.0, report_to=[], disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    return transformers.Trainer(adapted(), arguments, train_dataset=rows(), callbacks=[AdapterCheckpoint()])


def saved(checkpoint: Path, trained: Tensor) -> float:
    """How far a checkpoint's adapter is from what was trained. Afterwards another adapter is in its place."""
    error = relative(output(load_adapter(WithLoss(base()), checkpoint / FOLDER)), trained.double())
    dist.barrier()
    if dist.get_rank() == 0:
        save_adapter(adapted(), checkpoint / FOLDER)
    dist.barrier()
    return error


def zero(rank: int, folder: Path) -> dict[int, dict[str, float]]:
    """By stage: how far what a checkpoint has, and what training resumes to, are from what they should be."""
    from zero_checks import joined, settings_of

    joined()
    found = {}
    for stage in (2, 3):
        at, settings = folder / f"stage {stage}", {"deepspeed": settings_of(stage)}
        unbroken, stopped = trainer(STEPS, folder / f"unbroken {stage}", **settings), trainer(STOP, at, **settings)
        unbroken.train()
        stopped.train()
        checkpoint, trained = at / f"checkpoint-{STOP}", output(stopped.model)
        on = trainer(STEPS, at, **settings)
        on.train(resume_from_checkpoint=str(checkpoint))
        entry = found[stage] = {"resumed": relative(output(on.model), output(unbroken.model).double())}
        entry["moved"], entry["saved"] = relative(output(adapted()), trained.double()), saved(checkpoint, trained)
        other = trainer(STOP, at, **settings)  # AdapterCheckpoint loads the other adapter, DeepSpeed what was trained
        other.train(resume_from_checkpoint=str(checkpoint))
        entry["loaded"] = relative(output(other.model), output(adapted()).double())
    return found


def fsdp1_trainer(folder: Path) -> transformers.Trainer:
    from accelerate_checks import choose_fsdp1

    found = trainer(STOP, folder)
    choose_fsdp1(found.accelerator, state_dict_type="SHARDED_STATE_DICT")
    found.is_fsdp_enabled = True
    return found


def fsdp1(rank: int, folder: Path) -> dict[str, Any]:
    """How far what a checkpoint has, and what training resumes with, are from what they should be."""
    stopped = fsdp1_trainer(folder)
    stopped.train()
    checkpoint, trained = folder / f"checkpoint-{STOP}", output(stopped.model)
    found = {"wrapped": isinstance(stopped.model, FullyShardedDataParallel)}
    found["moved"], found["saved"] = relative(output(adapted()), trained.double()), saved(checkpoint, trained)
    other = fsdp1_trainer(folder)
    other.train(resume_from_checkpoint=str(checkpoint))
    found["loaded"] = relative(output(other.model), output(adapted()).double())
    return found
