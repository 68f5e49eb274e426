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
from cases import KERNELS, Shape  # noqa: E402

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
FUSED = {"gemm_lotr": "y", "gemm_lotr_backward": "y"}
LARGE = OF_ADAPTER | FUSED
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


def count(lib: ModuleType, kernel: str, shape: str, kind: str) -> tuple[Counts, dict]:
    """Returns the bytes of one call by array, and all counters."""
    problem = KERNELS[kernel](SHAPES[shape], kind)
    lib.reset_counters()
    problem.check(problem.run(lib, count_memory=True))
    counters = lib.counters()
    arrays = {name: [a["read_bytes"], a["written_bytes"]] for name, a in counters["arrays"].items()}
    return {name: moved for name, moved in arrays.items() if any(moved)}, counters


def recorded() -> dict[str, Counts]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("kernel", "shape", "kind"), CASES)
def test_bytes(lib: ModuleType, kernel: str, shape: str, kind: str) -> None:
    moved, counters = count(lib, kernel, shape, kind)
    kept = recorded()[f"{kernel}, {shape}, {kind}"]
    more = {
        name: (bytes_, kept.get(name))
        for name, bytes_ in moved.items()
        if np.greater(bytes_, kept.get(name, [0, 0])).any()
    }
    assert not more, f"{more}: bytes moved, and recorded"
    if kernel in LARGE:
        check_large_matrix(kernel, SHAPES[shape], np.dtype(DTYPE[kind]).itemsize, moved)
        check_accesses(counters)
        assert counters["wgmma"] == products_of(kernel, SHAPES[shape])


def check_large_matrix(kernel: str, shape: Shape, itemsize: int, moved: Counts) -> None:
    """Asserts that it moves once: y of expand_add in both directions."""
    name = LARGE[kernel]
    size = shape.m * (shape.columns if kernel in FUSED else shape.k) * itemsize
    is_read = name != "y" or kernel == "expand_add"
    assert moved[name] == [size * is_read, size * (name == "y")]
    if kernel == "expand_from":
        assert moved["start"] == [size, 0]


def check_accesses(counters: dict) -> None:
    """Asserts complete sectors of global memory, and no bank conflicts of shared memory."""
    launches = {launch["name"] for launch in counters["launches"]}
    # sum_parts stores these by elements.
    summed = {"u", "k", "D", "Q"} if "sum_parts" in launches else set()
    used = 0
    sectors = 0
    for name, array in counters["arrays"].items():
        if name in summed and not (array["read_bytes"] and not array["written_bytes"]):
            continue
        used += array["read_bytes"] + array["written_bytes"]
        sectors += array["read_sectors"] + array["written_sectors"]
    assert used >= 0.95 * 32 * sectors
    assert counters["shared_wavefronts"] <= 1.05 * counters["shared_phases"]


def products_of(kernel: str, shape: Shape) -> int:
    """Returns the products of a warpgroup, 64 x 256 x 16. The rank costs one per tile."""
    if kernel not in FUSED:
        return 0
    return shape.m // 64 * shape.columns // 256 * (shape.k // 16 + 1)


@pytest.mark.parametrize("kernel", LARGE)
def test_launches(lib: ModuleType, kernel: str) -> None:
    """One launch for each product, and one more if blocks share an output."""
    others = {
        "expand_fresh": "expand_add",
        "expand_from": "expand_add",
        "gemm_lotr_backward": "gemm_lotr",
    }
    launch_name = others.get(kernel, kernel)
    for shape in [shape for name, shape, _ in CASES if name == kernel]:
        launches = [launch["name"] for launch in count(lib, kernel, shape, "bf16")[1]["launches"]]
        assert launches in ([launch_name], [launch_name, "sum_parts"]), shape
        assert LARGE[kernel] != "y" or launches == [launch_name]


@pytest.mark.parametrize("kernel", ["shrink", "factor_grad", "shrink_grad", "fold_grad"])
def test_every_element_of_a_part_is_written_and_read_once(lib: ModuleType, kernel: str) -> None:
    """The columns that pad a part are written too, because sum_parts loads them."""
    problem = KERNELS[kernel](Shape(2000, 1024, 13), "bf16")
    lib.reset_counters()
    problem.check(problem.run(lib, count_memory=True))
    counters = lib.counters()
    assert "sum_parts" in [launch["name"] for launch in counters["launches"]]
    workspace = counters["arrays"]["workspace"]
    assert workspace["read_bytes"] == workspace["written_bytes"] > 0


def launches_of(lib: ModuleType, kernel: str, shape: Shape) -> list[str]:
    lib.reset_counters()
    KERNELS[kernel](shape, "bf16").run(lib)
    return [launch["name"] for launch in lib.counters()["launches"]]


@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_a_step_of_few_tokens_has_no_more_launches_than_a_folded_one(
    lib: ModuleType, tokens: int
) -> None:
    shape = Shape(tokens, 1024, 16, PACKED, n=1024)
    folded_forward = ["shrink", "fold", "expand_add"]
    folded_backward = ["shrink_grad", "fold_grad", "factor_grad", "expand_add"]
    counts = {}
    for form, forward, backward in (
        ("few tokens", ["small_forward"], ["small_backward"]),
        ("folded", folded_forward, folded_backward),
    ):
        counts[form] = [
            sum(len(launches_of(lib, kernel, shape)) for kernel in kernels)
            for kernels in (forward, backward)
        ]
    assert counts["few tokens"][0] < counts["folded"][0]
    assert counts["few tokens"][1] <= counts["folded"][1]


def test_sorted_rows_read_each_operand_once(lib: ModuleType) -> None:
    """u and h move once, an index is read once, and a core once for each block of 32 rows."""
    rows = 4096
    cores = 8
    r = 16
    rng = np.random.default_rng(0)
    u = rng.standard_normal((rows, r)).astype(np.float32)
    G = rng.standard_normal((cores, r, r)).astype(np.float32)
    lib.set_device(multiprocessors=16)
    lib.set_options(count_memory=True)
    lib.reset_counters()
    index = np.sort(rng.integers(0, cores, rows))
    lib.run("row_core", {"u": u, "cores": G, "h": np.empty_like(u), "index": index})
    arrays = lib.counters()["arrays"]
    assert arrays["u"]["read_bytes"] == arrays["h"]["written_bytes"] == rows * r * 4
    assert arrays["index"]["read_bytes"] == rows * 8
    assert arrays["cores"]["read_bytes"] <= (rows // 32 + cores - 1) * r * r * 4


def main() -> None:
    from csrc.simt import build

    lib = build.load("plain")
    lines = [f"{json.dumps(', '.join(case))}: {json.dumps(count(lib, *case)[0])}" for case in CASES]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
