"""Experts: lotr_grouped_linear, LoTRExperts and transformers' classes against loops in float64.

The tables of models (models.py) have an adapted mixture.
"""

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import zoo
from helpers import HALVES, relative, worst
from models import trained
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.integrations.moe import use_experts_implementation

from lotr_ext import (
    LoTRConfig,
    LoTRExperts,
    LoTRFactors,
    LoTRLinear,
    apply_lotr,
    lotr_grouped_linear,
)
from lotr_ext.adapted import adapted_layers
from lotr_ext.core import grouped
from lotr_ext.core.request import ADAPTER_OFF, open_request

E = 5  # experts
K = 16
N = 20
R = (3, 4)
M = 30  # tokens
ROWS = 50
S = 0.7
ENDS = [7, 7, 21, 40, 44]  # an expert without rows, and six rows without an expert
OFFS = torch.tensor(ENDS, dtype=torch.int32)
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Tasks(NamedTuple):
    """The state of a layer in a request."""

    cores: Tensor
    index: Tensor

    def index_of(self, x: Tensor) -> Tensor:
        return self.index


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
    """The definition, one expert after another."""
    rows = x if tokens is None else x[tokens]
    parts = []
    start = 0
    for c, end in enumerate(ENDS):
        part = rows[start:end]
        y = part @ weight[c].T + (0 if bias is None else bias[c])
        if tasks is None:
            y = y + S * part @ A @ cores[c] @ B.T
        else:
            task = (tasks if tokens is None else tasks[tokens])[start:end]
            G = cores[task.clamp(min=0), c] * (task >= 0)[:, None, None]
            y = y + S * ((part @ A).unsqueeze(1) @ G).squeeze(1) @ B.T
        parts.append(y)
        start = end
    return torch.cat([*parts, rows.new_zeros(len(rows) - start, N)])


def make(
    by_token: bool, tasks: bool, dtype: torch.dtype = torch.float64
) -> tuple[dict, Tensor | None, list[Tensor]]:
    """Returns keyword arguments, tokens, and the leaves x, A, B, cores."""
    x = torch.randn(M if by_token else ROWS, K, dtype=dtype)
    tokens = torch.randint(0, M, (ROWS,)) if by_token else None
    A = torch.randn(K, R[0], dtype=dtype) / 4
    B = torch.randn(N, R[1], dtype=dtype) / 4
    cores = torch.randn(*((3,) if tasks else ()), E, *R, dtype=dtype) / 2
    arguments = {
        "weight": torch.randn(E, N, K, dtype=dtype) / 4,
        "bias": torch.randn(E, N, dtype=dtype),
    }
    if tasks:
        arguments["core_index"] = torch.randint(-1, 3, (len(x),))
    return arguments, tokens, [t.requires_grad_() for t in (x, A, B, cores)]


def ours(arguments: dict, tokens: Tensor | None, leaves: list[Tensor]) -> Tensor:
    x, A, B, cores = leaves
    weight = arguments["weight"]
    further = {key: value for key, value in arguments.items() if key != "weight"}
    return lotr_grouped_linear(x, weight, OFFS, A, B, cores, S, tokens=tokens, **further)


def definition(arguments: dict, tokens: Tensor | None, leaves: list[Tensor]) -> Tensor:
    x, A, B, cores = leaves
    return truth(
        x, arguments["weight"], arguments["bias"], tokens, A, B, cores, arguments.get("core_index")
    )


def with_gradients(call: Callable[[], Tensor], leaves: list[Tensor], g: Tensor) -> list[Tensor]:
    y = call()
    return [y, *torch.autograd.grad(y, leaves, g)]


