"""Pictures of recorded results: python -m bench.plot [folder or file ..]

Draws layer.png, model.png, experts.png, host.png and tasks.png into the folder of a machine for the
programs that it has results of, and accuracy.png next to accuracy.jsonl. Without arguments it draws
all of bench/results.
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

COLORS = {
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
LAYER_RIVALS = ("lotr_ext", "lotr-eager", "lora-beta", "lora-eager", "lora-peft", "vera-peft")
LAYER_SIZES = ((512, 768, 16), (2048, 768, 16), (1024, 2048, 16), (2048, 768, 64))  # m, k = n, r
MODEL_RIVALS = ("frozen", "vera-peft", "lotr-eager", "lotr_ext")
MOST_BARS = 6


def color(rival: str) -> str:
    """Returns the color of the longest name in COLORS that a rival starts with."""
    names = [name for name in COLORS if rival.startswith(name)]
    return COLORS[max(names, key=len)] if names else "tab:purple"


def finish(figure: Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def bars(
    ax: Axes, frame: pd.DataFrame, labels: Sequence[str], rivals: Sequence[str], value: str
) -> None:
    """A group of bars per label, a bar per rival, with the interval if the value has one."""
    width = 0.8 / len(rivals)
    for i, rival in enumerate(rivals):
        rows = frame[frame["rival"] == rival].drop_duplicates("label")
        rows = rows.set_index("label").reindex(labels)
        position = np.arange(len(labels)) + (i - (len(rivals) - 1) / 2) * width
        height = rows[value]
        error = None
        if f"{value}_low" in rows and rows[f"{value}_low"].notna().any():
            below = (height - rows[f"{value}_low"]).clip(0)
            above = (rows[f"{value}_high"] - height).clip(0)
            error = [below, above]
        style = {"color": color(rival), "label": named(rival), "ecolor": "0.3", "capsize": 2}
        ax.bar(position, height, width * 0.92, yerr=error, **style)
    ax.set_xticks(range(len(labels)), labels, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def one_thread(frame: pd.DataFrame, stage: str = "step") -> pd.DataFrame:
    return frame[(frame["threads"] == frame["threads"].min()) & (frame["stage"] == stage)]


def in_percent(frame: pd.DataFrame) -> pd.DataFrame:
    over = [name for name in frame if name.startswith("over")]
    return frame.assign(**{name: 100 * frame[name] for name in over})


def labeled(frame: pd.DataFrame, label: Callable[[pd.Series], str]) -> pd.DataFrame:
    return frame.assign(label=frame.apply(label, axis=1))


def present(frame: pd.DataFrame, rivals: Sequence[str]) -> list[str]:
    return [name for name in rivals if name in set(frame["rival"])]


def layer(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws the time over the frozen layer by size."""
    frame = in_percent(one_thread(frame))
    is_shown = frame.apply(
        lambda row: row["k"] == row["n"] and (row["m"], row["k"], row["r"]) in LAYER_SIZES, axis=1
    )
    shown = labeled(
        frame[is_shown], lambda row: f"{row['m']} x {row['k']}\nr {row['r']}, {row['dtype']}"
    )
    figure, ax = plt.subplots(figsize=(10, 4))
    bars(ax, shown, list(shown["label"].unique()), present(shown, LAYER_RIVALS), "over")
    ax.set_ylabel("step, % over the frozen layer")
    ax.set_title(f"One adapted layer, 1 thread, {frame['machine'].iloc[0]}", fontsize=10)
    ax.legend(ncols=3, fontsize=8, frameon=False)
    return [finish(figure, folder / "layer.png")]


