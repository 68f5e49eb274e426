"""Runs each of the six kernels twice at one size, and no other kernel of ours, for a profiler: python -m bench.gpu.each."""

from __future__ import annotations

import sys

import torch

from ..rivals.operators import KernelCase, make

KERNELS = ("shrink", "expand_add", "factor_grad", "shrink_grad", "fold", "fold_grad")
TIMES = 2
SIZES = {"cuda": (8192, 32, 4096, 16), "cpu": (16, 2, 32, 8)}  # tokens, layers of fold and fold_grad, width, rank


def main(device: str = "cuda") -> int:
    m, layers, n, r = SIZES[device]
    for kernel in KERNELS:
        case = KernelCase(kernel, layers if kernel.startswith("fold") else m, n, r, "bf16", 1)
        operator = make(case, torch.device(device))
        for _ in range(TIMES):
            operator.ours()
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
