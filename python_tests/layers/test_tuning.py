"""tune: what is timed, what a call then runs, what explain says; bad input."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from tuning_cases import TOKENS, layers, other_process

from lotr_ext import LoTRLinear, explain, tune
from lotr_ext.layers import tuning
from lotr_ext.ops import planner, tuned
from lotr_ext.ops.tuned import Answer

pytestmark = pytest.mark.usefixtures("cache")


def test_by_the_clock(cache: Path) -> None:
    """For real: both strategies are timed for every form of call, and a call takes what was found."""
    model = layers()
    state = torch.get_rng_state()
    found = tune(model, [3, TOKENS])
    assert torch.equal(torch.get_rng_state(), state)
    assert {(p.form, p.step, p.tokens, p.n) for p in found} == {
        (form, step, tokens, n)
        for step in (True, False)
        for form, tokens, n in [*(("unfolded", 3, n) for n in (24, 40)), *(("siblings", TOKENS, 24), ("alone", TOKENS, 40))]
    }
    for problem, answer in found.items():
        assert set(answer.seconds) == {"two_pass", "beta"} and min(answer.seconds.values()) > 0
        assert problem.usual == "beta" and answer.strategy == tuned.choose(answer.seconds, "beta")
    x = torch.randn(2, TOKENS // 2, 24)
    told = explain(model[2], x)
    answer = next(a for p, a in found.items() if p.n == 40 and p.tokens == TOKENS and p.step)
    assert told.strategy == answer.strategy and told.nodes == 1
    assert f"tuned for {TOKENS} x 24 x 40, r 5, float32, alone" in told.reason and str(cache) in told.reason
    code = "print(lotr_ext.explain(lotr_ext.LoTRLinear(24, 40, 5), torch.randn(160, 24)).reason)"
    assert other_process(code).strip() == told.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_answer_is_what_runs(timed, monkeypatch, dtype) -> None:
    """The operators of both directions are told the strategy of the answer; results differ by rounding alone."""
    model = nn.Sequential(LoTRLinear(24, 40, 5), LoTRLinear(40, 24, 4)).to(dtype)
    for layer in model:
        nn.init.normal_(layer.core)
    x = torch.randn(TOKENS, 24, dtype=dtype, requires_grad=True)

    def step() -> list[torch.Tensor]:
        y = model(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *[p for p in model.parameters() if p.requires_grad]])]

    monkeypatch.setattr(planner, "LOTR_STRATEGY", "beta")
    before = step()
    monkeypatch.setattr(planner, "LOTR_STRATEGY", None)
    tune(model, TOKENS)
    told = []
    for name in ("layer_forward", "layer_backward"):
        run = getattr(tuning.ops, name)
        flag = 7 if name == "layer_forward" else 9
        monkeypatch.setattr(tuning.ops, name, lambda *a, run=run, flag=flag, **k: told.append(a[flag]) or run(*a, **k))
    after = step()
    assert told == [planner.ORDERS["two_pass"]] * 4
    for one, other in zip(before, after):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(one.detach().abs().max()))


def test_known_answers_are_not_timed_again(timed, cache: Path) -> None:
    model = layers()
    first = tune(model, TOKENS)
    assert len(timed) == 4 and tune(model, TOKENS) == first and len(timed) == 4
    tuned.load()
    assert tune(model, TOKENS) == first and len(timed) == 4  # from the file
    assert tune(model, TOKENS, again=True) == first and len(timed) == 8
    rows = json.loads(cache.read_text())["answers"]
    assert len(rows) == 4 and rows[0]["strategy"] == "two_pass" and rows[0]["setting"] == "threads 1"


def test_what_an_answer_is_for(timed, monkeypatch) -> None:
    """Another size, dtype, form, number of threads or a call without gradients is another question."""
    layer = LoTRLinear(24, 40, 5)
    tune(layer, TOKENS)
    x = torch.randn(TOKENS, 24)
    assert "tuned" in explain(layer, x).reason
    assert "tuned" in explain(layer, x[:130]).reason  # up to the next of four sizes an octave
    assert "tuned" not in explain(layer, x[:128]).reason
    assert "tuned" not in explain(layer.bfloat16(), x.bfloat16()).reason
    layer.float()
    torch.set_num_threads(2)
    try:
        assert "tuned" not in explain(layer, x).reason
    finally:
        torch.set_num_threads(1)
    for forced in ("composite", "beta"):
        layer.strategy = forced
        assert explain(layer, x).strategy == forced and "forced" in explain(layer, x).reason
    layer.strategy = None
    with monkeypatch.context() as forcing:
        forcing.setattr(planner, "LOTR_STRATEGY", "beta")
        assert explain(layer, x).reason == "forced by LOTR_STRATEGY"
    monkeypatch.setenv("LOTR_TUNE", "0")
    tuned.load()
    assert "tuned" not in explain(layer, x).reason


def test_autocast_and_wide_factors_have_answers_of_their_own(timed) -> None:
    layer = LoTRLinear(24, 40, 5)
    with torch.autocast("cpu", torch.bfloat16):
        tune(layer, TOKENS)
        assert "tuned" in explain(layer, torch.randn(TOKENS, 24)).reason
    assert "tuned" not in explain(layer, torch.randn(TOKENS, 24)).reason
    assert {(p.dtype, p.factors) for p in timed} == {(torch.bfloat16, torch.float32)}


def test_costs_nothing_where_nothing_was_tuned(monkeypatch) -> None:
    monkeypatch.setattr(tuned, "apply", None)
    LoTRLinear(24, 40, 5)(torch.randn(TOKENS, 24))


def test_at_first_use(timed) -> None:
    tuned.ask = tuning._at_first_use
    tuned.load()
    layer, x = LoTRLinear(24, 40, 5), torch.randn(TOKENS, 24)
    assert "tuned" not in explain(layer, x).reason and not timed  # which computes nothing
    torch.compile(layer, backend="eager")(x)
    assert not timed
    for _ in range(2):
        layer(x).sum().backward()
    assert [p.step for p in timed] == [True] and "tuned" in explain(layer, x).reason
    with torch.no_grad():
        layer(x)
        layer(x[:0])
    assert [p.step for p in timed] == [True, False]


def test_at_first_use_of_a_process(cache: Path) -> None:
    code = "l = lotr_ext.LoTRLinear(24, 40, 5); x = torch.randn(160, 24); l(x); print(lotr_ext.explain(l, x).reason)"
    assert "tuned for 160 x 24 x 40" in other_process(code, LOTR_TUNE="1") and cache.exists()


def test_no_memory_and_no_folder_at_first_use(cache: Path, monkeypatch) -> None:
    def full(problem):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tuning, "measure", full)
    tuned.ask = tuning._at_first_use
    tuned.load()
    layer, x = LoTRLinear(24, 40, 5), torch.randn(TOKENS, 24)
    with pytest.warns(UserWarning, match="no memory to time 160 x 24 x 40.*: beta is taken"):
        layer(x)
    layer(x)  # and not again
    monkeypatch.setattr(tuning, "measure", lambda problem: Answer("beta", {"two_pass": 2e-6, "beta": 1e-6}))
    cache.parent.write_text("a file where the folder should be")
    with torch.no_grad(), pytest.warns(UserWarning, match="cannot be kept in"):
        layer(x)
    with torch.no_grad():
        assert "tuned" in explain(layer, x).reason


def test_not_under_capture_or_compile(timed, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    problem = tuned.Problem(torch.device("cuda", 0), torch.bfloat16, torch.float32, 1024, 64, 64, 8, 8, "alone", True, "beta")
    tuning._at_first_use(problem)
    with pytest.raises(RuntimeError, match="expected a plain call, got one while a CUDA graph is captured"):
        tune(layers(), TOKENS)
    assert not timed


def test_a_bar_on_a_terminal(timed, monkeypatch) -> None:
    """What is being timed and how far it is; gone at the end. Nothing where standard error is no terminal."""
    seen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", seen)
    tune(layers(), TOKENS, again=True)
    assert seen.getvalue() == ""
    monkeypatch.setattr(seen, "isatty", lambda: True)
    tune(layers(), TOKENS, again=True)
    *shown, last = seen.getvalue().split("\r")[1:]
    assert [line.split(" ", 4)[2:4] for line in shown] == [[f"{i}/4", f"[{'#' * 5 * i}{'.' * (20 - 5 * i)}]"] for i in range(4)]
    assert [line.split("] ")[1] for line in shown] == [f"{problem}\x1b[K" for problem in timed[4:]]
    assert last == "\x1b[K"


def test_bad_input(timed, monkeypatch) -> None:
    for model, error, text in [(3, TypeError, "model: expected an nn.Module"), (nn.Linear(2, 2), ValueError, "adapted layers")]:
        with pytest.raises(error, match=text):
            tune(model, 4)
    for tokens, error, text in [(0, ValueError, "1 or more, got 0"), (True, TypeError, "bool"), ([4, 2.5], TypeError, "float")]:
        with pytest.raises(error, match=f"tokens: expected.*{text}"):
            tune(layers(), tokens)
    with monkeypatch.context() as wrong, pytest.warns(UserWarning, match="LOTR_TUNE: expected 0 or 1, got 'yes'"):
        wrong.setenv("LOTR_TUNE", "yes")
        tuned.load()
    monkeypatch.setattr(planner, "LOTR_STRATEGY", "beta")
    with pytest.raises(ValueError, match="LOTR_STRATEGY: expected none"):
        tune(layers(), 4)
    assert not timed and planner.LOTR_STRATEGY == "beta"
