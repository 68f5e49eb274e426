"""Every code block and command of README and docs runs or exists; links, anchors and paths lead somewhere."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lotr_ext

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md")),
]
# Models that pages load from the Hub, and the folders in which examples/data.py puts them: no test needs a network.
LOCAL = {"sentence-transformers/all-MiniLM-L6-v2": "data/all-minilm-l6-v2"}
PROGRAMS = {
    "demo": ["examples/finetune_text.py"],
    "bench": ["-m", "bench.layer"],
    "gpu": ["-m", "bench.gpu"],
}  # of make's ARGS


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    for hub, folder in LOCAL.items():
        found = [block.replace(f'"{hub}"', f'"{folder}"') for block in found]
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the downloaded models and texts."""
    if not (ROOT / "data" / "all-minilm-l6-v2").is_dir():
        pytest.skip("the model is missing: python examples/data.py minilm snippets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data").symlink_to(ROOT / "data")
    # Inductor's C++ compiler would take a minute here; the tests of layers run it
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return tmp_path


def run_blocks(page: Path) -> dict[str, object]:
    """The names that a page's Python blocks define, run in order."""
    names: dict[str, object] = {}
    try:
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), names)
    finally:
        if torch.distributed.is_initialized():  # a block that failed before the page's last
            torch.distributed.destroy_process_group()
        torch.compiler.reset()
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_name)
def test_python_blocks_run_in_order(page, folder, capsys):
    run_blocks(page)
    if (
        page == README
    ):  # it shows the summary that it prints; the adapter that it saved is converted by its command
        (summary,) = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("LoTR: ")
        ]
        assert summary in " ".join(page.read_text(encoding="utf-8").split())
        (command,) = re.findall(
            r"`python (-m lotr_ext.convert [^`]*)`", page.read_text(encoding="utf-8")
        )
        done = subprocess.run(
            [sys.executable, *shlex.split(command)], capture_output=True, text=True
        )
        assert (
            done.returncode == 0 and (folder / "as-lora" / "adapter_model.safetensors").is_file()
        ), done.stderr


@pytest.mark.slow
def test_the_trainers_block_trains_at_its_own_rate(folder, monkeypatch):
    """Its loss falls by at least a third of what full fine-tuning gains in the same steps."""
    first = blocks(DOCS / "hugging_face.md", "python")[0]
    ours: dict[str, object] = {}
    exec(compile(first, "hugging_face.md", "exec"), ours)
    full = re.sub(
        r"^apply_lotr\(.*\n|^print\(trainable.*\n|^save_adapter.*\n", "", first, flags=re.MULTILINE
    )
    assert "apply_lotr(" not in full.split("import", 3)[-1]
    theirs: dict[str, object] = {}
    exec(compile(full.replace("learning_rate=2e-3", "learning_rate=1e-4"), "full", "exec"), theirs)
    gain = [max(names["losses"]) - names["losses"][-1] for names in (ours, theirs)]
    assert gain[1] > 0.05 and gain[0] > gain[1] / 3, gain


def commands() -> list[str]:
    lines = [
        line
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.splitlines()
        if line.strip()
    ]
    return sorted(set(lines))


def help_of(program: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", commands())
def test_every_command_exists(command):
    words = shlex.split(command.removeprefix("cd .. && "), comments=True)
    while "=" in words[0]:  # an environment variable
        words.pop(0)
    if words[0] == "make":
        assert (
            subprocess.run(
                ["make", "-n", "-C", str(ROOT), *words[1:]], capture_output=True
            ).returncode
            == 0
        ), command
        (arguments,) = [word[5:] for word in words if word.startswith("ARGS=")] or [""]
        program, words = PROGRAMS.get(words[1], []), shlex.split(arguments)
    elif words[0] == "pip":
        program, words = ["-m", "pip", words[1]], words[2:]
    elif words[:3] == ["python", "-m", "lotr_ext.convert"]:
        assert importlib.import_module("lotr_ext.convert.__main__").parser().parse_args(words[3:])
        return
    else:
        assert words[0].endswith("python"), command
        size = 3 if words[1] == "-m" else 2
        program, words = words[1:size], words[size:]
        assert program[0] == "-m" or (ROOT / program[0]).is_file(), command
    flags = [word.split("=")[0] for word in words if word.startswith("-")]
    if flags:
        text = help_of(program)
        assert all(re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text) for flag in flags), (
            command
        )
    elif program[:1] == ["-m"]:
        assert importlib.util.find_spec(program[1]), command


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_pages_fences_links_and_paths(page):
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^\s*(?:```|~~~)(.*)$", text, re.MULTILINE)
    assert set(fences[::2]) <= {"python", "sh", "text"} and set(fences[1::2]) <= {""}
    for target, place in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        other = page.parent / target if target else page
        assert target.startswith("https://") or other.exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), f"{target}#{place}"
    quoted = [word for part in re.findall(r"`([^`\n]+)`", text) for word in part.split()]
    inside = [
        word
        for word in quoted
        if re.match(r"(?:lotr_ext|csrc|bench|python_tests|examples|docs|requirements)/", word)
    ]
    gone = [path for path in inside if not any(ROOT.glob(re.sub(r"<\w+>", "*", path).rstrip("/")))]
    assert not gone, gone
    assert not re.search(r"/(work|home|root|tmp)/", text)


def test_the_api_page_has_every_public_name():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert [name for name in lotr_ext.__all__ if f"::: lotr_ext.{name}\n" not in page] == []
