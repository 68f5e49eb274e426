"""Rebuilds README's tables and the pictures from the results kept in bench/results/, so that no number is typed by hand.

python -m bench.report                              redraw the pictures, rewrite README.md's tables
python -m bench.report --keep-demo demo_results     first keep a demo run's table in bench/results/<machine>/
python -m bench.report --check                      change nothing; exit 1 if README differs
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from ..measure.session import brief
from ..measure.store import RESULTS, ROOT, Store, newest
from ..measure.timing import slug
from . import tables

README = ROOT / "README.md"
REQUIRED, OPTIONAL = ("demo", "layer"), ("shared", "model", "kernels", "traffic", "static")  # README's sections


def _read(path: Path) -> list[dict]:
    return newest(Store(path).read())


# ---- the demo --------------------------------------------------------------------------------------------------------


def demo_command(demo: dict) -> str:
    """What reproduces a demo run."""
    settings = [run["settings"] for run in demo["runs"]]
    methods, seeds = dict.fromkeys(s["method"] for s in settings), {s["seed"] for s in settings}
    flags = [] if len(methods) == 3 else [f"--methods {','.join(methods)}"]
    flags += [f"--seeds {len(seeds)}"] if len(seeds) > 1 else []
    flags += [f"--threads {settings[0]['threads']}"]
    return f'make demo ARGS="{" ".join(flags)}"'


def demo_table(demo: dict) -> str:
    """The fine-tuning run, a row a method."""
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
        seconds = "-" if busy else f"{row['seconds_per_step']:.3f}"  # runs follow one another, so load hits each differently
        numbers = [f"{row['trained_parameters']:,}", disk, accuracy, seconds, memory]
        lines.append(f"| {row['method']} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def keep_demo(folder: Path) -> Path:
    """Copies a demo run's table, without its loss curves. ValueError where it is none."""
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
        for name in ("model", "out", "text"):  # paths of the machine it ran on
            run["settings"].pop(name, None)
    name = f"demo-{len({run['settings']['method'] for run in demo['runs']})}-methods-{demo['rows'][-1]['runs']}-seeds.json"
    target = RESULTS / slug(demo["machine"].rsplit(",", 1)[0]) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(demo, indent=1) + "\n")
    return temporary.replace(target)


# ---- README ----------------------------------------------------------------------------------------------------------


def _replace(text: str, name: str, parts: list[str]) -> str:
    pattern = re.compile(rf"(<!-- {name}:begin [^\n]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        if name in OPTIONAL:
            return text
        raise ValueError(f"README.md: expected the markers {name}:begin and {name}:end, found none")
    body = "\n\n".join(parts) + "\n" if parts else ""
    return pattern.sub(lambda m: m[1] + body + m[2], text)


def sections(results: Path = RESULTS) -> dict[str, list[str]]:
    """The generated text of each section, from the results of every machine."""
    found: dict[str, list[str]] = {name: [] for name in (*REQUIRED, *OPTIONAL)}
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        found["demo"] += [demo_table(json.loads(path.read_text())) for path in sorted(folder.glob("demo-*.json"))]
        for name in ("layer", "shared", "model", "kernels"):
            cells = _read(folder / f"{name}.jsonl")
            if cells:
                link = f"bench/results/{folder.name}"
                pictures = {path.stem: f"{link}/{path.name}" for path in folder.glob("*.png")}
                found[name].append(tables.TABLES[name](cells, pictures))
    rows, estimates, folder = tables.traffic_rows(results), tables.static_found(results), results / "simt-executor"
    if rows:
        found["traffic"].append(tables.traffic_table(rows, estimates, (folder / "projection.png").exists()))
    if estimates:
        found["static"].append(tables.static_table(estimates, (folder / "static.png").exists()))
    return found


def rebuild(text: str, results: Path = RESULTS) -> str:
    """README's text with its tables made anew."""
    for name, parts in sections(results).items():
        text = _replace(text, name, parts)
    return text


def draw(results: Path = RESULTS) -> list[Path]:
    """All pictures, from the same cells as the tables."""
    from . import plots, plots_more, plots_static

    written = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        written += plots.draw(_read(folder / "layer.jsonl"), folder)
        written += plots_more.draw_model(_read(folder / "model.jsonl"), folder)
        written += plots_more.draw_shared(_read(folder / "shared.jsonl"), folder)
        written += plots_more.draw_kernels(_read(folder / "kernels.jsonl"), folder)
    rows, estimates, folder = tables.traffic_rows(results), tables.static_found(results), results / "simt-executor"
    times = tables.layer_projections(tables.README_PROJECTION, rows, estimates)
    if times:
        written += plots_more.draw_projection(tables.README_PROJECTION, rows, times, folder)
    return written + plots_static.draw_static(estimates, folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--keep-demo", type=Path, metavar="FOLDER", help="keep the table of a demo run")
    parser.add_argument("--check", action="store_true", help="exit 1 if README.md is not what the results give")
    options = parser.parse_args(argv)
    if options.keep_demo and options.check:
        raise ValueError("check: it changes nothing; expected no --keep-demo beside it, got one")
    if options.keep_demo:
        print(f"kept {keep_demo(options.keep_demo)}")
    old = README.read_text(encoding="utf-8")
    if not options.check:
        for path in draw():
            print(f"drew {path.relative_to(ROOT)}")
    new = rebuild(old)
    if options.check:
        if old != new:
            print("README.md: its tables are not those of bench/results; run python -m bench.report", file=sys.stderr)
        return int(old != new)
    temporary = README.with_suffix(".tmp")
    temporary.write_text(new, encoding="utf-8")
    temporary.replace(README)
    return 0
