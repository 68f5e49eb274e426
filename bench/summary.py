"""The page about a run of bench.gpu: what passed, how fast it is, and what to do next.

python -m bench.summary build-gpu/results     prints it again
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pandas as pd

from .common import markdown_table, over_text, read, seconds_text, slug

Outcomes = dict[str, dict]  # part: {"outcome": .., "seconds": ..}
# Columns of the table of layers, as far as they were measured.
LAYER_RIVALS = {
    "lotr_ext": "lotr_ext",
    "lotr_ext-two_pass": "two_pass",
    "lotr_ext-beta": "beta",
    "lotr_ext-fused": "fused",
    "lotr_ext-fp32": "float32 adapter",
    "lora-eager": "LoRA eager",
    "lora-in-place": "LoRA in place",
    "lora-beta": "LoRA in place, beta",
    "lora-compiled": "LoRA compiled",
    "lora-peft": "LoRA PEFT",
}
MODEL_RIVALS = {
    "lotr_ext": "lotr_ext",
    "lotr_ext-fused": "fused",
    "lotr_ext-core": "cores only",
    "lotr-eager": "LoTR in three lines",
    "lora-peft": "LoRA PEFT",
    "vera-peft": "VeRA PEFT",
}
QUICK_ROUNDS = 3
FUSED_GOAL = 0.94  # of cuBLAS: below it the fused kernel is slower than beta


def outcomes_in(results: Path) -> Outcomes:
    """Returns the outcomes of parts that ran before, in this folder."""
    path = results / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def error_lines(text: str) -> list[str]:
    """Returns the lines of a log that say most: the first with "CUDA error", and the last ones."""
    lines = [line.rstrip()[:300] for line in text.splitlines() if line.strip()]
    first = [line for line in lines if "CUDA error" in line][:1]
    return [*first, *(line for line in lines[-5:] if line not in first)]


def page(results: Path, outcomes: Outcomes) -> str:
    """Returns the page in Markdown."""
    frames = {path.stem: read(path) for path in results.glob("*/*.jsonl")}
    sections = [
        _head(results, frames),
        _parts(results, outcomes),
        _smoke(results),
        _layers(frames),
        _kernels(frames),
        _model(frames),
        _next_steps(results, outcomes, frames),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(results: Path, frames: dict[str, pd.DataFrame]) -> str:
    lines = []
    log = results / "info.log"
    if log.exists():
        wanted = ("CPU kernels", "lotr_ext ", "torch ", "CUDA ", "           they", "cuda:0")
        text = log.read_text(errors="replace")
        lines += [line for line in text.splitlines() if line.startswith(wanted)]
    rows = pd.concat(frames.values()) if frames else pd.DataFrame()
    machine = "a machine without measurements"
    if len(rows):
        last = rows.iloc[-1]
        machine = last["machine"]
        lines.append(f"measured   {last['date']}, commit {last['commit'] or 'unknown'}")
    if "sm_mhz" in rows:
        clocks = rows["sm_mhz"].dropna()
        watts = rows["gpu_watts"].dropna()
        lines.append(
            f"clocks     SM {clocks.min():.0f} to {clocks.max():.0f} MHz while measuring, "
            f"up to {watts.max():.0f} W, {rows['gpu_celsius'].max():.0f} degrees C"
        )
    body = "\n".join(f"    {line}" for line in lines)
    return f"# lotr_ext on {machine}\n\n{body}" if body else f"# lotr_ext on {machine}"


def _test_counts(log: Path) -> str:
    """ "312 passed, 2 failed" from the lines of a verbose pytest, also of one that was stopped."""
    words = re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)\b", log.read_text(errors="replace"))
    counts = Counter(word.lower() for word in words)
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _parts(results: Path, outcomes: Outcomes) -> str:
    rows = []
    for name, part in outcomes.items():
        log = results / f"{name}.log"
        details = ""
        if name.startswith("test_") and log.exists():
            details = _test_counts(log)
        elif name == "smoke":
            details = _smoke_counts(results)
        elif not part["outcome"].startswith(("done", "skipped")) and log.exists():
            details = error_lines(log.read_text(errors="replace"))[:1]
            details = details[0].replace("|", "/")[:160] if details else ""
        rows.append(
            {"part": name, "outcome": part["outcome"], "s": part["seconds"], "details": details}
        )
    return "## What ran\n\n" + markdown_table(pd.DataFrame(rows)) if rows else ""


def _smoke_rows(results: Path) -> list[dict]:
    path = results / "smoke.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _smoke_counts(results: Path) -> str:
    rows = _smoke_rows(results)
    kinds = Counter(row["outcome"].partition(":")[0] for row in rows)
    not_run = rows[0]["planned"] - len(rows) if rows else 0
    if not_run:
        kinds["not run"] = not_run
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _smoke(results: Path) -> str:
    """What did not pass, one line each; skipped forms by their reason."""
    failures = []
    skipped: Counter = Counter()
    for row in _smoke_rows(results):
        kind, _, reason = row["outcome"].partition(": ")
        if kind == "skipped":
            skipped[reason] += 1
        elif kind != "passed":
            failures.append(f"- **{row['form']}, {row['dtype']}** {row['outcome']}")
    lines = failures + [f"- {count} skipped: {reason}" for reason, count in skipped.items()]
    if not lines:
        return ""
    return "## Operators against float64: what did not pass\n\n" + "\n".join(lines)


def _over_table(frame: pd.DataFrame, title: pd.Series, rivals: dict[str, str]) -> str:
    """Returns a row per case, a column per rival: the time of a step over the frozen one."""
    frame = frame.assign(title=title)
    steps = frame[frame["stage"] == "step"]
    rows = []
    for name, case in steps.groupby("title", sort=False):
        times = case.set_index("rival")
        row = {"": name}
        if "frozen" in times.index:
            row["frozen"] = seconds_text(times.loc["frozen", "seconds"])
        for rival, words in rivals.items():
            if rival in times.index:
                row[words] = over_text(times.loc[rival])
        rows.append(row)
    return markdown_table(pd.DataFrame(rows).fillna("-"))


def _layers(frames: dict[str, pd.DataFrame]) -> str:
    frame = frames.get("layer")
    if frame is None:
        return ""
    columns = ["m", "k", "n", "r", "dtype"]
    title = frame[columns].apply(lambda row: "{} x {} x {}, r {}, {}".format(*row), axis=1)
    table = _over_table(frame, title, LAYER_RIVALS)
    head = "## One layer: time over the frozen layer, forward and backward"
    note = f"Medians of {frame['rounds'].min():.0f} rounds with 95 % intervals. two_pass, beta and "
    note += "fused are strategies of lotr_ext."
    return f"{head}\n\n{note}\n\n{table}"


def _model(frames: dict[str, pd.DataFrame]) -> str:
    frame = frames.get("model")
    if frame is None:
        return ""
    columns = ["model", "batch", "sequence", "r", "dtype"]
    title = frame[columns].apply(lambda row: "{}, {} x {}, r {}, {}".format(*row), axis=1)
    table = _over_table(frame, title, MODEL_RIVALS)
    return f"## A whole model: time of a training step over the frozen model's\n\n{table}"


def _kernel_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Our kernels, each with the time of the library's product in the same case."""
    key = ["kernel", "m", "n", "r", "dtype"]
    ours = frame[frame["rival"] == "lotr_ext"].set_index(key)
    for rival in ("library", "base product"):
        ours[rival] = frame[frame["rival"] == rival].set_index(key)["seconds"]
    return ours.reset_index()


