"""A trial, not the product: gemm_lotr's epilogue as it is (a transposition by shuffles, stores of 16 bytes) beside one through
shared memory with TMA stores, by their compiled code. Compiled for sm_90a, not run; needs nvcc and cuobjdump.

    python python_tests/kernels/epilogue_trial.py

Instructions are of a warp and tile of 128 x 256, from the last product to the branch back. That of the product has a path for
ragged edges and unaligned rows as well; `aligned alone` is without it, so about what runs where all is aligned. TMA stores
cannot do unaligned rows, so a product with them would keep the other path too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from test_compiled import CUOBJDUMP, NVCC, ROOT, compile_kernels, functions

RANKS = (16, 32, 64)
MAIN = """#include "{folder}/kernels/gemm_lotr.cuh"
using namespace lotr;
template __global__ void kernels::gemm_lotr<kernels::GemmLotrTraits<__nv_bfloat16, {rank}, kernels::Direction::forward, 2>>(
    const __grid_constant__ ptx::TensorMap, const __grid_constant__ ptx::TensorMap, const __grid_constant__ ptx::TensorMap,
    const __grid_constant__ ptx::TensorMap, const __grid_constant__ kernels::GemmLotrParams);
"""
# A warp stages its 16 rows of 64 columns as a swizzled tile and stores it; there are PIECES such tiles a warp.
BY_TMA = """template <class Traits>
LOTR_DEVICE void store_tile(const float (&d)[Traits::BN / 2], const typename Traits::T* bias, int m0, int n0,
                            const GemmLotrParams& p) {
  using T = typename Traits::T;
  auto& s = ptx::shared_storage<typename Traits::Smem>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4;
#pragma unroll
  for (int c = 0; c < Traits::BN / 64; ++c) {
    T* piece = s.y[c % Traits::PIECES][warp];
    if (lane == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Traits::PIECES - 1) : "memory");
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float b0, b1;
      unpack<T>(ptx::load_shared(reinterpret_cast<const uint32_t*>(bias + 64 * c + 8 * j + 2 * q)), b0, b1);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = lane / 4 + 8 * h, i = 4 * (8 * c + j) + 2 * h;
        ptx::store_shared(reinterpret_cast<uint32_t*>(piece + row * 64 + (j ^ row % 8) * 8 + 2 * q),
                          pack<T>(d[i] + b0, d[i + 1] + b1));
      }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (lane == 0)
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\\n"
                   "cp.async.bulk.commit_group;" ::"l"(&p.Y), "r"(n0 + 64 * c), "r"(m0 + 16 * warp),
                   "r"(ptx::shared_address(piece)) : "memory");
  }
}

"""
PIECE = 8 * 16 * 64 * 2  # bytes that eight warps stage at a time
COUNTED = ("SHFL", "SEL", "STS", "STG", "UTMASTG", "FENCE", "BAR")
LIMIT = 232448  # of shared memory of a block
BM, DRAINED = 128, 64  # rows of a tile; bytes of it that leave a multiprocessor in a clock, as bench.static assumes


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"the kernel has changed: {old}"
    return text.replace(old, new)


def by_tma(folder: Path, stages: int, pieces: int) -> None:
    rows, traits = (folder / "kernels" / f"gemm_lotr_{name}.cuh" for name in ("rows", "traits"))
    text = rows.read_text()
    start, end = text.index("// d + bias to y, 16 bytes a store"), text.rindex("}  // namespace lotr::kernels")
    rows.write_text(text[:start] + BY_TMA + text[end:])
    text = replaced(traits.read_text(), "int STAGES = 4;", f"int STAGES = {stages}, PIECES = {pieces};")
    text = replaced(text, "  Stage stage[STAGES];", "  Stage stage[STAGES];\n    alignas(1024) T y[PIECES][WARPS][16 * 64];")
    traits.write_text(replaced(text, "  GemmLotrFactor Q;", "  ptx::TensorMap Y;\n  GemmLotrFactor Q;"))


def aligned(folder: Path) -> None:
    rows = folder / "kernels" / "gemm_lotr_rows.cuh"
    rows.write_text(replaced(rows.read_text(), "if (p.y_vector && n + 8 <= p.N) {", "if (true) {"))


VARIANTS = {
    "shuffles": (lambda folder: None, 4, 0),
    "shuffles, aligned alone": (aligned, 4, 0),
    "TMA, 16 KB staged": (lambda folder: by_tma(folder, 4, 1), 4, 1),
    "TMA, 64 KB staged": (lambda folder: by_tma(folder, 3, 4), 3, 4),
}


def shared_bytes(rank: int, stages: int, pieces: int) -> int:
    """Of gemm_lotr_traits.cuh: a stage's x, w and A^T; the rest (bias, mbarriers) fits into its last KB."""
    stage = 2 * 64 * (128 + 256 + rank)
    return stages * stage + pieces * PIECE + 3072