def model(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws the time of a training step and its peak memory, relative to PEFT's LoRA."""
    frame = labeled(one_thread(frame), lambda row: f"{row['model']}\n{row['dtype']}")
    lora = frame[frame["rival"] == "lora-peft"].set_index("label")
    frame = frame.assign(
        step=frame["seconds"] / frame["label"].map(lora["seconds"]),
        memory=frame["peak_bytes"] / frame["label"].map(lora["peak_bytes"]),
    )
    titles = {"step": "time of a training step", "memory": "peak memory of a step"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for ax, (value, title) in zip(axes, titles.items()):
        bars(ax, frame, list(frame["label"].unique()), present(frame, MODEL_RIVALS), value)
        ax.axhline(1, color=COLORS["lora-peft"], linewidth=1)
        ax.set_title(f"{title}, of LoRA PEFT's (line)", fontsize=10)
        ax.set_ylim(0, 1.5)
    axes[1].legend(fontsize=8, ncols=2, frameon=False)
    figure.suptitle(f"1 thread, {frame['machine'].iloc[0]}", fontsize=10)
    return [finish(figure, folder / "model.png")]


def _over_bars(frame: pd.DataFrame, floor: str, ylabel: str, path: Path) -> list[Path]:
    """Draws one axis: the time of each rival over the floor."""
    frame = in_percent(frame)
    rivals = [name for name in frame["rival"].unique() if name != floor][:MOST_BARS]
    if not rivals:  # a quick run measures one case, which this picture may not show
        return []
    figure, ax = plt.subplots(figsize=(9, 3.8))
    bars(ax, frame, list(frame["label"].unique()), rivals, "over")
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set_ylabel(ylabel)
    ax.set_title(f"1 thread, {frame['machine'].iloc[0]}", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
    return [finish(figure, path)]


def experts(frame: pd.DataFrame, folder: Path) -> list[Path]:
    shown = labeled(
        one_thread(frame),
        lambda row: f"{row['experts']} experts of {row['hidden']} x {row['inner']}\n{row['dtype']}",
    )
    return _over_bars(shown, "frozen", "step, % over the frozen experts", folder / "experts.png")


def host(frame: pd.DataFrame, folder: Path) -> list[Path]:
    shown = labeled(
        one_thread(frame[frame["rival"] != "frozen"]),
        lambda row: f"{row['form']}\n{row['m']} tokens",
    )
    ylabel = "a layer's host time, % over LoTR in three lines"
    return _over_bars(shown, "lotr-eager", ylabel, folder / "host.png")


def tasks(frame: pd.DataFrame, folder: Path) -> list[Path]:
    frame = one_thread(frame, "forward")
    frame = frame[(frame["mode"] == "serve") & (frame["rival"] != "frozen")]
    if frame.empty:
        return []
    shown = labeled(frame, lambda row: f"{row['rows']} rows of {row['tokens']} tokens")
    ylabel = "forward, % over one LoTR adapter"
    return _over_bars(shown, "lotr_ext-one", ylabel, folder / "tasks.png")


def accuracy(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Held-out loss against trained numbers, with the standard error over seeds."""
    shown = ("minilm-movies", "smollm2-kjv", "smollm2-wycliffe", "smollm2-verilog")
    forms = {
        "lotr": ("LoTR", "tab:blue"),
        "lotr-diagonal": ("LoTR, diagonal cores", "tab:cyan"),
        "lotr-block": ("LoTR, by block", "tab:green"),
        "lora": ("LoRA PEFT", "tab:red"),
    }
    figure, axes = plt.subplots(1, len(shown), figsize=(14, 3.6))
    for ax, task in zip(axes, shown):
        points = points_of(frame, task)
        for method, (label, mark) in forms.items():
            members = [p for p in points if p.method == method]
            ax.errorbar(
                [p.parameters for p in members],
                [p.seeds.mean() for p in members],
                [p.seeds.std(ddof=1) / len(p.seeds) ** 0.5 for p in members],
                fmt="o-",
                color=mark,
                label=label,
                markersize=4,
                capsize=2,
                linewidth=1,
            )
        full = [p for p in points if METHODS[p.method].family == "full"]
        if full:
            line = {"color": "0.5", "linestyle": "--", "linewidth": 1}
            ax.axhline(full[0].seeds.mean(), label="full fine-tuning", **line)
        ax.set(xscale="log", title=f"{task}, {TASKS[task].steps} steps", xlabel="trained numbers")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out loss")
    handles = axes[0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 5}
    figure.legend(*handles, **place, fontsize=9, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(folder / "accuracy.png", dpi=110)
    return [folder / "accuracy.png"]


DRAW: dict[str, Callable[[pd.DataFrame, Path], list[Path]]] = {
    function.__name__: function for function in (layer, model, experts, host, tasks, accuracy)
}


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.jsonl"))


def main(argv: list[str]) -> int:
    for word in argv or [str(RESULTS)]:
        for file in files_of(Path(word)):
            if file.stem in DRAW:
                for path in DRAW[file.stem](read(file), file.parent):
                    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
