"""What all measuring programs share: options, interleaved rounds, intervals, result files, tables, two checkouts compared.

A program is a `Program`: its cases, and for each case the rivals as `Step`s. Every rival runs once a round, in random order, so
that drift and other load affect all alike. A time is the median over rounds. A ratio is the median of per-round ratios, with a
95 % interval of a paired bootstrap over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
QUICK = (
    ROOT / "demo_results" / "bench"
)  # of --quick: its few rounds must not replace what docs show
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {
    "frozen": "frozen",
    "lora-eager": "LoRA eager",
    "lora-in-place": "LoRA in-place",
    "lora-beta": "LoRA in-place, beta",
    "lora-compiled": "LoRA compiled",
    "lora-peft": "LoRA PEFT",
    "lora-grouped": "LoRA by grouped products",
    "vera-peft": "VeRA PEFT",
    "lotr-eager": "LoTR in three lines",
    "lotr_ext": "lotr_ext",
}  # one name for each method, in every table and picture
VARIANTS = {
    "-as-lotr": ", size of LoTR",
    "-as-lora": ", size of LoRA",
    "-core": ", cores only",
    "-model": ", in a model",
    "-compiled": ", compiled",
    "-one": ", one task",
    "-row": ", a task a row",
    "-token": ", a task a token",
    "-half": ", half of the tokens the base's",
}
CLOCKS = ("wall", "cpu", "events")
FLUSH_BYTES = 256 << 20  # at least, and at least four times the L2
QUEUE_CYCLES = 6_000_000  # the GPU waits a few milliseconds, in which the CPU queues a whole step
Case = dict[str, Any]  # what is measured, flat, as it stands in the result file
console = Console(width=None if sys.stdout.isatty() else 180)


def named(rival: str) -> str:
    """ "lotr_ext-core" -> "lotr_ext, cores only"."""
    for ending, words in VARIANTS.items():
        if rival.endswith(ending) and rival not in NAMES:
            return NAMES.get(name := rival.removesuffix(ending), name) + words
    return NAMES.get(rival, rival)


# ---- what is timed ---------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """Stages by name that are timed one after the other; each gets the result of the one before. prepare runs before them,
    untimed. layers: a time is divided by this. facts: further columns of the rival's rows."""

    stages: dict[str, Callable[[Any], Any]]
    prepare: Callable[[], None] = lambda: None
    layers: int = 1
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Any:
        self.prepare()
        state = None
        for stage in self.stages.values():
            state = stage(state)
        return state


@dataclass
class Group:
    """The rivals of a case by name. deal: called before each round, to draw what the steps are given in it."""

    steps: dict[str, Step]
    deal: Callable[[random.Random], None] = lambda draw: None


def training(
    forward: Callable[[], Tensor], g: Tensor | None, leaves: Iterable[Tensor], **further: Any
) -> Step:
    """Forward and backward as inside a model. Before each step the gradients of `leaves` are dropped."""
    leaves = list(leaves)

    def drop_gradients() -> None:
        for leaf in leaves:
            leaf.grad = None

    return Step(
        {"forward": lambda _: forward(), "backward": lambda y: y.backward(g)},
        drop_gradients,
        **further,
    )


class Clock:
    """Seconds of each stage of a Step.

    wall     the time that passes; on a GPU from an idle device to an idle device, so Python and launches count
    cpu      CPU seconds of this process, for one thread on a busy machine
    events   GPU only: the device's own time. The device waits while the CPU queues the stages, so launches are hidden

    On a GPU each measurement starts with a cold L2: a large buffer is read before. It is not written, since dirty lines would
    be written back during the measurement.
    """

    def __init__(self, device: str, kind: str):
        self.kind, self.cuda = kind, device == "cuda"
        self.read = time.process_time if kind == "cpu" else time.perf_counter
        if self.cuda:
            size = max(
                FLUSH_BYTES, 4 * getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
            )
            self._large, self._sum = (
                torch.zeros(size // 4, device=device),
                torch.zeros((), device=device),
            )

    def seconds(self, step: Step, repeats: int = 1) -> list[float]:
        """Of each stage and layer, averaged over repeats made back to back."""
        measure = self._events if self.kind == "events" else self._read
        total = np.sum([measure(step) for _ in range(repeats)], 0)
        return (total / repeats / step.layers).tolist()

    def _read(self, step: Step) -> list[float]:
        step.prepare()
        state, found = None, []
        if self.cuda:
            torch.sum(self._large, 0, out=self._sum)
            torch.cuda.synchronize()
        last = self.read()
        for stage in step.stages.values():
            state = stage(state)
            if self.cuda:
                torch.cuda.synchronize()
            now = self.read()
            found.append(now - last)
            last = now
        return found

    def _events(self, step: Step) -> list[float]:
        step.prepare()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(step.stages) + 1)]
        torch.sum(self._large, 0, out=self._sum)
        torch.cuda._sleep(
            QUEUE_CYCLES
        )  # private: without it the launches of a short stage would be timed, not the kernels
        state = None
        events[0].record()
        for stage, event in zip(step.stages.values(), events[1:]):
            state = stage(state)
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


