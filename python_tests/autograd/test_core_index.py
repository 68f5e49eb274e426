"""Rows with cores of their own (`core_index`, `mixed`): values and gradients as plain torch gives them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from lotr_ext import LoTRConfig, add_adapter, apply_lotr, lotr_linear, mixed, set_adapter

SUBSETS = [needs for needs in itertools.product((False, True), repeat=4) if any(needs)]


def tensors(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    shapes = ((4, 40, 24), (24, 5), (20, 3), (3, 5, 3), (20, 24), (20,))
    return [torch.randn(*shape, dtype=dtype) for shape in shapes], torch.tensor([2, 0, 2, 1])


def plain(x: Tensor, A: Tensor, B: Tensor, cores: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    return x @ weight.T + bias + 0.5 * ((x @ A) @ cores[index]) @ B.T


@pytest.mark.parametrize("needs", SUBSETS)
def test_gradients_of_each_subset(needs: tuple[bool, ...]) -> None:
    given, index = tensors()
    results = []
    for ours in (True, False):
        x, A, B, cores = (t.clone().requires_grad_(need) for t, need in zip(given, needs))
        weight, bias = given[4:]
        if ours:
            y = lotr_linear(x, weight, bias, A, B, cores, 0.5, core_index=index)
        else:
            y = plain(x, A, B, cores, weight, bias, index)
        trained = [t for t in (x, A, B, cores) if t.requires_grad]
        results.append((y, *torch.autograd.grad((y * y).sum(), trained)))
    torch.testing.assert_close(*results)


def test_second_derivatives() -> None:
    given, index = tensors()
    x, A, B, cores = (t[..., :2, :] if t.dim() == 3 and len(t) == 4 else t for t in given[:4])

    def run(*trained: Tensor) -> Tensor:
        return lotr_linear(*(trained[0], *given[4:]), *trained[1:], 0.5, core_index=index)

    few = tuple(t.clone().requires_grad_() for t in (x, A, B, cores))
    assert torch.autograd.gradgradcheck(run, few, check_batched_grad=False)


def test_a_changed_B_raises_only_where_a_gradient_needs_it() -> None:
    given, index = tensors()
    x, A, B, cores = (t.clone().requires_grad_() for t in given[:4])
    y = lotr_linear(x, *given[4:], A, B, cores, 0.5, core_index=index)
    with torch.no_grad():
        B.mul_(2)
    torch.autograd.grad(y.sum(), B, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), cores)


class Two(nn.Module):
    """Two siblings on one x."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 20), nn.Linear(24, 20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_siblings_go_backward_one_after_the_other(order: tuple[int, int]) -> None:
    """Autograd frees what LoTRShrink saved after the first backward; the second needs it for dA and dx."""
    x = tensors()[0][0].requires_grad_()
    model = apply_lotr(Two(), LoTRConfig(rank=3, target_modules=["one", "two"])).double()
    add_adapter(model, "b", share_factors="default")
    for name in ("default", "b"):
        set_adapter(model, name)
        for layer in (model.one, model.two):
            nn.init.normal_(layer.core)
    cores = {}
    for name in ("default", "b"):
        set_adapter(model, name)
        cores[name] = [layer.core.detach().clone() for layer in (model.one, model.two)]
    A, B = (t.detach().clone().requires_grad_() for t in (model.one.factors.A, model.one.factors.B))
    model.one.factors.requires_grad_()  # frozen, as two adapters have them
    names = ["b", "default", "b", "default"]
    with mixed(model, names):
        outputs = model(x)
    for i in order:
        outputs[i].square().sum().backward()
    got = [x.grad, model.one.factors.A.grad, model.one.factors.B.grad]
    loss = 0
    for l, layer in enumerate((model.one, model.two)):
        for row, name in enumerate(names):
            y = x[row] @ layer.weight.T + layer.bias + layer.scaling * x[row] @ A @ cores[name][l] @ B.T
            loss = loss + y.square().sum()
    torch.testing.assert_close(got, list(torch.autograd.grad(loss, (x, A, B))))
