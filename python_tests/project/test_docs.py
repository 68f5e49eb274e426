"""Every code block of README and docs runs, every command named there exists, their tables are those of the results, and
`make docs` fails on a warning. In full: the site fetches nothing and shows the code itself."""

from __future__ import annotations

import functools
import html
import importlib
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lotr_ext import lotr_linear
from lotr_ext.ops import tuned

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SITE_PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "csrc" / "README.md", *SITE_PAGES]


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# ---- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_fence_has_a_language_that_is_tested(page):
    fences = re.findall(r"^\s*(?:```|~~~)(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "sh"} and set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where tune keeps its answers
    if not (ROOT / "data").is_dir():
        pytest.skip("data/ is missing: run make setup")
    (tmp_path / "data").symlink_to(ROOT / "data")
    # Inductor's C++ compiler would take a minute here; test_compile.py runs it
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    names: dict[str, object] = {}
    try:
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), names)
    finally:
        if torch.distributed.is_initialized():  # a block that failed before the page's last
            torch.distributed.destroy_process_group()
        torch.compiler.reset()
        tuned.load()  # a page that tunes leaves no answers to the next
    capsys.readouterr()
    if page.name == "README.md":  # its three lines are what the function computes
        expected = lotr_linear(*(names[name] for name in ("x", "W", "bias", "A", "B", "G", "s")))
        torch.testing.assert_close(names["y"], expected)


# ---- commands --------------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]
    return sorted(set(lines))


def program_module(name: str) -> ModuleType:
    """What python -m name runs."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def check_flags(program: list[str], words: list[str], capsys) -> None:
    """That the program's --help names every flag among words; program: ["-m", module] or [a script]."""
    if program[1:2] != ["pip"] and (program[0] == "-m" or program[0].startswith("examples/")):
        module = program_module(program[-1] if program[0] == "-m" else Path(program[-1]).stem)
        if program[0] != "-m" and not hasattr(module, "arguments"):  # it takes none of its own
            assert callable(module.main) and not words, words
            return
        with pytest.raises(SystemExit) as end:
            module.main(["--help"])
        text, status = capsys.readouterr().out, end.value.code
    else:
        done = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True)
        text, status = done.stdout, done.returncode
    assert status in (0, None), text
    for flag in (word for word in words if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), f"{shlex.join(program)} --help does not name {flag}"


@pytest.mark.parametrize("command", commands())
def test_every_command_exists(command, capsys):
    words = shlex.split(command.removeprefix("cd .. && "), comments=True)
    if words[0] == "make":
        programs = {"demo": ["examples/finetune_text.py"], "many-tasks": ["examples/many_tasks.py"], "bench": ["-m", "bench"]}
        programs |= {name: [f"examples/{name}_text.py"] for name in ("private", "influence")}
        programs |= {"causal-lm": ["examples/causal_lm.py"], "loras": ["examples/loras_to_bank.py"]}
        programs |= {"evolve": ["examples/evolve.py"]}
        programs |= {"serve": ["examples/serve_tasks.py"], "rl": ["examples/rl_cores.py"]}
        programs |= {"gpu": ["-m", "bench.gpu"], "frontier": ["-m", "bench.evidence"]}
        assert subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], capture_output=True).returncode == 0
        for word in words[2:]:
            assert word.startswith("ARGS="), command
            check_flags(programs[words[1]], shlex.split(word[5:]), capsys)
    elif words[0] == "torchrun":
        (script,) = [word for word in words if word.endswith(".py")]
        launcher, own = words[1 : words.index(script)], words[words.index(script) + 1 :]
        known = {option for action in torchrun_parser()._actions for option in action.option_strings}
        assert {word.split("=")[0] for word in launcher if word.startswith("-")} <= known, command
        check_flags([script], own, capsys)
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:], capsys)
    elif words[0] == "pip":  # test_packaging builds a wheel
        check_flags(["-m", "pip", words[1]], words[2:], capsys)
        packages = {word for word in words[2:] if not word.startswith("-")}
        built_with = {"torch", "cmake", "ninja", "numpy", "safetensors", "setuptools", "wheel"}
        assert packages <= built_with or "lotr_ext" in words or words[-1] in (".", ".[peft]"), command
    else:
        assert words[0] == "python" and (ROOT / words[1]).is_file(), command
        check_flags([words[1]], words[2:], capsys)


