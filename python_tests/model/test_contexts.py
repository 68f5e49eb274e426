"""`disabled` and `mixed` as states of a request, against plain torch in float64 that takes the state as an argument: nested,
interleaved, in threads and asyncio tasks, recomputed in backward, and compiled."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from toys import randomize

from lotr_ext import LoTRConfig, TaskBank, add_adapter, apply_lotr, disabled, mixed
from lotr_ext.layers import request
from lotr_ext.layers.request import NOW
from nets import relative

ROWS, TOKENS, D, LAYERS = 4, 3, 8, 2
# a state: the task or adapter of each row, the tasks of each row's tokens, "off", or None for the active adapter
NAMES = {0: "default", 1: "fr", -1: None}
TRAINED = ("A", "B", "core")


class Net(nn.Module):
    """x [rows, tokens, D] -> [rows, tokens, D]. run: how a layer is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(LAYERS))
        self.run: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(self.run(layer, x))
        return x


class World:
    """An adapted model whose adapters "default" and "fr" are also tasks 0 and 1, and what it computes by the definition.

    before: what each layer's input goes through."""

    def __init__(self, *, by_index: bool = False, before: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        torch.manual_seed(0)
        self.before = before
        self.model = apply_lotr(Net().double(), LoTRConfig(rank=4, alpha=2.0, target_modules=r"layers\.\d+"))
        self.model.double()
        randomize(self.model, std=0.5)
        add_adapter(self.model, "fr", share_factors="default")
        with torch.no_grad():
            for core in self.model.lotr_parked["fr"].cores:
                core.normal_()
        self.by_index, layers = by_index, self.layers
        self.cores = [[layer.core for layer in layers], list(self.model.lotr_parked["fr"].cores)]
        self.bank = TaskBank(self.model, 2).requires_grad_()
        for cores in self.cores:
            self.bank.add({f"layers.{i}.core": core.detach() for i, core in enumerate(cores)})
        self.x = torch.randn(ROWS, TOKENS, D, dtype=torch.float64)

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.model.layers)

    def open(self, state: object) -> contextlib.AbstractContextManager:
        if state is None:
            return contextlib.nullcontext()
        if state == "off":
            return disabled(self.model)
        by_index = self.by_index or isinstance(state[0], list)
        return mixed(self.model, torch.tensor(state) if by_index else [NAMES[task] for task in state])

    def truth(self, state: object, x: Tensor | None = None) -> Tensor:
        """state: that of all layers, or a dictionary of each one's."""
        x, factors = self.x if x is None else x, self.model.lotr_factors[f"{D}x{D}"]
        none = torch.zeros(4, 4, dtype=torch.float64)
        for i, layer in enumerate(self.layers):
            own, x = state[i] if isinstance(state, dict) else state, self.before(x)
            index = torch.tensor([-1] * ROWS if own == "off" else [0] * ROWS if own is None else own)
            cores = torch.stack([*(cores[i] for cores in self.cores), none])[index.view(ROWS, -1)]  # -1: the last
            h = ((x @ factors.A).unsqueeze(-2) @ cores).squeeze(-2)
            x = torch.tanh(x @ layer.weight.T + layer.bias + layer.scaling * (h @ factors.B.T))
        return x

    def check(self, state: object, x: Tensor | None = None) -> None:
        got = self.model(self.x if x is None else x)
        assert relative(got, self.truth(state, x)) < 1e-9, state

    def gradients(self, y: Tensor, x: Tensor) -> list[Tensor]:
        """Of x and all that the adapters have: "default" by its name, and as task 0."""
        y.square().sum().backward()
        found = []
        for own, core in zip(self.cores[0], self.bank.cores, strict=True):
            if core.grad is not None:
                own.grad = core.grad[0] if own.grad is None else own.grad + core.grad[0]
                core.grad = None
        for t in (x, *self.model.lotr_factors.parameters(), *self.cores[0]):
            found.append(torch.zeros_like(t) if t.grad is None else t.grad)
            t.grad = None
        return found

    def check_gradients(self, y: Tensor, x: Tensor, state: object) -> None:
        like = x.detach().clone().requires_grad_()
        want = self.gradients(self.truth(state, like), like)
        for got, true in zip(self.gradients(y, x), want, strict=True):
            assert (got - true).norm() <= 1e-9 * max(1.0, true.norm().item()), state


BY_TOKEN = [[0, 1, -1], [-1, -1, 1], [0, 0, 0], [1, -1, 0]]
STATES = {"disabled": ["off", "off"], "mixed": [[0, 1, -1, 1], [1, 1, 0, -1]], "by token": [BY_TOKEN, BY_TOKEN[::-1]]}


@pytest.fixture(params=[False, True], ids=["by name", "by index"])
def world(request: pytest.FixtureRequest) -> World:
    return World(by_index=request.param)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    gc.collect()
    assert NOW.any is None and not request._all and not request._kept


