"""lotr_grouped_linear and LoTRExperts against the experts written out, one product a row, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRExperts, LoTRFactors, LoTRLinear, lotr_grouped_linear
from lotr_ext.ops import grouped
from nets import relative

EPSILON = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TOKENS, EXPERTS, K, N, RANK = 150, 5, 13, 9, (4, 3)
OFFS = torch.tensor([10, 10, 130, 201, 260], dtype=torch.int32)  # expert 1 has no rows
ROWS = int(OFFS[-1])
EXPERT = [0] * 10 + [2] * 120 + [3] * 71 + [4] * 59


def case(dtype: torch.dtype, *, sent: bool, wide: torch.dtype | None = None) -> dict[str, Tensor]:
    """sent: x has a row a token, and rows say whose they are."""
    gen = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=gen)  # noqa: E731
    adapter = {"A": draw(K, RANK[0]), "B": draw(N, RANK[1]), "cores": draw(EXPERTS, *RANK)}
    found = {"x": draw(TOKENS if sent else ROWS, K), "weight": draw(EXPERTS, N, K), "bias": draw(EXPERTS, N)}
    found = {name: t.to(dtype) for name, t in found.items()} | {name: t.to(wide or dtype) for name, t in adapter.items()}
    for name in ("x", "A", "B", "cores"):
        found[name].requires_grad_()
    found["tokens"] = torch.randint(0, TOKENS, (ROWS,), generator=gen) if sent else None
    return found


def written_out(x, weight, bias, A, B, cores, tokens, scaling: float) -> Tensor:
    """Row by row."""
    rows = range(ROWS) if tokens is None else tokens.tolist()
    return torch.stack([weight[c] @ x[t] + bias[c] + scaling * (B @ (cores[c].T @ (A.T @ x[t]))) for t, c in zip(rows, EXPERT)])


def doubled(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_(t.requires_grad)
        for name, t in given.items()
    }


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("sent", [True, False], ids=["by token", "sorted"])
def test_numbers_and_gradients(either_path, dtype, sent):
    given = case(dtype, sent=sent)
    y = lotr_grouped_linear(offs=OFFS, scaling=0.7, **given)
    g = torch.randn_like(y)
    y.backward(g)
    truth = doubled(given)
    want = written_out(scaling=0.7, **truth)
    want.backward(g.double())
    assert y.dtype == dtype and relative(y, want) < EPSILON[dtype]
    for name in ("x", "A", "B", "cores"):
        assert relative(given[name].grad, truth[name].grad) < 2 * EPSILON[dtype], name
        assert given[name].grad.dtype == dtype


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_adapter_beside_half_precision_and_autocast(half):
    given = case(half, sent=True, wide=torch.float32)
    y = lotr_grouped_linear(offs=OFFS, scaling=0.7, **given)
    y.sum().backward()
    truth = doubled(given)
    written_out(scaling=0.7, **truth).sum().backward()
    assert all(given[name].grad.dtype == torch.float32 for name in ("A", "B", "cores"))
    assert all(relative(given[n].grad, truth[n].grad) < 2 * EPSILON[half] for n in ("x", "A", "B", "cores"))
    wide = case(torch.float32, sent=True)
    with torch.autocast("cpu", half):
        cast = lotr_grouped_linear(offs=OFFS, scaling=0.7, **wide)
    assert cast.dtype == half and relative(cast, written_out(scaling=0.7, **doubled(wide))) < 2 * EPSILON[half]


def test_a_scaling_comes_last_in_float16(either_path):
    """s u G leaves the range, y and the gradients do not."""
    given = case(torch.float16, sent=True)
    with torch.no_grad():
        given["cores"] *= 30
        given["B"] *= 1e-4
        given["weight"].zero_()
    y = lotr_grouped_linear(offs=OFFS, scaling=4000.0, **given)
    g = 5e-4 * torch.randn_like(y)
    y.backward(g)
    truth = doubled(given)
    want = written_out(scaling=4000.0, **truth)
    want.backward(g.double())
    assert (4000 * truth["x"] @ truth["A"] @ truth["cores"][0]).abs().max() > torch.finfo(torch.float16).max
    assert relative(y, want) < 0.01 and all(relative(given[n].grad, truth[n].grad) < 0.02 for n in ("x", "A", "B", "cores"))


def test_a_trained_base_twice_differentiable_and_in_any_layout():
    given = case(torch.float64, sent=True)
    given["weight"] = given["weight"].mT.contiguous().requires_grad_()  # as GPT-OSS stores it
    given["bias"].requires_grad_()
    inputs = [given[name] for name in ("x", "weight", "bias", "A", "B", "cores")]
    small = torch.tensor([2, 2, 5, 6, 7], dtype=torch.int32)

    def f(x, weight, bias, A, B, cores):
        return lotr_grouped_linear(x[:4], weight.mT, small, A, B, cores, 0.7, bias=bias, tokens=given["tokens"][:7] % 4)

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    small_inputs = [
        t.detach()[:, :2, :2].requires_grad_() if t.dim() == 3 else t.detach()[:4, :2].requires_grad_() for t in inputs
    ]
    small_inputs[2] = torch.ones(EXPERTS, 2, dtype=torch.float64, requires_grad=True)
    small_inputs[3], small_inputs[4] = (torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(f, small_inputs, fast_mode=True)


def test_rows_of_nobody_and_no_rows():
    given = case(torch.float32, sent=True)
    y = lotr_grouped_linear(offs=OFFS.clamp(max=200), scaling=0.7, **given)
    whole = lotr_grouped_linear(offs=OFFS, scaling=0.7, **given)
    assert torch.equal(y[:200], whole[:200])
    given["tokens"] = given["tokens"][:0]
    assert lotr_grouped_linear(offs=OFFS * 0, scaling=0.7, **given).shape == (0, N)


def padded(given: dict[str, Tensor], rows: int, filler: float) -> dict[str, Tensor]:
    """The same case with `rows` rows behind it that belong to no expert, and as many tokens that no row is of."""
    found = dict(given)
    found["x"] = torch.cat((given["x"].detach(), torch.full((rows, K), filler, dtype=given["x"].dtype))).requires_grad_()
    if given["tokens"] is not None:
        found["tokens"] = torch.cat((given["tokens"], torch.full((rows,), -(2**62))))
    for name in ("A", "B", "cores"):
        found[name] = given[name].detach().clone().requires_grad_()
    return found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("sent", [True, False], ids=["by token", "sorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_no_expert_are_not_read(either_path, dtype, sent, compiled):
    """They hold NaN, in x, in tokens and in the output's gradient: nothing else has any, and they are zero."""
    given = case(dtype, sent=sent)
    f = torch.compile(lotr_grouped_linear, backend="aot_eager") if compiled else lotr_grouped_linear
    found, pad = padded(given, 7, float("nan")), torch.full((7, N), float("nan"), dtype=dtype)
    want, y = lotr_grouped_linear(offs=OFFS, scaling=0.7, **given), f(offs=OFFS, scaling=0.7, **found)
    g = torch.randn_like(want)
    want.backward(g), y.backward(torch.cat((g, pad)))
    assert not y[ROWS:].any() and relative(y[:ROWS], want.double()) < EPSILON[dtype]
    grad = found["x"].grad
    assert not grad[len(given["x"]) :].any() and relative(grad[: len(given["x"])], given["x"].grad.double()) < EPSILON[dtype]
    assert all(relative(found[n].grad, given[n].grad.double()) < EPSILON[dtype] for n in ("A", "B", "cores"))


