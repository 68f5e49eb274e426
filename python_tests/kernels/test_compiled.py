"""The compiled code of every architecture: no spills, no stack, few enough registers, the instructions that were meant."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from bench.projection.compiled import Compiled
from bench.projection.compiled import compile_kernels as kept_code
from bench.projection.sass import blocks_of
from csrc.simt.build import tool

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(s for s in (ROOT / "csrc" / "cuda").glob("*.cu") if "sm90" not in s.stem)  # those: below
QUICK = ("fold", "rows", "scale_backward", "small")  # make test-full compiles all of them
HOST_ONLY = ("counters", "operators", "plans", "small")  # no kernel
MATRIX = {"bf16": "HMMA.16816.F32.BF16", "fp16": "HMMA.16816.F32", "tf32": "HMMA.1688.F32.TF32", "fp32": "FFMA"}
KERNELS = ("shrink", "expand_add", "factor_grad", "shrink_grad")


NVCC, CUOBJDUMP = tool("nvcc"), tool("cuobjdump")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: the compiled code cannot be looked at")


def architecture_pairs() -> list[tuple[str, str]]:
    return [("compute_80", "sm_80"), ("compute_90a", "sm_90a")]


def more_architectures() -> list[tuple[str, str]]:
    return [("compute_89", "sm_89"), ("compute_100a", "sm_100a"), ("compute_120", "sm_120")]


def compile_kernels(source: Path, pair: tuple[str, str], folder: Path) -> tuple[Path, str]:
    """The cubin, and what ptxas says of it."""
    cubin = folder / f"{source.stem}.{pair[1]}.cubin"
    command = [
        NVCC,
        "-std=c++17",
        "-cubin",
        f"-gencode=arch={pair[0]},code={pair[1]}",
        "-Xptxas",
        "-v",
        str(source),
        "-o",
        str(cubin),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin, done.stderr


def functions(report: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and stack bytes of each kernel, from ptxas."""
    found = {}
    for name, rest in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry function|\Z)", report, re.S):
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", rest).groups()
        )
        found[name] = (int(re.search(r"Used (\d+) registers", rest).group(1)), stores + loads, stack)
    return found


def disassembled(cubin: Path) -> dict[str, str]:
    """The machine code of each kernel, as text."""
    sass = subprocess.run([CUOBJDUMP, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.S))


def kernel_of(mangled: str) -> str:
    names = ("shrink_grad", "factor_grad", "expand_add", "fold_grad", "shrink", "fold", "pack")
    return next(k for k in names if f"{len(k)}{k}" in mangled)


def check(source: Path, pair: tuple[str, str], folder: Path) -> None:
    cubin, report = compile_kernels(source, pair, folder)
    kernels = functions(report)
    if source.stem in HOST_ONLY:
        assert not kernels
        return
    assert kernels, f"{source.name}: ptxas reported no kernel"
    for name, (registers, spilled, stack) in kernels.items():
        assert spilled == 0 and stack == 0, f"{source.stem} {pair[1]} {name}: {spilled} bytes spilled, {stack} bytes of stack"
        assert registers <= 255, name
    kind = source.stem.removeprefix("kernels_")
    if CUOBJDUMP is None or kind not in MATRIX:
        return
    bodies = disassembled(cubin)
    assert {kernel_of(name) for name in bodies} == {*KERNELS, "pack"}
    bodies = {name: body for name, body in bodies.items() if kernel_of(name) != "pack"}  # a copy: it multiplies nothing
    for name, body in bodies.items():
        where = f"{source.stem} {pair[1]} {name}"
        assert MATRIX[kind] in body, f"{where}: no {MATRIX[kind]}"
        assert "LDGSTS.E.BYPASS.128" in body, f"{where}: no 16-byte asynchronous copies"
        assert ("HMMA" in body) == (kind != "fp32"), where
        if kind != "fp32":
            assert "LDSM.16" in body or (kind == "tf32" and kernel_of(name) == "factor_grad"), f"{where}: no ldmatrix"
        if kind in ("bf16", "fp16") and kernel_of(name) != "expand_add":
            assert "LDSM.16.MT88" in body, f"{where}: no transposing ldmatrix"
        assert not re.search(r"\b(LDL|STL)\b", body), f"{where}: local memory"
        assert not re.search(r"\b(ATOMG|RED|ATOM)\S*\.F(16|32|64)", body), f"{where}: float atomics"