def torchrun_parser():
    from torch.distributed.run import get_args_parser

    return get_args_parser()


def check_module(name: str, arguments: list[str], capsys) -> None:
    if name == "pytest":
        paths = arguments[: arguments.index("-m")] if "-m" in arguments else arguments
        assert paths and all((ROOT / path).exists() for path in paths), arguments
    elif name == "lotr_ext.convert":
        from lotr_ext.convert import parser

        assert parser().parse_args(arguments).command == arguments[0]
    elif name in ("bench.targets", "bench.compare"):  # they take files and nothing else
        assert callable(importlib.import_module(name).main) and not any(word.startswith("-") for word in arguments)
    elif name.startswith("bench.") and hasattr(module := program_module(name), "arguments"):
        if name == "bench.kernels" and not torch.cuda.is_available():
            arguments = [*arguments, "--device", "cpu"]
        module.arguments(arguments)  # shapes, rivals and GPUs exist too
    else:
        check_flags(["-m", name], arguments, capsys)


# ---- what pages say ---------------------------------------------------------------------------------------


def test_paths_that_pages_name_exist():
    """In backticks, from the root, also within a command; * is any name, <..> what the reader fills in. git shows gone ones."""
    folders = "|".join(("lotr_ext", "csrc", "bench", "python_tests", "examples", "docs"))
    gone = []
    for page in PAGES:
        quoted = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        words = [word for text in quoted if not text.startswith("git ") for word in text.split()]
        for path in (word for word in words if re.match(rf"(?:{folders})/", word)):
            pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
            gone += [f"{page_name(page)}: {path}"] if not any(ROOT.glob(pattern)) else []
    assert not gone, gone


def test_tables_are_those_of_the_results():
    from bench.report.rebuild import PAGES as TABLES
    from bench.report.rebuild import rebuild

    begun = "made by python -m bench.report -->\n"
    assert {page.path for page in TABLES} == {page for page in PAGES if begun in page.read_text(encoding="utf-8")}
    for page in TABLES:
        text = page.path.read_text(encoding="utf-8")
        assert text.count(begun) == len(page.sections)
        assert rebuild(page, text.replace(begun, f"{begun}| 99.9 % |\n")) == text, "run python -m bench.report"


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page_name(page)}: {target}"


def test_no_address_on_the_machine_where_it_was_written():
    for page in PAGES:
        assert not re.search(r"/(work|home|root|tmp)/", page.read_text(encoding="utf-8")), page_name(page)


def test_tests_that_docs_peft_names_exist():
    rows = re.findall(r"^\|[^|]+\|([^|]+)\|$", (DOCS / "peft.md").read_text(encoding="utf-8"), re.MULTILINE)
    cells = [re.sub(r"\([^)]*\)", "", part).strip() for row in rows for part in re.split("[,;]", row)]
    names = [cell for cell in cells if re.fullmatch(r"[a-z]+(_[a-z]+)*", cell) and cell != "ours"]
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "python_tests" / "interop").glob("test_peft*.py"))
    gone = [name for name in names if f"def test_{name}(" not in tests]
    assert len(names) > 20 and not gone, gone


# ---- the site --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is missing: pip install -r requirements-dev.txt")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    # no proxy is there: what tries to reach another machine fails
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser loads to show a page, and the page's text."""

    def __init__(self, page: Path):
        super().__init__()
        self.addresses, self.text = [], ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag != "a" and not (tag == "link" and values.get("rel") == "canonical"):
            self.addresses += [values[name] for name in ("src", "href", "srcset", "data") if values.get(name)]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.full
