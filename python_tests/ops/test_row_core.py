"""row_core, h_i = s u_t(i) G_c(i), and its gradients against a loop over the rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from bench.measure.counted import peak_bytes
from lotr_ext import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALING = 0.7


def case(rows: int, m: int, c: int, r_in: int, r_out: int, dtype: torch.dtype, cores_dtype: torch.dtype | None = None) -> dict:
    """Rows in any order, some without a core, some cores and tokens without a row."""
    gen = torch.Generator().manual_seed(rows + c)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=gen)  # noqa: E731
    index = torch.randint(-1, c, (rows,), generator=gen)
    return {
        "u": draw(m, r_in).to(dtype).requires_grad_(),
        "cores": draw(c, r_in, r_out).to(cores_dtype or dtype).requires_grad_(),
        "index": torch.where(index == c // 2, -1, index),
        "tokens": torch.randint(0, max(m, 1), (rows,), generator=gen),
        "g": draw(rows, r_out).to(dtype),
    }


def truth(u: Tensor, cores: Tensor, index: Tensor, tokens: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(h, du, dG) in float64, row by row; cores rounded to u's dtype."""
    cores64, u64, g64 = cores.detach().to(u.dtype).double(), u.detach().double(), g.double()
    h, du, dG = torch.zeros(g.shape, dtype=torch.float64), torch.zeros_like(u64), torch.zeros_like(cores64)
    for i, c in enumerate(index.tolist()):
        t = i if tokens is None else int(tokens[i])
        if c >= 0:
            h[i] = SCALING * u64[t] @ cores64[c]
            du[t] += SCALING * cores64[c] @ g64[i]
            dG[c] += SCALING * torch.outer(u64[t], g64[i])
    return h, du, dG


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= tolerance * (1 + want.abs().max()) if want.numel() else got.shape == want.shape


