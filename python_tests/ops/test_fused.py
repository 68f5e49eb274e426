"""The fused strategy without a GPU: what is planned, what is refused and by which name, what stays with beta, and that the
nodes of a layer run it (on meta tensors that look like CUDA's). The numbers: python_tests/kernels, python_tests/cuda."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.measure.as_cuda import as_cuda
from lotr_ext import LoTRFactors, LoTRLinear, explain, lotr_linear
from lotr_ext.layers import tuning
from lotr_ext.ops import planner, tuned

TOKENS, K, N, R = 256, 64, 48, 8


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that can: tensors on what it yields look like its own. hopper.refusal: what the operator says of the operands."""
    monkeypatch.setattr(torch.ops.lotr, "gemm_lotr", None, raising=False)  # of a build for 90a
    said = SimpleNamespace(refusal="")
    monkeypatch.setattr(torch.ops.lotr, "gemm_lotr_refusal", lambda x, weight, r, backward: said.refusal, raising=False)
    with as_cuda() as device:
        said.device = device
        yield said


def layer_on(device, *, shared: bool = False, dtype=torch.bfloat16, **options) -> LoTRLinear:
    factors = LoTRFactors(K, N, R, device=device, dtype=torch.float32)
    layer = LoTRLinear(K, N, factors=factors, device=device, dtype=dtype, **options)
    layer.other = LoTRLinear(K, N, factors=factors, device=device, dtype=dtype) if shared else None
    layer.strategy = "fused"
    return layer


def x_on(device, tokens: int = TOKENS, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(tokens, K, device=device, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("shared", [False, True])
def test_forced(hopper, shared) -> None:
    """One node, with factors of its own or shared; both directions run."""
    layer, x = layer_on(hopper.device, shared=shared), x_on(hopper.device)
    told = explain(layer, x)
    assert (told.strategy, told.nodes, told.order, told.unfolded) == ("fused", 1, 2, False) and "inside" in str(told)
    y = layer(x)
    assert y.shape == (TOKENS, N) and "LoTRFunction" in str(y.grad_fn)
    y.backward(gradient=torch.empty_like(y))
    assert x.grad.shape == x.shape and all(p.grad.shape == p.shape for p in (layer.factors.A, layer.factors.B, layer.core))


def test_by_the_environment(hopper, monkeypatch) -> None:
    layer = layer_on(hopper.device)
    layer.strategy = None
    monkeypatch.setattr(planner, "LOTR_STRATEGY", "fused")
    assert explain(layer, x_on(hopper.device)).reason == "forced by LOTR_STRATEGY"


def test_what_is_switched_off_is_refused_and_told(hopper, monkeypatch) -> None:
    """LOTR_CUDA_WITHOUT=fused or wgmma; other words are told with the strategy that runs."""
    layer, x = layer_on(hopper.device), x_on(hopper.device)
    for word in ("fused", "wgmma"):
        monkeypatch.setattr(planner, "CUDA_WITHOUT", (word,))
        planner.plan_of.cache_clear()
        with pytest.raises(ValueError, match=f"LOTR_CUDA_WITHOUT: .* got {word}"):
            explain(layer, x)
    monkeypatch.setattr(planner, "CUDA_WITHOUT", ("early", "cluster"))
    planner.plan_of.cache_clear()
    assert explain(layer, x).reason == "forced by strategy; LOTR_CUDA_WITHOUT=early,cluster"
    planner.plan_of.cache_clear()


def test_never_by_the_heuristic(hopper) -> None:
    layer = layer_on(hopper.device)
    layer.strategy = None
    for tokens in (8, 256, 8192):
        assert explain(layer, x_on(hopper.device, tokens)).strategy != "fused"


def test_what_stays_with_beta(hopper) -> None:
    """And explain says why, whether it was forced or tuned."""
    x = x_on(hopper.device)
    frozen = layer_on(hopper.device)
    frozen.factors.A.requires_grad_(False)
    cases = [
        (layer_on(hopper.device, dropout=0.1), x, "dropout"),
        (layer_on(hopper.device), x_on(hopper.device, 100), "few tokens"),
        (layer_on(hopper.device, dtype=torch.float16), x_on(hopper.device, dtype=torch.float16), "unfolded"),
        (frozen, x, "A is frozen"),
    ]
    for layer, x, word in cases:
        told = explain(layer, x)
        assert told.strategy == "beta" and told.order == 1
        assert told.reason.startswith("instead of fused, forced by strategy: ") and word in told.reason
        assert layer(x).shape[-1] == N


REFUSAL = "x: expected a row stride that is a multiple of 8 and at least 64, got 68"


def test_refused_by_name_where_it_is_forced(hopper) -> None:
    hopper.refusal = REFUSAL
    layer, x = layer_on(hopper.device), x_on(hopper.device)
    for call in (lambda: explain(layer, x), lambda: layer(x)):
        with pytest.raises(ValueError, match=f"strategy: expected a strategy that runs here, got 'fused': {REFUSAL}"):
            call()
    hopper.refusal = ""
    odd = LoTRLinear(K, 44, R, device=hopper.device, dtype=torch.bfloat16)
    odd.strategy = "fused"
    with pytest.raises(ValueError, match="g: expected rows of a multiple of 8 elements, got 44"):
        odd(x)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"capability": (8, 0)}, "device: expected compute capability 9.0, got 8.0"),
        ({"capability": (10, 0)}, "device: expected compute capability 9.0, got 10.0"),
        ({"dtype": torch.float32}, "dtype: expected float16 or bfloat16, got float32"),
        ({"rank": 129}, "rank: expected at most 128, got 129"),
        ({"built": False}, "build: expected code for 90a"),
    ],
)
def test_where_it_cannot_be(monkeypatch, change, text) -> None:
    if change.get("built", True):
        monkeypatch.setattr(torch.ops.lotr, "gemm_lotr", None, raising=False)
    elif hasattr(torch.ops.lotr, "gemm_lotr"):
        pytest.skip("this build has it")
    with as_cuda(change.get("capability", (9, 0))):
        arguments = (TOKENS, change.get("rank", 8), change.get("dtype", torch.bfloat16), torch.device("cuda", 0), "fused")
        with pytest.raises(ValueError, match=f"strategy: expected a strategy that runs here, got 'fused': {text}"):
            planner.plan(*arguments)


