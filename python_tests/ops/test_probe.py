"""What the probe finds, faked: a driver too old, none, a card without code. The composite runs, and it is said why."""

from __future__ import annotations

import json

import pytest
import torch

from lotr_ext import LoTRLinear, explain, info, lotr_linear
from lotr_ext.ops import planner

GOOD = {"runtime": 13000, "driver": 13010, "error": ""}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """machine(probe, capability) makes this machine one with a GPU that answers so."""

    def forget() -> None:
        planner.cuda_obstacle.cache_clear()
        planner.plan_of.cache_clear()
        from lotr_ext.autograd import call

        for value in vars(call).values():  # decisions are remembered too
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    def pretend(probe: dict, capability: tuple[int, int] = (9, 0), gpus: int = 1, built: bool = True) -> None:
        asked = {"cuda": {"built": built, "archs": ["80-real", "90a-real"]}, "cpu": {"isa": "x"}, "version": "1"}
        monkeypatch.setattr(planner, "build_info", lambda: asked | {"torch_target": "2.10"})
        monkeypatch.setattr(info, "build_info", planner.build_info)
        monkeypatch.setattr(planner, "cuda_probe", lambda device: probe if device >= 0 else probe | {"error": ""})
        monkeypatch.setattr(info, "cuda_probe", planner.cuda_probe)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
        forget()

    yield pretend
    monkeypatch.undo()
    forget()


OBSTACLES = [
    ({"driver": 0}, (9, 0), 1, ["no NVIDIA driver"]),
    ({"driver": 12080}, (9, 0), 1, ["built by CUDA 13.0", "serves CUDA 12.8", "580", "CUDA_HOME"]),
    ({"runtime": 12080, "driver": 11080}, (9, 0), 1, ["built by CUDA 12.8", "serves CUDA 11.8", "525"]),
    ({"runtime": 14000, "driver": 13000}, (9, 0), 1, ["built by CUDA 14.0", "update the driver, or"]),
    ({}, (9, 0), 0, ["sees 0 GPUs"]),
    ({}, (7, 5), 1, ["8.0 or later, got 7.5"]),
    ({"error": "cudaErrorNoKernelImageForDevice"}, (12, 0), 1, ["no code", "12.0", "80-real, 90a-real", "LOTR_ARCHS=120"]),
    ({"error": "cudaErrorNoKernelImageForDevice"}, (9, 0), 1, ["no code", "9.0", "LOTR_ARCHS=90a,"]),
    ({"error": "cudaErrorUnsupportedPtxVersion"}, (12, 0), 1, ["cudaErrorUnsupportedPtxVersion", "update the driver"]),
]


@pytest.mark.parametrize(("probe", "capability", "gpus", "words"), OBSTACLES, ids=lambda value: str(value)[:40])
def test_what_cannot_run_takes_the_composite_and_says_why(machine, probe, capability, gpus, words, capsys):
    machine(GOOD | probe, capability, gpus)
    layer, x = LoTRLinear(20, 14, 4, dtype=torch.bfloat16), torch.empty(2048, 20, dtype=torch.bfloat16)
    for device in ("cuda", "cuda:0"):
        found = explain(layer, x, device=device)
        assert not found.kernels and found.nodes == 0 and found.strategy == "composite"
        assert all(word in str(found) for word in words), str(found)
    info.main([])
    text = capsys.readouterr().out
    assert all(word in text for word in words) and "they cannot run" in text, text
    layer.strategy = "two_pass"
    with pytest.raises(ValueError, match="expected composite, the only strategy here"):
        explain(layer, x, device="cuda:0")


@pytest.mark.parametrize(("runtime", "driver"), [(13000, 13000), (13000, 14000), (13020, 13000)])  # an older minor one too
def test_a_driver_of_the_same_or_a_later_major_version_serves(machine, runtime, driver, capsys):
    machine(GOOD | {"runtime": runtime, "driver": driver})
    found = explain(LoTRLinear(20, 14, 4, dtype=torch.bfloat16), torch.empty(2048, 20, dtype=torch.bfloat16), device="cuda:0")
    assert found.kernels and found.strategy == "beta"
    info.main([])
    text = capsys.readouterr().out
    assert f"built by CUDA 13.{runtime % 1000 // 10}; driver for CUDA {driver // 1000}." in text and "cannot run" not in text
    assert "cuda:0: Card" in text and "beta" in text


def test_the_driver_is_asked_once_a_device(machine, monkeypatch):
    machine(GOOD)
    asked = []
    monkeypatch.setattr(planner, "cuda_probe", lambda device: asked.append(device) or GOOD)
    layer = LoTRLinear(20, 14, 4, dtype=torch.bfloat16)
    for tokens in (1, 200, 2048):
        explain(layer, torch.empty(tokens, 20, dtype=torch.bfloat16), device="cuda:0")
    assert asked == [-1, 0]


def test_nothing_is_asked_where_nothing_was_built(machine, monkeypatch):
    machine(GOOD, built=False)
    monkeypatch.setattr(planner, "cuda_probe", lambda device: pytest.fail("asked"))
    assert "without CUDA kernels" in planner.cuda_obstacle(0)
    without_driver = {
        "runtime": None,
        "driver": None,
        "obstacle": planner.cuda_obstacle(0),
        "without": list(planner.CUDA_WITHOUT),
    }
    assert info.collect()["cuda"] == without_driver


def test_on_a_cpu_the_driver_is_not_asked(monkeypatch):
    monkeypatch.setattr(planner, "cuda_probe", lambda device: pytest.fail("asked"))
    x = torch.randn(300, 20)
    y = lotr_linear(x, torch.randn(14, 20), None, torch.randn(20, 4), torch.randn(14, 4), torch.randn(4, 4), 1.0)
    assert y.shape == (300, 14)


built = pytest.mark.skipif(not planner.build_info()["cuda"]["built"], reason="built without CUDA kernels (no nvcc)")


@built
def test_the_operator_answers_on_every_machine():
    versions = json.loads(torch.ops.lotr.cuda_probe(-1))
    assert set(versions) == {"runtime", "driver", "float32", "float32_from", "error"} and versions["error"] == ""
    assert versions["runtime"] >= 12000 and (versions["driver"] == 0 or versions["driver"] >= 11000)
    device = json.loads(torch.ops.lotr.cuda_probe(0))
    assert device | {"error": ""} == versions
    works = torch.cuda.is_available() and planner.cuda_obstacle(0) is None
    assert works or device["error"].startswith("cudaError") or torch.cuda.is_available()
    assert json.loads(torch.ops.lotr.cuda_probe(10**4))["error"].startswith("cudaError")


@built
def test_the_float32_setting_is_read_as_the_user_set_it(monkeypatch):
    """Without Python: torch's own library says it. Each way to set it counts, at once."""

    def read() -> str:
        return json.loads(torch.ops.lotr.cuda_probe(-1))["float32"]

    assert json.loads(torch.ops.lotr.cuda_probe(-1))["float32_from"] == "torch"
    before = torch.get_float32_matmul_precision()
    try:
        for precision, rounded in [("high", "tf32"), ("highest", "exact"), ("medium", "tf32"), ("highest", "exact")]:
            torch.set_float32_matmul_precision(precision)
            assert read() == rounded, precision
        for allowed in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert read() == ("tf32" if allowed else "exact")
        for precision, rounded in [("tf32", "tf32"), ("ieee", "exact")]:
            torch.backends.cuda.matmul.fp32_precision = precision
            assert read() == rounded and torch.backends.cuda.matmul.fp32_precision == precision
    finally:
        torch.set_float32_matmul_precision(before)
