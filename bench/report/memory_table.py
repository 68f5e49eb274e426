"""The counts of bench.memory as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import memory
from .tables import markdown


def page_table(found: Mapping[str, Any]) -> str:
    """Two tables in Markdown."""
    own = [f"p = {p}" for p in memory.PROCESSES]
    rows = [
        [name, form, *(f"{memory.base_bytes(count, form, p) / 2**30:.2f}" for p in memory.PROCESSES)]
        for name, count in found["models"].items()
        for form in memory.FORMATS
    ]
    lines = ["`python -m bench.memory`: GiB of frozen weights in each of p processes:", ""]
    lines += markdown(["model", "adapted weights", *own], rows, text_columns=2)
    rows = []
    for name, count in found["models"].items():
        for p in memory.PROCESSES:
            elements, lora = memory.trained(count, p), memory.trained(count, p, "lora", "lora_experts")
            rows.append([name, str(p), *(f"{n * elements / 2**20:.1f}" for n in (4, 4, 8)), f"{16 * lora / 2**20:.0f}"])
    lines += [
        "",
        f"MiB in each process for training at rank {memory.RANK} in float32 with AdamW, for all formats of the weights. LoRA's "
        "pairs of linear layers are replicated too:",
        "",
    ]
    heads = ["model", "p", "adapter", "gradients", "optimizer", "all three for LoRA"]
    return "\n".join(lines + markdown(heads, rows, text_columns=2))
