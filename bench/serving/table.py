"""Retention, targets and tables from the results of bench.serving."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..measure.session import bytes_text
from ..measure.terminal import Table
from .work import Shape

LABELS = {
    "off": "vLLM without adapters",
    "native": "vLLM, lotr_ext's plugin",
    "lora": "vLLM, LoRA adapters",
    "own": "lotr_ext, mixed",
    "peft": "PEFT, adapter_names",
}
BASES = {"native": "off", "lora": "off"}  # the floor of each way; the others use their own run without adapters
DECODE, PREFILL, PUSH_MS = 0.85, 0.90, 10.0  # the targets, with one task a row
COMMAND, FILE = "python -m bench.serving", "serving.json"


def retention(found: Mapping[str, Any], shape: Shape, clock: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By way and number of tasks: median tokens per second, and their ratio to the same batch without adapters in the same
    round, also as medians."""
    tokens = {"prefill": shape.rows * shape.prompt, "decode": shape.rows * (shape.new - 1)}
    rates = {
        way: {
            n: {part: [tokens[part] / one[part][clock] for one in rounds] for part in tokens}
            for n, rounds in own["rounds"].items()
        }
        for way, own in found.items()
    }
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for way, own in rates.items():
        base = rates.get(BASES.get(way, way), {}).get("0")
        for n, parts in own.items():
            row = table.setdefault(way, {}).setdefault(n, {})
            for part, values in parts.items():
                row[part] = {"tokens_per_s": statistics.median(values)}
                if base is not None and n != "0":
                    row[part]["retention"] = statistics.median(a / b for a, b in zip(values, base[part]))
    return table


def kept(folder: Path) -> dict[str, Any] | None:
    """The results of bench.serving in a machine's folder."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def percentile(values: list[float], share: float) -> float:
    """The smallest value such that at least this share of the values is not above it."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def checks(results: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """For each target: its text, the result, and whether it is met."""
    found = []
    shape, native = results["shape"], results["retention"].get("native", {})
    row = native.get(str(min(shape["rows"], max(shape["counts"]))))
    if row is not None and "retention" in row["decode"]:
        for part, least in (("decode", DECODE), ("prefill", PREFILL)):
            value = row[part]["retention"]
            found.append((f"{part} with one task per row, at least {least:.0%}", f"{value:.1%}", value >= least))
    if "native" in results["push"]:
        value = percentile(results["push"]["native"]["milliseconds"], 0.99)
        found.append((f"99 % of pushes within {PUSH_MS:.0f} ms", f"{value:.1f} ms", value <= PUSH_MS))
    return found


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A row per way and number of tasks."""
    found = []
    for way, own in results["retention"].items():
        for n, parts in own.items():
            cells = [LABELS[way], "none" if n == "0" else f"{int(n):,}"]
            for part in ("decode", "prefill"):
                kept = parts[part].get("retention")
                cells += [f"{parts[part]['tokens_per_s']:,.0f}", "" if kept is None else f"{kept:.0%}"]
            found.append(cells)
    return found


HEADS = ("tasks", "decode, tokens/s", "kept", "prefill, tokens/s", "kept")


def lines(results: Mapping[str, Any]) -> list[str]:
    """The lines below the table."""
    found = [f"A task's memory: {', '.join(f'{LABELS[way]} {bytes_text(n)}' for way, n in results['bytes_a_task'].items())}."]
    for way, push in results["push"].items():
        p50, p99 = (percentile(push["milliseconds"], share) for share in (0.5, 0.99))
        size = bytes_text(push["bytes"])
        how = "into the plugin's bank" if way == "native" else "into LoRA's slots"
        times = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms of {len(push['milliseconds'])} pushes"
        found.append(f"A new version {how}, {size}, while the engine decodes: {times}.")
    if results["same_texts"] is not None:
        found.append(f"Rows whose tokens are the same in vLLM with the plugin and in `mixed`: {results['same_texts']:.0%}.")
    met = [f"{what}: {value}, {'met' if good else 'missed'}" for what, value, good in checks(results)]
    return found + ([f"Targets: {'; '.join(met)}."] if met else [])


def terminal(results: Mapping[str, Any]) -> str:
    shape = results["shape"]
    title = "{model}, rows {rows}, prompts of {prompt}, {new} new tokens, r {rank}, threads {threads}, {clock} seconds"
    table = Table(title.format(**shape), "", *HEADS)
    for row in rows(results):
        table.add_row(*row)
    table.caption = "\n".join(lines(results))
    return str(table)


def page_table(results: Mapping[str, Any], picture: str | None) -> str:
    """Markdown for docs/serving.md."""
    shape, facts = results["shape"], results["machine"]
    where = f"{facts['name']}, torch {facts['torch']}, PEFT {facts['peft']}, vLLM {facts['vllm']}"
    busy = f"; load average {results['load']:.1f}: the machine was busy" if results["load"] > shape["threads"] + 1 else ""
    size = f"{shape['rows']} rows, prompts of {shape['prompt']} tokens, {shape['new']} new ones, r = {shape['rank']}"
    found = [
        f"`{COMMAND}`: {shape['model']}, {size}, float32, threads: {shape['threads']}; {where}; {shape['clock']} seconds{busy}:"
    ]
    found += ["", f"| | {' | '.join(HEADS)} |", f"|---|{'---:|' * len(HEADS)}"]
    found += [f"| {' | '.join([f'**{row[0]}**' if 'lotr_ext' in row[0] else row[0], *row[1:]])} |" for row in rows(results)]
    found += ["", *(f"- {line}" for line in lines(results))]
    return "\n".join(found + (["", f"![throughput kept against tasks]({picture})"] if picture else []))
