"""Summarises a run of bench.gpu: tests, sanitizer, and for each measurement the cells that win and lose."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from ..measure.store import RESULTS, Store, case_of, key_of, newest
from ..projection import predictions
from .plan import WITH_ALL

FLOOR, OURS = "frozen", "lotr_ext"
BETTER = 0.97


def summary(results: Path, outcome: dict[str, dict], predicted: Path = RESULTS) -> list[str]:
    """A line per part, and below it its results. results: the folder of logs and of the GPU's folder;
    predicted: the folder with the predictions."""
    lines = ["", "summary"]
    for name, part in outcome.items():
        lines.append(f"  {name:18} {part['status']}" + (f", {part['seconds']:.0f} s" if part["seconds"] else ""))
        log = results / f"{name}.log"
        text = log.read_text(errors="replace") if log.exists() and part["seconds"] else ""
        if name == "tests" and (
            found := re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|skipped).*?)(?: =+)?$", text, re.MULTILINE)
        ):
            lines.append(f"      {found[-1]}")
        if name.startswith("sanitize") and (found := re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)):
            lines.append(f"      {found[-1]}")
    for path in sorted(results.glob("*/*.jsonl")):
        cells = Store(path).read()
        if cells and path.stem in TELL:
            told = TELL[path.stem](newest(cells))
            lines += [f"  {path.relative_to(results)}", *(f"      {line}" for line in told)]
    lines += worth_of_switches(results)
    return [*lines, *beside_predicted(results, predicted), f"results in {results}"]


def worth_of_switches(results: Path) -> list[str]:
    """For each switched-off feature: the time of each kernel over its time with all features."""
    lines = []
    base = {key_of(c): c for c in newest(Store(results / WITH_ALL / "kernels.jsonl").read())}
    for folder in sorted(results.glob("without-*/")):
        ratios: dict[str, list[float]] = {}
        for cell in newest(Store(folder / "kernels.jsonl").read()):
            if cell["rival"] == OURS and (other := base.get(key_of(cell))):
                ratio = cell["step"]["seconds"][1] / other["step"]["seconds"][1]
                ratios.setdefault(cell["case"]["kernel"], []).append(ratio)
        told = ", ".join(f"{kernel} {statistics.median(own):.2f} x" for kernel, own in ratios.items())
        lines += [f"  {folder.name}, over with all features (medians): {told}"] if told else []
    return lines


def beside_predicted(results: Path, predicted: Path) -> list[str]:
    """Every measured value that was predicted for this GPU, with the ratio of the two."""
    made_on, made = predictions.kept(predicted)
    found = [one for folder in sorted(results.glob("*/")) for one in predictions.compared_in(folder, made)]
    if not found:
        return []
    inside, ratio = sum(one.inside for one in found), statistics.median(one.ratio for one in found)
    lines = [f"  predicted on {made_on}: {inside} of {len(found)} within the interval, measured / likely {ratio:.2f} (median)"]
    for one in found:
        what, predicted, measured, verdict = one.cells()
        lines.append(f"      {what}: {measured}, predicted {predicted}: x {verdict}")
    return lines


def pairs(cells: list[dict], floor: str) -> list[tuple[dict, dict]]:
    """(our cell, the cell of `floor`) for each case that has both."""
    theirs = {tuple(c["case"].values()): c for c in cells if c["rival"] == floor}
    return [(c, theirs[key]) for c in cells if c["rival"] == OURS and (key := tuple(c["case"].values())) in theirs]


def shape_of(case: dict) -> str:
    return " ".join(str(value) for value in case.values())


def losing(ratios: dict[str, float], floor: str) -> str:
    """How many cells take longer than `floor`, and the worst three by name."""
    worse = sorted((name for name in ratios if ratios[name] > 1), key=ratios.get, reverse=True)
    named = "; ".join(f"{name} ({ratios[name]:.2f} x)" for name in worse[:3])
    return f"{len(worse)} of {len(ratios)} cells slower than {floor}" + (f": {named}" if named else "")


def tell_kernels(cells: list[dict]) -> list[str]:
    lines = []
    for kernel in dict.fromkeys(c["case"]["kernel"] for c in cells):
        found = pairs([c for c in cells if c["case"]["kernel"] == kernel], "library")
        if found:
            bound = [ours["step"]["of_bound"] for ours, _ in found]
            ratios = {shape_of(o["case"]): o["step"]["seconds"][1] / t["step"]["seconds"][1] for o, t in found}
            share = f"{statistics.median(bound):.0%} of the machine's bound (median)"
            lines.append(f"{kernel}: {share}; {losing(ratios, 'the library')}")
    return lines + better_plans(cells)


def better_plans(cells: list[dict]) -> list[str]:
    """Plans close to the best by estimate that take less than BETTER of the chosen plan's time."""
    chosen = {case_of(c): c["step"]["seconds"][1] for c in cells if c["rival"] == OURS and "step" in c}
    lines = []
    for c in cells:
        if "step" in c and c["rival"].partition(" ")[0] == c["case"]["kernel"] and case_of(c) in chosen:
            ratio = c["step"]["seconds"][1] / chosen[case_of(c)]
            if ratio < BETTER:
                lines.append(f"a better plan: {shape_of(c['case'])}: {c['rival']}, {ratio:.2f} x the chosen one's time")
    return lines


def tell_layer(cells: list[dict]) -> list[str]:
    """For each adapting rival: the time of a step, and the cells in which ours takes longer."""
    lines = []
    rivals = [r for r in dict.fromkeys(c["rival"] for c in cells) if not r.startswith((FLOOR, OURS))]
    for rival in rivals:
        found = pairs(cells, rival)
        if found:
            ratios = {shape_of(o["case"]): o["step"]["seconds"][1] / t["step"]["seconds"][1] for o, t in found}
            lines.append(f"ours / {rival}: {statistics.median(ratios.values()):.3f} (median); {losing(ratios, rival)}")
    over = {shape_of(o["case"]): o["step"]["excess"][1] for o, _ in pairs(cells, FLOOR)}
    if over:
        least, most = min(over, key=over.get), max(over, key=over.get)
        lines.append(f"over the frozen layer: {over[least]:.1%} ({least}) to {over[most]:.1%} ({most})")
    return lines


TELL = {"kernels": tell_kernels, "layer": tell_layer, "block": tell_layer, "experts": tell_layer}
