"""What is measured: shapes (M tokens, K in, N out, r rank) of known models' layers, dtypes, thread counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = (1, 16, 128, 512, 2048, 8192, 16384)
RANKS = (4, 16, 64, 256)
GPU_RANKS = (8, 16, 32, 64, 128)
Shape = tuple[int, int, int, int]


class Layer(NamedTuple):
    """Linear layers of one shape in a known model."""

    model: str
    layers: str
    k: int
    n: int
    bias: bool


LAYERS = (
    Layer("roberta-base", "q, v", 768, 768, True),
    Layer("roberta-large", "q, v", 1024, 1024, True),
    Layer("smollm2-135m", "q, o", 576, 576, False),
    Layer("smollm2-135m", "k, v", 576, 192, False),
    Layer("smollm2-135m", "gate, up", 576, 1536, False),
    Layer("smollm2-135m", "down", 1536, 576, False),
    Layer("llama-3-8b", "q, o", 4096, 4096, False),
    Layer("llama-3-8b", "k, v", 4096, 1024, False),
    Layer("llama-3-8b", "gate, up", 4096, 14336, False),
    Layer("llama-3-8b", "down", 14336, 4096, False),
    Layer("qwen3-8b", "gate, up", 4096, 12288, False),  # its q, k, v, o are of llama-3-8b's sizes
    Layer("qwen3-8b", "down", 12288, 4096, False),
)
MODELS = tuple(dict.fromkeys(layer.model for layer in LAYERS))
_BY_WIDTH = {(layer.k, layer.n): layer for layer in LAYERS}


class Case(NamedTuple):
    """One adapted layer, measured by all rivals side by side."""

    m: int
    k: int
    n: int
    r: int
    dtype: str
    threads: int

    def name(self) -> str:
        return f"{self.m}x{self.k}x{self.n} r{self.r} {self.dtype} t{self.threads}"

    def has_bias(self) -> bool:
        """As in the model that the widths are from; widths of no known model have one."""
        layer = _BY_WIDTH.get((self.k, self.n))
        return layer is None or layer.bias

    def base_flops(self) -> int:
        """Of the frozen layer's forward and dx: two products."""
        return 4 * self.m * self.k * self.n

    def extra_flops(self) -> float:
        """The adapter's six skinny products over the frozen layer's two: 3 r / K where K = N. What an adapter costs that
        multiplies at the frozen layer's rate; no bound."""
        return 6 * self.m * self.r * (self.k + self.n) / self.base_flops()


def layer_name(k: int, n: int) -> str:
    """ "llama-3-8b gate, up", or "" for widths of no known model."""
    layer = _BY_WIDTH.get((k, n))
    return f"{layer.model} {layer.layers}" if layer else ""


QUICK = {"cpu": [(512, 768, 768, 16), (2048, 768, 768, 16)], "cuda": [(8192, 4096, 4096, 16)]}
# Where lotr_ext on a CPU is to cost less than anything made of library products (bench.targets); all rivals are timed there.
TARGETS = [(512, 768, 768, 16), (2048, 768, 768, 16), (1024, 2048, 2048, 16), (2048, 768, 768, 64)]


def candidates(device: str) -> list[Shape]:
    """All shapes, those that say most first: the targets, then sweeps of tokens, of ranks, of models, then every other."""
    k, most, ranked = (768, 2048, (768, 768)) if device == "cpu" else (4096, 8192, (4096, 4096))
    order: list[Shape] = list(TARGETS) if device == "cpu" else list(QUICK["cuda"])
    order += [(m, k, k, 16) for m in sorted(TOKENS, key=lambda m: (m > most, m))]
    ranks = RANKS if device == "cpu" else GPU_RANKS
    order += [(most, *ranked, r) for r in ranks]
    models = LAYERS if device == "cpu" else LAYERS[::-1]
    order += [(m, layer.k, layer.n, 16) for m in (512, most) for layer in models]
    rest = [(m, layer.k, layer.n, r) for layer in LAYERS for m in TOKENS for r in ranks]
    order += sorted(rest, key=lambda s: s[0] * s[1] * s[2])
    return list(dict.fromkeys(order))


def within(cases: Iterable[Case], budget_s: float, seconds: Callable[[Case], float]) -> Iterator[Case]:
    """The cases in order, without those that would take the time over budget_s; the first one in any case."""
    spent, first = 0.0, True
    for case in cases:
        cost = seconds(case)
        if first or spent + cost <= budget_s:
            spent, first = spent + cost, False
            yield case


def parse_shapes(text: str) -> list[Shape]:
    """ "512x768x768x16,..." or "roberta-base:512:16,..." (model, tokens, rank) as (m, k, n, r)."""
    shapes = []
    for part in text.split(","):
        numbers, model = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", part), re.fullmatch(r"([a-z0-9.-]+):(\d+):(\d+)", part)
        if numbers:
            shapes.append(tuple(int(g) for g in numbers.groups()))
        elif model and model[1] in MODELS:
            shapes += [(int(model[2]), layer.k, layer.n, int(model[3])) for layer in LAYERS if layer.model == model[1]]
        else:
            raise ValueError(f"shapes: expected MxKxNxR or MODEL:TOKENS:RANK with MODEL of {', '.join(MODELS)}, got {part!r}")
    for shape in shapes:
        if min(shape) < 1:
            raise ValueError(f"shapes: expected sizes of at least 1, got {'x'.join(map(str, shape))}")
    return shapes
