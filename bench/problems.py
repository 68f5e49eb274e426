"""The tasks of bench.accuracy: a synthetic teacher, a sentence encoder on rated texts, a language model on a text.

A problem makes fresh models, endless training batches, the loss of a batch, and the losses of held-out items.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .common import ROOT

DATA = ROOT / "data"


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
    return Task("classifier", file, layers, sizes[0], 32, sizes[1], sizes[2], all_methods, r".*\.LayerNorm")


def _language(file: str, all_methods: bool = False) -> Task:
    return Task("language", file, r".*\.layers\.\d+\..*_proj", 60, 4, 32, 96, all_methods, r".*(norm|layernorm)")


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
        losses, right = (None if own[0] is None else torch.cat(own)[order.argsort()] for own in zip(*found))
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
            inputs = [torch.randn(count, 32, generator=generator) for count in (2048, task.validation, task.held_out)]
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
            for (left, right), part in ((common, shared), (spaces(*layer.weight.shape), 1 - shared)):
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
        rows = [line.split("\t", 1) for line in (DATA / task.source).read_text(encoding="utf-8").splitlines()]
        texts = [(text, int(float(rating) > 0)) for rating, text in rows if abs(float(rating)) >= 0.5]
        tokenizer = AutoTokenizer.from_pretrained(DATA / "all-minilm-l6-v2", local_files_only=True)
        self.encoder = AutoModel.from_pretrained(DATA / "all-minilm-l6-v2", local_files_only=True).eval()
        self.parts, shuffled = {}, texts
        for part, count in (("held_out", task.held_out), ("validation", task.validation), ("training", 0)):
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
        (ids, labels), draw, order, size = self.parts["training"], random.Random(seed), [], self.task.batch
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

    def losses(self, model: nn.Module, batch: tuple[list[list[int]], Tensor]) -> tuple[Tensor, Tensor]:
        labels = torch.as_tensor(batch[1])
        logits = model(batch[0])
        return nn.functional.cross_entropy(logits, labels, reduction="none"), (logits.argmax(1) == labels).double()


class TextClassifier(nn.Module):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, ids: list[list[int]]) -> Tensor:
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        mask = (torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]).long()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        mask = mask[..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


class Written(Problem):
    """SmolLM2-135M in bfloat16, trained parts in float32, on rows of 64 tokens of a text. Nats a token."""

    def __init__(self, task: Task):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(task)
        folder, held = DATA / "smollm2-135m", task.validation + task.held_out
        self.base = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.bfloat16).eval()
        self.base.set_attn_implementation("eager")  # on rows this short torch's fused attention takes longer in backward
        ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
            (DATA / task.source).read_text(encoding="utf-8"), verbose=False
        )["input_ids"]
        rows = len(ids) // 64
        table = torch.tensor(ids[: rows * 64]).view(rows, 64)
        apart = torch.zeros(rows, dtype=torch.bool).index_fill_(0, torch.arange(held) * (rows // held), True)  # evenly
        away = table[apart][torch.randperm(held, generator=torch.Generator().manual_seed(0))]
        kept = {"training": table[~apart], "validation": away[: task.validation], "held_out": away[task.validation :]}
        self.parts = {part: (rows,) for part, rows in kept.items()}

    def model(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.base)

    @torch.autocast("cpu", torch.bfloat16)
    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(input_ids=batch[0], labels=batch[0], use_cache=False).loss

    @torch.autocast("cpu", torch.bfloat16)
    def losses(self, model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        logits, wanted = model(input_ids=batch[0], use_cache=False).logits[:, :-1].float(), batch[0][:, 1:]
        each = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        return each.double().mean(1), (logits.argmax(-1) == wanted).double().mean(1)


def missing(task: Task) -> str:
    """What of its data is not there; "" if all is."""
    model = {"classifier": ["all-minilm-l6-v2"], "language": ["smollm2-135m"]}.get(task.kind)
    lacking = [name for name in [*model, task.source] if not (DATA / name).exists()] if model else []
    return ", ".join(str(DATA / name) for name in lacking)


@lru_cache(maxsize=1)  # a process keeps that of its last run
def problem_of(task: Task) -> Problem:
    return {"teacher": Teacher, "classifier": Classified, "language": Written}[task.kind](task)