def epilogue(cubin: Path) -> list[str]:
    """Its instructions: from the barrier behind the last product by 256 columns to the branch back."""
    sass = subprocess.run([str(CUOBJDUMP), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    lines = [m[1].strip() for m in re.finditer(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", sass)]
    start = max(i for i, line in enumerate(lines) if "64x256x16" in line)
    start = next(i for i in range(start, len(lines)) if lines[i].startswith("BAR.SYNC"))
    end = next(i for i in range(start, len(lines)) if lines[i].startswith("BRA"))
    return [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in lines[start:end]]


def worth(shuffled: int, staged: int) -> str:
    """What so many fewer instructions are by the model of bench.static, on its first shape."""
    sys.path.insert(0, str(ROOT))
    from bench.projection import fused
    from bench.projection.assumptions import CARDS

    m, k, n, r = fused.SHAPES[0]
    found, card, steps = fused.model(m, k, n, r, "h100"), CARDS["h100"], k // fused.BK
    workers = card.multiprocessors // found.tickets.cluster
    step = found.base_seconds / fused.makespan(found.tickets, workers, steps, 0.0, None)[0] * card.clock
    clocks = [2 * shuffled, max(2 * staged, BM * 256 * 2 // DRAINED)]  # two warps share a scheduler
    saved = (clocks[0] - clocks[1]) / step
    return (
        f"model of an H100, {m} x {k} x {n}: {clocks[0]} clocks of a tile against {clocks[1]}, {saved:.2f} of a k-step of "
        f"{step:.0f} clocks, {saved / (steps + r / fused.BK + fused.EPILOGUE):.1%} of a tile of {steps} k-steps"
    )


def main() -> int:
    """Entry point."""
    if NVCC is None or CUOBJDUMP is None:
        print("epilogue_trial: expected nvcc and cuobjdump, found none")
        return 1
    heads = f"{'rank, epilogue':<30}{'registers':>10}{'spilled':>8}{'stages':>7}{'shared bytes':>13}{'instructions':>13}"
    print(heads, " of these")
    lengths: dict[tuple[int, str], int] = {}
    for rank in RANKS:
        for name, (change, stages, pieces) in VARIANTS.items():
            size = shared_bytes(rank, stages, pieces)
            if size > LIMIT:
                print(f"{f'{rank}, {name}':<30}{'-':>10}{'-':>8}{stages:>7}{size:>13}  does not fit in {LIMIT}")
                continue
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "cuda"
                shutil.copytree(ROOT / "csrc" / "cuda", folder)
                change(folder)
                source = folder / "trial.cu"
                source.write_text(MAIN.format(folder=folder, rank=rank))
                cubin, report = compile_kernels(source, ("compute_90a", "sm_90a"), folder)
                ((registers, spilled, _),) = functions(report).values()
                found = epilogue(cubin)
            count = {op: sum(o.startswith(op) for o in found) for op in COUNTED}
            counts = ", ".join(f"{n} {op}" for op, n in count.items() if n)
            print(f"{f'{rank}, {name}':<30}{registers:>10}{spilled:>8}{stages:>7}{size:>13}{len(found):>13}  {counts}")
            lengths[rank, name] = len(found)
    print(worth(lengths[16, "shuffles, aligned alone"], lengths[16, "TMA, 64 KB staged"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
