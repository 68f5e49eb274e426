"""Pairs of factors that are fixed before a task is trained, and the texts that they are made from.

A task in a bank trains only its cores: its factors A [k, r] and B [n, r] were made before. In
bench.transfer the text of the task is the target, and donors are texts that no target has.
`fixed_pairs` makes an orthonormal pair for each layer from one of these sources:

    random                     without any text
    svd, own, donors, known    as the r leading singular vectors of matrices [n, k]: left ones for
                               B, right ones for A. The matrices are the base model's weights, the
                               gradient of the target, of six donors, or of the target and the
                               donors
    loras, mixed               by training on the donors: a LoRA for each, which loras_to_bank
                               makes a bank of, or one adapter with a task for each

The donors are read in place: Python's library (PSF license), torch's C++ headers (BSD), the
system's message catalogs (PostgreSQL and GNU licenses) and license texts, Perl's modules
(Artistic), and rated snippets (MIT). Texts, gradients and pairs are made once, and stored in
demo_results/transfer.
"""

import gettext
import os
import re
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lotr_ext import (
    LoTRConfig,
    TaskBank,
    apply_lotr,
    load_adapter,
    lotr_parameters,
    use_tasks,
)
from lotr_ext.convert import loras_to_bank

from .common import ROOT
from .problems import DATA, TASKS, Problem, adapt, fit, problem_of, warmup_and_decay

CACHE = ROOT / "demo_results" / "transfer"
BASE_TASK = "smollm2-kjv"  # targets and donors have its model, layers and sizes
MOST_CHARACTERS = 600_000  # of a donor's text
GRADIENT_BATCHES = 8
GRADIENT_NORM = 1000.0  # of all weights' gradients: float16 has no room for small numbers

LORA_STEPS = 12
LORA_RANK = 8
LORA_RATE = 5e-3
MIXED_STEPS = 60
MIXED_RATE = 4e-3

# Which dimension of a weight [n, k] the rows of a factor belong to.
A_SIDE = 1
B_SIDE = 0
Pairs = dict[str, tuple[Tensor, Tensor]]  # orthonormal A [k, r] and B [n, r] by layer
Shapes = dict[str, tuple[int, int]]  # [n, k] of the weight by layer


# ---- what is made once ---------------------------------------------------------------------------


def made_once(name: str, write: Callable[[Path], object]) -> Path:
    """Returns the path of a file in CACHE. If it does not exist, `write` makes it."""
    path = CACHE / name
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")  # other processes may write it meanwhile
        write(temporary)
        temporary.rename(path)
    return path


def cached(name: str, make: Callable[[], Any]) -> Any:
    """Returns what `make` returns. It runs once: the result, of tensors, is kept in CACHE."""
    path = made_once(f"{name}.pt", lambda file: torch.save(make(), file))
    return torch.load(path, weights_only=True)


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
            # A private name: gettext only translates one message at a time.
            catalog = gettext.GNUTranslations(file)._catalog
        texts += [text for text in catalog.values() if isinstance(text, str)]
    return "\n".join(texts)


LIBRARY = Path(sysconfig.get_path("stdlib"))
HEADERS = Path(torch.__file__).parent / "include" / "ATen" / "core"
READERS: dict[str, Callable[[], str]] = {
    "python": lambda: files(LIBRARY / "email", "*.py") + files(LIBRARY / "asyncio", "*.py"),
    "cpp": lambda: files(HEADERS, "*.h"),
    "editorials": lambda: snippets("editorial_snippets.tsv"),
    "german": lambda: messages("de"),
    "licenses": lambda: files(Path("/usr/share/common-licenses"), "*"),
    "movies": lambda: snippets("movie_snippets.tsv"),
    "perl": lambda: files(Path("/usr/share/perl"), "*.pm"),
    "french": lambda: messages("fr"),
    "tweets": lambda: snippets("tweets.tsv"),
    "products": lambda: snippets("product_snippets.tsv"),
}
TEXTS = tuple(READERS)
DONORS = TEXTS[:6]  # the donors of pairs; --collection has all ten texts


def donor_text(name: str) -> str:
    """Returns a donor's text, which is read from installed packages and from this system.

    Raises:
        ValueError: If this system does not have it, or only a short one.
    """
    text = READERS[name]()[:MOST_CHARACTERS]
    if len(text) < MOST_CHARACTERS // 4:
        raise ValueError(f"{name}: expected a long text on this system, got {len(text)} characters")
    return text


def problem(name: str) -> Problem:
    """Returns the problem of a target or a donor."""
    if name in TASKS:
        return problem_of(TASKS[name])
    path = made_once(f"{name}.txt", lambda file: file.write_text(donor_text(name), "utf-8"))
    return problem_of(TASKS[BASE_TASK]._replace(source=str(path)))


