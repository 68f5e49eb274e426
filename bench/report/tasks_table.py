"""What examples/many_tasks.py kept, as tables."""

from __future__ import annotations

import json
from pathlib import Path

from ..measure.names import renamed
from ..measure.session import bytes_text, time_text
from . import tables

HEADS = ("a batch", "tokens/s", "over one adapter")


def task_runs(folder: Path) -> list[dict]:
    """What `make many-tasks` kept in a machine's folder, fewest tokens first."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("many-tasks-*.json")]
    return sorted(runs, key=lambda run: run["shape"]["tokens"])


def tasks_table(run: dict, pictures: tables.Pictures) -> str:
    """One run of examples/many_tasks.py: a row a way to run the same batch."""
    shape, machine = run["shape"], run["machine"]
    usual = {"tasks": 1000, "rows": 64, "tokens": 16, "hidden": 512, "layers": 4, "rank": 16, "rounds": 15, "peft": 64}
    flags = " ".join(f"--{name} {value}" for name, value in shape.items() if value != usual.get(name))
    where = f"{machine['name']}, torch {machine['torch']}, PEFT {machine['peft']}, medians of {shape['rounds']} rounds"
    sizes = ", ".join(f"{name} {bytes_text(size)}" for name, size in run["bytes_a_task"].items())
    flat = ", ".join(f"{renamed(name)} {ratio:.2f} x" for name, ratio in run["most_over_one_task"].items())
    rows = []
    for name, way in run["ways"].items():
        speed = f"{shape['rows'] * shape['tokens'] / way['seconds']:,.0f}"
        label = f"**{name}**" if name.startswith("LoTR") else renamed(name)
        rows.append([label, time_text(way["seconds"]), speed, f"{way['over_one']:.2f} x"])
    lines = [f'`make many-tasks ARGS="{flags}"`: {shape["rows"]} rows, tokens a row: {shape["tokens"]}; {where}:', ""]
    place = f"{shape['tasks']:,} tasks, width {shape['hidden']}, {shape['layers']} blocks, r = {shape['rank']}"
    lines += [*tables.markdown([place, *HEADS], rows), ""]
    lines += [f"Most tasks in the batch over one task: {flat}. A task's bytes: {sizes}."]
    name = f"many-tasks-{shape['tokens']}-tokens"
    if name in pictures:
        lines += ["", f"![time of a batch against the tasks in it, tokens a row: {shape['tokens']}]({pictures[name]})"]
    return "\n".join(lines)
