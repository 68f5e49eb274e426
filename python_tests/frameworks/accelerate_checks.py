"""FSDP1 through accelerate, whose default version it is, in two processes. Run by test_accelerate.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from gloo_checks import batch, loss, output, train
from stacks import base, make
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lotr_ext import load_adapter, save_adapter
from nets import relative

STEPS, RATE = range(3), 0.05


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def choose_fsdp1(accelerator: Accelerator, **settings: Any) -> None:
    """FSDP1, which accelerate chooses for GPUs alone. Whatever it makes later reads the choice from PartialState."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1,
        use_orig_params=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["SmoothBlock"],
        **settings,
    )
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin, accelerator.state.device = plugin, torch.device("cpu")  # cpu:0 is none to FSDP


def fsdp1(rank: int, folder: Path) -> dict[str, Any]:
    """Losses, and how far what is saved is from what was trained."""
    accelerator = Accelerator(cpu=True)
    choose_fsdp1(accelerator)
    model, alone = accelerator.prepare(make()), make()
    optimizer = accelerator.prepare(sgd(model))
    found = {
        "wrapped": isinstance(model, FullyShardedDataParallel),
        "losses": [],
        "alone": train(alone, sgd(alone), STEPS, 0, 1),
    }
    for i in STEPS:
        optimizer.zero_grad()
        value = loss(model, batch(rank, i))
        accelerator.backward(value)
        optimizer.step()
        value = value.detach().clone()
        dist.all_reduce(value)
        found["losses"].append(value.item() / 2)
    found["kept"] = accelerator.distributed_type == DistributedType.FSDP
    save_adapter(model, folder / "saved")
    found["saved"] = relative(output(load_adapter(base(), folder / "saved")), output(model).double())
    return found
