"""The table of operators (python_tests/test_operators.py) on a GPU.

A Hopper GPU also runs the layer's operators with the strategy FUSED, which uses gemm_lotr. The
same table runs on the CPU as well, which shows that the checks can pass.
"""

from collections.abc import Callable
from functools import partial

import pytest
import test_operators
import torch
from helpers import DTYPE_PAIRS, LAYOUTS
from operands import BETA, SCHEMAS, Case
from test_operators import DROPS, SHAPES, TABLE
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lotr_ext.core.kernel_support import build_info

FUSED = 2  # csrc/torch/check.h
FUSED_OPERATORS = (
    "layer_forward",
    "layer_forward_projected",
    "layer_forward_rows",
    "layer_backward_",
)
# Sizes whose rows have multiples of 16 bytes, which gemm_lotr needs.
FUSED_SHAPES = [
    (1, 72, 64, 16),
    (300, 200, 328, 11),
    (1000, 1032, 776, 127),
    (2048, 2048, 2048, 16),
]
each_dtype_pair = pytest.mark.parametrize(
    "dtype, factors",
    [pair for pair in DTYPE_PAIRS if torch.float64 not in pair],
    ids=lambda t: str(t).removeprefix("torch."),
)


class OnDevice:
    """torch.ops.lotr for operands on the CPU.

    Each operand is moved with its storage, so the NaN around it is moved as well. Results, and the
    storages of written operands, are moved back.

    Args:
        device: Where the operators run.
        fused: Run the strategy FUSED where a test has BETA.
    """

    def __init__(self, device: str, fused: bool = False):
        self.device = device
        self.fused = fused

    def __getattr__(self, name: str) -> Callable:
        return partial(self.call, name)

    def call(self, name: str, *arguments: object) -> object:
        moved: dict[int, tuple[Tensor, Tensor]] = {}

        def on_device(t: Tensor) -> Tensor:
            storage = t if t._base is None else t._base
            moved.setdefault(id(storage), (storage, storage.clone().to(self.device)))
            return moved[id(storage)][1].as_strided(t.shape, t.stride(), t.storage_offset())

        operands = tree_map_only(Tensor, on_device, arguments)
        names = [argument.name for argument in SCHEMAS[name].arguments]
        if self.fused and "strategy" in names:
            strategy = names.index("strategy")
            if operands[strategy] == BETA:
                operands = (*operands[:strategy], FUSED, *operands[strategy + 1 :])
        result = getattr(torch.ops.lotr, name)(*operands)
        for original, copy in moved.values():
            original.copy_(copy)
        return tree_map_only(Tensor, Tensor.cpu, result)


def check(name: str, make: Callable[[], Case], where: str) -> None:
    """Checks the numbers, and that a second run has the same bits."""
    test_operators.check(name, make(), where)
    first = test_operators.results_of(name, make())
    second = test_operators.results_of(name, make())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), (
        f"{name}, {where}: other bits"
    )


@each_dtype_pair
@pytest.mark.parametrize("name", TABLE)
def test_operator(
    name: str,
    dtype: torch.dtype,
    factors: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The GPU runs all shapes and layouts, the CPU a few."""
    monkeypatch.setattr(test_operators, "ops", OnDevice(device))
    for i, shape in enumerate(SHAPES if device == "cuda" else SHAPES[::6]):
        for layout in LAYOUTS if device == "cuda" else LAYOUTS[i : i + 1]:
            check(name, partial(Case, shape, dtype, factors, layout), f"{shape} {layout}")
        if name in DROPS and dtype == factors:
            check(name, partial(Case, shape, dtype, factors, p=0.4), f"{shape} p = 0.4")


@pytest.fixture
def hopper() -> None:
    has_kernels = "90a" in build_info()["cuda"]["archs"]
    if torch.cuda.get_device_capability() != (9, 0) or not has_kernels:
        pytest.skip("expected a Hopper GPU (compute capability 9.0) and a build for 90a")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUSED_OPERATORS)
def test_fused(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_operators, "ops", OnDevice("cuda", fused=True))
    for shape in FUSED_SHAPES:
        _, k, n, r = shape
        assert torch.ops.lotr.gemm_lotr_refusal(k, n, r, dtype, torch.cuda.current_device()) == ""
        check(name, partial(Case, shape, dtype, dtype), str(shape))


@pytest.mark.usefixtures("hopper")
def test_fused_in_a_graph() -> None:
    """A captured launch, replayed while another stream launches."""
    sizes = ((700, 512), (768, 512), (512, 16), (768, 16), (16, 16))
    x, weight, A, B, core = (torch.randn(*size, device="cuda").bfloat16() for size in sizes)
    run = partial(torch.ops.lotr.layer_forward, x, weight, None, A, B, core, 0.1, FUSED)
    expected = run()[0]
    graph = torch.cuda.CUDAGraph()
    other = torch.cuda.Stream()
    with torch.cuda.graph(graph):
        y = run()[0]
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        graph.replay()
        with torch.cuda.stream(other):
            y_of_other = run()[0]
    torch.cuda.synchronize()
    assert torch.equal(y, expected) and torch.equal(y_of_other, expected)
