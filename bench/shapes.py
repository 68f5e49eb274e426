"""What is measured: shapes (M tokens, K in, N out, r rank), dtypes, thread counts."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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

    def base_flops(self) -> int:
        """Of the frozen layer's forward and dx: two products."""
        return 4 * self.m * self.k * self.n

    def flop_floor(self) -> float:
        """The adapter's six skinny products over the frozen layer's two: 3 r / K where K = N."""
        return 6 * self.m * self.r * (self.k + self.n) / self.base_flops()


# Widths (K, N) of the linear layers of known models, by name for --shapes.
MODELS = {
    "roberta-base": [(768, 768)],
    "roberta-large": [(1024, 1024)],
    "smollm2-135m": [(576, 576), (576, 192), (576, 1536), (1536, 576)],
    "llama-3-8b": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
}

QUICK = [(512, 768, 768, 16), (2048, 768, 768, 16)]
DEFAULT = [
    (1, 768, 768, 16),
    (16, 768, 768, 16),
    (128, 768, 768, 16),
    (512, 768, 768, 16),
    (2048, 768, 768, 16),
    (1024, 2048, 2048, 16),
    (2048, 768, 768, 4),
    (2048, 768, 768, 64),
]
GPU_TOKENS = (1, 16, 128, 512, 2048, 8192, 16384)


def parse_shapes(text: str) -> list[tuple[int, int, int, int]]:
    """ "512x768x768x16,..." or "roberta-base:512:16,..." (model, tokens, rank) as (m, k, n, r)."""
    shapes = []
    for part in text.split(","):
        numbers, model = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", part), re.fullmatch(r"([a-z0-9.-]+):(\d+):(\d+)", part)
        if numbers:
            shapes.append(tuple(int(g) for g in numbers.groups()))
        elif model and model[1] in MODELS:
            shapes += [(int(model[2]), k, n, int(model[3])) for k, n in MODELS[model[1]]]
        else:
            raise ValueError(f"shapes: expected MxKxNxR or MODEL:TOKENS:RANK with MODEL of {', '.join(MODELS)}, got {part!r}")
    for shape in shapes:
        if min(shape) < 1:
            raise ValueError(f"shapes: expected sizes of at least 1, got {'x'.join(map(str, shape))}")
    return shapes