class Rounds:
    """Measures a group round by round. slice_s: about how long one measurement of a rival takes."""

    def __init__(self, group: Group, clock: Clock, slice_s: float):
        self.group, self.clock, self.repeats = group, clock, {}
        gc.collect()
        for name, step in group.steps.items():
            clock.seconds(step)
            begin = time.perf_counter()
            clock.seconds(step)
            self.repeats[name] = max(
                1, min(1000, round(slice_s / max(time.perf_counter() - begin, 1e-7)))
            )

    def run(self, turn: int) -> dict[str, list[float]]:
        """Seconds of each rival's stages. Each rival runs once untimed first, so that caches and allocator are as it leaves
        them; the order is that of the turn in every run of the program."""
        draw, found = random.Random(turn), {}
        gc.disable()
        try:
            self.group.deal(draw)
            for name in draw.sample(list(self.group.steps), len(self.group.steps)):
                step = self.group.steps[name]
                self.clock.seconds(step)
                found[name] = self.clock.seconds(step, self.repeats[name])
        finally:
            gc.enable()
        return found


def with_sum(times: Sequence[dict[str, list[float]]], name: str) -> np.ndarray:
    """[stages, rounds] of one rival; with several stages their sum comes last."""
    stages = np.array([one[name] for one in times]).T
    return stages if len(stages) == 1 else np.vstack([stages, stages.sum(0)])


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """The median and its 95 % interval by the bootstrap; NaN for the ends of fewer than three."""
    middle = float(np.median(ratios))
    if len(ratios) < 3 or np.ptp(ratios) == 0:
        return (
            (middle, middle, middle) if len(ratios) >= 3 else (middle, float("nan"), float("nan"))
        )
    found = stats.bootstrap(
        (ratios,), np.median, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    return middle, float(found.low), float(found.high)


def rows_of(
    times: Sequence[dict[str, list[float]]], group: Group, floor: str
) -> list[dict[str, Any]]:
    """A row a rival and stage: the median seconds, and `over`, its time over the floor's of the same round, less one."""
    rows = []
    for name, step in group.steps.items():
        own, like = with_sum(times, name), with_sum(times, floor)
        stages = [*step.stages, "step"][: len(own)]
        for stage, seconds, base in zip(stages, own, like):
            over = dict(zip(("over", "over_low", "over_high"), interval(seconds / base - 1)))
            row = {
                "rival": name,
                "stage": stage,
                "seconds": float(np.median(seconds)),
                **over,
                **step.facts,
            }
            if "least_bytes" in row:
                row["gb_per_s"] = row["least_bytes"] / row["seconds"] / 1e9
            rows.append(row)
    return rows


# ---- counts and checks -----------------------------------------------------------------------------------------------


def error_of(found: Tensor, expected: Tensor) -> float:
    """The relative error (Frobenius)."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check_error(what: str, error: float, limit: float) -> float:
    """Returns the error. Raises ArithmeticError if it is NaN or above the limit."""
    if not error <= limit:
        raise ArithmeticError(f"{what}: relative error expected <= {limit:.2g}, got {error:.1e}")
    return error


def memory_changes(call: Callable[[], object]) -> list[int]:
    """Each CPU allocation (positive) and release (negative) in bytes, in order, of autograd's C++ and our operators too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # private: the public summary of the profiler adds allocations up by operator and loses their order
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most that torch had allocated during call beyond what was allocated before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(itertools.accumulate(memory_changes(call), initial=0))


# ---- the machine -----------------------------------------------------------------------------------------------------


def commit(root: Path = ROOT) -> str:
    """The commit of a source tree, with a + if lotr_ext or csrc were changed; "" where it is not one of git."""
    if shutil.which("git") is None:
        return ""
    git = ["git", "-C", str(root)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    changed = (
        subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "lotr_ext", "csrc"], capture_output=True
        ).returncode
        == 1
    )
    return head + "+" * changed


