"""The table of operators: their formulas in float64, and the forms in which a test calls them.

A formula has the operator's name, takes its arguments and returns its results, both by the names
of the schema. For example

    shrink(Tensor x, Tensor A, float p=0.0, Tensor? seed=None) -> Tensor u     the schema
    def shrink(x, A, drop, **_): return {"u": drop(x) @ A}                     the formula
    "shrink": Entry(shrink)                                                    called in one form

test_operators.py compares each operator with its formula.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from operands import BETA, Case, S
from torch import Tensor

from lotr_ext import reference

# ---- formulas in float64 -------------------------------------------------------------------------

# `drop`, the dropout, is an argument, too. A sum that is absent is zero. Arguments that do not
# change the numbers, like the strategy, go to `**_`. The results are those that the operator
# returns, and those that it adds to a sum in place. Formulas only add and multiply:
# `test_operators.exact_results` relies on it.
Results = dict[str, Tensor]
Drop = Callable[[Tensor], Tensor]


def shrink(x: Tensor, A: Tensor, drop: Drop, **_: object) -> Results:
    return {"u": drop(x) @ A}


def expand_add_(y: Tensor, u: Tensor, F: Tensor, drop: Drop, **_: object) -> Results:
    return {"y": y + drop(u @ F.mT)}


def expand(y: Tensor, u: Tensor, F: Tensor, **_: object) -> Results:
    return {"sum": y + u @ F.mT}


def fold(B: Tensor, core: Tensor, scaling: float, **_: object) -> Results:
    return {"F": reference.fold(B, core, scaling)}


def row_core(
    u: Tensor,
    cores: Tensor,
    index: Tensor | None,
    offs: Tensor | None,
    tokens: Tensor | None,
    scaling: float,
    **_: object,
) -> Results:
    """h_i = s u_t G_c, where row i has the token t = tokens_i and the core c = index_i.

    A row without a core, c = -1, is zero.
    """
    if tokens is None:
        tokens = torch.arange(len(u))
    if index is None:
        index = torch.bucketize(torch.arange(len(tokens)), offs.long(), right=True)
        index[index == len(offs)] = -1
    core_of_row = cores[index.clamp(min=0)] * (index >= 0)[:, None, None]
    return {"h": (scaling * u[tokens].unsqueeze(1) @ core_of_row).squeeze(1)}


def row_core_backward(g: Tensor, u: Tensor, cores: Tensor, **rows: object) -> Results:
    leaves = {"u": u.detach().requires_grad_(), "cores": cores.detach().requires_grad_()}
    du, dcores = torch.autograd.grad(row_core(**leaves, **rows)["h"], list(leaves.values()), g)
    return {"du": du, "dcores": dcores}


def layer_forward_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, B: Tensor, **_: object
) -> Results:
    y = x @ weight.mT + h @ B.mT
    return {"y": y if bias is None else y + bias}


def layer_forward_projected(
    u: Tensor, B: Tensor, core: Tensor, scaling: float, **operands: object
) -> Results:
    F = reference.fold(B, core, scaling)
    return {"F": F, **layer_forward_rows(h=u, B=F, **operands)}


def layer_forward(x: Tensor, A: Tensor, drop: Drop, **operands: object) -> Results:
    u = drop(x) @ A
    return {"u": u, **layer_forward_projected(x=x, u=u, **operands)}


def layer_forward_few_tokens(**operands: object) -> Results:
    results = layer_forward(**operands)
    return {"y": results["y"], "u": results["u"]}


def layer_backward_(
    g: Tensor,
    weight: Tensor,
    x: Tensor,
    u: Tensor,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    dA: Tensor,
    dB: Tensor,
    drop: Drop,
    **_: object,
) -> Results:
    du = g @ reference.fold(B, core, scaling)
    Q = g.mT @ u
    return {
        "dx": g @ weight + drop(du @ A.mT),
        "dA": dA + drop(x).mT @ du,
        "dB": dB + scaling * Q @ core,
        "dcore": scaling * Q.mT @ B,
    }


def layer_backward_few_tokens_(**operands: object) -> Results:
    return layer_backward_(**operands)


def layer_backward_projected_(
    g: Tensor,
    weight: Tensor | None,
    u: Tensor,
    F: Tensor | None,
    B: Tensor,
    core: Tensor,
    scaling: float,
    du: Tensor,
    dx: Tensor,
    dB: Tensor,
    **_: object,
) -> Results:
    Q = g.mT @ u
    results = {"dB": dB + scaling * Q @ core, "dcore": scaling * Q.mT @ B}
    if F is not None:
        results["du"] = du + g @ F
    if weight is not None:
        results["dx"] = dx + g @ weight
    return results


def layer_backward_rows_(
    g: Tensor,
    weight: Tensor | None,
    h: Tensor,
    B: Tensor,
    dx: Tensor,
    dB: Tensor,
    need_h: bool,
    **_: object,
) -> Results:
    results = {"dB": dB + g.mT @ h}
    if need_h:
        results["dh"] = g @ B
    if weight is not None:
        results["dx"] = dx + g @ weight
    return results


def shrink_backward_(
    du: Tensor, dx: Tensor, x: Tensor, A: Tensor | None, dA: Tensor, drop: Drop, **_: object
) -> Results:
    results = {"dA": dA + drop(x).mT @ du}
    if A is not None:
        results["dx"] = dx + drop(du @ A.mT)
    return results


# ---- the forms in which an operator is called ----------------------------------------------------

Form = dict[str, object]  # arguments that replace the case's


def row_forms(c: Case) -> Iterator[Form]:
    """Yields all ways to say which core and which token a row has. `g` is for the backward."""
    rows = torch.arange(c.m)
    index = torch.tensor([0, 1, -1, -1]).repeat(c.m // 4 + 1)[: c.m]
    tokens = (rows * 7 + 3) % max(c.m, 1) // 2  # each about twice, in no order
    ends = torch.tensor((c.m // 3, c.m - c.m // 4), dtype=torch.int32)
    # A check of only the first and the last row would accept these rows as rows in order.
    reversed_inside = torch.cat([rows[:1], rows[1:-1].flip(0), rows[1:][-1:]])
    cores = ({"index": index, "offs": None}, {"index": None, "offs": ends})
    for core, token in itertools.product(cores, (tokens, None)):
        yield {**core, "tokens": token, "g": c.h}
    yield {"index": 0 * index, "offs": None, "tokens": reversed_inside, "g": c.h}


def forward_forms(c: Case) -> Iterator[Form]:
    for strategy, bias in itertools.product((0, BETA), (c.bias, None)):
        yield {"strategy": strategy, "bias": bias}


def forward_rows_forms(c: Case) -> Iterator[Form]:
    """u and F stand for h and B, which have the same roles and one more column."""
    for form in forward_forms(c):
        yield {**form, "h": c.u, "B": c.F}


def new_or_added(**sums: Tensor) -> Iterator[Form]:
    """Gradients in new tensors, then added to these sums."""
    yield dict.fromkeys(sums)
    yield sums


def backward_forms(c: Case) -> Iterator[Form]:
    F = reference.fold(c.B.double(), c.core.double(), S).to(c.dtype)
    for strategy in (0, BETA):
        for sums in new_or_added(dA=c.sums(c.k, c.r), dB=c.sums(c.n, c.r_out)):
            yield {"F": F, "strategy": strategy, **sums}


def backward_projected_forms(c: Case) -> Iterator[Form]:
    return new_or_added(du=c.make(c.m, c.r), dx=c.make(c.m, c.k), dB=c.sums(c.n, c.r_out))


def backward_rows_forms(c: Case) -> Iterator[Form]:
    for sums in new_or_added(dx=c.make(c.m, c.k), dB=c.sums(c.n, c.r)):
        yield {"h": c.u, "B": c.F, **sums}


def backward_projected_forms_without_a_base(c: Case) -> Iterator[Form]:
    for F in (c.F, None):
        yield {"weight": None, "F": F, "du": None, "dx": None, "dB": c.sums(c.n, c.r_out)}


def backward_rows_forms_without_a_base(c: Case) -> Iterator[Form]:
    for need_h in (True, False):
        dB = c.sums(c.n, c.r)
        yield {"weight": None, "h": c.u, "B": c.F, "dx": None, "dB": dB, "need_h": need_h}


def shrink_backward_forms(c: Case) -> Iterator[Form]:
    """A new dA, then dA and dx added to sums."""
    yield {"du": c.u, "dx": None, "A": None, "dA": None}
    yield {"du": c.u, "dx": c.make(c.m, c.k), "dA": c.sums(c.k, c.r)}


# ---- the table -----------------------------------------------------------------------------------

# `helpers.Exact.roundings` by the name of the result. A result that is absent is rounded once.
ROUNDED_ONCE: dict[str, int] = {}
Y_ROUNDINGS = {"y": 5}  # u, F, the base product, the factors and y
DX_ROUNDINGS = {"dx": 6}  # g, du, F, A, the base product and dx
# Sums over tokens: up to four operands and the sum.
SUM_ROUNDINGS = dict.fromkeys(("dA", "dB", "dcore"), 5)


class Entry(NamedTuple):
    """An operator, which has the name of its formula."""

    formula: Callable[..., Results]
    forms: Callable[[Case], Iterable[Form]] = lambda case: [{}]  # default: the case's arguments
    roundings: dict[str, int] = ROUNDED_ONCE  # of its results


ENTRIES = {
    "shrink": Entry(shrink),
    "expand_add_": Entry(expand_add_),
    "expand": Entry(expand),
    "fold": Entry(fold),
    "row_core": Entry(row_core, row_forms),
    "row_core_backward": Entry(row_core_backward, row_forms),
    "layer_forward": Entry(layer_forward, forward_forms, Y_ROUNDINGS),
    "layer_forward_few_tokens": Entry(layer_forward_few_tokens, forward_forms, Y_ROUNDINGS),
    "layer_forward_projected": Entry(layer_forward_projected, forward_forms, Y_ROUNDINGS),
    "layer_forward_rows": Entry(layer_forward_rows, forward_rows_forms, Y_ROUNDINGS),
    "layer_backward_": Entry(layer_backward_, backward_forms, DX_ROUNDINGS | SUM_ROUNDINGS),
    "layer_backward_few_tokens_": Entry(
        layer_backward_few_tokens_, backward_forms, DX_ROUNDINGS | SUM_ROUNDINGS
    ),
    "layer_backward_projected_": Entry(
        layer_backward_projected_, backward_projected_forms, DX_ROUNDINGS | SUM_ROUNDINGS
    ),
    "layer_backward_rows_": Entry(layer_backward_rows_, backward_rows_forms, DX_ROUNDINGS),
    "projected_sums": Entry(
        layer_backward_projected_, backward_projected_forms_without_a_base, SUM_ROUNDINGS
    ),
    "rows_sums": Entry(layer_backward_rows_, backward_rows_forms_without_a_base),
    "shrink_backward_": Entry(shrink_backward_, shrink_backward_forms),
}