def check(
    arguments: dict,
    tokens: Tensor | None,
    leaves: list[Tensor],
    g: Tensor,
    call: Callable[[], Tensor] | None = None,
) -> list[Tensor]:
    """Compares outputs and gradients with float64. Returns ours.

    Args:
        arguments: Of lotr_grouped_linear.
        tokens: Its tokens.
        leaves: x, A, B, cores.
        g: The gradient of the output.
        call: What computes the output, instead of lotr_grouped_linear.
    """
    exact_arguments = {k: t.double() if t.is_floating_point() else t for k, t in arguments.items()}
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    actual = with_gradients(call or partial(ours, arguments, tokens, leaves), leaves, g)
    exact_call = partial(definition, exact_arguments, tokens, exact)
    assert worst(actual, with_gradients(exact_call, exact, g.double())) < BOUNDS[g.dtype]
    return actual


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("tasks", [False, True], ids=["one", "tasks"])
@pytest.mark.parametrize("by_token", [False, True], ids=["sorted", "tokens"])
def test_value_and_gradients(by_token: bool, tasks: bool, dtype: torch.dtype) -> None:
    y, *_ = check(*make(by_token, tasks, dtype=dtype), torch.randn(ROWS, N, dtype=dtype))
    assert y.dtype == dtype
    assert not y[ENDS[-1] :].any()


def test_the_base_product_is_zero_past_the_last_end() -> None:
    arguments, _, (x, *_) = make(False, False)
    y = grouped.linear(x, arguments["weight"], arguments["bias"], OFFS)
    assert y[: ENDS[-1]].all() and not y[ENDS[-1] :].any()


def without_an_expert(leaves: list[Tensor], tokens: Tensor | None, value: float) -> None:
    """Fills what no expert reads: the rows of x past the last end, or the last token of x."""
    x = leaves[0]
    with torch.no_grad():
        if tokens is None:
            x[ENDS[-1] :] = value
        else:
            x[-1] = value
            tokens[: ENDS[-1]] %= M - 1
            tokens[ENDS[-1] :] = M - 1


@pytest.mark.parametrize("context", ["plain", "checkpoint", "compiled", "module"])
@pytest.mark.parametrize("tasks", [False, True], ids=["one", "tasks"])
@pytest.mark.parametrize("by_token", [False, True], ids=["sorted", "tokens"])
def test_rows_without_an_expert_are_not_read(by_token: bool, tasks: bool, context: str) -> None:
    """They may hold NaN, as the end of a buffer does that is longer than its rows.

    So may the gradient of the output there.
    """
    arguments, tokens, leaves = make(by_token, tasks)
    without_an_expert(leaves, tokens, torch.nan)
    g = torch.randn(ROWS, N, dtype=torch.float64)
    g[OFFS[-1] :] = torch.nan

    def of_module() -> Tensor:
        x, A, B, cores = leaves
        experts = LoTRExperts(E, K, N, R, bias=True, dtype=torch.float64, scaling=S)
        tensors = {"weight": arguments["weight"], "bias": arguments["bias"]}
        tensors |= {"factors.A.value": A, "factors.B.value": B}
        state = {}
        if tasks:
            state = {experts: Tasks(cores, arguments["core_index"])}
        else:
            tensors["core"] = cores
        with open_request(state):
            return torch.func.functional_call(experts, tensors, (x, OFFS, tokens))

    call = partial(ours, arguments, tokens, leaves)
    calls = {
        "plain": call,
        "module": of_module,
        "checkpoint": lambda: checkpoint(call, use_reentrant=False),
        "compiled": lambda: torch.compile(call, backend="aot_eager", fullgraph=True)(),
    }
    check(arguments, tokens, leaves, g, calls[context])


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_float32_adapter_with_half_precision(half: torch.dtype) -> None:
    arguments, tokens, leaves = make(True, False, dtype=half)
    leaves[1:] = [leaf.detach().float().requires_grad_() for leaf in leaves[1:]]
    results = check(arguments, tokens, leaves, torch.randn(ROWS, N, dtype=half))
    assert [gradient.dtype for gradient in results[2:]] == [torch.float32] * 3


@pytest.mark.parametrize("by_token", [False, True], ids=["sorted", "tokens"])
def test_double_backward(by_token: bool) -> None:
    """Also of a trained base with a weight that is a transposed view."""
    arguments, tokens, leaves = make(by_token, False)
    without_an_expert(leaves, tokens, torch.nan)
    arguments["weight"] = arguments["weight"].mT.contiguous().mT.requires_grad_()
    arguments["bias"].requires_grad_()
    every = [*leaves, arguments["weight"], arguments["bias"]]
    results = []
    for call in (ours, definition):
        y = call(arguments, tokens, leaves)
        first = torch.autograd.grad(y.square().sum(), every, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(t.square().sum() for t in first), every)])
    assert worst(*results) < 1e-10


