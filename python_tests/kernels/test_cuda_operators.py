"""The CUDA operators of csrc/torch (products_cuda.h, fused_cuda.h, cuda_rows.cpp) without a GPU, against the formulas in
float64: they take CPU tensors for CUDA tensors, and their kernels run under the executor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from toys import Seen

from csrc.simt import build
from lotr_ext import reference
from lotr_ext.ops import UNFOLDED

M, K, N, R, Q = 37, 24, 40, 8, 5  # tokens, in, out, r_in, r_out
S, SEED, FUSED = 0.5, 11, 2
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HERE = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


@pytest.fixture(scope="module")
def call() -> Callable:
    """Calls an operator by its CUDA kernel."""
    torch.ops.load_library(os.environ.get("LOTR_CUDA_ON_HOST") or str(build.torch_library()))
    return lambda name, *arguments: getattr(torch.ops.lotr, name).default.redispatch(HERE, *arguments)


def close(got: Tensor, want: Tensor, what: str, dtype: torch.dtype) -> None:
    assert got.shape == want.shape, f"{what}: {got.shape}"
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < CLOSE[dtype], f"{what}: {error}"


class Layer:
    """Operands, in float32 the factors too, and their truth."""

    def __init__(self, dtype: torch.dtype, shape=(M, K, N, R, Q), leading: tuple[int, ...] = (), p: float = 0.0):
        m, k, n, r_in, r_out = shape
        self.dtype, self.p, self.seed = dtype, p, torch.tensor([SEED]) if p else None
        self.x, self.g = (torch.randn(*(leading or (m,)), cols).to(dtype) for cols in (k, n))
        self.weight, self.bias = (torch.randn(n, k) * k**-0.5).to(dtype), torch.randn(n).to(dtype)
        self.A, self.B, self.core = torch.randn(k, r_in) * k**-0.5, torch.randn(n, r_out), torch.randn(r_in, r_out)
        self.mask = reference.dropout_mask(m, k, p, SEED).double() if p else None
        wide = [t.double() for t in (self.g.reshape(m, n), self.x.reshape(m, k), self.weight, self.A, self.B, self.core)]
        self.wide_g, self.wide_x, self.wide_weight, self.wide_A, self.wide_B, self.wide_core = wide
        self.y = reference.forward(*wide[1:3], self.bias.double(), *wide[3:], S, self.mask).view(*self.x.shape[:-1], n)
        self.dropped = self.wide_x if self.mask is None else self.wide_x * self.mask
        self.u, self.F = self.dropped @ self.wide_A, S * self.wide_B @ self.wide_core.T
        self.k, self.Q = self.wide_g @ self.F, self.wide_g.T @ self.u
        dx, self.dA, self.dB, self.dcore = reference.backward(*wide, S, self.mask)[:4]
        self.dx = dx.view(self.x.shape)

    def forward(self, call: Callable, strategy: int, u: Tensor | None = None, F: Tensor | None = None):
        A = None if u is not None else self.A
        operands = (self.x, self.weight, self.bias, A, self.B, self.core, S)
        return call("layer_forward", *operands, strategy, u, F, self.p, self.seed)

    def close(self, got: Tensor, want: Tensor, what: str) -> None:
        close(got, want, what, self.dtype)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """What is not written comes out as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("strategy", [0, 1])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_step_of_a_layer(call: Callable, dtype: torch.dtype, strategy: int, p: float) -> None:
    layer = Layer(dtype, (36, K, N, R, Q), leading=(2, 18), p=p)
    y, u, F = layer.forward(call, strategy)
    for got, want, what in ((y, layer.y, "y"), (u, layer.u, "u"), (F, layer.F, "F")):
        layer.close(got, want, what)
    again, new_u, new_F = layer.forward(call, strategy, u, F)
    assert torch.equal(again, y) and new_u is None and new_F is None
    operands = (layer.g, layer.weight, layer.x, u, layer.A, F, layer.B, layer.core, S, strategy)
    dx, k, dA, dB, dcore = call("layer_backward_", *operands, *[None] * 5, True, True, p, layer.seed)
    assert k is None
    found = ((dx, layer.dx, "dx"), (dA, layer.dA, "dA"), (dB, layer.dB, "dB"), (dcore, layer.dcore, "dcore"))
    for got, want, what in found:
        layer.close(got, want, what)


