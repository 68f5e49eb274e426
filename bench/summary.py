"""The page about a run of bench.gpu: what passed, how fast it is, and what to do next.

    python -m bench.summary build-gpu/results     prints it again

It is made only from what the parts left in the folder `results`:

    summary.json         the outcome and the seconds of each part
    <part>.log           its output
    smoke.jsonl          a row per form of an operator (bench.smoke)
    <machine>/*.jsonl    the rows of the measuring programs
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from .common import markdown_table, pivot, read, seconds_text, slug

Outcomes = dict[str, dict]  # part: {"outcome": .., "seconds": ..}
# The lines of lotr_ext.info that the page quotes begin with one of these.
INFO_LINES = ("CPU kernels", "lotr_ext ", "torch ", "CUDA ", "           they", "cuda:0")
QUICK_ROUNDS = 3
FUSED_GOAL = 0.94  # of cuBLAS's speed: below it the fused kernel is slower than beta


# ---- what the parts left -------------------------------------------------------------------------


def outcomes_in(results: Path) -> Outcomes:
    """Returns the outcomes of parts that ran before, in this folder."""
    return json.loads(text_of(results / "summary.json") or "{}")


def text_of(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def error_lines(log: Path) -> list[str]:
    """Returns the most telling lines of a log: the first with "CUDA error", and the last ones."""
    lines = [line.rstrip()[:300] for line in text_of(log).splitlines() if line.strip()]
    first = [line for line in lines if "CUDA error" in line][:1]
    return [*first, *(line for line in lines[-5:] if line not in first)]


def last_case(log: Path) -> list[str]:
    """Returns the case that ran when a log ended: ["3", "42", "title"] of its "[3/42] title".

    The list is empty if no case began.
    """
    cases = re.findall(r"^\[(\d+)/(\d+)\] (.*)$", text_of(log), re.MULTILINE)
    return list(cases[-1]) if cases else []


# ---- the page ------------------------------------------------------------------------------------


def page(results: Path, outcomes: Outcomes) -> str:
    """Returns the page in Markdown, without the sections that have nothing to show."""
    frames = {path.stem: read(path) for path in results.glob("*/*.jsonl")}
    smoke = read(results / "smoke.jsonl").to_dict("records")
    sections = [_head(results, frames), _parts(results, outcomes, smoke), _smoke(smoke)]
    if "layer" in frames:
        sections.append(
            _over_frozen(
                frames["layer"],
                title="One layer: time over the frozen layer, forward and backward",
                title_format="{m} x {k} x {n}, r {r}, {dtype}",
            )
        )
    if "kernels" in frames:
        sections.append(_kernels(frames["kernels"]))
    if "model" in frames:
        sections.append(
            _over_frozen(
                frames["model"],
                title="A model: time of a training step over the frozen model's",
                title_format="{model}, {batch} x {sequence}, r {r}, {dtype}",
            )
        )
    steps = _next_steps(outcomes, frames, smoke)
    numbered = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
    sections.append(f"## What to do next\n\n{numbered}" if steps else "")
    return "\n\n".join(filter(None, sections)) + "\n"


def _head(results: Path, frames: dict[str, pd.DataFrame]) -> str:
    info = text_of(results / "info.log").splitlines()
    lines = [line for line in info if line.startswith(INFO_LINES)]
    machine = "a machine without measurements"
    if frames:
        rows = pd.concat(frames.values())
        last = rows.iloc[-1]
        machine = last["machine"]
        lines.append(f"measured   {last['date']}, commit {last['commit'] or 'unknown'}")
        if "sm_mhz" in rows:
            # A card without a sensor has rows without its column.
            most = rows.reindex(columns=["gpu_watts", "gpu_celsius"]).max()
            power = "up to {gpu_watts:.0f} W, {gpu_celsius:.0f} C".format(**most)
            lines.append(
                f"clocks     SM {rows['sm_mhz'].min():.0f} to {rows['sm_mhz'].max():.0f} MHz "
                f"while measuring, {power}"
            )
    return "\n".join([f"# lotr_ext on {machine}", "", *(f"    {line}" for line in lines)])


def _parts(results: Path, outcomes: Outcomes, smoke: list[dict]) -> str:
    rows = [
        {
            "part": name,
            "outcome": part["outcome"],
            "details": _details(name, part["outcome"], results / f"{name}.log", smoke),
            "s": part["seconds"],
        }
        for name, part in outcomes.items()
    ]
    return "## What ran\n\n" + markdown_table(pd.DataFrame(rows), texts=3) if rows else ""


def _details(name: str, outcome: str, log: Path, smoke: list[dict]) -> str:
    """Returns what the table shows of a part besides its outcome: counts, or where it ended."""
    details = ""
    if name == "smoke":
        kinds = [row["outcome"].partition(":")[0] for row in smoke]
        not_run = smoke[0]["planned"] - len(smoke) if smoke else 0
        details = counted(kinds + ["not run"] * not_run)
    elif name.startswith("test_"):  # lines of a verbose pytest, also of one that was stopped
        words = re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)\b", text_of(log))
        details = counted(word.lower() for word in words)
    elif outcome.startswith("stopped") and last_case(log):
        details = "in case {} of {}: {}".format(*last_case(log))
    elif outcome.startswith("failed"):
        details = " ".join(error_lines(log)[:1])
    return details.replace("|", "/")[:160]


def counted(words: Iterable[str]) -> str:
    """Returns "312 passed, 2 failed"."""
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())


def _smoke(rows: list[dict]) -> str:
    """Returns a line for each form that did not pass, and for each reason to skip some."""
    lines = ["- **{form}, {dtype}** {outcome}".format(**row) for row in broken(rows)]
    skipped = [row["outcome"] for row in rows if row["outcome"].startswith("skipped")]
    lines += [f"- {count} {outcome}" for outcome, count in Counter(skipped).items()]
    head = "## Operators against float64: what did not pass\n\n"
    return head + "\n".join(lines) if lines else ""


def broken(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not row["outcome"].startswith(("passed", "skipped"))]


def _over_frozen(frame: pd.DataFrame, *, title: str, title_format: str) -> str:
    rounds = f"Medians of {frame['rounds'].min():.0f} rounds with 95 % intervals."
    return f"## {title}\n\n{rounds}\n\n{markdown_table(pivot(frame, title_format, 'frozen'))}"


def _kernel_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of our kernels, with columns for the library's times in the same case."""
    key = ["kernel", "m", "n", "r", "dtype"]
    ours = frame[frame["rival"] == "lotr_ext"].set_index(key)
    for rival in ("library", "base product"):
        ours[rival] = frame[frame["rival"] == rival].set_index(key)["seconds"]
    return ours.reset_index()


