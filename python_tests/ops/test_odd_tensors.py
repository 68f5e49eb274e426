"""Tensors that are not what their memory says, and gradients that come in batches: each computes what the formula computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lotr_ext import LoTRExperts, LoTRFactors, LoTRLinear, explain, lotr_linear

K = 12
TOKENS = pytest.mark.parametrize("tokens", [5, 200], ids=["unfolded", "folded"])
ALONE = pytest.mark.parametrize("alone", [True, False], ids=["alone", "siblings"])


def layers_of(count: int) -> list[LoTRLinear]:
    torch.manual_seed(0)
    factors = LoTRFactors(K, K, 3)
    layers = [LoTRLinear(K, K, factors=factors) for _ in range(count)]
    for layer in layers:
        nn.init.normal_(layer.core)
    return layers


def formula(layer: LoTRLinear, x: Tensor) -> Tensor:
    named = dict(layer.factors.named_parameters())
    return nn.functional.linear(x, layer.weight, layer.bias) + layer.scaling * ((x @ named["A"]) @ layer.core) @ named["B"].T


def both(layers: list[LoTRLinear], x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The layers' outputs on x summed, the same by the formula, and what to take gradients of."""
    wanted = [x, *layers[0].factors.parameters(), *(layer.core for layer in layers)]
    return sum(layer(x) for layer in layers), sum(formula(layer, x) for layer in layers), wanted


def close(found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@TOKENS
@ALONE
def test_an_x_that_is_negated_only_by_a_mark(tokens, alone):
    x = torch.randn(tokens, K, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    layers = layers_of(1 if alone else 2)
    y, expected, _ = both(layers, x)
    close(y, expected)
    with torch.no_grad():
        close(both(layers, x)[0], expected)
    named = dict(layers[0].factors.named_parameters())
    y = lotr_linear(x, layers[0].weight, layers[0].bias, named["A"], named["B"], layers[0].core, scaling=layers[0].scaling)
    close(y, formula(layers[0], x))


@pytest.mark.parametrize("lengths", [(3, 1, 2), (3, 1, 200)], ids=str)
@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "magnitude"])
def test_a_nested_x_is_the_layer_on_each_part(lengths, magnitude):
    torch.manual_seed(0)
    layer = LoTRLinear(K, K, 3, magnitude=magnitude, dropout=0.5).eval()
    nn.init.normal_(layer.core)
    trained = list(layer.adapter_parameters())
    parts = [torch.randn(n, K, requires_grad=True) for n in lengths]
    y = layer(torch.nested.as_nested_tensor(parts, layout=torch.jagged))
    found = torch.autograd.grad(y.values().sin().sum(), [*parts, *trained])
    close(found, torch.autograd.grad(sum(layer(x).sin().sum() for x in parts), [*parts, *trained]))
    assert layer.train()(torch.nested.nested_tensor(parts, layout=torch.jagged)).shape[0] == len(lengths)


@TOKENS
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_x(tokens, kind):
    layers, x = layers_of(2), torch.randn(tokens, K).relu()
    found = sum(layer(getattr(x, kind)()) for layer in layers)
    _, expected, wanted = both(layers, x)
    close(found, expected)
    close(torch.autograd.grad(found.sin().sum(), wanted[1:]), torch.autograd.grad(expected.sin().sum(), wanted[1:]))
    assert "layout torch.sparse" in str(explain(layers[0], getattr(x, kind)()))


GRADIENTS: dict[str, Callable[[int], Tensor]] = {
    "negated": lambda tokens: torch._neg_view(torch.randn(tokens, K)),
    "zero without memory": lambda tokens: torch._efficientzerotensor((tokens, K)),
}


@TOKENS
@ALONE
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_gradient_that_is_so_only_by_a_mark(tokens, alone, kind):
    y, expected, wanted = both(layers_of(1 if alone else 2), torch.randn(tokens, K, requires_grad=True))
    g = GRADIENTS[kind](tokens)
    close(torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g))


