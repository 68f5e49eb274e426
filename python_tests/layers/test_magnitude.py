"""Magnitudes (DoRA): numbers and gradients against the reference and plain autograd, and the start."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lotr_ext import LoTRConv1D, LoTRFactors, LoTRLinear, LoTRWrapped, explain, lotr_linear, reference
from lotr_ext.autograd.magnitude import Norms
from nets import relative

EPSILON = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def layer_of(k: int = 20, n: int = 14, rank=3, dtype: torch.dtype = torch.float32, **settings) -> LoTRLinear:
    """A layer with magnitudes, all of whose parts differ from where they start."""
    layer = LoTRLinear(k, n, None if "factors" in settings else rank, dtype=dtype, magnitude=True, **settings)
    return moved(layer)


def moved(layer: LoTRLinear) -> LoTRLinear:
    nn.init.normal_(layer.core, 0, 0.5)
    with torch.no_grad():
        layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)
    return layer


def dense(layer: LoTRLinear, x: Tensor) -> Tensor:
    """The layer by plain autograd."""
    full = layer.weight + layer.scaling * layer.factors.B @ layer.core.T @ layer.factors.A.T
    plain = x @ layer.weight.T + layer.scaling * x @ layer.factors.A @ layer.core @ layer.factors.B.T
    y = plain * (layer.magnitude / full.norm(dim=1).detach())
    return y if layer.bias is None else y + layer.bias


def parameters_of(*layers: LoTRLinear) -> list[Tensor]:
    return list(dict.fromkeys(p for layer in layers for p in layer.adapter_parameters()))


@pytest.mark.parametrize("rank", [3, (17, 2)], ids=str)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (), (0,), (200,)], ids=str)
def test_forward_and_backward(either_path, shape, bias, dtype, rank):
    layer = layer_of(rank=rank, dtype=dtype, bias=bias, scaling=0.7)
    x = torch.randn(*shape, 20, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape, 14)
    g = torch.randn_like(y)
    y.backward(g)
    W, A, B, core, m = (
        t.detach().double() for t in (layer.weight, layer.factors.A, layer.factors.B, layer.core, layer.magnitude)
    )
    wide, flat = x.detach().double().reshape(-1, 20), g.double().reshape(-1, 14)
    want = reference.forward(wide, W, layer.bias.detach().double() if bias else None, A, B, core, 0.7, magnitude=m)
    gradients, dm = reference.backward_with_magnitude(flat, wide, W, A, B, core, 0.7, m)
    assert relative(y, want.view(y.shape)) < EPSILON[dtype]
    assert relative(x.grad, gradients.dx.view(x.shape)) < EPSILON[dtype]
    got = (layer.factors.A, layer.factors.B, layer.core, layer.magnitude)
    for parameter, gradient in zip(got, (*gradients[1:4], dm), strict=True):
        assert parameter.grad.dtype == parameter.dtype and relative(parameter.grad, gradient) < 4 * EPSILON[dtype]


def test_the_reference_is_the_gradient_of_its_forward():
    x, W, A, B, core, m = (torch.rand(*s, dtype=torch.float64) for s in ((5, 7), (6, 7), (7, 2), (6, 3), (2, 3), (6,)))
    tensors = [t.requires_grad_() for t in (x, A, B, core, m)]
    y = reference.forward(x, W, None, A, B, core, 0.5, magnitude=m)
    g = torch.randn_like(y)
    with torch.no_grad():
        want, dm = reference.backward_with_magnitude(g, x, W, A, B, core, 0.5, m)
    for got, gradient in zip(torch.autograd.grad(y, tensors, g), (*want[:4], dm), strict=True):
        assert relative(got, gradient) < 1e-12


@pytest.mark.parametrize("tokens", [4, 200])
@pytest.mark.parametrize("frozen", ["", "A", "B", "core", "magnitude", "x", "all but magnitude"])
def test_each_part_may_be_frozen(tokens, frozen):
    layer = layer_of(dtype=torch.float64)
    parts = {"A": layer.factors.A, "B": layer.factors.B, "core": layer.core, "magnitude": layer.magnitude}
    parts["x"] = torch.randn(tokens, 20, dtype=torch.float64)
    for name, part in parts.items():
        part.requires_grad_(name == "magnitude" if frozen == "all but magnitude" else name != frozen)
    wanted = [part for part in parts.values() if part.requires_grad]
    got, want = (torch.autograd.grad(f(parts["x"]).sin().sum(), wanted) for f in (layer, lambda x: dense(layer, x)))
    assert all(relative(a, b) < 1e-12 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("tokens", [4, 200])
@pytest.mark.parametrize("around", ["nothing", "checkpoint", "selective checkpoint", "twice"])
def test_siblings_against_plain_autograd(tokens, around):
    """Two layers on one pair and one x, also recomputed, or differentiated twice."""
    twice = around == "twice"
    factors = LoTRFactors(20, 14, 3, dtype=torch.float64)
    layers = [layer_of(dtype=torch.float64, factors=factors, scaling=0.7) for _ in range(2)]
    x = torch.randn(tokens, 20, dtype=torch.float64, requires_grad=True)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    how = {"context_fn": lambda: create_selective_checkpoint_contexts(kept)} if around.startswith("selective") else {}
    inputs = [*parameters_of(*layers), x]

    def gradients(call) -> list[Tensor]:
        first = torch.autograd.grad(sum(call(layer).sin().sum() for layer in layers), inputs, create_graph=twice)
        return torch.autograd.grad(sum(t.square().sum() for t in first), inputs) if twice else first

    again = "checkpoint" in around
    got = gradients(lambda layer: checkpoint(layer, x, use_reentrant=False, **how) if again else layer(x))
    for a, b in zip(got, gradients(lambda layer: dense(layer, x)), strict=True):
        assert relative(a, b) < 1e-11


def test_twice_where_a_magnitude_is_zero():
    """That row's gradients are those of the formula, but that of its magnitude, which is defined as zero."""
    layer = layer_of(dtype=torch.float64)
    live = torch.ones(14, dtype=torch.bool)
    live[[3, 13]] = False
    with torch.no_grad():
        layer.magnitude[~live] = 0.0
    x = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 14, dtype=torch.float64, requires_grad=True)
    inputs = [*parameters_of(layer), x]

    def gradients(call) -> list[Tensor]:
        first = dict(zip(inputs, torch.autograd.grad(call(x).sin(), inputs, g, create_graph=True)))
        first[layer.magnitude] = first[layer.magnitude] * live
        second = torch.autograd.grad(sum(t.sin().sum() for t in first.values()), [*inputs, g])
        return [*first.values(), *second]

    for got, want in zip(gradients(layer), gradients(lambda x: dense(layer, x)), strict=True):
        assert relative(got, want) < 1e-11


