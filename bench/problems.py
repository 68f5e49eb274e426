"""The tasks and methods of bench.accuracy, and how a model is trained.

A problem (a synthetic teacher, a sentence encoder on rated texts, a language model on a text) makes fresh models, endless
training batches, the loss of a batch, and the losses of held-out items.
"""

from __future__ import annotations

import copy
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .common import ROOT

DATA = ROOT / "data"
HEAD_LR = 1e-2


class Task(NamedTuple):
    """layers: the adapted ones, a regular expression. steps, batch, validation, held_out: of its runs."""

    kind: str
    source: str
    layers: str
    steps: int
    batch: int
    validation: int
    held_out: int
    all_methods: bool = False
    norms: str = ""


def _teacher(shared: str) -> Task:
    return Task("teacher", shared, r"blocks\.\d+\.(up|down)", 400, 64, 1000, 2000, True)


def _classifier(file: str, *sizes: int, all_methods: bool = False) -> Task:
    layers = r".*\.layer\.\d+\..*\.(query|key|value|dense)"
    return Task(
        "classifier", file, layers, sizes[0], 32, sizes[1], sizes[2], all_methods, r".*\.LayerNorm"
    )


def _language(file: str, all_methods: bool = False) -> Task:
    return Task(
        "language",
        file,
        r".*\.layers\.\d+\..*_proj",
        60,
        4,
        32,
        96,
        all_methods,
        r".*(norm|layernorm)",
    )


TASKS = {
    "teacher-shared": _teacher("1.0"),
    "teacher-half": _teacher("0.5"),
    "teacher-own": _teacher("0.0"),
    "minilm-movies": _classifier("movie_snippets.tsv", 150, 500, 1500, all_methods=True),
    "minilm-tweets": _classifier("tweets.tsv", 100, 400, 1000),
    "minilm-products": _classifier("product_snippets.tsv", 100, 400, 1000),
    "minilm-editorials": _classifier("editorial_snippets.tsv", 100, 400, 1000),
    "smollm2-kjv": _language("kjv.txt", True),
    "smollm2-wycliffe": _language("wycliffe.txt"),
    "smollm2-verilog": _language("verilog.txt"),
}
KINDS = ("teacher", "classifier", "language")


