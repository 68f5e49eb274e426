"""What is trained and measured: a synthetic teacher, an encoder on labelled texts, a language model on a text.

A problem makes fresh models, endless training batches, the loss of a batch, and the loss of every validation and held-out item.
"""

from __future__ import annotations

import copy
import importlib
import math
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..measure.store import ROOT

DATA = ROOT / "data"
ENCODER, LANGUAGE_MODEL = DATA / "all-minilm-l6-v2", DATA / "smollm2-135m"
PARTS = ("validation", "held_out")


def example(name: str) -> ModuleType:
    """A module of examples/, where modules import each other by their bare names."""
    if (folder := str(ROOT / "examples")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


class Setting(NamedTuple):
    """Of a task's runs, equal for all of them. A result file holds runs of one setting."""

    steps: int
    batch: int
    validation: int  # items that choose learning rates
    held_out: int  # items that are reported


class Batches(Protocol):
    def next(self) -> Any: ...


class Problem(Protocol):
    """head: whether a model has a new head, which every method trains and whose numbers are not counted."""

    head: bool

    def model(self, seed: int) -> nn.Module: ...

    def batches(self, seed: int, size: int) -> Batches: ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

    def measure(self, model: nn.Module, part: str) -> tuple[Tensor, float | None]:
        """The loss of each item, [items] float64, and the accuracy where there is one."""
        ...


class Rows:
    """Endless batches of random rows of a few tensors, a new order each epoch."""

    def __init__(self, tensors: tuple[Tensor, ...], size: int, seed: int):
        self.tensors, self.size, self.random = tensors, size, random.Random(seed)
        self.order: list[int] = []

    def next(self) -> tuple[Tensor, ...]:
        while len(self.order) < self.size:
            epoch = list(range(len(self.tensors[0])))
            self.random.shuffle(epoch)
            self.order += epoch
        rows, self.order = self.order[: self.size], self.order[self.size :]
        return tuple(t[rows] for t in self.tensors)


# ---- a teacher whose change of the weights is known ------------------------------------------------------------------

WIDTH, BLOCKS, CHANGE_RANK = 32, 6, 4  # of the net, and the rank of the change of each weight
CHANGE, NOISE, TRAINING = 0.5, 0.2, 2048  # |change| / |weight|; deviation of the noise beside that of the change; rows


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(h)))


class Net(nn.Module):
    """A residual net without a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _low_rank(n: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal columns [n, CHANGE_RANK] and [k, CHANGE_RANK]."""
    sides = (torch.randn(d, CHANGE_RANK, generator=generator) for d in (n, k))
    left, right = (torch.linalg.qr(side).Q for side in sides)
    return left, right


@torch.no_grad()
def changed(net: Net, shared: float, generator: torch.Generator) -> Net:
    """The net with every weight changed by a matrix of low rank. A part `shared` of the change's squared norm lies in column
    and row spaces that all layers of one shape have in common, the rest in spaces of the layer's own."""
    teacher = copy.deepcopy(net)
    for kind in ("up", "down"):
        layers = [getattr(block, kind) for block in teacher.blocks]
        n, k = layers[0].weight.shape
        common = _low_rank(n, k, generator)
        for layer in layers:
            change = torch.zeros(n, k)
            for (left, right), part in ((common, shared), (_low_rank(n, k, generator), 1 - shared)):
                one = left @ torch.randn(CHANGE_RANK, CHANGE_RANK, generator=generator) @ right.T
                change += math.sqrt(part) * one / one.norm()
            layer.weight += CHANGE * layer.weight.norm() * change / change.norm()
    return teacher


