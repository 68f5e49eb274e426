"""The results of bench.block as a table."""

from __future__ import annotations

from ..block import MODELS, RANKS, TOKENS
from ..measure.forms import FORMS
from ..measure.names import bold, name_of
from ..measure.session import ROUNDS, bytes_text, time_text
from ..measure.store import by_case
from ..rivals.block import OURS
from . import tables

HEADS = ("forward", "backward", "both", "over the frozen block", "quartiles")


def place(case: dict) -> str:
    threads = f", {case['threads']} thread{'s' * (case['threads'] > 1)}"
    return f"{case['model']}, {case['m']} tokens, r = {case['r']}, {case['dtype']}{threads}"


def block_table(cells: list[dict], pictures: dict[str, str]) -> str:
    """A Markdown table for each case, a row per rival; on a GPU also eager and as CUDA graphs."""
    device = "cuda" if tables.on_gpu(cells) else "cpu"
    usual = {name: ",".join(map(str, of[device])) for name, of in (("models", MODELS), ("tokens", TOKENS), ("ranks", RANKS))}
    fields = (("models", "model"), ("tokens", "m"), ("ranks", "r"), ("dtypes", "dtype"))
    options = {name: ",".join(dict.fromkeys(str(c["case"][field]) for c in cells)) for name, field in fields}
    options |= {"rounds": max(c["rounds"] for c in cells)}
    again = tables.command("block", cells, options, usual | {"dtypes": "bf16", "rounds": ROUNDS["layer"]})
    lines = [f"{again}: all linear layers of a block adapted; {tables.where(cells)}:", ""]
    for case, own in by_case(cells):
        forms = [form for form in FORMS if any(form in cell for cell in own.values())]
        rows = [_row(cell, forms) for cell in own.values()]
        heads = [place(case), *HEADS, *(FORMS[form] for form in forms), "trained parameters", "peak"]
        lines += [*tables.markdown(heads, rows), ""]
    return "\n".join(lines).rstrip()


def _row(cell: dict, forms: list[str]) -> list[str]:
    low, middle, high = cell["step"]["excess"]
    times = [time_text(cell[direction]["seconds"][1]) for direction in ("forward", "backward", "step")]
    more = [f"{cell[form]['step']['excess'][1]:.1%}" if form in cell else "-" for form in forms]
    label = bold(name_of(cell)) if cell["rival"] == OURS else name_of(cell)
    sizes = [f"{cell['parameters']:,}", bytes_text(cell["peak_bytes"])]
    return [label, *times, f"{middle:.1%}", f"{low:.1%}, {high:.1%}", *more, *sizes]
