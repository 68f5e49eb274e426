"""Pictures of recorded results: python -m bench.plot [folder ..]

Draws layer.png into the folder of a machine, and accuracy.png next to accuracy.jsonl. Without
arguments it draws the pictures of bench/results.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .accuracy import points_of
from .common import RESULTS, named, read
from .problems import METHODS, TASKS

# What layer.png shows, with its color.
RIVALS = {
    "lotr_ext": "tab:blue",
    "lotr-eager": "0.6",
    "lora-beta": "tab:olive",
    "lora-eager": "tab:orange",
    "lora-peft": "tab:red",
    "vera-peft": "tab:pink",
}
# What accuracy.png shows: method, name, color.
CURVES = (
    ("lotr", "LoTR", "tab:blue"),
    ("lotr-diagonal", "LoTR, diagonal cores", "tab:cyan"),
    ("lotr-block", "LoTR, by block", "tab:green"),
    ("lora", "LoRA PEFT", "tab:red"),
)
ACCURACY_TASKS = ("minilm-movies", "smollm2-kjv", "smollm2-wycliffe", "smollm2-verilog")


def layer(rows: pd.DataFrame, path: Path) -> None:
    """Draws the time over the frozen layer: a group of bars per case of at least 512 tokens.

    Of several thread counts it shows the lowest.
    """
    threads = rows["threads"].min()
    shown = rows.query("threads == @threads and stage == 'step' and m >= 512")
    labels = ["{m} x {k} x {n}\nr {r}, {dtype}".format(**row) for row in shown.to_dict("records")]
    by_rival = shown.assign(label=labels).pivot(
        index="label", columns="rival", values=["over", "over_low", "over_high"]
    )
    percent = 100 * by_rival.loc[list(dict.fromkeys(labels))]  # cases in the order of the file
    rivals = [rival for rival in RIVALS if rival in percent["over"]]
    if not rivals:  # a quick run measures one case, which this picture may not show
        return
    height, low, high = (percent[column][rivals] for column in ("over", "over_low", "over_high"))
    figure, ax = plt.subplots(figsize=(10, 4), layout="constrained")
    height.rename(columns=named).plot.bar(
        ax=ax,
        yerr=np.stack([(height - low).T, (high - height).T], axis=1).clip(0),  # [rivals, 2, labels]
        color=[RIVALS[rival] for rival in rivals],
        width=0.8,
        rot=0,
        fontsize=8,
        capsize=2,
    )
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set(xlabel="", ylabel="step, % over the frozen layer")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(ncols=2, fontsize=8, frameon=False)
    figure.suptitle(
        f"One adapted layer, threads: {threads}, {rows['machine'].iloc[0]}", fontsize=10
    )
    figure.savefig(path, dpi=110)


def accuracy(rows: pd.DataFrame, path: Path) -> None:
    """Draws held-out loss against trained parameters, with the standard error over seeds."""
    figure, axes = plt.subplots(1, len(ACCURACY_TASKS), figsize=(14, 3.6), layout="constrained")
    for ax, task in zip(axes, ACCURACY_TASKS, strict=True):
        points = points_of(rows, task)
        for method, label, color in CURVES:
            members = [point for point in points if point.method == method]
            ax.errorbar(
                [point.parameters for point in members],
                [point.seeds.mean() for point in members],
                [point.seeds.std(ddof=1) / len(point.seeds) ** 0.5 for point in members],
                fmt="o-",
                color=color,
                label=label,
                markersize=4,
                capsize=2,
                linewidth=1,
            )
        full = [point for point in points if METHODS[point.method].family == "full"]
        if full:
            ax.axhline(
                full[0].seeds.mean(),
                label="full fine-tuning",
                color="0.5",
                linestyle="--",
                linewidth=1,
            )
        ax.set(
            xscale="log",
            title=f"{task}, {TASKS[task].steps} steps",
            xlabel="trained parameters",
        )
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out loss")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path, dpi=110)


def main(words: list[str]) -> int:
    for folder in words or [str(RESULTS)]:
        for program, draw in {"layer": layer, "accuracy": accuracy}.items():
            for file in Path(folder).rglob(f"{program}.jsonl"):
                draw(read(file), file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
