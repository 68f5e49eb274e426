"""A hash of the sources of kept counts and estimates, which comments and layout do not change."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

_SKIPPED = re.compile(r"""//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\])')""", re.DOTALL)
_TOKEN = re.compile(
    r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])'|\d[\w.']*|\w+|<<=|>>=|[-+*/%&|^=!<>]=|&&|\|\||<<|>>|->|\+\+|--|::|\S"""
)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def tokens(text: str) -> str:
    """The tokens of C++ text with a space between, however its lines are broken; a preprocessor's directive is a line."""
    bare = _SKIPPED.sub(lambda match: match[1] or " ", text.replace("\\\n", " "))
    lines: list[list[str]] = [[]]
    for line in bare.splitlines():
        if line.lstrip().startswith("#"):
            lines += [line.split(), []]
        else:
            lines[-1] += _TOKEN.findall(line)
    return "\n".join(" ".join(words) for words in lines if words)


def closure(sources: Iterable[Path], roots: Iterable[Path]) -> list[Path]:
    """The files, and all files that they include by quotes from their own folder or from one of the roots."""
    found: dict[Path, None] = {}
    left = list(sources)
    while left:
        path = left.pop().resolve()
        if path not in found:
            found[path] = None
            names = _INCLUDE.findall(path.read_text(encoding="utf-8"))
            left += [one for name in names for folder in (path.parent, *roots) if (one := folder / name).is_file()]
    return sorted(found)


def cpp_id(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\n{tokens(path.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:12]


def python_id(modules: Iterable[str], more: str = "") -> str:
    """A hash of modules in this folder, without comments and docstrings."""
    digest = hashlib.sha256(more.encode())
    for name in modules:
        tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                del body[0]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]
