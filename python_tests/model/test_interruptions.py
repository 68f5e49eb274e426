"""Ctrl-C at many points of a call that changes a model: the model is as before the call or as after it, never in between."""

from __future__ import annotations

import inspect
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import IDS, adapted, randomize, toy

import lotr_ext
from lotr_ext import (
    LoTRConfig,
    add_adapter,
    apply_lotr,
    delete_adapter,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)
from lotr_ext.layers.uninterrupted import uninterrupted
from lotr_ext.model.adapted import adapted_layers

OURS = str(Path(lotr_ext.__file__).parent)
POINTS = 25


@pytest.fixture(autouse=True)
def ctrl_c():
    """Python's own handler of SIGINT, which a shell ignores in what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def traced(call: Callable[[], object], at: int | None) -> int:
    """Calls call, with SIGINT as the at-th function of lotr_ext begins, where Python looks for signals too. Returns the number
    of functions. Generators are not counted: Python drops what is raised in one that it closes."""
    begun = 0

    def trace(frame, event: str, _) -> None:
        nonlocal begun
        if event == "call" and frame.f_code.co_filename.startswith(OURS) and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            begun += 1
            if begun == at:
                signal.raise_signal(signal.SIGINT)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return begun


def state(model: nn.Module) -> list[object]:
    """What a user sees of a model: modules, names, values, what is trained, and the output."""
    with torch.no_grad():
        y = model(IDS)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = [(name, t.requires_grad, t.detach().clone()) for name, t in sorted(tensors.items())]
    return [[(name, type(m).__name__) for name, m in model.named_modules()], values, y]


def equal(got: object, want: object) -> bool:
    if isinstance(want, torch.Tensor):
        return got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=1e-6)
    if isinstance(want, list | tuple):
        return len(got) == len(want) and all(map(equal, got, want))
    return got == want


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """An adapter with other values than the models'."""
    folder, model = tmp_path_factory.mktemp("adapter"), adapted()
    randomize(model, seed=8)
    save_adapter(model, folder)
    return folder


def with_two() -> nn.Module:
    model = set_adapter(add_adapter(adapted(), "two"), "two")
    randomize(model, seed=9)
    return set_adapter(model, "default")


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Path], object]]] = {
    "apply_lotr": (toy, lambda m, _: apply_lotr(m, LoTRConfig(rank=4, target_modules=["q", "v"]))),
    "load_adapter": (toy, load_adapter),
    "load_adapter over another": (adapted, load_adapter),
    "load_adapter beside another": (adapted, lambda m, f: load_adapter(m, f, name="two")),
    "add_adapter": (adapted, lambda m, _: add_adapter(m, "two")),
    "set_adapter": (with_two, lambda m, _: set_adapter(m, "two")),
    "delete_adapter": (with_two, lambda m, _: delete_adapter(m, "two")),
    "merge": (adapted, lambda m, _: merge(m, keep_backup=False)),
    "unload": (adapted, lambda m, _: unload(m, merge=False)),
    "unload, merged": (adapted, lambda m, _: unload(m, merge=True)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_model_is_as_before_or_as_after(name: str, saved: Path) -> None:
    make, call = CALLS[name]
    call(make(), saved)  # the first call fills caches
    model = make()
    before = state(model)
    torch.manual_seed(1)
    begun = traced(lambda: call(model, saved), None)
    after = state(model)
    assert not equal(before, after)
    found = []
    for i in range(POINTS):
        model = make()
        torch.manual_seed(1)
        with pytest.raises(KeyboardInterrupt):
            traced(partial(call, model, saved), 1 + i * begun // POINTS)
        now = state(model)
        found.append(equal(now, after))
        assert found[-1] or equal(now, before) or (name == "unload, merged" and equal(now[2], before[2])), i
    assert not found[0]
    if found[-1]:
        return
    call(model, saved)  # the same call again
    assert equal(state(model)[2], after[2])


def test_an_unmerge_can_be_called_again_wherever_it_was_interrupted() -> None:
    model = adapted()
    want = state(model)
    begun = traced(lambda: unmerge(merge(model)), None) - traced(lambda: merge(model), None)
    unmerge(model)
    for i in range(POINTS):
        merge(model)
        with pytest.raises(KeyboardInterrupt):
            traced(partial(unmerge, model), 1 + i * begun // POINTS)
        assert equal(state(model)[2], want[2]), i
        if any(layer.merged for layer in adapted_layers(model).values()):
            unmerge(model)
        assert equal(state(model), want), i


def test_a_second_ctrl_c_ends_what_takes_long() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        for step in range(3):
            steps.append(step)
            signal.raise_signal(signal.SIGINT)
    assert steps == [0, 1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    done = []

    def run() -> None:
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done[1] is signal.SIG_IGN