@TOKENS
@pytest.mark.parametrize("kind", ["alone", "siblings", "magnitude", "rows", "experts"])
def test_a_gradient_with_a_tangent(tokens, kind):
    """Backward is linear in it: the tangents of its results are the gradients of the tangent."""
    torch.manual_seed(0)
    x, layers = torch.randn(tokens, K, requires_grad=True), layers_of(2 if kind == "siblings" else 1)
    layer = LoTRExperts(2, K, K, 3) if kind == "experts" else LoTRLinear(K, K, 3, magnitude=kind == "magnitude")
    for one in (layer, *layers):
        nn.init.normal_(one.core)
    A, B, W, cores = layer.factors.A, layer.factors.B, layer.weight, torch.randn(2, 3, 3, requires_grad=True)
    if kind == "experts":
        wanted = [x, A, layer.core, W.requires_grad_()]
        y = layer(x, torch.tensor([1, tokens], dtype=torch.int32))
    elif kind == "rows":
        y, wanted = lotr_linear(x, W, None, A, B, cores, 0.5, core_index=torch.arange(tokens) % 2), [x, A, B, cores]
    elif kind == "magnitude":
        y, wanted = layer(x), [x, A, B, layer.core, layer.magnitude]
    else:
        y, _, wanted = both(layers, x)
    tangent = torch.randn_like(y)
    expected = torch.autograd.grad(y, wanted, tangent, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, wanted, forward_ad.make_dual(torch.randn_like(y), tangent))
        close(tuple(forward_ad.unpack_dual(t).tangent for t in found), expected)


@TOKENS
@ALONE
def test_batched_gradients(tokens, alone):
    y, expected, wanted = both(layers_of(1 if alone else 2), torch.randn(tokens, K, requires_grad=True))
    G = torch.randn(3, tokens, K)
    right = [torch.autograd.grad(expected, wanted, g, retain_graph=True) for g in G]
    right = tuple(torch.stack(parts) for parts in zip(*right))
    close(torch.autograd.grad(y, wanted, G, is_grads_batched=True, retain_graph=True), right)
    close(torch.vmap(lambda g: torch.autograd.grad(y, wanted, g, retain_graph=True))(G), right)


def test_batched_gradients_have_gradients():
    y, expected, wanted = both(layers_of(1), torch.randn(3, K, requires_grad=True))
    G = torch.randn(3, 3, K)
    found, right = (
        torch.vmap(lambda g, of=of: torch.autograd.grad(of, wanted, g, create_graph=True))(G) for of in (y, expected)
    )
    close(found, right)
    for own, true in zip(found, right):  # those of B and the core are made of the u that the layer kept
        if true.requires_grad:
            ends = [t for t in wanted if t is not own]
            pairs = zip(*(torch.autograd.grad(d.sin().sum(), ends, retain_graph=True, allow_unused=True) for d in (own, true)))
            close(*zip(*((a, b) for a, b in pairs if b is not None)))


def test_a_vectorised_jacobian():
    (layer,) = layers_of(1)
    x = torch.randn(4, K)
    found = torch.autograd.functional.jacobian(layer, x, vectorize=True)
    close(found, torch.autograd.functional.jacobian(lambda t: formula(layer, t), x))


class Doubled(Tensor):
    """A weight whose linear layer is not what its memory says, as a quantised one's."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *rest = args
            return func(x, 2 * weight.as_subclass(Tensor), *rest)
        return super().__torch_function__(func, types, args, kwargs or {})


@TOKENS
def test_a_weight_of_another_type_is_asked_for_its_own_product(tokens):
    (layer,) = layers_of(1)
    x, expected = torch.randn(tokens, K), 0
    with torch.no_grad():
        expected = formula(layer, x) + x @ layer.weight.T
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled), requires_grad=False)
    assert isinstance(layer.weight, Doubled)
    told = explain(layer, x)
    assert told.strategy == "composite" and "weight is a Doubled" in told.why
    close(layer(x).as_subclass(Tensor), expected)
