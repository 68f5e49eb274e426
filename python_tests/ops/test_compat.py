"""Each private name of torch in `lotr_ext.compat` does what it is used for: what fails here says what breaks without it."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import nn
from torch.autograd import Function, forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lotr_ext import compat


class Probe(Function):
    """Calls look(ctx) in its backward."""

    @staticmethod
    def forward(ctx, x, a, look):
        ctx.save_for_backward(x, a)
        ctx.look = look
        return x * a

    @staticmethod
    def backward(ctx, g):
        ctx.look(ctx)
        return g, g, None


def backward(look, **settings) -> None:
    x, a = (torch.ones(2, requires_grad=True) * 1 for _ in range(2))
    Probe.apply(x, a, look).sum().backward(**settings)


def test_what_is_going_on_around_a_call():
    assert not compat.dispatch_modes() and not compat.functorch_active() and compat.jit_tracing() is None
    assert not compat.any_autocast() and not compat.transformed() and compat.saved_tensor_hook(False) is None
    with FlopCounterMode(display=False):
        assert compat.dispatch_modes() == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert compat.any_autocast()
    with forward_ad.dual_level():
        assert compat.transformed() and not compat.functorch_active()
    seen = []
    torch.vmap(lambda t: seen.append(compat.functorch_active() and compat.transformed()) or t)(torch.ones(2))
    torch.jit.trace(lambda t: seen.append(compat.jit_tracing() is not None) or t + 1, torch.ones(2), check_trace=False)
    assert seen == [True, True]
    pack = lambda t: t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert compat.saved_tensor_hook(False)[0] is pack


def test_batched_gradients_are_told():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = Probe.apply(x * 1, x * 1, lambda ctx: seen.append(compat.dispatch_key_included(compat.OLD_VMAP)))
    torch.autograd.grad(y, x, torch.ones(3, 2), is_grads_batched=True)
    assert seen == [True] and not compat.dispatch_key_included(compat.OLD_VMAP)


def test_a_node_runs_as_it_applies():
    class Scaled(compat.Node):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx, g):
            return g * ctx.factor, None

    x, left = torch.ones(2, requires_grad=True), []
    torch.func.grad(lambda t: left.append(t) or t.sum())(torch.ones(2))  # what a transform leaves behind
    for way in (Scaled.apply, Scaled.run):
        y = way(x, 3.0)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 3 * torch.ones(2))
        assert torch.equal(way(left[0], 3.0).detach(), 3 * torch.ones(2))
    assert type(y.grad_fn).apply is Scaled.backward  # and not the method that looks for it each time


def test_an_operator_goes_straight_to_the_dispatcher():
    t, add_, split = torch.ones(2), compat.straight(torch.ops.aten.add_.Tensor), compat.straight(torch.ops.aten.aminmax.default)
    with FlopCounterMode(display=False), torch.profiler.profile() as profiler:
        add_(t, t, alpha=2.0)
    assert torch.equal(t, torch.full((2,), 3.0)) and t._version == 1
    assert "aten::add_" in {event.name for event in profiler.events()}
    assert [float(part) for part in split(t)] == [3.0, 3.0]

    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return seen.append(func) or args[0]

    with Seen():
        assert add_(t, t) is t
    assert seen == [torch.ops.aten.add_.Tensor] and torch.equal(t, torch.full((2,), 3.0))


def test_the_running_backward():
    seen, ended = [], []
    assert compat.graph_task() < 0

    def look(ctx) -> None:
        seen.append((compat.graph_task() >= 0, compat.keeps_graph()))
        compat.at_end_of_backward(lambda: ended.append(len(seen)))

    backward(look)
    backward(look, retain_graph=True)
    assert seen == [(True, False), (True, True)] and ended == [1, 2]


@pytest.mark.skipif(not compat._LOOKS_AT_EACH, reason="torch 2.10 looks at all saved tensors together")
def test_a_saved_tensor_that_is_not_looked_at_may_have_changed():
    x, a = torch.ones(2, requires_grad=True) * 1, torch.ones(2, requires_grad=True) * 1
    found = []

    def look(ctx) -> None:
        with pytest.raises(RuntimeError, match="inplace"):
            ctx.saved_tensors  # noqa: B018
        found.extend(compat.saved_if(ctx, False, True))
        found.append((compat.wants(ctx, 0), compat.wants(ctx, 1)))
        changed, error = compat.saved_or_changed(ctx, 0)
        assert torch.equal(changed, x) and changed.requires_grad and isinstance(error, RuntimeError)
        unchanged, error = compat.saved_or_changed(ctx, 1)
        assert torch.equal(unchanged, a) and error is None

    def gradient_of_a():
        found.clear()
        y = Probe.apply(x, a, look)
        with torch.no_grad():
            x.mul_(2)
        torch.autograd.grad(y.sum(), a)
        assert found[0] is None and torch.equal(found[1], a) and found[2] == (False, True)

    gradient_of_a()
    x, a = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)  # and of leaves
    gradient_of_a()


def test_whether_backward_hooks_wrap_the_inputs_of_a_module():
    module, seen, x = nn.Identity(), [], torch.ones(2, requires_grad=True)
    module.forward = lambda t: seen.append((t is not x, compat.wraps_inputs(module))) or t * 1
    module(x)
    for register in (
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        module(x)
        handle.remove()
        module(x)
    assert seen == [(wraps, wraps) for wraps in [False] + [True, False] * 4]


def test_the_function_that_is_running():
    seen = []

    def look(x):
        seen.append(compat.running_function())
        return x * 2

    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        look(x)
    assert seen == [None]
    ys = [checkpoint(lambda t: look(look(t)), x, use_reentrant=True) for _ in range(2)]
    _, one, same, other, _ = seen
    assert one is same and one is not other and None not in seen[1:]
    seen.clear()
    sum(ys).sum().backward()  # runs them again
    assert seen == [other, other, one, one]


def test_private_writes_move_no_version_and_storages_are_told_apart():
    t = torch.ones(2)
    with compat.private_write():
        t.add_(1)
    assert t._version == 0 and torch.equal(t, torch.full((2,), 2.0))
    keys = torch._C._dispatch_keys(t)
    assert keys.has(torch._C.DispatchKey.ADInplaceOrView) and keys.has(torch._C.DispatchKey.CPU)
    below = keys & compat.below_in_place
    assert not below.has(torch._C.DispatchKey.ADInplaceOrView) and below.has(torch._C.DispatchKey.CPU)
    storage, other = t.untyped_storage(), torch.ones(2).untyped_storage()
    assert compat.same_storage(storage, t[1:].untyped_storage()) and not compat.same_storage(storage, other)


def test_tensors_without_values_are_told():
    """A layer that a compiler traces keeps its kernels: its weight is told apart from a quantised one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        made = torch.ones(2)
    assert isinstance(made, compat.FakeTensor) and isinstance(mode.from_tensor(torch.ones(2)), compat.FakeTensor)
    assert not isinstance(torch.ones(2), compat.FakeTensor) and not isinstance(torch.ones(2, device="meta"), compat.FakeTensor)


