"""The frozen product of a mixture's experts, rows sorted by expert: y_i = x_i W_c(i)^T, and its gradients.

    grouped_mm      y_i = x_i W_c(i)^T      [rows, k], [e, n, k] -> [rows, n]
    grouped_outer   dW_c = sum over the rows of c of g_i^T x_i     [rows, n], [rows, k] -> [e, n, k]

offs [e] (int32) holds where each expert's rows end, as for torch.nn.functional.grouped_mm. Each operator is the other's
gradient. On a GPU torch's grouped product runs if it supports the operands. Otherwise, and on a CPU, one product per expert
runs: on a CPU torch's own is such a loop too, and refuses float64 and rows that are no multiple of 16 bytes. Both are
operators, so that a compiled graph contains no loop.

Of a packed (quantised) weight, `GroupedPacked` makes a few experts at a time dense, in the forward and again in the backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..compat import is_compiling, jit_tracing, not_compiled, transformed
from .library import check_tensors, shapes

_CHUNK = 16  # bytes that a row must be a multiple of for torch's grouped product
_DENSE = {"cpu": 2**21, "cuda": 2**26}  # bytes of experts that are made dense at once, unless one expert has more


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product supports these: bfloat16 on a GPU, with rows or columns aligned to 16 bytes."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or not x.shape[0]:
        return False
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    sizes = (x.stride(0), max(weight.stride(1), weight.stride(2)))
    unit = x.stride(1) == 1 and 1 in (weight.stride(1), weight.stride(2))
    return unit and all(size * x.element_size() % _CHUNK == 0 for size in sizes)


def _ends(offs: Tensor, rows: int) -> list[int]:
    """offs as numbers. Raises ValueError unless they ascend in [0, rows]."""
    ends = offs.tolist()
    if any(a > b for a, b in pairwise([0, *ends, rows])):
        raise ValueError(f"offs: expected ascending ends in [0, {rows}], got {ends}")
    return ends


def _check(name: str, first: Tensor, second: Tensor, offs: Tensor) -> None:
    check_tensors(name, (first, second, offs), values=True)
    operands = ("weight" if name == "grouped_mm" else "x", second.dtype, first.dtype), ("offs", offs.dtype, torch.int32)
    for label, dtype, expected in operands:
        if dtype != expected:
            raise RuntimeError(f"lotr::{name}: {label}: expected dtype {expected}, got {dtype}")


@torch.library.custom_op("lotr::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """y_i = x_i W_c(i)^T: x [rows, k], weight [e, n, k] of x's dtype, in any layout, offs [e] (int32) -> [rows, n].

    Rows from offs[-1] on belong to no expert: on a GPU they are left as they were, elsewhere they are zero. Differentiable.
    """
    _check("grouped_mm", x, weight, offs)
    if _takes(x, weight):
        return nnf.grouped_mm(x, weight.mT, offs=offs)
    y, ends = x.new_empty(x.shape[0], weight.shape[1]), _ends(offs, x.shape[0])
    _products(x, weight, [0, *ends], y)
    y[ends[-1] :].zero_()
    return y


def _products(x: Tensor, weight: Tensor, bounds: Sequence[int], y: Tensor) -> None:
    """y_i <- x_i W_c^T for the rows i of expert c, which are bounds[c] to bounds[c + 1]."""
    for c, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            torch.mm(x[start:end], weight[c].t(), out=y[start:end])


@shapes("grouped_mm")
def _(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    torch._check(x.shape[1] == weight.shape[2], lambda: f"grouped_mm: x: expected {weight.shape[2]} columns, got {x.shape[1]}")
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("lotr::grouped_outer", mutates_args=())
def grouped_outer(g: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    """dW_c = sum over the rows of c of g_i^T x_i: g [rows, n], x [rows, k], offs [e] -> [e, n, k]. Differentiable."""
    _check("grouped_outer", g, x, offs)
    dW, start = g.new_zeros(offs.shape[0], g.shape[1], x.shape[1]), 0
    for expert, end in enumerate(_ends(offs, g.shape[0])):
        if end > start:
            torch.mm(g[start:end].t(), x[start:end], out=dW[expert])
        start = end
    return dW


@shapes("grouped_outer")
def _(g: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    return g.new_empty(offs.shape[0], g.shape[1], x.shape[1])


def _setup(ctx, inputs, output) -> None:
    first, second, offs = inputs
    need_first, need_second = ctx.needs_input_grad[:2]
    ctx.save_for_backward(first if need_second else None, second if need_first else None, offs)


def _grouped_mm_backward(ctx, g: Tensor):
    x, weight, offs = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    g = g.contiguous()  # a sum's gradient is one element, expanded
    if not is_compiling() and transformed():
        dW = _plain_outer(g, x, offs) if need_weight else None
        return _plain_products(g, weight.mT, offs) if need_x else None, dW, None
    return grouped_mm(g, weight.mT, offs) if need_x else None, grouped_outer(g, x, offs) if need_weight else None, None


def _grouped_outer_backward(ctx, dW: Tensor):
    g, x, offs = ctx.saved_tensors
    need_g, need_x = ctx.needs_input_grad[:2]
    return grouped_mm(x, dW, offs) if need_g else None, grouped_mm(g, dW.mT, offs) if need_x else None, None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_setup)
grouped_outer.register_autograd(_grouped_outer_backward, setup_context=_setup)


def _plain_products(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """grouped_mm in PyTorch operations: forward-mode AD drops the tangents of a custom operator without an error, and functorch
    refuses its second derivatives. If vmap hides the values of offs, each expert multiplies all rows."""
    rows = x.shape[0]
    try:
        bounds = [0, *_ends(offs, rows)]
    except RuntimeError:  # batched by vmap
        expert = expert_of_rows(offs, rows).unsqueeze(1)
        return sum(torch.where(expert == c, x @ W.t(), 0) for c, W in enumerate(weight.unbind()))
    parts = [x[start:end] @ W.t() for (start, end), W in zip(pairwise(bounds), weight.unbind())]
    return torch.cat((*parts, x.new_zeros(rows - bounds[-1], weight.shape[1])))


def _plain_outer(g: Tensor, x: Tensor, offs: Tensor) -> Tensor:
    """grouped_outer in PyTorch operations."""
    return torch.stack([g[start:end].t() @ x[start:end] for start, end in pairwise([0, *_ends(offs, g.shape[0])])])


# ---- packed weights ----------------------------------------------------------------------------------------------------


class Packed(ABC):
    """Frozen matrices of experts W [e, n, k] in a quantised format, of which a few at a time are made dense.

    format: its name. shape: (e, n, k). dtype: in which the format itself gives W; None if it gives it in any. A reader of a
    weight can use `shape`, `dtype`, `device`, `is_meta`, `requires_grad` and `mT` as those of a tensor.
    """

    format: str
    shape: tuple[int, int, int]
    dtype: torch.dtype | None = None
    device: torch.device
    requires_grad = False

    @abstractmethod
    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """W of the experts first to end - 1: [end - first, n, k] in dtype, in any layout, that the caller may keep."""

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    @property
    def mT(self) -> Packed:  # as torch names it
        """The transposed matrices."""
        return _Transposed(self)


class _Transposed(Packed):
    def __init__(self, of: Packed):
        e, n, k = of.shape
        self.of, self.format, self.shape, self.dtype, self.device = of, of.format, (e, k, n), of.dtype, of.device

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        return self.of.dense(first, end, dtype).mT

    @property
    def mT(self) -> Packed:
        return self.of


def _chunks(bounds: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `most` experts [first, end) that all have rows; expert c has those of bounds[c] to bounds[c + 1]."""
    first = None
    for expert, (start, end) in enumerate([*pairwise(bounds), (0, 0)]):
        if first is not None and (start == end or expert - first == most):
            yield first, expert
            first = None
        if first is None and end > start:
            first = expert


