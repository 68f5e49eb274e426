"""The parts of the text example: labelled text, an encoder with a linear head, and the three ways to train it."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Example = tuple[str, int]  # text, class


# ---- labelled text ---------------------------------------------------------------------------------------------------


def movie_snippets(path: Path) -> tuple[list[Example], list[str]]:
    """Snippets with a clear rating (|mean| >= 0.5) as (text, whether it is positive), and the class names."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the movie snippets, found no file; run make setup")
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        rating, text = line.split("\t", 1)
        if abs(float(rating)) >= 0.5:
            examples.append((text, int(float(rating) > 0)))
    return examples, ["negative", "positive"]


def read_labelled(path: Path) -> tuple[list[Example], list[str]]:
    """Reads a UTF-8 file of label and text, one example per line: tab-separated, or .csv with quotes. A first line
    "label", "text" is skipped. The classes are the sorted labels."""
    if not path.is_file():
        raise FileNotFoundError(f"text: expected a .tsv or .csv file of label and text, got {path}, which is no file")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                rows = list(csv.reader(file))
            else:
                rows = [line.rstrip("\r\n").split("\t") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path}: expected UTF-8, got {error.reason} at byte {error.start}") from None
    if rows and [cell.strip().lower() for cell in rows[0]] == ["label", "text"]:
        rows[0] = []
    labelled = []
    for number, row in enumerate(rows, 1):
        if not row or row == [""]:
            continue
        if len(row) != 2 or not row[0].strip() or not row[1].strip():
            raise ValueError(f"text: {path}, line {number}: expected a label and a text, got {len(row)} column(s): {row!r:.80}")
        labelled.append((row[0].strip(), row[1].strip()))
    names = sorted({label for label, _ in labelled})
    if len(names) < 2:
        raise ValueError(f"text: {path}: expected at least two different labels, got {names}")
    return [(text, names.index(label)) for label, text in labelled], names


def split(examples: list[Example], held_out: int) -> tuple[list[Example], list[Example]]:
    """(training, held out): the same split for every method and seed."""
    if not 1 <= held_out <= len(examples) // 2:
        raise ValueError(f"held-out: expected 1 to {len(examples) // 2} (half of the examples), got {held_out}")
    shuffled = examples.copy()
    random.Random(0).shuffle(shuffled)
    return shuffled[:-held_out], shuffled[-held_out:]


class Batches:
    """Endless training batches of token ids: shuffled, then sorted by length within a window, to reduce padding."""

    WINDOW = 20  # batches sorted together

    def __init__(self, ids: list[list[int]], labels: list[int], size: int, seed: int):
        self.ids, self.labels, self.size, self.random = ids, labels, size, random.Random(seed)
        self.order: list[int] = []
        self.queue: list[list[int]] = []

    def next(self) -> tuple[list[list[int]], Tensor]:
        window = self.size * self.WINDOW
        if not self.queue:
            while len(self.order) < window:
                epoch = list(range(len(self.ids)))
                self.random.shuffle(epoch)
                self.order += epoch
            chunk, self.order = sorted(self.order[:window], key=lambda i: len(self.ids[i])), self.order[window:]
            self.queue = [chunk[i : i + self.size] for i in range(0, window, self.size)]
            self.random.shuffle(self.queue)
        batch = self.queue.pop()
        return [self.ids[i] for i in batch], torch.tensor([self.labels[i] for i in batch])


# ---- the model -------------------------------------------------------------------------------------------------------