@pytest.mark.parametrize("sent", [True, False], ids=["by token", "sorted"])
def test_rows_of_no_expert_in_a_second_derivative(sent):
    second = {}
    given = case(torch.float64, sent=sent)
    for name, inputs in (("plain", given), ("padded", padded(given, 7, float("nan")))):
        wanted = [inputs[n] for n in ("x", "A", "B", "cores")]
        y = lotr_grouped_linear(offs=OFFS, scaling=0.7, **inputs)
        first = torch.autograd.grad(y[:ROWS].square().sum(), wanted, create_graph=True)
        second[name] = torch.autograd.grad(sum(t.sin().sum() for t in first), wanted)
    for a, b in zip(second["plain"], second["padded"]):
        assert not b[len(a) :].any() and torch.allclose(a, b[: len(a)], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("state", ["enabled", "disabled", "merged"])
def test_rows_of_no_expert_in_the_module(state):
    layer, x, nan = experts(), torch.randn(ROWS + 5, K), float("nan")
    x[ROWS:] = nan
    if state == "disabled":
        layer.disabled = True
    if state == "merged":
        layer.merge()
    y = layer(x, OFFS)
    assert not y[ROWS:].any() and torch.equal(y[:ROWS], layer(x[:ROWS], OFFS))
    assert not layer(x, OFFS * 0).any() and layer(x[:0], OFFS * 0, tokens=torch.tensor([3, 4])).shape == (2, N)
    for bad in (-1, len(x)):
        with pytest.raises(ValueError, match=rf"tokens: expected rows of x in \[0, {len(x)}\), got {bad} in row 1"):
            layer(x, OFFS.clamp(max=2), tokens=torch.tensor([0, bad]))


@pytest.mark.parametrize("sent", [True, False], ids=["by token", "sorted"])
def test_functorch_and_forward_mode(sent):
    given = case(torch.float64, sent=sent)
    tangents = {name: torch.randn_like(given[name]) for name in ("x", "A", "B", "cores")}
    values = {name: given.pop(name).detach() for name in tangents}

    def ours(moved):
        return lotr_grouped_linear(offs=OFFS, scaling=0.7, **given, **moved)

    def truth(moved):
        return written_out(scaling=0.7, **given, **moved)

    (_, found), (_, want) = (torch.func.jvp(f, (values,), (tangents,)) for f in (ours, truth))
    assert relative(found, want) < 1e-12
    found, want = (torch.func.grad(lambda moved, f=f: f(moved).sin().sum())(values) for f in (ours, truth))
    assert all(relative(found[name], want[name]) < 1e-12 for name in tangents)
    twice, in_dims = torch.stack([OFFS, OFFS * 0 + ROWS]), (dict.fromkeys(values), 0)
    many = torch.vmap(lambda moved, offs: lotr_grouped_linear(offs=offs, scaling=0.7, **given, **moved), in_dims)(values, twice)
    each = [lotr_grouped_linear(offs=offs, scaling=0.7, **given, **values) for offs in twice]
    assert relative(many, torch.stack(each)) < 1e-12


def test_the_grouped_operators():
    x, weight = torch.randn(260, K), torch.randn(EXPERTS, N, K)
    for operator, args in ((grouped.grouped_mm, (x, weight, OFFS)), (grouped.grouped_outer, (torch.randn(260, N), x, OFFS))):
        args = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in args)
        torch.library.opcheck(operator, args)
    y = grouped.grouped_mm(x, weight, OFFS.clamp(max=200))
    assert not y[200:].any() and torch.equal(y[:10], x[:10] @ weight[0].T)


