"""Every code block of README and docs runs, every command named there exists, and README's tables are those of the results."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_fence_has_a_language_that_is_tested(page):
    fences = re.findall(r"^```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "sh"} and set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if not (ROOT / "data").is_dir():
        pytest.skip("data/ is missing: run make setup")
    (tmp_path / "data").symlink_to(ROOT / "data")
    torch.manual_seed(0)
    m, k, n, r, layers = 5, 7, 6, 2, 3
    names = {"torch": torch, "F": torch.nn.functional, "x": torch.randn(m, k), "A": torch.randn(k, r), "B": torch.randn(n, r)}
    names |= {"G": torch.randn(layers, r, r), "W": torch.randn(layers, n, k), "bias": torch.randn(layers, n), "s": 0.5, "l": 1}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    capsys.readouterr()
    if page.name == "README.md":  # the three lines are what the function computes
        from lotr_ext import lotr_linear

        layer = names["l"]
        expected = lotr_linear(
            names["x"], names["W"][layer], names["bias"][layer], names["A"], names["B"], names["G"][layer], names["s"]
        )
        torch.testing.assert_close(names["y"], expected)
        assert type(names["plain"].encoder.layer[0].attention.self.query) is torch.nn.Linear


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]
    return sorted(set(lines))


@pytest.mark.parametrize("command", commands())
def test_every_command_exists(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], capture_output=True).returncode == 0
        arguments = [shlex.split(word[5:]) for word in words if word.startswith("ARGS=")]
        for flags in arguments:
            program = {"demo": ["examples/finetune_text.py"], "bench": ["-m", "bench"]}[words[1]]
            text = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
            assert all(flag in text for flag in flags if flag.startswith("--"))
    elif words[:3] == ["python", "-m", "lotr_ext.convert"]:
        from lotr_ext.convert import parser

        assert parser().parse_args(words[3:]).command == words[3]
    else:
        assert command in ("pip install torch", "pip install --no-build-isolation .")  # test_packaging builds and installs


def test_tables_are_those_of_the_results():
    from bench.report import rebuild

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rebuild(text) == text, "run python -m bench.report"
    assert (
        rebuild(text.replace("made by python -m bench.report -->\n", "made by python -m bench.report -->\n| 99.9 % |\n"))
        == text
    )


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
