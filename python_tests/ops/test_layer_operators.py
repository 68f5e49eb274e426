"""The operators that run one direction of a whole layer on a CPU (csrc/torch/layer.h), against `reference` in float64,
and against the single operators that they are made of."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch import Tensor
from toys import Seen

from lotr_ext import ops, reference
from nets import relative

# Of |got - truth| / |truth|: each operand is rounded to the dtype once (the eager formula does no better), sums are wider.
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
SHAPES = [(7, 24, 17, 4, 3), (1, 33, 8, 1, 5), (130, 64, 48, 16, 16), (300, 50, 70, 33, 20), (3, 768, 96, 16, 16)]
S = 0.7


def layer_forward(x, weight, bias, A, B, core, s, beta, u=None, F=None, p=0.0, seed=None):
    """y, and u and F where they are new."""
    y, new_u, new_F = ops.layer_forward(x, weight, bias, A, B, core, s, beta, u=u, F=F, p=p, seed=seed)
    return y, None if u is not None else new_u, None if F is not None else new_F


def layer_backward_(g, weight, x, u, A, F, B, core, s, beta, k, dx, Q, dA, dB, need_B, need_core, p=0.0, seed=None):
    sums = {"k": k, "dx": dx, "Q": Q, "dA": dA, "dB": dB, "need_B": need_B, "need_core": need_core, "p": p, "seed": seed}
    return ops.layer_backward(g, weight, x, u, A, F, B, core, s, beta, **sums)


def small_layer_forward(x, weight, bias, A, B, core, s, beta):
    y, u, F = ops.layer_forward(x, weight, bias, A, B, core, s, beta, True)
    assert F is None
    return y, u


def small_layer_backward_(g, weight, x, u, A, B, core, s, beta, dA, dB, need_B, need_core):
    sums = {"dA": dA, "dB": dB, "need_B": need_B, "need_core": need_core}
    dx, k, *rest = ops.layer_backward(g, weight, x, u, A, None, B, core, s, beta, True, **sums)
    assert k is None
    return dx, *rest


class Layer:
    """Tensors of one layer, its truth in float64, and what the operators take besides."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, leading: tuple[int, ...] | None = None, p: float = 0.0):
        m, k, n, r_in, r_out = shape
        leading = leading or (m,)
        make = lambda *size, scale=1.0: (torch.randn(*size, dtype=torch.float64) * scale).to(dtype)  # noqa: E731
        self.x, self.g = make(*leading, k), make(*leading, n)
        self.weight, self.bias = make(n, k, scale=k**-0.5), make(n)
        self.A, self.B, self.core = make(k, r_in, scale=k**-0.5), make(n, r_out), make(r_in, r_out)
        self.dropout = (p, torch.tensor([11]) if p else None)
        self.mask = reference.dropout_mask(m, k, p, 11) if p else None

    def wide(self) -> list[Tensor]:
        n, k = self.weight.shape
        flat = [self.g.reshape(-1, n), self.x.reshape(-1, k), self.weight, self.A, self.B, self.core]
        return [t.double() for t in flat]

    def truth(self, bias: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        _, x, weight, A, B, core = self.wide()
        dropped = x if self.mask is None else x * self.mask
        y = reference.forward(x, weight, self.bias.double() if bias else None, A, B, core, S, self.mask)
        return y.view(*self.x.shape[:-1], len(weight)), dropped @ A, S * B @ core.T

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dx, dA, dB, dcore = reference.backward(*self.wide(), S, self.mask)[:4]
        return dx.view(self.x.shape), dA, dB, dcore

    def forward(self, beta: bool, *, bias: bool = True, u: Tensor | None = None, F: Tensor | None = None):
        A, b = None if u is not None else self.A, self.bias if bias else None
        return layer_forward(self.x, self.weight, b, A, self.B, self.core, S, beta, u, F, *self.dropout)


@pytest.fixture(params=CLOSE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def poisoned():
    """What is not written comes out as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, beta, p, dtype):
    layer = Layer(shape, dtype, p=p)
    for bias in (True, False):
        y, u, F = layer.forward(beta, bias=bias)
        for got, want in zip((y, u, F), layer.truth(bias)):
            assert got.dtype == dtype and got.shape == want.shape and relative(got, want) < CLOSE[dtype]
        again, no_u, no_F = layer.forward(beta, bias=bias, u=u, F=F)
        assert torch.equal(again, y) and no_u is None and no_F is None


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] < 130], ids=str)
def test_small(shape, beta, dtype):
    layer = Layer(shape, dtype)
    factors = (layer.A, layer.B, layer.core)
    y, u = small_layer_forward(layer.x, layer.weight, layer.bias, *factors, S, beta)
    assert relative(y, layer.truth()[0]) < CLOSE[dtype] and relative(u, layer.truth()[1]) < CLOSE[dtype]
    want, wide = layer.gradients(), ops.accumulate_dtype(dtype)
    got = small_layer_backward_(layer.g, layer.weight, layer.x, u, *factors, S, beta, None, None, True, True)
    for gradient, truth in zip(got, want):
        assert relative(gradient, truth) < 2 * CLOSE[dtype]
    assert all(t.dtype == dtype for t in got)  # that of the factors
    sums = torch.ones(layer.A.shape, dtype=wide), torch.ones(layer.B.shape, dtype=wide)
    added = small_layer_backward_(layer.g, layer.weight, layer.x, u, *factors, S, beta, *sums, True, True)
    assert added[1] is None and added[2] is None and torch.equal(added[0], got[0])
    rounded_once = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-5)
    for total, fresh in zip(sums, got[1:3]):
        assert relative(total - 1, fresh.double()) < rounded_once
    for weight, x, need_B, need_core in itertools.product((layer.weight, None), (layer.x, None), (True, False), (True, False)):
        part = small_layer_backward_(layer.g, weight, x, u, *factors, S, beta, None, None, need_B, need_core)
        asked = (weight is not None, x is not None, need_B, need_core)
        assert [t is not None for t in part] == list(asked)
        assert all(torch.equal(t, whole) for t, whole in zip(part, got) if t is not None)


def test_backward_operators_move_no_version_counter_and_return_what_is_new():
    """Nothing for a sum that is given, and no k beside A."""
    layer, wide = Layer(SHAPES[0], torch.float32), {"dtype": torch.float32}
    (_, u, F), k = layer.forward(True), torch.randn(7, 4)
    for sums in (False, True):
        dA, dB, dx = (torch.ones(t.shape, **wide) if sums else None for t in (layer.A, layer.B, layer.x))
        g, weight, x, factors = layer.g, layer.weight, layer.x, (layer.B, layer.core, S)
        calls = {
            "layer_backward": (g, weight, x, u, layer.A, F, *factors, 1, k, dx, None, dA, dB, True, True),
            "layer_backward unfolded": (g, weight, x, u, layer.A, None, *factors, 5, None, None, None, dA, dB, True, True),
            "shrink_backward": (k, dx, x, None if dx is None else layer.A, dA),
        }
        for name, given in calls.items():
            own = [t.clone() if sums and any(t is s for s in (dA, dB, dx)) else t for t in given]
            added = [t for t, before in zip(own, given) if t is not before]
            found = getattr(torch.ops.lotr, f"{name.split()[0]}_").default(*own)
            assert [t._version for t in added] == [0] * len(added) and bool(added) == sums
            new = [t is not None for t in (found if isinstance(found, tuple) else (found,))]
            dx_is_new = not sums or "unfolded" in name  # for which no dx is given here
            assert new == ([dx_is_new, False, not sums, not sums, True] if "layer" in name else [not sums])


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_of_a_layer_by_itself(shape, beta, p, dtype):
    layer = Layer(shape, dtype, p=p)
    _, u, F = layer.forward(beta)
    factors = (layer.weight, layer.x, u, layer.A, F, layer.B, layer.core)
    got = layer_backward_(layer.g, *factors, S, beta, *[None] * 5, True, True, *layer.dropout)
    dx, k, dA, dB, dcore = got
    assert k is None and dx.dtype == dtype
    for gradient, truth in zip((dx, dA, dB, dcore), layer.gradients()):
        assert gradient.shape == truth.shape and relative(gradient, truth) < 2 * CLOSE[dtype]


@pytest.mark.parametrize("small", [False, True])
def test_new_gradients_have_the_factors_dtype(small):
    """Rounded once, from sums in float32; float32 where the factors disagree, as when a forward scope has cast A alone."""
    layer = Layer((300, 64, 48, 16, 5), torch.bfloat16)
    narrow, wide = (layer.A, layer.B, layer.core), tuple(t.float() for t in (layer.A, layer.B, layer.core))
    _, u, F = layer.forward(False)
    found = []
    for A, B, core in (narrow, wide, (narrow[0], *wide[1:])):
        if small:
            args = (layer.g, layer.weight, layer.x, u, A, B, core, S, False, None, None, True, True)
            found.append(small_layer_backward_(*args)[1:])
        else:
            args = (layer.g, layer.weight, layer.x, u, A, F, B, core, S, False, *[None] * 5, True, True)
            found.append(layer_backward_(*args)[2:])
    assert [t.dtype for t in found[0]] == 3 * [torch.bfloat16]
    assert [t.dtype for t in found[1] + found[2]] == 6 * [torch.float32]
    for a, b, c in zip(*found):
        assert torch.equal(a, b.bfloat16()) and torch.equal(b, c)


@pytest.mark.parametrize("beta", [False, True])
def test_backward_adds_to_what_is_given(beta, dtype):
    """What siblings bring (k, dx), and sums (Q, dA, dB), against the same in float64."""
    layer, wide = Layer((130, 64, 48, 16, 5), dtype), ops.accumulate_dtype(dtype)
    _, u, F = layer.forward(beta)
    g, x, weight, A, B, core = layer.wide()
    k, dx = torch.randn(130, 16, dtype=torch.float64).to(dtype), torch.randn(130, 64, dtype=torch.float64).to(dtype)
    whole_k = g @ F.double() + k.double()
    want_dx, want_dA = dx.double() + g @ weight + whole_k @ A.T, 1 + x.T @ whole_k
    Q_own = g.T @ u.double()
    for bank in (False, True):
        sums = [torch.ones(size, dtype=wide) for size in ((48, 16), layer.A.shape, layer.B.shape)]
        Q, dA, dB = sums if bank else (None, *sums[1:])
        given_dx = dx.clone()
        factors = (layer.weight, layer.x, u, layer.A, F, layer.B, layer.core)
        needs = (False, False) if bank else (True, True)
        found = layer_backward_(layer.g, *factors, S, beta, k, given_dx, Q, dA, None if bank else dB, *needs)
        assert [t is None for t in found] == [True, True, True, True, bank]
        assert relative(given_dx, want_dx) < 2 * CLOSE[dtype] and relative(dA, want_dA) < 2 * CLOSE[dtype]
        if bank:
            assert relative(Q, 1 + Q_own) < CLOSE[dtype]
        else:
            assert relative(dB, 1 + S * Q_own @ core) < CLOSE[dtype] and relative(found[4], S * Q_own.T @ B) < CLOSE[dtype]


def test_backward_of_a_sibling_returns_k(dtype):
    layer = Layer((130, 64, 48, 16, 5), dtype)
    _, u, F = layer.forward(False)
    g, _, weight, *_ = layer.wide()
    factors = (layer.weight, None, u, None, F, layer.B, layer.core)
    dx, k, dA, dB, dcore = layer_backward_(layer.g, *factors, S, False, *[None] * 5, True, False)
    assert relative(dx, g @ weight) < CLOSE[dtype] and relative(k, g @ F.double()) < CLOSE[dtype]
    assert dA is None and dcore is None and relative(dB, layer.gradients()[2]) < 2 * CLOSE[dtype]


@pytest.mark.parametrize("layout", ["3-D", "transposed", "every other", "expanded", "offset", "empty"])
def test_layouts(layout):
    """Strides, offsets and leading dimensions of x and g; the base product sees the same tensors as the kernels."""
    x, g = {
        "3-D": lambda: (torch.randn(4, 5, 24), torch.randn(4, 5, 18)),
        "transposed": lambda: (torch.randn(24, 20).t(), torch.randn(18, 20).t()),
        "every other": lambda: (torch.randn(40, 60)[::2, 3:51:2], torch.randn(40, 40)[::2, 1:37:2]),
        "expanded": lambda: (torch.randn(24).expand(20, 24), torch.randn(()).expand(20, 18)),
        "offset": lambda: (torch.randn(4, 5, 3, 24)[:, :, 1], torch.randn(4, 5, 40)[..., 7:25]),
        "empty": lambda: (torch.randn(3, 0, 24), torch.randn(3, 0, 18)),
    }[layout]()
    layer = Layer((20, 24, 18, 4, 4), torch.float32)
    layer.x, layer.g = x, g
    for beta in (False, True):
        y, u, F = layer.forward(beta)
        factors = (layer.weight, layer.x, u, layer.A, F, layer.B, layer.core)
        dx, _, *rest = layer_backward_(layer.g, *factors, S, beta, *[None] * 5, True, True)
        small_y, small_u = small_layer_forward(x, layer.weight, layer.bias, layer.A, layer.B, layer.core, S, beta)
        small = small_layer_backward_(
            g, layer.weight, x, small_u, layer.A, layer.B, layer.core, S, beta, None, None, True, True
        )
        for got, want in zip((y, small_y), 2 * [layer.truth()[0]]):
            assert got.shape == want.shape and got.is_contiguous() and (not want.numel() or relative(got, want) < 2e-6)
        for found in ((dx, *rest), small):
            for got, want in zip(found, layer.gradients()):
                assert got.shape == want.shape
                assert (got - want).norm() <= 4e-6 * want.norm().clamp_min(1e-30)


def test_same_bits_at_any_thread_count(dtype):
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        layer = Layer((700, 96, 130, 16, 16), dtype)
        u, F = ops.shrink(layer.x, layer.A), ops.fold(layer.B, layer.core[None], S, dtype)[0]
        factors = (None, layer.x, u, layer.A, F, layer.B, layer.core)  # without the library's product, whose bits are its own
        results.append(layer_backward_(layer.g, *factors, S, True, *[None] * 5, True, True)[2:])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("strategy", ["two_pass", "beta"])
def test_a_dispatch_mode_sees_the_parts(strategy, dtype):
    """Selective checkpointing and counters of operators need the products; the numbers are those of the one operator."""
    layer = Layer((130, 64, 48, 16, 5), dtype, leading=(2, 65), p=0.3)
    tensors, beta = (layer.weight, layer.bias, layer.A, layer.B, layer.core, S), strategy == "beta"
    y, u, F = layer_forward(layer.x, *tensors, beta, None, None, *layer.dropout)
    with Seen() as seen:
        parts = layer_forward(layer.x, *tensors, beta, None, None, *layer.dropout)
    assert {"shrink", "fold", "expand"} <= set(seen.names) and "layer_forward" not in seen.names
    for got, want in zip(parts, (y, u, F)):
        assert relative(got, want.double()) < CLOSE[dtype]
    wide = ops.accumulate_dtype(dtype)
    k, dx = torch.randn(130, 16).to(dtype), torch.randn(2, 65, 64).to(dtype)
    Q, dA, dB = (torch.ones(size, dtype=wide) for size in ((48, 16), layer.A.shape, layer.B.shape))
    factors = (layer.weight, layer.x, u, layer.A, F, layer.B, layer.core, S, beta)
    cases = [([None] * 5, (True, True)), ([k, dx, None, dA, dB], (True, True)), ([k, dx, Q, dA, None], (False, False))]
    for sums, needs in cases:
        given = [[None if t is None else t.clone() for t in sums] for _ in range(2)]
        whole = layer_backward_(layer.g, *factors, *given[0], *needs, *layer.dropout)
        with Seen() as seen:
            single = layer_backward_(layer.g, *factors, *given[1], *needs, *layer.dropout)
        folds = set() if sums[2] is not None else {"fold_grad"}
        assert {"mm", "shrink_grad_", "expand_add_", "factor_grad_", *folds} <= set(seen.names)
        assert "layer_backward_" not in seen.names
        for got, want in zip([*single, *given[1]], [*whole, *given[0]]):
            assert (got is None) == (want is None) and (got is None or relative(got, want.double()) < CLOSE[dtype])


@pytest.mark.parametrize("beta", [False, True])
def test_a_dispatch_mode_sees_the_parts_unfolded(beta, dtype):
    layer, wide = Layer((6, 64, 48, 16, 5), dtype, leading=(2, 3)), ops.accumulate_dtype(dtype)
    factors = (layer.A, layer.B, layer.core, S, beta)
    y, u = small_layer_forward(layer.x, layer.weight, layer.bias, *factors)
    with Seen() as seen:
        parts = small_layer_forward(layer.x, layer.weight, layer.bias, *factors)
    assert {"shrink", "mm"} <= set(seen.names) and "layer_forward" not in seen.names
    for got, want in zip(parts, (y, u)):
        assert relative(got, want.double()) < CLOSE[dtype]
    for given, x, weight, *needs in itertools.product(
        (False, True), (layer.x, None), (layer.weight, None), *2 * [(True, False)]
    ):
        found = []
        for mode in (contextlib.nullcontext(), Seen()):
            dA = torch.ones(layer.A.shape, dtype=wide) if given and x is not None else None
            dB = torch.ones(layer.B.shape, dtype=wide) if given and needs[0] else None
            with mode as seen:
                result = small_layer_backward_(layer.g, weight, x, u, *factors, dA, dB, *needs)
            assert all(t is None or t._version == 0 for t in (dA, dB))
            found.append((*result, dA, dB))
        assert "layer_backward_" not in seen.names and ("mm" in seen.names) == any((weight is not None, x is not None, *needs))
        for whole, single in zip(*found):
            assert (whole is None) == (single is None) and (whole is None or relative(single, whole.double()) < CLOSE[dtype])
            assert whole is None or whole.dtype == single.dtype


def test_bad_input_is_named_before_anything_runs():
    layer = Layer((6, 8, 5, 3, 2), torch.float32)
    _, u, F = layer.forward(True)
    forward = [layer.x, layer.weight, layer.bias, layer.A, layer.B, layer.core, S, True, None, None]
    backward = [layer.g, layer.weight, layer.x, u, layer.A, F, layer.B, layer.core, S, True, None, None, None]
    backward += [torch.zeros(8, 3), torch.zeros(5, 2), True, True]
    small = [layer.g, layer.weight, layer.x, u, layer.A, None, layer.B, layer.core, S, 5, *[None] * 5, True, True]
    lotr = torch.ops.lotr
    cases = [
        (lotr.layer_forward, forward, 0, torch.randn(()), "x: expected a tensor [.., K]"),
        (
            torch.ops.lotr.layer_forward,
            forward,
            0,
            torch.randn(2, 3, 16)[..., ::2].transpose(0, 1),
            "x: expected leading dimensions",
        ),
        (lotr.layer_forward, forward, 1, torch.randn(5, 9), "weight: expected size 8"),
        (lotr.layer_forward, forward, 1, torch.randn(5, 8).double(), "weight: expected dtype torch.float32"),
        (lotr.layer_forward, forward, 2, torch.randn(4), "bias: expected size 5"),
        (lotr.layer_forward, forward, 3, None, "A: expected a tensor"),
        (lotr.layer_forward, forward, 3, torch.randn(8, 4), "A: expected size 3"),
        (lotr.layer_forward, forward, 5, torch.randn(3, 3), "core: expected size 2"),
        (lotr.layer_forward, forward, 6, float("nan"), "scaling: expected a finite number"),
        (lotr.layer_forward, forward, 8, torch.randn(6, 3), "A: expected a tensor or None"),
        (lotr.layer_forward, forward, 9, torch.randn(5, 4), "F: expected size 3"),
        (lotr.layer_backward_, backward, 0, torch.randn(6, 4), "g: expected size 5"),
        (lotr.layer_backward_, backward, 2, torch.randn(5, 8), "x: expected 6 tokens"),
        (lotr.layer_backward_, backward, 3, None, "u: expected a tensor because Q or dB is given"),
        (lotr.layer_backward_, backward, 4, None, "x: expected None without A and F"),
        (lotr.layer_backward_, backward, 10, torch.randn(6, 4), "k: expected size 3"),
        (
            torch.ops.lotr.layer_backward_,
            backward,
            11,
            torch.randn(1, 8).expand(6, 8),
            "dx: expected a tensor without repeated",
        ),
        (lotr.layer_backward_, backward, 13, torch.zeros(8, 3).double(), "dA: expected dtype torch.float32"),
        (lotr.layer_backward_, backward, 14, torch.zeros(5, 3), "dB: expected size 2"),
        (lotr.layer_backward_, small, 3, None, "u: expected a tensor because need_B or need_core"),
        (lotr.layer_backward_, small, 2, torch.randn(6, 9), "x: expected size 8"),
        (lotr.layer_backward_, small, 4, None, "A: expected a tensor, got None"),
        (lotr.layer_backward_, small, 5, F, "F: expected None unfolded"),
        (lotr.layer_backward_, small, 11, torch.zeros(6, 8), "dx: expected None unfolded"),
        (lotr.layer_backward_, small, 13, torch.zeros(8, 4), "dA: expected size 3"),
        (lotr.layer_backward_, small, 9, 2, "strategy: expected 0 (two_pass) or 1 (beta)"),
    ]
    for function, good, index, bad, message in cases:
        arguments = [*good[:index], bad, *good[index + 1 :]]
        sums = [t.clone() for t in backward[13:15]]
        with pytest.raises(RuntimeError) as raised:
            function(*arguments)
        assert message in str(raised.value), (message, str(raised.value))
        assert all(torch.equal(a, b) for a, b in zip(sums, backward[13:15]))


class Elsewhere(Tensor):
    """A subclass that keeps no memory where a kernel looks for it, as quantised and distributed tensors do."""

    @staticmethod
    def __new__(cls, t: Tensor):
        return Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=t.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise TypeError("Elsewhere: no operator")


@pytest.mark.parametrize("name", ["weight", "bias", "A", "B", "core"])
def test_the_dispatcher_calls_a_subclass(name):
    """Tensors without memory are in test_every_operator.py."""
    layer = Layer((200, 8, 5, 3, 2), torch.float32)
    setattr(layer, name, Elsewhere(getattr(layer, name)))
    with pytest.raises(TypeError, match="Elsewhere: no operator"):
        layer.forward(True)