# ---- the module ------------------------------------------------------------------------------------------------------


def experts(
    dtype: torch.dtype = torch.float32, factors: LoTRFactors | None = None, random: bool = True, **settings
) -> LoTRExperts:
    torch.manual_seed(1)
    layer = LoTRExperts(EXPERTS, K, N, None if factors else RANK, bias=True, factors=factors, dtype=dtype, **settings)
    if random:
        nn.init.normal_(layer.core, 0, 0.5)
        nn.init.normal_(layer.bias)
    return layer


def parts(layer: LoTRExperts) -> dict[str, Tensor]:
    return {"weight": layer.weight, "bias": layer.bias, "A": layer.factors.A, "B": layer.factors.B, "cores": layer.core}


def test_the_module_starts_as_the_plain_product_and_trains_the_adapter_alone():
    layer, given = experts(random=False), case(torch.float32, sent=True)
    x, tokens = given["x"], given["tokens"]
    y = layer(x, OFFS, tokens)
    assert torch.equal(y, grouped.grouped_linear(x[tokens], layer.weight, OFFS, layer.bias, None))
    y.sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and layer.core.grad.abs().sum() > 0
    assert layer.core.shape == (EXPERTS, *RANK) and not layer.core.any() and not layer.core.grad[1].any()
    layer.core.data.normal_()
    assert relative(layer(x, OFFS, tokens), written_out(x=x, tokens=tokens, scaling=layer.scaling, **parts(layer))) < 4e-6


