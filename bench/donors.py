"""The donors of bench.transfer: their texts, their gradients, and pairs of factors from them.

Donors are texts that no target has. They are read in place: Python's library (PSF license), torch's
C++ headers (BSD), the system's message catalogs (PostgreSQL and GNU licenses) and license texts,
Perl's modules (Artistic), and rated snippets (MIT). Texts, gradients and pairs are made once, and
stored in demo_results/transfer.
"""

from __future__ import annotations

import gettext
import os
import re
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .common import ROOT
from .problems import DATA, TASKS, Problem, problem_of

CACHE = ROOT / "demo_results" / "transfer"
MODEL = "smollm2-kjv"  # the task whose model and layers all have
TEXTS = (
    "python",
    "cpp",
    "editorials",
    "german",
    "licenses",
    "movies",
    "perl",
    "french",
    "tweets",
    "products",
)
DONORS = TEXTS[:6]  # their gradients give the donors' pair
MOST_CHARACTERS = 600_000  # of a donor's text
GRADIENT_BATCHES = 8
GRADIENT_NORM = 1000.0  # of all weights' gradients: float16 has no room for small numbers

Pairs = dict[str, tuple[Tensor, Tensor]]  # orthonormal A [k, r] and B [n, r] by layer


class Form(NamedTuple):
    """What a task trains; the docstring of transfer.py has the parts."""

    pair: str
    group: str
    rank: int
    core: str
    words: dict[str, str]

    @staticmethod
    def of(text: str) -> Form:
        pair, group, rank, core, *words = text.split("/")
        return Form(pair, group, int(rank), core, dict(word.split(":") for word in words))

    @property
    def is_trained(self) -> bool:
        return self.pair.startswith("trained")

    @property
    def source(self) -> str:
        """What the pair is made from, "" for a random start."""
        return self.pair.removeprefix("trained").removeprefix("-")


# ---- texts ---------------------------------------------------------------------------------------


def files(folder: Path, pattern: str) -> str:
    """Returns the texts of all files below a folder, in the order of their names."""
    paths = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)


def snippets(file: str) -> str:
    lines = (DATA / file).read_text(encoding="utf-8").splitlines()
    return "\n".join(line.split("\t", 1)[1] for line in lines)


