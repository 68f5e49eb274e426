"""The code blocks of README and docs run, their commands exist, and their links lead somewhere."""

import functools
import importlib.util
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_python

import lotr_ext

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md")),
]
# Target of make: a program that receives its ARGS. bench gives them to each of its programs.
MAKE_PROGRAMS = {
    "demo": ["examples/finetune_text.py"],
    "bench": ["-m", "bench.layer"],
}


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Returns the fenced blocks of a page in one language.

    In them, the copy that examples/data.py has downloaded stands for the model of the Hub.
    """
    text = page.read_text(encoding="utf-8").replace(
        '"sentence-transformers/all-MiniLM-L6-v2"', '"data/all-minilm-l6-v2"'
    )
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty working folder that has the downloaded models and texts."""
    if not (ROOT / "data" / "all-minilm-l6-v2").is_dir():
        pytest.skip("the model is missing: python examples/data.py minilm snippets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data").symlink_to(ROOT / "data")
    # The C++ compiler of Inductor would take a minute. test_compile.py runs it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return tmp_path


def run_blocks(page: Path) -> dict[str, object]:
    """Runs the Python blocks of a page in order, and returns the names that they define.

    A UserWarning is an error, unless the page quotes its beginning.
    """
    names: dict[str, object] = {}
    text = " ".join(page.read_text(encoding="utf-8").split())
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            warnings.filterwarnings("ignore", "'pin_memory'")  # a machine without a GPU
            for block in blocks(page, "python"):
                exec(compile(block, str(page), "exec"), names)
    finally:
        if torch.distributed.is_initialized():  # a block failed before the last one
            torch.distributed.destroy_process_group()
        torch.compiler.reset()
    messages = [str(entry.message) for entry in caught if issubclass(entry.category, UserWarning)]
    assert [message for message in messages if message[:60] not in text] == []
    return names


def check_readme(names: dict[str, object], output: str, folder: Path) -> None:
    """README shows the summary that its block prints. Its command converts the adapter."""
    text = README.read_text(encoding="utf-8")
    (summary,) = [line for line in output.splitlines() if line.startswith("LoTR: ")]
    assert summary in " ".join(text.split())
    (command,) = re.findall(r"`python (-m lotr_ext.convert [^`]*)`", text)
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    assert (folder / "as-lora" / "adapter_model.safetensors").is_file()


def check_trainer_block(names: dict[str, object], output: str, folder: Path) -> None:
    """The Trainer's classifier is better than a constant on texts it was not trained on.

    The larger class has less than 60 % of these 400 texts, so a constant classifier stays below
    60 %. Random guesses exceed 70 % with a probability below 1e-12.
    """
    labels = [example["labels"] for example in names["data"][1600:]]
    assert 0.4 < sum(labels) / len(labels) < 0.6
    assert names["held_out_accuracy"] > 0.7


CHECKS = {README: check_readme, DOCS / "hugging_face.md": check_trainer_block}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_name)
def test_python_blocks_run_in_order(
    page: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_blocks(page)
    if page in CHECKS:
        CHECKS[page](names, capsys.readouterr().out, folder)


def commands() -> list[str]:
    """Returns every line of every shell block, each once."""
    text = "".join("".join(blocks(page, "sh")) for page in PAGES)
    return sorted({line for line in text.splitlines() if line.strip()})


def program_of(words: list[str]) -> tuple[list[str], list[str]]:
    """Checks a target of make, and splits a command into Python's program and its arguments.

    ["python", "-m", "bench.layer", "--quick"] gives (["-m", "bench.layer"], ["--quick"]). The
    program is empty for a target of make without one.
    """
    if words[0] == "make":
        subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], check=True, capture_output=True)
        arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
        return MAKE_PROGRAMS.get(words[1], []), shlex.split(" ".join(arguments))
    if words[0] == "pip":
        return ["-m", "pip", words[1]], words[2:]
    assert words[0].endswith("python")
    size = 3 if words[1] == "-m" else 2
    return words[1:size], words[size:]


@pytest.mark.parametrize("command", commands())
def test_every_command_exists(command: str) -> None:
    words = shlex.split(command.removeprefix("cd .. && "), comments=True)
    while "=" in words[0]:  # an environment variable
        words.pop(0)
    if words[:3] == ["python", "-m", "lotr_ext.convert"]:
        assert importlib.import_module("lotr_ext.convert.__main__").parser().parse_args(words[3:])
        return
    program, arguments = program_of(words)
    # The help of a program has all its flags. A command without flags only needs its program.
    flags = [word.split("=")[0] for word in arguments if word.startswith("-")]
    if flags:
        text = run_python(*program, "--help", cwd=ROOT).stdout
        for flag in flags:
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), flag
    elif program[:1] == ["-m"]:
        assert importlib.util.find_spec(program[1])
    elif program:
        assert (ROOT / program[0]).is_file()


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_names_its_language(page: Path) -> None:
    fences = re.findall(r"^\s*(?:```|~~~)(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "sh", "text"}
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", page.read_text("utf-8")):
        other_page = page.parent / target if target else page
        assert target.startswith("https://") or other_page.exists(), target
        if heading and other_page.exists():  # not on another site
            headings = re.findall(r"^#+ (.*)$", other_page.read_text("utf-8"), re.MULTILINE)
            assert heading in map(anchor, headings), f"{target}#{heading}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_quoted_paths_are_in_the_repository(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    quoted = [word for part in re.findall(r"`([^`\n]+)`", text) for word in part.split()]
    folders = re.compile(r"(?:lotr_ext|csrc|bench|python_tests|examples|docs|requirements)/")
    for path in filter(folders.match, quoted):
        assert any(ROOT.glob(re.sub(r"<\w+>", "*", path).rstrip("/"))), path
    assert not re.search(r"/(work|home|root|tmp)/", text)  # a path of the author's machine


def test_the_api_page_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert set(lotr_ext.__all__) <= set(re.findall(r"^::: lotr_ext\.(\w+)$", text, re.MULTILINE))
