"""Tests that need a GPU: graphs, streams, devices, more than 2^31 elements, the sanitizer."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import worst

from lotr_ext import LoTRFactors, LoTRLinear

lotr = torch.ops.lotr
HERE = Path(__file__).resolve().parent
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def operands(
    m: int, k: int, n: int, r: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> dict[str, torch.Tensor]:
    """Returns the operands of a layer and of its backward, by name."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = {
        "x": (m, k),
        "g": (m, n),
        "A": (k, r),
        "F": (n, r),
        "B": (n, r),
        "core": (r, r),
        "y": (m, n),
        "dx": (m, k),
    }
    return {
        name: torch.randn(*size, device=device, generator=generator).to(dtype)
        for name, size in sizes.items()
    }


def step(
    t: dict[str, torch.Tensor],
    p: float = 0.0,
    seed: torch.Tensor | None = None,
    pause: Callable[[], None] = lambda: None,
) -> list[torch.Tensor]:
    """Runs forward and backward of the adapter on copies, with `pause` between operators."""
    y = t["y"].clone()
    dx = t["dx"].clone()
    dA = torch.zeros(t["A"].shape, device=y.device)
    dB = torch.zeros(t["B"].shape, device=y.device)
    pause()
    u = lotr.shrink(t["x"], t["A"], p, seed)
    pause()
    lotr.expand_add_(y, u, t["F"], p, seed)
    pause()
    _, du, _, dcore = lotr.layer_backward_projected_(
        g=t["g"],
        weight=None,
        u=u,
        F=t["F"],
        B=t["B"],
        core=t["core"],
        scaling=2.0**-10,
        du=None,
        dx=None,
        dB=dB,
        need_B=True,
        need_core=True,
    )
    pause()
    lotr.shrink_backward_(du, dx, t["x"], t["A"], dA, p, seed)
    return [u, y, du, dB, dcore, dx, dA]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 64, 4099])
def test_same_bits_a_hundred_times(m: int, dtype: torch.dtype, p: float) -> None:
    """Kernels that start early wait for the previous ones.

    Consecutive steps have the bits of a step that pauses after every operator. So have replays of a
    graph of ten steps, with new inputs and seeds.
    """
    t = operands(m, 1000, 1208, 24, dtype)
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    expected = step(t, p, seed, torch.cuda.synchronize)
    assert all(torch.isfinite(a).all() for a in expected)
    results = [step(t, p, seed) for _ in range(100)]
    assert all(same(expected, result) for result in results)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [step(t, p, seed) for _ in range(10)]
    for number in range(20):
        t["x"].normal_()
        seed.fill_(number)
        for tensor in captured[-1]:
            tensor.fill_(float("nan"))
        graph.replay()
        expected_now = step(t, p, seed, torch.cuda.synchronize)
        assert all(same(expected_now, result) for result in captured)


def test_many_streams_at_once() -> None:
    layers = [operands(2048 + 64 * i, 768, 768, 16) for i in range(8)]
    expected = [step(t) for t in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for stream, t in zip(streams, layers, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(t))
    torch.cuda.synchronize()
    assert all(same(result, expected[i % len(layers)]) for i, result in enumerate(results))


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=TWO_GPUS)])
def test_a_thread_that_has_used_no_gpu(index: int) -> None:
    """Such a thread has no current context before its first call."""
    t = operands(4096, 1024, 1024, 16, device=f"cuda:{index}")
    results = []
    thread = threading.Thread(target=lambda: results.extend(step(t)))
    thread.start()
    thread.join()
    assert same(results, step(t))


@pytest.mark.parametrize("form", ["shared"], indirect=True)
def test_siblings_on_two_streams(form: str) -> None:
    """The first stream is delayed, in forward and in backward.

    A layer on the second stream that reused u of the first would read too early. So would a sum of
    the gradients that both streams add to.
    """
    factors = LoTRFactors(512, 512, 16)
    layers = [LoTRLinear(512, 512, factors=factors).cuda() for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in layers]
    x = torch.randn(2000, 512, device="cuda")
    for layer in layers:
        torch.nn.init.normal_(layer.core)
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(500_000_000)  # cycles, about 0.3 s
    outputs = []
    for layer, stream in zip(layers, streams, strict=True):
        with torch.cuda.stream(stream):
            outputs.append(layer(x))
    outputs[0].register_hook(lambda g: torch.cuda._sleep(500_000_000))
    torch.cuda.synchronize()
    (outputs[0].sum() + outputs[1].sum()).backward()
    torch.cuda.synchronize()
    trained = (factors.A.value, factors.B.value)
    A, B = (factor.detach().double().requires_grad_() for factor in trained)
    plain = [
        x.double() @ (layer.weight.T + layer.scaling * A @ layer.core.double() @ B.T) + layer.bias
        for layer in layers
    ]
    assert worst(outputs, plain) < 1e-4
    expected = torch.autograd.grad(plain[0].sum() + plain[1].sum(), (A, B))
    assert worst([factor.grad for factor in trained], expected) < 1e-3


