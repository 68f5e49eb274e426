"""Experts: lotr_grouped_linear and LoTRExperts against one product an expert in float64. MODELS has an adapted mixture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import worst
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRExperts, LoTRFactors, LoTRLinear, lotr_grouped_linear
from lotr_ext.core.request import ADAPTER_OFF, open_request

E, K, N, R, M, ROWS, S = 5, 16, 20, (3, 4), 30, 50, 0.7
OFFS = [7, 7, 21, 40, 44]  # an expert without rows, and six rows without an expert
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def truth(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor | None,
    A: Tensor,
    B: Tensor,
    cores: Tensor,
    tasks: Tensor | None = None,
) -> Tensor:
    """The definition, one row at a time in its expert's turn."""
    rows, parts, start = x if tokens is None else x[tokens], [], 0
    for c, end in enumerate(OFFS):
        part = rows[start:end]
        y = part @ weight[c].T + (0 if bias is None else bias[c])
        if tasks is None:
            y = y + S * part @ A @ cores[c] @ B.T
        else:
            own = (tasks if tokens is None else tasks[tokens])[start:end]
            G = cores[own.clamp(min=0), c] * (own >= 0)[:, None, None]
            y = y + S * ((part @ A).unsqueeze(1) @ G).squeeze(1) @ B.T
        parts.append(y)
        start = end
    return torch.cat([*parts, rows.new_zeros(len(rows) - start, N)])


def make(
    by_token: bool, tasks: bool, bias: bool, dtype: torch.dtype = torch.float64
) -> tuple[dict, Tensor | None, list[Tensor]]:
    """Keyword arguments, tokens, and the leaves x, A, B, cores."""
    x = torch.randn(M if by_token else ROWS, K, dtype=dtype)
    tokens = torch.randint(0, M, (ROWS,)) if by_token else None
    A, B = torch.randn(K, R[0], dtype=dtype) / 4, torch.randn(N, R[1], dtype=dtype) / 4
    cores = torch.randn(*((3,) if tasks else ()), E, *R, dtype=dtype) / 2
    given = {
        "weight": torch.randn(E, N, K, dtype=dtype) / 4,
        "bias": torch.randn(E, N, dtype=dtype) if bias else None,
    }
    if tasks:
        given["core_index"] = torch.randint(-1, 3, (len(x),))
    return given, tokens, [t.requires_grad_() for t in (x, A, B, cores)]


def ours(given: dict, tokens: Tensor | None, leaves: list[Tensor]) -> Tensor:
    x, A, B, cores = leaves
    weight, further = (
        given["weight"],
        {key: value for key, value in given.items() if key != "weight"},
    )
    offs = torch.tensor(OFFS, dtype=torch.int32)
    return lotr_grouped_linear(x, weight, offs, A, B, cores, S, tokens=tokens, **further)


def definition(given: dict, tokens: Tensor | None, leaves: list[Tensor]) -> Tensor:
    x, A, B, cores = leaves
    return truth(x, given["weight"], given["bias"], tokens, A, B, cores, given.get("core_index"))


def with_gradients(call: Callable[[], Tensor], leaves: list[Tensor], g: Tensor) -> list[Tensor]:
    y = call()
    return [y, *torch.autograd.grad(y, leaves, g)]


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("tasks", [False, True], ids=["one", "tasks"])
@pytest.mark.parametrize("by_token", [False, True], ids=["sorted", "tokens"])
def test_value_and_gradients(by_token: bool, tasks: bool, dtype: torch.dtype) -> None:
    given, tokens, leaves = make(by_token, tasks, bias=True, dtype=dtype)
    wide = {key: t.double() if t.is_floating_point() else t for key, t in given.items()}
    exact = [t.detach().double().requires_grad_() for t in leaves]
    g = torch.randn(ROWS, N, dtype=dtype)
    got = with_gradients(lambda: ours(given, tokens, leaves), leaves, g)
    want = with_gradients(lambda: definition(wide, tokens, exact), exact, g.double())
    assert worst(got, want) < BOUNDS[dtype]
    assert got[0].dtype == dtype and not got[0][OFFS[-1] :].any()


