"""Random training programs: adapted layers and plain PyTorch take the same steps in float64.

Each value of a program is a pair: the tensor that the layers compute, and its twin in plain
PyTorch, each with its graph. A step calls layers, joins values, runs backwards of all kinds and
adds their gradients as values, changes parameters, merges, copies, or trains in threads. The two
must agree after each step.
"""

import copy
import io
import itertools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from helpers import relative
from layers import SCALING, K, Net, R, cores_of_rows
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from lotr_ext import lotr_linear
from lotr_ext.core import dispatch

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule  # noqa: E402

TOKENS = 4
LAYERS = 4
TASKS = 3
TOLERANCE = 1e-7
ABSOLUTE_TOLERANCE = 1e-9
LARGE = 1e6  # tanh bounds values above it
VALUES = 8  # the newest ones, which a program keeps

Pair = tuple[Tensor, Tensor]

JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda a, b: torch.tanh(a) * b,
    "sum": lambda a, b: a + torch.sigmoid(b),
    "tanh": lambda a, b: torch.tanh(a - b),
    "norm": lambda a, b: nnf.layer_norm(a, (K,), eps=0.1) + 0 * b,
}
CHANGES = ("step", "freeze", "merge", "threads", "dropout", "copy")

number = st.integers(0, 7)
newest = st.integers(0, 1)
a_layer = st.integers(0, LAYERS - 1)
row_tasks = st.lists(st.integers(-1, TASKS - 1), min_size=TOKENS, max_size=TOKENS)


def make_net() -> Net:
    """Returns four layers that share one A and two B, and cores of tasks."""
    net = Net("two Bs")
    net.tasks = nn.Parameter(torch.randn(TASKS, R, R + 1, dtype=torch.float64))
    return net


def scalar(y: Tensor) -> Tensor:
    """Returns a loss.

    asinh and its derivatives amplify no relative error. The sine of a large value would amplify its
    rounding error by the value.
    """
    return y.asinh().sum()