@pytest.mark.parametrize("core", [True, False], ids=["core trained", "magnitude alone"])
def test_the_gradient_of_a_magnitude_does_not_depend_on_it(core):
    """dm of a linear loss has no graph to m, as in plain torch: a double backward gives m no gradient of rounding errors."""
    layer, x = layer_of(dtype=torch.float64), torch.randn(5, 20, dtype=torch.float64)
    layer.factors.requires_grad_(False)
    layer.core.requires_grad_(core)
    (dm,) = torch.autograd.grad(layer(x).mean(), layer.magnitude, create_graph=True)
    assert dm.requires_grad == core
    if core:
        of_core, of_m = torch.autograd.grad(dm.square().sum(), (layer.core, layer.magnitude), allow_unused=True)
        (plain,) = torch.autograd.grad(dense(layer, x).mean(), layer.magnitude, create_graph=True)
        assert of_m is None
        assert relative(of_core, torch.autograd.grad(plain.square().sum(), layer.core)[0]) < 1e-12


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_a_magnitude_may_change_before_backward(twice):
    """No gradient depends on its value, as none does in plain torch."""
    layer, x = layer_of(dtype=torch.float64), torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
    inputs = [*parameters_of(layer), x]

    def gradients(call, change: bool) -> list[Tensor]:
        y = call(x).sin().sum()
        with torch.no_grad():
            layer.magnitude.add_(1.0 if change else 0.0)
        first = torch.autograd.grad(y, inputs, create_graph=twice)
        return torch.autograd.grad(sum(t.square().sum() for t in first), inputs) if twice else first

    wanted = gradients(lambda x: dense(layer, x), False)
    for got, want in zip(gradients(layer, True), wanted, strict=True):
        assert relative(got, want) < 1e-11