def test_the_site_fetches_nothing(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(SITE_PAGES)  # and 404.html
    for page in pages:
        for address in Fetched(page).addresses:
            assert not re.match(r"(?:https?:)?//", address), f"{page.name} loads {address}"
            local = site / address.lstrip("/") if page.name == "404.html" else page.parent / address.split("?")[0]
            assert address.startswith(("data:", "#")) or local.exists(), f"{page.name} loads {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style.name


@pytest.mark.full
def test_the_site_shows_the_code_itself(site):
    """Signatures, kernel heads, --help, counted bytes: nothing of it is in the pages' sources."""
    import lotr_ext
    import lotr_ext.interop

    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    operators = ("shrink", "expand_add_", "factor_grad_", "shrink_grad_", "fold", "fold_grad", "layer_forward", "dropout_mask")
    public = (*lotr_ext.__all__, *lotr_ext.interop.__all__, *operators)
    missing = [name for name in public if not re.search(rf'id="lotr_ext\.([a-z_]+\.)*{name}"', reference)]
    assert not missing, f"add to docs/api: {', '.join(missing)}"
    assert not re.findall(r'id="(lotr_ext\.[\w.]*\._\w*)"', reference)
    signatures = re.findall(r'<div class="doc-signature highlight">(.*?)</div>', reference, re.DOTALL)
    private = [text for part in signatures if re.search(r"\b_\w+", text := html.unescape(re.sub(r"<[^>]+>", "", part)))]
    assert signatures and not private, f"a signature shows a private name: {private}"
    nodes = [name for name in dir(lotr_ext) if isinstance(getattr(lotr_ext, name), type(torch.autograd.Function))]
    shown = [name for name in nodes if re.search(rf'id="lotr_ext\.([a-z_]+\.)*{name}"', reference)]
    assert shown == ["LoTRFunction"] and set(shown) < set(nodes)
    kernels = Fetched(site / "kernels.html").text + Fetched(site / "hopper.html").text
    for source in sorted((ROOT / "csrc" / "cuda" / "kernels").glob("*.cuh")):
        opening = source.read_text(encoding="utf-8").splitlines()[0].removeprefix("// ")
        if "__global__" in source.read_text(encoding="utf-8"):
            assert opening in kernels, f"{source.name} is not on docs/kernels.md"
    assert re.search(r"shrink_grad\s+8192 x 4096, 16", kernels)
    assert "usage: python -m bench.layer" in Fetched(site / "api" / "commands.html").text
    rebuilt = html.unescape((site / "benchmarks.html").read_text(encoding="utf-8"))
    assert "LoRA in-place, beta" in rebuilt and "<!-- insert" not in rebuilt


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# Title\n", []),
        ("# Title\n\n[gone](gone.md) [gone](#gone)\n", ["gone.md", "#gone", "not included in the", "other.md"]),
    ],
)
def test_make_docs_fails_on_a_warning(text, words, tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is missing: pip install -r requirements-dev.txt")
    (tmp_path / "docs").mkdir()
    for name in ["index.md", "other.md"] if words else ["index.md"]:
        (tmp_path / "docs" / name).write_text(text)
    checks = re.search(r"^validation:\n(?: .*\n)+", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)[0]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\ntheme: mkdocs\nsite_dir: site\nnav: [index.md]\n{checks}")
    built_package = Path(".venv", ".stamps", "build")  # taken as it is
    command = ["make", "-C", str(ROOT), "-o", str(built_package), "docs", f"PY={sys.executable}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    made = subprocess.run(
        [*command, f"DOCS_ARGS=-f {tmp_path / 'mkdocs.yml'}"], env=environment, capture_output=True, text=True
    )
    assert (made.returncode != 0) == bool(words), made.stdout + made.stderr
    assert all(word in made.stderr for word in words), made.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("<!-- insert: tables layer -->", ["x.md", "expected one of head, help", "got tables"]),
        ("<!-- insert: head nothing -->", ["x.md", "head nothing", "nothing.cuh"]),
        ("<!-- insert: help bench.nothing -->", ["x.md", "help bench.nothing", "No module named"]),
        ("<!-- insert: traffic nothing -->", ["x.md", "traffic nothing", "expected kernels"]),
    ],
)
def test_an_insertion_that_cannot_be_made_ends_the_build(line, words, monkeypatch):
    PluginError = pytest.importorskip("mkdocs.exceptions", reason="mkdocs is missing").PluginError
    monkeypatch.syspath_prepend(str(DOCS))
    insertions = importlib.import_module("insertions")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="x.md"))
    with pytest.raises(PluginError) as caught:
        insertions.on_page_markdown(f"# Title\n\n{line}\n", page=page, config=None, files=None)
    assert all(word in str(caught.value) for word in words), caught.value
