"""torch.fx.symbolic_trace: adapted layers become products of their parameters, which the traced module has too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from toys import randomize

from lotr_ext import LoTRConfig, apply_lotr, disabled, merge, mixed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x).relu() + self.b(x))


class Tanh(nn.Linear):
    """A layer that is wrapped, because it has its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def adapted(base: nn.Module | None = None, **settings) -> nn.Module:
    model = apply_lotr(Net() if base is None else base, LoTRConfig(rank=4, target_modules="all-linear", **settings))
    randomize(model)
    return model


MODELS = {
    "shapes": adapted,
    "widths": lambda: adapted(group_by="width"),
    "svd": lambda: adapted(init="svd"),
    "wrapped": lambda: adapted(nn.Sequential(nn.Linear(16, 16), Tanh(16, 8))),
    "bfloat16 base": lambda: adapted(Net().to(torch.bfloat16)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_traced_model_computes_and_trains_the_same_parameters(kind: str) -> None:
    model = MODELS[kind]()
    traced, x = torch.fx.symbolic_trace(model), torch.randn(3, 5, 16).to(next(model.parameters()).dtype)
    assert dict(traced.named_parameters()).keys() == dict(model.named_parameters()).keys()
    found = []
    for net in (traced, model):
        y = net(x)
        y.float().square().sum().backward()
        found.append((y, [p.grad for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if x.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found[0][0], found[1][0], **tolerance)
    for got, want in zip(found[0][1], found[1][1], strict=True):
        assert (got - want).norm() <= tolerance["rtol"] * want.norm()
    torch.testing.assert_close(copy.deepcopy(traced)(x), traced(x))


def test_a_trace_has_the_state_in_which_it_was_made() -> None:
    model, x = adapted(init="svd"), torch.randn(5, 16)
    with disabled(model):
        base = torch.fx.symbolic_trace(model)
        want = model(x)
    torch.testing.assert_close(base(x), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x), want)
    assert torch.equal(torch.fx.symbolic_trace(merge(model))(x), model(x))


def test_layers_without_a_form_in_products_are_refused() -> None:
    for model, why in ((adapted(magnitude=True), "magnitudes"), (adapted(core="cp"), "a computed core")):
        with pytest.raises(ValueError, match=f"x: expected a tensor in a layer with {why}, got a torch.fx.Proxy"):
            torch.fx.symbolic_trace(model)
        torch.fx.symbolic_trace(merge(model))
    model = adapted()
    with mixed(model, ["default"]), pytest.raises(ValueError, match="in a layer with a batch of several adapters"):
        torch.fx.symbolic_trace(model)
