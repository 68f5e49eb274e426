"""What only a GPU times, against a GPU that writes down what it is told: cold L2, graphs, eager, clocks and throttling."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import kernels, layer
from bench.measure import forms, session, shapes, timing
from bench.rivals import library, operators
from bench.rivals import registry as rv

GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU's log."""
    log: list[str] = []

    class Stream:
        def __init__(self, device=None):
            self.name = "side"

        def wait_stream(self, other) -> None:
            log.append("wait")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    class Event:
        def __init__(self, enable_timing: bool):
            pass

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other) -> float:
            return 1.0

    @contextlib.contextmanager
    def graph(made, pool, stream):
        log.append(f"capture into {pool}")
        yield
        log.append("captured")

    @contextlib.contextmanager
    def on(stream):
        log.append("on side")
        yield
        log.append("off side")

    replaced = {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": graph,
        "stream": on,
        "graph_pool_handle": lambda: "pool",
        "current_stream": lambda device: Stream(),
        "synchronize": lambda device: log.append("synchronise"),
        "_sleep": lambda cycles: log.append("queue"),
        "current_device": lambda: 0,
        "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=100 << 20),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


def test_the_flush_reads_more_than_the_l2_and_writes_nothing_large(gpu, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size, device="meta"))
    clock = timing.Clock(GPU, "events")
    read, written = [], []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            read.extend(t.nbytes for t in args if isinstance(t, torch.Tensor))
            written.append(out.nbytes)
            return out

    with Seen():
        clock.cool()
    assert sum(read) >= 4 * (100 << 20) and sum(written) <= 8


def test_stages_are_captured_apart_and_replayed(gpu):
    seen = []
    timed = timing.Timed(
        (lambda _: seen.append("forward") or "y", lambda y: seen.append(f"backward of {y}")), lambda: seen.append("prepare")
    )
    replayed = timing.captured(timed, GPU)
    assert seen == ["prepare", "forward", "backward of y"] * 4  # three times before, once captured
    assert gpu.count("capture into pool") == 2 and gpu.index("off side") < gpu.index("capture into pool")
    gpu.clear()
    seen.clear()
    for stage in replayed.stages:
        stage(None)
    assert gpu == ["replay", "replay"] and not seen


def fake_session(monkeypatch, kind: str = "events"):
    """A session on the fake GPU, without its machine."""
    made = session.Session.__new__(session.Session)
    made.device, made.options = GPU, types.SimpleNamespace(rounds=2, plans=False)
    made.clock, made.failures, made.said = types.SimpleNamespace(kind=kind), [], []
    made.say = made.said.append
    return made


def test_forms_are_measured_beside_the_devices_own_time(gpu, monkeypatch):
    made = fake_session(monkeypatch)
    asked = []

    def interleave(calls, clock, rounds, slice_s, settle, deal):
        asked.append((len(calls), clock.kind))
        return [[[1.0 + i] * rounds, [2.0 + i] * rounds] for i, _ in enumerate(calls)]

    def capture(timed, device):
        if timed == "bad":
            raise RuntimeError("operation not permitted when stream is capturing")
        return timed

    monkeypatch.setattr(forms, "interleave", interleave)
    monkeypatch.setattr(forms, "captured", capture)
    monkeypatch.setattr(forms, "Clock", lambda device, kind: types.SimpleNamespace(kind=kind))
    found = forms.more_forms(made, ["frozen", "bad", "ours"], ["a", "bad", "c"], "frozen", 0.01)
    assert asked == [(3, "wall"), (2, "events")]
    assert set(found["frozen"]) == set(found["ours"]) == {"eager", "graph"} and set(found["bad"]) == {"eager"}
    assert found["ours"]["eager"]["step"]["seconds"] == (7.0, 7.0, 7.0)
    assert found["ours"]["graph"]["step"]["excess"] == pytest.approx((5 / 3 - 1,) * 3)
    assert made.failures == ["bad as a CUDA graph: RuntimeError: operation not permitted when stream is capturing"]
    assert forms.more_forms(fake_session(monkeypatch, "wall"), ["frozen"], ["a"], "frozen", 0.01) == {"frozen": {}}