def test_a_made_magnitude_that_changes_raises_twice():
    layer, x = layer_of(dtype=torch.float64), torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
    m = layer.magnitude * 2
    parts = (layer.weight, layer.bias, layer.factors.A, layer.factors.B, layer.core, layer.scaling)
    y = lotr_linear(x, *parts, magnitude=m)
    m.mul_(2)
    torch.autograd.grad(y.sum(), layer.magnitude, retain_graph=True)
    with pytest.raises(RuntimeError, match="magnitude: expected it as it was"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_parametrized():
    layer, x = layer_of(dtype=torch.float64), torch.randn(5, 20, dtype=torch.float64)
    torch.nn.utils.parametrize.register_parametrization(layer, "magnitude", nn.Softplus())
    inputs = parameters_of(layer)
    assert len(inputs) == 4 and any(p is layer.parametrizations.magnitude.original for p in inputs)
    got, want = (torch.autograd.grad(f(x).sin().sum(), inputs) for f in (layer, lambda x: dense(layer, x)))
    assert all(relative(a, b) < 1e-12 for a, b in zip(got, want, strict=True))


def test_a_checkpoint_in_a_selective_one():
    """The inner region is computed again where the outer one's mode is off: it must save as many tensors."""
    layer = layer_of(dtype=torch.float64)
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    how = {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts([])}
    y = checkpoint(lambda x: checkpoint(layer, x, use_reentrant=False).sin(), x, **how)
    inputs = [*parameters_of(layer), x]
    for got, want in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(dense(layer, x).sin().sum(), inputs)):
        assert relative(got, want) < 1e-12


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_a_checkpoint_computes_all_of_the_parameters_as_they_are_in_backward(twice):
    """Also the lengths c: as in plain torch, no value of the first forward is left."""
    layer = layer_of(dtype=torch.float64)
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    inputs = [*parameters_of(layer), x]
    y = checkpoint(layer, x, use_reentrant=False)
    with torch.no_grad():
        layer.factors.A.mul_(0.5)
        layer.magnitude.mul_(2.0)
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, g, create_graph=twice)
    for a, b in zip(got, torch.autograd.grad(dense(layer, x), inputs, g), strict=True):
        assert relative(a, b) < 1e-12


def test_reentrant_checkpoint():
    layer = layer_of(dtype=torch.float64)
    x = torch.randn(200, 20, dtype=torch.float64, requires_grad=True)
    checkpoint(layer, x, use_reentrant=True).sin().sum().backward()
    for t, want in zip(
        (*parameters_of(layer), x), torch.autograd.grad(dense(layer, x).sin().sum(), [*parameters_of(layer), x])
    ):
        assert relative(t.grad, want) < 1e-12


def test_functorch_and_forward_mode():
    layer = layer_of(dtype=torch.float64)
    x, v = torch.randn(2, 5, 20, dtype=torch.float64).unbind()
    got, want = (torch.func.grad(lambda x, f=f: f(x).sin().sum())(x) for f in (layer, lambda x: dense(layer, x)))
    assert relative(got, want) < 1e-12
    got, want = (torch.func.jvp(f, (x,), (v,))[1] for f in (layer, lambda x: dense(layer, x)))
    assert relative(got, want) < 1e-12


def test_compiled_whole():
    layer, x = layer_of(), torch.randn(200, 20, requires_grad=True)
    got, want = (
        torch.autograd.grad(f(x).float().sin().sum(), [*parameters_of(layer), x])
        for f in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer)
    )
    assert all(relative(a, b) < 4e-6 for a, b in zip(got, want, strict=True))


def test_autocast():
    layer = layer_of()
    x = torch.randn(200, 20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and relative(y, dense(layer, x)) < 2e-2
    y.float().sin().sum().backward()
    assert relative(layer.magnitude.grad, torch.autograd.grad(dense(layer, x).sin().sum(), layer.magnitude)[0]) < 2e-2


def test_a_changed_output_raises_where_its_gradient_needs_it():
    layer, x = layer_of(), torch.randn(4, 20, requires_grad=True)
    y = layer(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match=r"inplace operation.*nn\.ReLU\(inplace=False\)"):
        y.sum().backward()
    layer.magnitude.requires_grad_(False)
    y = layer(x)
    y.mul_(2)
    y.sum().backward()
    assert relative(x.grad, torch.autograd.grad(2 * dense(layer, x).sum(), x)[0]) < 1e-6


def test_a_changed_bias_raises_where_the_gradient_of_the_magnitude_needs_it():
    layer, x = layer_of(), torch.randn(4, 20, requires_grad=True)
    want = torch.autograd.grad(dense(layer, x).sum(), x)[0]
    y = layer(x)
    with torch.no_grad():
        layer.bias.add_(1.0)
    assert relative(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], want) < 1e-6
    with pytest.raises(RuntimeError, match=r"inplace operation.*its output and its bias"):
        y.sum().backward()


# ---- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [3, 200])
def test_first_output_is_that_of_the_base(tokens):
    layer = LoTRLinear(20, 14, 3, magnitude=True)
    x = torch.randn(tokens, 20)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight) + layer.bias)
    assert relative(layer.magnitude, layer.weight.norm(dim=1)) < 1e-6


