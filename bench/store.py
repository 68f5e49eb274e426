"""Results as JSON Lines: one cell a line, appended as soon as it is measured, so that an interrupted run keeps what it has."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def build_id() -> str:
    """Of the measured code: the compiled module and the Python around it. Another build is measured anew."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "lotr_ext").glob("*.py")) + sorted((ROOT / "lotr_ext").glob("*.so")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Store:
    """The cells of one result file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8"):
                pass
        except OSError as error:
            raise OSError(f"results: cannot write {path}: {error.strerror}") from None

    def read(self) -> list[dict]:
        """All whole lines; a line cut off by a kill is named and left out."""
        cells = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                cells.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"results: {self.path}, line {number}: not a whole JSON object, left out", file=sys.stderr)
        return cells

    def append(self, cell: dict) -> None:
        text = self.path.read_bytes()
        with open(self.path, "a", encoding="utf-8") as file:
            if text and not text.endswith(b"\n"):
                file.write("\n")  # after a line that was cut off
            file.write(json.dumps(cell) + "\n")
            file.flush()
            os.fsync(file.fileno())


def latest(cells: list[dict]) -> list[dict]:
    """The last measurement of each case and rival, in the order of first appearance."""
    newest: dict[tuple, dict] = {}
    for cell in cells:
        newest[tuple(cell["case"].values()), cell["rival"]] = cell
    return list(newest.values())
