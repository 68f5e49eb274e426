"""Each mending is taken back, or an operator made to do as it once did, and the generator finds the fault again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("hypothesis")

from programs import once_wrong, our_world, running
from programs.checking import check
from programs.script import compiled

import lotr_ext
from lotr_ext import ops
from lotr_ext.autograd import bank
from lotr_ext.layers import gradient, request
from lotr_ext.model.tasks import TaskBank

Patch = pytest.MonkeyPatch


class OneForAll:
    """In the place of a ContextVar: all threads have the same value."""

    value: tuple = ()

    def get(self) -> tuple:
        return self.value

    def set(self, value: tuple) -> None:
        self.value = value


def contexts_of_all_threads(patch: Patch) -> None:
    patch.setattr(request, "_opened", OneForAll())


def leaving_one_context_leaves_all(patch: Patch) -> None:
    mixed, left = lotr_ext.mixed, []

    @contextmanager
    def forgetful(model: nn.Module, names: Sequence[str | None] | Tensor) -> Iterator[None]:
        own = ExitStack()
        own.enter_context(mixed(model, names))
        left.append(own)
        try:
            yield
        finally:
            while left:
                left.pop().close()

    patch.setattr(lotr_ext, "mixed", forgetful)


def a_recomputation_has_no_contexts(patch: Patch) -> None:
    patch.setattr(request, "checkpoint_regions", list)


def one_scaling_for_all_layers(patch: Patch) -> None:
    mixtures = TaskBank.mixtures

    def first(self: TaskBank, *arguments: object) -> list:
        found = mixtures(self, *arguments)
        return [mixture._replace(scaling=found[0].scaling) for mixture in found]

    patch.setattr(TaskBank, "mixtures", first)


def rows_of_no_expert_are_read(patch: Patch) -> None:
    """All rows of x come into A's gradient, times zero where they are no expert's."""
    forward = lotr_ext.LoTRExperts.forward

    def reading(self: nn.Module, x: Tensor, *routing: Tensor, **tokens: Tensor) -> Tensor:
        return forward(self, x, *routing, **tokens) + 0 * (x.detach() @ self.factors.A.to(x.dtype)).sum()

    patch.setattr(lotr_ext.LoTRExperts, "forward", reading)


def a_start_leaves_traces(patch: Patch) -> None:
    patch.setattr(gradient, "untouched", lambda model: nullcontext())


def random_cores_are_made_at_once(patch: Patch) -> None:
    patch.setattr(bank, "_generators", lambda tensors: [])


def cores_go_by_versions(patch: Patch) -> None:
    patch.setattr(
        bank.Made, "is_of", lambda self, cores: bank._versions((*cores.parameters(), *cores.buffers())) == self.versions
    )


def an_interrupted_forward_leaves_its_scope(patch: Patch) -> None:
    start, running_frame = bank.Scope.__init__, sys._getframe(2)  # of the test, which runs as long as the programs
    patch.setattr(bank.Scope, "__init__", lambda self, model, layers, frame: start(self, model, layers, running_frame))
    patch.setattr(bank._open, "stack", [])


def bits_go_by_threads(patch: Patch) -> None:
    row_core = ops.row_core
    patch.setattr(ops, "row_core", lambda *t, **how: row_core(*t, **how) * (1 + 1e-6 * (torch.get_num_threads() > 1)))


def operators_refuse_nothing(patch: Patch) -> None:
    call = our_world.call_operator

    def calling(*arguments: object, **settings: object) -> object:
        try:
            return call(*arguments, **settings)
        except RuntimeError:
            return torch.empty(3)

    patch.setattr(our_world, "call_operator", calling)


# what is taken back, and what some of the programs that show it are called
FAULTS: dict[Callable[[Patch], None], str] = {
    contexts_of_all_threads: "contexts in threads, tasks",
    leaving_one_context_leaves_all: "a context in another one",
    a_recomputation_has_no_contexts: "a recomputation after its context",
    one_scaling_for_all_layers: "tasks of layers with scalings of their own",
    rows_of_no_expert_are_read: "experts: rows of no expert",
    a_start_leaves_traces: "a start from the gradient that is interrupted",
    random_cores_are_made_at_once: "random cores in a checkpoint, reentrant False",
    cores_go_by_versions: "a parameter of all cores set in the model's forward",
    an_interrupted_forward_leaves_its_scope: "a forward ended by PlannedInterrupt",
    bits_go_by_threads: "other bits at two threads, 1",
    operators_refuse_nothing: "row_core: an argument on the meta device",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_was_mended_and_is_taken_back_is_found(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    name = FAULTS[fault]
    assert check(compiled(once_wrong.source(name)), once_wrong.dtype(name)) is not None


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_400_programs_find_what_is_taken_back(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    assert any(running.run_batch(batch).faults for batch in running.batches(400, 0))
