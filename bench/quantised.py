"""Quantised linear layers in training: one layer over the dequantised weight, against the base's own forward plus the adapter.

    PYTHONPATH=.venv/quantized python -m bench.quantised --tokens 16,512,1024,2048

CPU seconds of one thread for forward and backward of one layer, 768 x 768 and rank 16: medians over interleaved rounds, and the
quartiles of the ratio in a round. `lotr_ext.layers.quantized` has the numbers of tokens from which it runs one layer.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable
from statistics import quantiles

import torch
from torch import nn

from .measure.names import chosen, numbers
from .measure.session import Table, start, time_text
from .measure.shapes import DTYPES


def _nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(linear.in_features, linear.out_features, compute_dtype=linear.weight.dtype, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _torchao(name: str) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        from torchao import quantization as q

        int4 = {"weight_dtype": torch.int4, "granularity": q.granularity.PerGroup(32)}
        config = q.IntxWeightOnlyConfig(**int4) if name == "int4" else getattr(q, f"{name}WeightOnlyConfig")()
        net = nn.Sequential(linear)
        q.quantize_(net, config)
        return net[0]

    return make


FORMATS = {"nf4": _nf4, "int8": _torchao("Int8"), "int4": _torchao("int4"), "fp8": _torchao("Float8")}


def measure(base: nn.Module, tokens: int, dtype: torch.dtype, rounds: int) -> list[list[float]]:
    """Seconds of each round of the base's own forward with the adapter, and of one layer."""
    from lotr_ext import LoTRFactors, LoTRWrapped
    from lotr_ext.layers import quantized, wrapped

    k, n = base.in_features, base.out_features
    layer = LoTRWrapped.from_linear(base, LoTRFactors(k, n, 16))
    nn.init.normal_(layer.core, 0, 0.1)
    x, g = torch.randn(tokens, k, dtype=dtype, requires_grad=True), torch.randn(tokens, n, dtype=dtype)
    ways = (lambda *_: None, quantized.one_layer)
    least, chosen = copy.copy(quantized._ONE_LAYER), wrapped.one_layer
    quantized._ONE_LAYER.update(dict.fromkeys(least, 0))
    times: list[list[float]] = [[], []]
    try:
        for _ in range(rounds + 1):
            for way, own in zip(ways, times):
                wrapped.one_layer = way
                begin = time.thread_time()
                layer(x).backward(g)
                own.append(time.thread_time() - begin)
    finally:
        wrapped.one_layer = chosen
        quantized._ONE_LAYER.update(least)
    return [own[1:] for own in times]  # the first round is warm-up


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quantised", description=__doc__.split("\n")[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"some of {','.join(FORMATS)} (all)")
    parser.add_argument("--tokens", default="16,512,1024,2048", help="counts of tokens (16,512,1024,2048)")
    parser.add_argument("--dtypes", default="bf16,fp32", help="some of fp32, bf16, fp16 (bf16,fp32)")
    parser.add_argument("--rounds", type=int, default=21, help="rounds (21)")
    options = parser.parse_args(argv)
    formats, dtypes = chosen("formats", options.formats, FORMATS), chosen("dtypes", options.dtypes, DTYPES)
    counts = numbers("tokens", options.tokens, ())
    missing = [name for name in ("torchao", "bitsandbytes") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"PYTHONPATH: expected {' and '.join(missing)}; make setup puts them into .venv/quantized")
    torch.set_num_threads(1)
    table = Table("one layer, 768x768 r16", "format", "dtype", "tokens", "base and adapter", "one layer", "ratio (quartiles)")
    for name in formats:
        for dtype in dtypes:
            for tokens in counts:
                torch.manual_seed(0)
                linear = nn.Linear(768, 768).to(DTYPES[dtype]).requires_grad_(False)
                two, one = measure(FORMATS[name](linear), tokens, DTYPES[dtype], options.rounds)
                low, mid, high = quantiles([b / a for a, b in zip(two, one)], n=4)
                times = (time_text(quantiles(own, n=4)[1]) for own in (two, one))
                table.add_row(name, dtype, str(tokens), *times, f"{mid:.2f} ({low:.2f} to {high:.2f})")
    print(table)
    return 0


if __name__ == "__main__":
    start("bench.quantised", main)