@pytest.mark.parametrize(("strategy", "p"), [(0, 0.0), (0, 0.4), (1, 0.0), (1, 0.4), (UNFOLDED, 0.0)])
def test_no_product_of_a_layer_passes_through_the_dispatcher(call: Callable, strategy: int, p: float) -> None:
    """Nor do casts of float32 factors, new memory that is added to, or the sum of siblings' k."""
    torch.use_deterministic_algorithms(False)  # which fills new memory through the dispatcher
    layer = Layer(torch.bfloat16, p=p)
    given = [None, None] if strategy == UNFOLDED else [torch.randn(M, R).bfloat16(), torch.randn(M, K).bfloat16()]
    with Seen() as seen:
        _, u, F = layer.forward(call, strategy)
        operands = (layer.g, layer.weight, layer.x, u, layer.A, F, layer.B, layer.core, S, strategy)
        for siblings in ([None, None], given):
            call("layer_backward_", *operands, *siblings, None, None, None, True, True, p, layer.seed)
    library = {"aten.expand.default", "aten.copy_.default"}  # of the bias, in torch's product on a CPU
    assert set(seen.operators) <= library


@pytest.mark.parametrize("strategy", [0, 1])
def test_backward_adds_to_what_is_given(call: Callable, strategy: int) -> None:
    """What siblings bring (k, dx), and sums (Q, dA, dB)."""
    layer = Layer(torch.bfloat16)
    u, F = layer.u.bfloat16(), layer.F.float()
    k, dx = torch.randn(M, R).bfloat16(), torch.randn(M, K).bfloat16()
    whole_k = layer.k + k.double()
    for bank in (False, True):
        Q_sum, dA, dB = torch.ones(N, R) if bank else None, torch.ones(K, R), None if bank else torch.ones(N, Q)
        given = dx.clone()
        operands = (layer.g, layer.weight, layer.x, u, layer.A, F, layer.B, layer.core, S, strategy, k, given, Q_sum, dA, dB)
        *unasked, dcore = call("layer_backward_", *operands, not bank, not bank, 0.0, None)
        layer.close(given, dx.double() + layer.wide_g @ layer.wide_weight + whole_k @ layer.wide_A.T, "dx")
        layer.close(dA, 1 + layer.wide_x.T @ whole_k, "dA")
        assert unasked == [None] * 4 and (dcore is None) == bank
        if Q_sum is not None:
            layer.close(Q_sum, 1 + layer.Q, "Q")
        else:
            layer.close(dB, 1 + layer.dB, "dB")
            layer.close(dcore, layer.dcore, "dcore")


def test_parts_of_a_backward(call: Callable) -> None:
    """A sibling's, with neither A nor x; Q alone; dx alone."""
    layer = Layer(torch.float16)
    u, F, nothing = layer.u.half(), layer.F.half(), [None] * 5
    factors = (layer.B, layer.core, S, 0)
    _, k, _, dB, _ = call("layer_backward_", layer.g, None, None, u, None, F, *factors, *nothing, True, False, 0.0, None)
    layer.close(k, layer.k, "k")
    layer.close(dB, layer.dB, "dB")
    *_, dB, dcore = call("layer_backward_", layer.g, None, None, u, None, None, *factors, *nothing, False, True, 0.0, None)
    layer.close(dcore, layer.dcore, "dcore")
    assert dB is None
    dx, *_ = call("layer_backward_", layer.g, layer.weight, *[None] * 4, *factors, *nothing, False, False, 0.0, None)
    layer.close(dx, layer.wide_g @ layer.wide_weight, "dx")


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_unfolded_step(call: Callable, dtype: torch.dtype) -> None:
    layer = Layer(dtype, (6, K, N, R, Q), leading=(2, 3))
    y, u, F = layer.forward(call, UNFOLDED)
    layer.close(y, layer.y, "y")
    layer.close(u, layer.u, "u")
    assert F is None
    for sums in (False, True):
        dA, dB = (torch.ones(K, R), torch.ones(N, Q)) if sums else (None, None)
        operands = (layer.g, layer.weight, layer.x, u, layer.A, None, layer.B, layer.core, S, UNFOLDED)
        dx, _, new_dA, new_dB, dcore = call("layer_backward_", *operands, None, None, None, dA, dB, True, True, 0.0, None)
        layer.close(dx, layer.dx, "dx")
        layer.close(dcore, layer.dcore, "dcore")
        layer.close(new_dA if dA is None else dA - 1, layer.dA, "dA")
        layer.close(new_dB if dB is None else dB - 1, layer.dB, "dB")


