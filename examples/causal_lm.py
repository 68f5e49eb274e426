"""Fine-tune a small language model on a plain text, and print what it writes before and after.

    python examples/data.py smollm2 kjv               SmolLM2-135M and the King James Bible, once
    python examples/causal_lm.py                      40 steps, a few minutes on two cores
    python examples/causal_lm.py --text mine.txt --prompt "Dear" --steps 100

The loss of a held-out twentieth of the text is measured before and after. The adapter is saved in demo_results/causal-lm and
merged into a fresh model: the loss must be the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import RESULTS, arguments, train
from data import KJV, SMOLLM2
from lotr_ext import (
    LoTRConfig,
    apply_lotr,
    load_adapter,
    lotr_parameters,
    merge,
    save_adapter,
    trainable_summary,
)


def language_model(folder: Path) -> tuple[nn.Module, AutoTokenizer]:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"model: expected a model's folder, got {folder}. Run: python examples/data.py smollm2 kjv"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    ).eval(), tokenizer


def rows_of(path: Path, tokenizer, length: int, most: int) -> tuple[Tensor, Tensor]:
    """(training, held out): rows of `length` tokens of the text, at most `most`; every twentieth row is held out."""
    text = path.read_text(encoding="utf-8")[
        : 8 * length * most
    ]  # a token has fewer than 8 characters on average
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)[:most]
    held_out = torch.arange(len(rows)) % 20 == 10
    return rows[~held_out], rows[held_out]


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return model(input_ids=rows, labels=rows, use_cache=False).loss


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    return sum(loss_of(model, part).item() * len(part) for part in rows.split(8)) / len(rows)


@torch.no_grad()
def write(model: nn.Module, tokenizer, prompt: str, tokens: int) -> str:
    """The greedy continuation, in which no three tokens are repeated."""
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    options = {
        "do_sample": False,
        "no_repeat_ngram_size": 3,
        "pad_token_id": tokenizer.eos_token_id,
    }
    ids = model.generate(**encoded, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def main(words: list[str] | None = None) -> None:
    lists = {
        "targets": ["q_proj", "v_proj"],
        "prompt": "My computer would not start this morning, so I",
    }
    numbers = {"rank": 16, "lr": 5e-3, "steps": 40, "batch": 4, "length": 64, "new_tokens": 40}
    options = arguments(
        __doc__, words, model=SMOLLM2, text=KJV, out=RESULTS / "causal-lm", **lists, **numbers
    )
    torch.manual_seed(0)
    model, tokenizer = language_model(options.model)
    rows, held_out = rows_of(
        options.text, tokenizer, options.length, max(160, options.batch * options.steps)
    )
    apply_lotr(model, LoTRConfig(rank=options.rank, target_modules=options.targets))
    print(trainable_summary(model))
    before, text = (
        held_out_loss(model, held_out),
        write(model, tokenizer, options.prompt, options.new_tokens),
    )
    print(f"\nheld-out loss {before:.3f} before: {text!r}\n", flush=True)

    optimizer = torch.optim.AdamW(lotr_parameters(model), lr=options.lr, weight_decay=0.0)
    train(
        "LoTR",
        options.steps,
        optimizer,
        lambda: loss_of(model, rows[torch.randint(len(rows), (options.batch,))]),
    )
    after, text = (
        held_out_loss(model, held_out),
        write(model, tokenizer, options.prompt, options.new_tokens),
    )
    print(f"\nheld-out loss {after:.3f} after {options.steps} steps: {text!r}\n")

    save_adapter(model, options.out)
    fresh, _ = language_model(options.model)
    load_adapter(fresh, options.out)
    merged = held_out_loss(merge(fresh), held_out)
    if abs(merged - after) > 0.02 * after:
        raise RuntimeError(f"merge: expected the held-out loss {after}, got {merged}")
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(
        f"adapter of {size / 1024:,.0f} KiB in {options.out}; loaded into a fresh model and merged: held-out loss {merged:.3f}"
    )


if __name__ == "__main__":
    main()