@pytest.mark.parametrize("outer", [None, "off", [0, 1, -1, 1]], ids=str)
@pytest.mark.parametrize("inner", ["off", [1, 1, 0, -1]], ids=str)
def test_leaving_an_inner_context_leaves_the_outer_one(world: World, outer: object, inner: object) -> None:
    both = "off" if "off" in (outer, inner) else inner  # off wins wherever it stands
    with world.open(outer):
        world.check(outer)
        for _ in range(2):
            with world.open(inner):
                world.check(both)
            world.check(outer)
        with pytest.raises(KeyboardInterrupt), world.open(inner):
            raise KeyboardInterrupt
        world.check(outer)
    world.check(None)


@pytest.mark.parametrize("kind", STATES)
def test_contexts_close_in_any_order(world: World, kind: str) -> None:
    first, second = STATES[kind]
    a, b = world.open(first), world.open(second)
    a.__enter__()
    b.__enter__()
    world.check(second)
    a.__exit__(None, None, None)
    world.check(second)
    b.__exit__(None, None, None)
    world.check(None)

    def stepwise(state: object) -> Iterator[None]:
        with world.open(state):
            yield
            yield

    one, other = stepwise(first), stepwise(second)
    next(one), next(other), next(one)
    world.check(second)
    one.close()
    world.check(second)
    other.close()
    world.check(None)
    with contextlib.ExitStack() as outer:
        outer.enter_context(world.open(first))
        with contextlib.ExitStack() as inner:
            inner.enter_context(world.open(second))
            later = inner.pop_all()
        outer.pop_all().close()
        world.check(second)
        later.close()
    world.check(None)


@pytest.mark.parametrize("kind", STATES)
def test_a_context_may_close_in_another_thread(world: World, kind: str) -> None:
    context = world.open(STATES[kind][0])
    context.__enter__()
    thread = threading.Thread(target=lambda: context.__exit__(None, None, None))
    thread.start()
    thread.join()
    world.check(None)


@pytest.mark.parametrize("kind", [*STATES, "all"])
def test_four_threads_on_one_model(world: World, kind: str) -> None:
    states = {"disabled": ["off", None, "off", None], "mixed": [*STATES["mixed"], None, [0, 0, 0, 1]]}
    states["all"] = ["off", None, STATES["mixed"][0], BY_TOKEN]
    states["by token"] = [*STATES["by token"], None, [0, 0, 0, 1]]
    together = threading.Barrier(4)

    # Without gradients: torch 2.13 can deadlock where two threads first use one parameter in a graph. mul holds the parameter's
    # lock and takes the GIL, a Python Function holds the GIL and takes the lock.
    @torch.no_grad()
    def run(state: object) -> None:
        together.wait()
        for _ in range(15):
            with world.open(state):
                world.check(state)
            world.check(None)

    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(run, state) for state in states[kind]]:
            result.result()


def test_tasks_of_asyncio_have_states_of_their_own(world: World) -> None:
    async def run(state: object) -> None:
        for _ in range(3):
            with world.open(state):
                await asyncio.sleep(0)
                world.check(state)
                await asyncio.sleep(0)
                world.check(state)

    async def main() -> None:
        await asyncio.gather(*(run(state) for state in (None, "off", *STATES["mixed"])))

    asyncio.run(main())


# ---- recomputed in backward ------------------------------------------------------------------------------------------


