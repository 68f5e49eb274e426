"""What all benchmarks share: names of rivals, checks, the machine, result files, tables, options.

A result file is JSON Lines. A row of times has a rival, a stage and its `seconds`, the columns of
the case, and where and when it was measured (`provenance`). `pd.DataFrame`s hold rows in memory.

Not here: times and memory (timing.py), the command line of a measuring program (program.py).
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# Results of --quick: a few rounds must not replace what docs show.
QUICK = ROOT / "demo_results" / "bench"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The name of each rival in tables and pictures. A variant, such as "lotr_ext-core", has the name of
# its base rival and the words of its ending in VARIANTS.
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
}
VARIANTS = {
    "-as-lotr": ", size of LoTR",
    "-as-lora": ", size of LoRA",
    "-core": ", cores only",
    "-model": ", in a model",
    "-compiled": ", compiled",
    "-fp32": ", float32 adapter",
    "-two_pass": ", two passes",
    "-beta": ", beta",
    "-fused": ", fused",
    "-one": ", one task",
    "-row": ", one task per row",
    "-token": ", one task per token",
    "-half": ", half of the tokens without a task",
}
Case = dict[str, Any]  # what is measured: sizes, "dtype", "threads", which are columns of its rows


def dtype_of(case: Case) -> torch.dtype:
    return DTYPES[case["dtype"]]


def named(rival: str) -> str:
    """Returns the name of a rival in tables: "lotr_ext-core" -> "lotr_ext, cores only"."""
    for ending, words in VARIANTS.items():
        # NAMES first: "lora-beta" is there, and not a variant of a rival "lora".
        if rival not in NAMES and rival.endswith(ending):
            return named(rival.removesuffix(ending)) + words
    return NAMES.get(rival, rival)


def telling_line(text: str) -> str:
    """Returns the most telling line of a message: the first with "CUDA error", else the first.

    PyTorch surrounds the error of a kernel with general advice.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "CUDA error" in line), lines[0])[:300]


def reason_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {telling_line(str(error))}"


# ---- checks --------------------------------------------------------------------------------------


