"""The host times of bench.host as a table and a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from ..measure.host_calls import count_text
from ..measure.session import ROUNDS, time_text
from ..measure.store import by_case
from ..rivals import host as rh
from . import tables
from .plots import save

COLOURS = {
    rh.FLOOR: "0.8",
    rh.LORA: "tab:orange",
    "lora-peft": "tab:red",
    rh.LOTR: "0.45",
    rh.LOTR_OWN: "0.6",
    rh.ALONE: "tab:purple",
    rh.SHARED: "tab:cyan",
    rh.IN_MODEL: "tab:blue",
}


def place(case: dict) -> str:
    tokens = f"{case['m']} token{'s' * (case['m'] > 1)}"
    return f"{tokens}, {'q, k, v' if case['form'] == 'siblings' else 'chained'}"


def host_rows(cells: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows): a row per rival, a column per case: us per layer, forward + backward, and over three lines of torch."""
    cases = by_case(cells)
    rows = []
    for name, rival in rh.RIVALS.items():
        if not any(name in own for _, own in cases):
            continue
        row = [f"**{rival.label}**" if name.startswith("lotr_ext") else rival.label]
        for _, own in cases:
            if name not in own:
                row.append("-")
                continue
            step = own[name]["step"]
            ratio = f" ({step['of_lotr'][1]:.2f})" if name.startswith("lotr_ext") else ""
            row.append(time_text(step["seconds"][1]) + ratio)
        rows.append(row)
    return ["", *(place(case) for case, _ in cases)], rows


def count_rows(cells: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows): a row per rival in the chained case with most tokens: calls, operators per layer, forward + backward, and
    the same of the path on CUDA."""
    case, own = max(by_case(cells), key=lambda item: (item[0]["form"] == "chained", item[0]["m"]))
    rows = []
    for name in (name for name in rh.RIVALS if name in own):
        row = [rh.RIVALS[name].label]
        for field in ("counts", "counts_on_cuda"):
            row += [count_text(own[name][field], what) for what in ("own", "dispatched")]
        rows.append(row)
    heads = ["calls of Python functions of lotr_ext", "operators"]
    return [place(case), *heads, *(f"{head} on CUDA" for head in heads)], rows


def host_table(cells: list[dict], pictures: dict[str, str]) -> str:
    """Both tables in Markdown; pictures: name -> link."""
    case, usual = cells[-1]["case"], {"layers": rh.LAYERS, "width": rh.WIDTH, "rank": rh.RANK, "rounds": ROUNDS["host"]}
    tokens = ",".join(dict.fromkeys(str(c["case"]["m"]) for c in cells))
    usual |= {"tokens": ",".join(map(str, rh.TOKENS)), "clock": cells[-1]["clock"]}  # the default depends on the machine
    options = {"tokens": tokens, "layers": case["layers"], "width": case["k"], "rank": case["r"]}
    again = tables.command("host", cells, options | {"rounds": max(c["rounds"] for c in cells)}, usual)
    what = "a layer, forward + backward; in brackets over LoTR in three lines of torch on as many factors"
    lines = [f"{again}: {what}; {tables.where(cells)}:", "", *tables.markdown(*host_rows(cells))]
    lines += ["", "Of one layer, forward + backward:", "", *tables.markdown(*count_rows(cells))]
    if "host" in pictures:
        lines += ["", f"![host time of a layer, by rival]({pictures['host']})"]
    return "\n".join(lines)


def draw_host(cells: list[dict], folder: Path) -> list[Path]:
    """Bars of us per layer, forward and backward (lighter), a panel per case."""
    cases = by_case(cells)
    if not cases:
        return []
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    names = [name for name in rh.RIVALS if all(name in own for _, own in cases)]  # the others are only in the table
    size = (4.2 * columns + 1.6, (0.3 * len(names) + 0.9) * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    for axis, (case, own) in zip(axes.flat, cases):
        for where, name in enumerate(reversed(names)):
            cell = own[name]
            forward, backward = (1e6 * cell[d]["seconds"][1] for d in ("forward", "backward"))
            low, middle, high = (1e6 * s for s in cell["step"]["seconds"])
            axis.barh(where, forward, color=COLOURS[name])
            axis.barh(where, backward, left=forward, color=COLOURS[name], alpha=0.55)
            axis.errorbar(middle, where, xerr=[[max(middle - low, 0)], [max(high - middle, 0)]], color="k", lw=1)
        axis.set_xlim(0, 1.2 * max(1e6 * own[name]["step"]["seconds"][1] for name in names))  # error bars may exceed the panel
        axis.set_title(place(case), fontsize=9)
        axis.set_xlabel("us a layer: forward, backward (lighter)", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    for row in axes:
        row[0].set_yticks(range(len(names)), [rh.RIVALS[name].label for name in reversed(names)], fontsize=8)
    case = cases[0][0]
    where = f"{case['layers']} layers {case['k']} x {case['k']}, {case['dtype']}, {case['threads']} thread(s)"
    figure.suptitle(f"Host time of a layer whose products cost nothing: {where}\n{cells[-1]['machine']['name']}", fontsize=10)
    return save({"host": figure}, folder)
