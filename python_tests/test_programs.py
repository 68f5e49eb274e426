"""Random programs of training: layers and their twin in plain PyTorch do the same steps, in float64, and must agree after each.

Each value of a program is a pair (ours, twin) in its own graph. A step calls layers, joins values, runs backwards of every kind
and adds their gradients as values, changes parameters, merges, copies, or trains in threads.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from functools import partial

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

K, R, TOKENS, LAYERS, TASKS, S = 5, 2, 4, 3, 3, 0.8
CLOSE, LARGE = 1e-7, 1e6
Pair = tuple[Tensor, Tensor]
number, some = st.integers(0, 7), st.lists(st.integers(0, 7), min_size=1, max_size=4)
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
step_of_a_forward = st.tuples(
    st.sampled_from(FORWARDS),
    number,
    number,
    number,
    st.lists(st.integers(-1, 2), min_size=4, max_size=4),
)


class Net(nn.Module):
    """Layers over one A and two B, and cores of tasks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        pair = LoTRFactors(K, K, R, dtype=torch.float64)
        pairs = (pair, pair, LoTRFactors.of(pair.A, LoTRFactor(K, R, dtype=torch.float64)))
        linear = (nn.Linear(K, K, dtype=torch.float64) for _ in range(LAYERS))
        self.layers = nn.ModuleList(
            LoTRLinear.from_linear(m, p, scaling=S) for m, p in zip(linear, pairs)
        )
        self.tasks = nn.Parameter(torch.randn(TASKS, R, R, dtype=torch.float64))
        with torch.no_grad():
            for layer in self.layers:
                layer.core.normal_()
                layer.factors.A.value.normal_(), layer.factors.B.value.normal_()

    def parts(self, i: int) -> tuple[Tensor, ...]:
        layer = self.layers[i]
        return layer.weight, layer.bias, layer.factors.A.value, layer.factors.B.value, layer.core

    def rows(self, i: int, x: Tensor, index: Tensor) -> Tensor:
        W, bias, A, B, _ = self.parts(i)
        return lotr_linear(x, W, bias, A, B, self.tasks, S, core_index=index)