@pytest.mark.parametrize(
    ("reasons", "throttled"),
    [
        ("0x0000000000000000", False),
        ("0x0000000000000001", False),
        ("0x0000000000000002", False),
        ("0x0000000000000004", True),
        ("0x0000000000000021", True),
        ("[N/A]", False),
    ],
)
def test_throttling_is_said(gpu, monkeypatch, reasons, throttled):
    states = iter([{}, {"clocks.sm": "1200 MHz", "clocks_throttle_reasons.active": reasons}])
    monkeypatch.setattr(session, "gpu_state", lambda device: next(states))
    made = fake_session(monkeypatch)
    with made.watched("a case") as state:
        pass
    assert set(state) == {"before", "after"} and bool(made.said) == throttled
    assert not throttled or "a case: the GPU was throttled after it: clocks.sm 1200 MHz" in made.said[0]


def test_the_state_is_asked_of_the_tool(gpu, monkeypatch):
    def run(command, **options):
        assert "--id=0" in command
        fields = command[2].removeprefix("--query-gpu=").split(",")
        return types.SimpleNamespace(returncode=0, stdout=", ".join(f"<{field}>" for field in fields) + "\n")

    monkeypatch.setattr(timing.shutil, "which", lambda name: name)
    monkeypatch.setattr(timing.subprocess, "run", run)
    state = timing.gpu_state(GPU)
    assert state["clocks.sm"] == "<clocks.sm>" and "clocks_throttle_reasons.active" in state
    assert timing.gpu_state(torch.device("cpu")) == {}


def test_a_gpus_shapes_and_rivals(monkeypatch):
    found = shapes.candidates("cuda")
    assert {m for m, *_ in found} == set(shapes.TOKENS) and min(shapes.TOKENS) == 1 and max(shapes.TOKENS) == 16384
    assert {r for *_, r in found} == set(shapes.GPU_RANKS) and (min(shapes.GPU_RANKS), max(shapes.GPU_RANKS)) == (8, 128)
    for layer_ in shapes.LAYERS:
        assert any((k, n) == (layer_.k, layer_.n) for _, k, n, _ in found), layer_
    case = shapes.Case(8192, 4096, 4096, 16, "bf16", 1)
    options = types.SimpleNamespace(rivals=list(rv.DEFAULT), chosen=False, quick=False, device="cuda", autotune=False)
    monkeypatch.setattr(rv, "installed", lambda names: (names, []))
    without = layer.rivals_of(case, options)
    options.autotune = True
    assert set(layer.rivals_of(case, options)) - set(without) == set(rv.AUTOTUNED)
    for name in rv.AUTOTUNED:
        assert "but on a GPU" in library.obstacle(name, case, torch.device("cpu"))


def test_kernels_get_the_autotuned_product_as_another_floor(gpu, monkeypatch):
    made = fake_session(monkeypatch)
    made.ceilings = lambda dtype, threads: {"flops_per_s": 1e12, "bytes_per_s": 1e12}
    monkeypatch.setattr(session, "gpu_state", lambda device: {})
    monkeypatch.setattr(operators, "make", lambda case, device: operators.Operator(int, int, None, operators.Work(1, 1)))
    monkeypatch.setattr(operators, "errors", lambda operator: {"ours": 0.0, "library": 0.0})
    monkeypatch.setattr(kernels, "autotuned", lambda call: lambda: "tuned")
    monkeypatch.setattr(kernels, "interleave", lambda calls, *a, **k: [[[3.0 - i]] for i, _ in enumerate(calls)])
    case = operators.KernelCase("shrink", 8192, 4096, 16, "bf16", 1)
    made.options.autotune = True
    results = kernels.measure(case, made)
    assert [r["rival"] for r in results] == ["library", "autotuned", "lotr_ext"]
    assert [r["step"]["seconds"][1] for r in results] == [3.0, 2.0, 1.0] and results[0]["gpu"].keys() == {"before", "after"}
    made.options.autotune = False
    assert len(kernels.measure(case, made)) == 2
    with pytest.raises(ValueError, match="autotune: expected --device cuda"):
        kernels.arguments(["--device", "cpu", "--autotune"])