def machine(device: str) -> str:
    """The processor or GPU. The instruction set is in the name: machines of one name may have different ones."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo, model = Path("/proc/cpuinfo"), platform.machine()
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        model = found[1].strip()
    return f"{model} with {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Columns of every row: where, when and of what it was measured."""
    versions = {"torch": torch.__version__}
    for package in ("peft", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    when = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "load": round(os.getloadavg()[0], 1),
    }
    found = {
        "machine": machine(options.device),
        **when,
        **versions,
        "clock": options.clock,
        "rounds": options.rounds,
    }
    if options.device == "cuda" and shutil.which("nvidia-smi"):
        query = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found


def keep_memory() -> None:
    """Makes glibc's malloc keep freed memory for the rest of this process.

    By default malloc returns a freed block at the end of the heap to the system, and the next allocation has a page fault every
    4 KiB: a tenth of a layer's time, for some rivals and not for others, depending on the order of their frees.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0), mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of glibc's malloc.h


# ---- results and tables ----------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read(path: Path) -> pd.DataFrame:
    """A result file; an empty table where there is none."""
    return pd.read_json(path, lines=True, dtype=False) if path.exists() else pd.DataFrame()


def write(path: Path, frame: pd.DataFrame) -> None:
    """JSON Lines without empty columns, numbers to six digits. A kill leaves the old file or the new one."""
    lines = []
    for record in frame.to_dict("records"):
        kept = {
            name: value
            for name, value in record.items()
            if isinstance(value, list) or not pd.isna(value)
        }
        lines.append(json.dumps({name: _short(value) for name, value in kept.items()}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.6g}")
    return value.item() if isinstance(value, np.generic) else value


def replace_rows(path: Path, rows: list[dict[str, Any]], key: Sequence[str]) -> pd.DataFrame:
    """Puts rows into a file, in the place of those with an equal key. Returns the whole table."""
    frame = pd.concat([read(path), pd.DataFrame(rows)], ignore_index=True)
    frame = frame.drop_duplicates([*key, "rival", "stage"], keep="last", ignore_index=True)
    write(path, frame)
    return frame


def seconds_text(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us" if seconds < 0.01 else f"{seconds * 1e3:.4g} ms"


def bytes_text(count: float) -> str:
    if abs(count) < 2**10:
        return f"{count:.0f} B"
    return f"{count / 2**10:.0f} KiB" if abs(count) < 2**20 else f"{count / 2**20:.1f} MiB"


def over_text(row: pd.Series) -> str:
    """ "6.1 % (5.8 to 6.4)": the median and its interval."""
    if pd.isna(row.get("over_low")):
        return f"{row['over']:.1%}"
    return f"{row['over']:.1%} ({100 * row['over_low']:.1f} to {100 * row['over_high']:.1f})"


def fact_text(name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    if name.endswith("bytes"):
        return bytes_text(value)
    if name == "error":
        return f"{value:.0e}"
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and not value.is_integer()
        else f"{int(value):,}"
    )


ABOUT = {
    "machine",
    "date",
    "commit",
    "load",
    "torch",
    "peft",
    "transformers",
    "clock",
    "rounds",
    "gpu",
    "interval",
}
TIMES = {"rival", "stage", "seconds", "over", "over_low", "over_high"}


def case_table(frame: pd.DataFrame, floor: str, key: Sequence[str]) -> pd.DataFrame:
    """The rivals of one case, which the columns `key` name: the time of each stage, the last stage's over the floor, facts."""
    rows, last = [], frame["stage"].iloc[-1]
    columns = [
        name for name in frame if name not in (*ABOUT, *TIMES, *key) and frame[name].notna().any()
    ]
    for rival, own in frame.groupby("rival", sort=False):
        of = own[own["stage"] == last].iloc[0]
        row = {
            "": named(str(rival)),
            **{s["stage"]: seconds_text(s["seconds"]) for _, s in own.iterrows()},
        }
        row[f"over {named(floor)}"] = "" if rival == floor else over_text(of)
        rows.append(
            row | {name.removesuffix("_bytes"): fact_text(name, of[name]) for name in columns}
        )
    return pd.DataFrame(rows).fillna("-")


