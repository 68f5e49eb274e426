"""One run on a machine with a GPU: build, tests, sanitizer, measurements, each saved when it ends, in a time budget (make gpu).

    python -m bench.gpu                       about nine minutes; python -m bench.gpu --budget 1800 for half an hour
    python -m bench.gpu --call 2              the second of three calls that together run everything
    python -m bench.gpu --dry-run             what is found, what is missing, and the plan of each call; changes nothing
    python -m bench.gpu --import-results FILE a run's results.tar.gz into bench/results, with tables and pictures redrawn
    python -m bench.gpu --parts kernels,layer some of the parts; continues from an earlier run's measurements
    python -m bench.gpu --wheel FILE          kernels from a wheel of ours (make wheel) instead of a build

The first call checks results: each kernel against float64 in its own process (`python -m bench.gpu.smoke`). A
hardware feature that fails there is switched off for all later parts. The run works in build-gpu, on a copy of the sources,
so the checkout and the installed packages do not change. Results are in build-gpu/results (a log per part, summary.json, a
folder for the GPU), and packed in build-gpu/results.tar.gz. The machine needs torch with CUDA and numpy, safetensors, pytest; a
compiler, nvcc, cmake and ninja, or a wheel. It needs no network. Parts with missing requirements, or without time left, are
skipped and named.
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import shlex
import sys
import zipfile
from pathlib import Path

from ..measure.names import chosen
from .machine import OPTIONAL, ROOT, look
from .plan import CALLS, missing, plan, seconds_of
from .results import import_results, redraw
from .work import MODULE, work

BUDGET_S = 540


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=f"seconds that all of it may take ({BUDGET_S})")
    parser.add_argument(
        "--call", type=int, default=1, choices=CALLS, help="; ".join(f"{n}: {what}" for n, what in CALLS.items())
    )
    parser.add_argument("--parts", help="some parts of any call, comma-separated (those of --call)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build-gpu", help="folder of the build and results (build-gpu)")
    parser.add_argument("--wheel", type=Path, help="a wheel of lotr_ext to take the kernels from, instead of a build")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--dry-run", action="store_true", help="print the machine, what is missing, and the plan")
    parser.add_argument("--import-results", type=Path, metavar="FILE", help="import a run's results.tar.gz into bench/results")
    options = parser.parse_args(argv)
    if not (math.isfinite(options.budget) and options.budget >= 1):
        raise ValueError(f"budget: expected seconds of at least 1, got {options.budget}")
    if options.wheel is not None:
        check_wheel(options.wheel)
    options.plan = plan(options)
    names = [part.name for part in options.plan]
    of_call = [part.name for part in options.plan if options.call in part.calls]
    options.chosen = options.parts is not None
    options.parts = chosen("parts", options.parts, names, of_call)
    return options


def check_wheel(wheel: Path) -> None:
    """Raises ValueError unless it is a wheel of lotr_ext for this platform."""
    if not (wheel.is_file() and zipfile.is_zipfile(wheel)):
        raise ValueError(f"wheel: expected a wheel of lotr_ext, got {wheel}")
    with zipfile.ZipFile(wheel) as archive:
        if MODULE not in archive.namelist():
            raise ValueError(f"wheel: expected {MODULE} in {wheel}, found none")
    tag = f"linux.*_{platform.machine()}"
    if not re.search(tag + "$", wheel.stem):
        raise ValueError(f"wheel: expected one for this platform (linux, {platform.machine()}), got {wheel.name}")


def show_plan(options: argparse.Namespace, found: dict[str, str | None]) -> None:
    print(f"GPU                {found['gpu'] or 'none (nvidia-smi names none)'}")
    for name in [name for name in found if name != "gpu"]:
        print(f"{name:18} {found[name] or 'missing' + (', optional' if name in OPTIONAL else '')}")
    calls = {None: options.parts} if options.chosen else {n: [p.name for p in options.plan if n in p.calls] for n in CALLS}
    for call, names in calls.items():
        parts = [part for part in options.plan if part.name in names]
        possible = [part for part in parts if not missing(part, found)]
        times = dict(zip((part.name for part in possible), seconds_of(possible, options.budget)))
        what = f"--call {call} ({CALLS[call]}), " if call else ""
        print(f"\n{what}in {options.folder}, at most {options.budget:.0f} s:")
        for part in parts:
            lacks = missing(part, found)
            command = shlex.join(part.command) or f"_C.abi3.so from {options.wheel}"
            when = f"{times[part.name]:4.0f} s" if not lacks else "   - "
            print(f"  {part.name:18} {when}  " + (f"left out: needs {', '.join(lacks)}" if lacks else command))


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.import_results is not None:
        for path in import_results(options.import_results):
            print(f"kept {path}")
        return redraw()
    found = look()
    if options.dry_run:
        show_plan(options, found)
        return 0
    if found["gpu"] is None:
        raise ValueError("gpu: expected an NVIDIA GPU here (nvidia-smi names none); --dry-run prints the plan")
    return work(options, found)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"bench.gpu: {error}")
    except KeyboardInterrupt:
        sys.exit("bench.gpu: interrupted; what was measured is kept, the same command goes on from there")
