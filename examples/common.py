"""What the examples share: options, rated texts, a text classifier, a training loop, a picture."""

import argparse
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import DATA, MINILM

RESULTS = Path(__file__).resolve().parent.parent / "demo_results"

TokenRows = list[list[int]]  # the token ids of each text


class Batch(NamedTuple):
    """Texts and their classes."""

    ids: TokenRows
    labels: Tensor  # [texts]


class Example(NamedTuple):
    """A text with its class: 1 for a positive rating."""

    text: str
    label: int


def progress_bar(name: str, steps: int) -> tqdm:
    """Returns range(steps) with a progress bar. Without a terminal, prints every ten seconds."""
    return tqdm(range(steps), desc=name, mininterval=0.1 if sys.stderr.isatty() else 10)


def parse_options(doc: str, argv: list[str] | None, **defaults: object) -> argparse.Namespace:
    """Parses the options of a program, and prepares the process: threads, no network, RESULTS.

    Args:
        doc: The docstring of the program. Its first line describes it.
        argv: The command line. None stands for sys.argv.
        defaults: A default per option, which also gives its type. A list makes an option with
            several words, False a flag.
    """
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default in {**defaults, "threads": os.cpu_count()}.items():
        if default is False:
            kind = {"action": "store_true"}
        elif isinstance(default, list):
            kind = {"nargs": "+"}
        else:
            kind = {"type": type(default)}
        # Without a help text, ArgumentDefaultsHelpFormatter would not print the default.
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=" ", **kind)
    options = parser.parse_args(argv)
    print(f"{parser.prog}: loading packages and data", flush=True)  # seconds without other output
    torch.set_num_threads(options.threads)
    # Models are in data/. This has no effect after an import of transformers, as in causal_lm.py.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    RESULTS.mkdir(exist_ok=True)
    return options


def require_download(path: Path, names: str) -> Path:
    """Returns a path in data/.

    Raises:
        FileNotFoundError: If it was not downloaded.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: expected a model or a text, got none. Run: python examples/data.py {names}"
        )
    return path


def rated_texts(file: str, held_out: int) -> tuple[list[Example], list[Example]]:
    """Reads the texts of data/`file` with a clear rating.

    Returns:
        The training examples, and `held_out` others, both in random order.

    Raises:
        FileNotFoundError: If the file was not downloaded.
    """
    path = require_download(DATA / file, "minilm snippets")
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        rating, text = line.split("\t", 1)
        if abs(float(rating)) >= 0.5:
            examples.append(Example(text, int(float(rating) > 0)))
    random.Random(0).shuffle(examples)
    return examples[:-held_out], examples[-held_out:]


class TextClassifier(nn.Module):
    """A pretrained encoder, and a linear head on the mean of its last hidden states.

    Args:
        encoder: A transformers encoder.
        classes: The number of classes.
    """

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: TokenRows) -> Tensor:
        """Returns logits [texts, classes]."""
        rows = [torch.tensor(row) for row in ids]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in ids])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).float()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(mean)


def minilm_classifier(
    classes: int = 2, seed: int = 0
) -> tuple[TextClassifier, Callable[[list[str]], TokenRows]]:
    """Returns MiniLM with a new head, and a function from texts to token ids.

    Raises:
        FileNotFoundError: If the model was not downloaded.
    """
    folder = require_download(MINILM, "minilm snippets")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(seed)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True)

    def tokenize(texts: list[str]) -> TokenRows:
        return tokenizer(texts, truncation=True, max_length=128)["input_ids"]

    return TextClassifier(encoder, classes).eval(), tokenize


def tokenized(examples: list[Example], tokenize: Callable[[list[str]], TokenRows]) -> Batch:
    """Returns all examples as one batch."""
    ids = tokenize([example.text for example in examples])
    return Batch(ids, torch.tensor([example.label for example in examples]))


def batches(data: Batch, size: int, seed: int = 0) -> Iterator[Batch]:
    """Yields shuffled batches without end.

    Texts are sorted by length within windows of twenty batches, which reduces padding.
    """
    order: list[int] = []
    generator = random.Random(seed)
    while True:
        while len(order) < 20 * size:
            order += generator.sample(range(len(data.ids)), len(data.ids))
        window = sorted(order[: 20 * size], key=lambda i: len(data.ids[i]))
        order = order[20 * size :]
        for start in generator.sample(range(0, len(window), size), 20):
            rows = window[start : start + size]
            yield Batch([data.ids[i] for i in rows], data.labels[rows])


@torch.no_grad()
def predict(forward: Callable[[TokenRows], Tensor], ids: TokenRows, size: int = 100) -> Tensor:
    """Returns forward(ids) [texts, classes], computed in batches of similar length."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    logits = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        logits.append(forward([ids[i] for i in rows]))
    # Row j belongs to text order[j]. argsort inverts this permutation.
    return torch.cat(logits)[torch.tensor(order).argsort()]


def accuracy(forward: Callable[[TokenRows], Tensor], data: Batch) -> float:
    """Returns the share of right answers, from 0 to 1."""
    return (predict(forward, data.ids).argmax(1) == data.labels).double().mean().item()


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the mean cross entropy of a batch."""
    return nn.functional.cross_entropy(model(batch.ids), batch.labels)


def train(
    name: str, steps: int, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]
) -> list[float]:
    """Trains with linear decay of the learning rate and gradients clipped at norm 1.

    Args:
        name: Shown in the progress bar.
        steps: The number of optimizer steps.
        optimizer: Has the trained parameters.
        loss_of: Computes the loss of the next batch.

    Returns:
        The loss of each step.
    """
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses: list[float] = []
    progress = progress_bar(name, steps)
    for _ in progress:
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix_str(f"loss {statistics.fmean(losses[-20:]):.3f}")
    return losses


def running_mean(values: list[float], count: int) -> list[float]:
    """Returns the mean of the last `count` values at each position."""
    return [statistics.fmean(values[max(0, i + 1 - count) : i + 1]) for i in range(len(values))]


def draw(path: Path, lines: dict[str, dict[int, float]], **settings: object) -> None:
    """Draws named lines, each a map from x to y. `settings` go to matplotlib's Axes.set."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, values in lines.items():
        axes.plot(list(values), list(values.values()), label=name)
    axes.set(**settings)
    axes.legend()
    figure.savefig(path, dpi=120)
