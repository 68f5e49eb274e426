"""Pictures of the layer benchmark: excess over the frozen layer by rival, and against the number of tokens."""

from __future__ import annotations

from pathlib import Path

COLOURS = {
    "lotr_ext": "tab:blue",
    "lora-eager": "tab:orange",
    "lora-peft": "tab:red",
    "lora-in-place": "tab:green",
    "lora-in-place-beta": "tab:olive",
    "lotr-eager": "0.55",
}


def _case(cell: dict) -> str:
    c = cell["case"]
    return f"{c['m']}x{c['k']}x{c['n']}\nr = {c['r']}"


def _panels(cells: list[dict]) -> list[tuple[int, str]]:
    return sorted({(c["case"]["threads"], c["case"]["dtype"]) for c in cells})


def _bars(plt, cells: list[dict], panels: list[tuple[int, str]], machine: str):
    """A panel a dtype and thread count: excess of every rival at every shape."""
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, 3.1 * len(panels)), layout="constrained", squeeze=False)
    for axis, (threads, dtype) in zip(axes[:, 0], panels):
        shown = [c for c in cells if (c["case"]["threads"], c["case"]["dtype"]) == (threads, dtype)]
        names = list(dict.fromkeys(_case(c) for c in shown))
        rivals = [r for r in COLOURS if any(c["rival"] == r for c in shown)]
        for i, rival in enumerate(rivals):
            own = {_case(c): c for c in shown if c["rival"] == rival}
            places = [j + (i - (len(rivals) - 1) / 2) * 0.8 / len(rivals) for j, name in enumerate(names) if name in own]
            middle = [100 * own[n]["step"]["excess"][1] for n in names if n in own]
            low = [100 * (own[n]["step"]["excess"][1] - own[n]["step"]["excess"][0]) for n in names if n in own]
            high = [100 * (own[n]["step"]["excess"][2] - own[n]["step"]["excess"][1]) for n in names if n in own]
            label = next(iter(own.values()))["label"] if own else rival
            axis.bar(
                places, middle, 0.8 / len(rivals), yerr=[low, high], color=COLOURS[rival], label=label, error_kw={"lw": 0.8}
            )
        floors = {_case(c): 6 * c["case"]["m"] * c["case"]["r"] * (c["case"]["k"] + c["case"]["n"]) for c in shown}
        for j, name in enumerate(names):
            c = next(c["case"] for c in shown if _case(c) == name)
            level = 100 * floors[name] / (4 * c["m"] * c["k"] * c["n"])
            axis.plot([j - 0.42, j + 0.42], [level, level], "k--", lw=1, label="FLOP floor" if j == 0 else None)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set(title=f"{dtype}, {threads} thread(s)", ylabel="excess, %")
        axis.margins(y=0.3)  # room for the legend
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].legend(fontsize=8, ncols=4)
    figure.suptitle(f"Forward + backward of one adapted layer: time over the frozen layer ({machine})")
    return figure


def _lines(plt, cells: list[dict], panels: list[tuple[int, str]]):
    """Excess against tokens at 768 x 768, r = 16; None where fewer than two token counts were measured."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (threads, dtype) in zip(axes[0], panels):
        for rival, colour in COLOURS.items():
            own = [c for c in cells if c["rival"] == rival and (c["case"]["threads"], c["case"]["dtype"]) == (threads, dtype)]
            own = sorted((c for c in own if c["case"]["k"] == 768 and c["case"]["r"] == 16), key=lambda c: c["case"]["m"])
            if len(own) > 1:
                percent = [100 * c["step"]["excess"][1] for c in own]
                axis.plot([c["case"]["m"] for c in own], percent, "o-", color=colour, label=own[0]["label"], ms=4)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="tokens M",
            ylabel="excess, %",
            title=f"768 x 768, r = 16, {dtype}, {threads} thread(s)",
        )
        axis.grid(alpha=0.3, which="both")
    if not axes[0, 0].has_data():
        plt.close(figure)
        return None
    axes[0, 0].legend(fontsize=7)
    return figure


def draw(cells: list[dict], folder: Path) -> list[Path]:
    """Writes excess.png and tokens.png into folder; what cannot be drawn from the cells is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [c for c in cells if c["rival"] in COLOURS]
    many = [c for c in cells if c["case"]["m"] >= 128]  # below, an excess is several hundred per cent: see tokens.png
    figures = {}
    if many:
        figures["excess"] = _bars(plt, many, _panels(many), many[-1]["machine"]["name"])
    if cells:
        figures["tokens"] = _lines(plt, cells, _panels(cells))
    written = []
    for name, figure in figures.items():
        if figure is not None:
            temporary = folder / f"{name}.tmp.png"
            figure.savefig(temporary, dpi=110)
            plt.close(figure)
            written.append(temporary.replace(folder / f"{name}.png"))
    return written
