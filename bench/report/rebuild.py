"""Rebuilds the tables of README and docs, and the pictures, from bench/results/.

python -m bench.report                              redraw the pictures, rewrite the tables
python -m bench.report --keep-demo demo_results     first keep a demo run's table in bench/results/<machine>/
python -m bench.report --check                      change nothing; exit 1 if a page differs

A page shows a table between two lines, <!-- NAME:begin ... --> and <!-- NAME:end -->.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .. import memory
from ..evidence import digest as evidence
from ..evidence import table as evidence_table
from ..evidence.tasks import ALL as EVIDENCE_TASKS
from ..measure.session import brief
from ..measure.store import RESULTS, ROOT, Store, newest, write_whole
from ..measure.summary import Summary, summary
from ..measure.timing import slug
from ..pictures import MEASURED, draw_measured
from ..projection import predictions
from ..projection.predict import projections
from ..serving import table as serving
from . import block_table, experts_table, host_table, memory_table, rows_table, tables, tasks_table

Section = Callable[[Path, str], list[str]]  # its texts, from results and the path from the page's folder to the root
SIMT = "simt-executor"


class Page(NamedTuple):
    """A page with tables; up: the relative path from its folder to the root."""

    path: Path
    sections: tuple[str, ...]
    up: str

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()


TABLES = tables.TABLES | {
    "block": block_table.block_table,
    "host": host_table.host_table,
    "experts": experts_table.experts_table,
    "tasks": tasks_table.training_table,
}
README = Page(ROOT / "README.md", ("summary", "accuracy"), "")
CHOOSING = Page(ROOT / "docs" / "choosing.md", ("advice", "recipe"), "../")
EVIDENCE = Page(ROOT / "docs" / "evidence.md", ("evidence",), "../")
BENCHMARKS = Page(ROOT / "docs" / "benchmarks.md", ("demo", *TABLES, "many-tasks", "traffic", "static"), "../")
SERVING = Page(ROOT / "docs" / "serving.md", ("serving",), "../")
DISTRIBUTED = Page(ROOT / "docs" / "distributed.md", ("memory",), "../")
PAGES = (README, CHOOSING, EVIDENCE, BENCHMARKS, SERVING, DISTRIBUTED)
PROGRAMS = {  # the program whose results a section shows, if it is not bench.<section>
    "demo": "make demo",
    "advice": "make frontier",
    "recipe": "make frontier ARGS=--sweep",
    "evidence": "make frontier",
    "many-tasks": "make many-tasks",
    "accuracy": "make frontier",
    "summary": "make bench",
}


def _read(path: Path) -> list[dict]:
    return newest(Store(path).read())


# ---- the demo --------------------------------------------------------------------------------------------------------


def demo_command(demo: dict) -> str:
    """The command that reproduces a demo run."""
    settings = [run["settings"] for run in demo["runs"]]
    methods, seeds = dict.fromkeys(s["method"] for s in settings), {s["seed"] for s in settings}
    flags = [] if len(methods) == 3 else [f"--methods {','.join(methods)}"]
    flags += [f"--seeds {len(seeds)}"] if len(seeds) > 1 else []
    flags += [f"--init {start}"] if (start := _start(demo)) else []
    flags += [f"--threads {settings[0]['threads']}"]
    return f'make demo ARGS="{" ".join(flags)}"'


def _start(demo: dict) -> str:
    """The init of LoTR's factors, if it was not the default."""
    start = demo["runs"][0]["settings"].get("init", "orthonormal")
    return "" if start == "orthonormal" else start


