"""One core per row: h_i = s u_t(i) G_c(i), the small product between shrink and expand.

The rows are tokens that a router sent to experts, or a batch with rows of different tasks. The products with A and B stay dense
for all rows. Only this one depends on a row's core.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..compat import OLD_VMAP, constant_while_compiled, dispatch_key_included, is_compiling, jit_tracing, transformed
from . import composite, planner
from .grouped import expert_of_rows
from .library import accumulate_dtype, shapes
from .library import lotr as _lotr
from .operators import rank_rows

_PLAIN = (Tensor, nn.Parameter)


def row_core(
    u: Tensor,
    cores: Tensor,
    *,
    index: Tensor | None = None,
    offs: Tensor | None = None,
    tokens: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """h_i = scaling u_t(i) G_c(i): u [m, r_in] and cores [c, r_in, r_out] -> h [rows, r_out] in u's dtype.

    Exactly one of index and offs gives each row's core. index [rows] (int64): the core, or -1 for none, where h is zero.
    offs [c] (int32): where the rows of each core end, as for torch's grouped_mm: core j has the rows from offs[j - 1] (0) to
    offs[j]; rows from offs[-1] on have no core, and h is zero. tokens [rows] (int64): row i reads u[tokens[i]]; None: u[i].
    cores have u's dtype, or float32 beside a half-precision u (they are rounded to it).

    Differentiable in u and cores: du_t = s sum over a token's rows of dh_i G_c(i)^T and dG_c = s sum over the rows of c of
    u_t(i)^T dh_i, summed in float32 (float64 for float64) in the order of the rows, rounded once: the same bits at any number
    of threads. Under functorch, in a recorded backward and without kernels, PyTorch operations compute the same.

    Raises TypeError or ValueError with name, expected and got. On a GPU the values of index, offs and tokens are not checked,
    because that would synchronise: a row with a core outside [-1, c), or with a token that does not exist, gets NaN and no
    gradient; offs must ascend.
    """
    _check(u, cores, index, offs, tokens)
    if _kernels(u, cores):
        try:
            return _lotr.row_core.default(u, cores, index, offs, tokens, scaling)
        except RuntimeError as error:
            if not str(error).startswith("lotr::row_core: "):
                raise
            raise ValueError(
                str(error).removeprefix("lotr::row_core: ")
            ) from None  # a value of index, offs or tokens: `_check` has checked all else
    return composite.row_core(u, cores, _index(u, cores, index, offs, tokens), tokens, scaling)


def _kernels(u: Tensor, cores: Tensor) -> bool:
    """Whether our kernels can run: they exist for u, and no tracer, functorch transform or tensor subclass is in the way."""
    if not is_compiling():
        if transformed() or jit_tracing() is not None:
            return False
        if type(u) not in _PLAIN or type(cores) not in _PLAIN:
            return False
    return _obstacle(max(cores.shape[1:]), u.dtype, u.device) is None


@constant_while_compiled  # the driver is queried outside of the compiled graph
def _obstacle(rank: int, dtype: torch.dtype, device: torch.device) -> str | None:
    return planner.obstacle_to_kernels(rank, dtype, device)


def _index(u: Tensor, cores: Tensor, index: Tensor | None, offs: Tensor | None, tokens: Tensor | None) -> Tensor:
    """The core of each row, -1 for none."""
    if index is not None:
        return index
    index = expert_of_rows(offs, (u if tokens is None else tokens).shape[0])
    return torch.where(index < cores.shape[0], index, -1)


def _check(u: Tensor, cores: Tensor, index: Tensor | None, offs: Tensor | None, tokens: Tensor | None) -> None:
    if (index is None) == (offs is None):
        raise TypeError(f"index, offs: expected exactly one of them, got {'none' if index is None else 'both'}")
    if u.dim() != 2:
        raise ValueError(f"u: expected shape [m, r_in], got {tuple(u.shape)}")
    if cores.dim() != 3 or cores.shape[1] != u.shape[1] or 0 in cores.shape:
        raise ValueError(f"cores: expected shape (c, {u.shape[1]}, r_out) with c, r_out >= 1, got {tuple(cores.shape)}")
    if cores.dtype not in (u.dtype, accumulate_dtype(u.dtype)):
        wide = "" if u.dtype == accumulate_dtype(u.dtype) else " or torch.float32"
        raise TypeError(f"cores: expected {u.dtype}{wide}, got {cores.dtype}")
    for name, tensor, dtype in (("index", index, torch.int64), ("offs", offs, torch.int32), ("tokens", tokens, torch.int64)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.dim() != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {tuple(tensor.shape)}")
    rows = u.shape[0] if tokens is None else tokens.shape[0]
    if index is not None and index.shape[0] != rows:
        raise ValueError(f"index: expected {rows} rows, as {'u' if tokens is None else 'tokens'} has, got {index.shape[0]}")
    if offs is not None and offs.shape[0] != cores.shape[0]:
        raise ValueError(f"offs: expected one end per core, {cores.shape[0]}, got {offs.shape[0]}")


@shapes("row_core")
def _(u: Tensor, cores: Tensor, index: Tensor | None, offs: Tensor | None, tokens: Tensor | None, scaling: float) -> Tensor:
    return rank_rows(u, (u if tokens is None else tokens).shape[0], cores.shape[2])


@shapes("row_core_backward")
def _(g, u, cores, index, offs, tokens, scaling, need_u, need_cores) -> tuple[Tensor, Tensor]:
    dcores = u.new_empty(cores.shape if need_cores else (0, 0, 0), dtype=accumulate_dtype(u.dtype))
    return rank_rows(u, *u.shape) if need_u else u.new_empty(0, 0), dcores


def _backward(ctx, g: Tensor):
    u, cores, index, offs, tokens = ctx.saved_tensors
    need_u, need_cores = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled() or dispatch_key_included(OLD_VMAP) or transformed():  # recorded, batched, or with tangents
        with torch.enable_grad():
            h = composite.row_core(u, cores, _index(u, cores, index, offs, tokens), tokens, ctx.scaling)
        wanted = [t for t, need in ((u, need_u), (cores, need_cores)) if need]
        found = list(torch.autograd.grad(h, wanted, g, create_graph=torch.is_grad_enabled(), retain_graph=True))
        return found.pop(0) if need_u else None, found.pop(0) if need_cores else None, None, None, None, None
    du, dcores = _lotr.row_core_backward.default(g, u, cores, index, offs, tokens, ctx.scaling, need_u, need_cores)
    return du if need_u else None, dcores.to(cores.dtype) if need_cores else None, None, None, None, None


def _setup(ctx, inputs, output) -> None:
    u, cores, index, offs, tokens, ctx.scaling = inputs
    ctx.save_for_backward(u, cores, index, offs, tokens)


torch.library.register_autograd("lotr::row_core", _backward, setup_context=_setup)
