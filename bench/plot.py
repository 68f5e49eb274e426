"""Pictures of recorded results: python -m bench.plot [folder or file ..]

Draws layer.png, model.png, experts.png, host.png and tasks.png into the folder of a machine for the
programs that it has results of, and accuracy.png next to accuracy.jsonl. Without arguments it draws
all of bench/results.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

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
MODEL_RIVALS = ("frozen", "vera-peft", "lotr-eager", "lotr_ext")
MOST_BARS = 6


class Bars(NamedTuple):
    """A picture with a group of bars per case: the time of rivals over the floor's.

    Attributes:
        floor: The rival that the others are compared with.
        ylabel: What the bars show.
        label: Under a group, as a format of a row.
        rows: Which rows are shown, as a query of pandas.
        rivals: Which rivals are shown, by default the first MOST_BARS.
    """

    floor: str
    ylabel: str
    label: str
    rows: str = "stage == 'step'"
    rivals: Sequence[str] = ()


BARS = {
    "layer": Bars(
        "frozen",
        "one layer, % over the frozen one",
        "{m} x {k}\nr {r}, {dtype}",
        "stage == 'step' and k == n and m >= 512",
        LAYER_RIVALS,
    ),
    "experts": Bars(
        "frozen",
        "step, % over the frozen experts",
        "{experts} experts of {hidden} x {inner}\n{dtype}",
    ),
    "host": Bars(
        "lotr-eager",
        "a layer's host time, % over LoTR in three lines",
        "{form}\n{m} tokens",
        "stage == 'step' and rival != 'frozen'",
    ),
    "tasks": Bars(
        "lotr_ext-one",
        "forward, % over one LoTR adapter",
        "{rows} rows of {tokens} tokens",
        "stage == 'forward' and mode == 'serve' and rival != 'frozen'",
    ),
}


def color(rival: str) -> str:
    """Returns the color of the longest name in COLORS that a rival starts with."""
    names = [name for name in COLORS if rival.startswith(name)]
    return COLORS[max(names, key=len)] if names else "tab:purple"


def finish(figure: Figure, frame: pd.DataFrame, path: Path) -> list[Path]:
    figure.suptitle(f"1 thread, {frame['machine'].iloc[0]}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def labeled(frame: pd.DataFrame, label: str, rows: str = "stage == 'step'") -> pd.DataFrame:
    """Returns the rows of a query with the fewest threads, each with its label."""
    shown = frame[frame["threads"] == frame["threads"].min()].query(rows)
    return shown.assign(label=[label.format(**row) for row in shown.to_dict("records")])


def bars(ax: Axes, frame: pd.DataFrame, rivals: Sequence[str], value: str) -> None:
    """A group of bars per label, a bar per rival, with the interval if the value has one."""
    wide = frame.drop_duplicates(["label", "rival"]).pivot(index="label", columns="rival")
    wide = wide.loc[frame["label"].unique()]
    height = wide[value][rivals]
    error = None
    if f"{value}_low" in frame:
        below = height - wide[f"{value}_low"][rivals]
        above = wide[f"{value}_high"][rivals] - height
        error = np.stack([below.T, above.T], axis=1).clip(0)  # [rivals, 2, labels]
    style = {"color": [color(rival) for rival in rivals], "width": 0.8, "rot": 0, "fontsize": 8}
    height.rename(columns=named).plot.bar(ax=ax, yerr=error, capsize=2, legend=False, **style)
    ax.set_xlabel("")
    ax.spines[["top", "right"]].set_visible(False)


def over_floor(name: str, frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws the picture of a program in BARS, unless none of its rows is shown."""
    picture = BARS[name]
    shown = labeled(frame, picture.label, picture.rows)
    measured = [rival for rival in shown["rival"].unique() if rival != picture.floor]
    rivals = [rival for rival in picture.rivals or measured if rival in measured][:MOST_BARS]
    if not rivals:  # a quick run measures one case, which this picture may not show
        return []
    percent = {column: 100 * shown[column] for column in shown if column.startswith("over")}
    figure, ax = plt.subplots(figsize=(10, 4), layout="constrained")
    bars(ax, shown.assign(**percent), rivals, "over")
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set_ylabel(picture.ylabel)
    ax.legend(ncols=2, fontsize=8, frameon=False)
    return finish(figure, frame, folder / f"{name}.png")


def model(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws the time of a training step and its peak memory, relative to PEFT's LoRA."""
    frame = labeled(frame, "{model}\n{dtype}")
    lora = frame[frame["rival"] == "lora-peft"].set_index("label")
    frame = frame.assign(
        step=frame["seconds"] / frame["label"].map(lora["seconds"]),
        memory=frame["peak_bytes"] / frame["label"].map(lora["peak_bytes"]),
    )
    rivals = [name for name in MODEL_RIVALS if name in set(frame["rival"])]
    titles = {"step": "time of a training step", "memory": "peak memory of a step"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for ax, (value, title) in zip(axes, titles.items()):
        bars(ax, frame, rivals, value)
        ax.axhline(1, color=COLORS["lora-peft"], linewidth=1)
        ax.set_title(f"{title}, relative to LoRA PEFT (line)", fontsize=10)
        ax.set_ylim(0, 1.5)
    axes[1].legend(fontsize=8, ncols=2, frameon=False)
    return finish(figure, frame, folder / "model.png")


def accuracy(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Held-out loss against trained numbers, with the standard error over seeds."""
    shown = ("minilm-movies", "smollm2-kjv", "smollm2-wycliffe", "smollm2-verilog")
    forms = {
        "lotr": ("LoTR", "tab:blue"),
        "lotr-diagonal": ("LoTR, diagonal cores", "tab:cyan"),
        "lotr-block": ("LoTR, by block", "tab:green"),
        "lora": ("LoRA PEFT", "tab:red"),
    }
    figure, axes = plt.subplots(1, len(shown), figsize=(14, 3.6), layout="constrained")
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
    figure.savefig(folder / "accuracy.png", dpi=110)
    return [folder / "accuracy.png"]


DRAW: dict[str, Callable[[pd.DataFrame, Path], list[Path]]] = {
    **{name: functools.partial(over_floor, name) for name in BARS},
    "model": model,
    "accuracy": accuracy,
}


def main(argv: list[str]) -> int:
    for word in argv or [str(RESULTS)]:
        path = Path(word)
        for file in [path] if path.is_file() else sorted(path.rglob("*.jsonl")):
            if file.stem in DRAW:
                for picture in DRAW[file.stem](read(file), file.parent):
                    print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