def pivot(frame: pd.DataFrame, titles: pd.Series, floor: str) -> pd.DataFrame:
    """A row a case, by its title, a column a rival: the time of the whole step over the floor's."""
    kept = (frame["stage"] == frame["stage"].iloc[-1]) & (frame["rival"] != floor)
    last = frame[kept]
    cells = pd.DataFrame(
        {"": titles[kept], "rival": last["rival"].map(named), "text": last.apply(over_text, axis=1)}
    )
    wide = cells.pivot(index="", columns="rival", values="text").reindex(cells[""].unique())
    order = sorted(cells["rival"].unique(), key=lambda name: [*NAMES.values(), name].index(name))
    return wide[order].fillna("-").reset_index().rename_axis(columns=None)


def show(title: str, table: pd.DataFrame, markdown: bool) -> None:
    """Prints a table for a terminal, or in Markdown for a page."""
    if markdown:
        rule = ["---"] + ["---:"] * (len(table.columns) - 1)
        lines = [list(table.columns), rule, *table.astype(str).values.tolist()]
        print(f"\n{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    shown = Table(title=title, title_justify="left")
    for i, name in enumerate(table.columns):
        shown.add_column(name, justify="right" if i else "left")
    for line in table.astype(str).values.tolist():
        shown.add_row(*line)
    console.print(shown)


# ---- a program -------------------------------------------------------------------------------------------------------


def listed(text: str) -> list[str]:
    return text.split(",")


def sizes(*names: str) -> Callable[[str], list[Case]]:
    """A converter for an option: "512x768x768x16,.." as cases with these names."""

    def convert(text: str) -> list[Case]:
        found = []
        for part in text.split(","):
            if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", part) or part.count("x") != len(names) - 1:
                raise argparse.ArgumentTypeError(
                    f"expected {'x'.join(names)}, numbers of at least 1, got {part!r}"
                )
            found.append(dict(zip(names, map(int, part.split("x")))))
        return found

    return convert


@dataclass(frozen=True)
class Program:
    """One measuring program. cases(options): without dtype and threads, which `options` multiplies. build(case, options): the
    rivals; those of options.rivals alone where it is set. form: a case as text, of its columns. compared: the rivals that
    --against compares. pivoted: one table of all cases instead of one a case."""

    name: str
    doc: str
    cases: Callable[[argparse.Namespace], list[Case]]
    build: Callable[[Case, argparse.Namespace], Group]
    form: str
    floor: str = "frozen"
    rounds: int = 11
    slice_s: float = 0.03
    dtypes: str = "fp32,bf16"
    compared: tuple[str, ...] = ()
    pivoted: bool = False
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None

    def arguments(self, argv: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            prog=f"python -m bench.{self.name}",
            description=self.doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        cuda = torch.cuda.is_available()
        parser.add_argument(
            "--quick",
            action="store_true",
            help="few rounds of the first case, into demo_results/bench",
        )
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
        parser.add_argument(
            "--dtypes",
            type=listed,
            default=listed(self.dtypes),
            help=f"some of {', '.join(DTYPES)}",
        )
        parser.add_argument(
            "--threads", type=listed, default=["1"], help="CPU thread counts, comma-separated (1)"
        )
        parser.add_argument(
            "--rounds", type=int, help=f"rounds of all rivals per case ({self.rounds}; against: 41)"
        )
        parser.add_argument(
            "--clock",
            choices=CLOCKS,
            help="cpu (one CPU thread), wall (more threads), events (GPU)",
        )
        parser.add_argument("--rivals", type=listed, help="some of the rivals, comma-separated")
        parser.add_argument(
            "--results", type=Path, help="folder for the results (bench/results/<machine>)"
        )
        parser.add_argument(
            "--markdown",
            action="store_true",
            help="print the tables in Markdown, as docs have them",
        )
        parser.add_argument(
            "--show",
            type=Path,
            metavar="FILE",
            help="print the tables of a result file, and measure nothing",
        )
        if self.compared:
            parser.add_argument(
                "--against",
                type=Path,
                help="another built checkout, whose lotr_ext runs in turns with ours",
            )
        self.options(parser)
        options = parser.parse_args(argv)
        options.against = getattr(options, "against", None)
        self._check(parser, options)
        return options

    def _check(self, parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
        """Ends the program for a bad option; fills in what depends on others."""
        count = os.cpu_count() or 1
        if bad := [
            text for text in options.threads if not (text.isdigit() and 1 <= int(text) <= count)
        ]:
            parser.error(f"threads: expected numbers from 1 to {count}, got {bad[0]!r}")
        if bad := [name for name in options.dtypes if name not in DTYPES]:
            parser.error(f"dtypes: expected some of {', '.join(DTYPES)}, got {bad[0]!r}")
        if options.device == "cuda" and not torch.cuda.is_available():
            parser.error("device: expected a GPU for cuda, found none; give --device cpu")
        options.threads = sorted(map(int, options.threads))
        usual = (
            "events" if options.device == "cuda" else "cpu" if options.threads == [1] else "wall"
        )
        options.clock = options.clock or usual
        if options.clock not in ("wall", usual):
            parser.error(
                f"clock: expected wall or {usual} on {options.device} with {options.threads} threads"
            )
        options.rounds = options.rounds or (
            3 if options.quick else 41 if options.against else self.rounds
        )
        if options.against and not list((options.against / "lotr_ext").glob("_C*.so")):
            parser.error(
                f"against: expected a checkout with a built lotr_ext, got {options.against}; build it there first"
            )

    def all_cases(self, options: argparse.Namespace) -> list[Case]:
        shapes = self.cases(options)
        made = itertools.product(
            options.threads, options.dtypes, shapes[: 1 if options.quick else None]
        )
        return [{**shape, "dtype": dtype, "threads": threads} for threads, dtype, shape in made]

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Measures all cases. Returns 1 if a case or a rival could not be measured."""
        options = self.arguments(argv)
        if options.show:
            self.tables(read(options.show), list(self.all_cases(options)[0]), options.markdown)
            return 0
        if options.against:
            return compare(self, options, list(sys.argv[1:] if argv is None else argv))
        keep_memory()
        about, failed = facts(options), []
        folder = options.results or (QUICK if options.quick else RESULTS) / slug(about["machine"])
        clock, cases, frames = Clock(options.device, options.clock), self.all_cases(options), []
        for number, case in enumerate(cases, 1):
            print(f"[{number}/{len(cases)}] {self.title(case)}", file=sys.stderr, flush=True)
            torch.set_num_threads(case["threads"])
            try:
                group = self.build(case, options)
                rounds = Rounds(
                    group, clock, 0.0 if options.quick or options.rounds < 5 else self.slice_s
                )
                times = [rounds.run(turn) for turn in range(options.rounds)]
                made = [about | case | row for row in rows_of(times, group, self.floor)]
            except (
                Exception
            ) as error:  # packages of rivals may raise anything; the other cases are still measured
                failed.append(
                    f"{self.title(case)}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
                )
                continue
            replace_rows(folder / f"{self.name}.jsonl", made, ["machine", *case])
            frames.append(pd.DataFrame(made))
        if frames:
            self.tables(pd.concat(frames, ignore_index=True), list(cases[0]), options.markdown)
        print(
            f"\n{self.command(argv)}; {about['machine']}, {about['clock']} seconds, {about['date']}, {about['commit']}"
        )
        print(f"results in {folder / self.name}.jsonl")
        for line in failed:
            print(f"not measured: {line}", file=sys.stderr)
        return int(bool(failed))

    def tables(self, frame: pd.DataFrame, key: list[str], markdown: bool) -> None:
        """Prints the rows of cases, which these columns name."""
        titles = frame.apply(lambda row: self.title(row.to_dict()), axis=1)
        if self.pivoted:
            show(
                f"{self.name}: time over {named(self.floor)}",
                pivot(frame, titles, self.floor),
                markdown,
            )
            return
        for _, own in frame.groupby(key, sort=False):
            show(titles[own.index[0]], case_table(own, self.floor, key), markdown)

    def title(self, case: Case) -> str:
        threads = f"{case['threads']} thread{'s' * (case['threads'] > 1)}"
        return ", ".join([self.form.format(**case), case["dtype"], threads])

    def command(self, argv: Sequence[str] | None) -> str:
        """As a page names it."""
        given = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--markdown"]
        return " ".join(["python -m", f"bench.{self.name}", *given])


# ---- two checkouts ---------------------------------------------------------------------------------------------------


class Worker:
    """A process that measures with the lotr_ext of one checkout, a round when it is told to."""

    def __init__(self, name: str, argv: list[str], checkout: Path):
        first = f"import sys; sys.path.insert(0, {str(checkout.resolve())!r}); import lotr_ext; sys.path[0] = {str(ROOT)!r}; "
        code = first + f"from bench.common import work; work({name!r}, {argv!r})"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, cwd="/", **pipes
        )

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"a worker ended with status {self.process.wait()}; what it printed is above"
            )
        return json.loads(answer)


def work(name: str, argv: list[str]) -> None:
    """Of a worker: answers questions from standard input. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    program = importlib.import_module(f"bench.{name}").PROGRAM
    options = program.arguments(argv)
    keep_memory()
    clock, rounds = Clock(options.device, options.clock), None
    for line in sys.stdin:
        question = json.loads(line)
        if "case" in question:
            torch.set_num_threads(question["case"]["threads"])
            rounds = Rounds(
                program.build(question["case"], options), clock, max(program.slice_s, 0.05)
            )
            answer = {
                "stages": {rival: list(step.stages) for rival, step in rounds.group.steps.items()}
            }
        else:
            answer = rounds.run(question["turn"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def compare(program: Program, options: argparse.Namespace, argv: list[str]) -> int:
    """Rounds of this checkout and of another one in turns, each in a process of its own: the ratio of their times."""
    argv = argv if options.rivals else [*argv, "--rivals", ",".join(program.compared)]
    workers = {
        "new": Worker(program.name, argv, ROOT),
        "old": Worker(program.name, argv, options.against),
    }
    made, cases, tables = (
        {"new": commit(), "old": commit(options.against)},
        program.all_cases(options),
        {},
    )
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {program.title(case)}", file=sys.stderr, flush=True)
        stages = {side: worker.ask({"case": case})["stages"] for side, worker in workers.items()}[
            "new"
        ]
        times: dict[str, list[dict[str, list[float]]]] = {"new": [], "old": []}
        for turn in range(options.rounds):
            for side in random.Random(turn).sample(list(workers), 2):
                times[side].append(workers[side].ask({"turn": turn}))
        floors, rows = {side: with_sum(own, program.floor) for side, own in times.items()}, []
        for rival, names in stages.items():
            new, old = (with_sum(times[side], rival) for side in ("new", "old"))
            for i, stage in enumerate([*names, "step"][: len(new)]):
                both = {
                    "new": seconds_text(np.median(new[i])),
                    "old": seconds_text(np.median(old[i])),
                }
                ratios = new[i] / old[i], (new[i] / floors["new"][i]) / (old[i] / floors["old"][i])
                texts = ["{:.3f} ({:.3f} to {:.3f})".format(*interval(ratio)) for ratio in ratios]
                both |= {
                    "new / old": texts[0],
                    f"the same, each over its {named(program.floor)}": texts[1],
                }
                rows.append({"": f"{named(rival)}, {stage}", **both})
        tables[program.title(case)] = pd.DataFrame(rows)
    for worker in workers.values():
        worker.process.stdin.close()
        worker.process.wait()
    for title, table in tables.items():
        show(title, table, options.markdown)
    commits = f"{made['new']} (new) over {made['old']} (old)"
    print(
        f"\n{program.command(argv)}: {commits}, medians of {options.rounds} rounds in turns, 95 % intervals"
    )
    print(f"{machine(options.device)}, {options.clock} seconds, load {os.getloadavg()[0]:.1f}")
    return 0
