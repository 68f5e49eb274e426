"""How many nodes, by the work on x. Whichever it is, the numbers are the formula's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRConfig, LoTRFactors, LoTRLinear, apply_lotr, explain
from lotr_ext.ops import planner

TOKENS, WIDTH, RANK = 130, 24, 4


def siblings(count: int = 3, train: str = "AB") -> tuple[list[LoTRLinear], LoTRFactors]:
    factors = LoTRFactors(WIDTH, WIDTH, RANK)
    layers = [LoTRLinear(WIDTH, WIDTH, factors=factors, scaling=0.5) for _ in range(count)]
    for layer in layers:
        nn.init.normal_(layer.core)
    factors.A.requires_grad_("A" in train), factors.B.requires_grad_("B" in train)
    return layers, factors


def input_of(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, WIDTH, requires_grad=True)


def nodes_below(y: Tensor) -> set[str]:
    """Names of the nodes in y's graph."""
    found, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            found.add(type(node).__name__)
            waiting += [next for next, _ in node.next_functions]
    return found


def formula(layers: list[LoTRLinear], x: Tensor, g: Tensor) -> list[Tensor]:
    """Gradients of x, A, B and the cores through the formula in float64."""
    factors = layers[0].factors
    x, A, B = (t.detach().double().requires_grad_() for t in (x, factors.A, factors.B))
    cores = [layer.core.detach().double().requires_grad_() for layer in layers]
    y = sum(
        torch.nn.functional.linear(x, layer.weight.double(), layer.bias.double()) + layer.scaling * x @ A @ core @ B.T
        for layer, core in zip(layers, cores)
    )
    return list(torch.autograd.grad(y, [x, A, B, *cores], g.double()))


def test_the_rule_looks_at_the_work_on_x(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, _ = siblings()
    x = input_of()
    work = TOKENS * WIDTH * (RANK + 16)
    monkeypatch.setattr(planner, "LITTLE_WORK", work)
    assert explain(layers[0], x).nodes == 2
    monkeypatch.setattr(planner, "LITTLE_WORK", work + 1)
    plan = explain(layers[0], x)
    assert plan.nodes == 1 and "little work on x" in str(plan)
    assert nodes_below(layers[0](x)) & {"LoTRFunctionBackward", "LoTRShrinkBackward"} == {"LoTRFunctionBackward"}
    with torch.no_grad():
        assert explain(layers[0], x).kernels
    layers[0].strategy = "two_pass"
    assert explain(layers[0], x).kernels


def test_half_precision_takes_one_node_for_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, _ = siblings()
    monkeypatch.setattr(planner, "LITTLE_WORK", TOKENS * WIDTH * (RANK + 16) + 1)
    x, layer = input_of().bfloat16(), layers[0].to(torch.bfloat16)
    plan = explain(layer, x)
    assert plan.nodes == 1 and not plan.unfolded and "little work on x" in str(plan)
    assert nodes_below(layer(x)) & {"LoTRFunctionBackward", "LoTRShrinkBackward"} == {"LoTRFunctionBackward"}
    layer.factors.A.requires_grad_(False)  # one node would keep x, which two need not
    assert explain(layer, x).nodes == 2


def test_on_cuda_launches_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "obstacle_to_kernels", lambda *_: None)
    monkeypatch.setattr(planner, "LITTLE_WORK", 2**40)
    planner.plan_of.cache_clear()
    layers, _ = siblings()
    try:
        assert explain(layers[0], input_of(), device="cuda").nodes == 2 and explain(layers[0], input_of()).nodes == 1
    finally:
        planner.plan_of.cache_clear()


@pytest.mark.parametrize("work", [0, 2**22], ids=["two nodes", "one node"])
@pytest.mark.parametrize("way", ["plain", "in a model", "checkpoint", "reentrant"])
def test_gradients_are_the_formulas(work: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "LITTLE_WORK", work)

    class Sum(nn.Module):
        def __init__(self, layers: list[nn.Module]):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            return sum(layer(x) for layer in self.layers)

    if way == "in a model":
        model = apply_lotr(
            Sum([nn.Linear(WIDTH, WIDTH) for _ in range(3)]), LoTRConfig(rank=RANK, target_modules=r"layers\.\d")
        )
        layers = list(model.layers)
        for layer in layers:
            nn.init.normal_(layer.core)
    else:
        layers, _ = siblings()
        model = Sum(layers)
    x, g = input_of(), torch.randn(TOKENS, WIDTH)
    y = model(x) if way in ("plain", "in a model") else checkpoint(model, x, use_reentrant=way == "reentrant")
    y.backward(g)
    found = [x.grad, layers[0].factors.A.grad, layers[0].factors.B.grad, *(layer.core.grad for layer in layers)]
    for own, expected in zip(found, formula(layers, x, g)):
        assert (own.double() - expected).norm() <= 1e-5 * expected.norm()


def test_a_small_and_a_large_input_in_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of either kind add to the same sums."""
    layers, factors = siblings()
    small, large = input_of(), input_of(3 * TOKENS)
    monkeypatch.setattr(planner, "LITTLE_WORK", large.numel() * (RANK + planner.READING))
    g, h = torch.randn(TOKENS, WIDTH), torch.randn(3 * TOKENS, WIDTH)
    ys = sum(layer(small) for layer in layers), sum(layer(large) for layer in layers)
    assert [("LoTRShrinkBackward" in nodes_below(y)) for y in ys] == [False, True]
    torch.autograd.backward(ys, (g, h))
    found = [factors.A.grad, factors.B.grad, *(layer.core.grad for layer in layers)]
    both = zip(formula(layers, small, g)[1:], formula(layers, large, h)[1:])
    for own, (one, other) in zip(found, both):
        assert (own.double() - one - other).norm() <= 1e-5 * (one + other).norm()
