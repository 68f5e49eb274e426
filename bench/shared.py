"""The cost of the shared gradient: L layers on one A and B, autograd's own summing against the hub.

    python -m bench.shared                    L = 4, 16, 64 at M x K x N, r = 256 x 768 x 768, 16
    python -m bench.shared --dtype bf16 --layers 8,32

For each L: time of a backward through the stack, bytes allocated in it for gradients of A and B (counted, not sampled), and
the error of dA against float64. Both models have the same tensors; "autograd" computes the three-line formula in torch
operations, so that autograd sums A's and B's gradients itself.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import DTYPES
from .timing import Clock, interleave, quartiles

K, R, TOKENS, SCALING = 768, 16, 256, 1.0


class Stack(nn.Module):
    """x_{l+1} = layer_l(x_l): L adapted layers on one pair of factors, by the hub or by plain formulas."""

    def __init__(self, layers: int, dtype: torch.dtype, hub: bool):
        super().__init__()
        from lotr_ext import LoTRFactors, LoTRLinear

        torch.manual_seed(0)
        self.hub = hub
        self.factors = LoTRFactors(K, K, R, dtype=dtype)
        self.layers = nn.ModuleList(LoTRLinear(K, K, factors=self.factors, dtype=dtype) for _ in range(layers))
        with torch.no_grad():
            for layer in self.layers:
                layer.core.copy_(torch.randn(R, R) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.hub:
            for layer in self.layers:
                x = layer(x)
            return x
        A, B = dict(self.factors.named_parameters())["A"], dict(self.factors.named_parameters())["B"]
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias) + SCALING * (((x @ A) @ layer.core.to(x.dtype)) @ B.T)
        return x


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the new tensors of a factor's shape that a backward makes."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.count, self.bytes = shape, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in out if isinstance(out, tuple) else (out,):
            fresh = isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs
            if fresh and tuple(sorted(t.shape)) == self.shape and t.untyped_storage().nbytes() == t.nbytes:
                self.count += 1
                self.bytes += t.nbytes
        return out


def gradient(stack: Stack, x: Tensor, g: Tensor) -> Tensor:
    stack.zero_grad(set_to_none=True)
    stack(x).backward(g)
    return dict(stack.factors.named_parameters())["A"].grad


def measure(layers: int, dtype: torch.dtype, rounds: int, clock: Clock) -> list[dict]:
    """One result for autograd's summing and one for the hub."""
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(TOKENS, K, generator=generator).to(dtype) for _ in range(2))
    truth = Stack(layers, torch.float64, hub=False)
    stacks = {name: Stack(layers, dtype, hub=name == "hub") for name in ("autograd", "hub")}
    for stack in stacks.values():
        stack.load_state_dict({k: v.to(dtype) if v.is_floating_point() else v for k, v in truth.state_dict().items()})
    truth.load_state_dict({k: v.double() for k, v in stacks["hub"].state_dict().items()})
    expected = gradient(truth, x.double(), g.double())
    results = []
    for name, stack in stacks.items():
        error = ((gradient(stack, x, g).double() - expected).norm() / expected.norm()).item()
        stack.zero_grad(set_to_none=True)
        y = stack(x)
        with Allocations(tuple(sorted((K, R)))) as made:
            y.backward(g)
        results.append({"summing": name, "layers": layers, "error": error, "tensors": made.count, "bytes": made.bytes})
    calls = [lambda stack=stack: gradient(stack, x, g) for stack in stacks.values()]
    for result, times in zip(results, interleave(calls, clock, rounds, 0.0)):
        result["seconds"] = quartiles(times)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.shared", description=__doc__.split("\n")[0])
    parser.add_argument("--layers", default="4,16,64", help="how many layers share the factors (4,16,64)")
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    counts = options.layers.split(",")
    if not all(c.isdigit() and int(c) > 0 for c in counts) or options.rounds < 1 or options.threads < 1:
        raise ValueError("layers, rounds, threads: expected positive numbers, got " + " ".join(sys.argv[1:]))
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(options.threads)
    clock = Clock(torch.device("cpu"), "wall")
    table = Table(title=f"{TOKENS} x {K} x {K}, r = {R}, {options.dtype}, {options.threads} thread(s), forward + backward")
    for column in ("layers", "summing", "time", "tensors of A's or B's shape made in backward", "their bytes", "error of dA"):
        table.add_column(column, justify="left" if column == "summing" else "right")
    for count in counts:
        for r in measure(int(count), DTYPES[options.dtype], options.rounds, clock):
            time = f"{r['seconds'][1] * 1e3:.2f} ms"
            table.add_row(count, r["summing"], time, str(r["tensors"]), f"{r['bytes'] / 2**20:.2f} MiB", f"{r['error']:.1e}")
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"bench.shared: {error}")
