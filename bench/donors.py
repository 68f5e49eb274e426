"""The donors of bench.transfer: their texts, their gradients, and pairs of factors from them.

Donors are texts that no target has. They are read in place: Python's library (PSF license), torch's
C++ headers (BSD), the system's message catalogs (PostgreSQL and GNU licenses) and license texts,
Perl's modules (Artistic), and rated snippets (MIT). Texts, gradients and pairs are made once, and
stored in demo_results/transfer.
"""

import gettext
import os
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
from .problems import DATA, TASKS, Problem, adapt, decay, fit, problem_of

CACHE = ROOT / "demo_results" / "transfer"
MODEL = "smollm2-kjv"  # the task whose model and layers all have
MOST_CHARACTERS = 600_000  # of a donor's text
GRADIENT_BATCHES = 8
GRADIENT_NORM = 1000.0  # of all weights' gradients: float16 has no room for small numbers

LORA_STEPS = 12
LORA_RANK = 8
LORA_RATE = 5e-3
MIXED_STEPS = 60
MIXED_RATE = 4e-3

# The dimension of a weight [n, k] along which a factor lies.
A_SIDE = 1
B_SIDE = 0
Pairs = dict[str, tuple[Tensor, Tensor]]  # orthonormal A [k, r] and B [n, r] by layer


class Form(NamedTuple):
    """What a task trains; the docstring of transfer.py has the parts."""

    pair: str
    group: str
    rank: tuple[int, int]  # of A and of B
    core: str
    only: str = ""
    b: str = ""
    norm: str = ""

    @staticmethod
    def of(text: str) -> "Form":
        pair, group, rank, core, *words = text.split("/")
        r_in, _, r_out = rank.partition("x")
        ranks = (int(r_in), int(r_out or r_in))
        return Form(pair, group, ranks, core, **dict(word.split(":") for word in words))

    @property
    def is_trained(self) -> bool:
        return self.pair.startswith("trained")

    @property
    def source(self) -> str:
        """What the fixed pair, or the start of a trained one, is made from; "" for neither."""
        return re.sub("^(trained|peft)-?", "", self.pair)


def made_once(name: str, write: Callable[[Path], object]) -> Path:
    """Returns a file of CACHE, which `write` makes if it does not exist."""
    path = CACHE / name
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")  # other processes may write it meanwhile
        write(temporary)
        temporary.rename(path)
    return path


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
DONORS = TEXTS[:6]  # their gradients give the donors' pair


def donor_text(name: str) -> str:
    """Returns a donor's text, from packages and from this system.

    Raises:
        ValueError: If it is missing.
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
    return problem_of(TASKS[MODEL]._replace(source=str(path)))


# ---- gradients and pairs -------------------------------------------------------------------------


def cached(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returned in this or an earlier process."""
    path = made_once(f"{name}.pt", lambda file: torch.save(make(), file))
    return torch.load(path, weights_only=True)


