"""tune: what is timed, what is kept in the user's cache folder, what a call then runs, what explain says; bad input."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lotr_ext
from lotr_ext import LoTRFactors, LoTRLinear, explain, tune
from lotr_ext.layers import tuning
from lotr_ext.ops import cuda_plans, planner, tuned
from lotr_ext.ops.tuned import Answer

TOKENS = 160


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache folder of its own for each test, whose answers count."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOTR_TUNE")
    tuned.load()
    yield tmp_path / "lotr_ext" / "tuned.json"
    monkeypatch.undo()
    tuned.ask = None
    tuned.load()
    assert not tuned.on


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuned.Problem]:
    """Instead of a clock: two_pass always wins. The problems that were timed."""
    seen = []

    def measure(problem: tuned.Problem) -> Answer:
        seen.append(problem)
        return Answer("two_pass", {"two_pass": 1e-6, "beta": 2e-6})

    monkeypatch.setattr(tuning, "measure", measure)
    return seen


def layers() -> nn.Sequential:
    factors = LoTRFactors(24, 24, 3)
    return nn.Sequential(LoTRLinear(24, 24, factors=factors), LoTRLinear(24, 24, factors=factors), LoTRLinear(24, 40, 5))


def other_process(code: str, **environment: str) -> str:
    """What code prints in a process of its own, where no work is little."""
    start = "import torch; torch.set_num_threads(1); import lotr_ext; lotr_ext.ops.planner.LITTLE_WORK = 0"
    command = [sys.executable, "-c", f"{start}; {code}"]
    place = {"PYTHONPATH": str(Path(lotr_ext.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **place, **environment})
    return done.stdout


def test_by_the_clock(cache: Path) -> None:
    """For real: both strategies are timed for every form of call, and a call takes what was found."""
    model = layers()
    state = torch.get_rng_state()
    found = tune(model, [3, TOKENS])
    assert torch.equal(torch.get_rng_state(), state)
    assert {(p.form, p.step, p.tokens, p.n) for p in found} == {
        (form, step, tokens, n)
        for step in (True, False)
        for form, tokens, n in [
            *(("unfolded", 3, n) for n in (24, 40)),
            *(("siblings", TOKENS, 24), ("alone", TOKENS, 40)),
        ]
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


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"format": 2, "answers": []}',
        b'{"format": 1, "answers": [3]}',
        b"[" * 99999,
    ],
)
def test_a_file_that_is_not_ours(timed, cache: Path, content: bytes) -> None:
    """Counts as empty, and is written anew."""
    cache.parent.mkdir()
    cache.write_bytes(content)
    with pytest.warns(UserWarning, match="expected answers of lotr_ext.tune"):
        tuned.load()
    assert not tuned.on
    tune(layers(), TOKENS)
    assert len(timed) == 4 and len(tuned.read(cache)) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "fastest"},
        {"strategy": "beta", "seconds": {"two_pass": 1e-6}},
        {"seconds": {"two_pass": -1.0}},
        {"seconds": {"two_pass": 1e-6, "magic": 1e-6}},
        {"tokens": "160"},
        {"step": 1},
    ],
)
def test_answers_that_cannot_be_true(timed, cache: Path, wrong: dict) -> None:
    tune(layers(), TOKENS)
    content = json.loads(cache.read_text())
    content["answers"][0].update(wrong)
    cache.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="got 1 that cannot be ones"):
        assert len(tuned.read(cache)) == 3


def test_written_at_once_and_beside_others(timed, cache: Path, monkeypatch) -> None:
    tune(LoTRLinear(24, 24, 3), TOKENS)
    theirs = cache.read_text()
    cache.unlink()
    tuned.load()
    tune(LoTRLinear(24, 40, 3), TOKENS)
    cache.write_text(theirs)  # another process has replaced it
    tune(LoTRLinear(24, 56, 3), TOKENS)
    assert {key.n for key in tuned.read(cache)} == {24, 56}
    before = cache.read_bytes()

    def fails(*args):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=r"tuned\.json"):
        tune(LoTRLinear(24, 72, 3), TOKENS)
    assert cache.read_bytes() == before and [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("there", [True, False], ids=["a FIFO in the file's place", "no home"])
def test_an_import_opens_no_file_of_answers_and_needs_no_home(tmp_path: Path, there: bool) -> None:
    """The first call looks, and runs what it would run without."""
    path = tmp_path / "lotr_ext" / "tuned.json"
    path.parent.mkdir()
    os.mkfifo(path)
    code = """
import os, pwd, sys, torch

def no_entry(uid):
    raise KeyError(uid)

opened, pwd.getpwuid = [], no_entry

