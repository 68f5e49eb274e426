"""Experts: lotr_grouped_linear, LoTRExperts and transformers' classes against loops in float64.

The tables of models (models.py) have an adapted mixture.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from helpers import DTYPE_PAIRS, copy64, relative, run_python, worst
from models import adapter_parameters, moved, trained, written_out
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.integrations.moe import use_experts_implementation

from lotr_ext import (
    LoTRConfig,
    LoTRExperts,
    LoTRLinear,
    apply_lotr,
    lotr_grouped_linear,
)
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


def definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tokens: Tensor | None,
    A: Tensor,
    B: Tensor,
    cores: Tensor,
    core_index: Tensor | None = None,
) -> Tensor:
    """Computes each row with the matrices of its expert. Rows past the last end are zero."""
    expert = torch.bucketize(torch.arange(ENDS[-1]), OFFS.long(), right=True)
    rows = torch.arange(ROWS) if tokens is None else tokens
    read = rows[: ENDS[-1]]
    h = x[read].unsqueeze(1)
    if core_index is None:
        G = cores[expert]
    else:
        task = core_index[read]
        G = cores[task.clamp(min=0), expert] * (task >= 0)[:, None, None]
    update = S * h @ A @ G @ B.T
    y = (h @ weight[expert].mT + update).squeeze(1) + bias[expert]
    return torch.cat([y, y.new_zeros(ROWS - ENDS[-1], N)])


LEAVES = ("x", "A", "B", "cores")
ours = partial(lotr_grouped_linear, offs=OFFS, scaling=S)


def make(
    by_token: bool,
    tasks: bool,
    dtype: torch.dtype = torch.float64,
    factors: torch.dtype | None = None,
) -> dict[str, Tensor | None]:
    """Returns arguments of `definition`, of which LEAVES require a gradient."""
    x = torch.randn(M if by_token else ROWS, K, dtype=dtype)
    adapter = {
        "A": torch.randn(K, R[0]) / 4,
        "B": torch.randn(N, R[1]) / 4,
        "cores": torch.randn(*((3,) if tasks else ()), E, *R) / 2,
    }
    return {
        "x": x.requires_grad_(),
        **{name: t.to(factors or dtype).requires_grad_() for name, t in adapter.items()},
        "weight": torch.randn(E, N, K, dtype=dtype) / 4,
        "bias": torch.randn(E, N, dtype=dtype),
        "tokens": torch.randint(0, M, (ROWS,)) if by_token else None,
        "core_index": torch.randint(-1, 3, (len(x),)) if tasks else None,
    }


def leaves_of(arguments: dict[str, Tensor]) -> list[Tensor]:
    return [arguments[name] for name in LEAVES]


def check(
    arguments: dict[str, Tensor | None], g: Tensor, call: Callable[..., Tensor] = ours
) -> list[Tensor]:
    """Compares a call with float64. Returns its output and its gradients for dy = g."""
    exact = dict(arguments)
    for name in (*LEAVES, "weight", "bias"):
        exact[name] = copy64(arguments[name]).requires_grad_(name in LEAVES)
    results = []
    for run, values, dy in ((call, arguments, g), (definition, exact, g.double())):
        y = run(**values)
        results.append([y, *torch.autograd.grad(y, leaves_of(values), dy)])
    assert worst(*results) < BOUNDS[g.dtype]
    return results[0]


each_task_mode = pytest.mark.parametrize("tasks", [False, True], ids=["one", "tasks"])
each_token_mode = pytest.mark.parametrize("by_token", [False, True], ids=["sorted", "tokens"])


@pytest.mark.parametrize("dtype, factors", DTYPE_PAIRS, ids=str)
@each_task_mode
@each_token_mode
def test_value_and_gradients(
    by_token: bool, tasks: bool, dtype: torch.dtype, factors: torch.dtype
) -> None:
    arguments = make(by_token, tasks, dtype, factors)
    y, *gradients = check(arguments, torch.randn(ROWS, N, dtype=dtype))
    assert y.dtype == dtype
    assert not y[ENDS[-1] :].any()
    assert [t.dtype for t in gradients] == [t.dtype for t in leaves_of(arguments)]


def fill_unread(arguments: dict[str, Tensor | None]) -> None:
    """Writes NaN where no expert reads: to rows of x past the last end, or to its last token."""
    end = ENDS[-1]
    x = arguments["x"].detach()
    tokens = arguments["tokens"]
    if tokens is None:
        x[end:] = torch.nan
    else:  # only rows without an expert read the last token
        x[-1] = torch.nan
        tokens[:end] %= M - 1
        tokens[end:] = M - 1


def by_module(
    x: Tensor,
    tokens: Tensor | None,
    A: Tensor,
    B: Tensor,
    cores: Tensor,
    core_index: Tensor | None,
    **tensors: Tensor,
) -> Tensor:
    """Computes LoTRExperts with the given tensors, and with its tasks in a request."""
    experts = LoTRExperts(E, K, N, R, bias=True, dtype=torch.float64, scaling=S)
    tensors |= {"factors.A.value": A, "factors.B.value": B, "core": cores}
    states = {}
    if core_index is not None:
        states[experts] = SimpleNamespace(cores=cores, index_of=lambda x: core_index)
    with open_request(states):
        return torch.func.functional_call(experts, tensors, (x, OFFS, tokens))


def compiled(**arguments: Tensor | None) -> Tensor:
    return torch.compile(ours, backend="aot_eager", fullgraph=True)(**arguments)


CALLS: dict[str, Callable[..., Tensor]] = {
    "plain": ours,
    "module": by_module,
    "checkpoint": partial(checkpoint, ours, use_reentrant=False),
    "compiled": compiled,
}


@pytest.mark.parametrize("context", CALLS)
@each_task_mode
@each_token_mode
def test_rows_without_an_expert_are_not_read(by_token: bool, tasks: bool, context: str) -> None:
    """They may hold NaN, like the end of a buffer that is longer than its rows, and so may dy."""
    arguments = make(by_token, tasks)
    fill_unread(arguments)
    g = torch.randn(ROWS, N, dtype=torch.float64)
    g[ENDS[-1] :] = torch.nan
    check(arguments, g, CALLS[context])


@each_token_mode
def test_double_backward(by_token: bool) -> None:
    """The base is trained, too. Its weight is a transposed view."""
    arguments = make(by_token, tasks=False)
    fill_unread(arguments)
    arguments["weight"] = arguments["weight"].mT.contiguous().mT
    leaves = leaves_of(arguments)
    leaves += [arguments[name].requires_grad_() for name in ("weight", "bias")]
    results = []
    for call in (ours, definition):
        first = torch.autograd.grad(call(**arguments).square().sum(), leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(t.square().sum() for t in first), leaves)])
    assert worst(*results) < 1e-10


# (a function of the leaves, the leaves, other values of them) -> the transform's results
TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], tuple, tuple], tuple]] = {
    "grad": lambda call, values, _: torch.func.grad(lambda v: call(*v).sin().sum())(values),
    "jvp": lambda call, values, tangents: torch.func.jvp(call, values, tangents),
    # A batch of two: the leaves and their other values.
    "vmap": lambda call, *both: (torch.func.vmap(call)(*map(torch.stack, zip(*both))),),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@each_task_mode
def test_transforms_of_torch_func(tasks: bool, transform: str) -> None:
    arguments = make(by_token=True, tasks=tasks)
    values = tuple(leaf.detach() for leaf in leaves_of(arguments))
    tangents = tuple(map(torch.randn_like, values))

    def transformed(call: Callable[..., Tensor]) -> tuple:
        def call_with(*leaves: Tensor) -> Tensor:
            return call(**{**arguments, **dict(zip(LEAVES, leaves))})

        return TRANSFORMS[transform](call_with, values, tangents)

    assert worst(transformed(ours), transformed(definition)) < 1e-12


@pytest.mark.parametrize("empty", ["x", "tokens"])
def test_no_rows(empty: str) -> None:
    arguments = make(by_token=empty == "tokens", tasks=False)
    arguments[empty] = arguments[empty].detach()[:0].requires_grad_(empty == "x")
    y = ours(**{**arguments, "offs": torch.zeros(E, dtype=torch.int32)})
    assert y.shape == (0, N)
    gradients = torch.autograd.grad(y.sum(), leaves_of(arguments))
    assert not any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize(
    ("dtype", "computed"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)]
)
def test_autocast_computes_in_its_dtype(dtype: torch.dtype, computed: torch.dtype) -> None:
    """It leaves float64 as it is."""
    arguments = make(by_token=True, tasks=False, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(**arguments)
    assert y.dtype == computed
    assert relative(y, definition(**arguments)) < BOUNDS[computed]


# ---- the module ----------------------------------------------------------------------------------


def random_module(**settings: object) -> LoTRExperts:
    """Returns a module with random cores and biases."""
    experts = LoTRExperts(E, K, N, R, bias=True, dtype=torch.float64, scaling=S, **settings)
    nn.init.normal_(experts.core)
    nn.init.normal_(experts.bias)
    return experts


def definition_of(experts: LoTRExperts, x: Tensor, cores: Tensor) -> Tensor:
    A, B = (factor.value for factor in experts.factors.children())
    return definition(x, experts.weight, experts.bias, None, A, B, cores)


def test_module_shares_factors_with_a_linear_layer() -> None:
    """The gradients of A and B are sums over experts and a linear layer of the same shape."""
    experts = random_module()
    linear = LoTRLinear(K, N, factors=experts.factors, dtype=torch.float64, scaling=S)
    nn.init.normal_(linear.core)
    x = torch.randn(ROWS, K, dtype=torch.float64)
    A, B = (factor.value for factor in experts.factors.children())
    plain = nn.functional.linear(x, linear.weight, linear.bias) + S * x @ A @ linear.core @ B.T
    expected = definition_of(experts, x, experts.core).sin().sum() + plain.sin().sum()
    actual = experts(x, OFFS).sin().sum() + linear(x).sin().sum()
    leaves = [A, B, experts.core, linear.core]
    assert worst(*(torch.autograd.grad(loss, leaves) for loss in (actual, expected))) < 1e-12


def test_the_module_at_its_start_off_merged_and_unmerged() -> None:
    """It never reads the rows without an expert, which hold NaN."""
    experts = random_module()
    x = torch.randn(ROWS, K, dtype=torch.float64)
    x[ENDS[-1] :] = torch.nan
    zero = torch.zeros_like(experts.core)
    with open_request({experts: ADAPTER_OFF}):
        base_output = experts(x, OFFS)
    assert relative(base_output, definition_of(experts, x, zero)) < 1e-12
    y = experts(x, OFFS)
    assert relative(y, definition_of(experts, x, experts.core)) < 1e-12
    experts.merge(safe=True)
    assert relative(experts(x, OFFS), y) < 1e-12
    experts.unmerge()
    assert torch.equal(experts(x, OFFS), y)
    nn.init.zeros_(experts.core)
    assert torch.equal(experts(x, OFFS), base_output)


def test_dropout_is_drawn_once_per_token() -> None:
    """Two rows of one token and expert are equal. In eval mode nothing is dropped."""
    experts = random_module(dropout=0.5)
    x = torch.randn(M, K, dtype=torch.float64)
    offs = torch.tensor([2 * M] * E, dtype=torch.int32)
    tokens = torch.arange(M).repeat(2)
    y = experts(x, offs, tokens)
    assert torch.equal(y[:M], y[M:])
    assert not torch.allclose(y, experts(x, offs, tokens))
    rows = tokens[:ROWS]
    expected = definition_of(experts, x[rows], experts.core)
    assert relative(experts.eval()(x, OFFS, rows), expected) < 1e-12


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


def experts_of(layout: str) -> nn.Module:
    """Returns a model with experts that transformers has decorated, as in its models.

    Before they are adapted, transformers computes them.
    """
    options = {"is_transposed": False, "has_bias": False, **LAYOUTS[layout]}
    columns = 2 * INNER if options["has_gate"] else INNER
    sizes = {
        "gate_up_proj" if options["has_gate"] else "up_proj": (columns, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }

    @use_experts_implementation(**options)
    class Experts(nn.Module):
        def __init__(self, config: object):
            super().__init__()
            self.num_experts = E
            for name, (n, k) in sizes.items():
                shape = (k, n) if options["is_transposed"] else (n, k)
                self.register_parameter(name, nn.Parameter(torch.randn(E, *shape)))
                if options["has_bias"]:
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, n)))
            self.act_fn = nn.SiLU()
            self.post_expert_norm = nn.LayerNorm(HIDDEN)

    config = PreTrainedConfig()
    config._experts_implementation = "batched_mm"
    return nn.ModuleDict({"experts": Experts(config)}).double()


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden states of seven tokens, the experts of each token, and their weights."""
    hidden = torch.randn(7, HIDDEN, dtype=torch.float64)
    weights, index = torch.rand(7, E, dtype=torch.float64).topk(TOP_K)
    return hidden, index, weights


