"""Random training programs: adapted layers and plain PyTorch take the same steps in float64.

Each value of a program is a pair: the tensor that the layers compute, and its twin in plain
PyTorch, each with its graph. A step calls layers, joins values, runs backwards of all kinds and
adds their gradients as values, changes parameters, merges, copies, or trains in threads. The two
must agree after each step.
"""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pytest
import torch
from helpers import relative
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRFactor, LoTRFactors, LoTRLinear, lotr_linear, reference
from lotr_ext.core import dispatch

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule  # noqa: E402

K = 5
R = 2
TOKENS = 4
LAYERS = 3
TASKS = 3
SCALING = 0.8
TOLERANCE = 1e-7
ABSOLUTE_TOLERANCE = 1e-9
LARGE = 1e6  # tanh bounds values above it
VALUES = 8  # the newest ones, which a program keeps

Pair = tuple[Tensor, Tensor]

FORWARDS = (
    "layer",
    "siblings",
    "rows",
    "rows",
    "checkpoint",
    "no graph",
    "input",
    "product",
    "sum",
    "tanh",
    "norm",
)
BACKWARDS = ("create_graph", "create_graph", "some", "into .grad", "batched", "all")
CHANGES = ("step", "freeze", "merge", "threads", "dropout", "state_dict", "deepcopy", "pickle")


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda a, b: torch.tanh(a) * b,
    "sum": lambda a, b: a + torch.sigmoid(b),
    "tanh": lambda a, b: torch.tanh(a - b),
    "norm": lambda a, b: nnf.layer_norm(a, (K,), eps=0.1) + 0 * b,
}


class Forward(NamedTuple):
    """One step of a forward. What i, j and index mean depends on the kind."""

    kind: str
    i: int
    j: int
    value: int
    index: list[int]


number = st.integers(0, 7)
numbers = st.lists(number, min_size=1, max_size=4)
row_tasks = st.lists(st.integers(-1, TASKS - 1), min_size=TOKENS, max_size=TOKENS)
forward = st.builds(Forward, st.sampled_from(FORWARDS), number, number, number, row_tasks)


