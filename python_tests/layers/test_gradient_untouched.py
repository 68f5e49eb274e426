"""A start from the gradient changes A and B and nothing else, however its passes end; and it works where `.backward()` does."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRConfig, apply_lotr, init_from_gradient
from lotr_ext.model.adapted import adapted_layers

D, TARGETS = 24, ["q", "v"]
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.norm, self.drop = nn.Linear(D, D), nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.q(x)) * self.v(self.norm(x)))


class Net(nn.Module):
    """Tokens [b] -> logits [b, 3]. Its buffers are written in place, replaced, expanded and set for the first time."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.embedding, self.head = nn.Embedding(11, D), nn.Linear(D, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)
        self.register_buffer("places", torch.arange(4).expand(2, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        self.calls = self.calls + 1
        self.last = x.detach()
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(0, high, (6,), generator=generator) for high in (11, 3)) for _ in range(3)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def state(model: nn.Module, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """All that passes could move. but: endings of the names of parameters whose values may."""
    found: dict[str, Any] = {name: (id(t), None if t is None else t.clone()) for name, t in named_buffers(model)}
    for name, p in model.named_parameters():
        found[name] = p.requires_grad, id(p.grad), None if p.grad is None else p.grad.clone()
        found[f"{name} values"] = None if name.endswith(but) else p.detach().clone()
    found |= {f"{name} mode": module.training for name, module in model.named_modules()}
    found |= {f"{name} hooks": len(module._forward_hooks) for name, module in model.named_modules()}
    return found | {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()[1:]}


def named_buffers(model: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [(f"{name}.{key}", t) for name, module in model.named_modules() for key, t in module._buffers.items()]


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert one.keys() == other.keys()

    def same(a: object, b: object) -> bool:
        if isinstance(a, tuple):
            return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, (Tensor, np.ndarray)):
            return isinstance(b, type(a)) and bool((a == b).all())
        return a == b

    return [name for name in one if not same(one[name], other[name])]


def moving(error: BaseException | None) -> Callable[[nn.Module, Batch], Tensor]:
    """A loss that changes what a loss can change, and raises `error` in its fifth call."""
    calls = 0

    def of(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        random.random(), np.random.rand()
        model.blocks[1].eval()
        value = loss(model, batch)
        value.backward(retain_graph=True)
        model.head.requires_grad_(False)
        if error is not None and calls == 5:
            raise error
        return value

    return of


@pytest.mark.parametrize("error", [None, ValueError("a batch"), KeyboardInterrupt()], ids=["ends", "fails", "interrupted"])
def test_a_start_on_an_adapted_model_changes_its_factors_alone(error: BaseException | None) -> None:
    model = apply_lotr(Net(), LoTRConfig(rank=2, target_modules=TARGETS, modules_to_save=["head"])).train()
    model.head.weight.grad = torch.ones(3, D)
    before = state(model, but=("A", "B") if error is None else ())
    if error is None:
        factors = [p.detach().clone() for p in model.lotr_factors.parameters()]
        init_from_gradient(model, batches(), moving(None))
        assert not any(torch.equal(p, was) for p, was in zip(model.lotr_factors.parameters(), factors))
    else:
        with pytest.raises(type(error)):
            init_from_gradient(model, batches(), moving(error))
    assert not differing(before, state(model, but=("A", "B") if error is None else ()))


@pytest.mark.parametrize("error", [ValueError("a batch"), KeyboardInterrupt()], ids=["fails", "interrupted"])
def test_a_start_that_fails_leaves_a_new_model_as_it_was(error: BaseException) -> None:
    model = Net().train()
    model.blocks[0].q.weight.grad = torch.ones(D, D)
    before = state(model)
    with pytest.raises(type(error)):
        apply_lotr(model, LoTRConfig(rank=2, target_modules=TARGETS, init="gradient"), batches=batches(), loss=moving(error))
    assert not differing(before, state(model))


def test_reading_the_batches_moves_no_generator() -> None:
    model = apply_lotr(Net(), LoTRConfig(rank=2, target_modules=TARGETS))
    data = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches())))
    before = state(model, but=("A", "B"))
    init_from_gradient(model, torch.utils.data.DataLoader(data, batch_size=6, shuffle=True), loss)
    assert not differing(before, state(model, but=("A", "B")))


# ---- reentrant checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True])
def test_reentrant_checkpoints_give_the_same_start(adapted: bool) -> None:
    """Both where all parameters are trained, and where the regions' input requires grad through the embedding alone."""
    found = []
    for reentrant in (None, True):
        model, config = Net(reentrant), LoTRConfig(rank=2, target_modules=TARGETS, init="gradient")
        for block in model.blocks:
            block.drop.p = 0.0
        if adapted:
            apply_lotr(model, LoTRConfig(rank=2, target_modules=TARGETS))
            model.embedding.requires_grad_(True)
            init_from_gradient(model, batches(), loss)
        else:
            apply_lotr(model, config, batches=batches(), loss=loss)
        assert all(p.grad is None for p in model.parameters())
        found.append([(layer.factors.A, layer.factors.B) for layer in adapted_layers(model).values()])
    for plain, checkpointed in zip(*found):
        for one, other in zip(plain, checkpointed):
            torch.testing.assert_close(one @ one.T, other @ other.T, atol=1e-5, rtol=0)  # the same plane


def test_reentrant_checkpoints_keep_gradients_and_make_none_of_the_layers_weights() -> None:
    model, seen = Net(reentrant=True), []
    model.embedding.weight.grad = torch.ones(11, D)
    for block in model.blocks:
        block.q.weight.register_hook(lambda grad: seen.append(grad.shape))
    apply_lotr(model, LoTRConfig(rank=2, target_modules=TARGETS, init="gradient"), batches=batches(), loss=loss)
    assert not seen and torch.equal(model.embedding.weight.grad, torch.ones(11, D))


def test_batches_keep_their_gradients_under_reentrant_checkpoints() -> None:
    """Leaves beside the parameters: a batch that requires a gradient has the one that it had, or none."""
    layer, x = nn.Sequential(nn.Linear(D, D)), [torch.randn(5, D, requires_grad=True) for _ in range(2)]
    before = x[1].grad = torch.randn(5, D)
    value = before.clone()
    apply_lotr(layer, LoTRConfig(rank=2, target_modules=["0"]))
    init_from_gradient(layer, x, lambda model, t: checkpoint(model, t, use_reentrant=True).square().sum() * t.sum())
    assert x[0].grad is None and x[1].grad is before and torch.equal(before, value)


def test_reentrant_checkpoints_without_an_input_that_requires_grad_are_named() -> None:
    model = apply_lotr(Net(reentrant=True), LoTRConfig(rank=2, target_modules=TARGETS))
    with pytest.warns(UserWarning, match="requires_grad=True"), pytest.raises(ValueError, match="reentrant") as caught:
        init_from_gradient(model, batches(), loss)
    assert "use_reentrant=False" in str(caught.value)


def test_an_optimizer_that_steps_inside_of_backward_is_refused_under_reentrant_checkpoints() -> None:
    model = Net(reentrant=True)
    steps: list[Tensor] = []
    model.embedding.weight.register_post_accumulate_grad_hook(steps.append)
    with pytest.raises(ValueError, match=r"post_accumulate_grad hooks .* 'embedding.weight'"):
        apply_lotr(model, LoTRConfig(rank=2, target_modules=TARGETS, init="gradient"), batches=batches(), loss=loss)
    assert not steps