def test_reset_magnitude_gives_the_layer_without_magnitudes():
    layer = layer_of(dtype=torch.float64)
    with torch.no_grad():
        layer.weight.normal_()
    layer.reset_magnitude()
    assert relative(layer.magnitude, layer.weight.add(layer.delta_weight()).norm(dim=1)) < 1e-12
    with pytest.raises(RuntimeError, match="reset_magnitude: expected"):
        LoTRLinear(4, 4, 2).reset_magnitude()


def test_rows_of_zeros_are_finite():
    linear = nn.Linear(20, 14)
    nn.init.zeros_(linear.weight[3])
    layer = LoTRLinear.from_linear(linear, LoTRFactors(20, 14, 3), magnitude=True)
    x = torch.randn(5, 20)
    y = layer(x)
    y.sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(p.grad).all() for p in parameters_of(layer))


@pytest.mark.parametrize("k", [1, 20])
def test_rows_that_nearly_cancel(k):
    """|W_n|^2 + 2 F_n (W A)_n + F_n (A^T A) F_n^T has then lost all digits of c_n^2."""
    layer = layer_of(k=k)
    with torch.no_grad():
        layer.weight[::3] = -layer.delta_weight()[::3] + 1e-3 * torch.randn_like(layer.weight[::3])
    full = layer.weight.double() + layer.scaling * (layer.factors.B @ layer.core.T).double() @ layer.factors.A.double().T
    x = torch.randn(6, k)
    want = layer.magnitude / full.norm(dim=1) * (x.double() @ full.T) + layer.bias
    assert relative(layer(x), want) < 1e-3
    compiled = torch.compile(layer, backend="eager")(x)  # looks at no values
    assert compiled.isfinite().all() and (relative(compiled, want) < 1e-3 or k > 1)


def test_a_quantised_weight_is_made_dense_once_for_rows_that_nearly_cancel():
    codes, calls = torch.randint(1, 9, (6, 5), dtype=torch.int8), []
    W = codes.float()

    def matrix() -> Tensor:
        calls.append(1)
        return codes.float()

    found = Norms().rows(torch.ones(6), codes, matrix, torch.eye(5), -0.999 * W, torch.eye(5), 1.0)
    assert len(calls) == 1 and relative(found.norm, (0.001 * W.double()).norm(dim=1)) < 1e-3


def test_layers_of_other_kinds():
    """Around another module, and in a Conv1D's place."""
    from transformers.pytorch_utils import Conv1D

    x, factors = torch.randn(6, 20), LoTRFactors(20, 14, 3)
    linear, conv = nn.Linear(20, 14), Conv1D(14, 20)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    layers = [
        moved(kind.from_linear(copy.deepcopy(base), factors, magnitude=True))
        for kind, base in ((LoTRLinear, linear), (LoTRWrapped, linear), (LoTRConv1D, conv))
    ]
    for layer in layers[1:]:
        layer.core.data.copy_(layers[0].core)
        layer.magnitude.data.copy_(layers[0].magnitude)
        got, want = (torch.autograd.grad(f(x).sin().sum(), f.magnitude)[0] for f in (layer, layers[0]))
        assert relative(layer(x), layers[0](x)) < 2e-6 and relative(got, want) < 1e-5


@pytest.mark.parametrize("base", [nn.Linear(20, 14, device="meta"), nn.Identity()], ids=["meta", "no weight"])
def test_layers_whose_rows_cannot_be_measured_are_refused(base):
    base.in_features, base.out_features = 20, 14
    with pytest.raises(ValueError, match="magnitude: expected"):
        LoTRWrapped.from_linear(base, LoTRFactors(20, 14, 3, device="meta"), magnitude=True)


# ---- lotr_linear -----------------------------------------------------------------------------------------------------


def test_lotr_linear_with_magnitude():
    layer = layer_of(dtype=torch.float64)
    x = torch.randn(5, 20, dtype=torch.float64)
    parts = (layer.weight, layer.bias, layer.factors.A, layer.factors.B, layer.core, layer.scaling)
    assert relative(lotr_linear(x, *parts, magnitude=layer.magnitude), dense(layer, x)) < 1e-12
    with pytest.raises(ValueError, match="magnitude: expected shape"):
        lotr_linear(x, *parts, magnitude=layer.magnitude[:-1])
    cores = layer.core.unsqueeze(0)
    with pytest.raises(ValueError, match="magnitude: expected None with core_index"):
        lotr_linear(x, *parts[:4], cores, 1.0, core_index=torch.zeros(5, dtype=torch.int64), magnitude=layer.magnitude)


def test_explain_names_the_scaling():
    x = torch.randn(5, 20)
    assert "LoTRMagnitude" in explain(layer_of(), x).why and "LoTRMagnitude" not in explain(LoTRLinear(20, 14, 3), x).why
