"""Random programs on lotr_ext against plain torch, and tests of the generator itself: it finds what is planted, and says it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")  # before what needs it: `-m cuda` collects this file without it too

from programs import checking, once_wrong, running, twin
from programs.checking import check
from programs.running import Batch
from programs.script import compiled, standalone

import lotr_ext
from lotr_ext import ops

ROOT = Path(__file__).resolve().parents[2]
PLANTED = """
def program(w):
    f = w.factors(3, 4, (2, 1), seed=1, dtype=torch.float32)
    l = w.layer(f, seed=10, dtype=torch.float32{layer})
    x = w.tensor(5, 3, seed=20, dtype=torch.float32)
    {before}
    y = l(x)
    w.see("y", y)
    {after}
    w.backward("b", w.loss(30, y))
"""


def planted(*, layer: str = "", before: str = "pass", after: str = "pass") -> str:
    return "import torch\nfrom torch import nn\n\n" + PLANTED.format(layer=layer, before=before, after=after)


def report(faults: list[running.Found]) -> str:
    """The first fault, shrunk, as a script."""
    found = running.shrunk(faults[0])
    return f"{len(faults)} programs are wrong; the first, shrunk: {found.fault.text}\n\n{found.script()}"


def test_400_programs() -> None:
    faults = [found for batch in running.batches(400, 0) for found in running.run_batch(batch).faults]
    assert not faults, report(faults)


@pytest.mark.parametrize("name", once_wrong.PROGRAMS)
def test_what_was_wrong_once(name: str) -> None:
    fault = check(compiled(once_wrong.source(name)), once_wrong.dtype(name))
    assert fault is None, f"{fault.text}\n\n{once_wrong.source(name)}"


@pytest.mark.full
def test_20_000_programs(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = [sys.executable, str(ROOT / "python_tests/programs/run.py"), "--programs", "20000", "--processes", "2"]
    with capfd.disabled():  # for the progress bar
        done = subprocess.run(
            [*command, "--seed", "1", "--scripts", str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert done.returncode == 0, done.stdout


def test_the_same_programs_each_time() -> None:
    def sources(batch: Batch) -> list[str]:
        made: list[str] = []
        running.search(batch, lambda source, dtype: made.append(source), running.Phase.generate)
        return made

    first = sources(Batch(20, 7))
    assert first == sources(Batch(20, 7)) and first != sources(Batch(20, 8)) and len(set(first)) == 20


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ({"before": "l.core.data.mul_(1.01 if w.ours else 1)"}, "wrong number: value"),
        ({"after": "y = y if w.ours else y * 1.01"}, "wrong number: grad"),
        ({"after": "y = y.detach() if w.ours else y"}, "no grad"),
        ({"before": "x = x.double() if w.ours else x; l = l.double() if w.ours else l"}, "another shape or dtype of a value"),
        ({"before": "if w.ours: raise RuntimeError('no')"}, "raises RuntimeError where plain torch works"),
        ({"layer": ", dropout=0.5", "before": "l.train(not w.ours)"}, "another path"),
    ],
)
def test_planted_faults_are_found(where: dict[str, str], kind: str) -> None:
    fault = check(compiled(planted(**where)), torch.float32)
    assert fault is not None and fault.kind == kind


@pytest.mark.parametrize("where", [{}, {"layer": ", dropout=0.5"}, {"after": "y.mul_(2)"}])
def test_right_programs_are_right(where: dict[str, str]) -> None:
    assert check(compiled(planted(**where)), torch.float32) is None


def test_what_a_dtype_cannot_hold_is_no_fault() -> None:
    """A number below float16's smallest one is nothing there; one that it can hold is something, as is either in float32."""

    def fault(dtype: torch.dtype, number: float) -> str | None:
        truth = torch.tensor([number], dtype=torch.float64)
        found = checking._compare(
            ("y", truth.new_zeros(1), False), ("y", truth, False), ("y", truth, False), torch.finfo(dtype), 0.0, loose=True
        )
        return found and found.kind

    assert fault(torch.float16, 1.7e-8) is None and fault(torch.float16, 1e-5) == "wrong number: value"
    assert fault(torch.float32, 1.7e-8) == fault(torch.bfloat16, 1.7e-8) == "wrong number: value"


def test_what_plain_torch_refuses_may_be_refused() -> None:
    """x is changed in place before the backward that needs it: an error, or the number that a copy gives."""
    changed = "with torch.no_grad(): x.mul_(2)"
    assert check(compiled(planted(after=changed)), torch.float32) is None
    assert (
        check(compiled(planted(before="x = x * 1", after="x.data.mul_(2) if w.ours else x.mul_(2)")), torch.float32) is not None
    )


def test_a_fault_in_the_package_is_found_shrunk_and_printed(monkeypatch, tmp_path: Path) -> None:
    """A layer that takes its scaling for 1 is found by the first programs, and the script shows it without the generator."""
    forward = lotr_ext.LoTRLinear.forward

    def wrong(self, x):
        self.__dict__["scaling"], scaling = 1.0, self.scaling
        try:
            return forward(self, x)
        finally:
            self.__dict__["scaling"] = scaling

    monkeypatch.setattr(lotr_ext.LoTRLinear, "forward", wrong)
    monkeypatch.setattr(running, "SHRINKS", 40)
    faults = running.run_batch(Batch(10, 5)).faults
    assert faults
    found = running.shrunk(min((f for f in faults if f.fault.kind == "wrong number: value"), key=lambda f: len(f.source)))
    assert len(found.source.splitlines()) < 21
    script = tmp_path / "fault.py"
    script.write_text(found.script())
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.stdout == "nothing is wrong\n", done.stderr  # for there the package is as it should be


def test_a_script_shows_its_fault(tmp_path: Path) -> None:
    script = tmp_path / "fault.py"
    script.write_text(standalone(planted(after="y = y if w.ours else y * 1.01"), torch.float32, "planted"))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert "wrong number: grad" in done.stdout, done.stderr
    imported = {
        line.split()[1].split(".")[0] for line in script.read_text().splitlines() if line.startswith(("import", "from"))
    }
    assert {"torch", "lotr_ext"} <= imported and imported <= {"torch", "lotr_ext", *sys.stdlib_module_names}


def environment() -> dict[str, str]:
    return {**{name: os.environ[name] for name in ("PYTHONPATH", "PYTHONSAFEPATH") if name in os.environ}, "PATH": ""}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_twins_dropout_mask_is_the_kernels(p: float) -> None:
    for seed in (0, 1, -5, 2**62 + 12345, -(2**63)):
        mask = twin.dropout_mask(torch.Size((7, 9)), p, seed)
        assert torch.equal(mask, ops.dropout_mask(7, 9, p, torch.tensor([seed]), torch.float64))


def test_only_our_world_imports_the_package() -> None:
    for path in (ROOT / "python_tests/programs").glob("[!t]*.py"):
        imports = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert ("lotr_ext" in imports) == (path.name == "our_world.py"), path.name
    assert "lotr_ext" not in re.findall(
        r"^(?:from|import) (\w+)", (ROOT / "python_tests/programs/twin.py").read_text(), re.MULTILINE
    )