class Teacher:
    """The net is to learn what its changed copy computes, from noisy outputs. The loss is the squared error over that of the
    unchanged net, in expectation."""

    head = False

    def __init__(self, shared: float, setting: Setting):
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = Net()
        teacher = changed(self.net, shared, generator)
        counts = (TRAINING, setting.validation, setting.held_out)
        with torch.no_grad():
            inputs = [torch.randn(count, WIDTH, generator=generator) for count in counts]
            outputs = [teacher(x) for x in inputs]
            differences = outputs[0] - self.net(inputs[0])
            noise = NOISE * differences.std()
            self.unit = differences.square().mean().item()
        noisy = [y + noise * torch.randn(y.shape, generator=generator) for y in outputs]
        self.parts = dict(zip(("training", *PARTS), zip(inputs, noisy)))

    def model(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.net)

    def batches(self, seed: int, size: int) -> Rows:
        return Rows(self.parts["training"], size, seed)

    def _errors(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean(1) / self.unit

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._errors(model, batch).mean()

    @torch.no_grad()
    def measure(self, model: nn.Module, part: str) -> tuple[Tensor, None]:
        return self._errors(model, self.parts[part]).double(), None


# ---- labelled texts --------------------------------------------------------------------------------------------------


class Classified:
    """A sentence encoder with a new linear head, on texts that are rated above or below 0. Cross-entropy in nats a text."""

    head = True

    def __init__(self, corpus: Path, setting: Setting, encoder: Path = ENCODER):
        tm = self.text_model = example("text_model")
        self.encoder, tokenize = tm.load_encoder(encoder)
        examples, _ = tm.movie_snippets(corpus)
        rest, held_out = tm.split(examples, setting.held_out)
        training, validation = tm.split(rest, setting.validation)
        self.parts = {
            part: (tokenize([text for text, _ in texts]), [c for _, c in texts])
            for part, texts in zip(("training", *PARTS), (training, validation, held_out))
        }

    def model(self, seed: int) -> nn.Module:
        return self.text_model.build(copy.deepcopy(self.encoder), 2, seed)

    def batches(self, seed: int, size: int) -> Batches:
        return self.text_model.Batches(*self.parts["training"], size, seed)

    def loss(self, model: nn.Module, batch: tuple[list[list[int]], Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def measure(self, model: nn.Module, part: str) -> tuple[Tensor, float]:
        ids, classes = self.parts[part][0], torch.tensor(self.parts[part][1])
        logits = self.text_model.predict(model, ids)
        losses = nn.functional.cross_entropy(logits.double(), classes, reduction="none")
        return losses, (logits.argmax(1) == classes).double().mean().item()


# ---- a text ----------------------------------------------------------------------------------------------------------

LENGTH = 64  # tokens a row


def _each_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """The cross-entropy of each token, [rows, tokens]. Flat, for over a middle dimension torch takes several times as long."""
    flat = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return flat.view(wanted.shape)


class Written:
    """A language model on rows of a text. Cross-entropy in nats a token, of each row's tokens after its first. It computes in
    bfloat16: the frozen weights are bfloat16, and under autocast so are the products of the trained ones, which are float32."""

    head = False

    def __init__(self, text: Path, setting: Setting, folder: Path = LANGUAGE_MODEL):
        causal_lm = example("causal_lm")

        words = causal_lm.read_text(text)
        self.base, tokenizer = causal_lm.load(folder, "bfloat16")
        self.base.set_attn_implementation("eager")  # on rows this short torch's fused attention takes longer in backward
        held, training = setting.validation + setting.held_out, setting.steps * setting.batch
        few = 16 * LENGTH * (held + training)  # characters: a short run reads the beginning alone
        ids = tokenizer(words[:few] if training < 100 else words, verbose=False)["input_ids"]
        rows = len(ids) // LENGTH
        if rows < 2 * held:
            raise ValueError(f"text: expected at least {2 * held * LENGTH:,} tokens in {text}, got {len(ids):,}")
        table = torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)
        apart = torch.arange(held) * (rows // held)  # evenly over the text
        mask = torch.zeros(rows, dtype=torch.bool).index_fill_(0, apart, True)
        order = torch.randperm(held, generator=torch.Generator().manual_seed(0))
        away = table[mask][order]
        self.parts = {
            "training": table[~mask],
            "validation": away[: setting.validation],
            "held_out": away[setting.validation :],
        }

    def model(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.base)

    def batches(self, seed: int, size: int) -> Rows:
        return Rows((self.parts["training"],), size, seed)

    @torch.autocast("cpu", torch.bfloat16)
    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        (ids,) = batch
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    @torch.no_grad()
    @torch.autocast("cpu", torch.bfloat16)
    def measure(self, model: nn.Module, part: str) -> tuple[Tensor, float]:
        losses, right = [], []
        for ids in self.parts[part].split(8):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            wanted = ids[:, 1:]
            losses.append(_each_loss(logits, wanted).double().mean(1))
            right.append((logits.argmax(-1) == wanted).double().mean(1))
        return torch.cat(losses), torch.cat(right).mean().item()