def _kernels(frames: dict[str, pd.DataFrame]) -> str:
    frame = frames.get("kernels")
    if frame is None:
        return ""
    rows = []
    for _, row in _kernel_rows(frame).iterrows():
        rows.append(
            {
                "kernel": f"{row['kernel']} {row['m']} x {row['n']}, r {row['r']}, {row['dtype']}",
                "time": seconds_text(row["seconds"]),
                "GB/s": f"{row['gb_per_s']:.0f}",
                "of a copy": f"{row['of_copy']:.0%}",
                "library / ours": f"{row['library'] / row['seconds']:.2f}",
            }
        )
    copy = frame["copy_gb_per_s"].max()
    head = f"## Kernels: share of the bandwidth of a copy ({copy:.0f} GB/s, read and written)"
    if frame["of_copy"].max() > 1:
        head += "\n\nOperands that a cache holds are read faster than a copy reads memory."
    return f"{head}\n\n{markdown_table(pd.DataFrame(rows))}"


# ---- what to do next -----------------------------------------------------------------------------


def _next_steps(results: Path, outcomes: Outcomes, frames: dict[str, pd.DataFrame]) -> str:
    steps = []
    kinds = ("wrong", "failed", "crashed", "hung")
    broken = [row for row in _smoke_rows(results) if row["outcome"].startswith(kinds)]
    if broken:
        first = broken[0]
        steps.append(
            f"Mend the operators that did not pass, first: `python -m bench.smoke --forms "
            f'"{first["form"]}" --dtypes {first["dtype"]}`.'
        )
    for name, part in outcomes.items():
        if part["outcome"].startswith("failed") and name != "smoke":
            steps.append(f"Read `{name}.log` in results.tar.gz: the part {part['outcome']}.")
    unfinished = [
        name
        for name, part in outcomes.items()
        if part["outcome"].startswith(("stopped", "no time"))
    ]
    if unfinished:
        words = ",".join(unfinished)
        steps.append(f"Run the rest: `python -m bench.gpu --parts {words}`, with more --budget.")
    steps += _strategy_steps(frames)
    full = [frame for frame in frames.values() if frame["rounds"].min() > QUICK_ROUNDS]
    if full:
        folder = slug(full[0].iloc[-1]["machine"])
        steps.append(f"Copy the result files into `bench/results/{folder}` and run `bench.plot`.")
    if not steps:
        return ""
    return "## What to do next\n\n" + "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))


def _strategy_steps(frames: dict[str, pd.DataFrame]) -> list[str]:
    """Which strategy a layer should take, by what was measured."""
    steps = []
    if "kernels" in frames:
        rows = _kernel_rows(frames["kernels"])
        fused = rows[rows["kernel"] == "gemm_lotr"]
        if len(fused):
            share = float((fused["base product"] / fused["seconds"]).median())
            verdict = "keep it" if share >= FUSED_GOAL else "remove it"
            steps.append(
                f"gemm_lotr runs at {share:.0%} of the library's base product (the goal is "
                f"{FUSED_GOAL:.0%}): {verdict}."
            )
    if "layer" in frames:
        frame = frames["layer"]
        times = frame[frame["stage"] == "step"].pivot_table(
            index=["m", "k", "n", "r", "dtype"], columns="rival", values="seconds"
        )
        strategies = [name for name in ("two_pass", "beta", "fused") if f"lotr_ext-{name}" in times]
        if len(strategies) > 1:
            best = times[[f"lotr_ext-{name}" for name in strategies]].idxmin(axis=1)
            counts = Counter(best.str.removeprefix("lotr_ext-"))
            words = ", ".join(f"{name} in {count} cases" for name, count in counts.most_common())
            steps.append(f"Fastest strategy: {words}. Compare BETA_TOKENS in core/strategy.py.")
    return steps


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(page(folder, outcomes_in(folder)), end="")
