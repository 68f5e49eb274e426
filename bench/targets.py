"""Checks which CPU targets the stored results meet: python -m bench.targets [folder of results]

On one and all threads, fp32 and bf16, one adapted layer's time over the frozen layer, forward + backward: at most half of eager
LoRA's at (512, 768, 768, 16), (2048, 768, 768, 16) and (1024, 2048, 2048, 16), at most 0.9 of it at 1 and 16 tokens, at
most 1.25 x the extra FLOPs (the adapter's multiplications over the frozen layer's, 3 r / K) at (2048, 768, 768, 64); and at
the target shapes less than every form of LoRA from library products (eager, in-place in both orders, compiled, PEFT's).
A step of the model bench at equal rank takes no longer than PEFT LoRA's and allocates less at its peak; that of a language
model with all linear layers adapted takes at most 0.97 x of PEFT LoRA's, and no longer than that of the formula in three lines
beyond the spread. Host time (python -m bench.host): a layer in a model and on a shared pair takes no longer than the
formula in three lines of torch, a single layer at most 0.7 x of it, and with few tokens at most 0.9 x of eager LoRA's
excess over the frozen layer. Experts of a mixture (python -m bench.experts): over the frozen ones at most 0.4 x the
time of PEFT's LoRA by target_parameters at equal rank, and less at the peak.

"within the spread": the medians differ by less than the quartile ranges overlap. "under the extra FLOPs": only code that
multiplies faster than the base product, or saves it some work, meets that limit. Exit 1 unless all that was measured is met.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .measure.names import name_of, named
from .measure.session import Table, start
from .measure.shapes import TARGETS, Case, Shape
from .measure.store import RESULTS, Store, by_case, newest
from .rivals import experts, host
from .rivals.model import CAUSAL
from .rivals.registry import LIBRARY_ONLY, LORA_EAGER, OURS

# Limits of our excess over eager LoRA's, and over the extra FLOPs.
OF_EAGER: dict[Shape, float] = {
    (512, 768, 768, 16): 0.5,
    (2048, 768, 768, 16): 0.5,
    (1024, 2048, 2048, 16): 0.5,
    (1, 768, 768, 16): 0.9,
    (16, 768, 768, 16): 0.9,
}
UNDER = ", under the extra FLOPs"
OF_EXTRA: dict[Shape, float] = {(2048, 768, 768, 64): 1.25}
OF_PEFT = 0.97  # of its LoRA's step, in a language model
# Limits of the host time over the formula in three lines with as many factors; and with few tokens of our excess over LoRA's.
OF_THREE_LINES = {host.ALONE: 0.7, host.SHARED: 1.0, host.IN_MODEL: 1.0}
FEW, FEW_OF_EAGER = 16, 0.9
OF_PEFT_EXPERTS = 0.4  # of its LoRA's excess over the frozen experts


class Verdict(NamedTuple):
    """what: the case; ours, best: the numbers compared; rival: of best; met: "yes", "within the spread" or "no"."""

    what: str
    ours: str
    best: str
    rival: str
    met: str


def _met(ours: list[float], best: list[float], equal_is_met: bool) -> str:
    """The verdict on two (25 %, median, 75 %)."""
    if ours[1] < best[1] or (equal_is_met and ours[1] == best[1]):
        return "yes" if ours[2] < best[0] or equal_is_met else "yes, within the spread"
    return "within the spread" if ours[0] <= best[2] else "no"


def _of_shapes(cells: list[dict], shapes: Iterable[Shape]) -> list[tuple[Case, dict[str, dict]]]:
    cases: dict[Case, dict[str, dict]] = {}
    for cell in cells:
        if tuple(cell["case"].values())[:4] in shapes:
            cases.setdefault(Case(**cell["case"]), {})[cell["rival"]] = cell
    return sorted(cases.items(), key=lambda item: (item[0].threads, item[0].dtype != "fp32"))


def limit_verdicts(cells: list[dict]) -> list[Verdict]:
    """Verdicts against eager LoRA's excess, or the extra FLOPs, times the shape's limit."""
    found = []
    for case, own in _of_shapes(cells, {**OF_EAGER, **OF_EXTRA}):
        if OURS not in own:
            continue
        ours, shape = own[OURS]["step"]["excess"], case[:4]
        if shape in OF_EXTRA:
            limit, most = f"extra FLOPs x {OF_EXTRA[shape]:g}", 3 * [case.extra_flops() * OF_EXTRA[shape]]
        elif LORA_EAGER in own:
            limit = f"{named(LORA_EAGER)} x {OF_EAGER[shape]:g}"
            most = [OF_EAGER[shape] * e for e in own[LORA_EAGER]["step"]["excess"]]
            limit += UNDER if most[1] < case.extra_flops() else ""
        else:
            continue
        numbers = [f"{e[1]:.1%} ({e[0]:.1%}, {e[2]:.1%})" for e in (ours, most)]
        found.append(Verdict(f"limit {case.name()}", *numbers, limit, _met(ours, most, False)))
    return found


def layer_verdicts(cells: list[dict]) -> list[Verdict]:
    """One verdict per target shape, dtype and thread count."""
    found = []
    for case, own in _of_shapes(cells, TARGETS):
        rivals = [own[rival] for rival in LIBRARY_ONLY if rival in own]
        if OURS not in own or not rivals:
            continue
        best = min(rivals, key=lambda c: c["step"]["excess"][1])
        ours, theirs = own[OURS]["step"]["excess"], best["step"]["excess"]
        numbers = [f"{e[1]:.1%} ({e[0]:.1%}, {e[2]:.1%})" for e in (ours, theirs)]
        found.append(Verdict(f"layer {case.name()}", *numbers, name_of(best), _met(ours, theirs, False)))
    return found


def _ms(*quartiles: list[float]) -> list[str]:
    return [f"{1e3 * s[1]:.1f} ms ({1e3 * s[0]:.1f}, {1e3 * s[2]:.1f})" for s in quartiles]


def _peak_verdict(name: str, ours: dict, lora: dict) -> Verdict:
    peaks = [cell["peak_bytes"] for cell in (ours, lora)]
    sizes = [f"{p / 2**20:.1f} MiB" for p in peaks]
    return Verdict(f"peak {name}", *sizes, name_of(lora), "yes" if peaks[0] < peaks[1] else "no")


def model_verdicts(cells: list[dict]) -> list[Verdict]:
    """Verdicts on a case's step time (two for a language model) and its peak memory."""
    found = []
    for c, own in by_case(cells):
        if not {OURS, "lora-peft"} <= set(own):
            continue
        ours, lora = own[OURS], own["lora-peft"]
        name = f"{c['model']} {c['batch']}x{c['sequence']} r{c['r']} {c['dtype']} t{c['threads']}"
        causal = c["model"] in CAUSAL
        most = OF_PEFT if causal else 1.0
        step, theirs = ours["step"]["seconds"], [most * s for s in lora["step"]["seconds"]]
        label = f"{name_of(lora)} x {most:g}" if causal else name_of(lora)
        found.append(Verdict(f"step {name}", *_ms(step, theirs), label, _met(step, theirs, True)))
        if causal and "lotr-eager" in own:
            lines = own["lotr-eager"]["step"]["seconds"]
            met = _met(step, lines, True).replace("within", "yes, within").replace("yes, yes, ", "yes, ")
            found.append(Verdict(f"step {name}", *_ms(step, lines), named("lotr-eager"), met))
        found.append(_peak_verdict(name, ours, lora))
    return found