@pytest.mark.parametrize("source", [s for s in SOURCES if s.stem in QUICK], ids=lambda s: s.stem)
def test_compiled_code_of_an_a100(source: Path, tmp_path: Path) -> None:
    check(source, ("compute_80", "sm_80"), tmp_path)


GLOBAL = ("LDG", "STG", "LD", "ST", "LDGSTS", "ATOM", "ATOMG", "RED")


def too_early(kernel: Compiled) -> list[str]:
    """What a thread can come to from the kernel's entry without griddepcontrol.wait: global memory, its end, the trigger."""
    blocks, found = blocks_of(kernel.code), []
    seen, todo = set(), [min(blocks)]
    while todo:
        start = todo.pop()
        if start in seen:
            continue
        seen.add(start)
        for i in blocks[start].code:
            if i.name == "ACQBULK":
                break
            if i.name in (*GLOBAL, "EXIT", "PREEXIT"):
                found.append(f"{i.opcode} at {i.address:#x}")
        else:
            todo += blocks[start].next
    return found


@pytest.mark.skipif(tool("nvdisasm") is None, reason="no nvdisasm")
@pytest.mark.parametrize("source", ["bf16", "rows", "scale_backward"])
def test_hopper_kernels_wait_first_and_let_the_next_begin(source: str) -> None:
    for kernel in kept_code(source, "90a").values():
        assert too_early(kernel) == [], kernel.symbol
        names = [i.name for i in kernel.code]
        assert names.count("ACQBULK") == 1 and "PREEXIT" in names, kernel.symbol
        read_only = [i.opcode for i in kernel.code if ".CONSTANT" in i.opcode]  # ld.global.nc, which no wait orders
        assert read_only == [], kernel.symbol


@pytest.mark.full
@pytest.mark.parametrize("pair", architecture_pairs() + more_architectures(), ids=lambda p: p[1])
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_compiled_code(source: Path, pair: tuple[str, str], tmp_path: Path) -> None:
    check(source, pair, tmp_path)


# ---- kernels by wgmma, of sm_90a alone ---------------------------------------------------------------------------------

WGMMA = {  # unit: its kernels (types, ranks, directions, clusters), and the registers that a thread may have at the launch
    "gemm_lotr_sm90": (2 * 4 * 2 * 2, range(168, 169)),  # 65536 / 384 in steps of 8, which setmaxnreg deals out as 40, 232, 232
    "shrink_grad_sm90": (2 * 3, range(168, 169)),
    "one_product_sm90": (2 * 2 * 4, range(153)),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(unit, marks=pytest.mark.full if unit == "gemm_lotr_sm90" else pytest.mark.slow) for unit in WGMMA],
)
def wgmma(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """A unit, its cubin, and what ptxas says of it."""
    source = ROOT / "csrc" / "cuda" / f"{request.param}.cu"
    return request.param, *compile_kernels(source, ("compute_90a", "sm_90a"), tmp_path_factory.mktemp("sm90a"))


def test_registers_of_kernels_by_wgmma(wgmma: tuple[str, Path, str]) -> None:
    unit, _, report = wgmma
    kernels, (count, allowed) = functions(report), WGMMA[unit]
    assert len(kernels) == count
    for name, (registers, spilled, stack) in kernels.items():
        assert registers in allowed and spilled == stack == 0, f"{name}: {registers}, {spilled} spilled, {stack} of stack"
    assert not re.findall(r"C75\d\d|arning", report)  # C75xx: wgmma that ptxas had to serialise


@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
def test_instructions_of_kernels_by_wgmma(wgmma: tuple[str, Path, str]) -> None:
    unit, cubin, _ = wgmma
    bodies = disassembled(cubin)
    assert len(bodies) == WGMMA[unit][0]
    for name, body in bodies.items():
        products = re.findall(r"HGMMA\.(64x\d+x16)\.F32(\.BF16)?", body)
        assert all(bool(bf16) == ("bfloat16" in name) for _, bf16 in products), name
        CHECKS[unit](name, body, [shape for shape, _ in products])
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name}: local memory"
        assert not re.search(r"\b(ATOMG|RED|ATOM)\S*\.F(16|32|64)", body), f"{name}: float atomics"


