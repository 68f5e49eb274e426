"""What the examples share: a progress bar, texts as batches of token ids, and a text classifier."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import DATA, MINILM

RESULTS = Path(__file__).resolve().parent.parent / "demo_results"
Batch = tuple[list[list[int]], Tensor]  # each text's token ids, its class


def bar(name: str, steps: int) -> tqdm:
    """range(steps) with a progress bar; without a terminal, a line every ten seconds."""
    return tqdm(range(steps), desc=name, mininterval=0.1 if sys.stderr.isatty() else 10)


def arguments(doc: str, words: list[str] | None, **defaults) -> argparse.Namespace:
    """The options of a program, by their defaults: numbers (of which whole ones are at least 1), paths, lists and flags."""

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
        return value

    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default in {**defaults, "threads": os.cpu_count()}.items():
        kind = {"type": positive if isinstance(default, int) else type(default)}
        kind |= {"type": str, "nargs": "+"} if isinstance(default, list) else {}
        kind = {"action": "store_true"} if default is False else kind
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=" ", **kind)
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    RESULTS.mkdir(exist_ok=True)
    return options


def rated_texts(file: str, held_out: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(training, held out): the texts of data/`file` with a clear rating, as (text, whether it is positive)."""
    path = DATA / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a file, got none. Run: python examples/data.py minilm snippets"
        )
    rows = (line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines())
    examples = [
        (text, int(float(rating) > 0)) for rating, text in rows if abs(float(rating)) >= 0.5
    ]
    random.Random(0).shuffle(examples)
    return examples[:-held_out], examples[-held_out:]


class TextClassifier(nn.Module):
    """A pretrained encoder and a linear head on the mean of its last hidden states. Returns logits [texts, classes]."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: list[list[int]]) -> Tensor:
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        mask = (
            torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
        ).float()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def minilm_classifier(
    classes: int = 2, seed: int = 0
) -> tuple[TextClassifier, Callable[[list[str]], list[list[int]]]]:
    """(MiniLM with a new head, text -> token ids)"""
    if not MINILM.is_dir():
        raise FileNotFoundError(
            f"{MINILM}: expected a model's folder, got none. Run: python examples/data.py minilm snippets"
        )
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MINILM, local_files_only=True)
    torch.manual_seed(seed)
    model = TextClassifier(AutoModel.from_pretrained(MINILM, local_files_only=True), classes).eval()
    return model, lambda texts: tokenizer(texts, truncation=True, max_length=128)["input_ids"]


def batches(ids: list[list[int]], labels: list[int], size: int, seed: int = 0) -> Iterator[Batch]:
    """Endless shuffled batches; twenty of them at a time are sorted by length, to reduce padding."""
    order: list[int] = []
    draw = random.Random(seed)
    while True:
        while len(order) < 20 * size:
            order += draw.sample(range(len(ids)), len(ids))
        window, order = sorted(order[: 20 * size], key=lambda i: len(ids[i])), order[20 * size :]
        parts = [window[k : k + size] for k in range(0, len(window), size)]
        for part in draw.sample(parts, len(parts)):
            yield [ids[i] for i in part], torch.tensor([labels[i] for i in part])


@torch.no_grad()
def predict(
    forward: Callable[[list[list[int]]], Tensor], ids: list[list[int]], size: int = 100
) -> Tensor:
    """forward(ids), [texts, classes], in batches of similar length, in the order of ids."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    logits = torch.cat(
        [forward([ids[i] for i in order[k : k + size]]) for k in range(0, len(order), size)]
    )
    return logits[torch.tensor(order).argsort()]


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(
    name: str, steps: int, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]
) -> list[float]:
    """Trains with linear decay of the rate and gradients clipped at norm 1. Returns the loss of each step."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses: list[float] = []
    for _ in (progress := bar(name, steps)):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix_str(f"loss {sum(losses[-20:]) / len(losses[-20:]):.3f}")
    return losses