def without_an_expert(leaves: list[Tensor], tokens: Tensor | None, value: float) -> None:
    """Fills what no expert reads: the rows of x past the last end, or the last token of x."""
    x = leaves[0]
    with torch.no_grad():
        if tokens is None:
            x[OFFS[-1] :] = value
        else:
            x[-1] = value
            tokens[: OFFS[-1]] %= M - 1
            tokens[OFFS[-1] :] = M - 1


@pytest.mark.parametrize("context", ["plain", "checkpoint", "compiled", "module"])
@pytest.mark.parametrize("tasks", [False, True], ids=["one", "tasks"])
@pytest.mark.parametrize("by_token", [False, True], ids=["sorted", "tokens"])
def test_rows_without_an_expert_are_not_read(by_token: bool, tasks: bool, context: str) -> None:
    """They may hold NaN, as the end of a buffer does that is longer than its rows."""
    given, tokens, leaves = make(by_token, tasks, bias=True)
    without_an_expert(leaves, tokens, torch.nan)
    g = torch.randn(ROWS, N, dtype=torch.float64)

    def call() -> Tensor:
        return ours(given, tokens, leaves)

    def module() -> Tensor:
        x, A, B, cores = leaves
        experts = LoTRExperts(E, K, N, R, bias=True, dtype=torch.float64, scaling=S)
        tensors = {"weight": given["weight"], "bias": given["bias"]}
        tensors |= {"factors.A.value": A, "factors.B.value": B}
        state = {}
        if tasks:
            state = {experts: lambda x: (cores, given["core_index"])}
        else:
            tensors["core"] = cores
        offs = torch.tensor(OFFS, dtype=torch.int32)
        with open_request(state):
            return torch.func.functional_call(experts, tensors, (x, offs, tokens))

    calls = {"plain": call, "module": module}
    if context in CONTEXTS:
        calls[context] = lambda: CONTEXTS[context](call)
    got = with_gradients(calls[context], leaves, g)
    want = with_gradients(lambda: definition(given, tokens, leaves), leaves, g)
    assert worst(got, want) < 1e-12


