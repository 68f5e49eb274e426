"""Python calls inside the package that one training step makes, a layer: what it costs the host on any machine.

Counted by sys.setprofile: functions whose file lies in lotr_ext. On the CPU, where backward runs in the calling thread.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lotr_ext
from bench.rivals.host import Chain, Siblings
from lotr_ext import LoTRConfig, LoTRFactors, LoTRLinear, apply_lotr
from lotr_ext.layers import tuning
from lotr_ext.ops import planner, tuned

PACKAGE = str(Path(lotr_ext.__file__).parent)
WIDTH, RANK = 32, 4
TOKENS = (1, 16, 160)  # the unfolded form, and the one where siblings share


@pytest.fixture(autouse=True, params=[0, 2**22], ids=["much work", "little work"])
def node_rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens take the nodes that those of wide layers do, or one each."""
    monkeypatch.setattr(planner, "LITTLE_WORK", request.param)


def on_one_pair(count: int, kind: type[Chain] = Chain) -> Chain:
    """Built by hand: no forward scope."""
    factors = LoTRFactors(WIDTH, WIDTH, RANK)
    return kind([LoTRLinear(WIDTH, WIDTH, factors=factors) for _ in range(count)])


def in_a_model(count: int, kind: type[Chain] = Chain) -> Chain:
    """By apply_lotr: one pair and a forward scope."""
    model = kind([nn.Linear(WIDTH, WIDTH) for _ in range(count)])
    return apply_lotr(model, LoTRConfig(rank=RANK, target_modules=r"layers\.\d+"))


def alone(count: int) -> Chain:
    """A pair of factors each."""
    return Chain([LoTRLinear(WIDTH, WIDTH, rank=RANK) for _ in range(count)])


def package_calls(call: Callable[[], object]) -> tuple[Counter[str], object]:
    """The package's functions that call enters, and what it returns."""
    found: Counter[str] = Counter()

    def seen(frame, event, argument) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            found[f"{code.co_filename.removeprefix(PACKAGE)}:{code.co_firstlineno} {code.co_name}"] += 1

    sys.setprofile(seen)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return found, result


def step_calls(model: nn.Module, tokens: int) -> tuple[Counter[str], Counter[str]]:
    """Of the forward and the backward of one training step, after two whose calls fill what is made once."""
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    g = torch.randn(tokens, WIDTH)
    for _ in range(2):
        model(x).backward(g)
    x.grad = None
    model.zero_grad()
    forward, y = package_calls(lambda: model(x))
    backward, _ = package_calls(lambda: y.backward(g))
    return forward, backward


def a_layer(make: Callable[[int], nn.Module], tokens: int) -> tuple[Counter[str], Counter[str]]:
    """Calls of one more layer in a stack: what 24 layers make beyond 12, so that what a step costs once is left out."""
    few, many = step_calls(make(12), tokens), step_calls(make(24), tokens)
    counters = (Counter({name: long[name] - short[name] for name in long}) for short, long in zip(few, many))
    return tuple(Counter({name: count / 12 for name, count in own.items() if count}) for own in counters)


def _calls(model: nn.Module, tokens: int) -> list[int]:
    """The package's Python calls in a training step: forward, backward."""
    return [sum(own.values()) for own in step_calls(model, tokens)]


def _opcodes(model: nn.Module, tokens: int) -> list[int]:
    """Instructions that the interpreter runs in the package's functions in a training step: forward, backward."""
    x, g = torch.randn(tokens, WIDTH, requires_grad=True), torch.randn(tokens, WIDTH)
    model(x).backward(g)
    counts: list[int] = []

    def inside(frame, event, argument):
        counts[-1] += event == "opcode"
        return inside

    def entered(frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        return inside

    def traced(call: Callable[[], object]) -> object:
        counts.append(0)
        sys.settrace(entered)
        try:
            return call()
        finally:
            sys.settrace(None)

    y = traced(lambda: model(x))
    traced(lambda: y.backward(g))
    return counts


def most_called(found: Counter[str]) -> str:
    return f"{sum(found.values()):.1f} calls a layer: " + ", ".join(f"{c:.1f} {name}" for name, c in found.most_common(40))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("make", [on_one_pair, in_a_model])
def test_chained_layers_on_a_shared_pair(make, tokens):
    forward, backward = a_layer(make, tokens)
    assert sum(forward.values()) <= 20, most_called(forward)
    assert sum(backward.values()) <= 14, most_called(backward)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("make", [on_one_pair, in_a_model])
def test_siblings_cost_no_more_than_chained_layers(make, tokens):
    forward, backward = a_layer(lambda count: make(count, Siblings), tokens)
    assert sum(forward.values()) <= 20, most_called(forward)
    assert sum(backward.values()) <= 14, most_called(backward)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_layer_alone(tokens):
    forward, backward = a_layer(alone, tokens)
    assert sum(forward.values()) <= 10, most_called(forward)
    assert sum(backward.values()) <= 8, most_called(backward)


@pytest.mark.parametrize("answered", [True, False], ids=["an answer", "no answer"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_tuned_machine_makes_the_same_calls(tokens, answered, tmp_path, monkeypatch):
    """With a file of measured answers, for the layer's problem or for another, as without one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOTR_TUNE", raising=False)
    model = on_one_pair(3)
    before = step_calls(model, tokens)
    problems = [problem for layer in model.layers for problem in tuning.problems_of(layer, tokens if answered else 4 * tokens)]
    try:
        tuned.keep({problem: tuned.Answer("two_pass", {"two_pass": 1e-6, "beta": 2e-6}) for problem in problems})
        tuned.load()  # as a later process does
        assert tuned.on
        assert ("tuned for" in lotr_ext.explain(model.layers[0], torch.randn(tokens, WIDTH)).reason) == answered
        assert step_calls(model, tokens) == before
    finally:
        monkeypatch.undo()
        tuned.load()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("count", [_calls, _opcodes], ids=["calls", "instructions"])
def test_a_layer_pays_the_same_in_a_deep_model(count, tokens):
    """The forward scope finds a layer's place without looking through the others. A loop over them makes no Python calls, so
    the instructions of the interpreter are counted too."""
    few, more, many, most = (count(in_a_model(layers), tokens) for layers in (8, 16, 112, 120))
    for direction in (0, 1):
        shallow, deep = (more[direction] - few[direction]) / 8, (most[direction] - many[direction]) / 8
        assert deep == pytest.approx(shallow, rel=0.02), ("forward", "backward")[direction]


def test_what_is_counted():
    """The counter sees the package's functions, and no others."""
    layer = LoTRLinear(WIDTH, WIDTH, rank=RANK)
    found, _ = package_calls(lambda: (layer(torch.randn(2, WIDTH)), torch.nn.functional.softmax(torch.randn(2), 0)))
    assert any(name.startswith("/layers/layer.py") and name.endswith(" forward") for name in found)
    assert sum(found.values()) >= 2
    assert package_calls(lambda: nn.Linear(2, 2)(torch.randn(1, 2)))[0] == Counter()