# ---- layers and gradients ------------------------------------------------------------------------


def layers_named(kinds: str) -> str:
    """Returns the pattern of the adapted layers' names: all, or only kinds such as "o,down"."""
    return rf".*\.layers\.\d+\..*\.({kinds.replace(',', '|') or '[a-z]+'})_proj"


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the adapted layers by name."""
    return {
        name: layer for name, layer in model.named_modules() if re.fullmatch(layers_named(""), name)
    }


def base_weights(name: str) -> dict[str, Tensor]:
    """Returns the adapted weights of the base model of a target or a donor."""
    return {
        layer_name: layer.weight.detach()
        for layer_name, layer in layers_of(problem(name).base).items()
    }


def gradients(name: str) -> dict[str, Tensor]:
    """Returns the gradient of each adapted weight at the base model, in float16.

    It is a mean over batches. One factor scales all of them to the norm GRADIENT_NORM.
    """

    def make() -> dict[str, Tensor]:
        model = problem(name).model(0).requires_grad_(False)
        weights = {
            layer_name: layer.weight.requires_grad_(True)
            for layer_name, layer in layers_of(model).items()
        }
        sums = {layer_name: torch.zeros(weight.shape) for layer_name, weight in weights.items()}
        batches = problem(name).batches(12345)  # a seed that no run has
        for _ in range(GRADIENT_BATCHES):
            loss = problem(name).loss(model, next(batches))
            for layer_name, gradient in zip(
                sums, torch.autograd.grad(loss, list(weights.values()))
            ):
                sums[layer_name] += gradient.float()
        norm = sum(float(gradient.square().sum()) for gradient in sums.values()) ** 0.5
        return {
            layer_name: (GRADIENT_NORM / norm * total).half() for layer_name, total in sums.items()
        }

    return cached(f"gradient-{name}-{GRADIENT_BATCHES}", make)


# ---- pairs ---------------------------------------------------------------------------------------


def shared_factors(
    shapes: Shapes, group_by: str, make: Callable[[list[str], int], Tensor]
) -> Pairs:
    """Returns the pair of each layer. Layers of one group have the same tensor.

    Args:
        shapes: [n, k] of each layer's weight.
        group_by: Which layers share a factor, as in LoTRConfig. With "width", two layers may share
            only A or only B.
        make: Makes the factor of a side for a group: make(names, side).
    """
    factors: dict[tuple[str, int], Tensor] = {}
    for side in (A_SIDE, B_SIDE):
        groups: dict[tuple, list[str]] = {}
        for name, shape in shapes.items():
            # What the layers of a group have in common.
            keys = {
                "layer": name,
                "block": (re.match(r".*?\.\d+", name)[0], shape),
                "shape": shape,
                "width": shape[side],
            }
            groups.setdefault(keys[group_by], []).append(name)
        for names in groups.values():
            factors |= dict.fromkeys([(name, side) for name in names], make(names, side))
    return {name: (factors[name, A_SIDE], factors[name, B_SIDE]) for name in shapes}


def leading_pairs(matrices: list[dict[str, Tensor]], group_by: str, rank: int) -> Pairs:
    """Returns the pair of each layer: the leading directions of all matrices of its group.

    Args:
        matrices: A matrix [n, k] by layer, for each text.
        group_by: Which layers share a factor, as in LoTRConfig.
        rank: How many directions.
    """
    shapes = {name: tuple(matrix.shape) for name, matrix in matrices[0].items()}

    def make(names: list[str], side: int) -> Tensor:
        members = [by_name[name].float() for name in names for by_name in matrices]
        stack = torch.cat([matrix.T if side == A_SIDE else matrix for matrix in members], 1)
        torch.manual_seed(0)
        # A randomized SVD. With sixteen more directions than needed, the leading ones are accurate.
        U, _, _ = torch.svd_lowrank(stack, min(rank + 16, *stack.shape), niter=4)
        return U[:, :rank].contiguous()

    return shared_factors(shapes, group_by, make)


def random_pairs(shapes: Shapes, group_by: str, ranks: tuple[int, int], seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(1000 + seed)

    def make(names: list[str], side: int) -> Tensor:
        rank = {A_SIDE: ranks[0], B_SIDE: ranks[1]}[side]
        columns = torch.randn(shapes[names[0]][side], rank, generator=generator)
        return at_rank(torch.linalg.qr(columns).Q, rank)

    return shared_factors(shapes, group_by, make)


def at_rank(vectors: Tensor, rank: int) -> Tensor:
    """Returns the first `rank` columns, with zeros where there are fewer."""
    return nn.functional.pad(vectors, (0, rank - vectors.shape[1]))  # a negative pad cuts


def lora_of(name: str) -> Path:
    """Returns the folder of a text's LoRA, which is trained first if it does not exist."""
    folder = CACHE / "loras" / name
    if not folder.exists():
        text = problem(name)
        text.task = text.task._replace(steps=LORA_STEPS)  # the steps of `fit`
        torch.manual_seed(0)
        model = adapt(text.model(0), TASKS[BASE_TASK], "lora", LORA_RANK)
        fit(model, "lora", LORA_RATE, 0, text)
        model.save_pretrained(folder)
    return folder