def _kernels(frame: pd.DataFrame) -> str:
    rows = _kernel_rows(frame)
    form = "{kernel} {m} x {n}, r {r}, {dtype}"
    table = pd.DataFrame(
        {
            "kernel": [form.format(**row) for row in rows.to_dict("records")],
            "time": rows["seconds"].map(seconds_text),
            "GB/s": rows["gb_per_s"].map("{:.0f}".format),
            "of a copy": rows["of_copy"].map("{:.0%}".format),
            "library / ours": (rows["library"] / rows["seconds"]).map("{:.2f}".format),
        }
    )
    head = (
        "## Kernels: share of the bandwidth of a copy "
        f"({frame['copy_gb_per_s'].max():.0f} GB/s, read and written)"
    )
    if frame["of_copy"].max() > 1:
        head += "\n\nOperands that a cache holds are read faster than a copy reads memory."
    return f"{head}\n\n{markdown_table(table)}"


# ---- what to do next -----------------------------------------------------------------------------


def _next_steps(
    outcomes: Outcomes, frames: dict[str, pd.DataFrame], smoke: list[dict]
) -> list[str]:
    """Returns sentences in order of urgency: faults, what has not run, speed, keeping results."""
    steps = []
    if broken(smoke):
        words = '--forms "{form}" --dtypes {dtype}'.format(**broken(smoke)[0])
        steps.append(
            f"First mend the operators that did not pass: `python -m bench.smoke {words}`."
        )
    unfinished = []
    for name, part in outcomes.items():
        if part["outcome"].startswith("failed") and name != "smoke":
            steps.append(f"Read `{name}.log` in results.tar.gz: the part {part['outcome']}.")
        if part["outcome"].startswith(("stopped", "no time")):
            unfinished.append(name)
    if unfinished:
        words = ",".join(unfinished)
        steps.append(f"Run the rest: `python -m bench.gpu --parts {words}`, with more --budget.")
    if "kernels" in frames:
        steps += _fused_steps(frames["kernels"])
    if "layer" in frames:
        steps += _strategy_steps(frames["layer"])
    not_quick = [frame for frame in frames.values() if frame["rounds"].min() > QUICK_ROUNDS]
    if not_quick:
        folder = slug(not_quick[0].iloc[-1]["machine"])
        steps.append(f"Copy the result files into `bench/results/{folder}` and run `bench.plot`.")
    return steps


def _fused_steps(kernels: pd.DataFrame) -> list[str]:
    """Returns a sentence on the speed of gemm_lotr, the kernel of the fused strategy."""
    rows = _kernel_rows(kernels).query("kernel == 'gemm_lotr'")
    if not len(rows):
        return []
    share = (rows["base product"] / rows["seconds"]).median()
    verdict = "keep it" if share >= FUSED_GOAL else "remove it"
    return [
        f"gemm_lotr runs at {share:.0%} of the library's base product (the goal is "
        f"{FUSED_GOAL:.0%}): {verdict}."
    ]


def _strategy_steps(layers: pd.DataFrame) -> list[str]:
    """Returns a sentence that counts the cases in which each strategy was the fastest."""
    strategies = [f"lotr_ext-{name}" for name in ("two_pass", "beta", "fused")]
    rows = layers[(layers["stage"] == "step") & layers["rival"].isin(strategies)]
    times = rows.pivot_table(index=["m", "k", "n", "r", "dtype"], columns="rival", values="seconds")
    if len(times.columns) < 2:
        return []
    best = Counter(times.idxmin(axis=1).str.removeprefix("lotr_ext-"))
    words = ", ".join(f"{name} in {count} cases" for name, count in best.most_common())
    return [f"Fastest strategy: {words}. Compare BETA_TOKENS in core/strategy.py."]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(page(folder, outcomes_in(folder)), end="")