def host_verdicts(cells: list[dict]) -> list[Verdict]:
    """One verdict per case and form of ours, over three lines of torch; with few tokens also over eager LoRA's excess."""
    found = []
    for cell in cells:
        if cell["rival"] not in OF_THREE_LINES:
            continue
        case, step = cell["case"], cell["step"]
        way = f"{host.RIVALS[cell['rival']].label}, {case['form']}"
        name = f"host {way} {case['m']}x{case['k']} {case['dtype']} t{case['threads']}"
        limits = [("of_lotr", named(host.LOTR), OF_THREE_LINES[cell["rival"]])]
        if case["m"] <= FEW:
            limits.append(("of_lora_excess", f"{named(LORA_EAGER)}'s excess", FEW_OF_EAGER))
        for field, rival, most in limits:
            ours = f"{step[field][1]:.2f} ({step[field][0]:.2f}, {step[field][2]:.2f})"
            found.append(Verdict(name, ours, f"{most:g}", rival, _met(step[field], 3 * [most], True)))
    return found


def experts_verdicts(cells: list[dict]) -> list[Verdict]:
    """Verdicts on a case's excess over the frozen experts, and on its peak."""
    found = []
    for c, own in by_case(cells):
        if not {experts.OURS, experts.PEFT} <= set(own):
            continue
        ours, lora = own[experts.OURS], own[experts.PEFT]
        name = f"experts {c['m']}x{c['h']}x{c['i']}, {c['top_k']} of {c['e']}, r{c['r']} {c['dtype']} t{c['threads']}"
        excess, most = ours["step"]["excess"], [OF_PEFT_EXPERTS * e for e in lora["step"]["excess"]]
        numbers = [f"{e[1]:.1%} ({e[0]:.1%}, {e[2]:.1%})" for e in (excess, most)]
        found.append(Verdict(name, *numbers, f"{experts.LABELS[experts.PEFT]} x {OF_PEFT_EXPERTS:g}", _met(excess, most, True)))
        found.append(_peak_verdict(name, ours, lora))
    return found