# (a function of the leaves, the leaves, other values of them) -> the transform's results
TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], tuple, tuple], tuple]] = {
    "grad": lambda call, values, _: torch.func.grad(lambda v: call(*v).sin().sum())(values),
    "jvp": lambda call, values, tangents: torch.func.jvp(call, values, tangents),
    "vmap": lambda call, *values: (torch.func.vmap(call)(*map(torch.stack, zip(*values))),),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tasks", [False, True], ids=["one", "tasks"])
def test_transforms_of_torch_func(tasks: bool, transform: str) -> None:
    arguments, tokens, leaves = make(True, tasks)
    values = tuple(leaf.detach() for leaf in leaves)
    tangents = tuple(torch.randn_like(value) for value in values)

    def transformed(call: Callable[..., Tensor]) -> tuple:
        return TRANSFORMS[transform](lambda *v: call(arguments, tokens, v), values, tangents)

    assert worst(transformed(ours), transformed(definition)) < 1e-12


@pytest.mark.parametrize("by_token", [False, True], ids=["sorted", "tokens"])
def test_no_rows(by_token: bool) -> None:
    arguments, tokens, leaves = make(by_token, False)
    if by_token:
        tokens = tokens[:0]
    else:
        leaves[0] = leaves[0].detach()[:0].requires_grad_()
    offs = torch.zeros(E, dtype=torch.int32)
    x, A, B, cores = leaves
    bias = arguments["bias"]
    y = lotr_grouped_linear(x, arguments["weight"], offs, A, B, cores, S, tokens=tokens, bias=bias)
    assert y.shape == (0, N)
    assert not any(bool(gradient.any()) for gradient in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize("name", ["grouped_mm", "grouped_outer"])
def test_the_grouped_operators_are_well_formed(name: str) -> None:
    second = torch.randn(E, N, K) if name == "grouped_mm" else torch.randn(ROWS, N)
    tensors = [torch.randn(ROWS, K).requires_grad_(), second.requires_grad_()]
    torch.library.opcheck(getattr(torch.ops.lotr, name).default, (*tensors, OFFS))


@pytest.mark.parametrize(
    ("dtype", "computed"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)]
)
def test_autocast_computes_in_its_dtype(dtype: torch.dtype, computed: torch.dtype) -> None:
    """It leaves float64 as it is."""
    arguments, tokens, leaves = make(True, False, dtype=dtype)
    expected = definition(arguments, tokens, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(arguments, tokens, leaves)
    assert y.dtype == computed
    assert relative(y, expected) < BOUNDS[computed]


def test_module_shares_factors_with_a_linear_layer() -> None:
    """The gradients of A and B are sums over experts and a linear layer of the same shape."""
    factors = LoTRFactors(K, N, R, dtype=torch.float64)
    experts = LoTRExperts(E, K, N, factors=factors, bias=True, dtype=torch.float64, scaling=S)
    linear = LoTRLinear(K, N, factors=factors, dtype=torch.float64, scaling=S)
    x = torch.randn(ROWS, K, dtype=torch.float64)
    A = factors.A.value
    B = factors.B.value
    leaves = [A, B, experts.core, linear.core]

    def plain() -> tuple[Tensor, Tensor]:
        y = nn.functional.linear(x, linear.weight, linear.bias)
        y = y + S * x @ A @ linear.core @ B.T
        return truth(x, experts.weight, experts.bias, None, A, B, experts.core), y

    assert torch.equal(experts(x, OFFS), plain()[0])
    for core in (experts.core, linear.core):
        nn.init.normal_(core)
    actual, expected = (
        torch.autograd.grad(first.sin().sum() + second.sin().sum(), leaves)
        for first, second in ((experts(x, OFFS), linear(x)), plain())
    )
    assert worst(actual, expected) < 1e-12


def random_module(**settings: object) -> LoTRExperts:
    """Returns a module with random cores and biases."""
    experts = LoTRExperts(E, K, N, R, bias=True, dtype=torch.float64, scaling=S, **settings)
    nn.init.normal_(experts.core)
    nn.init.normal_(experts.bias)
    return experts


@pytest.mark.parametrize("state", ["adapted", "off", "merged"])
def test_the_module_does_not_read_rows_without_an_expert(state: str) -> None:
    experts = random_module()
    x = torch.randn(ROWS, K, dtype=torch.float64)
    x[ENDS[-1] :] = torch.nan
    if state == "merged":
        experts.merge()
    factors = (experts.factors.A.value, experts.factors.B.value)
    cores = experts.core if state == "adapted" else 0 * experts.core
    expected = truth(x, experts.weight, experts.bias, None, *factors, cores)
    with open_request({experts: ADAPTER_OFF} if state == "off" else {}):
        assert relative(experts(x, OFFS), expected) < 1e-12


def test_the_module_is_merged_and_unmerged() -> None:
    experts = random_module()
    x = torch.randn(ROWS, K, dtype=torch.float64)
    before = experts.weight.detach().clone()
    y = experts(x, OFFS)
    experts.merge(safe=True)
    assert relative(experts(x, OFFS), y) < 1e-12
    experts.unmerge()
    assert torch.equal(experts.weight, before)
    assert torch.equal(experts(x, OFFS), y)


def test_dropout_is_drawn_once_per_token() -> None:
    """Two rows of one token and expert are equal. In eval mode nothing is dropped."""
    experts = random_module(dropout=0.5)
    x = torch.randn(M, K, dtype=torch.float64)
    offs = torch.tensor([2 * M] * E, dtype=torch.int32)
    tokens = torch.arange(M).repeat(2)
    first = experts(x, offs, tokens)
    assert torch.equal(first[:M], first[M:])
    assert not torch.allclose(first, experts(x, offs, tokens))
    y = experts.eval()(x, offs, tokens)
    A = experts.factors.A.value
    B = experts.factors.B.value
    base = x @ experts.weight[0].T + experts.bias[0]
    assert worst([y[:M]], [base + S * x @ A @ experts.core[0] @ B.T]) < 1e-12


# ---- experts classes of transformers -------------------------------------------------------------

HIDDEN = 8
INNER = 6
TOP_K = 2
LAYOUTS: dict[str, dict[str, bool]] = {
    "gated": {"has_gate": True},
    "ungated": {"has_gate": False},
    "transposed, with biases": {"has_gate": True, "is_transposed": True, "has_bias": True},
    "norm": {"has_gate": True, "has_post_expert_norm": True},
}


class ExpertsLoop(nn.Module):
    """Experts in plain PyTorch, one token and one expert at a time."""

    def __init__(self, config: object, layout: dict[str, bool]):
        super().__init__()
        self.num_experts = E
        has_gate = layout["has_gate"]
        columns = 2 * INNER if has_gate else INNER
        shapes = {
            "gate_up_proj" if has_gate else "up_proj": (columns, HIDDEN),
            "down_proj": (HIDDEN, INNER),
        }
        for name, (n, k) in shapes.items():
            shape = (k, n) if layout.get("is_transposed") else (n, k)
            self.register_parameter(name, nn.Parameter(torch.randn(E, *shape)))
            if layout.get("has_bias"):
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, n)))
        self.act_fn = nn.SiLU()
        self.post_expert_norm = nn.LayerNorm(HIDDEN)

    def _matrix(self, name: str, expert: int) -> Tensor:
        weight = getattr(self, name)[expert]
        return weight.T if self.is_transposed else weight

    def _bias(self, name: str, expert: int) -> Tensor | None:
        return getattr(self, f"{name}_bias")[expert] if self.has_bias else None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        first = "gate_up_proj" if self.has_gate else "up_proj"
        result = torch.zeros_like(hidden_states)
        for token, (experts, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights)):
            for expert, weight in zip(experts, weights):
                y = nn.functional.linear(
                    hidden_states[token], self._matrix(first, expert), self._bias(first, expert)
                )
                if self.has_gate:
                    gate, up = y.chunk(2)
                    y = self.act_fn(gate) * up
                else:
                    y = self.act_fn(y)
                y = nn.functional.linear(
                    y, self._matrix("down_proj", expert), self._bias("down_proj", expert)
                )
                if self.has_post_expert_norm:
                    y = self.post_expert_norm(y)
                result[token] += weight * y
        return result


