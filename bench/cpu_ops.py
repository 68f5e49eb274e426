"""The CPU operators of one adapted layer against the products of eager LoRA, both as time beyond the frozen base layer.

    python -m bench.cpu_ops [--threads 1] [--dtypes float32 bfloat16] [--shapes 2048,768,768,16 ...] [--ops]

Every round runs the base layer, LoRA and LoTR once, one after the other in one process; the table holds medians.

    base   y = x W^T + b                                    dx = g W
    LoRA   y = base + s (x A) B^T, s scales [M, N]            the products autograd would run: dB, dh, dA, dx
    LoTR   shrink, fold, expand_add_                        shrink_grad, expand_add_, factor_grad_, fold_grad
           few tokens (M <= 32): small_forward_             small_backward_

floor: the adapter's multiplications over the base's, 3 r / K. With --ops each operator alone, in GFLOP/s.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lotr_ext import _C  # noqa: F401  (registers the operators)

SHAPES = ["1,768,768,16", "16,768,768,16", "512,768,768,16", "2048,768,768,16", "1024,2048,2048,16", "2048,768,768,64"]
FEW_TOKENS = 32
SCALING = 0.5
ops = torch.ops.lotr


def interleaved(
    variants: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Times of every variant, taken in turns for about `seconds`."""
    for run in variants.values():
        run(), run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, run in variants.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return times


class Layer:
    """One layer's tensors and the three ways to run it forward and backward."""

    def __init__(self, m: int, k: int, n: int, r: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.shape = (m, k, n, r)
        self.x, self.g = torch.randn(m, k, dtype=dtype), torch.randn(m, n, dtype=dtype)
        self.W, self.bias = torch.randn(n, k, dtype=dtype) / k**0.5, torch.zeros(n, dtype=dtype)
        self.A, self.B = torch.randn(k, r, dtype=dtype) / k**0.5, torch.randn(n, r, dtype=dtype) / r**0.5
        self.core = torch.randn(r, r, dtype=dtype) / r**0.5
        self.cores = self.core.unsqueeze(0)
        self.lora_A, self.lora_B = self.A.t().contiguous(), self.B
        self.dA, self.dB = torch.zeros(k, r), torch.zeros(n, r)

    def base(self):
        y = F.linear(self.x, self.W, self.bias)
        return y, self.g @ self.W

    def lora(self):
        h = F.linear(self.x, self.lora_A)
        y = F.linear(self.x, self.W, self.bias) + SCALING * F.linear(h, self.lora_B)
        g = self.g * SCALING
        dB, dh = g.t() @ h, g @ self.lora_B
        dA = dh.t() @ self.x
        return y, self.g @ self.W + dh @ self.lora_A, dA, dB

    def lotr(self):
        y = F.linear(self.x, self.W, self.bias)
        if self.shape[0] <= FEW_TOKENS:
            u = ops.small_forward_(y, self.x, self.A, self.core, self.B, SCALING)
            dx = self.g @ self.W
            dG = ops.small_backward_(dx, self.g, self.x, u, self.A, self.core, self.B, SCALING, self.dA, self.dB, True)
            return y, dx, dG
        u = ops.shrink(self.x, self.A)
        folded = ops.fold(self.B, self.cores, SCALING, self.x.dtype)[0]
        ops.expand_add_(y, u, folded)
        dx = self.g @ self.W
        k, Q = ops.shrink_grad(self.g, folded, u)
        ops.expand_add_(dx, k, self.A)
        ops.factor_grad_(self.dA, self.x, k)
        dG = ops.fold_grad(Q.unsqueeze(0), self.B, self.cores, SCALING, self.dB)
        return y, dx, dG

    def single(self) -> dict[str, tuple[float, Callable[[], object]]]:
        """Each operator by itself: multiply-adds and call."""
        m, k, n, r = self.shape
        u, y, dx = ops.shrink(self.x, self.A), self.g.clone(), self.x.clone()
        Q = torch.randn(1, n, r)
        return {
            "shrink": (m * k * r, lambda: ops.shrink(self.x, self.A)),
            "expand_add_ y": (m * n * r, lambda: ops.expand_add_(y, u, self.B)),
            "shrink_grad": (2 * m * n * r, lambda: ops.shrink_grad(self.g, self.B, u)),
            "expand_add_ dx": (m * k * r, lambda: ops.expand_add_(dx, u, self.A)),
            "factor_grad_": (m * k * r, lambda: ops.factor_grad_(self.dA, self.x, u)),
            "fold": (n * r * r, lambda: ops.fold(self.B, self.cores, SCALING, self.x.dtype)),
            "fold_grad": (2 * n * r * r, lambda: ops.fold_grad(Q, self.B, self.cores, SCALING, self.dB)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="M,K,N,R")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    parser.add_argument("--ops", action="store_true", help="each operator alone")
    parser.add_argument(
        "--cpu-clock", action="store_true", help="CPU time instead of wall time: steadier on a busy machine, one thread only"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cpu_clock and args.threads != 1:
        parser.error("--cpu-clock: expected --threads 1, because waiting threads count")
    clock = time.process_time if args.cpu_clock else time.perf_counter
    print(ops.info(), f"torch {torch.__version__}, {args.threads} thread(s)")
    for dtype in args.dtypes:
        if not args.ops:
            header = f"{'LoRA':>8} {'LoTR':>8} {'of LoRA':>8} {'floor':>7} {'of floor':>8}"
            print(f"\n{dtype:9} {'M,K,N,r':>20} {'base us':>9} {header}")
        for text in args.shapes:
            m, k, n, r = (int(part) for part in text.split(","))
            layer = Layer(m, k, n, r, getattr(torch, dtype))
            if args.ops:
                single = layer.single()
                times = interleaved(
                    {"base": layer.base} | {name: run for name, (_, run) in single.items()}, args.seconds, clock
                )
                base = statistics.median(times["base"])
                print(f"\n{dtype} {text}: base {base * 1e6:.0f} us, {2 * m * n * k / base / 1e9 * 2:.0f} GFLOP/s")
                for name, (madds, _) in single.items():
                    t = statistics.median(times[name])
                    print(f"  {name:15} {t * 1e6:9.1f} us {2 * madds / t / 1e9:8.1f} GFLOP/s {t / base:7.2%} of base")
                continue
            times = interleaved({"base": layer.base, "LoRA": layer.lora, "LoTR": layer.lotr}, args.seconds, clock)
            base, lora, lotr = (statistics.median(times[name]) for name in ("base", "LoRA", "LoTR"))
            lora, lotr, floor = lora / base - 1, lotr / base - 1, 1.5 * r * (k + n) / (k * n)
            row = f"{lora:8.1%} {lotr:8.1%} {lotr / lora:7.2f}x {floor:7.2%} {lotr / floor:7.2f}x"
            print(f"{'':9} {text:>20} {base * 1e6:9.1f} {row}")


if __name__ == "__main__":
    main()