def verdicts(folder: Path) -> list[Verdict]:
    """All verdicts from the results in a folder."""
    read = {name: newest(Store(folder / f"{name}.jsonl").read()) for name in ("layer", "model", "host", "experts")}
    found = limit_verdicts(read["layer"]) + layer_verdicts(read["layer"])
    found += model_verdicts(read["model"]) + host_verdicts(read["host"])
    return found + experts_verdicts(read["experts"])


def summary(found: list[Verdict]) -> str:
    """A sentence: how many targets the medians meet, and each that they miss."""
    missed = [verdict for verdict in found if not verdict.met.startswith("yes")]
    text = (
        f"{len(found) - len(missed)} of the {len(found)} limits and comparisons of `python -m bench.targets` are met by medians"
    )
    lines = []
    for verdict in missed:
        line = f"{verdict.what}: {verdict.ours} against {verdict.best} ({verdict.rival.removesuffix(UNDER)}), "
        line += "not met" if verdict.met == "no" else verdict.met
        lines.append(line + (", and that limit is under the extra FLOPs" if verdict.rival.endswith(UNDER) else ""))
    return text + (", all but (quartiles in brackets): " + "; ".join(lines) if lines else "") + "."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.targets", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="folder of results (bench/results)")
    folders = parser.parse_args(argv).folders or sorted(
        {p.parent for name in ("layer", "host", "experts") for p in RESULTS.glob(f"*/{name}.jsonl")}
    )
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: expected a folder of results, found none")
    found = [verdict for folder in folders for verdict in verdicts(folder)]
    if not found:
        raise ValueError(
            "no kept result belongs to a target: run python -m bench.layer, bench.model, bench.host or bench.experts first"
        )
    table = Table("Targets on a CPU: lotr_ext against the best of library products", "", "lotr_ext", "best rival", "", "met")
    for verdict in found:
        table.add_row(*verdict)
    print(table)
    return int(not all(verdict.met.startswith("yes") for verdict in found))


if __name__ == "__main__":
    start("bench.targets", main)
