"""transformers' Trainer with AdapterCheckpoint under DeepSpeed's ZeRO: stopped and resumed, against what was never stopped. Run
by test_deepspeed.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from stacks import base
from torch import Tensor, nn
from toys import randomize
from zero_checks import joined, output, settings_of

from lotr_ext import LoTRConfig, apply_lotr, load_adapter, save_adapter
from lotr_ext.model.trainer import FOLDER, AdapterCheckpoint
from nets import relative

STEPS, STOP = 4, 2


class WithLoss(nn.Module):
    """A stack as Trainer calls it: rows of x -> their loss."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(x).square().mean()}


def adapted() -> WithLoss:
    config = LoTRConfig(rank=4, target_modules=["q", "k", "v", "up"], modules_to_save=["head"])
    model = apply_lotr(WithLoss(base()), config)
    randomize(model)
    return model


def rows() -> list[dict[str, Tensor]]:
    """An epoch of STOP steps: Trainer resumes with a step more than asked for within an epoch."""
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(16, generator=generator)} for _ in range(6 * STOP * dist.get_world_size())]


def trainer(stage: int, steps: int, folder: Path) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=STOP, per_device_train_batch_size=6, learning_rate=0.05,
        lr_scheduler_type="constant", deepspeed=settings_of(stage), use_cpu=True, max_grad_norm=0.0,
        report_to=[], disable_tqdm=True, seed=0,
    )  # fmt: skip
    return transformers.Trainer(adapted(), arguments, train_dataset=rows(), callbacks=[AdapterCheckpoint()])


def resumed(rank: int, folder: Path) -> dict[int, dict[str, float]]:
    """By stage: how far what a checkpoint has, and what training resumes to, are from what they should be."""
    joined()
    found = {}
    for stage in (2, 3):
        unbroken, stopped = (trainer(stage, steps, folder / f"{stage}, {steps} steps") for steps in (STEPS, STOP))
        unbroken.train()
        stopped.train()
        checkpoint = folder / f"{stage}, {STOP} steps" / f"checkpoint-{STOP}"
        trained = output(stopped.model.net).double()
        entry = found[stage] = {"moved": relative(output(adapted().net), trained)}
        entry["saved"] = relative(output(load_adapter(WithLoss(base()), checkpoint / FOLDER).net), trained)
        on = trainer(stage, STEPS, folder / f"{stage}, {STOP} steps")
        on.train(resume_from_checkpoint=str(checkpoint))
        entry["resumed"] = relative(output(on.model.net), output(unbroken.model.net).double())
        # another adapter in the checkpoint: what is resumed is AdapterCheckpoint's, and not DeepSpeed's copy alone
        if rank == 0:
            save_adapter(adapted(), checkpoint / FOLDER)
        dist.barrier()
        other = trainer(stage, STOP, folder / f"{stage}, {STOP} steps")
        other.train(resume_from_checkpoint=str(checkpoint))
        entry["loaded"] = relative(output(other.model.net), output(adapted().net).double())
    return found
