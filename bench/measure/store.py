"""Results as JSON Lines: one cell a line, appended as soon as it is measured, so that an interrupted run keeps what it has.

A cell has `case` (what was measured, a flat dictionary), `rival`, `label`, the settings it was measured with (`build`,
`rounds`, `slice`, `clock`), `machine`, `when`, `load`, and a stage a direction: {"step": {"seconds": [25 %, median, 75 %],
"excess": the same of the per-round ratio to the floor, less one}}.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
QUICK = ROOT / "demo_results" / "bench"  # of --quick: few rounds of few shapes would stand in the place of what docs show
MACHINE = ("name", "torch", "peft", "transformers")  # another one of these makes other numbers


def write_whole(path: Path, text: str) -> Path:
    """Puts text in a file's place, by way of a temporary name: a kill leaves the old content or the new. Returns path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(path)


def commit() -> str | None:
    """The commit of this source tree; None where it is not one of git, or git is not installed."""
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() if git.returncode == 0 else None


def build_id() -> str:
    """Of the measured code: the compiled module, the Python around it, and the rivals. Another build is measured anew."""
    digest = hashlib.sha256()
    package, bench = ROOT / "lotr_ext", ROOT / "bench"
    for path in [*sorted(package.rglob("*.py")), *sorted(package.glob("*.so")), *sorted(bench.glob("rivals/*.py"))]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Store:
    """The cells of one result file."""

    def __init__(self, path: Path):
        self.path = path

    def prepare(self) -> Store:
        """Makes the file, before anything is measured for it. OSError where it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8"):
                pass
        except OSError as error:
            raise OSError(f"results: cannot write {self.path}: {error.strerror}") from None
        return self

    def read(self) -> list[dict]:
        """All whole lines; one that is no cell, such as one cut off by a kill, is named and left out. No file: no cells."""
        cells: list[dict] = []
        if not self.path.exists():
            return cells
        for number, line in enumerate(self.path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                cell = json.loads(line)
                if not (isinstance(cell, dict) and isinstance(cell.get("case"), dict) and isinstance(cell.get("rival"), str)):
                    raise ValueError
                cells.append(cell)
            except ValueError:  # json.JSONDecodeError is one
                print(f"results: {self.path}, line {number}: no whole result, left out", file=sys.stderr)
        return cells

    def keep_only(self, build: str) -> None:
        """Drops the cells of other builds."""
        lines = [json.dumps(cell, allow_nan=False) + "\n" for cell in self.read() if cell["build"] == build]
        write_whole(self.path, "".join(lines))

    def append(self, cell: dict) -> None:
        text = json.dumps(cell, allow_nan=False)
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # after a line that was cut off
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def case_of(cell: dict) -> tuple:
    return tuple(cell["case"].values())


def key_of(cell: dict) -> tuple:
    """Equal for two measurements of the same thing."""
    return case_of(cell), cell["rival"]


def setting_of(cell: dict) -> tuple:
    """Equal for two cells that belong in one table: build, clock, allocator, the machine's name and versions."""
    facts = cell.get("machine", {})
    return (*(cell.get(name) for name in ("build", "clock", "allocator")), *(facts.get(name) for name in MACHINE))


def runs(cells: list[dict]) -> list[list[dict]]:
    """The cells that were measured together, a list a case and run: those of one run have one `when`."""
    found: dict[tuple, list[dict]] = {}
    for cell in cells:
        found.setdefault((case_of(cell), cell.get("when", 0)), []).append(cell)
    return list(found.values())


def latest(cells: list[dict]) -> list[dict]:
    """The last measurement of each case and rival, in the order of first appearance."""
    newest: dict[tuple, dict] = {}
    for cell in cells:
        newest[key_of(cell)] = cell
    return list(newest.values())


def of_build(cells: list[dict], build: str | None = None) -> list[dict]:
    """The last of each case and rival that one build made; None: the build of the last cell."""
    build = build or (cells[-1]["build"] if cells else "")
    return [cell for cell in latest(cells) if cell["build"] == build]


def by_case(cells: list[dict]) -> list[tuple[dict, dict[str, dict]]]:
    """(case, {rival: cell}), in the order of first appearance."""
    found: dict[tuple, tuple[dict, dict[str, dict]]] = {}
    for cell in cells:
        found.setdefault(case_of(cell), (cell["case"], {}))[1][cell["rival"]] = cell
    return list(found.values())


def newest(cells: list[dict]) -> list[dict]:
    """What tables and pictures show: the cells of the last one's setting, and of each case those of one run only, since numbers
    of two runs are of two moments. It is the run with the most rivals, then the most rounds, then the latest."""
    best: dict[tuple, list[dict]] = {}
    for run in runs([cell for cell in cells if setting_of(cell) == setting_of(cells[-1])]):
        own, case = latest(run), case_of(run[0])
        if case not in best or _worth(own) > _worth(best[case]):
            best[case] = own
    return [cell for own in best.values() for cell in own]


def _worth(run: list[dict]) -> tuple:
    return len(run), run[-1].get("rounds", 0), run[-1].get("when", 0)