def test_on_a_cpu(monkeypatch) -> None:
    layer, x = LoTRLinear(K, N, R), torch.randn(TOKENS, K)
    text = "expected a strategy that runs here, got 'fused': device: expected CUDA of compute capability 9.0, got cpu"
    monkeypatch.setattr(planner, "LOTR_STRATEGY", "fused")
    with pytest.raises(ValueError, match=f"LOTR_STRATEGY: {text}"):
        layer(x)
    monkeypatch.setattr(planner, "LOTR_STRATEGY", None)
    A, B, core = torch.randn(K, R), torch.randn(N, R), torch.randn(R, R)
    with pytest.raises(ValueError, match=f"^strategy: {text}"):
        lotr_linear(x, layer.weight, None, A, B, core, 1.0, strategy="fused")
    for order, name in ((2, "2 \\(fused\\)"), (3, "3"), (-1, "-1")):
        with pytest.raises(RuntimeError, match=rf"lotr::layer_forward: strategy: expected 0 .* or 1 .* on a CPU, got {name}"):
            torch.ops.lotr.layer_forward(x, layer.weight.detach(), None, A, B, core, 1.0, order)
        with pytest.raises(RuntimeError, match=rf"lotr::layer_backward_: strategy: expected 0 .* or 1 .* on a CPU, got {name}"):
            factors = (None, None, None, None, torch.randn(N, R), B, core, 1.0, order)
            torch.ops.lotr.layer_backward_(torch.randn(5, N), *factors, *[None] * 5, False, False)


def test_tuned(hopper, monkeypatch, tmp_path) -> None:
    """Where the tuner has found it faster it runs; where it is refused now, beta does, and says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuned, "machine", lambda device: ("a card", "a driver"))
    layer, x = layer_on(hopper.device, shared=True), x_on(hopper.device)
    layer.strategy = None
    faster = tuned.Answer("fused", {"two_pass": 3e-3, "beta": 2e-3, "fused": 1e-3})
    monkeypatch.setattr(tuning, "measure", lambda problem: faster)
    try:
        problem = next(tuning.problems_of(layer, TOKENS))
        assert (problem.form, problem.step, problem.usual) == ("siblings", True, "two_pass")
        tuned.keep({problem: faster})
        told = explain(layer, x)
        assert told.strategy == "fused" and told.nodes == 1 and "tuned for 256 x 64 x 48" in told.reason
        assert "fused 1000 us" in told.reason and "a card" in told.reason
        hopper.refusal = REFUSAL
        told = explain(layer, x)
        assert told.strategy == "beta" and told.nodes == 2 and told.reason.endswith(REFUSAL)
        assert layer(x).shape == (TOKENS, N)
    finally:
        monkeypatch.undo()
        tuned.load()


def test_candidates(hopper) -> None:
    """The tuner times it wherever it could run, for siblings against operators to which u comes for nothing."""
    cuda = torch.device("cuda", 0)
    problem = tuned.Problem(cuda, torch.bfloat16, torch.float32, 256, K, N, R, R, "siblings", True, "beta")
    assert tuning.candidates(problem) == ["two_pass", "beta", "fused"]
    for other in (
        problem._replace(form="unfolded"),
        problem._replace(dtype=torch.float32),
        problem._replace(device=torch.device("cpu")),
    ):
        assert tuning.candidates(other) == ["two_pass", "beta"]
    hopper.refusal = REFUSAL
    assert tuning.candidates(problem) == ["two_pass", "beta"]
