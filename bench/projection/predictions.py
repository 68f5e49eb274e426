"""Predictions for the benchmarks of a GPU, kept with date and commit before the runs, and compared with the measurements.

bench/results/simt-executor/predictions.json is written by `python -m bench.traffic`. Times of kernels are seconds; of layers,
blocks and gemm_lotr the time over the frozen layer or the library's product, less one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..measure.store import RESULTS, Store, commit, newest, write_whole
from .assumptions import Spread
from .cards import card_called

FILE = Path("simt-executor") / "predictions.json"  # under bench/results
VALUES = {"kernels": "seconds", "layer": "excess", "block": "excess", "fused": "excess"}  # of a cell's step, by program


class Prediction(NamedTuple):
    """A prediction for a program's cells on a GPU: those of a rival whose case has at least these fields."""

    program: str
    gpu: str
    rival: str
    case: dict[str, str | int]
    value: Spread

    def fits(self, program: str, cell: dict) -> bool:
        if (program, cell["rival"]) != (self.program, self.rival):
            return False
        return all(cell["case"].get(name) == value for name, value in self.case.items())


class Compared(NamedTuple):
    """A measured value and its prediction, in us or in % over the frozen layer or the library's product."""

    what: str
    measured: float
    predicted: Spread
    unit: str

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted.likely

    @property
    def inside(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high

    def cells(self) -> list[str]:
        """what, predicted, measured, ratio."""
        low, likely, high = self.predicted
        verdict = "within" if self.inside else "below" if self.measured < low else "above"
        return [
            self.what,
            f"{likely:.1f} ({low:.1f}-{high:.1f}) {self.unit}",
            f"{self.measured:.1f}",
            f"{self.ratio:.2f}, {verdict}",
        ]


def keep(made: list[Prediction], path: Path) -> bool:
    """Writes the predictions with date and commit, unless the same values are already kept."""
    values = [[*one[:4], [float(f"{value:.4g}") for value in one.value]] for one in made]
    if not values or (path.exists() and json.loads(path.read_text(encoding="utf-8"))["predictions"] == values):
        return False
    head = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit()}
    lines = ",\n".join(json.dumps(value) for value in values)
    write_whole(path, f'{json.dumps(head)[:-1]}, "predictions": [\n{lines}\n]}}\n')
    return True


def kept(results: Path = RESULTS) -> tuple[str, list[Prediction]]:
    """("DATE, commit COMMIT", predictions); none without the file."""
    path = results / FILE
    if not path.exists():
        return "", []
    found = json.loads(path.read_text(encoding="utf-8"))
    made = [Prediction(*value[:4], Spread(*value[4])) for value in found["predictions"]]
    return f"{found['date']}, commit {found['commit']}", made


def compared(program: str, cells: Iterable[dict], made: list[Prediction]) -> list[Compared]:
    """The measured cells that were predicted for their GPU."""
    found = []
    for cell in cells:
        gpu = card_called(cell.get("machine", {}).get("name", ""))
        one = next((p for p in made if p.gpu == gpu and p.fits(program, cell)), None)
        if one is not None:
            seconds = VALUES[program] == "seconds"
            scale, measured = 1e6 if seconds else 100, cell["step"][VALUES[program]][1]
            what = f"{program}: {cell['rival']} {' '.join(map(str, one.case.values()))}"
            predicted = Spread(*(scale * value for value in one.value))
            found.append(Compared(what, scale * measured, predicted, "us" if seconds else "%"))
    return found


def compared_in(folder: Path, made: list[Prediction]) -> list[Compared]:
    """The comparisons in a GPU's folder of results."""
    every = ((program, newest(Store(folder / f"{program}.jsonl").read())) for program in VALUES)
    return [one for program, cells in every for one in compared(program, cells, made)]
