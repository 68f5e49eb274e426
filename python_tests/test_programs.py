"""Random training programs: adapted layers and plain PyTorch take the same steps in float64.

Each value of a program is a pair: the tensor that the layers compute, and its twin in plain
PyTorch, each with its graph. A step calls layers, joins values, runs backwards of all kinds and
adds their gradients as values, or changes parameters. The two must agree after each step.

Not here: copies, threads, reentrant checkpoints (test_layers.py) and merges (test_merging.py).
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import relative
from layers import K, Net, R, Side, cores_of_rows, inputs, sides
from torch import Tensor, nn
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
VALUES = 8  # how many values a program keeps, the newest ones

Pair = tuple[Tensor, Tensor]

JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda a, b: torch.tanh(a) * b,
    "sum": lambda a, b: a + torch.sigmoid(b),
    "tanh": lambda a, b: torch.tanh(a - b),
    "norm": lambda a, b: nn.functional.layer_norm(a, (K,), eps=0.1) + 0 * b,
}

number = st.integers(0, 7)
newest = st.integers(0, 1)
a_layer = st.integers(0, LAYERS - 1)
row_tasks = st.lists(st.integers(-1, TASKS - 1), min_size=TOKENS, max_size=TOKENS)


# ---- what a side computes ------------------------------------------------------------------------


def layer(side: Side, x: Tensor, i: int) -> Tensor:
    return side.net.call(i, x)


def layer_of_rows(side: Side, x: Tensor, i: int, tasks: list[int]) -> Tensor:
    index = torch.tensor(tasks)
    net = side.net
    if net.exact:
        return net.formula(i, x, cores_of_rows(net.tasks, index))
    return lotr_linear(
        x,
        **{**net.parts(i), "core": net.tasks},
        scaling=net.layers[i].scaling,
        core_index=index,
        dropout_p=net.layers[i].dropout,
        training=True,
    )


def layers_in_checkpoint(side: Side, x: Tensor, i: int, j: int) -> Tensor:
    def product(x: Tensor) -> Tensor:
        return torch.tanh(side.net.call(i, x)) * side.net.call(j, x)

    return checkpoint(product, x, use_reentrant=False)


def scalar(y: Tensor) -> Tensor:
    """Returns a loss.

    asinh and its derivatives amplify no relative error. The sine of a large value would amplify its
    rounding error by the value.
    """
    return y.asinh().sum()


# ---- the programs --------------------------------------------------------------------------------


class Program(RuleBasedStateMachine):
    patch = pytest.MonkeyPatch()

    @initialize(little=st.booleans(), few=st.booleans())
    def start(self, little: bool, few: bool) -> None:
        """Chooses the form of the nodes. Four layers share one A and two B, and cores of tasks."""
        self.patch.setattr(dispatch, "LITTLE_WORK", 2**62 if little else 0)
        self.patch.setattr(dispatch, "FEW_TOKENS", 2**62 if few else -1)
        net = Net("two Bs")
        net.tasks = nn.Parameter(torch.randn(TASKS, R, R + 1, dtype=torch.float64))
        self.sides = sides(net, inputs(TOKENS))
        self.values: list[Pair] = []
        self.seed = 0
        self.new_input(True)

    def teardown(self) -> None:
        self.patch.undo()

    def leaves(self) -> list[Pair]:
        """Returns the trained parameters, each with its twin."""
        pairs = zip(*(side.net.parameters() for side in self.sides), strict=True)
        return [pair for pair in pairs if pair[0].requires_grad]

    def run(self, compute: Callable[..., Tensor], pair: Pair, *arguments: object) -> None:
        """Computes a value from a pair. Both sides start with the same state of the generator."""
        self.seed += 1
        results = []
        for side, x in zip(self.sides, pair, strict=True):
            torch.manual_seed(self.seed)
            results.append(compute(side, x, *arguments))
        self.add(*results)

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
        # Rounding errors dominate results of this size, and infinite ones differ by NaN.
        if twin is not None and not bool(twin.isfinite().all() and twin.abs().max() < LARGE**2):
            return
        error = relative(actual, twin)
        if error >= TOLERANCE:
            difference = float((actual.detach() - twin.detach()).abs().max())
            assert difference < ABSOLUTE_TOLERANCE, f"{error:.1e}"

    def forget_graphs(self) -> None:
        """Detaches all values. Older graphs saved parameters that have changed since."""
        self.values = [
            (actual.detach().requires_grad_(), twin.detach().requires_grad_())
            for actual, twin in self.values
        ]
        for parameter in itertools.chain(*self.leaves()):
            parameter.grad = None

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
        pair = self.value(v)
        with torch.set_grad_enabled(graph):
            for i in layers:
                self.run(layer, pair, i)

    @rule(i=a_layer, v=number, tasks=row_tasks)
    def call_rows(self, i: int, v: int, tasks: list[int]) -> None:
        self.run(layer_of_rows, self.value(v), i, tasks)

    @rule(i=a_layer, j=a_layer, v=number)
    def checkpointed(self, i: int, j: int, v: int) -> None:
        self.run(layers_in_checkpoint, self.value(v), i, j)

    @rule(v1=number, v2=number, kind=st.sampled_from(sorted(JOINS)))
    def join(self, v1: int, v2: int, kind: str) -> None:
        a, a_twin = self.value(v1)
        b, b_twin = self.value(v2)
        self.add(JOINS[kind](a, b), JOINS[kind](a_twin, b_twin))

    # ---- backward --------------------------------------------------------------------------------

    @rule()
    def backward_of_all(self) -> None:
        """Runs a backward into the leaves. It frees the graphs."""
        losses = [sum(map(scalar, values)) for values in zip(*self.values, strict=True)]
        if losses[1].requires_grad:
            for loss in losses:
                loss.backward()
            for parameter, twin in self.leaves():
                self.compare(parameter.grad, twin.grad)
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
        # A 0 keeps all candidates. hypothesis shrinks towards it.
        if 0 not in chosen:
            # In steps of 3, small numbers reach parameters of all kinds, and values.
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

    # ---- changes ---------------------------------------------------------------------------------

    @rule(by_data=st.booleans())
    def step(self, by_data: bool) -> None:
        """Changes the parameters in place like an optimizer, or by `.data` like some trainers."""
        with torch.no_grad():
            for parameter in itertools.chain(*self.leaves()):
                if by_data:
                    parameter.data = parameter.data * 0.9
                else:
                    parameter.mul_(0.9)
        self.forget_graphs()

    @rule(part=number, trained=st.booleans())
    def freeze(self, part: int, trained: bool) -> None:
        """Freezes a factor or a core, or trains it again. One parameter always trains."""
        parameters = self.sides[0].net.named_parameters()
        names = [name for name, _ in parameters if not name.endswith(("weight", "bias"))]
        is_trained = trained or len(self.leaves()) == 1
        for side in self.sides:
            side.net.get_parameter(names[part % len(names)]).requires_grad_(is_trained)
        self.forget_graphs()

    @rule(i=a_layer, on=st.booleans())
    def dropout(self, i: int, on: bool) -> None:
        for side in self.sides:
            side.net.layers[i].dropout = 0.3 * on
        self.forget_graphs()  # a checkpoint would be recomputed with another dropout


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