@pytest.mark.parametrize("strategy", [0, 1, FUSED, UNFOLDED])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_step_with_a_scale(call: Callable, dtype: torch.dtype, strategy: int) -> None:
    layer = Layer(dtype, (6, K, N, R, Q), leading=(2, 3))
    scale = (torch.rand(N) + 0.5) * torch.randn(N).sign()
    for bias in (layer.bias, None):
        operands = (layer.x, layer.weight, bias, layer.A, layer.B, layer.core, S, strategy, None, None, 0.0, None)
        y, u, _ = call("layer_forward", *operands, scale)
        own = layer.y - layer.bias.double()
        layer.close(y, scale.double() * own + (0 if bias is None else bias.double()), "y")
        layer.close(u, layer.u, "u")
        assert y.dtype == dtype
        zero = torch.cat([torch.zeros(1), scale[1:]])
        for g in (layer.g, layer.g.transpose(0, 1).contiguous().transpose(0, 1).contiguous(), layer.g[:, :0]):
            g0, dscale = call("scale_backward", g, y[:, : g.shape[1]], bias, zero)
            assert torch.equal(g0, (g * zero).to(dtype)) and g0.is_contiguous() and dscale.dtype == torch.float32
            products = g.double() * (y[:, : g.shape[1]].double() - (0 if bias is None else bias.double()))
            want = products.sum((0, 1)) / scale
            assert dscale[0] == 0
            assert torch.allclose(dscale[1:].double(), want[1:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_scale_backward_of_strided_operands(call: Callable, dtype: torch.dtype) -> None:
    """So many tokens that several blocks sum a column; the same bits as of packed operands."""
    g, y = torch.randn(600, 2 * N).to(dtype)[:, ::2], torch.randn(N, 600).to(dtype).T
    bias, scale = torch.randn(N, 2).to(dtype)[:, 1], torch.randn(N, 3)[:, 2]
    g0, dscale = call("scale_backward", g, y, bias, scale)
    assert torch.equal(g0, (g * scale).to(dtype))
    want = (g.double() * (y.double() - bias.double())).sum(0) / scale
    assert torch.allclose(dscale.double(), want, rtol=1e-5, atol=1e-4 / scale.abs().min().item())
    packed = call("scale_backward", *(t.contiguous() for t in (g, y, bias, scale)))
    assert all(map(torch.equal, packed, (g0, dscale)))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_shrink_backward(call: Callable, p: float) -> None:
    layer = Layer(torch.bfloat16, p=p)
    k, dx = layer.k.bfloat16(), torch.randn(M, K).bfloat16()
    part = k.double() @ layer.wide_A.T
    want = dx.double() + (part if layer.mask is None else part * layer.mask)
    for dA in (None, torch.ones(K, R)):
        given = dx.clone()
        new_dA = call("shrink_backward_", k, given, layer.x, layer.A, dA, p, layer.seed)
        layer.close(given, want, "dx")
        layer.close(new_dA if dA is None else dA - 1, layer.dropped.T @ k.double(), "dA")


@pytest.mark.parametrize("given_Q", [False, True])
@pytest.mark.parametrize("r", [5, 16, 17])
def test_fused_step(call: Callable, r: int, given_Q: bool) -> None:
    """The adapter inside the base product, up to rank 16 with Q in the backward launch."""
    layer = Layer(torch.bfloat16, (40, 32, 48, r, r))
    y, u, F = layer.forward(call, FUSED)
    for got, want, what in ((y, layer.y, "y"), (u, layer.u, "u"), (F, layer.F, "F")):
        layer.close(got, want, what)
    Q_sum = torch.ones(48, r) if given_Q else None
    operands = (layer.g, layer.weight, layer.x, u, layer.A, F, layer.B, layer.core, S, FUSED, None, None, Q_sum, None, None)
    dx, k, dA, dB, dcore = call("layer_backward_", *operands, not given_Q, not given_Q, 0.0, None)
    assert k is None
    for got, want, what in ((dx, layer.dx, "dx"), (dA, layer.dA, "dA")):
        layer.close(got, want, what)
    if Q_sum is not None:
        layer.close(Q_sum, 1 + layer.Q, "Q")
    else:
        layer.close(dB, layer.dB, "dB")
        layer.close(dcore, layer.dcore, "dcore")


def test_fused_is_refused_with_what_it_cannot_do(call: Callable) -> None:
    layer = Layer(torch.bfloat16, p=0.4)
    with pytest.raises(RuntimeError, match=r"strategy: expected 0 .two_pass. or 1 .beta. where there is dropout"):
        layer.forward(call, FUSED)
    with pytest.raises(RuntimeError, match="where u is given"):
        layer.forward(call, FUSED, layer.u.bfloat16())


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_single_products(call: Callable, dtype: torch.dtype) -> None:
    layer = Layer(dtype, p=0.4)
    x, g, u, F = layer.x, layer.g, layer.u.to(dtype), layer.F.to(dtype)
    layer.close(call("shrink", x, layer.A, 0.4, layer.seed), layer.u, "shrink")
    y = torch.randn(M, K).to(dtype)
    part = layer.k.to(dtype).double() @ layer.wide_A.T * layer.mask
    want = y.double() + part
    call("expand_add_", y, layer.k.to(dtype), layer.A, 0.4, layer.seed)
    layer.close(y, want, "expand_add_")
    layer.close(call("expand", g, u, F), layer.wide_g + layer.u @ layer.F.T, "expand")
    total = torch.ones(K, R)
    call("factor_grad_", total, x, layer.k.to(dtype), 0.4, layer.seed)
    layer.close(total, 1 + layer.dropped.T @ layer.k, "factor_grad_")
    Q_sum = torch.ones(N, R)
    layer.close(call("shrink_grad_", Q_sum, g, F, u), layer.k, "k")
    layer.close(Q_sum, 1 + layer.Q, "Q")


def test_fold_of_several_cores(call: Callable) -> None:
    B, cores, Q_of = torch.randn(N, Q), torch.randn(3, R, Q), torch.randn(3, N, R)
    close(call("fold", B, cores, S, torch.bfloat16), S * B.double() @ cores.double().mT, "F", torch.bfloat16)
    dB = torch.ones(N, Q)
    dcores = call("fold_grad", Q_of, B, cores, S, dB)
    close(dcores, S * Q_of.double().mT @ B.double(), "dcores", torch.float32)
    close(dB, 1 + S * (Q_of.double() @ cores.double()).sum(0), "dB", torch.float32)


def test_row_core(call: Callable) -> None:
    u, cores, g = torch.randn(6, R), torch.randn(2, R, Q), torch.randn(5, Q)
    index, tokens = torch.tensor([1, -1, 0, 1, 0]), torch.tensor([5, 0, 3, 3, 1])
    chosen = cores.double()[index.clamp(min=0)] * (index >= 0)[:, None, None]
    rows = u.double()[tokens]
    h = call("row_core", u, cores, index, None, tokens, S)
    close(h, S * (rows[:, None] @ chosen).squeeze(1), "h", torch.float32)
    du, dcores = call("row_core_backward", g, u, cores, index, None, tokens, S, True, True)
    part = S * (chosen @ g.double()[:, :, None]).squeeze(2)
    close(du, torch.zeros(6, R, dtype=torch.float64).index_add(0, tokens, part), "du", torch.float32)
    want = torch.stack([S * rows[index == c].T @ g.double()[index == c] for c in range(2)])
    close(dcores, want, "dcores", torch.float32)


def test_what_a_gpu_has_no_kernel_for_is_named(call: Callable) -> None:
    with pytest.raises(RuntimeError, match=r"lotr::shrink: x: expected dtype torch.float32, .* on CUDA, got torch.float64"):
        call("shrink", torch.randn(4, 8).double(), torch.randn(8, 2).double(), 0.0, None)
    with pytest.raises(RuntimeError, match=r"lotr::shrink: A: expected a rank of at most 256 .* got shape \[8, 300\]"):
        call("shrink", torch.randn(4, 8), torch.randn(8, 300), 0.0, None)
    layer = Layer(torch.bfloat16, (4, 8, 6, 300, 5))
    with pytest.raises(RuntimeError, match=r"lotr::layer_forward: core: expected a rank of at most 256 .* \[300, 5\]"):
        layer.forward(call, 0)
