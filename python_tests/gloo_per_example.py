"""per_example and influence under DistributedDataParallel, in processes joined by gloo. Run by test_distributed.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lotr_ext import LoTRConfig, apply_lotr, influence, per_example

SIZE, ROWS, WIDE = 6, 5, torch.float64


def adapted() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(SIZE, SIZE, dtype=WIDE), nn.Tanh(), nn.Linear(SIZE, SIZE, dtype=WIDE))
    model = apply_lotr(nn.Sequential(*layers), LoTRConfig(rank=2, adapter_dtype=WIDE))
    for i in (0, 2):
        nn.init.normal_(model[i].core)
    return model


def rows_of(rank: int) -> Tensor:
    return torch.randn(ROWS - rank, 3, SIZE, dtype=WIDE, generator=torch.Generator().manual_seed(10 + rank))


def loss(y: Tensor) -> Tensor:
    return torch.sin(y).sum() + F.mse_loss(y, torch.ones_like(y), reduction="sum")


def under_ddp(rank: int, folder: Path) -> dict:
    """Each process: its own examples' gradients against a loop on the plain model, and the ordinary ones against the mean."""
    model, x = DistributedDataParallel(adapted()), rows_of(rank)
    with per_example(model) as gradients:
        loss(model(x)).backward()
    plain, worst = adapted(), 0.0
    for i in range(len(x)):
        plain.zero_grad()
        loss(plain(x[i : i + 1])).backward()
        for name in ("0", "2"):
            want = plain.get_submodule(name).core.grad
            worst = max(worst, float((gradients[name][i] - want).norm() / want.norm()))
    plain.zero_grad()
    for other in range(2):
        loss(plain(rows_of(other))).backward()
    got = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    means = {name: p.grad / 2 for name, p in plain.named_parameters() if p.grad is not None}
    assert got.keys() == means.keys()
    ordinary = max(float((got[name] - means[name]).norm() / means[name].norm()) for name in means)
    model.zero_grad()
    batches = [x[:2], x[2:]]
    scores = influence(model, batches, loss=lambda m, batch: loss(m(batch)))
    alone = influence(adapted(), batches, loss=lambda m, batch: loss(m(batch)))
    return {
        "rows": gradients.norms().tolist(),
        "worst": worst,
        "ordinary": ordinary,
        "scores": float((scores - alone).abs().max()),
    }
