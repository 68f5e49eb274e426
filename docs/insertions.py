"""What the documentation site shows of the code itself, put in while it is built, so that no page repeats it by hand.

A line `<!-- insert: KIND NAME -->` in a page under docs/ becomes

    head shrink         the comment that opens csrc/cuda/kernels/shrink.cuh
    help bench.layer    what `python -m bench.layer --help` prints
    traffic kernels     what each kernel moves, counted by the SIMT executor

mkdocs calls the two functions below (`hooks` in mkdocs.yml). An insertion that cannot be made ends the build.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "bench/results"
MARK = re.compile(r"^<!-- insert: (\w+) (\S+) -->$", re.MULTILINE)
PICTURE = re.compile(rf"!\[([^]]*)\]\(\.\./{RESULTS}/([^)]+)\)")
HELP_COLUMNS = "110"
TRAFFIC_SHAPE = (8192, 4096, 4096, 16)  # m, k, n, r
TRAFFIC_MULTIPROCESSORS = 132  # an H100's

if str(ROOT) not in sys.path:  # bench is a program beside the package, not part of it
    sys.path.insert(0, str(ROOT))


def head(name: str) -> str:
    """The comment that opens a kernel's file."""
    lines = (ROOT / "csrc" / "cuda" / "kernels" / f"{name}.cuh").read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("//"))]
    return "\n".join(["```text", *(line.removeprefix("//").removeprefix(" ") for line in comment), "```"])


def command_help(name: str) -> str:
    """What a program prints for --help."""
    program = importlib.import_module(name)
    if hasattr(program, "__path__"):
        program = importlib.import_module(f"{name}.__main__")
    printed, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = HELP_COLUMNS
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            program.main(["--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    if not printed.getvalue().startswith("usage:"):
        raise ValueError(f"python -m {name} --help: expected its usage, got {printed.getvalue()[:80]!r}")
    return f"```text\n{printed.getvalue().rstrip()}\n```"


def traffic(name: str) -> str:
    """Bytes that each kernel moves in a layer, a row a kernel."""
    from bench.projection.counts import needed
    from bench.report.tables import markdown, traffic_rows

    if name != "kernels":
        raise ValueError(f"traffic: expected kernels, got {name}")
    rows = traffic_rows(ROOT / RESULTS)
    kept = [rows[key] for key in needed([TRAFFIC_SHAPE], [TRAFFIC_MULTIPROCESSORS]) if key in rows]
    if not kept:
        raise ValueError(f"traffic: expected counts of {TRAFFIC_SHAPE}, found none; run python -m bench.traffic")
    heads = ["kernel", "M x N, r", "blocks", "large matrix moved", "factors", "partial sums", "all, x each operand once"]
    lines = []
    for row in kept:
        size = [row.kernel, f"{row.m} x {row.n}, {row.r}", str(row.blocks), f"{row.once:.3f} x"]
        bytes_moved = [f"{row.factors / 1e6:.2f} MB", f"{row.partials / 1e6:.2f} MB", f"{row.over_once:.3f}"]
        lines.append([*size, *bytes_moved, f"{row.sector_efficiency:.1%}", f"{row.bank_conflicts:.2f}"])
    heads += ["of the sectors used", "shared-memory wavefronts / phases"]
    return "\n".join(markdown(heads, lines, 2))


KINDS = {"head": head, "help": command_help, "traffic": traffic}


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page's text with its insertions made, and the pictures of the results where the site has them, each a link to itself:
    on a phone a picture is looked at by itself."""

    def made(mark: re.Match[str]) -> str:
        kind, name = mark.groups()
        if kind not in KINDS:
            raise PluginError(f"{page.file.src_uri}: insert: expected one of {', '.join(KINDS)}, got {kind}")
        try:
            return KINDS[kind](name)
        except (ImportError, KeyError, OSError, ValueError) as error:
            raise PluginError(f"{page.file.src_uri}: insert: {kind} {name}: {type(error).__name__}: {error}") from error

    return PICTURE.sub(r"[![\1](results/\2)](results/\2)", MARK.sub(made, markdown))


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The pictures of the results, which lie outside of docs/, as files of the site."""
    for picture in sorted((ROOT / RESULTS).glob("*/*.png")):
        target = f"results/{picture.parent.name}/{picture.name}"
        files.append(File.generated(config, target, abs_src_path=str(picture)))
    return files
