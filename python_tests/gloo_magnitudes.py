"""As `gloo_checks`, with magnitudes (DoRA): gradients under DDP and FSDP2 after steps that change A, and what is refused."""

from __future__ import annotations

from pathlib import Path

import torch
from gloo_checks import batch, error, refusal, shard
from stacks import Stack, base, make, trained_grads
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lotr_ext import LoTRConfig, apply_lotr

SETTINGS = {"magnitude": True, "adapter_dtype": torch.float64}


def wide(**settings) -> Stack:
    torch.manual_seed(0)
    return make(**SETTINGS, **settings).double()


def steps(model: nn.Module, *inputs: Tensor) -> None:
    """Two steps of an optimizer and the gradients of a third, each of the mean over all inputs."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for i in range(3):
        optimizer.zero_grad()
        (sum(loss_of(model, x) for x in inputs) / len(inputs)).backward()
        if i < 2:
            optimizer.step()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def magnitudes(rank: int, folder: Path) -> dict:
    """Relative errors of the gradients, by case; and what tensor parallelism says."""
    alone, x = wide(), batch(rank).double()
    steps(alone, *(batch(r).double() for r in range(2)))
    want = trained_grads(alone)
    found = {}
    for name, wrap in {
        "DDP": DistributedDataParallel,
        "FSDP2, by block": shard,
        "FSDP2, the root": lambda model: shard(model, by="root"),
    }.items():
        model = wrap(wide())
        steps(model, x)
        found[name] = error(model, want)
    mesh = init_device_mesh("cpu", (2,))
    model = apply_lotr(base(), LoTRConfig(rank=4, target_modules=["q"], magnitude=True))
    found["cut later"] = refusal(lambda: parallelize_module(model.blocks[0], mesh, {"q": ColwiseParallel()}))
    cut = base()
    parallelize_module(cut.blocks[0], mesh, {"q": ColwiseParallel()})
    found["cut before"] = refusal(lambda: apply_lotr(cut, LoTRConfig(rank=4, target_modules=["q"], magnitude=True)))
    return found
