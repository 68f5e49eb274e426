"""What each kernel's compiled code costs, held against a record: registers, blocks a multiprocessor, spills, instructions.

    python python_tests/kernels/gates.py            what has changed
    python python_tests/kernels/gates.py --record   after kernels were improved: writes compiled.json anew

Instructions are those of the hot loop for each 16 bytes of the large matrix (bench/projection/hot.py); of row_core and its
backward those of a full turn (row_model.py), or of the whole kernel. Blocks are those of the card that the architecture
belongs to. The numbers are one nvcc's: another version has its own.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench.measure.session import progress  # noqa: E402
from bench.projection import counts  # noqa: E402
from bench.projection import row_counts as row_counts  # noqa: E402
from bench.projection.cards import CARDS  # noqa: E402
from bench.projection.compiled import compile_kernels, tools  # noqa: E402
from bench.projection.model import blocks_resident, hot_of  # noqa: E402
from bench.projection.row_model import ELEMENTS, hot_of_rows  # noqa: E402

RECORD = Path(__file__).parent / "compiled.json"
M, N, RANKS = 1024, 1024, (16, 64, 128)
ROWS = "200x2x4x64"  # as bench.traffic's
PAIRS = [("bf16", "h100"), ("bf16", "a100"), ("fp16", "h100"), ("tf32", "h100"), ("fp32", "h100")]  # dtype, card
WORSE = 1.05
Numbers = dict[str, float]


def compiler() -> str:
    """Version of nvcc: 13.0."""
    text = subprocess.run([str(tools()[0]), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise OSError(f"nvcc --version: expected a release, got {text.strip()[-80:]!r}")
    return found[1]


def name_of(dtype: str, card: str, kernel: str, r: int) -> str:
    return f"{kernel}, r = {r}, {dtype}, sm_{CARDS[card].architecture}"


def numbers(dtype: str, card: str) -> dict[str, Numbers]:
    """Of every kernel and rank class of an element type on a card; operators of several launches are those of others."""
    lib, compiled = counts.executor(), compile_kernels(dtype, CARDS[card].architecture)
    found = {}
    for r in RANKS:
        for kernel in counts.KERNELS:
            row = counts.count(lib, kernel, M, N, r, CARDS[card].multiprocessors, dtype)
            if len(row.machine["names"]) > 1:
                continue
            own, hot = hot_of(row, compiled)
            blocks, _ = blocks_resident(own, row.machine["warps"], row.machine["shared"], CARDS[card])
            instructions = hot.instructions / (row.moved / 512)
            found[name_of(dtype, card, kernel, r)] = {
                "registers": own.registers,
                "spilled": own.spilled,
                "blocks": blocks,
                "instructions": round(instructions, 2),
            }
    return found | (numbers_of_rows(lib, card) if dtype == "bf16" else {})


def numbers_of_rows(lib: ModuleType, card: str) -> dict[str, Numbers]:
    """Of row_core and the launches of its backward; its kernels have one instance for all element types."""
    compiled, (case,), found = compile_kernels("rows", CARDS[card].architecture), row_counts.parse(ROWS), {}
    for operator in row_counts.OPERATORS:
        row = row_counts.count(lib, operator, case, CARDS[card].multiprocessors)
        for (name, _), counted in zip(row.launches, row.machine, strict=True):
            own = compiled[counted["symbol"]]
            blocks, _ = blocks_resident(own, counted["warps"], counted["shared"], CARDS[card])
            turns = name in ("row_core", "row_core_grad")
            found[f"{name} in {operator}, sm_{CARDS[card].architecture}"] = {
                "registers": own.registers,
                "spilled": own.spilled,
                "blocks": blocks,
                "instructions": round(hot_of_rows(own, 1, ELEMENTS).instructions) if turns else len(own.code),
            }
    return found


def worse(now: dict[str, Numbers], before: dict[str, Numbers]) -> list[str]:
    """A line for each number that became worse by more than 5 % (blocks, spills: at all), and for kernels without a record."""
    lines = []
    for name, own in now.items():
        kept = before.get(name)
        if kept is None:
            lines.append(f"{name}: no record")
            continue
        for what in ("registers", "instructions"):
            if own[what] > WORSE * kept[what]:
                lines.append(f"{name}: {what} were {kept[what]:g}, are {own[what]:g}")
        if own["spilled"] > kept["spilled"]:
            lines.append(f"{name}: spilled bytes were {kept['spilled']:g}, are {own['spilled']:g}")
        if own["blocks"] < kept["blocks"]:
            lines.append(f"{name}: blocks a multiprocessor were {kept['blocks']:g}, are {own['blocks']:g}")
    return lines


def recorded() -> tuple[str, dict[str, Numbers]]:
    """The compiler and the numbers."""
    kept = json.loads(RECORD.read_text(encoding="utf-8"))
    return kept["nvcc"], kept["kernels"]


def record(pairs: Iterable[tuple[str, str]] = PAIRS) -> dict[str, Numbers]:
    found: dict[str, Numbers] = {}
    with progress(len(list(pairs))) as begin:
        for dtype, card in pairs:
            begin(f"{dtype}, {CARDS[card].name}")
            found |= numbers(dtype, card)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write what is so now")
    options = parser.parse_args()
    now = record()
    version, before = recorded() if RECORD.exists() else ("none", {})
    lines = worse(now, before) if before else [f"{len(now)} kernels, no record"]
    print(*(lines or ["nothing is worse"]), sep="\n")
    better = [
        name for name, own in now.items() if name in before and own["instructions"] < before[name]["instructions"] / WORSE
    ]
    for name in better:
        print(f"{name}: instructions were {before[name]['instructions']:g}, are {now[name]['instructions']:g}")
    if version not in ("none", compiler()):
        print(f"the record is of nvcc {version}, these are of nvcc {compiler()}")
    if options.record:
        temporary = RECORD.with_suffix(".tmp")
        temporary.write_text(json.dumps({"nvcc": compiler(), "kernels": now}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(RECORD)
        print(f"recorded in {RECORD.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"gates: {error}")
