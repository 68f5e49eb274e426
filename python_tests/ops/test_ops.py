"""The operators as torch sees them: opcheck, gradients, version counters. Kernels' numbers: test_cpu_kernels.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.library import opcheck

from lotr_ext import ops, reference
from lotr_ext.ops import UNFOLDED

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
lotr = torch.ops.lotr
SIZES = 9, 24, 17, 4, 3  # m, k, n, r_in, r_out


def matrix(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def samples(name: str, dtype: torch.dtype, grad: bool) -> list[tuple]:
    """Arguments for opcheck: full, with the optional ones, empty."""
    m, k, n, r_in, r_out = SIZES
    acc = ops.accumulate_dtype(dtype)
    seed = torch.tensor([5])
    t = lambda *shape, grad=grad: matrix(*shape, dtype=dtype, grad=grad)  # noqa: E731
    a = lambda *shape: matrix(*shape, dtype=acc)  # noqa: E731
    w = lambda *shape: t(*shape, grad=False)  # noqa: E731
    both = {
        "shrink": [(t(m, k), t(k, r_in)), (t(m, k), t(k, r_in), 0.5, seed), (t(0, k), t(k, r_in))],
        "fold": [(t(n, r_out), t(2, r_in, r_out), 0.7, dtype), (t(n, r_out), t(1, r_in, r_out), 1.0, dtype)],
        "expand_add_": [
            (w(m, n), w(m, r_in), w(n, r_in)),
            (w(m, n), w(m, r_in), w(n, r_in), 0.5, seed),
            (w(0, n), w(0, 4), w(n, 4)),
        ],
        "factor_grad_": [(a(k, r_in), w(m, k), w(m, r_in)), (a(k, r_in), w(m, k), w(m, r_in), 0.5, seed)],
        "shrink_grad_": [(a(n, r_in), w(m, n), w(n, r_in), w(m, r_in)), (a(n, 4), w(0, n), w(n, 4), w(0, 4))],
        "fold_grad": [
            (a(2, n, r_in), w(n, r_out), w(2, r_in, r_out), 0.7, a(n, r_out)),
            (a(2, n, r_in), w(n, r_out), w(2, r_in, r_out), 0.7, None),
        ],
        "expand": [(w(m, n), w(m, r_in), w(n, r_in)), (w(3, 3, n).transpose(0, 1), w(m, r_in), w(n, r_in))],
        "shrink_backward_": [
            (w(m, r_in), w(3, 3, k), w(3, 3, k), w(k, r_in), a(k, r_in), 0.5, seed),
            (w(m, r_in), None, w(m, k), None, None),
            (w(m, r_in), w(m, k), None, w(k, r_in), None),
            (w(0, r_in), w(0, k), w(0, k), w(k, r_in), None),
        ],
    } | layer_samples(w, a, seed)
    return both[name]


def layer_samples(w: Callable[..., torch.Tensor], a: Callable[..., torch.Tensor], seed: torch.Tensor) -> dict[str, list[tuple]]:
    """Of the operators that are a direction of a whole layer."""
    m, k, n, r_in, r_out = SIZES
    return {
        "layer_forward": [
            (w(3, 3, k), w(n, k), w(n), w(k, r_in), w(n, r_out), w(r_in, r_out), 0.7, True, None, None, 0.5, seed),
            (w(m, k), w(n, k), None, None, w(n, r_out), w(r_in, r_out), 0.7, False, w(m, r_in), w(n, r_in)),
            (w(0, k), w(n, k), w(n), w(k, r_in), w(n, r_out), w(r_in, r_out), 0.7, True),
            (w(m, k), w(n, k), w(n), w(k, r_in), w(n, r_out), w(r_in, r_out), 0.7, UNFOLDED + 1),
            (w(3, 3, k), w(n, k), None, w(k, r_in), w(n, r_out), w(r_in, r_out), 0.7, UNFOLDED),
            (w(3, 3, k), w(n, k), w(n), w(k, r_in), w(n, r_out), w(r_in, r_out), 0.7, True, None, None, 0.0, None, a(n)),
        ],
        "scale_backward": [
            (w(3, 3, n), w(n, m).t().reshape(3, 3, n), w(n), a(n)),
            (w(n, m).t(), w(m, n), None, a(n)),
            (w(0, n), w(0, n), w(n), a(n)),
        ],
        "row_norms": [
            (w(n, k), a(n), None, w(k, r_in), w(n, r_out), w(r_in, r_out), 0.7),
            (w(k, n).t(), a(n), a(n, r_in), w(k, r_in), w(n, r_out), w(r_in, r_out), 0.7),
        ],
        "layer_backward_": [
            (
                *(w(m, n), w(n, k), w(m, k), w(m, r_in), w(k, r_in), w(n, r_in), w(n, r_out), w(r_in, r_out), 0.7, True),
                *(w(m, r_in), w(m, k), None, a(k, r_in), a(n, r_out), True, True),
            ),
            (
                *(w(3, 3, n), w(n, k), None, w(m, r_in), None, w(n, r_in), w(n, r_out), w(r_in, r_out), 0.7, False),
                *(None, w(3, 3, k), a(n, r_in), None, None, False, False),
            ),
            (
                *(w(m, n), w(n, k), w(m, k), w(m, r_in), w(k, r_in), None, w(n, r_out), w(r_in, r_out), 0.7, UNFOLDED + 1),
                *(None, None, None, a(k, r_in), a(n, r_out), True, True),
            ),
            (
                *(w(m, n), None, w(m, k), w(m, r_in), w(k, r_in), None, w(n, r_out), w(r_in, r_out), 0.7, UNFOLDED),
                *(None, None, None, a(k, r_in), a(n, r_out), True, False),
            ),
        ],
    }


FUNCTIONAL = ("shrink", "fold")
WRITING = ("expand_add_", "factor_grad_", "shrink_grad_", "fold_grad")
DIRECTIONS = ("layer_forward", "layer_backward_", "shrink_backward_")  # of a layer
ALL = (*FUNCTIONAL, *WRITING, *DIRECTIONS, "expand", "scale_backward", "row_norms")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_opcheck(name, dtype):
    for grad in (False, True) if name in FUNCTIONAL else (False,):
        for arguments in samples(name, dtype, grad):
            # a layer's operator rounds a sum once that its decomposition rounds in two steps
            loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 and "layer" in name else {}
            opcheck(getattr(lotr, name).default, arguments, **loose)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_fake_kernels_agree_with_real_ones(name, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for arguments in samples(name, dtype, False):
        real = getattr(lotr, name).default(*arguments)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = getattr(lotr, name).default(*fakes)
        for a, b in zip(_results(real), _results(fake), strict=True):
            assert a is b is None or (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _results(value) -> tuple[torch.Tensor | None, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", WRITING)
def test_writing_operators_bump_versions_and_refuse_gradients(name):
    for arguments in samples(name, torch.float32, False):
        schema = getattr(lotr, name).default._schema.arguments
        written = [a for a, s in zip(arguments, schema) if s.alias_info is not None and a is not None]
        before = [t._version for t in written]
        getattr(lotr, name).default(*arguments)
        assert [t._version for t in written] == [v + 1 for v in before]
        with pytest.raises(RuntimeError, match="requires grad"):
            getattr(lotr, name).default(*_one_with_gradient(arguments))


def _one_with_gradient(arguments: tuple) -> list:
    watched = list(arguments)
    index = next(i for i, a in enumerate(watched) if isinstance(a, torch.Tensor))
    watched[index] = watched[index].clone().requires_grad_()
    return watched


@pytest.mark.parametrize("name", DIRECTIONS)
def test_directions_of_a_layer_refuse_gradients(name):
    """As the functions that nodes call: nodes have the gradients."""
    for arguments in samples(name, torch.float32, False):
        watched = _one_with_gradient(arguments)
        with pytest.raises(RuntimeError, match="requires grad"):
            if name == "layer_forward":
                ops.layer_forward(*watched[:8], **dict(zip(("u", "F", "p", "seed"), watched[8:])))
            elif name == "layer_backward_":
                dA, dB, need_B, need_core = watched[13:17]
                sums = dict(zip(("k", "dx", "Q"), watched[10:13]))
                ops.layer_backward(*watched[:10], False, dA, dB, need_B, need_core, **sums)
            else:
                ops.shrink_backward(*watched[:5], (3, 3, 5))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    x, A = matrix(5, 7, dtype=torch.float64, grad=True), matrix(7, 3, dtype=torch.float64, grad=True)
    seed = torch.tensor([9])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda a, b: ops.shrink(a, b, p=p, seed=seed), (x, A))
    B, cores = matrix(6, 2, dtype=torch.float64, grad=True), matrix(3, 4, 2, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda b, c: ops.fold(b, c, 0.7, torch.float64), (B, cores))


def test_wrappers_are_the_reference():
    """One whole layer out of the operators, forward and backward, with dropout, in float64."""
    m, k, n, r_in, r_out, s, p = 11, 13, 10, 3, 2, 0.7, 0.3
    wide = torch.float64
    x, W, A, B, core, g = (matrix(*t, dtype=wide) for t in ((m, k), (n, k), (k, r_in), (n, r_out), (r_in, r_out), (m, n)))
    seed = torch.tensor([-(2**62) + 12345])
    mask = reference.dropout_mask(m, k, p, int(seed))
    want = reference.backward(g, x, W, A, B, core, s, mask)
    F = ops.fold(B, core[None], s, wide)[0]
    u = ops.shrink(x, A, p=p, seed=seed)
    y = x @ W.mT
    ops.expand_add_(y, u, F)
    assert torch.allclose(y, reference.forward(x, W, None, A, B, core, s, mask), atol=1e-12)
    Q = torch.zeros(n, r_in, dtype=wide)
    K = ops.shrink_grad_(Q, g, F, u)
    dx = g @ W
    ops.expand_add_(dx, K, A, p=p, seed=seed)
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    ops.factor_grad_(dA, x, K, p=p, seed=seed)
    dcore = ops.fold_grad(Q[None], B, core[None], s, dB)[0]
    for got, truth in zip((dx, dA, dB, dcore), want):
        assert torch.allclose(got, truth, atol=1e-11)
    assert torch.equal(ops.dropout_mask(m, k, p, seed, wide), mask)


def test_reference_gradients_by_autograd():
    """The specification's own backward, derived by hand, against gradcheck and autograd."""
    shapes = ((4, 6), (5, 6), (5,), (6, 3), (5, 2), (3, 2))
    x, W, bias, A, B, core = (matrix(*s, dtype=torch.float64, grad=True) for s in shapes)
    mask = reference.dropout_mask(4, 6, 0.5, 77)
    function = lambda *t: reference.forward(*t, 0.7, mask)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, W, bias, A, B, core))
    y = function(x, W, bias, A, B, core)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, A, B, core, W, bias), g)
    for got, want in zip(reference.backward(g, x, W, A, B, core, 0.7, mask), found):
        assert torch.allclose(got, want, atol=1e-12)


def test_philox_known_answers():
    """Random123's published vectors for philox4x32-10: all zero, and all ones in counter and key (low 64 bits used here)."""
    words = reference.philox_4x32_10(torch.tensor([0]), 0)
    assert [hex(w) for w in words[0].tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