def padded(ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(tokens [batch, longest] with zeros as padding, and a mask that is 0 for padding)."""
    lengths = torch.tensor([len(row) for row in ids])
    tokens = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, target in zip(ids, tokens):
        target[: len(row)] = torch.tensor(row)
    return tokens, (torch.arange(tokens.shape[1]) < lengths[:, None]).long()


class TextClassifier(nn.Module):
    """A pretrained encoder and a linear head on the mean of its last hidden states over the tokens."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: list[list[int]] | Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [batch, classes] of a batch of token id lists, or of the result of `padded`."""
        tokens, mask = padded(ids) if mask is None else (ids, mask)
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        mask = mask[..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def load_encoder(folder: Path) -> tuple[nn.Module, Callable[[list[str]], list[list[int]]]]:
    """(encoder in eval mode, text -> token ids) of a Hugging Face model folder; nothing is downloaded."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"model: expected a Hugging Face model folder, got {folder}, without config.json; run make setup"
        )
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def tokenize(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=128, padding=False)["input_ids"]

    return encoder, tokenize


def build(encoder: nn.Module, classes: int, seed: int) -> TextClassifier:
    torch.manual_seed(seed)
    return TextClassifier(encoder, classes)


# ---- the methods -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How one method is trained. lr: of the adapter. head_lr: of the new head."""

    name: str
    lr: float
    scaling: float
    head_lr: float = 1e-2
    warmup: float = 0.06


RECIPES = {
    "head": Recipe("head only", lr=0.0, scaling=0.0),
    "lotr": Recipe("LoTR", lr=5e-3, scaling=4.0),
    "lora": Recipe("LoRA PEFT", lr=3e-3, scaling=2.0),
}


def adapt(model: TextClassifier, method: str, rank: int, targets: list[str], scaling: float) -> nn.Module:
    """Freezes the encoder and adds the method's adapter. Returns the module from which the adapter is saved."""
    if method == "head":
        model.encoder.requires_grad_(False)
        return model
    if method == "lotr":
        from lotr_ext import LoTRConfig, apply_lotr

        config = LoTRConfig(rank=rank, scaling=scaling, target_modules=targets, modules_to_save=["head"])
        return apply_lotr(model, config)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=targets, modules_to_save=["head"])
    return get_peft_model(model, config)


def save(model: nn.Module, method: str, folder: Path) -> int:
    """Writes the trained tensors to folder. Returns the number of bytes, without PEFT's model card."""
    folder.mkdir(parents=True, exist_ok=True)
    if method == "head":
        from safetensors.torch import save_file

        save_file({name: t.detach() for name, t in model.head.state_dict().items()}, folder / "head.safetensors")
    elif method == "lotr":
        from lotr_ext import save_adapter

        save_adapter(model, folder)
    else:
        model.save_pretrained(str(folder))
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.name != "README.md")


def optimizer_for(model: nn.Module, recipe: Recipe, steps: int) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """AdamW over the trained parameters, and a step function for linear warm-up and decay."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if "head." in name]
    adapter = [p for name, p in trained.items() if "head." not in name]
    groups = [{"params": head, "lr": recipe.head_lr}, {"params": adapter, "lr": recipe.lr}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
    return optimizer, linear_decay(optimizer, steps, max(1, round(recipe.warmup * steps)))


def train_step(model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer, schedule: Callable[[], None]) -> Tensor:
    """Trains one step on the next batch. Returns its loss."""
    ids, target = batches.next()
    loss = nn.functional.cross_entropy(model(ids), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule()
    return loss


def linear_decay(optimizer: torch.optim.Optimizer, steps: int, warm: int) -> Callable[[], None]:
    """A function to call after each step: rates rise over the first `warm` steps and then fall to zero at the last."""
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    return schedule.step


def start_from_gradient(model: nn.Module, batches: Batches, head_lr: float, steps: int, looked_at: int = 8) -> int:
    """Sets LoTR's A and B from the gradients of a few batches, after `steps` steps that train only the new head, through
    which the gradients pass. Returns steps."""
    from lotr_ext import init_from_gradient

    def loss(model: nn.Module, batch: tuple[list[list[int]], Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    optimizer = torch.optim.AdamW(model.head.parameters(), lr=head_lr, weight_decay=0.0)
    for _ in range(steps):
        loss(model, batches.next()).backward()
        optimizer.step()
        model.zero_grad()
    init_from_gradient(model, [batches.next() for _ in range(looked_at)], loss, progress=False)
    return steps


@torch.no_grad()
def predict(
    model: nn.Module, ids: list[list[int]], batch: int = 100, done: Callable[[int], object] = lambda examples: None
) -> Tensor:
    """Logits [examples, classes], computed in batches of similar length, in the order of ids. done is called with the
    number of finished examples after each batch."""
    training = model.training
    model.eval()
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = []
    for k in range(0, len(order), batch):
        parts.append(model([ids[i] for i in order[k : k + batch]]))
        done(min(k + batch, len(order)))
    model.train(training)
    logits = torch.cat(parts)
    out = torch.empty_like(logits)
    out[order] = logits
    return out


def peak_memory() -> int:
    """Peak resident bytes of this process so far (on Linux per address space, elsewhere since the process began)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