def hook(event, args):
    if event == "open" and str(args[0]).endswith("tuned.json"):
        opened.append(args[0])

sys.addaudithook(hook)
import lotr_ext
assert not opened
lotr_ext.LoTRLinear(24, 40, 5)(torch.randn(160, 24))
assert bool(opened) == ("XDG_CACHE_HOME" in os.environ)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": str(Path(lotr_ext.__file__).parents[1])} | (
        {"XDG_CACHE_HOME": str(tmp_path)} if there else {}
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("expected answers of lotr_ext.tune") == there


def test_without_a_home_answers_are_kept_for_the_process_alone(timed, monkeypatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an entry in passwd
    tuned.load()
    layer = LoTRLinear(24, 40, 5)
    with pytest.raises(OSError, match="expected a home directory or XDG_CACHE_HOME"):
        tune(layer, TOKENS)
    assert "kept in this process alone" in explain(layer, torch.randn(TOKENS, 24)).reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "fused", "seconds": {"fused": 1e-6, "beta": 2e-6}},
        {"strategy": "composite", "seconds": {"composite": 1e-6}},
        {"seconds": {"two_pass": 10**400}},
        {"seconds": {"two_pass": float("inf")}},
        {"seconds": {"two_pass": True}},
        {"seconds": {"two_pass": [1e-6]}},
        {"seconds": ["two_pass"]},
        {"strategy": ["two_pass"]},
        {"strategy": None, "seconds": None},
    ],
    ids=str,
)
def test_an_answer_that_cannot_be_true_is_ignored_with_one_warning(timed, cache: Path, wrong: dict) -> None:
    layers = [LoTRLinear(24, 40, 5), LoTRLinear(24, 48, 5)]
    x = torch.randn(TOKENS, 24)
    want = [layer(x) for layer in layers]
    for layer in layers:
        tune(layer, TOKENS)
    content = json.loads(cache.read_text())
    for answer in content["answers"]:
        answer.update(wrong)
    cache.write_text(json.dumps(content))
    tuned._warned.clear()
    with pytest.warns(UserWarning, match="expected an") as warned:
        tuned.load()
        for layer, y in zip(layers, want):
            for _ in range(2):
                assert torch.equal(layer(x), y) and "tuned" not in explain(layer, x).reason
    assert len(warned) == 1