class Program(RuleBasedStateMachine):
    @initialize(little=st.booleans(), few=st.booleans())
    def start(self, little: bool, few: bool) -> None:
        """Chooses the form of the nodes, and makes the net, the twin's parameters and a first value."""
        self.before = dispatch.LITTLE_WORK, dispatch.FEW_TOKENS
        dispatch.LITTLE_WORK, dispatch.FEW_TOKENS = 2**62 * little, 2**62 * few
        self.net, self.values, self.seed, self.weights = Net(), [], 0, {}
        self.twin = {
            n: p.detach().clone().requires_grad_(p.requires_grad)
            for n, p in self.net.named_parameters()
        }
        self.new_input(True)

    def teardown(self) -> None:
        if hasattr(self, "before"):
            dispatch.LITTLE_WORK, dispatch.FEW_TOKENS = self.before

    # ---- the twin ----------------------------------------------------------------------------------------------------

    def named(self) -> dict[str, Tensor]:
        return dict(self.net.named_parameters())

    def pairs_of_leaves(self) -> list[Pair]:
        return [(p, self.twin[n]) for n, p in self.named().items() if p.requires_grad]

    def own(self, i: int) -> list[Tensor]:
        names = {id(p): n for n, p in self.named().items()}
        return [self.twin[names[id(t)]] for t in self.net.parts(i)]

    def plain(self, i: int, x: Tensor) -> Tensor:
        W, bias, A, B, core = self.own(i)
        if i in self.weights:  # merged
            return nnf.linear(x, self.weights[i], bias)
        p = self.net.layers[i].dropout
        dropped = x
        if p:  # by the mask of the next seed that torch's generator draws
            seed = int(torch.randint(-(2**63), 2**63 - 1, (1,)))
            dropped = x * reference.dropout_mask(*x.shape, p, seed)
        return nnf.linear(x, W, bias) + S * (dropped @ A @ core @ B.T)

    def both(self, ours: Callable[[], Tensor], twin: Callable[[], Tensor]) -> Pair:
        """Computes a pair from one state of torch's generator."""
        self.seed += 1
        torch.manual_seed(self.seed)
        a = ours()
        torch.manual_seed(self.seed)
        return a, twin()

    def plain_rows(self, i: int, x: Tensor, index: Tensor) -> Tensor:
        W, bias, A, B, _ = self.own(i)
        W = self.weights.get(i, W)
        index = index.view(*index.shape, *(1,) * (x.dim() - 1 - index.dim())).expand(x.shape[:-1])
        cores = self.twin["tasks"][index.clamp(min=0)] * (index >= 0)[..., None, None]
        return nnf.linear(x, W, bias) + S * ((x @ A).unsqueeze(-2) @ cores).squeeze(-2) @ B.T

    # ---- values ------------------------------------------------------------------------------------------------------

    def add(self, ours: Tensor, twin: Tensor) -> None:
        self.same(ours, twin)
        if twin.dim() == 2 and tuple(twin.shape) == (TOKENS, K):
            if float(twin.detach().abs().max()) > LARGE:
                ours, twin = torch.tanh(ours), torch.tanh(twin)
            self.values = [*self.values[-7:], (ours, twin)]

    def value(self, i: int) -> Pair:
        """0 is the newest: hypothesis likes small numbers, and so makes chains."""
        return self.values[-1 - i % len(self.values)]

    def same(self, ours: Tensor | None, twin: Tensor | None) -> None:
        if twin is not None and not bool(twin.isfinite().all() and twin.abs().max() < LARGE**2):
            return
        error = relative(ours, twin)
        assert error < CLOSE or float((ours.detach() - twin.detach()).abs().max()) < 1e-9, (
            f"{error:.1e}"
        )

    def same_gradients(self) -> None:
        for ours, twin in self.pairs_of_leaves():
            self.same(ours.grad, twin.grad)

    def forget_graphs(self) -> None:
        """After a change of parameters, older graphs hold values that are no longer there."""
        self.values = [
            (a.detach().requires_grad_(), b.detach().requires_grad_()) for a, b in self.values
        ]
        for ours, twin in self.pairs_of_leaves():
            ours.grad = twin.grad = None

    def new_input(self, requires_grad: bool) -> None:
        self.seed += 1
        x = torch.randn(
            TOKENS, K, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed)
        )
        self.add(x.clone().requires_grad_(requires_grad), x.clone().requires_grad_(requires_grad))

    # ---- rules -------------------------------------------------------------------------------------------------------

    @rule(
        steps=st.lists(step_of_a_forward, min_size=1, max_size=4),
        how=st.sampled_from(BACKWARDS),
        v=number,
        chosen=some,
    )
    def train(
        self, steps: list[tuple[str, int, int, int, list[int]]], how: str, v: int, chosen: list[int]
    ) -> None:
        """A piece of a forward, and a backward of one of the newest values."""
        for what, i, j, value, index in steps:
            if what == "layer":
                self.call(i, value)
            elif what == "siblings":
                self.call_siblings(value, [i, j, i + 1])
            elif what == "rows":
                self.call_rows(i, value, index)
            elif what == "checkpoint":
                self.checkpointed(i, j, value, reentrant=bool(index[0] % 2))
            elif what == "no graph":
                self.call_without_a_graph(i, value)
            elif what == "input":
                self.new_input(bool(i % 2))
            else:
                self.join(i, value, what)
        if how == "all":
            self.backward_of_all()
        elif how == "batched":
            self.batched_gradients(v // 4, 1 + v % 3)
        elif how == "into .grad":
            self.backward(v // 4)
        else:
            self.gradients(v // 4, chosen, create=how == "create_graph")

    @rule(how=st.sampled_from(CHANGES), i=number, on=st.booleans())
    def change(self, how: str, i: int, on: bool) -> None:
        """Of parameters, or of the net itself."""
        if how == "step":
            self.step(on)
        elif how == "freeze":
            self.freeze(i, on)
        elif how == "merge":
            self.merge(i)
        elif how == "threads":
            self.threads(i)
        elif how == "dropout":
            self.net.layers[i % LAYERS].dropout = 0.3 * on
        elif not self.weights:  # a merged layer has no state_dict
            self.copy(how)

    # ---- forward -----------------------------------------------------------------------------------------------------

    def call(self, i: int, v: int) -> None:
        x, w = self.value(v)
        i %= LAYERS
        self.add(*self.both(lambda: self.net.layers[i](x), lambda: self.plain(i, w)))

    def call_siblings(self, v: int, siblings: list[int]) -> None:
        x, w = self.value(v)
        for i in siblings:
            i %= LAYERS
            self.add(*self.both(partial(self.net.layers[i], x), partial(self.plain, i, w)))

    def call_without_a_graph(self, i: int, v: int) -> None:
        x, w = self.value(v)
        i %= LAYERS
        with torch.no_grad():
            self.add(*self.both(lambda: self.net.layers[i](x), lambda: self.plain(i, w)))

    def call_rows(self, i: int, v: int, index: list[int]) -> None:
        (x, w), which = self.value(v), torch.tensor(index)
        self.add(self.net.rows(i % LAYERS, x, which), self.plain_rows(i % LAYERS, w, which))

    def checkpointed(self, i: int, j: int, v: int, reentrant: bool) -> None:
        x, w = self.value(v)
        i, j = i % LAYERS, j % LAYERS
        reentrant = reentrant and x.requires_grad

        def run(x: Tensor) -> Tensor:
            return torch.tanh(self.net.layers[i](x)) * self.net.layers[j](x)

        def plain(w: Tensor) -> Tensor:
            return torch.tanh(self.plain(i, w)) * self.plain(j, w)

        if not reentrant:
            ours = partial(checkpoint, run, x, use_reentrant=False)
            self.add(*self.both(ours, partial(plain, w)))
            return
        for ours, twin in self.pairs_of_leaves():
            ours.grad = twin.grad = None
        ours, twin = self.both(
            partial(checkpoint, run, x.detach().requires_grad_(), use_reentrant=True),
            partial(plain, w.detach()),
        )
        ours.sin().sum().backward()
        if twin.requires_grad:
            twin.sin().sum().backward()
        self.same_gradients()

    def join(self, a: int, b: int, how: str) -> None:
        form: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "product": lambda a, b: torch.tanh(a) * b,
            "sum": lambda a, b: a + torch.sigmoid(b),
            "tanh": lambda a, b: torch.tanh(a - b),
            "norm": lambda a, b: nnf.layer_norm(a, (K,), eps=0.1) + 0 * b,
        }
        self.add(*(form[how](*pair) for pair in zip(self.value(a), self.value(b), strict=True)))

    # ---- backward ----------------------------------------------------------------------------------------------------

    def backward(self, v: int) -> None:
        ours, twin = self.value(v)
        if twin.requires_grad:
            for t in (ours, twin):
                t.sin().sum().backward(retain_graph=True)
            self.same_gradients()

    def backward_of_all(self) -> None:
        """Without retain_graph: the graphs are gone after it."""
        for ours, twin in self.pairs_of_leaves():
            ours.grad = twin.grad = None
        totals = [sum(pair[i].sin().sum() for pair in self.values) for i in range(2)]
        if totals[1].requires_grad:
            [t.backward() for t in totals]
            self.same_gradients()
        self.forget_graphs()

    def gradients(self, v: int, chosen: list[int], create: bool) -> None:
        """Of some leaves and values; with create, those of a value's shape become values with a graph of their own."""
        ours, twin = self.value(v)
        candidates = [*self.pairs_of_leaves(), *self.values]
        wanted = (
            candidates if 0 in chosen else [candidates[c * 3 % len(candidates)] for c in chosen]
        )
        wanted = [pair for pair in wanted if pair[1].requires_grad]
        if not wanted or not twin.requires_grad:
            return
        found = [
            torch.autograd.grad(
                t.sin().sum(), own, create_graph=create, retain_graph=True, allow_unused=True
            )
            for t, own in zip((ours, twin), zip(*wanted, strict=True), strict=True)
        ]
        for a, b in zip(*found, strict=True):
            self.same(a, b)
            if create and a is not None and b is not None:
                if b.requires_grad and a.requires_grad:
                    self.penalty(a, b)
                self.add(a, b)

    def penalty(self, a: Tensor, b: Tensor) -> None:
        """Differentiates a gradient once more."""
        leaves = self.pairs_of_leaves()
        both = (
            torch.autograd.grad(t.sin().sum(), own, retain_graph=True, allow_unused=True)
            for t, own in zip((a, b), zip(*leaves, strict=True), strict=True)
        )
        for second, want in zip(*both, strict=True):
            self.same(second, want)

    def batched_gradients(self, v: int, vectors: int) -> None:
        ours, twin = self.value(v)
        if twin.requires_grad:
            g = torch.linspace(-1, 1, vectors * TOKENS * K, dtype=torch.float64).view(
                vectors, TOKENS, K
            )
            how = {"is_grads_batched": True, "retain_graph": True, "allow_unused": True}
            leaves = zip(*self.pairs_of_leaves(), strict=True)
            for a, b in zip(
                *(torch.autograd.grad(t, own, g, **how) for t, own in zip((ours, twin), leaves)),
                strict=True,
            ):
                self.same(a, b)

    # ---- changes -----------------------------------------------------------------------------------------------------

    def step(self, data: bool) -> None:
        """An optimizer's, in place; or by `.data`, as some trainers do."""
        for pair in self.pairs_of_leaves():
            for t in pair:
                if data:
                    t.data = t.data * 0.9
                else:
                    with torch.no_grad():
                        t.mul_(0.9)
        self.forget_graphs()

    def freeze(self, part: int, on: bool) -> None:
        leaves = {n: p for n, p in self.named().items() if not n.endswith(("weight", "bias"))}
        name = list(leaves)[part % len(leaves)]
        leaves[name].requires_grad_(on), self.twin[name].requires_grad_(on)
        if not self.pairs_of_leaves():
            leaves[name].requires_grad_(True), self.twin[name].requires_grad_(True)
        self.forget_graphs()

    def merge(self, i: int) -> None:
        i %= LAYERS
        layer, (W, _, A, B, core) = self.net.layers[i], self.own(i)
        if layer.merged:
            layer.unmerge()
            assert torch.equal(layer.weight, W)
            del self.weights[i]
        else:
            layer.merge()
            self.weights[i] = (W + S * B @ core.T @ A.T).detach()
        self.forget_graphs()

    def copy(self, how: str) -> None:
        """The program goes on with a copy of the net."""
        if how == "state_dict":
            file = io.BytesIO()
            torch.save(self.net.state_dict(), file)
            other = Net()
            other.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
            for a, b in zip(other.layers, self.net.layers, strict=True):
                a.dropout = b.dropout
            for a, b in zip(other.parameters(), self.net.parameters(), strict=True):
                a.requires_grad_(b.requires_grad)
        else:
            other = (
                copy.deepcopy(self.net)
                if how == "deepcopy"
                else pickle.loads(pickle.dumps(self.net))
            )
        self.net = other
        self.forget_graphs()

    def threads(self, v: int) -> None:
        """Two threads train the net at once."""
        x, w = (t.detach() for t in self.value(v))
        self.forget_graphs()
        if (
            not any(t.requires_grad for i in range(LAYERS) for t in self.own(i))
            or len(self.weights) == LAYERS
            or any(layer.dropout for layer in self.net.layers)  # threads share a generator
        ):
            return
        barrier = threading.Barrier(2)

        def train(scale: float) -> None:
            barrier.wait()
            for _ in range(3):
                y = sum(layer(x * scale) for layer in self.net.layers)
                if y.requires_grad:
                    y.sin().sum().backward()

        running = [threading.Thread(target=train, args=(scale,)) for scale in (1.0, 0.5)]
        [t.start() for t in running], [t.join() for t in running]
        for scale in (1.0, 0.5):
            y = sum(self.plain(i, w * scale) for i in range(LAYERS))
            if y.requires_grad:
                (3 * y.sin().sum()).backward()
        self.same_gradients()


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
    """Other programs in each run, and longer ones. About ten minutes."""

    settings = settings(
        max_examples=1000,
        stateful_step_count=20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
