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
from states import BY_TOKEN, LAYERS, STATES, Net, World
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lotr_ext import disabled, mixed
from lotr_ext.layers import request
from lotr_ext.layers.request import NOW
from nets import relative


@pytest.fixture(params=[False, True], ids=["by name", "by index"])
def world(request: pytest.FixtureRequest) -> World:
    return World(by_index=request.param)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    if request._all or request._kept:
        gc.collect()  # what waits in a circle of references
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


def test_contexts_that_others_close_do_not_pile_up(world: World) -> None:
    """As of an abandoned generator: opened in the consumer, and closed where the generator is freed."""
    for _ in range(3):
        context = world.open("off")
        context.__enter__()
        thread = threading.Thread(target=lambda context=context: context.__exit__(None, None, None))
        thread.start()
        thread.join()
        assert len(request._opened.get()) == 1
    with world.open("off"):
        assert len(request._opened.get()) == 1
    assert not request._opened.get()


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


@pytest.mark.parametrize("kind", [*STATES])
def test_threads_beside_a_compilation_have_states_of_their_own(fresh, world: World, kind: str) -> None:
    """torch.compiler.is_compiling() is True in all threads while one compiles."""
    state, seen = STATES[kind][0], []

    def beside() -> None:
        with torch.no_grad(), world.open(state), ThreadPoolExecutor(1) as another:
            world.check(state)
            another.submit(torch.no_grad()(world.check), None).result()
        seen.append(state)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(beside).result()
        return graph

    with torch.no_grad():
        torch.compile(world.model, backend=backend, fullgraph=True)(world.x)
    assert seen == [state]


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


@torch._dynamo.config.patch(recompile_limit=16)  # each state with and without gradients; 8 by default
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_compiled_layers_recomputed_have_the_state_of_their_forward(fresh, reentrant: bool) -> None:
    world = World(before=torch.sigmoid)
    layers = {layer: torch.compile(layer, backend="aot_eager", fullgraph=True) for layer in world.layers}
    world.model.run = lambda layer, x: checkpoint(layers[layer], torch.sigmoid(x), use_reentrant=reentrant)
    states = ["off", [0, 1, -1, 1], BY_TOKEN]
    for own in (None, states[0], None, *states, *reversed(states)):
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
