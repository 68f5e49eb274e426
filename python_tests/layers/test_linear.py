"""LoTRLinear and its kin: numbers, settings, dtypes, merging, state, explain. Bad input: ../model/test_bad_input.py."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import lotr_ext
from lotr_ext import LoTRFactors, LoTRLinear, explain, lotr_linear, reference
from lotr_ext.autograd import call as layer_call
from lotr_ext.ops import planner
from nets import relative

EPSILON = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def layer_of(k: int = 20, n: int = 14, rank=3, dtype: torch.dtype = torch.float32, **settings) -> LoTRLinear:
    layer = LoTRLinear(k, n, rank, dtype=dtype, **settings)
    nn.init.normal_(layer.core, 0, 0.5)
    return layer


def forget_plans() -> None:
    """What was decided before a test changed the facts."""
    planner.plan_of.cache_clear()
    layer_call._plan.cache_clear()


def truth(layer, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    wide = [t.detach().double() for t in (x, layer.weight if weight is None else weight)]
    bias = None if layer.bias is None else layer.bias.detach().double()
    factors = [t.detach().double() for t in (layer.factors.A, layer.factors.B, layer.core)]
    flat = wide[0].reshape(-1, x.shape[-1])
    return reference.forward(flat, wide[1], bias, *factors, layer.scaling).view(*x.shape[:-1], layer.out_features)


@pytest.mark.parametrize("rank", [1, 3, 33, (3, 5), (40, 2)], ids=str)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 5), (), (0,), (3, 0, 2), (200,)], ids=str)
def test_forward_and_backward(either_path, shape, dtype, rank):
    layer = layer_of(rank=rank, dtype=dtype)
    x = torch.randn(*shape, 20, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape, 14)
    g = torch.randn_like(y)
    y.backward(g)
    want = truth(layer, x)
    wide = [t.detach().double() for t in (g, x, layer.weight, layer.factors.A, layer.factors.B, layer.core)]
    gradients = reference.backward(wide[0].reshape(-1, 14), wide[1].reshape(-1, 20), *wide[2:], layer.scaling)
    assert relative(y, want) < EPSILON[dtype]
    assert relative(x.grad, gradients.dx.view(x.shape)) < EPSILON[dtype]
    for parameter, gradient in zip((layer.factors.A, layer.factors.B, layer.core), gradients[1:4]):
        assert relative(parameter.grad, gradient) < 4 * EPSILON[dtype]


def test_strided_inputs_and_expanded_gradients(either_path):
    layer = layer_of()
    for x in (torch.randn(20, 40).t(), torch.randn(40, 50)[:, 5:45:2], torch.randn(3, 20).expand(4, 3, 20)):
        x = x.detach().requires_grad_()
        layer(x).sum().backward()  # sum's gradient is expanded, stride 0
        wide = truth(layer, x)
        assert relative(layer(x), wide) < 2e-6 and x.grad.shape == x.shape


@pytest.mark.parametrize("tokens", [5, 300])
def test_a_trained_base_gets_its_gradient(tokens):
    layer = layer_of().requires_grad_(True)
    x = torch.randn(tokens, 20, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    wide = [t.detach().double() for t in (g, x, layer.weight, layer.factors.A, layer.factors.B, layer.core)]
    want = reference.backward(*wide, layer.scaling)
    got = (x, layer.factors.A, layer.factors.B, layer.core, layer.weight, layer.bias)
    for tensor, gradient in zip(got, want):
        assert relative(tensor.grad, gradient) < 4e-6


@pytest.mark.parametrize("tokens", [3, 150])
def test_functional_form(tokens):
    shapes = ((tokens, 20), (14, 20), (14,), (20, 3), (14, 2), (3, 2))
    x, weight, bias, A, B, core = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes)
    y = lotr_linear(x, weight, bias, A, B, core, 0.7)
    assert relative(y, reference.forward(x, weight, bias, A, B, core, 0.7).detach()) < 1e-12
    g = torch.randn_like(y)
    want = reference.backward(*(t.detach() for t in (g, x, weight, A, B, core)), 0.7)
    got = torch.autograd.grad(y, (x, A, B, core, weight, bias), g)
    for gradient, truth_ in zip(got, want):
        assert relative(gradient, truth_) < 1e-11
    frozen = lotr_linear(x, weight.detach(), None, A, B, core, 0.7)
    assert relative(frozen, reference.forward(x, weight, None, A, B, core, 0.7).detach()) < 1e-12


@pytest.mark.parametrize(
    "needs", list(itertools.product((False, True), repeat=6)), ids=lambda n: "".join(str(int(b)) for b in n)
)
def test_the_function_for_any_set_of_inputs_that_need_a_gradient(needs):
    shapes = ((4, 6), (5, 6), (5,), (6, 3), (5, 2), (3, 2))
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=need) for s, need in zip(shapes, needs)]
    y = lotr_ext.LoTRFunction.apply(*inputs, 0.7)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    x, weight, _, A, B, core = (t.detach() for t in inputs)
    g = torch.randn_like(y)
    y.backward(g)
    dx, dA, dB, dcore, dweight, dbias = reference.backward(g, x, weight, A, B, core, 0.7)
    for tensor, want, need in zip(inputs, (dx, dweight, dbias, dA, dB, dcore), needs):
        assert relative(tensor.grad, want) < 1e-12 if need else tensor.grad is None


@pytest.mark.parametrize("tokens", [4, 140])
def test_function_is_twice_differentiable(tokens):
    shapes = ((tokens, 3), (2, 3), (2,), (3, 2), (2, 2), (2, 2))
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    if tokens < 100:
        assert torch.autograd.gradgradcheck(lambda *t: lotr_ext.LoTRFunction.apply(*t, 0.7), inputs)
    (dx,) = torch.autograd.grad(lotr_ext.LoTRFunction.apply(*inputs, 0.7).square().sum(), inputs[0], create_graph=True)
    dx.square().sum().backward()
    got = [t.grad for t in inputs]
    again = [t.detach().requires_grad_() for t in inputs]
    (dx,) = torch.autograd.grad(reference.forward(*again, 0.7).square().sum(), again[0], create_graph=True)
    dx.square().sum().backward()
    for a, b in zip(got, again):
        assert relative(a, b.grad) < 1e-11


# ---- settings --------------------------------------------------------------------------------------------------------


def test_scaling():
    assert LoTRLinear(4, 4, 2).scaling == 1.0
    assert LoTRLinear(4, 4, 2, alpha=8).scaling == 4.0
    assert LoTRLinear(4, 4, 4, alpha=8, rslora=True).scaling == 8 / math.sqrt(4)
    assert LoTRLinear(4, 4, (2, 4), alpha=8).scaling == 2.0
    assert LoTRLinear(4, 4, 2, scaling=0.25).scaling == 0.25
    assert [LoTRLinear(4, 4, r, scaling="auto").scaling for r in (2, 8, (8, 32))] == [32.0, 4.0, 0.5]
    assert LoTRLinear(4, 4, (2, 9), rslora=True).scaling == 3.0  # alpha = r by default
    assert LoTRLinear(4, 4).factors.rank == 8


def test_starts_as_the_plain_layer():
    torch.manual_seed(3)
    plain = nn.Linear(20, 14)
    torch.manual_seed(3)
    layer = LoTRLinear(20, 14, 3, factors=None)
    x = torch.randn(5, 20)
    layer.weight, layer.bias = plain.weight, plain.bias
    assert torch.equal(layer(x), plain(x))


def test_it_is_a_linear_with_a_frozen_base_and_a_trained_adapter():
    layer = LoTRLinear(20, 14, 3)
    assert isinstance(layer, nn.Linear)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"core", "factors.A", "factors.B"}
    assert list(layer.state_dict()) == ["weight", "bias", "core", "factors.A", "factors.B"]
    layer.load_state_dict(nn.Linear(20, 14).state_dict(), strict=False)
    assert list(LoTRLinear(20, 14, 3, bias=False).state_dict()) == ["weight", "core", "factors.A", "factors.B"]
    assert "rank=3" in repr(layer) and "scaling=1" in repr(layer)


def test_from_linear_takes_the_very_tensors():
    linear = nn.Linear(20, 14)
    factors = LoTRFactors(20, 14, 3)
    layer = LoTRLinear.from_linear(linear, factors, alpha=6)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not linear.weight.requires_grad
    assert layer.factors is factors and layer.scaling == 2.0


def test_half_base_with_a_float32_adapter(either_path):
    for dtype in (torch.bfloat16, torch.float16):
        layer = layer_of(dtype=dtype)
        assert layer.factors.A.dtype == layer.core.dtype == torch.float32 and layer.weight.dtype == dtype
        x = torch.randn(9, 20, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.float().sum().backward()
        assert y.dtype == dtype and layer.factors.A.grad.dtype == torch.float32 and x.grad.dtype == dtype
        assert relative(y, truth(layer, x)) < EPSILON[dtype]


def test_autocast(either_path):
    layer = layer_of()
    x = torch.randn(9, 20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        plain = nn.functional.linear(x, layer.weight)
    assert y.dtype == plain.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.core.grad.dtype == torch.float32
    assert relative(y, truth(layer, x)) < EPSILON[torch.bfloat16]
    want = copy.deepcopy(layer).double()
    z = x.detach().double().requires_grad_()
    want(z).square().sum().backward()
    assert relative(x.grad, z.grad) < 3e-2 and relative(layer.core.grad, want.core.grad) < 3e-2


@pytest.mark.parametrize("strategy", ["composite", "two_pass", "beta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_strategy_never_changes_the_result(strategy, dtype, monkeypatch):
    layer = layer_of(dtype=dtype)
    x = torch.randn(140, 20, dtype=dtype, requires_grad=True)
    layer.strategy = strategy
    assert explain(layer, x).strategy == strategy and "forced" in explain(layer, x).reason
    y = layer(x)
    y.float().square().sum().backward()
    assert relative(y, truth(layer, x)) < EPSILON[dtype]
    layer.strategy = None
    monkeypatch.setattr(planner, "LOTR_STRATEGY", strategy)
    assert explain(layer, x).strategy == strategy
    assert torch.equal(layer(x), y)


def test_explain():
    layer = layer_of()
    few, many = torch.randn(2, 20), torch.randn(400, 20)
    assert explain(layer, few).nodes == 1 and explain(layer, many).kernels
    assert explain(layer, many).nodes == 1 and "nothing to share" in str(explain(layer, many))
    two = [layer_of(), layer_of()]
    two[1] = LoTRLinear.from_linear(two[1].to_linear(), two[0].factors)
    assert [explain(one, many).nodes for one in two] == [2, 2] and [explain(one, few).nodes for one in two] == [1, 1]
    assert "beta" in str(explain(layer, many)) and "unfolded" in str(explain(layer, few))
    layer.disabled = True
    assert explain(layer, many).strategy == "base" and "disabled" in str(explain(layer, many))
    layer.disabled = False
    layer.merge()
    assert "merged" in str(explain(layer, many))
    assert explain(layer_of(dtype=torch.float64), many.double()).kernels
    strange = many.as_subclass(type("Odd", (torch.Tensor,), {}))
    assert explain(layer_of(), strange).nodes == 0 and "Odd" in str(explain(layer_of(), strange))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_cuda_our_kernels_are_the_default(dtype, monkeypatch):
    """Asked of the code that decides, as if the layer were on a GPU."""
    monkeypatch.setattr(planner, "cuda_obstacle", lambda index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    forget_plans()
    for rank in (1, 16, 256):
        layer = layer_of(rank=rank, dtype=dtype)
        LoTRLinear.from_linear(layer.to_linear(), layer.factors)
        for tokens, strategy in ((1, "two_pass"), (512, "two_pass"), (8192, "beta")):
            explanation = explain(layer, torch.empty(tokens, 20, dtype=dtype), device="cuda")
            assert explanation.kernels and explanation.strategy == strategy
            # in training three launches backward, where the unfolded form takes six; a folded float16 could leave its range
            half = dtype == torch.float16
            assert explanation.unfolded == half and explanation.nodes == (1 if half else 2)
    one = torch.empty(1, 20, dtype=dtype)
    with torch.no_grad():
        assert explain(layer, one, device="cuda").nodes == 1
    too_high = explain(layer_of(rank=257, dtype=dtype), torch.empty(512, 20, dtype=dtype), device="cuda")
    assert not too_high.kernels and "257" in too_high.reason
    wide = explain(layer_of(dtype=torch.float64), torch.empty(512, 20, dtype=torch.float64), device="cuda")
    assert not wide.kernels and "float64" in wide.reason
    forget_plans()


@pytest.mark.parametrize(("capability", "works"), [((7, 5), False), ((8, 0), True), ((9, 0), True)], ids=str)
def test_an_older_gpu_takes_the_composite(capability, works, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(planner, "build_info", lambda: {"cuda": {"built": True}})
    monkeypatch.setattr(planner, "cuda_probe", lambda device: {"runtime": 13000, "driver": 13000, "error": ""})
    planner.cuda_obstacle.cache_clear()
    forget_plans()
    explanation = explain(layer_of(dtype=torch.bfloat16), torch.empty(512, 20, dtype=torch.bfloat16), device="cuda:0")
    assert explanation.kernels == works and (works or "7.5" in explanation.reason)
    planner.cuda_obstacle.cache_clear()
    forget_plans()


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_merge_and_unmerge(dtype):
    layer = layer_of(dtype=dtype)
    x = torch.randn(9, 20, dtype=dtype)
    before, bits, delta = layer(x), layer.weight.clone(), layer.delta_weight()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert delta.dtype == wide and delta.shape == (14, 20)
    layer.merge(safe=True)
    assert torch.equal(layer.weight, (bits.to(wide) + delta).to(dtype))
    assert relative(layer(x), before.double()) < 2 * EPSILON[dtype]
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, bits) and torch.equal(layer(x), before)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge(keep_backup=False)
    layer.unmerge()
    assert relative(layer.weight, bits.double()) < EPSILON[dtype]


def test_a_merged_layer_refuses_state_dicts():
    layer = layer_of()
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.state_dict()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.load_state_dict(state)
    copied = copy.deepcopy(layer)
    copied.unmerge()
    assert torch.equal(copied.weight, state["weight"])


def test_to_linear_and_to_base():
    layer = layer_of()
    x = torch.randn(9, 20)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and relative(linear(x), layer(x).detach().double()) < 2e-6
    assert linear.weight.data_ptr() != layer.weight.data_ptr()
    base = layer.to_base()
    assert type(base) is nn.Linear and base.weight is layer.weight


# ---- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_and_export(backend):
    layer = layer_of()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (3, 200):
        x = torch.randn(tokens, 20, requires_grad=True)
        y = compiled(x)
        assert relative(y, truth(layer, x)) < 2e-6
        y.sum().backward()
        got, x.grad = x.grad, None
        layer(x).sum().backward()
        assert relative(got, x.grad.double()) < 4e-6
    exported = torch.export.export(layer.eval(), (torch.randn(5, 20),), dynamic_shapes=({0: torch.export.Dim("m", min=2)},))
    x = torch.randn(9, 20)
    assert relative(exported.module()(x), truth(layer, x)) < 2e-6


def test_meta_device():
    layer = LoTRLinear(20, 14, 3, device="meta")
    assert layer.core.is_meta and layer.factors.A.is_meta and layer.weight.is_meta
