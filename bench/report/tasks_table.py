"""Tables of the results of examples/many_tasks.py and bench.tasks."""

from __future__ import annotations

import json
from pathlib import Path

from ..measure.session import ROUNDS, bytes_text, time_text
from ..measure.store import by_case
from ..pictures.tasks import place
from ..rivals.tasks import HEADS as TRAINING_HEADS
from ..rivals.tasks import SHAPES, WAYS, row_of
from . import tables

HEADS = ("a batch", "tokens/s", "over one adapter")


def task_runs(folder: Path) -> list[dict]:
    """The results of `make many-tasks` in a machine's folder, fewest tokens first."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("many-tasks-*.json")]
    return sorted(runs, key=lambda run: run["shape"]["tokens"])


def tasks_table(run: dict, pictures: tables.Pictures) -> str:
    """One run of examples/many_tasks.py: a row per way to run the same batch."""
    shape, machine = run["shape"], run["machine"]
    usual = {"tasks": 1000, "rows": 64, "tokens": 16, "hidden": 512, "layers": 4, "rank": 16, "rounds": 15, "peft": 64}
    flags = " ".join(f"--{name} {value}" for name, value in shape.items() if value != usual.get(name))
    where = f"{machine['name']}, torch {machine['torch']}, PEFT {machine['peft']}, medians of {shape['rounds']} rounds"
    sizes = ", ".join(f"{name} {bytes_text(size)}" for name, size in run["bytes_a_task"].items())
    flat = ", ".join(f"{name} {ratio:.2f} x" for name, ratio in run["most_over_one_task"].items())
    rows = []
    for name, way in run["ways"].items():
        speed = f"{shape['rows'] * shape['tokens'] / way['seconds']:,.0f}"
        label = f"**{name}**" if name.startswith("LoTR") else name
        rows.append([label, time_text(way["seconds"]), speed, f"{way['over_one']:.2f} x"])
    lines = [f'`make many-tasks ARGS="{flags}"`: {shape["rows"]} rows, tokens per row: {shape["tokens"]}; {where}:', ""]
    place = f"{shape['tasks']:,} tasks, width {shape['hidden']}, {shape['layers']} blocks, r = {shape['rank']}"
    lines += [*tables.markdown([place, *HEADS], rows), ""]
    lines += [f"Most tasks in the batch over one task: {flat}. A task's bytes: {sizes}."]
    name = f"many-tasks-{shape['tokens']}-tokens"
    if name in pictures:
        lines += ["", f"![time of a batch against the tasks in it, tokens per row: {shape['tokens']}]({pictures[name]})"]
    return "\n".join(lines)


def training_table(cells: list[dict], pictures: tables.Pictures) -> str:
    """The results of bench.tasks: a row per way to train a batch of tasks."""
    found = by_case(cells)
    shapes = ",".join(dict.fromkeys("x".join(map(str, list(case.values())[:6])) for case, _ in found))
    usual = {"shapes": SHAPES["cuda" if tables.on_gpu(cells) else "cpu"], "dtypes": "fp32", "rounds": ROUNDS["tasks"]}
    options = {"shapes": shapes, "dtypes": ",".join(dict.fromkeys(c["case"]["dtype"] for c in cells))}
    options["threads"] = ",".join(dict.fromkeys(str(c["case"]["threads"]) for c in cells))
    again = tables.command("tasks", cells, options | {"rounds": max(c["rounds"] for c in cells)}, usual)
    lines = [f"{again}: a training step of a batch, cores alone; {tables.where(cells)}:", ""]
    for case, own in found:
        rows = [row_of(cell) for cell in own.values()]
        rows = [[f"**{row[0]}**" if WAYS[name].per_task else row[0], *row[1:]] for name, row in zip(own, rows, strict=True)]
        lines += [*tables.markdown([place(case), *TRAINING_HEADS[1:]], rows), ""]
    if "tasks" in pictures:
        lines += [f"![a training step of many tasks over one adapter's]({pictures['tasks']})"]
    return "\n".join(lines).rstrip()