def error_of(result: Tensor, truth: Tensor) -> float:
    """Returns the relative error (Frobenius)."""
    expected = truth.double()
    return ((result.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check_error(what: str, error: float, limit: float) -> float:
    """Returns the error.

    Raises:
        ArithmeticError: If it is NaN or above the limit.
    """
    if not error <= limit:
        raise ArithmeticError(f"{what}: relative error expected <= {limit:.2g}, got {error:.1e}")
    return error


# ---- the machine ---------------------------------------------------------------------------------


def commit(root: Path = ROOT) -> str:
    """Returns the commit of a source tree, with a + if lotr_ext or csrc have uncommitted changes.

    Returns "" if the tree is not a git repository or git is not installed.
    """
    if shutil.which("git") is None:
        return ""
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    difference = [*git, "diff", "--quiet", "HEAD", "--", "lotr_ext", "csrc"]
    # The exit status is 0 without changes, 128 without a commit, 129 outside a repository.
    is_changed = subprocess.run(difference, capture_output=True).returncode == 1
    return head.stdout.strip() + "+" * is_changed


def machine(device: str) -> str:
    """Returns the name of the GPU, or of the processor with its instruction set and cores.

    Processors of one name may have different instruction sets.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    # Not every architecture has this line.
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    model = match[1].strip() if match else platform.machine()
    return f"{model} with {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the columns of every row that say where, when and with what it was measured."""
    columns = {
        "machine": machine(options.device),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "load": round(os.getloadavg()[0], 1),  # running processes, averaged over a minute
        "torch": torch.__version__,
    }
    for package in ("peft", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            columns[package] = metadata.version(package)
    return columns | {"clock": options.clock}


def keep_memory() -> None:
    """Makes glibc's malloc keep freed memory for the rest of this process.

    By default malloc returns a freed block at the end of the heap to the system, and the next
    allocation has a page fault every 4 KiB. That is a tenth of a layer's time, for some rivals and
    not for others, depending on the order in which they free memory.
    """
    m_mmap_max = -4  # glibc's malloc.h
    m_trim_threshold = -1
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


# ---- result files --------------------------------------------------------------------------------


def slug(name: str) -> str:  # of a machine: its folder in bench/results
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read(path: Path) -> pd.DataFrame:
    """Returns the rows of a result file, an empty table if it does not exist."""
    if not path.exists():
        return pd.DataFrame()
    # Without dtype=False a commit of digits becomes a number. With precise_float, numbers stay as
    # they are when a file is read and written again.
    return pd.read_json(path, lines=True, dtype=False, precise_float=True)


def write(path: Path, frame: pd.DataFrame) -> None:
    """Writes JSON Lines. A row has no entry for an empty cell.

    A process that is killed meanwhile leaves the old file or the new one.
    """
    # Columns that some rows lack are floats in pandas. Here their integers become integers again.
    rows = [row.dropna().to_dict() for _, row in frame.convert_dtypes().iterrows()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    lines = "".join(json.dumps(row, default=np.generic.item) + "\n" for row in rows)
    temporary.write_text(lines, encoding="utf-8")
    temporary.replace(path)


def replace_rows(path: Path, rows: list[dict[str, Any]], key: Sequence[str]) -> None:
    """Adds rows to a file in place of those with the same key, rival and stage."""
    frame = pd.concat([read(path), pd.DataFrame(rows)], ignore_index=True)
    write(path, frame.drop_duplicates([*key, "rival", "stage"], keep="last", ignore_index=True))


# ---- tables --------------------------------------------------------------------------------------

# Columns that are not facts of a rival in the table of a case: times, and what all its rows share.
NOT_FACTS = {
    *("rival", "stage", "seconds", "over", "over_low", "over_high"),
    *("machine", "date", "commit", "load", "torch", "peft", "transformers", "clock", "rounds"),
    # gpu and interval: in rows of older versions.
    *("gpu", "sm_mhz", "memory_mhz", "gpu_celsius", "gpu_watts", "interval"),
}


def seconds_text(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us" if seconds < 0.01 else f"{seconds * 1e3:.4g} ms"


def bytes_text(count: float) -> str:
    if abs(count) < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**20:.1f} MiB"


def over_text(row: pd.Series) -> str:
    """Returns "6.1% (5.8 to 6.4)": the median and its interval, "-" if there is no floor."""
    if pd.isna(row["over"]):
        return "-"
    if pd.isna(row.get("over_low")):
        return f"{row['over']:.1%}"
    return f"{row['over']:.1%} ({100 * row['over_low']:.1f} to {100 * row['over_high']:.1f})"


def fact_text(name: str, value: float) -> str:
    if pd.isna(value):
        return "-"
    if name.endswith("bytes"):
        return bytes_text(value)
    default = "{:,.4g}" if value % 1 else "{:,.0f}"
    formats = {"error": "{:.0e}", "of_copy": "{:.0%}"}
    return formats.get(name, default).format(value)


def case_table(frame: pd.DataFrame, floor: str, key: Sequence[str]) -> pd.DataFrame:
    """Returns the table of one case, with a row per rival.

    Its columns are the time of each stage, the last stage's time over the floor's, and the facts.

    Args:
        frame: The rows of the case.
        floor: The rival that the others are compared with.
        key: The columns of the case. They are in its title, and the same in all rows.
    """
    last = frame["stage"].iloc[-1]
    hidden = {*NOT_FACTS, *key}
    columns = [name for name in frame if name not in hidden and frame[name].notna().any()]
    rows = []
    for rival, stages in frame.groupby("rival", sort=False):
        final = stages[stages["stage"] == last].iloc[0]
        times = {row["stage"]: seconds_text(row["seconds"]) for _, row in stages.iterrows()}
        over = "" if rival == floor else over_text(final)
        texts = {name.removesuffix("_bytes"): fact_text(name, final[name]) for name in columns}
        rows.append({"": named(str(rival)), **times, f"over {named(floor)}": over, **texts})
    return pd.DataFrame(rows).fillna("-")


def pivot(frame: pd.DataFrame, title_format: str, floor: str) -> pd.DataFrame:
    """Returns a table with a row per case and a column per rival.

    A cell has the last stage's time: in seconds for the floor, over the floor's for the others.
    Cases and rivals are in the order of the rows.

    Args:
        frame: The rows of all cases.
        title_format: A format string that makes a case's title from its columns.
        floor: The rival that the others are compared with.
    """
    cells: dict[str, dict[str, str]] = {}
    for _, row in frame[frame["stage"] == frame["stage"].iloc[-1]].iterrows():
        text = seconds_text(row["seconds"]) if row["rival"] == floor else over_text(row)
        cells.setdefault(title_format.format(**row), {})[named(row["rival"])] = text
    return pd.DataFrame(cells).T.fillna("-").rename_axis("").reset_index()


def markdown_table(table: pd.DataFrame, texts: int = 1) -> str:
    """Returns a table in Markdown. Its first `texts` columns are aligned left, the others right."""
    columns = []
    for i, (name, cells) in enumerate(table.astype(str).items()):
        width = max(map(len, [str(name), *cells]))
        side = "<" if i < texts else ">"
        rule = "-" * (width - 1) + ("-" if i < texts else ":")
        columns.append([f"{cell:{side}{width}}" for cell in (str(name), rule, *cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns))


def show(title: str, table: pd.DataFrame) -> None:
    """Prints a table in Markdown."""
    print(f"\n{title}\n\n{markdown_table(table)}")


# ---- options -------------------------------------------------------------------------------------


def sizes(*names: str) -> Callable[[str], list[Case]]:
    """Returns an option's type: a function that makes a case of each comma-separated part.

    sizes("m", "n") converts "512x768,1x768" to [{"m": 512, "n": 768}, {"m": 1, "n": 768}].
    """
    pattern = "x".join([r"([1-9]\d*)"] * len(names))

    def convert(text: str) -> list[Case]:
        cases = []
        for part in text.split(","):
            match = re.fullmatch(pattern, part)
            if match is None:
                raise argparse.ArgumentTypeError(
                    f"expected {'x'.join(names)}, numbers of at least 1, got {part!r}"
                )
            cases.append(dict(zip(names, map(int, match.groups()))))
        return cases

    return convert


def some_of(valid: Collection[str]) -> Callable[[str], list[str]]:
    """Returns an option's type: a function that lists the names of a text in the order of valid."""

    def convert(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in valid:
                raise argparse.ArgumentTypeError(
                    f"expected some of {', '.join(valid)}, got {name!r}"
                )
        return [name for name in valid if name in names]

    return convert


def parser_of(
    name: str, doc: str, options: Mapping[str, Mapping[str, Any]]
) -> argparse.ArgumentParser:
    """Returns the parser of `python -m bench.<name>`.

    Args:
        name: The module in `bench`.
        doc: What --help prints above the options.
        options: The arguments of `add_argument` for each option, by its name without dashes.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, settings in options.items():
        parser.add_argument(f"--{option}", **settings)
    return parser