class Program(RuleBasedStateMachine):
    patch = pytest.MonkeyPatch()

    @initialize(little=st.booleans(), few=st.booleans())
    def start(self, little: bool, few: bool) -> None:
        """Chooses the form of the nodes. Makes the net, the twin's parameters and a first value."""
        self.patch.setattr(dispatch, "LITTLE_WORK", 2**62 if little else 0)
        self.patch.setattr(dispatch, "FEW_TOKENS", 2**62 if few else 0)
        self.net = make_net()
        self.values: list[Pair] = []
        self.seed = 0
        self.merged: dict[str, Tensor] = {}  # merged weights of the twin, by name
        self.twin = dict(copy.deepcopy(self.net).named_parameters())
        self.new_input(True)

    def teardown(self) -> None:
        self.patch.undo()

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

    def plain(self, i: int, x: Tensor) -> Tensor:
        """Computes a layer of the twin."""
        names = self.net.names[i]
        if names["weight"] in self.merged:
            return nnf.linear(x, self.merged[names["weight"]], self.twin[names["bias"]])
        return self.net.plain(i, self.twin, x)

    def rows(self, i: int, x: Tensor, index: Tensor) -> Tensor:
        """Computes a layer with one task per row."""
        tensors = {**self.net.parts(i), "core": self.net.tasks}
        p = self.net.layers[i].dropout
        return lotr_linear(
            x, **tensors, scaling=SCALING, core_index=index, dropout_p=p, training=True
        )

    def plain_rows(self, i: int, x: Tensor, index: Tensor) -> Tensor:
        cores = cores_of_rows(self.twin["tasks"], index)
        return self.net.formula(i, {**self.twin, **self.merged}, x, cores)

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

    @rule(requires_grad=st.booleans())
    def new_input(self, requires_grad: bool) -> None:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(TOKENS, K, dtype=torch.float64, generator=generator)
        self.add(x.clone().requires_grad_(requires_grad), x.clone().requires_grad_(requires_grad))

    # ---- forward ---------------------------------------------------------------------------------

    @rule(
        layers=st.lists(a_layer, min_size=1, max_size=3),
        v=number,
        graph=st.sampled_from((True, True, True, False)),
    )
    def call(self, layers: list[int], v: int, graph: bool) -> None:
        """Calls layers on one x."""
        x, x_twin = self.value(v)
        with torch.set_grad_enabled(graph):
            for i in layers:
                layer = partial(self.net.layers[i], x)
                self.add(*self.pair_of(layer, partial(self.plain, i, x_twin)))

    @rule(i=a_layer, v=number, tasks=row_tasks)
    def call_rows(self, i: int, v: int, tasks: list[int]) -> None:
        x, x_twin = self.value(v)
        index = torch.tensor(tasks)
        layer = partial(self.rows, i, x, index)
        self.add(*self.pair_of(layer, partial(self.plain_rows, i, x_twin, index)))

    @rule(i=a_layer, j=a_layer, v=number, reentrant=st.booleans())
    def checkpointed(self, i: int, j: int, v: int, reentrant: bool) -> None:
        """Calls two layers on one x under a checkpoint."""
        x, x_twin = self.value(v)

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
        for y in self.pair_of(layers, partial(plain, x_twin.detach())):
            if y.requires_grad:
                scalar(y).backward()
        self.compare_gradients()

    @rule(v1=number, v2=number, kind=st.sampled_from(sorted(JOINS)))
    def join(self, v1: int, v2: int, kind: str) -> None:
        a, a_twin = self.value(v1)
        b, b_twin = self.value(v2)
        self.add(JOINS[kind](a, b), JOINS[kind](a_twin, b_twin))

    # ---- backward --------------------------------------------------------------------------------

    @rule(v=newest)
    def backward(self, v: int) -> None:
        actual, twin = self.value(v)
        if twin.requires_grad:
            for y in (actual, twin):
                scalar(y).backward(retain_graph=True)
            self.compare_gradients()

    @rule()
    def backward_of_all(self) -> None:
        """Runs a backward without retain_graph, which frees the graphs."""
        self.clear_gradients()
        losses = [sum(map(scalar, values)) for values in zip(*self.values, strict=True)]
        if losses[1].requires_grad:
            for loss in losses:
                loss.backward()
            self.compare_gradients()
        self.forget_graphs()

    @rule(
        v=newest,
        chosen=st.lists(number, min_size=1, max_size=4),
        create_graph=st.booleans(),
    )
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

    @rule(v=newest, vectors=st.integers(1, 3))
    def batched_gradients(self, v: int, vectors: int) -> None:
        pair = self.value(v)
        values = torch.linspace(-1, 1, vectors * TOKENS * K, dtype=torch.float64)
        dy = values.view(vectors, TOKENS, K)
        if pair[1].requires_grad:
            self.compared(pair, self.leaves(), grad_outputs=dy, is_grads_batched=True)

    # ---- changes ---------------------------------------------------------------------------------

    @rule(change=st.sampled_from(CHANGES), i=number, on=st.booleans())
    def change(self, change: str, i: int, on: bool) -> None:
        """Changes the parameters or the net. What i and on mean depends on the change.

        One rule, because each change forgets the graphs.
        """
        getattr(self, change)(i, on)

    def step(self, _: int, by_data: bool) -> None:
        """Changes the parameters in place like an optimizer, or by `.data` like some trainers."""
        with torch.no_grad():
            for parameter in itertools.chain(*self.leaves()):
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

    def merge(self, i: int, _: bool) -> None:
        """Merges a layer, or unmerges it if it is merged."""
        i %= LAYERS
        layer = self.net.layers[i]
        W, _, A, B, core = (self.twin[name] for name in self.net.names[i].values())
        name = self.net.names[i]["weight"]
        if layer.merged:
            layer.unmerge()
            assert torch.equal(layer.weight, W)
            del self.merged[name]
        else:
            layer.merge()
            self.merged[name] = (W + SCALING * B @ core.T @ A.T).detach()
        self.forget_graphs()

    def dropout(self, i: int, on: bool) -> None:
        self.net.layers[i % LAYERS].dropout = 0.3 * on

    def copy(self, i: int, _: bool) -> None:
        """Continues the program with a copy of the net. A merged layer has no state_dict."""
        copies = (
            self.copied_by_state_dict,
            partial(copy.deepcopy, self.net),
            lambda: pickle.loads(pickle.dumps(self.net)),
        )
        if not self.merged:
            self.net = copies[i % 3]()
            self.forget_graphs()

    def copied_by_state_dict(self) -> Net:
        file = io.BytesIO()
        torch.save(self.net.state_dict(), file)
        net = copy.deepcopy(self.net)
        for parameter in net.parameters():
            parameter.data.zero_()
        net.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        return net

    def threads(self, v: int, _: bool) -> None:
        """Two threads train the net at once."""
        x, x_twin = (tensor.detach() for tensor in self.value(v))
        self.forget_graphs()
        if any(layer.dropout for layer in self.net.layers):
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
        stateful_step_count=30,
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
        stateful_step_count=50,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
