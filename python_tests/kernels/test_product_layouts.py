"""How the operands of every wgmma of every kernel lie in shared memory. What is not in the list below has not been compared
with CuTe's layouts: a new kind needs its line there and in python_tests/simt/programs/cute_layouts.cpp."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gemm_lotr_cases import Case, Inputs, new_workspace

from csrc.simt.checks.cases import factor_grad, filled, shrink, shrink_grad
from csrc.simt.checks.shapes import Shape

K, MN, REGISTERS = (128, False), (128, True), (0, False)  # bytes of the swizzle, whether MN-major
MN16, MN32 = (32, True), (64, True)

# a (64 rows), b, n of the product. Of both element types.
IN_USE = {
    "shrink": [(K, MN16, 16), (K, MN32, 32), (K, MN, 64), (K, MN, 128)],
    "factor_grad": [(MN, MN16, 16), (MN, MN32, 32), (MN, MN, 64), (MN, MN, 128)],
    "shrink_grad": [(K, MN16, 16), (K, MN32, 32), (K, MN, 64), (REGISTERS, MN, 64)],
    "gemm_lotr": [(K, K, n) for n in (16, 32, 64, 128, 256)] + [(REGISTERS, K, 128), (REGISTERS, K, 256)],
    "gemm_lotr backward": [(K, K, n) for n in (16, 32, 64, 128)]
    + [(K, MN, 128), (K, MN, 256), (REGISTERS, K, 128), (REGISTERS, K, 256), (REGISTERS, MN, 64)],
}


def run(lib, kernel: str, kind: str) -> None:
    lib.set_options()
    lib.reset_counters()
    for r in (16, 32, 64, 128):
        if kernel.startswith("gemm_lotr"):
            backward = "backward" in kernel
            case = Case(70, 24, 80, r, kind, backward, factor="new" if backward and r == 16 else "")
            Inputs(case).launch(lib, new_workspace(lib, case.m))
        elif r <= 64 or kernel != "shrink_grad":
            make, sms = {
                "shrink": (shrink, filled(130)),
                "factor_grad": (factor_grad, filled(200)),
                "shrink_grad": (shrink_grad, 36),
            }[kernel]
            shape = Shape(130, 200, r, sms=sms, wgmma=True)
            problem = make(shape, kind)
            problem.check(problem.run(lib))


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("kernel", IN_USE)
def test_layouts_in_use(lib, kernel: str, kind: str) -> None:
    run(lib, kernel, kind)
    found = {((a, a_mn), (b, b_mn), n) for a, a_mn, b, b_mn, n, bf16 in lib.product_layouts() if bf16 == (kind == "bf16")}
    assert found == set(IN_USE[kernel])


def test_those_in_use_are_compared_with_cute() -> None:
    program = (Path(__file__).parents[1] / "simt" / "programs" / "cute_layouts.cpp").read_text()
    compared = {(2 * int(width), True, int(n)) for n, width in re.findall(r"mn_major<T, (\d+), (\d+)>", program)}
    compared |= {(128, False, int(n)) for n in re.findall(r"k_major<T, (\d+)>", program)}
    for kernel, products in IN_USE.items():
        operands = {(*a, 64) for a, _, _ in products if a != REGISTERS} | {(*b, n) for _, b, n in products}
        assert operands <= compared, kernel