class Net(nn.Module):
    """Three layers that share one A and two B, and cores of tasks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        pair = LoTRFactors(K, K, R, dtype=torch.float64)
        other = LoTRFactors.of(pair.A, LoTRFactor(K, R, dtype=torch.float64))
        self.layers = nn.ModuleList(
            LoTRLinear(K, K, factors=factors, scaling=SCALING, dtype=torch.float64)
            for factors in (pair, pair, other)
        )
        self.tasks = nn.Parameter(torch.randn(TASKS, R, R, dtype=torch.float64))
        for layer in self.layers:
            nn.init.normal_(layer.core)
            nn.init.normal_(layer.factors.A.value)
            nn.init.normal_(layer.factors.B.value)

    def parts(self, i: int) -> tuple[Tensor, ...]:
        """Returns W, bias, A, B and the core of a layer."""
        layer = self.layers[i]
        return layer.weight, layer.bias, layer.factors.A.value, layer.factors.B.value, layer.core

    def rows(self, i: int, x: Tensor, index: Tensor) -> Tensor:
        """Calls a layer with one task per row."""
        W, bias, A, B, _ = self.parts(i)
        return lotr_linear(x, W, bias, A, B, self.tasks, SCALING, core_index=index)


def scalar(y: Tensor) -> Tensor:
    """Returns a loss.

    asinh and its derivatives amplify no relative error. The sine of a large value would amplify its
    rounding error by the value.
    """
    return y.asinh().sum()


class Program(RuleBasedStateMachine):
    @initialize(little=st.booleans(), few=st.booleans())
    def start(self, little: bool, few: bool) -> None:
        """Chooses the form of the nodes. Makes the net, the twin's parameters and a first value."""
        self.limits = (dispatch.LITTLE_WORK, dispatch.FEW_TOKENS)
        dispatch.LITTLE_WORK = 2**62 if little else 0
        dispatch.FEW_TOKENS = 2**62 if few else 0
        self.net = Net()
        self.values: list[Pair] = []
        self.seed = 0
        self.merged_weights: dict[int, Tensor] = {}  # of the twin, by layer
        self.twin = dict(copy.deepcopy(self.net).named_parameters())
        self.new_input(True)

    def teardown(self) -> None:
        if hasattr(self, "limits"):
            dispatch.LITTLE_WORK, dispatch.FEW_TOKENS = self.limits

    # ---- the twin --------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.net.named_parameters())

    def leaves(self) -> list[Pair]:
        """Returns the trained parameters, each with its twin."""
        return [
            (parameter, self.twin[name])
            for name, parameter in self.parameters().items()
            if parameter.requires_grad
        ]

    def twin_parts(self, i: int) -> list[Tensor]:
        names = {parameter: name for name, parameter in self.parameters().items()}
        return [self.twin[names[part]] for part in self.net.parts(i)]

    def plain(self, i: int, x: Tensor) -> Tensor:
        """Computes a layer of the twin."""
        W, bias, A, B, core = self.twin_parts(i)
        if i in self.merged_weights:
            return nnf.linear(x, self.merged_weights[i], bias)
        p = self.net.layers[i].dropout
        dropped = x
        if p:
            # The layer draws the seed of its mask from torch's generator.
            seed = int(torch.randint(-(2**63), 2**63 - 1, (1,)))
            dropped = x * reference.dropout_mask(*x.shape, p, seed)
        return nnf.linear(x, W, bias) + SCALING * (dropped @ A @ core @ B.T)

    def plain_rows(self, i: int, x: Tensor, index: Tensor) -> Tensor:
        """Computes a layer of the twin with one task per row."""
        W, bias, A, B, _ = self.twin_parts(i)
        W = self.merged_weights.get(i, W)
        cores = self.twin["tasks"][index.clamp(min=0)] * (index >= 0)[:, None, None]
        g = ((x @ A).unsqueeze(-2) @ cores).squeeze(-2)
        return nnf.linear(x, W, bias) + SCALING * g @ B.T

    def pair_of(self, layers: Callable[[], Tensor], twin: Callable[[], Tensor]) -> Pair:
        """Computes a pair. Both sides start from the same state of torch's generator."""
        self.seed += 1
        torch.manual_seed(self.seed)
        actual = layers()
        torch.manual_seed(self.seed)
        return actual, twin()

    # ---- values ----------------------------------------------------------------------------------

    def add(self, actual: Tensor, twin: Tensor) -> None:
        """Compares a pair, and keeps it as a value if it has the shape of an input."""
        self.compare(actual, twin)
        if tuple(twin.shape) != (TOKENS, K):
            return
        if float(twin.detach().abs().max()) > LARGE:
            actual = torch.tanh(actual)
            twin = torch.tanh(twin)
        self.values = [*self.values, (actual, twin)][-VALUES:]

    def value(self, i: int) -> Pair:
        """Returns a value, the newest for 0. hypothesis prefers small numbers, so chains arise."""
        return self.values[-1 - i % len(self.values)]

    def compare(self, actual: Tensor | None, twin: Tensor | None) -> None:
        if twin is not None and not bool(twin.isfinite().all() and twin.abs().max() < LARGE**2):
            return
        error = relative(actual, twin)
        if error >= TOLERANCE:
            difference = float((actual.detach() - twin.detach()).abs().max())
            assert difference < ABSOLUTE_TOLERANCE, f"{error:.1e}"

    def compare_gradients(self) -> None:
        for parameter, twin in self.leaves():
            self.compare(parameter.grad, twin.grad)

    def clear_gradients(self) -> None:
        for pair in self.leaves():
            for parameter in pair:
                parameter.grad = None

    def forget_graphs(self) -> None:
        """Detaches all values. Older graphs saved parameters that have changed since."""
        self.values = [
            (actual.detach().requires_grad_(), twin.detach().requires_grad_())
            for actual, twin in self.values
        ]
        self.clear_gradients()

    def new_input(self, requires_grad: bool) -> None:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(TOKENS, K, dtype=torch.float64, generator=generator)
        self.add(x.clone().requires_grad_(requires_grad), x.clone().requires_grad_(requires_grad))

    # ---- rules -----------------------------------------------------------------------------------

    @rule(
        steps=st.lists(forward, min_size=1, max_size=4),
        backward=st.sampled_from(BACKWARDS),
        v=number,
        chosen=numbers,
    )
    def train(self, steps: list[Forward], backward: str, v: int, chosen: list[int]) -> None:
        """Takes some steps of a forward, and runs a backward of one of the newest values."""
        for step in steps:
            self.take(step)
        if backward == "all":
            self.backward_of_all()
        elif backward == "batched":
            self.batched_gradients(v // 4, 1 + v % 3)
        elif backward == "into .grad":
            self.backward(v // 4)
        else:
            self.gradients(v // 4, chosen, create_graph=backward == "create_graph")

    def take(self, step: Forward) -> None:
        if step.kind == "layer":
            self.call((step.i,), step.value)
        elif step.kind == "siblings":
            self.call((step.i, step.j, step.i + 1), step.value)
        elif step.kind == "rows":
            self.call_rows(step.i, step.value, step.index)
        elif step.kind == "checkpoint":
            self.checkpointed(step.i, step.j, step.value, reentrant=bool(step.index[0] % 2))
        elif step.kind == "no graph":
            with torch.no_grad():
                self.call((step.i,), step.value)
        elif step.kind == "input":
            self.new_input(bool(step.i % 2))
        else:
            self.join(step.i, step.value, step.kind)

    @rule(change=st.sampled_from(CHANGES), i=number, on=st.booleans())
    def change(self, change: str, i: int, on: bool) -> None:
        """Changes the parameters or the net."""
        if change == "step":
            self.step(by_data=on)
        elif change == "freeze":
            self.freeze(i, on)
        elif change == "merge":
            self.merge(i)
        elif change == "threads":
            self.threads(i)
        elif change == "dropout":
            self.net.layers[i % LAYERS].dropout = 0.3 * on
        elif not self.merged_weights:  # a merged layer has no state_dict
            self.copy(change)

    # ---- forward ---------------------------------------------------------------------------------

    def call(self, layers: tuple[int, ...], v: int) -> None:
        """Calls layers on one x."""
        x, x_twin = self.value(v)
        for layer in layers:
            i = layer % LAYERS
            self.add(*self.pair_of(partial(self.net.layers[i], x), partial(self.plain, i, x_twin)))

    def call_rows(self, i: int, v: int, tasks: list[int]) -> None:
        x, x_twin = self.value(v)
        index = torch.tensor(tasks)
        i %= LAYERS
        self.add(self.net.rows(i, x, index), self.plain_rows(i, x_twin, index))

    def checkpointed(self, i: int, j: int, v: int, reentrant: bool) -> None:
        """Calls two layers on one x under a checkpoint."""
        x, x_twin = self.value(v)
        i %= LAYERS
        j %= LAYERS

        def run(x: Tensor) -> Tensor:
            return torch.tanh(self.net.layers[i](x)) * self.net.layers[j](x)

        def plain(x: Tensor) -> Tensor:
            return torch.tanh(self.plain(i, x)) * self.plain(j, x)

        if not (reentrant and x.requires_grad):
            layers = partial(checkpoint, run, x, use_reentrant=False)
            self.add(*self.pair_of(layers, partial(plain, x_twin)))
            return
        # A reentrant checkpoint supports only backward(), not torch.autograd.grad.
        self.clear_gradients()
        x = x.detach().requires_grad_()
        layers = partial(checkpoint, run, x, use_reentrant=True)
        actual, twin = self.pair_of(layers, partial(plain, x_twin.detach()))
        scalar(actual).backward()
        if twin.requires_grad:
            scalar(twin).backward()
        self.compare_gradients()

    def join(self, v1: int, v2: int, kind: str) -> None:
        a, a_twin = self.value(v1)
        b, b_twin = self.value(v2)
        self.add(JOINS[kind](a, b), JOINS[kind](a_twin, b_twin))

    # ---- backward --------------------------------------------------------------------------------

    def backward(self, v: int) -> None:
        actual, twin = self.value(v)
        if not twin.requires_grad:
            return
        scalar(actual).backward(retain_graph=True)
        scalar(twin).backward(retain_graph=True)
        self.compare_gradients()

    def backward_of_all(self) -> None:
        """Runs a backward without retain_graph, which frees the graphs."""
        self.clear_gradients()
        loss = sum(scalar(actual) for actual, _ in self.values)
        twin_loss = sum(scalar(twin) for _, twin in self.values)
        if twin_loss.requires_grad:
            loss.backward()
            twin_loss.backward()
            self.compare_gradients()
        self.forget_graphs()

    def gradients(self, v: int, chosen: list[int], create_graph: bool) -> None:
        """Compares the gradients of a value by some parameters and values.

        With create_graph, they are differentiated once more, and kept as values that have a graph.
        """
        actual, twin = self.value(v)
        candidates = [*self.leaves(), *self.values]
        if 0 not in chosen:
            candidates = [candidates[choice * 3 % len(candidates)] for choice in chosen]
        inputs = [pair for pair in candidates if pair[1].requires_grad]
        if not inputs or not twin.requires_grad:
            return
        losses = (scalar(actual), scalar(twin))
        for gradient, twin_gradient in self.compared(losses, inputs, create_graph=create_graph):
            if create_graph and gradient is not None and twin_gradient is not None:
                if gradient.requires_grad and twin_gradient.requires_grad:
                    self.compared((scalar(gradient), scalar(twin_gradient)), self.leaves())
                self.add(gradient, twin_gradient)

    def compared(
        self, outputs: Pair, inputs: list[Pair], **options: object
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Differentiates a pair by some pairs, and compares the gradients."""
        parameters, twins = zip(*inputs, strict=True)
        options |= {"retain_graph": True, "allow_unused": True}
        gradients = torch.autograd.grad(outputs[0], parameters, **options)
        twin_gradients = torch.autograd.grad(outputs[1], twins, **options)
        pairs = list(zip(gradients, twin_gradients, strict=True))
        for pair in pairs:
            self.compare(*pair)
        return pairs

    def batched_gradients(self, v: int, vectors: int) -> None:
        actual, twin = self.value(v)
        if not twin.requires_grad:
            return
        values = torch.linspace(-1, 1, vectors * TOKENS * K, dtype=torch.float64)
        dy = values.view(vectors, TOKENS, K)
        self.compared((actual, twin), self.leaves(), grad_outputs=dy, is_grads_batched=True)

    # ---- changes ---------------------------------------------------------------------------------

    def step(self, by_data: bool) -> None:
        """Changes the parameters in place like an optimizer, or by `.data` like some trainers."""
        with torch.no_grad():
            for pair in self.leaves():
                for parameter in pair:
                    if by_data:
                        parameter.data = parameter.data * 0.9
                    else:
                        parameter.mul_(0.9)
        self.forget_graphs()

    def freeze(self, part: int, trained: bool) -> None:
        names = [name for name in self.parameters() if not name.endswith(("weight", "bias"))]
        name = names[part % len(names)]
        for parameter in (self.parameters()[name], self.twin[name]):
            parameter.requires_grad_(trained or len(self.leaves()) == 1)
        self.forget_graphs()

    def merge(self, i: int) -> None:
        """Merges a layer, or unmerges it if it is merged."""
        i %= LAYERS
        layer = self.net.layers[i]
        W, _, A, B, core = self.twin_parts(i)
        if layer.merged:
            layer.unmerge()
            assert torch.equal(layer.weight, W)
            del self.merged_weights[i]
        else:
            layer.merge()
            self.merged_weights[i] = (W + SCALING * B @ core.T @ A.T).detach()
        self.forget_graphs()

    def copy(self, how: str) -> None:
        """Continues the program with a copy of the net."""
        copies = {
            "state_dict": self.copied_by_state_dict,
            "deepcopy": partial(copy.deepcopy, self.net),
            "pickle": lambda: pickle.loads(pickle.dumps(self.net)),
        }
        self.net = copies[how]()
        self.forget_graphs()

    def copied_by_state_dict(self) -> Net:
        file = io.BytesIO()
        torch.save(self.net.state_dict(), file)
        net = Net()
        net.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        for layer, source in zip(net.layers, self.net.layers, strict=True):
            layer.dropout = source.dropout
        for parameter, source in zip(net.parameters(), self.net.parameters(), strict=True):
            parameter.requires_grad_(source.requires_grad)
        return net

    def threads(self, v: int) -> None:
        """Two threads train the net at once."""
        x, x_twin = (tensor.detach() for tensor in self.value(v))
        self.forget_graphs()
        parts = [part for i in range(LAYERS) for part in self.twin_parts(i)]
        trains = any(part.requires_grad for part in parts) and len(self.merged_weights) < LAYERS
        if not trains or any(layer.dropout for layer in self.net.layers):
            return  # threads share torch's generator, so dropout's masks differ
        barrier = threading.Barrier(2)

        def train(scale: float) -> None:
            barrier.wait()
            for _ in range(3):
                y = sum(layer(x * scale) for layer in self.net.layers)
                if y.requires_grad:
                    scalar(y).backward()

        scales = (1.0, 0.5)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(train, scales))
        for scale in scales:
            y = sum(self.plain(i, x_twin * scale) for i in range(LAYERS))
            if y.requires_grad:
                (3 * scalar(y)).backward()
        self.compare_gradients()


class TestPrograms(Program.TestCase):
    settings = settings(
        max_examples=50,
        stateful_step_count=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.slow
class TestManyPrograms(Program.TestCase):
    """Other and longer programs in each run."""

    settings = settings(
        max_examples=200,
        stateful_step_count=20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
