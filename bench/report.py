"""Rebuilds README's tables from the results that are kept in bench/results/, so that no number there is typed by hand.

python -m bench.report                              rewrite README.md's tables
python -m bench.report --keep-demo demo_results     first keep a demo run's table in bench/results/<machine>/
python -m bench.report --check                      change nothing; exit 1 if README differs
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from .shapes import Case
from .store import RESULTS, ROOT, Store, latest
from .timing import slug

README = ROOT / "README.md"
SHOWN = ("lora-eager", "lora-in-place", "lora-in-place-beta", "lora-peft", "lotr_ext")
HEADS = ("LoRA eager", "LoRA in-place", "LoRA in-place, beta", "LoRA PEFT", "**lotr_ext**")


def layer_table(cells: list[dict]) -> str:
    """Excess over the frozen layer, forward + backward, a row a case."""
    facts, clock = cells[-1]["machine"], cells[-1]["clock"]
    seconds = "wall seconds" if clock == "wall" else "CPU seconds"
    busy = _busy(max(c["load"] for c in cells), max(c["case"]["threads"] for c in cells))
    lines = [
        f"{facts['name']}, torch {facts['torch']}, {seconds}, medians of {cells[-1]['rounds']} interleaved rounds{busy}:",
        "",
        "| M x K x N, r | dtype, threads | FLOP floor | " + " | ".join(HEADS) + " | lotr_ext / LoRA eager |",
        "|---|---|---:|" + "---:|" * (len(HEADS) + 1),
    ]
    cases: dict[Case, dict[str, float]] = {}
    for cell in cells:
        cases.setdefault(Case(**cell["case"]), {})[cell["rival"]] = cell["step"]["excess"][1]
    for case, excess in sorted(cases.items(), key=lambda item: (item[0].threads, item[0].dtype != "fp32", item[0])):
        if not set(SHOWN) <= set(excess):
            continue
        numbers = " | ".join(f"{excess[rival]:.1%}" for rival in SHOWN)
        ratio = f"{excess['lotr_ext'] / excess['lora-eager']:.2f}" if excess["lora-eager"] > 0 else "-"
        name = f"{case.m} x {case.k} x {case.n}, {case.r}"
        lines.append(f"| {name} | {case.dtype}, {case.threads} | {case.flop_floor():.1%} | {numbers} | {ratio} |")
    return "\n".join(lines)


def _busy(load: float, threads: int) -> str:
    """A warning where other programs ran beside the measurement."""
    return f"; load average {load:.1f}: the machine was busy, so read times with care" if load > threads + 1 else ""


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
    busy = _busy(demo["load"], demo["runs"][0]["settings"]["threads"])
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


def _replace(text: str, name: str, tables: list[str]) -> str:
    pattern = re.compile(rf"(<!-- {name}:begin [^\n]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md: expected the markers {name}:begin and {name}:end, found none")
    body = "\n\n".join(tables) + "\n" if tables else ""
    return pattern.sub(lambda m: m[1] + body + m[2], text)


def rebuild(text: str, results: Path = RESULTS) -> str:
    """README's text with its tables made anew from the results of every machine."""
    layers = [layer_table(cells) for path in sorted(results.glob("*/layer.jsonl")) if (cells := latest(Store(path).read()))]
    demos = [demo_table(json.loads(path.read_text())) for path in sorted(results.glob("*/demo-*.json"))]
    return _replace(_replace(text, "layer", layers), "demo", demos)


def keep_demo(folder: Path) -> Path:
    """Copies a demo run's table, without its loss curves."""
    source = folder / "table.json"
    if not source.is_file():
        raise FileNotFoundError(f"keep-demo: expected {source}, found none; run make demo first")
    demo = json.loads(source.read_text())
    for run in demo["runs"]:
        run.pop("losses", None)
        for name in ("model", "out", "text"):  # paths of the machine it ran on
            run["settings"].pop(name, None)
    name = f"demo-{len({run['settings']['method'] for run in demo['runs']})}-methods-{demo['rows'][-1]['runs']}-seeds.json"
    target = RESULTS / slug(demo["machine"].rsplit(",", 1)[0]) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(demo, indent=1) + "\n")
    return target


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--keep-demo", type=Path, metavar="FOLDER", help="keep the table of a demo run")
    parser.add_argument("--check", action="store_true", help="exit 1 if README.md is not what the results give")
    options = parser.parse_args(argv)
    if options.keep_demo:
        print(f"kept {keep_demo(options.keep_demo)}")
    old = README.read_text(encoding="utf-8")
    new = rebuild(old)
    if options.check:
        if old != new:
            print("README.md: its tables are not those of bench/results; run python -m bench.report", file=sys.stderr)
        return int(old != new)
    temporary = README.with_suffix(".tmp")
    temporary.write_text(new, encoding="utf-8")
    temporary.replace(README)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"bench.report: {error}")