def lora_pairs(group_by: str, rank: int) -> Pairs:
    """Returns the pairs that loras_to_bank makes of the donors' LoRAs."""
    folder = CACHE / f"donors-{group_by}-{rank}"
    loras_to_bank([lora_of(name) for name in DONORS], folder, rank=rank, group_by=group_by)
    return orthonormal_pairs(load_adapter(problem(DONORS[0]).model(0), folder))


def mixed_pairs(group_by: str, rank: int) -> Pairs:
    """Returns pairs that were trained on batches of all donors in turn, a task for each donor."""
    texts = {name: problem(name) for name in DONORS}
    model = texts[DONORS[0]].model(0)
    torch.manual_seed(0)
    apply_lotr(model, LoTRConfig(rank=rank, group_by=group_by, target_modules=layers_named("")))
    tasks = TaskBank(model, len(DONORS)).requires_grad_()
    # The task of each row in a batch.
    slots = {name: torch.full((TASKS[BASE_TASK].batch,), tasks.add()) for name in DONORS}
    batches = {name: text.batches(0) for name, text in texts.items()}
    optimizer = torch.optim.AdamW(lotr_parameters(model), lr=MIXED_RATE, weight_decay=0.0)
    schedule = warmup_and_decay(optimizer, MIXED_STEPS)
    for step in range(MIXED_STEPS):
        name = DONORS[step % len(DONORS)]
        with use_tasks(model, slots[name]):
            texts[name].loss(model, next(batches[name])).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule()
    return orthonormal_pairs(model)


def orthonormal_pairs(model: nn.Module) -> Pairs:
    """Returns the pairs of an adapted model as orthonormal columns."""
    pairs = {}
    for name, layer in layers_of(model).items():
        pairs[name] = tuple(
            torch.linalg.qr(factor.value.detach().float()).Q
            for factor in (layer.factors.A, layer.factors.B)
        )
    return pairs


TRAINED_SOURCES = {"loras": lora_pairs, "mixed": mixed_pairs}
# Leading directions are stored at these ranks. A lower rank is their first columns; trained pairs
# are another pair at each rank.
STORED_RANKS = (16, 64, 256)


def pairs_of(source: str, target: str, group_by: str, rank: int) -> Pairs:
    """Makes the pairs of any source but random."""
    if source in TRAINED_SOURCES:
        return TRAINED_SOURCES[source](group_by, rank)
    if source == "svd":
        return leading_pairs([base_weights(target)], group_by, rank)
    texts = {"own": (target,), "donors": DONORS, "known": (*DONORS, target)}[source]
    return leading_pairs([gradients(text) for text in texts], group_by, rank)


def fixed_pairs(
    source: str, group_by: str, ranks: tuple[int, int], target: str, seed: int
) -> Pairs:
    """Returns the pair of each layer that a source makes.

    Args:
        source: One of those in this file's docstring.
        group_by: Which layers share a factor, as in LoTRConfig.
        ranks: The ranks of A and B. If the source has fewer directions, the other columns are
            zeros.
        target: The task that will be trained.
        seed: The seed of the task's run. Only random pairs depend on it.
    """
    if source == "random":
        shapes = {name: tuple(weight.shape) for name, weight in base_weights(target).items()}
        return random_pairs(shapes, group_by, ranks, seed)
    rank = max(ranks)
    if source not in TRAINED_SOURCES:
        rank = next(stored for stored in STORED_RANKS if rank <= stored)
    made_for = target if source in ("own", "known") else "all"
    name = f"pair-{source}-{made_for}-{group_by}-{rank}"
    pairs = cached(name, partial(pairs_of, source, target, group_by, rank))
    r_in, r_out = ranks
    return {layer: (at_rank(A, r_in), at_rank(B, r_out)) for layer, (A, B) in pairs.items()}


def captured(pairs: Pairs, target: str) -> float:
    """Returns the share of the squared norm of a target's gradient that the pairs capture.

    Of a gradient dW [n, k] they capture B^T dW A, which is the gradient of a core.
    """
    of_target = gradients(target)
    parts = [B.T @ of_target[name].float() @ A for name, (A, B) in pairs.items()]
    return sum(float(part.square().sum()) for part in parts) / GRADIENT_NORM**2
