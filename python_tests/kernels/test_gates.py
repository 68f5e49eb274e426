"""The kernels' compiled code is not worse than what was recorded (gates.py says what, and how to record anew)."""

from __future__ import annotations

import gates
import pytest

from csrc.simt.build import tool

pytestmark = pytest.mark.skipif(
    tool("nvcc") is None or tool("nvdisasm") is None, reason="no nvcc or no nvdisasm: nothing to look at"
)


def check(dtype: str, card: str) -> None:
    version, kept = gates.recorded()
    if version != gates.compiler():
        pytest.skip(f"recorded with nvcc {version}, here is {gates.compiler()}: other numbers")
    now = gates.numbers(dtype, card)
    lines = gates.worse(now, kept)
    again = "python python_tests/kernels/gates.py --record, if it has to be"
    assert now and not lines, "\n".join([*lines, again])


@pytest.mark.slow
def test_bf16_on_an_h100() -> None:
    check("bf16", "h100")


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "card"), [pair for pair in gates.PAIRS if pair != ("bf16", "h100")])
def test_the_others(dtype: str, card: str) -> None:
    check(dtype, card)


def test_what_is_worse_is_named() -> None:
    kept = {"a": {"registers": 100, "spilled": 0, "blocks": 2, "instructions": 40.0}}

    def lines(**changes: float) -> list[str]:
        return gates.worse({"a": kept["a"] | changes}, kept)

    assert lines() == [] and lines(registers=105, instructions=42.0, blocks=3) == []
    assert lines(registers=106) == ["a: registers were 100, are 106"]
    assert lines(instructions=42.1) == ["a: instructions were 40, are 42.1"]
    assert lines(spilled=4) == ["a: spilled bytes were 0, are 4"]
    assert lines(blocks=1) == ["a: blocks a multiprocessor were 2, are 1"]
    assert gates.worse({"b": kept["a"]}, kept) == ["b: no record"]