def adapted(model: nn.Module, ending: str = "_proj") -> nn.Module:
    """Returns the model with a random adapter for the parameters whose names end like this."""
    names = [name for name in dict(model.named_parameters()) if name.endswith(ending)]
    config = LoTRConfig(rank=R, scaling=S, target_parameters=names, adapter_dtype=torch.float64)
    return moved(apply_lotr(model, config))


@pytest.mark.parametrize("ending", ["_proj", "up_proj", "down_proj"], ids=["both", "up", "down"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_of_transformers(layout: str, ending: str) -> None:
    """transformers computes the same with s B G^T A^T added to its weights."""
    plain = experts_of(layout)
    model = adapted(copy.deepcopy(plain), ending)
    weights = {
        name.removeprefix("experts."): weight for name, weight in written_out(model, plain).items()
    }
    inputs = routed()
    y = model["experts"](*inputs)
    expected = torch.func.functional_call(plain["experts"], weights, inputs)
    g = torch.randn_like(y)
    results = [
        [output, *torch.autograd.grad(output, adapter_parameters(model), g)]
        for output in (y, expected)
    ]
    assert worst(*results) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_of_no_expert_adds_nothing(layout: str) -> None:
    """Under expert parallelism, an index of E stands for the experts of another process."""
    model = adapted(experts_of(layout))
    hidden, index, weights = routed()
    expected = model["experts"](hidden, index, weights * (index != 0))
    y = model["experts"](hidden, torch.where(index == 0, E, index), weights)
    assert relative(y, expected) < 1e-12


def test_experts_of_transformers_take_hidden_states_of_another_dtype() -> None:
    """They are cast to the weights' dtype, and the result has their dtype."""
    model = adapted(experts_of("gated"))
    hidden, index, weights = routed()
    y = model["experts"](hidden.float(), index, weights.float())
    assert y.dtype == torch.float32
    assert relative(y, model["experts"](hidden, index, weights)) < 1e-6


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
    torch.save((model, x, zoo.output(model, x)), tmp_path / "model.pt")
    program = (
        "import sys, torch, zoo\n"
        "model, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(zoo.output(model, x), y)\n"
    )
    run_python("-c", program, tmp_path / "model.pt", check=True)
