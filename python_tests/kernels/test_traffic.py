"""Counted bytes: every large matrix moves exactly once, and no array more than in traffic.json.

After an improvement, this writes traffic.json:
PYTHONPATH=.:python_tests/kernels python -c "import test_traffic; test_traffic.record()"
"""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from arrays import PACKED
from cases import Problem
from shapes import FUSED, Shape

from csrc.simt import build

RECORD = Path(__file__).with_name("traffic.json")
# The large matrix of each kernel, which moves once. gemm_lotr reads x and W once for each tile of
# 256 columns or rows.
ADAPTER_KERNELS = {
    "shrink": "x",
    "expand_add": "y",
    "expand_fresh": "y",
    "expand_from": "y",
    "factor_grad": "x",
    "shrink_grad": "g",
}
LARGE = ADAPTER_KERNELS | dict.fromkeys(FUSED, "y")
SHAPES = {
    "layer": Shape(1024, 1024, 16, PACKED),
    "rank 64": Shape(512, 1024, 64, PACKED),
    "decoding": Shape(16, 2048, 16, PACKED),
    "A100": Shape(512, 1024, 16, PACKED, sms=108),
    "base product": Shape(1024, 192, 16, PACKED, n=512, sms=6),
    "sorted rows": Shape(4096, 64, 16, PACKED, sms=16, minimal=True, cores=8),
}
CASES = [
    *(
        (kernel, shape, "bf16")
        for kernel in ADAPTER_KERNELS
        for shape in ("layer", "rank 64", "decoding", "A100")
    ),
    *((kernel, "base product", "bf16") for kernel in FUSED),
    *((kernel, "A100", "fp32") for kernel in ADAPTER_KERNELS),
    *(
        (kernel, "A100", "bf16")
        for kernel in ("fold", "fold_grad", "row_core", "row_core_backward")
    ),
    ("row_core", "sorted rows", "bf16"),
]


def counted(lib: ModuleType, problem: Problem) -> dict:
    """Returns the executor's counters after one checked call."""
    lib.reset_counters()
    problem.run(lib, count_memory=True)
    return lib.counters()


def moved(counters: dict) -> dict[str, list[int]]:
    """Returns the bytes read and written of each array that moved."""
    arrays = {name: [a["read_bytes"], a["written_bytes"]] for name, a in counters["arrays"].items()}
    return {name: sizes for name, sizes in arrays.items() if any(sizes)}


def launches(counters: dict) -> list[str]:
    return [launch["name"] for launch in counters["launches"]]


@pytest.mark.parametrize(("kernel", "shape", "kind"), CASES)
def test_bytes(lib: ModuleType, kernel: str, shape: str, kind: str) -> None:
    problem = Problem(kernel, SHAPES[shape], kind)
    counters = counted(lib, problem)
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))[f"{kernel}, {shape}, {kind}"]
    more = {
        name: (sizes, recorded.get(name))
        for name, sizes in moved(counters).items()
        if np.greater(sizes, recorded.get(name, [0, 0])).any()
    }
    assert not more, f"{more}: bytes moved, and recorded"
    if kernel in LARGE:
        check_large_matrix(problem, kernel, moved(counters))
        # One launch for a product, and a second one if blocks share an output.
        sum_of_parts = [] if LARGE[kernel] == "y" else ["sum_parts"]
        assert launches(counters) in ([problem.kernel], [problem.kernel, *sum_of_parts])
        check_accesses(counters)
    if kernel in FUSED:  # products of a warpgroup, 64 x 256 x 16: the rank costs one per tile
        tiles = problem.shape.m // 64 * problem.shape.out_features // 256
        assert counters["wgmma"] == tiles * (problem.shape.k // 16 + 1)


def check_large_matrix(problem: Problem, kernel: str, bytes_of: dict[str, list[int]]) -> None:
    """Asserts that it moves once: y of expand_add in both directions."""
    if LARGE[kernel] == "y":
        size = problem.outputs["y"].view.nbytes
        assert bytes_of["y"] == [size * (kernel == "expand_add"), size]
        assert kernel != "expand_from" or bytes_of["start"] == [size, 0]
    else:
        assert bytes_of[LARGE[kernel]] == [problem.inputs[LARGE[kernel]].nbytes, 0]


def check_accesses(counters: dict) -> None:
    """Asserts complete sectors of global memory, and no bank conflicts of shared memory."""
    # sum_parts stores these by elements, so not by complete sectors.
    summed = {"u", "du", "D", "Q"} if "sum_parts" in launches(counters) else set()
    used = 0
    sectors = 0
    for name, array in counters["arrays"].items():
        if not (name in summed and array["written_bytes"]):
            used += array["read_bytes"] + array["written_bytes"]
            sectors += array["read_sectors"] + array["written_sectors"]
    assert used >= 0.95 * 32 * sectors
    assert counters["shared_wavefronts"] <= 1.05 * counters["shared_phases"]


@pytest.mark.parametrize("kernel", ["shrink", "factor_grad", "shrink_grad", "fold_grad"])
def test_every_element_of_a_part_is_written_and_read_once(lib: ModuleType, kernel: str) -> None:
    """The columns that pad a part are written too, because sum_parts loads them."""
    counters = counted(lib, Problem(kernel, Shape(2000, 1024, 13), "bf16"))
    assert "sum_parts" in launches(counters)
    read, written = moved(counters)["workspace"]
    assert read == written


@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_a_step_of_few_tokens_has_no_more_launches_than_a_folded_one(
    lib: ModuleType, tokens: int
) -> None:
    shape = Shape(tokens, 1024, 16, PACKED, n=1024)

    def count(*kernels: str) -> int:
        problems = [Problem(kernel, shape, "bf16") for kernel in kernels]
        return sum(len(launches(counted(lib, problem))) for problem in problems)

    assert count("few_tokens_forward") < count("shrink", "fold", "expand_add")
    folded_backward = count("shrink_grad", "fold_grad", "factor_grad", "expand_add")
    assert count("few_tokens_backward") <= folded_backward


def record() -> None:
    lib = build.load("plain")
    lines = []
    for kernel, shape, kind in CASES:
        counters = counted(lib, Problem(kernel, SHAPES[shape], kind))
        lines.append(f'"{kernel}, {shape}, {kind}": {json.dumps(moved(counters))}')
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
