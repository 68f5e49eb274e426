"""The host times of bench.host as tables."""

from __future__ import annotations

from ..measure.host_calls import count_text
from ..measure.session import ROUNDS, time_text
from ..measure.store import by_case
from ..pictures.host import place
from ..rivals import host as rh
from . import tables


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
