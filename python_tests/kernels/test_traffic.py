"""Counted bytes: every large matrix moves exactly once, and no array more than in traffic.json.

python python_tests/kernels/test_traffic.py     writes traffic.json, after an improvement
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from arrays import DTYPE, PACKED  # noqa: E402
from cases import FUSED, Shape, problem_of  # noqa: E402

RECORD = HERE / "traffic.json"
# The large matrix of each kernel, which moves once. gemm_lotr reads x and W once for each tile of
# 256 columns or rows.
OF_ADAPTER = {
    "shrink": "x",
    "expand_add": "y",
    "expand_fresh": "y",
    "expand_from": "y",
    "factor_grad": "x",
    "shrink_grad": "g",
}
LARGE = OF_ADAPTER | dict.fromkeys(FUSED, "y")
SHAPES = {
    "layer": Shape(1024, 1024, 16, PACKED),
    "rank 64": Shape(512, 1024, 64, PACKED),
    "decoding": Shape(16, 2048, 16, PACKED),
    "A100": Shape(512, 1024, 16, PACKED, sms=108),
    "base product": Shape(1024, 192, 16, PACKED, n=512, sms=6),
}
SMALL = ("fold", "fold_grad", "row_core", "row_core_backward")
ADAPTER_SHAPES = ("layer", "rank 64", "decoding", "A100")
CASES = [
    *((kernel, shape, "bf16") for kernel in OF_ADAPTER for shape in ADAPTER_SHAPES),
    *((kernel, "base product", "bf16") for kernel in FUSED),
    *((kernel, "A100", "fp32") for kernel in OF_ADAPTER),
    *((kernel, "A100", "bf16") for kernel in SMALL),
]
Counts = dict[str, list[int]]  # bytes read and written of each array


def count(lib: ModuleType, kernel: str, shape: Shape, kind: str = "bf16") -> tuple[Counts, dict]:
    """Returns the bytes of one call by array, and all counters."""
    problem = problem_of(kernel, shape, kind)
    lib.reset_counters()
    problem.check(problem.run(lib, count_memory=True))
    counters = lib.counters()
    arrays = {name: [a["read_bytes"], a["written_bytes"]] for name, a in counters["arrays"].items()}
    return {name: moved for name, moved in arrays.items() if any(moved)}, counters


def launches_of(lib: ModuleType, kernel: str, shape: Shape) -> list[str]:
    lib.reset_counters()
    problem_of(kernel, shape, "bf16").run(lib)
    return [launch["name"] for launch in lib.counters()["launches"]]


@pytest.mark.parametrize(("kernel", "shape", "kind"), CASES)
def test_bytes(lib: ModuleType, kernel: str, shape: str, kind: str) -> None:
    moved, counters = count(lib, kernel, SHAPES[shape], kind)
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))[f"{kernel}, {shape}, {kind}"]
    more = {
        name: (bytes_, recorded.get(name))
        for name, bytes_ in moved.items()
        if np.greater(bytes_, recorded.get(name, [0, 0])).any()
    }
    assert not more, f"{more}: bytes moved, and recorded"
    if kernel in LARGE:
        check_large_matrix(kernel, SHAPES[shape], np.dtype(DTYPE[kind]).itemsize, moved)
        check_accesses(counters)


def check_large_matrix(kernel: str, shape: Shape, itemsize: int, moved: Counts) -> None:
    """Asserts that it moves once: y of expand_add in both directions."""
    name = LARGE[kernel]
    size = shape.m * (shape.columns if kernel in FUSED else shape.k) * itemsize
    is_read = name != "y" or kernel == "expand_add"
    assert moved[name] == [size * is_read, size * (name == "y")]
    assert kernel != "expand_from" or moved["start"] == [size, 0]


def check_accesses(counters: dict) -> None:
    """Asserts complete sectors of global memory, and no bank conflicts of shared memory."""
    launches = {launch["name"] for launch in counters["launches"]}
    # sum_parts stores these by elements.
    summed = {"u", "du", "D", "Q"} if "sum_parts" in launches else set()
    used = 0
    sectors = 0
    for name, array in counters["arrays"].items():
        if name not in summed or (array["read_bytes"] and not array["written_bytes"]):
            used += array["read_bytes"] + array["written_bytes"]
            sectors += array["read_sectors"] + array["written_sectors"]
    assert used >= 0.95 * 32 * sectors
    assert counters["shared_wavefronts"] <= 1.05 * counters["shared_phases"]


@pytest.mark.parametrize("kernel", FUSED)
def test_the_rank_costs_one_product_per_tile(lib: ModuleType, kernel: str) -> None:
    """Products of a warpgroup are 64 x 256 x 16."""
    shape = SHAPES["base product"]
    products = shape.m // 64 * shape.columns // 256 * (shape.k // 16 + 1)
    assert count(lib, kernel, shape)[1]["wgmma"] == products


@pytest.mark.parametrize("kernel", LARGE)
def test_launches(lib: ModuleType, kernel: str) -> None:
    """One launch for each product, and one more if blocks share an output."""
    for shape in [SHAPES[shape] for name, shape, _ in CASES if name == kernel]:
        launch = problem_of(kernel, shape, "bf16").kernel
        launches = launches_of(lib, kernel, shape)
        assert launches == [launch] or (
            launches == [launch, "sum_parts"] and LARGE[kernel] != "y"
        ), shape


@pytest.mark.parametrize("kernel", ["shrink", "factor_grad", "shrink_grad", "fold_grad"])
def test_every_element_of_a_part_is_written_and_read_once(lib: ModuleType, kernel: str) -> None:
    """The columns that pad a part are written too, because sum_parts loads them."""
    moved, counters = count(lib, kernel, Shape(2000, 1024, 13))
    assert "sum_parts" in [launch["name"] for launch in counters["launches"]]
    read, written = moved["workspace"]
    assert read == written


@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_a_step_of_few_tokens_has_no_more_launches_than_a_folded_one(
    lib: ModuleType, tokens: int
) -> None:
    shape = Shape(tokens, 1024, 16, PACKED, n=1024)

    def launches(*kernels: str) -> int:
        return sum(len(launches_of(lib, kernel, shape)) for kernel in kernels)

    assert launches("small_forward") < launches("shrink", "fold", "expand_add")
    folded_backward = launches("shrink_grad", "fold_grad", "factor_grad", "expand_add")
    assert launches("small_backward") <= folded_backward


def test_sorted_rows_read_each_operand_once(lib: ModuleType) -> None:
    """u and h move once, an index is read once, and a core once for each block of 32 rows."""
    rows = 4096
    cores = 8
    r = 16
    rng = np.random.default_rng(0)
    u = rng.standard_normal((rows, r), np.float32)
    G = rng.standard_normal((cores, r, r), np.float32)
    index = np.sort(rng.integers(0, cores, rows))
    lib.set_device(multiprocessors=16)
    lib.set_options(count_memory=True)
    lib.reset_counters()
    lib.run("row_core", {"u": u, "cores": G, "h": np.empty_like(u), "index": index})
    arrays = lib.counters()["arrays"]
    assert arrays["u"]["read_bytes"] == arrays["h"]["written_bytes"] == rows * r * 4
    assert arrays["index"]["read_bytes"] == rows * 8
    assert arrays["cores"]["read_bytes"] <= (rows // 32 + cores - 1) * r * r * 4


def main() -> None:
    from csrc.simt import build

    lib = build.load("plain")
    lines = []
    for kernel, shape, kind in CASES:
        moved, _ = count(lib, kernel, SHAPES[shape], kind)
        lines.append(f"{json.dumps(f'{kernel}, {shape}, {kind}')}: {json.dumps(moved)}")
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
