"""Hooks of mkdocs.yml: add the pictures of bench/results to the site, and correct links to them."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for picture in sorted(RESULTS.rglob("*.png")):
        target = f"results/{picture.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, target, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    return re.sub(r"\]\((?:\.\./)+bench/results/", "](results/", markdown)