def messages(language: str) -> str:
    """Returns the translations of all message catalogs of the system."""
    texts: list[str] = []
    for path in sorted(Path("/usr/share/locale", language, "LC_MESSAGES").glob("*.mo")):
        with path.open("rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog
        texts += [text for text in catalog.values() if isinstance(text, str)]
    return "\n".join(texts)


def donor_text(name: str) -> str:
    """Returns a donor's text, from packages and from this system.

    Raises:
        ValueError: If it is missing.
    """
    library = Path(sysconfig.get_path("stdlib"))
    headers = Path(torch.__file__).parent / "include" / "ATen" / "core"
    readers: dict[str, Callable[[], str]] = {
        "python": lambda: files(library / "email", "*.py") + files(library / "asyncio", "*.py"),
        "cpp": lambda: files(headers, "*.h"),
        "editorials": lambda: snippets("editorial_snippets.tsv"),
        "german": lambda: messages("de"),
        "licenses": lambda: files(Path("/usr/share/common-licenses"), "*"),
        "movies": lambda: snippets("movie_snippets.tsv"),
        "perl": lambda: files(Path("/usr/share/perl"), "*.pm"),
        "french": lambda: messages("fr"),
        "tweets": lambda: snippets("tweets.tsv"),
        "products": lambda: snippets("product_snippets.tsv"),
    }
    text = readers[name]()[:MOST_CHARACTERS]
    if len(text) < MOST_CHARACTERS // 4:
        raise ValueError(f"{name}: expected a long text on this system, got {len(text)} characters")
    return text


@lru_cache(maxsize=1)
def problem(name: str) -> Problem:
    """Returns the problem of a target or a donor."""
    if name in TASKS:
        return problem_of(TASKS[name])
    path = CACHE / f"{name}.txt"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(donor_text(name), encoding="utf-8")
        temporary.rename(path)
    return problem_of(TASKS[MODEL]._replace(source=str(path)))


# ---- gradients and pairs -------------------------------------------------------------------------


def cached(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returned in this or an earlier process."""
    path = CACHE / f"{name}.pt"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        torch.save(make(), temporary)
        temporary.rename(path)
    return torch.load(path, weights_only=True)


def layers_named(kinds: str) -> str:
    """Returns the pattern of the adapted layers: of all, or of kinds as "o,down"."""
    kinds = kinds.replace(",", "|") or r"\w+"
    return rf".*\.layers\.\d+\..*\.({kinds})_proj"


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the adapted layers by name."""
    pattern = re.compile(TASKS[MODEL].layers)
    return {name: module for name, module in model.named_modules() if pattern.fullmatch(name)}


def gradients(name: str) -> dict[str, Tensor]:
    """Returns the mean gradient of each adapted weight at the base model, in float16."""

    def make() -> dict[str, Tensor]:
        model = problem(name).model(0).requires_grad_(False)
        layers = layers_of(model)
        sums = {layer: torch.zeros(module.weight.shape) for layer, module in layers.items()}
        batches = problem(name).batches(12345)
        for module in layers.values():
            module.weight.requires_grad_(True)
        for _ in range(GRADIENT_BATCHES):
            problem(name).loss(model, next(batches)).backward()
            for layer, module in layers.items():
                sums[layer] += module.weight.grad.float()
                module.weight.grad = None
        norm = sum(float(gradient.square().sum()) for gradient in sums.values()) ** 0.5
        return {layer: (GRADIENT_NORM / norm * sums[layer]).half() for layer in sums}

    return cached(f"gradient-{name}-{GRADIENT_BATCHES}", make)


def groups_of(shapes: dict[str, tuple[int, int]], group_by: str, side: int) -> list[list[str]]:
    """Returns the names of the layers [n, k] that share A (side 1) or B (side 0)."""
    groups: dict[tuple, list[str]] = {}
    for name, shape in shapes.items():
        block = re.match(r".*?\.\d+", name)[0]
        key = {
            "layer": (name,),
            "block": (block, shape),
            "shape": (shape,),
            "width": (shape[side],),
        }[group_by]
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def leading(product: Callable[[Tensor], Tensor], d: int, rank: int) -> Tensor:
    """Returns the leading eigenvectors [d, rank] of a positive matrix, known by its products."""
    block = torch.randn(d, min(d, rank + 16), generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        block = torch.linalg.qr(product(block)).Q
    small = block.T @ product(block)
    return (block @ torch.linalg.eigh(small).eigenvectors.flip(1))[:, :rank].contiguous()


def pairs_of(matrices: list[dict[str, Tensor]], group_by: str, rank: int) -> Pairs:
    """Returns the leading directions of all matrices [n, k] of a group, next to each other."""
    shapes = {name: tuple(matrix.shape) for name, matrix in matrices[0].items()}
    sides: list[dict[str, Tensor]] = []
    for side in (1, 0):
        factors: dict[str, Tensor] = {}
        for names in groups_of(shapes, group_by, side):
            stack = [by_name[name].float() for name in names for by_name in matrices]
            if side:
                stack = [M.T for M in stack]
            F = leading(lambda x, s=stack: sum(M @ (M.T @ x) for M in s), len(stack[0]), rank)
            factors |= dict.fromkeys(names, F)
        sides.append(factors)
    return {name: (sides[0][name], sides[1][name]) for name in shapes}


def random_pairs(shapes: dict[str, tuple[int, int]], form: Form, seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(1000 + seed)
    pairs: Pairs = {}
    for names in groups_of(shapes, form.group, 0):
        n, k = shapes[names[0]]
        A, B = (torch.linalg.qr(torch.randn(d, form.rank, generator=generator)).Q for d in (k, n))
        pairs |= dict.fromkeys(names, (at_rank(A, form.rank), at_rank(B, form.rank)))
    return pairs


def at_rank(vectors: Tensor, rank: int) -> Tensor:
    """Returns the first columns, and zeros where there are fewer."""
    return nn.functional.pad(vectors, (0, rank - vectors.shape[1]))


def pairs_for(form: Form, target: str, seed: int) -> Pairs:
    """Returns the pair of each layer, at the form's rank. Only random ones depend on the seed."""
    weights = {n: m.weight.detach() for n, m in layers_of(problem(target).base).items()}
    if form.source == "random":
        return random_pairs({n: tuple(w.shape) for n, w in weights.items()}, form, seed)
    sources: dict[str, Callable[[], list[dict[str, Tensor]]]] = {
        "svd": lambda: [weights],
        "own": lambda: [gradients(target)],
        "donors": lambda: [gradients(donor) for donor in DONORS],
    }
    most = next(rank for rank in (16, 64, 256) if form.rank <= rank)
    name = f"pair-{form.source}{f'-{target}' if form.source == 'own' else ''}-{form.group}-{most}"
    pairs = cached(name, lambda: pairs_of(sources[form.source](), form.group, most))
    return {n: (at_rank(A, form.rank), at_rank(B, form.rank)) for n, (A, B) in pairs.items()}


def captured(target: str) -> pd.DataFrame:
    """Returns the share of the squared norm of a target's gradient that the pairs capture."""
    rows = []
    for kind in ("random", "svd", "donors", "own"):
        for rank in (16, 32, 64):
            pairs = pairs_for(Form(kind, "layer", rank, "dense", {}), target, 0)
            sums = np.zeros(3)
            for name, half in gradients(target).items():
                A, B = pairs[name]
                gradient = half.float()
                parts = (gradient @ A, gradient.T @ B, B.T @ gradient @ A)
                sums += [float(part.square().sum()) for part in parts]
            shares = sums / GRADIENT_NORM**2
            row = {"pair, per layer": f"{kind}, r {rank}"}
            rows.append(row | dict(zip(("by A", "by B", "by both"), map("{:.0%}".format, shares))))
    return pd.DataFrame(rows)
