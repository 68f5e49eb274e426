"""Pictures of kept results: python -m bench.plot [folder or file ..]

Draws layer.png, model.png, experts.png, host.png and tasks.png in a machine's folder, of the programs that it has
results of, and accuracy.png beside accuracy.jsonl. Without arguments: all of bench/results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .accuracy import points_of
from .common import RESULTS, named, read
from .problems import METHODS, TASKS

COLOURS = {
    "lotr_ext": "tab:blue",
    "lotr_ext-model": "lightskyblue",
    "lotr_ext-token": "lightskyblue",
    "lotr_ext-half": "tab:cyan",
    "lotr-eager": "0.6",
    "lora-eager": "tab:orange",
    "lora-in-place": "tab:green",
    "lora-beta": "tab:olive",
    "lora-peft": "tab:red",
    "lora-peft-one": "lightcoral",
    "lora-grouped": "tab:brown",
    "vera-peft": "tab:pink",
    "frozen": "0.85",
}
SHOWN = ("lotr_ext", "lotr-eager", "lora-beta", "lora-eager", "lora-peft", "vera-peft")


def colour(rival: str) -> str:
    return next(
        (
            COLOURS[name]
            for name in sorted(COLOURS, key=len, reverse=True)
            if rival.startswith(name)
        ),
        "tab:purple",
    )


def finish(figure: Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def bars(
    ax: Axes, frame: pd.DataFrame, labels: Sequence[str], rivals: Sequence[str], value: str
) -> None:
    """Groups of bars: a group a label, a bar a rival, with the interval where the value has one."""
    width = 0.8 / len(rivals)
    for i, rival in enumerate(rivals):
        own = (
            frame[frame["rival"] == rival]
            .drop_duplicates("label")
            .set_index("label")
            .reindex(labels)
        )
        at, height = np.arange(len(labels)) + (i - (len(rivals) - 1) / 2) * width, own[value]
        error = None
        if f"{value}_low" in own and own[f"{value}_low"].notna().any():
            error = [
                (height - own[f"{value}_low"]).clip(0),
                (own[f"{value}_high"] - height).clip(0),
            ]
        ax.bar(
            at,
            height,
            width * 0.92,
            yerr=error,
            color=colour(rival),
            label=named(rival),
            ecolor="0.3",
            capsize=2,
        )
    ax.set_xticks(range(len(labels)), labels, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def one_thread(frame: pd.DataFrame, stage: str = "step") -> pd.DataFrame:
    return frame[(frame["threads"] == frame["threads"].min()) & (frame["stage"] == stage)]


def layer(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """The time over the frozen layer by size."""
    frame = one_thread(frame)
    frame = frame.assign(**{name: 100 * frame[name] for name in frame if name.startswith("over")})
    sizes = [(512, 768, 16), (2048, 768, 16), (1024, 2048, 16), (2048, 768, 64)]
    kept = frame[
        frame.apply(
            lambda row: (row["m"], row["k"], row["r"]) in sizes and row["k"] == row["n"], axis=1
        )
    ]
    kept = kept.assign(
        label=kept.apply(
            lambda row: f"{row['m']} x {row['k']}\nr {row['r']}, {row['dtype']}", axis=1
        )
    )
    rivals = [name for name in SHOWN if name in set(kept["rival"])]
    figure, ax = plt.subplots(figsize=(10, 4))
    bars(ax, kept, list(kept["label"].unique()), rivals, "over")
    ax.set_ylabel("step, % over the frozen layer")
    ax.set_title(f"One adapted layer, 1 thread, {frame['machine'].iloc[0]}", fontsize=10)
    ax.legend(ncols=3, fontsize=8, frameon=False)
    return [finish(figure, folder / "layer.png")]


def model(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """The time of a training step and its peak memory, over those with PEFT's LoRA."""
    frame = one_thread(frame)
    frame = frame.assign(label=frame["model"] + "\n" + frame["dtype"])
    base = frame[frame["rival"] == "lora-peft"].set_index("label")
    frame = frame.assign(
        step=frame["seconds"] / frame["label"].map(base["seconds"]),
        memory=frame["peak_bytes"] / frame["label"].map(base["peak_bytes"]),
    )
    rivals = [
        name
        for name in ("frozen", "vera-peft", "lotr-eager", "lotr_ext")
        if name in set(frame["rival"])
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for ax, value, title in zip(
        axes, ("step", "memory"), ("time of a training step", "peak memory of a step")
    ):
        bars(ax, frame, list(frame["label"].unique()), rivals, value)
        ax.axhline(1, color=COLOURS["lora-peft"], linewidth=1)
        ax.set_title(f"{title}, of LoRA PEFT's (line)", fontsize=10)
        ax.set_ylim(0, 1.5)
    axes[1].legend(fontsize=8, ncols=2, frameon=False)
    figure.suptitle(f"1 thread, {frame['machine'].iloc[0]}", fontsize=10)
    return [finish(figure, folder / "model.png")]


def _over_bars(
    frame: pd.DataFrame, floor: str, labels: pd.Series, words: str, path: Path
) -> list[Path]:
    frame = frame.assign(
        label=labels, **{name: 100 * frame[name] for name in frame if name.startswith("over")}
    )
    rivals = [name for name in frame["rival"].unique() if name != floor][:6]
    if not rivals:  # a quick run measures one case, which this picture may not show
        return []
    figure, ax = plt.subplots(figsize=(9, 3.8))
    bars(ax, frame, list(frame["label"].unique()), rivals, "over")
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set_ylabel(words)
    ax.set_title(f"1 thread, {frame['machine'].iloc[0]}", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
    return [finish(figure, path)]


def experts(frame: pd.DataFrame, folder: Path) -> list[Path]:
    frame = one_thread(frame)
    labels = frame.apply(
        lambda f: f"{f['experts']} experts of {f['hidden']} x {f['inner']}\n{f['dtype']}", axis=1
    )
    return _over_bars(
        frame, "frozen", labels, "step, % over the frozen experts", folder / "experts.png"
    )


def host(frame: pd.DataFrame, folder: Path) -> list[Path]:
    frame = one_thread(frame[frame["rival"] != "frozen"])
    labels = frame.apply(lambda f: f"{f['form']}\n{f['m']} tokens", axis=1)
    return _over_bars(
        frame,
        "lotr-eager",
        labels,
        "a layer's host time, % over LoTR in three lines",
        folder / "host.png",
    )


def tasks(frame: pd.DataFrame, folder: Path) -> list[Path]:
    frame = one_thread(frame, "forward")
    frame = frame[(frame["mode"] == "serve") & (frame["rival"] != "frozen")]
    labels = frame.apply(lambda f: f"{f['rows']} rows of {f['tokens']} tokens", axis=1)
    return _over_bars(
        frame, "lotr_ext-one", labels, "forward, % over one LoTR adapter", folder / "tasks.png"
    )


def accuracy(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Held-out loss against trained numbers, with the standard error over seeds."""
    shown = ("minilm-movies", "smollm2-kjv", "smollm2-wycliffe", "smollm2-verilog")
    forms = {
        "lotr": "LoTR",
        "lotr-diagonal": "LoTR, diagonal cores",
        "lotr-block": "LoTR, by block",
        "lora": "LoRA PEFT",
    }
    colours = ("tab:blue", "tab:cyan", "tab:green", "tab:red")
    figure, axes = plt.subplots(1, len(shown), figsize=(14, 3.6))
    for ax, task in zip(axes, shown):
        points = points_of(frame, task)
        for (method, label), mark in zip(forms.items(), colours):
            own = [p for p in points if p.method == method]
            error = [p.seeds.std(ddof=1) / len(p.seeds) ** 0.5 for p in own]
            at, loss = [p.parameters for p in own], [p.seeds.mean() for p in own]
            ax.errorbar(
                at,
                loss,
                error,
                fmt="o-",
                color=mark,
                label=label,
                markersize=4,
                capsize=2,
                linewidth=1,
            )
        if full := [p for p in points if METHODS[p.method].family == "full"]:
            ax.axhline(
                full[0].seeds.mean(),
                color="0.5",
                linestyle="--",
                linewidth=1,
                label="full fine-tuning",
            )
        ax.set(xscale="log", title=f"{task}, {TASKS[task].steps} steps", xlabel="trained numbers")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out loss")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize=9,
        frameon=False,
    )
    figure.set_layout_engine("constrained")
    figure.savefig(folder / "accuracy.png", dpi=110)
    return [folder / "accuracy.png"]


DRAW: dict[str, Callable[[pd.DataFrame, Path], list[Path]]] = {
    function.__name__: function for function in (layer, model, experts, host, tasks, accuracy)
}


def main(argv: list[str]) -> int:
    files = [
        file
        for word in argv or [RESULTS]
        for file in ([Path(word)] if Path(word).is_file() else Path(word).rglob("*.jsonl"))
    ]
    for file in files:
        if file.stem in DRAW:
            for path in DRAW[file.stem](read(file), file.parent):
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
