"""As `gloo_checks`, for a mixture whose experts are adapted: two processes, each with its own rows."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from mixtures import adapted, mixture, written_out
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lotr_ext import load_adapter, merge, save_adapter
from nets import relative


def batch(rank: int) -> Tensor:
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(rank))


def truth() -> dict[str, Tensor]:
    """The mean over both halves, by plain autograd in float64 in one process."""
    halves = [written_out(adapted(), mixture(), ids=batch(rank))[2] for rank in range(2)]
    return {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}


def experts(rank: int, folder: Path) -> dict:
    """Relative errors by case; and whether a sharded model saves what an unsharded one has, and cannot be merged."""
    want, ids, found = truth(), batch(rank), {}
    mesh = init_device_mesh("cpu", (2,))

    def error(model: nn.Module) -> float:
        for _ in range(2):
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
        grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.requires_grad}
        return max(relative(g.full_tensor() if hasattr(g, "full_tensor") else g, want[n]) for n, g in grads.items())

    def shard(model: nn.Module, checkpointing: bool) -> nn.Module:
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    found["ddp"] = error(DistributedDataParallel(adapted()))
    for checkpointing in (False, True):
        model = shard(adapted(), checkpointing)
        found[f"fsdp2, checkpointing {checkpointing}"] = error(model)
    save_adapter(model, folder / "experts")
    whole = load_adapter(copy.deepcopy(mixture()), folder / "experts")
    saved = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    same = all(torch.equal(p, saved[n]) for n, p in adapted().named_parameters() if p.requires_grad)
    try:
        merge(model)
    except RuntimeError as refusal:
        return {"errors": found, "saved": same, "refusal": str(refusal)}
    return {"errors": found, "saved": same}
