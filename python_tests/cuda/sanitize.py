"""A short run of every kernel, ragged, for compute-sanitizer: compute-sanitizer --tool racecheck python sanitize.py

--small: two shapes instead of five, where time is short. Each tensor is an allocation of its own, because memcheck knows
allocations: in a block of torch's allocator it finds no access behind a tensor's end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read at the first allocation

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from test_device import layer, lotr, step

from bench.gpu.fused_checks import gradients
from lotr_ext.ops import UNFOLDED

SHAPES = ((333, 200, 136, 16), (130, 72, 264, 40), (65, 129, 77, 9), (100, 64, 64, 100), (70, 96, 64, 200))


def main(small: bool) -> None:
    """Every operator in every element type; ranks of every compiled size, or two of them where time is short."""
    seed = torch.tensor([3], device="cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for m, k, n, r in SHAPES[1:3] if small else SHAPES:
            t = layer(m, k, n, r, dtype)
            step(t)
            step(t, 0.2, seed)
            cores = torch.randn(3, r, r, device="cuda")
            lotr.fold(t["F"], cores.to(dtype), 0.5, dtype)
            lotr.fold_grad(torch.randn(3, n, r, device="cuda"), t["F"], cores.to(dtype), 0.5, torch.zeros(n, r, device="cuda"))
            core = cores[0].to(dtype)
            weight = torch.randn(n, k, device="cuda").to(dtype)
            _, u, _ = lotr.layer_forward(t["x"], weight, None, t["A"], t["F"], core, 0.5, UNFOLDED)
            dA, dB = torch.zeros(k, r, device="cuda"), torch.zeros(n, r, device="cuda")
            operands = (t["g"], weight, t["x"], u, t["A"], None, t["F"], core, 0.5, UNFOLDED)
            lotr.layer_backward_(*operands, None, None, None, dA, dB, True, True)
    if torch.cuda.get_device_capability() == (9, 0):
        gradients("cuda", "fused")  # gemm_lotr
    torch.cuda.synchronize()


if __name__ == "__main__":
    main("--small" in sys.argv[1:])
