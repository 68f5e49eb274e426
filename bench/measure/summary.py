"""README's excerpt of the results: a small table about size, memory and cost, and the picture of the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .session import bytes_text, time_text
from .shapes import Shape
from .store import by_case

METHODS = ("lora-peft", "vera-peft", "lotr-eager", "lotr_ext")  # of the picture
COLUMNS = LORA, EAGER, OURS = "lora-peft", "lotr-eager", "lotr_ext"  # of the table
LAYERS: tuple[Shape, ...] = ((2048, 768, 768, 16), (16, 768, 768, 16))
PICTURED = "bf16"  # the dtype of the model in the picture, if it was measured
Cells = dict[str, dict]  # of one case, by rival
Bars = dict[str, tuple[float, str]]  # a value and its text, by rival


class Summary(NamedTuple):
    """rows: of the table, a quantity and its value for each of COLUMNS ("-" where it was not measured); panels: of the picture,
    by title; case: of the model; model, others, layers: our cells of the model, of the other models, of the layers."""

    rows: list[tuple[str, ...]]
    panels: dict[str, Bars]
    case: dict
    model: dict
    others: list[dict]
    layers: list[dict]

    @property
    def where(self) -> str:
        """Machine and threads."""
        threads = self.case["threads"]
        return f"{self.model['machine']['name']}, {threads} thread{'s' * (threads > 1)}"


def parameters(cell: dict) -> tuple[float, str]:
    return cell["parameters"], f"{cell['parameters']:,}"


def size(cell: dict) -> tuple[float, str]:
    return cell["adapter_bytes"], bytes_text(cell["adapter_bytes"])


def peak(cell: dict) -> tuple[float, str]:
    return cell["peak_bytes"], bytes_text(cell["peak_bytes"])


def step(cell: dict) -> tuple[float, str]:
    seconds = cell["step"]["seconds"][1]
    return seconds, time_text(seconds)


def excess(cell: dict) -> tuple[float, str]:
    middle = cell["step"]["excess"][1]
    return middle, f"{middle:.1%}"


def summary(layer: list[dict], model: list[dict]) -> Summary | None:
    """The Summary of one machine's newest results, at its least number of threads; None if model or layers were not measured
    with LoRA and with lotr_ext."""
    models = [own for _, own in by_case(model) if {LORA, OURS} <= set(own)]
    if not models:
        return None
    case = models[0][OURS]["case"] | {"threads": min(own[OURS]["case"]["threads"] for own in models)}
    dtypes = {own[OURS]["case"]["dtype"]: own for own in models if own[OURS]["case"] | {"dtype": case["dtype"]} == case}
    of_layer = {tuple(own[OURS]["case"].values()): own for _, own in by_case(layer) if {LORA, OURS} <= set(own)}
    others = [own for own in models if (c := own[OURS]["case"])["model"] != case["model"] and c["threads"] == case["threads"]]
    keys = [(*shape, "fp32", case["threads"]) for shape in LAYERS]
    layers = [of_layer[key] for key in keys if key in of_layer]
    if not dtypes or not layers:
        return None
    first = next(iter(dtypes.values()))

    def row(what: str, own: Cells, number: Callable[[dict], tuple[float, str]]) -> tuple[str, ...]:
        return what, *(number(own[rival])[1] if rival in own else "-" for rival in COLUMNS)

    rows = [row("adapter: trained numbers", first, parameters)]
    rows += [row(f"training step: peak memory, {dtype}", own, peak) for dtype, own in dtypes.items()]
    rows += [row(f"training step: time, {dtype}", own, step) for dtype, own in dtypes.items()]
    rows += [row(f"{_wider(own)}: time, {own[OURS]['case']['dtype']}", own, step) for own in others]
    rows += [row(f"one layer, {_tokens(own)}: time over the frozen layer, fp32", own, excess) for own in layers]
    dtype, drawn = (PICTURED, dtypes[PICTURED]) if PICTURED in dtypes else next(iter(dtypes.items()))
    panels = {
        "adapter": _bars(first, size),
        f"training step: peak memory, {dtype}": _bars(drawn, peak),
        f"training step: time, {dtype}": _bars(drawn, step),
        f"one layer, {_tokens(layers[0])}:\ntime over the frozen layer, fp32": _bars(layers[0], excess),
    }
    return Summary(rows, panels, case, first[OURS], [own[OURS] for own in others], [own[OURS] for own in layers])


def _wider(own: Cells) -> str:
    c = own[OURS]["case"]
    return f"{c['model']}, {len(c['targets'].split(','))} layers of every block, {c['batch']} x {c['sequence']} tokens"


def _tokens(own: Cells) -> str:
    return f"{own[OURS]['case']['m']} tokens"


def _bars(own: Cells, number: Callable[[dict], tuple[float, str]]) -> Bars:
    return {rival: number(own[rival]) for rival in METHODS if rival in own}
