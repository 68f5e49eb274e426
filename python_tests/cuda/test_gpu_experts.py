"""Experts and many tasks on a GPU against float64 on the CPU: by torch's grouped product where it runs, and without.
Run on the CPU the same way by the tests whose names end in _cpu: what they compare would be noticed there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lotr_ext import LoTRConfig, LoTRExperts, TaskBank, apply_lotr, mixed
from lotr_ext.layers.request import in_force
from nets import relative

TOKENS, EXPERTS = 300, 5
ENDS = [70, 70, 200, 310, 560]  # expert 1 has no rows, the last 40 rows no expert
ROWS = 600


def experts_errors(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Of y where rows have an expert, and of all gradients; a loss that looks at those rows alone."""
    torch.manual_seed(0)
    layer = LoTRExperts(EXPERTS, 64, 48, 8, bias=True, dtype=dtype)
    nn.init.normal_(layer.core, 0, 0.5)
    x, tokens = torch.randn(TOKENS, 64).to(dtype), torch.randint(0, TOKENS, (ROWS,))
    g = torch.randn(ENDS[-1], 48).to(dtype)
    found = []
    for place, wide in ((device, dtype), ("cpu", torch.float64)):
        own, x_here = copy.deepcopy(layer).to(place, wide), x.to(place, wide, copy=True).requires_grad_()
        if wide != torch.float64:
            own.core.data, own.factors.A.data, own.factors.B.data = (
                t.data.float() for t in (own.core, own.factors.A, own.factors.B)
            )
        offs = torch.tensor(ENDS, dtype=torch.int32, device=place)
        y = own(x_here, offs, tokens.to(place))[: ENDS[-1]]
        y.backward(g.to(place, wide))
        grads = {"x": x_here.grad, "core": own.core.grad, "A": own.factors.A.grad, "B": own.factors.B.grad}
        found.append({"y": y.detach(), **grads})
    return {name: relative(found[0][name].cpu(), found[1][name]) for name in found[1]}


def tasks_error(device: str) -> tuple[float, Tensor]:
    """Of a batch of three rows of tasks; and the batch with a task that does not exist in its second row."""
    torch.manual_seed(0)
    model = apply_lotr(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 48)), LoTRConfig(rank=8))
    bank = TaskBank(model, 4)
    for _ in range(3):
        task = bank.add()
        bank.replace(task, {name: torch.randn(core.shape) for name, core in bank.cores_of(task).items()})
    x, index = torch.randn(3, 7, 32), torch.tensor([2, -1, 0])
    here = copy.deepcopy(model).to(device)
    with torch.no_grad(), mixed(here, index.to(device)), mixed(model.double(), index):
        error = relative(here(x.to(device)).cpu(), model(x.double()))
    with torch.no_grad(), mixed(here, torch.tensor([2, 0, 0], device=device)) as inside:
        wrong = torch.tensor([2, 77, 0], device=device)  # which `mixed` refuses on a CPU
        with in_force({layer: layer.mixture._replace(index=wrong) for layer in (inside[0], inside[2])}):
            return error, inside(x.to(device)).cpu() if device != "cpu" else torch.empty(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_experts(dtype: torch.dtype) -> None:
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    assert max(experts_errors("cuda", dtype).values()) < bound


def test_many_tasks() -> None:
    error, wrong = tasks_error("cuda")
    assert error < 1e-4 and wrong[1].isnan().all() and wrong[0].isfinite().all() and wrong[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_experts_cpu(dtype: torch.dtype) -> None:
    assert max(experts_errors("cpu", dtype).values()) < (1e-4 if dtype == torch.float32 else 3e-2)


def test_many_tasks_cpu() -> None:
    assert tasks_error("cpu")[0] < 1e-4
