"""The picture of the results of bench.serving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..measure.names import COLOURS
from ..pictures.figures import save
from .table import DECODE, LABELS, PREFILL

WAYS = {"native": COLOURS["lotr_ext"], "own": "tab:cyan", "lora": COLOURS["lora-eager"], "peft": COLOURS["lora-peft"]}


def draw_serving(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """For one run: relative throughput against the number of tasks in the batch."""
    return save({"serving": _kept(results)}, folder, dpi=120)


def _kept(results: Mapping[str, Any]) -> Figure:
    shape, counts = results["shape"], [str(n) for n in results["shape"]["counts"]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained", sharey=True)
    for axis, part, target in zip(axes, ("decode", "prefill"), (DECODE, PREFILL)):
        for way, colour in WAYS.items():
            own = results["retention"].get(way, {})
            known = [n for n in counts if "retention" in own.get(n, {}).get(part, {})]
            values = [100 * own[n][part]["retention"] for n in known]
            if known:
                axis.plot([counts.index(n) for n in known], values, marker="o", color=colour, label=LABELS[way])
        axis.axhline(100, color="grey", linestyle="--", linewidth=1)
        axis.axhline(100 * target, color=WAYS["native"], linestyle=":", linewidth=1, label="target for the plugin")
        axis.set_xticks(range(len(counts)), [f"{int(n):,}" for n in counts])
        axis.set_xlabel(f"tasks that {shape['rows']} rows take turns with")
        axis.set_title(part)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.05 * max(100, axes[0].dataLim.y1, axes[1].dataLim.y1))
    axes[0].set_ylabel("throughput kept, % of the batch without adapters")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(f"{shape['model']}, r = {shape['rank']}, {results['machine']['name']}", fontsize=10)
    return figure