def test_merged_into_the_weight_and_exactly_out_of_it():
    layer, given = experts(), case(torch.float32, sent=False)
    x, before = given["x"].detach(), layer.weight.detach().clone()
    y = layer(x, OFFS)
    delta = torch.stack([layer.scaling * layer.factors.B @ core.T @ layer.factors.A.T for core in layer.core])
    assert relative(layer.delta_weight(), delta) < 1e-6
    layer.merge(safe=True)
    with torch.no_grad():
        assert relative(layer(x, OFFS), y) < 4e-6 and relative(layer.weight, before + delta) < 1e-6
    with pytest.raises(RuntimeError, match="state_dict: expected an unmerged layer"):
        layer.state_dict()
    layer.unmerge()
    assert torch.equal(layer.weight, before) and torch.equal(layer(x, OFFS), y)
    layer.disabled = True
    assert torch.equal(layer(x, OFFS), grouped.grouped_linear(x, before, OFFS, layer.bias, None))
    twin = experts(random=False)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x, OFFS), y)


class HandWritten(nn.Module):
    """Two mixtures' matrices and a linear layer over the same factors, called on the same x."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.factors = LoTRFactors(K, N, RANK, dtype=dtype)
        self.one, self.other = (experts(dtype, self.factors) for _ in range(2))
        self.linear = LoTRLinear(K, N, factors=self.factors, dtype=dtype)
        nn.init.normal_(self.linear.core)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return torch.tanh(self.one(x, OFFS, tokens)) * self.other(x, OFFS, tokens) + self.linear(x)[tokens]


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_factors_shared_with_linear_layers(reentrant):
    model, given = HandWritten(torch.float64), case(torch.float64, sent=True)
    x, tokens = given["x"], given["tokens"]
    y = model(x, tokens) if reentrant is None else checkpoint(model, x, tokens, use_reentrant=reentrant)
    y.square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    model.zero_grad()
    x.grad = None
    one, other = (written_out(x=x, tokens=tokens, scaling=1.0, **parts(layer)) for layer in (model.one, model.other))
    line = model.linear
    plain = x @ (line.weight + model.factors.B @ line.core.T @ model.factors.A.T).T + line.bias
    (torch.tanh(one) * other + plain[tokens]).square().sum().backward()
    for name, parameter in {**dict(model.named_parameters()), "x": x}.items():
        if parameter.requires_grad:
            assert relative(got[name], parameter.grad) < 1e-11, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(dtype):
    layer, given = experts(dtype), case(dtype, sent=True)
    x, tokens = given["x"].detach(), given["tokens"]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x, OFFS, tokens).sum().backward()
    got = layer.core.grad.clone()
    layer.zero_grad()
    y = layer(x, OFFS, tokens)
    y.sum().backward()
    assert relative(compiled(x, OFFS, tokens), y) < EPSILON[dtype] and relative(got, layer.core.grad) < 2 * EPSILON[dtype]


def test_dropout_is_drawn_once_a_token_and_copies_stand_alone():
    layer, given = experts(dropout=0.5), case(torch.float32, sent=True)
    x, tokens = given["x"].detach(), given["tokens"]
    kept = layer(x, OFFS, tokens) - grouped.grouped_linear(x[tokens], layer.weight, OFFS, layer.bias, None)
    assert not torch.allclose(
        kept, layer(x, OFFS, tokens) - grouped.grouped_linear(x[tokens], layer.weight, OFFS, layer.bias, None)
    )
    clone = copy.deepcopy(layer.eval())
    clone.core.data.zero_()
    assert relative(layer(x, OFFS, tokens), written_out(x=x, tokens=tokens, scaling=1.0, **parts(layer))) < 4e-6
    assert not torch.equal(layer(x, OFFS, tokens), clone(x, OFFS, tokens))


BAD = {
    "offs that do not ascend": ({"offs": [10, 9, 130, 201, 260]}, ValueError, r"offs: expected ascending ends in \[0, 260\]"),
    "offs beyond the rows": ({"offs": [10, 10, 130, 201, 261]}, ValueError, r"offs: expected ascending ends in \[0, 260\]"),
    "other offs": ({"offs": [10, 10, 260]}, ValueError, r"offs: expected one end per expert, shape \(5,\), got \(3,\)"),
    "offs of int64": ({"offs": OFFS.long()}, TypeError, r"offs: expected a tensor of torch\.int32, got torch\.int64"),
    "tokens of int32": ({"tokens": torch.zeros(260, dtype=torch.int32)}, TypeError, "tokens: expected a tensor of torch.int64"),
    "a token too many": ({"tokens": torch.full((260,), 150)}, ValueError, r"tokens: expected rows of x in \[0, 150\), got 150"),
    "cores of another rank": (
        {"cores": torch.ones(5, 4, 4)},
        ValueError,
        r"cores: expected shape \[5, 4, 3\], got \(5, 4, 4\)",
    ),
    "cores of other experts": (
        {"cores": torch.ones(4, 4, 3)},
        ValueError,
        r"cores: expected shape \[5, 4, 3\], got \(4, 4, 3\)",
    ),
    "a bias of other experts": ({"bias": torch.ones(4, N)}, ValueError, r"bias: expected shape \[5, 9\], got \(4, 9\)"),
    "a weight of another width": ({"weight": torch.ones(5, N, 7)}, ValueError, r"x: expected shape \[m, 7\], got \(150, 13\)"),
    "a matrix for a weight": ({"weight": torch.ones(N, K)}, ValueError, r"weight: expected shape \[e, n, k\], got \(9, 13\)"),
    "a weight of bytes": ({"weight": torch.ones(5, N, K, dtype=torch.uint8)}, TypeError, "weight: expected a floating dtype"),
    "a half weight": (
        {"weight": torch.ones(5, N, K).half()},
        TypeError,
        r"weight: expected x's dtype torch.float32, got torch.float16",
    ),
    "no tensor": ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    "a scaling that is none": ({"scaling": float("nan")}, ValueError, "scaling: expected a finite number"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    given = {"offs": OFFS, "scaling": 0.7, **case(torch.float32, sent=True), **change}
    given["offs"] = torch.as_tensor(given["offs"], dtype=None if isinstance(given["offs"], Tensor) else torch.int32)
    with pytest.raises(error, match=message):
        lotr_grouped_linear(**given)


def test_bad_modules():
    with pytest.raises(ValueError, match=r"factors: expected \(in_features, out_features\) = \(13, 9\), got \(9, 13\)"):
        LoTRExperts(EXPERTS, K, N, factors=LoTRFactors(N, K, 2))
    with pytest.raises(ValueError, match="num_experts: expected at least 1, got 0"):
        LoTRExperts(0, K, N)
    with pytest.raises(TypeError, match=r"weight: expected a plain nn\.Parameter, got Tensor"):
        LoTRExperts.from_weight(torch.ones(5, N, K), LoTRFactors(K, N, 2))
    with pytest.raises(ValueError, match=r"bias: expected shape \[5, 9\], got \(4, 9\)"):
        LoTRExperts.from_weight(nn.Parameter(torch.ones(5, N, K)), LoTRFactors(K, N, 2), bias=nn.Parameter(torch.ones(4, N)))
    layer = experts()
    layer.disabled = True
    with pytest.raises(ValueError, match="offs: expected ascending ends"):
        layer(torch.ones(ROWS, K), OFFS.flip(0))
    with pytest.raises(TypeError, match="to_base: expected a layer with a plain form, got LoTRExperts"):
        layer.to_base()