def test_the_stream_of_a_tensor():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert compat.stream_of(torch.ones(2, device="cuda")) == 0  # on any machine
    assert compat.stream_of(torch.ones(2)) == 0 and compat.stream_of(torch.ones(2, device="meta")) == 0
    if not torch.cuda.is_available():
        return
    t, side = torch.ones(2, device="cuda"), torch.cuda.Stream()
    assert compat.stream_of(t) == torch.cuda.current_stream().cuda_stream
    with torch.cuda.stream(side):
        assert compat.stream_of(t) == side.cuda_stream


def test_hooks_that_run_once_a_gradient_is_there_are_told():
    leaf = torch.ones(2, requires_grad=True)
    assert not compat.post_accumulate_hooks(leaf)
    handle = leaf.register_post_accumulate_grad_hook(lambda p: None)
    assert compat.post_accumulate_hooks(leaf)
    handle.remove()
    assert not compat.post_accumulate_hooks(leaf)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_regions_of_checkpoints_are_the_same_in_forward_and_in_backward(outer, inner):
    seen = {"inside": [], "outside": []}

    def inside(x):
        seen["inside"].append(compat.checkpoint_regions())
        return x.sin()

    def outside(x):
        seen["outside"].append(compat.checkpoint_regions())
        return checkpoint(inside, x.sin(), use_reentrant=inner).sin()

    assert not compat.checkpoint_regions()
    y = checkpoint(outside, torch.ones(2, requires_grad=True), use_reentrant=outer)
    [(around, again)], ((first, _), (second, _)) = seen["outside"][0], seen["inside"][0]
    assert not again and second is around and first is not around
    assert not any(again for _, again in seen["inside"][0])
    y.sum().backward()
    assert seen["outside"][-1] == [(around, True)]
    assert any(again and region is around for region, again in seen["inside"][1])
    assert not compat.checkpoint_regions()