def test_interrupted(timed, monkeypatch, cache: Path) -> None:
    """What was timed so far is kept."""
    measure, count = tuning.measure, iter(range(9))

    def stops(problem):
        if next(count) == 2:
            raise KeyboardInterrupt
        return measure(problem)

    monkeypatch.setattr(tuning, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        tune(layers(), TOKENS)
    assert len(tuned.read(cache)) == 2


# ---- choices ---------------------------------------------------------------------------------------------------------


def test_choose() -> None:
    """The usual strategy, unless another is 2 % faster; the fused one, than beta too."""
    assert tuned.choose({"two_pass": 0.99, "beta": 1.0}, "beta") == "beta"
    assert tuned.choose({"two_pass": 0.97, "beta": 1.0}, "beta") == "two_pass"
    assert tuned.choose({"two_pass": 1.0, "beta": 0.5}, "two_pass") == "beta"
    assert tuned.choose({"two_pass": 2.0, "beta": 1.0, "fused": 0.99}, "beta") == "beta"
    assert tuned.choose({"two_pass": 2.0, "beta": 1.0, "fused": 0.97}, "beta") == "fused"
    assert tuned.choose({"two_pass": 2.0, "beta": 1.0, "fused": 0.99}, "two_pass") == "two_pass"


def test_rounded() -> None:
    sizes = [tuned.rounded(m) for m in range(1, 5000)]
    assert sizes == sorted(sizes) and all(m <= size < 1.25 * m + 1 for m, size in enumerate(sizes, 1))
    assert all(tuned.rounded(1 << i) == 1 << i for i in range(20)) and len({s for s in sizes if 1024 <= s < 2048}) == 4
    assert tuned.rounded(0) == 0


def test_interleaved_medians(monkeypatch) -> None:
    """A sample that was disturbed does not decide."""
    clock = {"two_pass": iter([1.0, *[1.0, 9.0, 1.0, 9.0, 1.0]]), "beta": iter([1.0, *[2.0] * 5])}
    monkeypatch.setattr(tuning, "run_of", lambda problem, name: lambda name=name: name)
    monkeypatch.setattr(tuning, "_seconds", lambda device, run, repeats: next(clock[run()]))
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    problem = tuned.Problem(torch.device("cpu"), torch.float32, torch.float32, 8, 8, 8, 2, 2, "alone", True, "beta")
    assert tuning.measure(problem) == Answer("two_pass", {"two_pass": 1.0, "beta": 2.0})


# ---- plans of the CUDA kernels, on a card that is told of ----------------------------------------------------------------

CUDA = torch.device("cuda", 0)
with_kernels = pytest.mark.skipif(cuda_plans.obstacle() is not None, reason="built without CUDA kernels")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """An H100 whose clock says for each plan what the test puts here, by a part of its text; 1 us else."""
    took: dict[str, float] = {}
    listed, forced = cuda_plans.plans, []

    def seconds(device: torch.device, run, repeats: int) -> float:
        plan = listed(run(), torch.bfloat16)[0].plan
        forced.append(plan)
        return next((time for part, time in took.items() if part in plan), 1e-6)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(tuned, "machine", lambda device: ("NVIDIA H100", "580"))
    monkeypatch.setattr(cuda_plans, "plans", lambda launch, dtype, device=None, card="h100": listed(launch, dtype))
    monkeypatch.setattr(planner, "fused_obstacle", lambda *arguments: "none here")
    run_of = tuning.run_of
    monkeypatch.setattr(
        tuning, "run_of", lambda problem, name: (lambda: problem.launch) if problem.launch else run_of(problem, name)
    )
    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    return took


def launch_problem(kernel: str = "factor_grad") -> tuned.Problem:
    launch = cuda_plans.Launch(kernel, 8192, 14336, 64)
    return tuned.Problem.of_launch(CUDA, torch.bfloat16, launch, cuda_plans.plans(launch, torch.bfloat16)[0].plan)


@with_kernels
def test_the_fastest_plan_is_taken_here_and_by_later_processes(card, cache: Path) -> None:
    problem = launch_problem()
    first, second, third = [plan.plan for plan in cuda_plans.plans(problem.launch, torch.bfloat16)[:3]]
    card[third] = 0.9e-6
    answer = tuning._answers([problem], False)[problem]
    assert answer == Answer(third, {first: 1e-6, second: 1e-6, third: 0.9e-6})

    def takes(m: int = 8192, kernel: str = "factor_grad") -> str:
        return cuda_plans.plans(cuda_plans.Launch(kernel, m, 14336, 64), torch.bfloat16)[0].plan

    assert takes() == third
    tuned.load()
    assert takes() == third  # from the file
    with cuda_plans.forced(f"factor_grad {second}"):
        assert takes() == second
    row = json.loads(cache.read_text())["answers"][0]
    assert (row["form"], row["tokens"], row["k"], row["r_in"], row["machine"]) == (
        "factor_grad",
        8192,
        14336,
        64,
        "NVIDIA H100",
    )
    cache.write_text(cache.read_text().replace("NVIDIA H100", "another card"))
    tuned.load()
    assert takes() == first


@with_kernels
def test_a_plan_must_be_2_percent_faster_than_the_estimate_s(card) -> None:
    problem = launch_problem("shrink")
    card[cuda_plans.plans(problem.launch, torch.bfloat16)[1].plan] = 0.99e-6
    assert tuning._answers([problem], False)[problem].strategy == problem.usual


@with_kernels
@pytest.mark.parametrize("wrong", ["fastest", "fast=1", "rows=1; shrink rows=2", "rows=-1", ""])
def test_a_plan_that_cannot_be_one_is_ignored(card, cache: Path, wrong: str) -> None:
    problem = launch_problem()
    tuning._answers([problem], False)
    content = json.loads(cache.read_text())
    content["answers"][0] |= {"strategy": wrong, "seconds": {wrong: 1e-6}} | ({} if wrong else {"tokens": -1})
    cache.write_text(json.dumps(content))
    tuned._warned.clear()
    with pytest.warns(UserWarning, match="got 1 that cannot be ones"):
        tuned.load()
    assert cuda_plans.plans(problem.launch, torch.bfloat16)[0].plan == problem.usual


@with_kernels
def test_the_launches_of_a_layer_are_timed_before_it(card, monkeypatch) -> None:
    """Those of both directions, once each; none on a CPU."""
    layer = tuned.Problem(CUDA, torch.bfloat16, torch.float32, 2048, 4096, 14336, 16, 16, "siblings", True, "beta")
    seen: list[str] = []
    monkeypatch.setattr(
        tuning, "measure", lambda problem: seen.append(problem.form) or Answer(problem.usual, {problem.usual: 1.0})
    )
    tuning._answers([layer, layer._replace(step=False)], False)
    assert seen == ["shrink", "expand_add", "shrink_grad", "factor_grad", "expand_add", "siblings", "siblings"]
    assert tuning.launches_of(layer._replace(device=torch.device("cpu"))) == []


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