def demo_table(demo: dict) -> str:
    """The fine-tuning run, a row per method."""
    row = demo["rows"][-1]
    busy = tables.busy(demo["load"], demo["runs"][0]["settings"]["threads"])
    where = demo["machine"] + ("; the machine was busy, so no times" if busy else "")
    lines = [
        f"`{demo_command(demo)}`: {demo['data']}, rank {row['rank']}, {row['runs']} seed(s); {where}:",
        "",
        "| method | trained parameters | adapter on disk | held-out accuracy | s/step | peak memory of the process |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in demo["rows"]:
        low, high = row["accuracy_range"]
        accuracy = f"{row['accuracy']:.2%}" + (f" ({low:.2%} to {high:.2%})" if row["runs"] > 1 else "")
        disk, memory = f"{row['adapter_bytes'] / 1024:,.1f} KiB", f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB"
        seconds = "-" if busy else f"{row['seconds_per_step']:.3f}"  # runs are sequential, so load affects each differently
        numbers = [f"{row['trained_parameters']:,}", disk, accuracy, seconds, memory]
        lines.append(f"| {row['method']} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def keep_demo(folder: Path) -> Path:
    """Copies a demo run's table, without its loss curves. Raises ValueError for another file."""
    source = folder / "table.json"
    if not source.is_file():
        raise FileNotFoundError(f"keep-demo: expected {source}, found none; run make demo first")
    try:
        demo = json.loads(source.read_text(encoding="utf-8"))
        demo_table(demo)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"keep-demo: expected the table of a demo run in {source}, got {brief(error)}") from None
    for run in demo["runs"]:
        run.pop("losses", None)
        for name in ("model", "out", "text"):  # local paths
            run["settings"].pop(name, None)
    count, start = len({run["settings"]["method"] for run in demo["runs"]}), _start(demo)
    name = f"demo-{count}-methods-{demo['rows'][-1]['runs']}-seeds{'-' * bool(start)}{start}.json"
    target = RESULTS / slug(demo["machine"].rsplit(",", 1)[0]) / name
    return write_whole(target, json.dumps(demo, indent=1) + "\n")


# ---- pages -----------------------------------------------------------------------------------------------------------


def _machines(results: Path) -> list[Path]:
    return sorted(path for path in results.glob("*") if path.is_dir())


def _pictures(folder: Path, up: str) -> tables.Pictures:
    return {path.stem: f"{up}bench/results/{folder.name}/{path.name}" for path in folder.glob("*.png")}


def _demos(folder: Path) -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("demo-*.json"))]


def newest_summary(results: Path) -> tuple[Summary, Path] | None:
    """README's summary and its folder: that of the machine measured last."""
    found = [(summary(_read(path / "layer.jsonl"), _read(path / "model.jsonl")), path) for path in _machines(results)]
    return max((one for one in found if one[0] is not None), key=lambda one: one[0].model.get("when", 0), default=None)


def _summary(results: Path, up: str) -> list[str]:
    found = newest_summary(results)
    return [] if found is None else [tables.summary_table(found[0], _pictures(found[1], up))]


def _measured(name: str, table: Callable[[list[dict], tables.Pictures], str]) -> Section:
    """The table of a program that keeps its cells in a machine's folder, for each machine."""

    def texts(results: Path, up: str) -> list[str]:
        found = ((_read(folder / f"{name}.jsonl"), folder) for folder in _machines(results))
        return [table(cells, _pictures(folder, up)) for cells, folder in found if cells]

    return texts


def _many_tasks(results: Path, up: str) -> list[str]:
    return [
        tasks_table.tasks_table(run, _pictures(folder, up))
        for folder in _machines(results)
        for run in tasks_table.task_runs(folder)
    ]


def _serving(results: Path, up: str) -> list[str]:
    found = ((serving.kept(folder), folder) for folder in _machines(results))
    return [serving.page_table(run, _pictures(folder, up).get("serving")) for run, folder in found if run]


def _traffic(results: Path, up: str) -> list[str]:
    rows, counts = tables.traffic_rows(results), rows_table.row_counts(results)
    found = [tables.traffic_table(rows, tables.static_found(results), _pictures(results / SIMT, up))] if rows else []
    return found + ([rows_table.rows_table(counts)] if counts else [])


def _static(results: Path, up: str) -> list[str]:
    estimates = tables.static_found(results)
    found = [tables.static_table(estimates, _pictures(results / SIMT, up))] if estimates else []
    found += [tables.predicted_table(folder, _pictures(folder, up)) for folder in _machines(results)]
    return [text for text in (*found, rows_table.static_rows_table(results)) if text]