def test_nothing_synchronizes() -> None:
    t = operands(512, 256, 256, 16)
    step(t)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_31_bits_of_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    close = partial(torch.testing.assert_close, rtol=2**-7, atol=2e-2)
    tail = slice(-100, None)
    x = torch.randn(40_000, 65_536, device="cuda", dtype=torch.bfloat16)  # 2.6e9 elements
    A = torch.randn(x.shape[1], 16, device="cuda", dtype=torch.bfloat16) / 256
    before = x[tail].double()
    u = lotr.shrink(x, A)
    close(u[tail].double(), before @ A.double())
    lotr.expand_add_(x, u, A)
    close(x[tail].double(), before + u[tail].double() @ A.double().T)
    only_last = torch.zeros_like(u)
    only_last[-1] = 1
    dA = torch.zeros(A.shape, device="cuda")
    lotr.shrink_backward_(only_last, None, x, None, dA)
    assert torch.equal(dA[:, 0], x[-1].float())
    # The index of dropout exceeds 32 bits.
    y = torch.zeros_like(x)
    seed = torch.tensor([5], device="cuda")
    lotr.expand_add_(y, x.new_ones(len(x), 1), x.new_ones(x.shape[1], 1), 0.5, seed)
    kept = (y[tail] != 0).double().mean().item()
    assert 0.49 < kept < 0.51


def test_first_calls_of_a_process_inside_of_a_capture() -> None:
    """The driver is queried, and kernels are loaded, while a stream is captured."""
    program = """
import torch, lotr_ext
from test_device import operands, same, step
t = operands(4096, 1024, 1024, 16)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step(t)
graph.replay()
assert same(captured, step(t))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=HERE)


def test_wrong_devices_dtypes_and_ranks_are_named() -> None:
    t = operands(8, 16, 16, 4)
    x = t["x"]
    with pytest.raises(RuntimeError, match="lotr::shrink: A: expected the device of x"):
        lotr.shrink(x, t["A"].cpu())
    with pytest.raises(RuntimeError, match=r"expected a rank of at most 256 .*16, 300"):
        lotr.shrink(x, x.new_zeros(16, 300))
    message = r"expected dtype torch\.float32, torch\.bfloat16 or torch\.float16 on CUDA"
    with pytest.raises(RuntimeError, match=message):
        lotr.shrink(x.double(), t["A"].double())


@TWO_GPUS
def test_second_device_while_the_first_is_current() -> None:
    t = operands(300, 128, 192, 16)
    on_second = {name: operand.to("cuda:1") for name, operand in t.items()}
    for result, second in zip(step(t), step(on_second), strict=True):
        assert second.device.index == 1
        assert torch.allclose(result.cpu().float(), second.cpu().float(), rtol=2**-6, atol=1e-2)


@TWO_GPUS
def test_second_device_alone_makes_no_context_on_the_first() -> None:
    """A context takes some hundred megabytes."""
    program = (
        "import torch, lotr_ext; layer = lotr_ext.LoTRLinear(64, 64, 8, device='cuda:1'); "
        "layer(torch.ones(8, 64, device='cuda:1')).sum().backward(); "
        "assert not torch._C._cuda_hasPrimaryContext(0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.full
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    """Ragged layers of every rank class, one allocation per tensor, because memcheck needs that."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        pytest.skip("no compute-sanitizer")
    steps = """
import torch
from test_device import operands, step
shapes = (
    (333, 200, 136, 16), (130, 72, 264, 40), (65, 129, 77, 9), (100, 64, 64, 100), (70, 96, 64, 200)
)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for shape in shapes:
        step(operands(*shape, dtype), 0.2, torch.tensor([3], device="cuda"))
torch.cuda.synchronize()
"""
    # initcheck also reports blocks that torch's allocator reuses, so only our kernels are checked.
    options = ("--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=lotr")
    done = subprocess.run(
        [program, *options, sys.executable, "-c", steps],
        capture_output=True,
        text=True,
        cwd=HERE,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