class GroupedPacked(torch.autograd.Function):
    """grouped_mm over a packed weight: y_i = x_i W_c(i)^T.   backward: dx = g W, from the packed weight again.

    apply(x [rows, k], weight, offs [e]) -> [rows, n]. No dense matrix is saved. The matrices of one chunk are dense at a time:
    at most 2 MiB (64 on a GPU) or one expert's, beside what the format's library takes. Experts without rows stay packed.
    Differentiable in x, any number of times. Rows from offs[-1] on are zero.
    """

    @staticmethod
    def forward(x: Tensor, weight: Packed, offs: Tensor) -> Tensor:
        _, n, k = weight.shape
        most, (rows, _) = max(1, _DENSE.get(x.device.type, 2**26) // (n * k * x.element_size())), x.shape
        y, bounds = x.new_empty(rows, n), [0, *_ends(offs, rows)]
        for first, end in _chunks(bounds, most):
            part, (start, stop) = weight.dense(first, end, x.dtype), (bounds[first], bounds[end])
            if _takes(x, part):
                y[start:stop] = nnf.grouped_mm(x[start:stop], part.mT, offs=offs[first:end] - start)
            else:
                _products(x, part, bounds[first : end + 1], y)
            del part  # before the next one is made
        y[bounds[-1] :].zero_()
        return y

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.weight, offs = inputs
        ctx.save_for_backward(offs)

    @staticmethod
    def backward(ctx, g: Tensor):
        (offs,) = ctx.saved_tensors
        return GroupedPacked.apply(g.contiguous(), ctx.weight.mT, offs), None, None


@not_compiled  # which experts have rows decides what is made dense
def grouped_packed(x: Tensor, weight: Packed, offs: Tensor) -> Tensor:
    """`GroupedPacked`, with checks."""
    if x.shape[1] != weight.shape[2] or offs.shape[0] != weight.shape[0]:
        e, _, k = weight.shape
        raise ValueError(f"x: expected [rows, {k}] of {e} experts, got {tuple(x.shape)} and {offs.shape[0]} ends")
    return GroupedPacked.apply(x, weight, offs)


def expert_of_rows(offs: Tensor, rows: int) -> Tensor:
    """The expert of each row [rows] (int64); the number of experts for rows from offs[-1] on. rows may exceed int32."""
    return torch.searchsorted(offs.long(), torch.arange(rows, device=offs.device), right=True)


def of_groups_alone(run: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, offs: Tensor, tokens: Tensor | None) -> Tensor:
    """run(x, tokens) [rows, n], in which rows from offs[-1] on, and rows of x that no other row is of, have no part: whatever
    they hold, NaN too, they are zero in the output and in the gradient of x, and change no other gradient of any order.

    A product over all rows, such as x^T k, would turn zero times NaN into NaN. So on a CPU the products take only the rows of
    experts, and x is copied if some of its rows are not read. On other devices and in compiled graphs the values of offs are
    not read, because that would synchronise with the device: x and the output are copied, with zeros in place of such rows.

    Raises ValueError on a CPU for an offs that does not ascend in [0, rows] and for a token that does not exist.
    """
    rows, m = (x if tokens is None else tokens).shape[0], x.shape[0]
    if _is_known(offs) and (tokens is None or _is_known(tokens)):
        end = _ends(offs, rows)[-1]
        if tokens is None:
            y = run(x if end == rows else x[:end], None)
        else:
            y = run(*_read(x, tokens[:end]))
        return y if end == rows else torch.cat((y, y.new_zeros(rows - end, y.shape[1])))
    outside = unread = torch.arange(rows, device=offs.device) >= offs[-1]
    if tokens is not None:
        read = torch.zeros(m + 1, dtype=torch.bool, device=x.device).index_fill(0, tokens.masked_fill(outside, m), True)
        unread, tokens = ~read[:m], tokens.masked_fill(outside, 0)
    return run(x.masked_fill(unread.unsqueeze(1), 0), tokens).masked_fill(outside.unsqueeze(1), 0)


def _read(x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """x with zeros in the rows that tokens do not name, itself where they name all."""
    m = x.shape[0]
    bad = ((tokens < 0) | (tokens >= m)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"tokens: expected rows of x in [0, {m}), got {int(tokens[row])} in row {row}")
    unread = torch.ones(m, dtype=torch.bool).index_fill_(0, tokens, False)
    return (x.masked_fill(unread.unsqueeze(1), 0) if unread.any() else x), tokens


def _is_known(t: Tensor) -> bool:
    """Whether a tensor's values can be read without a synchronisation or a graph break."""
    return t.device.type == "cpu" and type(t) is Tensor and not is_compiling() and jit_tracing() is None and not transformed()


def grouped_linear(x: Tensor, weight: Tensor | Packed, offs: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """x_i W_c(i)^T + bias_c(i) [rows, n] for rows sorted by expert; bias [e, n]. dtype: what autocast casts to, or None."""
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if isinstance(weight, Packed):
        y = grouped_packed(x, weight, offs)
    else:
        product = grouped_mm if is_compiling() or not transformed() else _plain_products
        y = product(x, weight if dtype is None else weight.to(dtype), offs)
    if bias is None:
        return y
    experts = expert_of_rows(offs, x.shape[0]).clamp(max=bias.shape[0] - 1)
    return y + bias[experts]