def product_loops(body: str) -> list[str]:
    """The innermost loops that multiply; not the code at the end of the function where waits that fail go on."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", body)]
    backward = [
        (int(m[1], 16), at) for at, text in lines if (m := re.search(r"\bBRA 0x([0-9a-f]+)", text)) and int(m[1], 16) < at
    ]
    loops = {(start, end): "\n".join(text for at, text in lines if start <= at <= end) for start, end in backward}
    loops = {ends: text for ends, text in loops.items() if "HGMMA" in text}
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [loops[ends] for ends in inner if "SYNCS.PHASECHK" in loops[ends] and "EXIT" not in loops[ends]]


def check_gemm_lotr(name: str, body: str, products: list[str]) -> None:
    found = re.search(r"GemmLotrTraitsI(6__half|13__nv_bfloat16)Li(\d+)ELNS\d?_\w*?DirectionE(\d)ELi(\d)E", name)
    assert found, name
    rank, backward, cluster = int(found[2]), found[3] == "1", int(found[4])
    with_Q = backward and rank == 16
    columns = 256 if rank <= 64 else 128
    # four k-steps of a stage by W, four by A, and the rank by F
    expected = {f"64x{columns}x16": 4 + rank // 16} if rank != columns else {f"64x{columns}x16": 8 + rank // 16}
    if rank != columns:
        expected[f"64x{rank}x16"] = 4
    if with_Q:  # a second kind of scout: two stages by A, and 128 rows of u by one of them
        expected |= {"64x16x16": 4 + 8, "64x64x16": 8}
    assert Counter(products) == expected, name
    assert len(re.findall(r"\bUSETMAXREG", body)) == 2 and "UTMALDG.2D" in body, name
    assert ("MULTICAST" in body) == (cluster == 2), name
    assert len(re.findall(r"\bSTG\.E\.128", body)) == columns // 16 + 8 * with_Q, name
    loops = product_loops(body)  # of a scout and of a tile: no fence in them, nor does a wait empty L1
    assert sorted(loop.count("HGMMA") for loop in loops) == [4, 4] + [16] * with_Q, name
    assert not any(re.search(r"MEMBAR|CCTL|ERRBAR|LDS|STS", loop) for loop in loops), name
    assert [bool(re.search("LDG|STG", loop)) for loop in loops] == [loop.count("HGMMA") == 16 for loop in loops], name


def check_one_product(name: str, body: str, products: list[str]) -> None:
    rank = re.search(r"Li(\d+)E", name).group(1)
    steps = 2 if "factor_grad" in name and rank != "128" else 1
    assert products == [f"64x{rank}x16"] * 4 * steps, name
    places = [found.start() for found in re.finditer("HGMMA", body)]
    between = body[places[0] : places[-1]]
    assert not re.search(r"MEMBAR|CCTL|ERRBAR|STS|\bLDS\b|\bLDG|STG", between), f"{name}: between products"
    copies = re.findall(r"UTMALDG\.2D(\.MULTICAST)?", body)
    assert len(copies) == 1 + max(1, int(rank) // 64) and copies.count(".MULTICAST") == len(copies) - 1, (name, copies)


def check_shrink_grad(name: str, body: str, products: list[str]) -> None:
    rank = re.search(r"Li(\d+)E", name).group(1)
    # four column tiles: 128 columns by 16 for k; 128 rows by 16 for Q^T, u^T from registers; the last row tile by itself
    assert Counter(products) == ({"64x64x16": 128} if rank == "64" else {f"64x{rank}x16": 64, "64x64x16": 64}), name
    places = [found.start() for found in re.finditer("HGMMA", body)]
    halves = body[places[0] : places[63]], body[places[64] : places[-1]]
    for half in halves:
        assert not re.search(r"MEMBAR|CCTL|ERRBAR|STS|\bLDS\b|\bLDG", half), f"{name}: between products"
    stores = [len(re.findall("STG", half)) for half in halves]
    assert min(stores) == 0 < max(stores), f"{name}: sums leave from {stores}, expected the last row tile alone"
    assert "UTMALDG.2D" in body and len(re.findall(r"\bUSETMAXREG", body)) == 2, name


CHECKS = {"gemm_lotr_sm90": check_gemm_lotr, "shrink_grad_sm90": check_shrink_grad, "one_product_sm90": check_one_product}