def keep_products(_: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if "mm" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def regions(reentrant: bool, how: str, model: Net) -> Callable[[Tensor], Tensor]:
    """A call of model with activation checkpointing: of each layer, of the whole, of the layers within the whole by the same
    kind or the other one, or of each layer with its products kept."""
    kind = {"use_reentrant": reentrant != (how == "other kind within")}
    if how == "selective":
        kind["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
    model.run = lambda layer, x: checkpoint(layer, torch.sigmoid(x), **kind)
    if how == "whole":
        model.run = lambda layer, x: layer(torch.sigmoid(x))
    return model if how in ("layers", "selective") else lambda x: checkpoint(model, x, use_reentrant=reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a region within the forward of another
@pytest.mark.parametrize("how", ["layers", "whole", "within", "other kind within", "selective"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_recomputation_has_the_state_of_its_forward(reentrant: bool, how: str) -> None:
    if reentrant and how == "selective":
        pytest.skip("torch has it for the other kind alone")
    world = World(before=torch.sigmoid)
    call = regions(reentrant, how, world.model)
    for state in (None, "off", [0, 1, -1, 1], BY_TOKEN):
        for around in (None, "off", [1, 0, 0, 0]):
            x = world.x.clone().requires_grad_()
            with world.open(state):
                y = call(x)
            with world.open(around):
                world.check_gradients(y, x, state)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_recomputation_opens_its_own_contexts_again(reentrant: bool) -> None:
    world, inner, outer = World(), [0, 1, -1, 1], [1, 1, 1, 0]
    first, *others = world.layers

    def region(x: Tensor) -> Tensor:
        with world.open(inner):
            x = torch.tanh(first(x))
        for layer in others:
            x = torch.tanh(layer(x))
        return x

    x = world.x.clone().requires_grad_()
    with world.open(outer):
        y = checkpoint(region, x, use_reentrant=reentrant)
    with world.open("off"):
        world.check_gradients(y, x, {i: inner if i == 0 else outer for i in range(LAYERS)})


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_recomputations_in_four_threads(reentrant: bool) -> None:
    world, states = World(before=torch.sigmoid), ["off", None, *STATES["mixed"]]
    call, together = regions(reentrant, "layers", world.model), threading.Barrier(4)
    forwards: list[tuple[Tensor, Tensor, object]] = []

    def forward(state: object) -> None:
        together.wait()
        for _ in range(5):
            x = world.x.clone().requires_grad_()
            with world.open(state):
                forwards.append((call(x), x, state))

    def gradient(y: Tensor, x: Tensor, state: object) -> None:
        want = torch.autograd.grad(world.truth(state, like := x.detach().clone().requires_grad_()).square().sum(), like)[0]
        y.square().sum().backward()
        assert (x.grad - want).norm() <= 1e-9 * want.norm(), state

    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(forward, state) for state in states]:
            result.result()
        for result in [pool.submit(gradient, *one) for one in forwards]:
            result.result()


def test_other_threads_of_autograd_have_the_state_of_the_one_that_called_backward() -> None:
    """On a CPU the engine takes another thread for the sixty-first backward within backwards."""
    world, found, state = World(), [], [0, 1, -1, 1]

    def within(depth: int) -> None:
        with torch.enable_grad():
            y = torch.ones((), requires_grad=True) * 1
        y.register_hook(lambda _: within(depth - 1) if depth else found.append((threading.get_ident(), world.model(world.x))))
        y.backward()

    with world.open(state):
        within(70)
    thread, y = found[0]
    assert thread != threading.get_ident() and relative(y, world.truth(state)) < 1e-9


def test_what_a_recomputation_needs_goes_with_its_graph() -> None:
    world = World(before=torch.sigmoid)
    call, x = regions(False, "layers", world.model), world.x.clone().requires_grad_()
    with world.open([0, 1, -1, 1]):
        y = call(x)
    assert len(request._kept) == LAYERS
    del y
    gc.collect()
    assert not request._kept


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_code_runs_by_the_state_of_each_call(fresh, world: World) -> None:
    compiled = torch.compile(world.model, backend="aot_eager", fullgraph=True)
    states = [None, "off", *STATES["mixed"], *STATES["by token"]]
    with torch.no_grad():
        for again in range(2):
            with torch.compiler.set_stance("fail_on_recompile" if again else "default"):
                for state in (*states, *reversed(states)):
                    with world.open(state):
                        assert relative(compiled(world.x), world.truth(state)) < 1e-9, state
                    with world.open(state), world.open("off"):
                        assert relative(compiled(world.x), world.truth("off")) < 1e-9, state


def test_compiled_code_in_four_threads(fresh, world: World) -> None:
    compiled, states = torch.compile(world.model, backend="aot_eager", fullgraph=True), [None, "off", *STATES["mixed"]]
    for state in states:
        with world.open(state), torch.no_grad():
            compiled(world.x)
    together = threading.Barrier(4)

    def run(state: object) -> None:
        together.wait()
        for _ in range(10):
            with world.open(state), torch.no_grad():
                assert relative(compiled(world.x), world.truth(state)) < 1e-9, state

    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(run, state) for state in states]:
            result.result()


@pytest.mark.parametrize("state", ["off", [0, 1, -1, 1], BY_TOKEN], ids=["off", "mixed", "by token"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_compiled_layers_recomputed_have_the_state_of_their_forward(fresh, reentrant: bool, state: object) -> None:
    world = World(before=torch.sigmoid)
    layers = {layer: torch.compile(layer, backend="aot_eager", fullgraph=True) for layer in world.layers}
    world.model.run = lambda layer, x: checkpoint(layers[layer], torch.sigmoid(x), use_reentrant=reentrant)
    for own in (None, state, None, state):
        x = world.x.clone().requires_grad_()
        with world.open(own):
            y = world.model(x)
        world.check_gradients(y, x, own)


def test_a_context_inside_of_compiled_code(fresh) -> None:
    world = World()

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with disabled(world.model):
            off = world.model(x)
        with mixed(world.model, ["default", "fr", None, "fr"]):
            rows = world.model(x)
        return off, rows, world.model(x)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for got, state in zip(compiled(world.x), ("off", [0, 1, -1, 1], None), strict=True):
            assert relative(got, world.truth(state)) < 1e-9, state
    world.check(None)


def test_a_replica_of_data_parallel_is_of_its_request() -> None:
    world = World()
    layer = world.layers[0]
    with world.open("off"):
        replica = layer._replicate_for_data_parallel()
    assert replica.disabled and not layer.disabled and not layer._replicate_for_data_parallel().disabled
    with (
        world.open([0, 1, -1, 1]),
        pytest.raises(RuntimeError, match=r"model: expected one that is called as it is, got nn.DataParallel"),
    ):
        layer._replicate_for_data_parallel()