CONTEXTS: dict[str, Callable[[Callable[[], Tensor]], Tensor]] = {
    "checkpoint": lambda call: checkpoint(call, use_reentrant=False),
    "compiled": lambda call: torch.compile(call, backend="aot_eager", fullgraph=True)(),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("tasks", [False, True], ids=["one", "tasks"])
def test_in_a_context(context: str, tasks: bool) -> None:
    given, tokens, leaves = make(True, tasks, bias=True)
    g = torch.randn(ROWS, N, dtype=torch.float64)
    got = with_gradients(lambda: CONTEXTS[context](lambda: ours(given, tokens, leaves)), leaves, g)
    assert worst(got, with_gradients(lambda: definition(given, tokens, leaves), leaves, g)) < 1e-12


@pytest.mark.parametrize("by_token", [False, True], ids=["sorted", "tokens"])
def test_double_backward(by_token: bool) -> None:
    given, tokens, leaves = make(by_token, False, bias=False)
    without_an_expert(leaves, tokens, torch.nan)
    given["weight"].requires_grad_()
    every = [*leaves, given["weight"]]
    found = []
    for call in (ours, definition):
        first = torch.autograd.grad(
            call(given, tokens, leaves).square().sum(), every, create_graph=True
        )
        found.append([*first, *torch.autograd.grad(sum(t.square().sum() for t in first), every)])
    assert worst(*found) < 1e-10


def test_autocast_computes_in_its_dtype() -> None:
    given, tokens, leaves = make(True, False, bias=True, dtype=torch.float32)
    want = definition(given, tokens, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(given, tokens, leaves)
    assert y.dtype == torch.bfloat16 and worst([y], [want]) < 3e-2


def test_autocast_leaves_float64_as_it_is() -> None:
    given, tokens, leaves = make(True, False, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(given, tokens, leaves)
    assert y.dtype == torch.float64 and worst([y], [definition(given, tokens, leaves)]) < 1e-12


def test_module_shares_factors_with_a_linear_layer() -> None:
    """The gradients of A and B are sums over experts and a linear layer of the same shape."""
    factors = LoTRFactors(K, N, R, dtype=torch.float64)
    experts = LoTRExperts(E, K, N, factors=factors, bias=True, dtype=torch.float64, scaling=S)
    linear = LoTRLinear(K, N, factors=factors, dtype=torch.float64, scaling=S)
    offs, x = torch.tensor(OFFS, dtype=torch.int32), torch.randn(ROWS, K, dtype=torch.float64)
    assert torch.equal(
        experts(x, offs),
        truth(
            x, experts.weight, experts.bias, None, factors.A.value, factors.B.value, experts.core
        ),
    )
    for core in (experts.core, linear.core):
        nn.init.normal_(core)
    A, B = factors.A.value, factors.B.value
    leaves = [A, B, experts.core, linear.core]
    got = torch.autograd.grad(experts(x, offs).sin().sum() + linear(x).sin().sum(), leaves)
    plain = truth(x, experts.weight, experts.bias, None, A, B, experts.core)
    plain = (
        plain.sin().sum()
        + (nn.functional.linear(x, linear.weight, linear.bias) + S * x @ A @ linear.core @ B.T)
        .sin()
        .sum()
    )
    assert worst(got, torch.autograd.grad(plain, leaves)) < 1e-12


def test_module_off_and_with_tasks_of_a_request() -> None:
    experts = LoTRExperts(E, K, N, R, dtype=torch.float64, scaling=S)
    nn.init.normal_(experts.core)
    offs, x, tokens = (
        torch.tensor(OFFS, dtype=torch.int32),
        torch.randn(M, K, dtype=torch.float64),
        torch.randint(0, M, (ROWS,)),
    )
    cores, tasks = torch.randn(3, E, *R, dtype=torch.float64), torch.randint(-1, 3, (M,))
    A, B = experts.factors.A.value, experts.factors.B.value
    with open_request({experts: ADAPTER_OFF}):
        assert (
            worst(
                [experts(x, offs, tokens)],
                [truth(x, experts.weight, None, tokens, A, B, 0 * experts.core)],
            )
            < 1e-12
        )
    with open_request({experts: lambda x: (cores, tasks)}):
        assert (
            worst(
                [experts(x, offs, tokens)],
                [truth(x, experts.weight, None, tokens, A, B, cores, tasks)],
            )
            < 1e-12
        )


BAD = [
    ("x", {"x": torch.zeros(M, K + 1)}, ValueError),
    ("offs", {"offs": torch.tensor(OFFS)}, TypeError),
    ("offs", {"offs": torch.tensor(OFFS[:-1], dtype=torch.int32)}, ValueError),
    ("offs", {"offs": torch.tensor([7, 3, 21, 40, 44], dtype=torch.int32)}, ValueError),
    ("tokens", {"tokens": torch.zeros(ROWS, dtype=torch.int32)}, TypeError),
    ("tokens", {"tokens": torch.full((ROWS,), M)}, ValueError),
    ("tokens", {"tokens": torch.full((ROWS,), -1)}, ValueError),
    ("weight", {"weight": torch.zeros(E, N)}, ValueError),
    ("weight", {"weight": torch.zeros(E, N, K, dtype=torch.float64)}, TypeError),
    ("bias", {"bias": torch.zeros(E, N + 1)}, ValueError),
    ("A", {"A": torch.zeros(K + 1, R[0])}, ValueError),
    ("cores", {"cores": torch.zeros(E + 1, *R)}, ValueError),
    ("core_index", {"core_index": torch.zeros(M)}, TypeError),
    (
        "core_index",
        {"core_index": torch.zeros(M + 1, dtype=torch.int64), "cores": torch.zeros(2, E, *R)},
        ValueError,
    ),
    ("scaling", {"scaling": float("nan")}, ValueError),
]


@pytest.mark.parametrize(
    ("name", "change", "error"), BAD, ids=[f"{row[0]}-{i}" for i, row in enumerate(BAD)]
)
def test_bad_input_is_refused_by_name(name: str, change: dict, error: type[Exception]) -> None:
    good = {
        "x": torch.zeros(M, K),
        "weight": torch.zeros(E, N, K),
        "offs": torch.tensor(OFFS, dtype=torch.int32),
        "A": torch.zeros(K, R[0]),
        "B": torch.zeros(N, R[1]),
        "cores": torch.zeros(E, *R),
        "scaling": S,
        "tokens": torch.zeros(ROWS, dtype=torch.int64),
    }
    with pytest.raises(error, match=f"^{name}: expected .*, got "):
        if name == "core_index" and "cores" not in change:
            good["cores"] = torch.zeros(2, E, *R)
        lotr_grouped_linear(**{**good, **change})