class Problem:
    """parts: training, validation, held_out, as tensors or lists of items."""

    head = False  # whether a model has a new head, which every method trains and whose numbers are not counted
    parts: dict[str, tuple]

    def __init__(self, task: Task):
        self.task = task

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Endless rows of the training tensors, a new order each epoch."""
        draw, order, size = random.Random(seed), [], self.task.batch
        while True:
            while len(order) < size:
                epoch = list(range(len(self.parts["training"][0])))
                draw.shuffle(epoch)
                order += epoch
            rows, order = order[:size], order[size:]
            yield tuple(t[rows] for t in self.parts["training"])

    def loss(self, model: nn.Module, batch: tuple) -> Tensor:
        return self.losses(model, batch)[0].mean()

    @torch.no_grad()
    def measure(self, model: nn.Module, part: str) -> tuple[Tensor, Tensor | None]:
        """(the loss of each item in float64, whether each was right, where that has a meaning), in batches of one kind."""
        found, order = [], self.order(part)
        for rows in order.split(8 if self.task.kind == "language" else 100):
            found.append(self.losses(model, tuple(_rows(own, rows) for own in self.parts[part])))
        losses, right = (
            None if own[0] is None else torch.cat(own)[order.argsort()] for own in zip(*found)
        )
        return losses.double(), right

    def order(self, part: str) -> Tensor:
        return torch.arange(len(self.parts[part][0]))


def _rows(values: Tensor | list, rows: Tensor) -> Tensor | list:
    return values[rows] if isinstance(values, Tensor) else [values[i] for i in rows]


class Teacher(Problem):
    """A small residual net is to learn what a changed copy of it computes, from noisy outputs. The change of every weight has
    rank 4; a part `source` of its squared norm lies in spaces that all layers of one shape share. Loss: the squared error over
    that of the unchanged net."""

    def __init__(self, task: Task):
        super().__init__(task)
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = Net()
        teacher = changed(self.net, float(task.source), generator)
        with torch.no_grad():
            inputs = [
                torch.randn(count, 32, generator=generator)
                for count in (2048, task.validation, task.held_out)
            ]
            outputs = [teacher(x) for x in inputs]
            differences = outputs[0] - self.net(inputs[0])
        noise, self.unit = 0.2 * differences.std(), differences.square().mean().item()
        noisy = [y + noise * torch.randn(y.shape, generator=generator) for y in outputs]
        self.parts = dict(zip(("training", "validation", "held_out"), zip(inputs, noisy)))

    def model(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.net)

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        return (model(batch[0]) - batch[1]).square().mean(1) / self.unit, None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(h)))


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(6)))


@torch.no_grad()
def changed(net: Net, shared: float, generator: torch.Generator) -> Net:
    teacher = copy.deepcopy(net)

    def spaces(n: int, k: int) -> list[Tensor]:
        return [torch.linalg.qr(torch.randn(d, 4, generator=generator)).Q for d in (n, k)]

    for kind in ("up", "down"):
        layers = [getattr(block, kind) for block in teacher.blocks]
        common = spaces(*layers[0].weight.shape)
        for layer in layers:
            change = torch.zeros_like(layer.weight)
            for (left, right), part in (
                (common, shared),
                (spaces(*layer.weight.shape), 1 - shared),
            ):
                one = left @ torch.randn(4, 4, generator=generator) @ right.T
                change += part**0.5 * one / one.norm()
            layer.weight += 0.5 * layer.weight.norm() * change / change.norm()
    return teacher


class Classified(Problem):
    """MiniLM with a new linear head on the mean of its last hidden states, on texts rated above or below 0. Nats a text."""

    head = True

    def __init__(self, task: Task):
        from transformers import AutoModel, AutoTokenizer

        super().__init__(task)
        rows = [
            line.split("\t", 1)
            for line in (DATA / task.source).read_text(encoding="utf-8").splitlines()
        ]
        texts = [
            (text, int(float(rating) > 0)) for rating, text in rows if abs(float(rating)) >= 0.5
        ]
        tokenizer = AutoTokenizer.from_pretrained(DATA / "all-minilm-l6-v2", local_files_only=True)
        self.encoder = AutoModel.from_pretrained(
            DATA / "all-minilm-l6-v2", local_files_only=True
        ).eval()
        self.parts, shuffled = {}, texts
        for part, count in (
            ("held_out", task.held_out),
            ("validation", task.validation),
            ("training", 0),
        ):
            if count:
                shuffled = shuffled.copy()
                random.Random(0).shuffle(shuffled)
            own, shuffled = (shuffled[-count:], shuffled[:-count]) if count else (shuffled, [])
            ids = tokenizer([text for text, _ in own], truncation=True, max_length=128)["input_ids"]
            self.parts[part] = ids, [label for _, label in own]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return TextClassifier(copy.deepcopy(self.encoder))

    def batches(self, seed: int) -> Iterator[tuple[list[list[int]], Tensor]]:
        """Twenty batches at a time are sorted by length, to reduce padding."""
        (ids, labels), draw, order, size = (
            self.parts["training"],
            random.Random(seed),
            [],
            self.task.batch,
        )
        while True:
            while len(order) < 20 * size:
                epoch = list(range(len(ids)))
                draw.shuffle(epoch)
                order += epoch
            chunk, order = sorted(order[: 20 * size], key=lambda i: len(ids[i])), order[20 * size :]
            queue = [chunk[i : i + size] for i in range(0, 20 * size, size)]
            draw.shuffle(queue)
            for batch in reversed(queue):
                yield [ids[i] for i in batch], torch.tensor([labels[i] for i in batch])

    def order(self, part: str) -> Tensor:
        """Texts of similar length together, to reduce padding."""
        return torch.tensor([len(row) for row in self.parts[part][0]]).argsort(stable=True)

    def losses(
        self, model: nn.Module, batch: tuple[list[list[int]], Tensor]
    ) -> tuple[Tensor, Tensor]:
        labels = torch.as_tensor(batch[1])
        logits = model(batch[0])
        return nn.functional.cross_entropy(logits, labels, reduction="none"), (
            logits.argmax(1) == labels
        ).double()


class TextClassifier(nn.Module):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, ids: list[list[int]]) -> Tensor:
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        mask = (
            torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
        ).long()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        mask = mask[..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


class Written(Problem):
    """SmolLM2-135M in bfloat16, trained parts in float32, on rows of 64 tokens of a text. Nats a token."""

    def __init__(self, task: Task):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(task)
        folder, held = DATA / "smollm2-135m", task.validation + task.held_out
        self.base = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.bfloat16
        ).eval()
        self.base.set_attn_implementation(
            "eager"
        )  # on rows this short torch's fused attention takes longer in backward
        ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
            (DATA / task.source).read_text(encoding="utf-8"), verbose=False
        )["input_ids"]
        rows = len(ids) // 64
        table = torch.tensor(ids[: rows * 64]).view(rows, 64)
        apart = torch.zeros(rows, dtype=torch.bool).index_fill_(
            0, torch.arange(held) * (rows // held), True
        )  # evenly
        away = table[apart][torch.randperm(held, generator=torch.Generator().manual_seed(0))]
        kept = {
            "training": table[~apart],
            "validation": away[: task.validation],
            "held_out": away[task.validation :],
        }
        self.parts = {part: (rows,) for part, rows in kept.items()}

    def model(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.base)

    @torch.autocast("cpu", torch.bfloat16)
    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(input_ids=batch[0], labels=batch[0], use_cache=False).loss

    @torch.autocast("cpu", torch.bfloat16)
    def losses(self, model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        logits, wanted = (
            model(input_ids=batch[0], use_cache=False).logits[:, :-1].float(),
            batch[0][:, 1:],
        )
        each = nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none"
        ).view(wanted.shape)
        return each.double().mean(1), (logits.argmax(-1) == wanted).double().mean(1)


def missing(task: Task) -> str:
    """What of its data is not there; "" if all is."""
    model = {"classifier": ["all-minilm-l6-v2"], "language": ["smollm2-135m"]}.get(task.kind)
    lacking = (
        [name for name in [*model, task.source] if not (DATA / name).exists()] if model else []
    )
    return ", ".join(str(DATA / name) for name in lacking)


@lru_cache(maxsize=1)  # a process keeps that of its last run
def problem_of(task: Task) -> Problem:
    return {"teacher": Teacher, "classifier": Classified, "language": Written}[task.kind](task)


# ---- methods ---------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """family: lotr, peft, or what is trained whole: base, head, norm, full. ranks, rates: by kind of task (teacher, classifier,
    language); a rate is where the search begins, for LoTR before the factor 0.4. settings: of the configuration."""

    family: str
    ranks: tuple[tuple[int, ...], ...]
    rates: tuple[float, float, float] = (5e-2, 5e-3, 5e-3)
    settings: Mapping[str, Any] = MappingProxyType({})


CORE = {"train": ("core",)}
PEFT_RATES, DIAGONAL = (2e-2, 2e-3, 2e-3), (5e-2, 2e-2, 2e-2)
METHODS = {
    "base": Method("base", ((0,), (), (0,)), (0.0, 0.0, 0.0)),
    "head": Method("head", ((), (0,), ()), (HEAD_LR,) * 3),
    "full": Method("full", ((0,), (0,), (0,)), (1e-2, 1e-4, 1e-4)),
    "norm": Method("norm", ((), (0,), (0,)), (5e-3,) * 3),
    "lotr": Method("lotr", ((1, 2, 4, 8, 16), (4, 8, 16, 28), (4, 24, 60))),
    "lotr-width": Method("lotr", ((), (16,), (28,)), settings={"group_by": "width"}),
    "lotr-block": Method("lotr", ((), (1, 5), (6,)), settings={"group_by": "block"}),
    "lotr-core": Method("lotr", ((8, 16), (64,), (32,)), settings=CORE),
    "lotr-diagonal": Method(
        "lotr", ((5, 11, 16, 22, 45), (8,), (48,)), DIAGONAL, {"core": "diagonal"}
    ),
    "lotr-gradient": Method("lotr", ((4, 8), (8, 16), ()), settings={"from_gradient": True}),
    "lotr-name": Method("lotr", ((), (16,), ()), settings={"group_by": "name"}),
    "lotr-core-gradient": Method(
        "lotr", ((8, 16), (64,), (32,)), settings={"from_gradient": True, **CORE}
    ),
    "lotr-tucker": Method("lotr", ((8,), (), ()), settings={"core": "tucker"}),
    "lotr-train": Method("lotr", ((8,), (), ()), settings={"core": "train"}),
    "lotr-few": Method("lotr", ((8,), (32,), (32,)), settings={"core": "few", **CORE}),
    "lora-xs": Method(
        "lotr", ((8,), (32,), (32,)), settings={"init": "svd", "group_by": "layer", **CORE}
    ),
    "lora": Method("peft", ((1, 2, 4, 8), (1, 4, 8, 32), (1, 4, 16)), PEFT_RATES),
    "dora": Method("peft", ((1, 4), (1,), (1,)), PEFT_RATES, {"use_dora": True}),
    "vera": Method("peft", ((64,), (256,), (256,)), (2e-2, 1e-2, 1e-2), {"vera": True}),
}
MAIN = {  # of the tasks that have not all methods
    "classifier": ("head:0", "full:0", "lotr:4", "lotr:16", "lora:1", "lora:4"),
    "language": (
        "base:0",
        "full:0",
        "lotr",
        "lotr-block:6",
        "lotr-diagonal:48",
        "lora:1",
        "lora:4",
    ),
}


def adapt(model: nn.Module, task: Task, method: str, rank: int) -> nn.Module:
    """Freezes a fresh model but for its new head and adds what the method trains. Returns the module to train."""
    family, settings = METHODS[method].family, dict(METHODS[method].settings)
    save = ["head"] if hasattr(model, "head") else None
    if family == "lotr":
        from lotr_ext import LoTRConfig, apply_lotr

        settings.pop("from_gradient", None)
        if (
            settings.get("group_by") == "layer"
        ):  # factors from the layer's own weight: LoRA-XS, arXiv 2405.17604
            settings["group_by"] = lambda name, module: name.replace(".", "_")
        return apply_lotr(
            model,
            LoTRConfig(rank=rank, target_modules=task.layers, modules_to_save=save, **settings),
        )
    if family == "peft":
        from peft import LoraConfig, VeraConfig, get_peft_model

        own = {"r": rank, "target_modules": task.layers, "modules_to_save": save}
        if settings.pop("vera", False):
            return get_peft_model(model, VeraConfig(**own))
        return get_peft_model(model, LoraConfig(lora_alpha=2 * rank, **own, **settings))
    whole = {"full": task.layers, "norm": task.norms}.get(family, "")
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            chosen = bool(whole) and re.fullmatch(whole, name) is not None
            parameter.requires_grad_(chosen or (save is not None and name == "head"))
            if parameter.requires_grad:
                parameter.data = (
                    parameter.data.float()
                )  # bfloat16 would round Adam's small steps away
    return model


def decay(optimizer: torch.optim.Optimizer, steps: int) -> Callable[[], None]:
    """To call after each step: rates rise over the first 6 % of the steps, then fall to zero."""
    warm = max(1, round(0.06 * steps))
    rate = lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate).step


def start_from_gradient(model: nn.Module, problem: Problem, batches: Iterator, steps: int) -> int:
    """A and B from the gradients of eight batches, after a tenth of the steps for a new head. Returns the steps left."""
    from lotr_ext import init_from_gradient

    used = steps // 10 if problem.head else 0
    head = [p for name, p in model.named_parameters() if "head." in name]
    optimizer = torch.optim.AdamW(head, lr=HEAD_LR, weight_decay=0.0) if used else None
    for _ in range(used):
        problem.loss(model, next(batches)).backward()
        optimizer.step()
        model.zero_grad()
    init_from_gradient(model, [next(batches) for _ in range(8)], problem.loss)
    return steps - used


def fit(model: nn.Module, method: str, lr: float, seed: int, problem: Problem) -> list[float]:
    """AdamW without weight decay, a new head at its own rate. Returns the losses by step; the last of a diverged run is not
    finite."""
    batches, steps, losses = problem.batches(seed), problem.task.steps, []
    if METHODS[method].settings.get("from_gradient"):
        steps = start_from_gradient(model, problem, batches, steps)
    rates = {False: lr, True: lr if method == "head" else HEAD_LR}
    named = [
        (problem.head and "head." in name, p)
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    groups = [
        {"params": [p for head, p in named if head == part], "lr": rate}
        for part, rate in rates.items()
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule, parent = decay(optimizer, steps), os.getppid()
    while len(losses) < steps and (not losses or np.isfinite(losses[-1])):
        loss = problem.loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule()
        losses.append(loss.item())
        if (
            os.getppid() != parent
        ):  # the parent was ended from outside, so this run's result would be lost
            sys.exit(1)
    return losses