def layers_named(kinds: str) -> str:
    """Returns the pattern of the adapted layers: of all, or of kinds as "o,down"."""
    return rf".*\.layers\.\d+\..*\.({kinds.replace(',', '|') or '[a-z]+'})_proj"


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the adapted layers by name."""
    pattern = re.compile(layers_named(""))
    return {name: module for name, module in model.named_modules() if pattern.fullmatch(name)}


def gradients(name: str) -> dict[str, Tensor]:
    """Returns the mean gradient of each adapted weight at the base model, in float16."""

    def make() -> dict[str, Tensor]:
        model = problem(name).model(0).requires_grad_(False)
        weights = {n: layer.weight.requires_grad_(True) for n, layer in layers_of(model).items()}
        sums = {layer: torch.zeros(weight.shape) for layer, weight in weights.items()}
        batches = problem(name).batches(12345)
        for _ in range(GRADIENT_BATCHES):
            loss = problem(name).loss(model, next(batches))
            for layer, gradient in zip(sums, torch.autograd.grad(loss, list(weights.values()))):
                sums[layer] += gradient.float()
        norm = sum(float(gradient.square().sum()) for gradient in sums.values()) ** 0.5
        return {layer: (GRADIENT_NORM / norm * sums[layer]).half() for layer in sums}

    return cached(f"gradient-{name}-{GRADIENT_BATCHES}", make)


def shared_factors(
    shapes: dict[str, tuple[int, int]], group_by: str, make: Callable[[list[str], int], Tensor]
) -> Pairs:
    """Returns the pair of each layer.

    Args:
        shapes: [n, k] by layer.
        group_by: One of the groupings of LoTRConfig.
        make: (the layers that share a factor, its side) -> the factor.
    """
    factors: dict[tuple[str, int], Tensor] = {}
    for side in (A_SIDE, B_SIDE):
        groups: dict[tuple, list[str]] = {}
        for name, shape in shapes.items():
            block = re.match(r".*?\.\d+", name)[0]
            keys = {"layer": name, "block": (block, shape), "shape": shape, "width": shape[side]}
            groups.setdefault(keys[group_by], []).append(name)
        for names in groups.values():
            factors |= dict.fromkeys([(name, side) for name in names], make(names, side))
    return {name: (factors[name, A_SIDE], factors[name, B_SIDE]) for name in shapes}


def leading_pairs(matrices: list[dict[str, Tensor]], group_by: str, rank: int) -> Pairs:
    """Returns the leading directions of all matrices [n, k] of a group, next to each other."""
    shapes = {name: tuple(matrix.shape) for name, matrix in matrices[0].items()}

    def make(names: list[str], side: int) -> Tensor:
        members = [by_name[name].float() for name in names for by_name in matrices]
        stack = torch.cat([matrix.T if side == A_SIDE else matrix for matrix in members], 1)
        torch.manual_seed(0)
        U, _, _ = torch.svd_lowrank(stack, min(rank + 16, *stack.shape), niter=4)
        return U[:, :rank].contiguous()

    return shared_factors(shapes, group_by, make)


def random_pairs(shapes: dict[str, tuple[int, int]], form: Form, seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(1000 + seed)

    def make(names: list[str], side: int) -> Tensor:
        rank = form.rank[0 if side == A_SIDE else 1]
        columns = torch.randn(shapes[names[0]][side], rank, generator=generator)
        return at_rank(torch.linalg.qr(columns).Q, rank)

    return shared_factors(shapes, form.group, make)


def at_rank(vectors: Tensor, rank: int) -> Tensor:
    """Returns the first columns, and zeros where there are fewer."""
    return nn.functional.pad(vectors, (0, rank - vectors.shape[1]))


def lora_of(name: str) -> Path:
    """Returns the folder of a text's LoRA, which is trained first if it does not exist."""
    folder = CACHE / "loras" / name
    if not folder.exists():
        text = problem(name)
        text.task = text.task._replace(steps=LORA_STEPS)
        model = text.model(0)
        torch.manual_seed(0)
        model = adapt(model, TASKS[MODEL], "lora", LORA_RANK)
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
    slots = {name: torch.full((4,), tasks.add()) for name in DONORS}
    batches = {name: text.batches(0) for name, text in texts.items()}
    optimizer = torch.optim.AdamW(lotr_parameters(model), lr=MIXED_RATE, weight_decay=0.0)
    schedule = decay(optimizer, MIXED_STEPS)
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
        factors = (layer.factors.A.value.detach(), layer.factors.B.value.detach())
        pairs[name] = tuple(torch.linalg.qr(factor.float()).Q for factor in factors)
    return pairs


def fixed_pairs(form: Form, target: str, seed: int) -> Pairs:
    """Returns the form's fixed pair of each layer. Only random ones depend on the seed."""
    if not form.source:
        return {}
    weights = {n: m.weight.detach() for n, m in layers_of(problem(target).base).items()}
    if form.source == "random":
        return random_pairs({n: tuple(w.shape) for n, w in weights.items()}, form, seed)
    makers: dict[str, Callable[[int], Pairs]] = {
        "svd": lambda rank: leading_pairs([weights], form.group, rank),
        "own": lambda rank: leading_pairs([gradients(target)], form.group, rank),
        "donors": lambda rank: leading_pairs([gradients(d) for d in DONORS], form.group, rank),
        "known": lambda rank: leading_pairs(
            [gradients(d) for d in (*DONORS, target)], form.group, rank
        ),
        "loras": lambda rank: lora_pairs(form.group, rank),
        "mixed": lambda rank: mixed_pairs(form.group, rank),
    }
    most = max(form.rank)
    # Only loras and mixed depend on the rank. The others are cut from rank 16, 64 or 256.
    if form.source not in ("loras", "mixed"):
        most = next(rank for rank in (16, 64, 256) if most <= rank)
    about = target if form.source in ("own", "known") else "all"
    name = f"pair-{form.source}-{about}-{form.group}-{most}"
    pairs = cached(name, lambda: makers[form.source](most))
    r_in, r_out = form.rank
    return {n: (at_rank(A, r_in), at_rank(B, r_out)) for n, (A, B) in pairs.items()}


def captured(pairs: Pairs, target: str) -> float:
    """Returns the share of the squared norm of a target's gradient that the pairs capture."""
    of_target = gradients(target)
    parts = [B.T @ of_target[name].float() @ A for name, (A, B) in pairs.items()]
    return sum(float(part.square().sum()) for part in parts) / GRADIENT_NORM**2