def test_a_region_of_a_modules_own_checkpointing_is_seen_through_its_hooks():
    from torch.distributed._composable import checkpoint as of_module

    seen = []

    class Sine(nn.Module):
        def forward(self, x):
            seen.append(compat.checkpoint_regions())
            return x.sin()

    of_module(Sine())(torch.ones(2, requires_grad=True)).sum().backward()
    (forward,), (backward,) = seen
    assert forward[0] is backward[0] and (forward[1], backward[1]) == (False, True)


def test_what_a_thread_carries_is_seen_by_those_of_its_backwards():
    seen = []

    def within(depth):  # on a CPU the engine takes another thread for the sixty-first backward within backwards
        with torch.enable_grad():
            y = torch.ones((), requires_grad=True) * 1
        look = lambda: seen.append((threading.get_ident(), compat.carried()))  # noqa: E731
        y.register_hook(lambda _: within(depth - 1) if depth else look())
        y.backward()

    compat.carry(mine := object())
    within(70)
    compat.carry(None)
    thread, found = seen[0]
    assert thread != threading.get_ident() and found is mine
    other = threading.Thread(target=lambda: seen.append(compat.carried()))
    other.start()
    other.join()
    assert seen[1] is None


def test_dynamo_does_not_look_into_what_runs_unseen():
    class Answers(dict):
        def __missing__(self, key):
            return [sys._getframe(0).f_code.co_name, answer[0]]

    compat.run_unseen(Answers.__missing__)

    class Asked(nn.Module):
        answer = property(Answers().__getitem__)

        def forward(self, x):
            return x * self.answer[1]

    answer, asked = [2.0], Asked()
    compiled = torch.compile(asked, backend="eager", fullgraph=True)
    for answer[0] in (2.0, 3.0, 2.0):
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), answer[0]))
    torch.compiler.reset()


def test_only_the_thread_that_compiles_is_compiling():
    def found_by_another() -> bool:
        found = []
        thread = threading.Thread(target=lambda: found.append(compat.is_compiling()))
        thread.start()
        thread.join()
        return found[0]

    def asked(x):
        return x + compat.is_compiling()

    class Asked(nn.Module):
        def forward(self, x):
            seen.append(("exported", compat.is_compiling(), found_by_another()))
            return x + 1

    def backend(graph, inputs):
        seen.append(("compiled", compat.is_compiling(), found_by_another()))
        return graph

    seen, x = [], torch.zeros(2)
    assert torch.equal(torch.compile(asked, backend=backend, fullgraph=True)(x), x + 1)  # traced with the answer True
    torch.export.export(Asked(), (x,), strict=False)
    assert {("compiled", True, False), ("exported", True, False)} == {one for one in seen if one[1]}
    assert not compat.is_compiling() and torch.equal(asked(x), x)
    torch.compiler.reset()


def test_what_is_not_compiled_breaks_the_graph_and_a_constant_is_asked_once():
    asked = []

    @compat.constant_while_compiled
    def constant():
        asked.append(1)
        return 2.0

    @compat.not_compiled
    def doubled(x):
        return 2 * x

    @torch.compile(backend="eager", fullgraph=True)
    def times(x):
        return x * constant()

    @torch.compile(backend="eager")
    def both(x):
        return doubled(x) + 1

    x = torch.ones(2)
    assert torch.equal(times(x), 2 * x) and torch.equal(times(x), 2 * x) and len(asked) == 1
    assert torch.equal(both(x), 3 * x)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: doubled(x), backend="eager", fullgraph=True)(x)
    torch.compiler.reset()