def _memory(results: Path, up: str) -> list[str]:
    return [] if (counts := memory.kept(results)) is None else [memory_table.page_table(counts)]


def _of_evidence(table: Callable[[list[evidence.Digest], tables.Pictures], str]) -> Section:
    def texts(results: Path, up: str) -> list[str]:
        folder = results / evidence.FOLDER.name
        return [text] if (text := table(evidence.digests(folder), _pictures(folder, up))) else []

    return texts


def _recipe(results: Path, up: str) -> list[str]:
    folder = results / evidence.FOLDER.name
    swept = {task.name: evidence.swept(folder, task) for task in EVIDENCE_TASKS}
    text = evidence_table.page_sweeps({name: transfers for name, transfers in swept.items() if transfers})
    return [text] if text else []


SECTIONS: dict[str, Section] = {
    "demo": lambda results, up: [demo_table(demo) for folder in _machines(results) for demo in _demos(folder)],
    **{name: _measured(name, table) for name, table in TABLES.items()},
    "many-tasks": _many_tasks,
    "serving": _serving,
    "traffic": _traffic,
    "static": _static,
    "memory": _memory,
    "summary": _summary,
    "advice": _of_evidence(lambda found, pictures: evidence_table.page_advice(found)),
    "accuracy": _of_evidence(evidence_table.short_text),
    "evidence": _of_evidence(evidence_table.page_tables),
    "recipe": _recipe,
}


def rebuild(page: Page, text: str, results: Path = RESULTS) -> str:
    """A page's text with its tables regenerated. Raises ValueError if a table's two marker lines are missing."""
    for name in page.sections:
        pattern = re.compile(rf"(<!-- {name}:begin [^\n]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page.name}: expected the markers {name}:begin and {name}:end, found none")
        nothing = f"No result of `{PROGRAMS.get(name, f'python -m bench.{name}')}` is kept yet."
        body = "\n\n".join(SECTIONS[name](results, page.up) or [nothing])
        text = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
    return text


def draw(results: Path = RESULTS) -> list[Path]:
    """All pictures, from the same cells as the tables."""
    from ..evidence.pictures import draw_evidence
    from ..pictures import more, static, tasks
    from ..serving.pictures import draw_serving

    written = []
    for folder in _machines(results):
        cells = {program: _read(folder / f"{program}.jsonl") for program in MEASURED}
        written += [path for program, own in cells.items() for path in draw_measured(program, own, folder)]
        written += static.draw_predicted(predictions.compared_in(folder, predictions.kept(results)[1]), folder)
        written += more.draw_summary(summary(cells["layer"], cells["model"]), folder)
        if run := serving.kept(folder):
            written += draw_serving(run, folder)
        written += [path for run in tasks_table.task_runs(folder) for path in tasks.draw_tasks(run, folder)]
    written += draw_evidence(results / evidence.FOLDER.name)
    rows, estimates, folder = tables.traffic_rows(results), tables.static_found(results), results / SIMT
    if levels := projections([tables.PROJECTED_SHAPE], rows, estimates):
        written += more.draw_projection(tables.PROJECTED_SHAPE, rows, levels, folder)
    return written + static.draw_static(estimates, folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--keep-demo", type=Path, metavar="FOLDER", help="store the table of a demo run")
    parser.add_argument("--check", action="store_true", help="exit 1 if a page differs from the results")
    options = parser.parse_args(argv)
    if options.keep_demo and options.check:
        raise ValueError("check: it changes nothing; expected no --keep-demo beside it, got one")
    if options.keep_demo:
        print(f"kept {keep_demo(options.keep_demo)}")
    if not options.check:
        for path in draw():
            print(f"drew {path.relative_to(ROOT)}")
    pages = {page: page.path.read_text(encoding="utf-8") for page in PAGES}
    changed = {page: new for page, old in pages.items() if (new := rebuild(page, old)) != old}
    for page, new in changed.items():
        if options.check:
            print(f"{page.name}: its tables are not those of bench/results; run python -m bench.report", file=sys.stderr)
        else:
            write_whole(page.path, new)
    return int(options.check and bool(changed))