def experts_of(layout: str) -> nn.Module:
    """Returns a model with experts that transformers has decorated, as in its models."""
    options = LAYOUTS[layout]

    @use_experts_implementation(**options)
    class Experts(ExpertsLoop):
        def __init__(self, config: object):
            super().__init__(config, options)

        def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return super().forward(hidden, index, weights)

    config = PreTrainedConfig()
    config._experts_implementation = "eager"
    return nn.ModuleDict({"experts": Experts(config)}).double()


def routed(m: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the experts of each token, and their weights."""
    hidden = torch.randn(m, HIDDEN, dtype=torch.float64)
    weights, index = torch.rand(m, E, dtype=torch.float64).topk(TOP_K)
    return hidden, index, weights


def adapted(model: nn.Module, ending: str = "_proj") -> nn.Module:
    """The model with random cores for the parameters of an ending."""
    names = [name for name in dict(model.named_parameters()) if name.endswith(ending)]
    config = LoTRConfig(rank=R, scaling=S, target_parameters=names, adapter_dtype=torch.float64)
    for layer in adapted_layers(apply_lotr(model, config)).values():
        nn.init.normal_(layer.core)
    return model


@pytest.mark.parametrize("ending", ["_proj", "up_proj", "down_proj"], ids=["both", "up", "down"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_of_transformers_equal_their_loop(layout: str, ending: str) -> None:
    """The class with s B G^T A^T added to its weights has the same output and gradients."""
    plain = experts_of(layout)
    model = adapted(copy.deepcopy(plain), ending)
    inputs = routed()
    layers = adapted_layers(model)
    leaves = [p for layer in layers.values() for p in layer.adapter_parameters()]
    weights = dict(plain.named_parameters())
    for name, layer in layers.items():
        delta = S * layer.factors.B.value @ layer.core.mT @ layer.factors.A.value.T
        key = name.replace(".lotr", "")
        is_transposed = LAYOUTS[layout].get("is_transposed")
        weights[key] = weights[key].detach() + (delta.mT if is_transposed else delta)
    y = model["experts"](*inputs)
    call = torch.func.functional_call
    expected = call(
        plain["experts"], {k.removeprefix("experts."): w for k, w in weights.items()}, inputs
    )
    g = torch.randn_like(y)
    assert relative(y, expected) < 1e-12
    gradients = torch.autograd.grad(y, leaves, g)
    assert worst(gradients, torch.autograd.grad(expected, leaves, g)) < 1e-12


def test_experts_of_transformers_take_hidden_states_of_another_dtype() -> None:
    """They are cast to the weights' dtype, and the result has their dtype."""
    model = adapted(experts_of("gated"))
    hidden, index, weights = routed()
    expected = model["experts"](hidden, index, weights)
    y = model["experts"](hidden.float(), index, weights.float())
    assert y.dtype == torch.float32
    assert relative(y, expected) < 1e-6


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_another_implementation_of_experts_does_not_skip_the_adapter(implementation: str) -> None:
    model = trained("mixture")
    x = zoo.inputs("mixture")
    y = zoo.output(model, x)
    model.set_experts_implementation(implementation)
    assert torch.equal(zoo.output(model, x), y)


def test_a_pickled_mixture_is_adapted_in_a_new_process(tmp_path: Path) -> None:
    model = trained("mixture")
    x = zoo.inputs("mixture")
    torch.save(model, tmp_path / "model.pt")
    save_file({"x": x, "y": zoo.output(model, x).detach()}, tmp_path / "expected.safetensors")
    program = (
        "import sys, torch, zoo\n"
        "from safetensors.torch import load_file\n"
        "expected = load_file(sys.argv[2])\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(zoo.output(model, expected['x']), expected['y'])\n"
    )
    command = [sys.executable, "-c", program, "model.pt", "expected.safetensors"]
    subprocess.run(command, cwd=tmp_path, check=True)


def test_mixed_meta_tensors_are_refused() -> None:
    """The fake kernels would return memory that was never written."""
    x = torch.ones(3, K)
    weight = torch.ones(E, N, K)
    offs = torch.zeros(E, dtype=torch.int32)
    for arguments in ((x, weight.to("meta"), offs), (x.to("meta"), weight, offs)):
        with pytest.raises(RuntimeError, match="expected tensors on one device"):
            torch.ops.lotr.grouped_mm(*arguments)
    with pytest.raises(RuntimeError, match="expected tensors on one device"):
        torch.ops.lotr.grouped_outer(torch.ones(3, N), x.to("meta"), offs)