SHAPES = [
    *((37, 11, 7, 5, 3), (64, 64, 64, 16, 16), (1, 1, 1, 1, 1), (40, 13, 3, 8, 33), (0, 4, 2, 4, 3), (0, 0, 1, 2, 2)),
    *((60, 9, 100_000, 4, 4), (900, 700, 2, 16, 17), (700, 20, 5, 64, 40), (33, 9, 4, 256, 255)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_tokens", [True, False])
def test_by_index(dtype: torch.dtype, shape: tuple[int, ...], with_tokens: bool) -> None:
    rows, m, c, r_in, r_out = shape
    given = case(rows, m if with_tokens else rows, c, r_in, r_out, dtype)
    tokens = given["tokens"] if with_tokens else None
    h = ops.row_core(given["u"], given["cores"], index=given["index"], tokens=tokens, scaling=SCALING)
    du, dG = torch.autograd.grad(h, (given["u"], given["cores"]), given["g"])
    for got, want in zip((h, du, dG), truth(given["u"], given["cores"], given["index"], tokens, given["g"]), strict=True):
        close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_offsets(dtype: torch.dtype) -> None:
    given = case(20, 6, 5, 4, 3, dtype)
    offs = torch.tensor([3, 3, 9, 17, 17], dtype=torch.int32)  # cores 1 and 4 have no rows, the last 3 rows no core
    index = torch.tensor([0] * 3 + [2] * 6 + [3] * 8 + [-1] * 3)
    for tokens in (given["tokens"], None):
        u = given["u"] if tokens is not None else given["u"].detach().repeat(4, 1)[:20].requires_grad_()
        h = ops.row_core(u, given["cores"], offs=offs, tokens=tokens, scaling=SCALING)
        du, dG = torch.autograd.grad(h, (u, given["cores"]), given["g"])
        for got, want in zip((h, du, dG), truth(u, given["cores"], index, tokens, given["g"]), strict=True):
            close(got, want, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_cores_beside_half(dtype: torch.dtype) -> None:
    given = case(37, 11, 7, 5, 3, dtype, torch.float32)
    h = ops.row_core(given["u"], given["cores"], index=given["index"], tokens=given["tokens"], scaling=SCALING)
    du, dG = torch.autograd.grad(h, (given["u"], given["cores"]), given["g"])
    want_h, want_du, want_dG = truth(given["u"], given["cores"], given["index"], given["tokens"], given["g"])
    close(h, want_h, dtype), close(du, want_du, dtype), close(dG, want_dG, torch.float32)


def test_double_backward_and_functorch() -> None:
    given = case(9, 5, 4, 3, 2, torch.float64)
    u, cores, index, tokens = (given[name] for name in ("u", "cores", "index", "tokens"))

    def f(u: Tensor, cores: Tensor) -> Tensor:
        return ops.row_core(u, cores, index=index, tokens=tokens, scaling=SCALING)

    assert torch.autograd.gradgradcheck(f, (u, cores))
    assert torch.autograd.gradcheck(f, (u, cores), check_forward_ad=True)
    many = torch.stack([u.detach(), 2 * u.detach()])
    assert torch.allclose(torch.vmap(f, (0, None))(many, cores.detach()), torch.stack([f(one, cores) for one in many]))


ERRORS = [
    (TypeError, "index, offs: expected exactly one of them, got none", {}),
    (TypeError, "index, offs: expected exactly one of them, got both", {"index": [0] * 4, "offs": [1, 4]}),
    (ValueError, r"index: expected cores in \[-1, 2\), got 2 in row 2", {"index": [0, 1, 2, 0]}),
    (ValueError, r"index: expected cores in \[-1, 2\), got -2 in row 2", {"index": [0, 1, -2, 0]}),
    (ValueError, "index: expected 4 rows, as u has, got 3", {"index": [0, 1, 0]}),
    (ValueError, "index: expected 3 rows, as tokens has, got 4", {"index": [0, 1, 0, 0], "tokens": [0, 0, 0]}),
    (ValueError, r"tokens: expected rows of u in \[0, 4\), got 4 in row 1", {"index": [0, 1], "tokens": [0, 4]}),
    (ValueError, r"offs: expected ascending ends in \[0, 4\], got 2 after 3", {"offs": [3, 2]}),
    (ValueError, r"offs: expected ascending ends in \[0, 4\], got 5 after 3", {"offs": [3, 5]}),
    (ValueError, "offs: expected one end per core, 2, got 3", {"offs": [1, 2, 4]}),
]


@pytest.mark.parametrize("error, message, given", ERRORS)
def test_bad_input(error: type[Exception], message: str, given: dict) -> None:
    dtypes = {"offs": torch.int32}
    tensors = {name: torch.tensor(v, dtype=dtypes.get(name, torch.int64)) for name, v in given.items()}
    with pytest.raises(error, match=message):
        ops.row_core(torch.ones(4, 3), torch.ones(2, 3, 5), **tensors)


def test_bad_dtypes_and_shapes() -> None:
    u, cores, index = torch.ones(4, 3), torch.ones(2, 3, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"index: expected torch\.int64, got torch\.int32"):
        ops.row_core(u, cores, index=index.int())
    with pytest.raises(ValueError, match=r"cores: expected shape \(c, 3, r_out\)"):
        ops.row_core(u, torch.ones(2, 4, 5), index=index)
    with pytest.raises(ValueError, match=r"u: expected shape \[m, r_in\]"):
        ops.row_core(torch.ones(4, 3, 1), cores, index=index)
    with pytest.raises(TypeError, match=r"cores: expected torch\.float32, got torch\.float16"):
        ops.row_core(u, cores.half(), index=index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(24, 20), (16, 16), (64, 33), (7, 4)], ids=str)
@pytest.mark.parametrize("order", ["any", "sorted", "one long group"])
def test_the_same_bits_at_any_number_of_threads(dtype: torch.dtype, ranks: tuple[int, int], order: str) -> None:
    """A group is cut where it is long: at places of its own, not where a thread's share ends."""
    given = case(3001, 3001, 40, *ranks, dtype)
    u, cores, index, tokens = given["u"].detach(), given["cores"].detach(), given["index"], given["tokens"]
    if order == "one long group":
        index = torch.where(index > 2, 1, index)
    if order == "sorted":
        index, tokens = index.sort().values, None
    args = (given["g"], u, cores, index, None, tokens, SCALING, True, True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((torch.ops.lotr.row_core(*args[1:7]), *torch.ops.lotr.row_core_backward(*args)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_more_cores_and_tokens_than_int32_counts() -> None:
    """As many as that by a stride of 0, and on meta."""
    many, row_core = 2**31 + 9, torch.ops.lotr.row_core
    u, cores, zeros = torch.randn(2, 3), torch.randn(1, 3, 5), torch.zeros(2, dtype=torch.int64)
    h = row_core(u, cores.expand(many, 3, 5), torch.tensor([many - 1, 2**31]), None, None, SCALING)
    assert torch.allclose(h, SCALING * u @ cores[0])
    few = u[:1].expand(many, 3)
    tokens = torch.tensor([many - 1, 2**31])
    assert torch.allclose(row_core(few, cores, zeros, None, tokens, SCALING), SCALING * u[:1] @ cores[0])
    with pytest.raises(RuntimeError, match=rf"tokens: expected rows of u in \[0, {many}\), got {many} in row 0"):
        row_core(few, cores, zeros, None, tokens + 1, SCALING)
    offs = torch.zeros(1, dtype=torch.int32, device="meta")
    assert row_core(few.to("meta"), cores.to("meta"), None, offs, None, SCALING).shape == (many, 5)


def test_no_core_is_copied_for_a_row() -> None:
    """Forward and backward allocate no more than their results and the sorted order; a core a row would be 8 MB."""
    given = case(2000, 2000, 50, 32, 32, torch.float32)

    def step() -> None:
        h = ops.row_core(given["u"], given["cores"], index=given["index"], tokens=given["tokens"], scaling=SCALING)
        torch.autograd.grad(h, (given["u"], given["cores"]), given["g"])

    step()
    results = 4 * (3 * 2000 * 32 + 50 * 32 * 32)
    assert results / 2 < peak_bytes(step, torch.device("cpu")) < 2 * results < 2000 * 32 * 32 * 4 / 4


def test_strided_operands() -> None:
    given = case(37, 11, 7, 5, 3, torch.float32)
    u = torch.full((11, 15), float("nan"))
    u[:, 1:15:3] = given["u"].detach()
    cores = torch.full((7, 3, 9), float("nan"))
    cores[..., 2:7] = given["cores"].detach().mT
    index, tokens = torch.stack([given["index"], given["tokens"]], 1).unbind(1)
    wide_g = given["g"].expand(2, -1, -1).permute(1, 2, 0)[..., 1]
    args = (u[:, 1:15:3], cores[..., 2:7].mT, index, None, tokens, SCALING)
    want = truth(*(given[name] for name in ("u", "cores", "index", "tokens", "g")))
    got = torch.ops.lotr.row_core(*args), *torch.ops.lotr.row_core_backward(wide_g, *args, True, True)
    for a, b in zip(got, want, strict=True):
        close(a, b, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    given = case(9, 5, 4, 3, 2, dtype)
    u, cores, index, tokens, g = (given[name] for name in ("u", "cores", "index", "tokens", "g"))
    offs = torch.tensor([2, 2, 4, 5], dtype=torch.int32)
    for args in (
        (u, cores, index, None, tokens, 0.7),
        (u, cores, None, offs, None, 0.7),
        (u, cores.detach(), None, offs, None, 1.0),
    ):
        opcheck(torch.ops.lotr.row_core.default, args)
    for need in ((True, True), (True, False), (False, True)):
        opcheck(torch.ops.lotr.row_core_backward.default, (g, u.detach(), cores.detach(), index, None, tokens, 0.7, *need))


def test_compile_sees_one_operator() -> None:
    given = case(9, 5, 4, 3, 2, torch.float32)
    u, cores, index, tokens = (given[name] for name in ("u", "cores", "index", "tokens"))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    f = torch.compile(
        lambda u, c: ops.row_core(u, c, index=index, tokens=tokens, scaling=SCALING), backend=backend, fullgraph=True
    )
    h = f(u, cores)
    assert len(graphs) == 1 and "lotr.row_core" in graphs[0].code
    assert torch.equal(h, ops.row_core(u, cores, index=index, tokens=tokens, scaling=SCALING))


def test_batched_gradients() -> None:
    given = case(9, 5, 4, 3, 2, torch.float64)
    u, cores = given["u"], given["cores"]
    h = ops.row_core(u, cores, index=given["index"], tokens=given["tokens"], scaling=SCALING)
    gs = torch.stack([given["g"], -2 * given["g"]])
    batched = torch.autograd.grad(h, (u, cores), gs, is_grads_batched=True, retain_graph=True)
    for a, b in zip(batched, torch.autograd.grad(h, (u, cores), given["g"]), strict=True):
        assert torch.allclose(a[0], b) and torch.allclose(a[1], -2 * b)
