"""The five steps of docs/teaching: right in every schedule, without races, each with its gain."""

import runpy
from pathlib import Path

import pytest

TEACHING = Path(__file__).resolve().parents[2] / "docs" / "teaching"


def table(mode: str) -> str:
    return runpy.run_path(str(TEACHING / "run_steps.py"))["table"](mode)


@pytest.mark.parametrize("mode", ["race", pytest.param("asan", marks=pytest.mark.full)])
def test_every_step_is_right_and_clean(mode: str) -> None:
    # The program checks the values, and stops at the first step that is wrong.
    assert len(table(mode).splitlines()) == 6


def test_the_page_shows_what_the_program_prints() -> None:
    printed = table("plain")
    page = (TEACHING / "shrink.md").read_text(encoding="utf-8")
    shown = page.split("<!-- steps:begin -->\n")[1].split("<!-- steps:end -->")[0].splitlines()
    assert [line.split() for line in shown] == [line.split() for line in printed.splitlines()]
