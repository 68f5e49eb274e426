"""Fine-tune a small language model on a plain text, and print what it writes before and after.

    python examples/data.py smollm2 kjv        once: SmolLM2-135M and the King James Bible
    python examples/causal_lm.py               40 steps, a few minutes on two cores
    python examples/causal_lm.py --text mine.txt --prompt "Dear" --steps 100

A twentieth of the text is held out, and its loss is measured before and after. The adapter is saved
in demo_results/causal-lm and merged into a fresh model, which must have the same loss.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import RESULTS, parse_options, require_download, train
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
    """Loads a model in float32, and its tokenizer.

    Raises:
        FileNotFoundError: If the folder has no model.
    """
    require_download(folder / "config.json", "smollm2 kjv")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), tokenizer


def rows_of(path: Path, tokenizer, length: int, limit: int) -> tuple[Tensor, Tensor]:
    """Cuts a text into rows of `length` tokens, at most `limit` of them.

    Returns:
        The training rows and the held-out rows, which are every twentieth row.
    """
    characters = 8 * length * limit  # a token has fewer than 8 characters on average
    text = path.read_text(encoding="utf-8")[:characters]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)[:limit]
    is_held_out = torch.arange(len(rows)) % 20 == 10
    return rows[~is_held_out], rows[is_held_out]


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Returns the mean loss of the next token."""
    return model(input_ids=rows, labels=rows, use_cache=False).loss


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    """Returns the loss of all rows, computed eight at a time."""
    total = sum(loss_of(model, part).item() * len(part) for part in rows.split(8))
    return total / len(rows)


@torch.no_grad()
def continue_prompt(model: nn.Module, tokenizer, prompt: str, tokens: int) -> str:
    """Returns a prompt and its greedy continuation, in which no three tokens in a row recur."""
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(
        **encoded,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        no_repeat_ngram_size=3,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(
        __doc__,
        argv,
        model=SMOLLM2,
        text=KJV,
        out=RESULTS / "causal-lm",
        targets=["q_proj", "v_proj"],
        prompt="My computer would not start this morning, so I",
        rank=16,
        lr=5e-3,
        steps=40,
        batch=4,
        length=64,
        new_tokens=40,
    )
    torch.manual_seed(0)
    model, tokenizer = language_model(options.model)
    limit = max(160, options.batch * options.steps)  # 160 rows: 8 are held out
    rows, held_out = rows_of(options.text, tokenizer, options.length, limit)
    apply_lotr(model, LoTRConfig(rank=options.rank, target_modules=options.targets))
    print(trainable_summary(model))
    loss_before = held_out_loss(model, held_out)
    text_before = continue_prompt(model, tokenizer, options.prompt, options.new_tokens)
    print(f"\nheld-out loss {loss_before:.3f} before: {text_before!r}\n", flush=True)

    def next_loss() -> Tensor:
        picked = torch.randint(len(rows), (options.batch,))
        return loss_of(model, rows[picked])

    optimizer = torch.optim.AdamW(lotr_parameters(model), lr=options.lr, weight_decay=0.0)
    train("LoTR", options.steps, optimizer, next_loss)
    loss_after = held_out_loss(model, held_out)
    text_after = continue_prompt(model, tokenizer, options.prompt, options.new_tokens)
    print(f"\nheld-out loss {loss_after:.3f} after {options.steps} steps: {text_after!r}\n")

    save_adapter(model, options.out)
    fresh, _ = language_model(options.model)
    loss_merged = held_out_loss(merge(load_adapter(fresh, options.out)), held_out)
    assert abs(loss_merged - loss_after) < 1e-3 * loss_after  # merging rounds the weights
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(
        f"adapter of {size / 1024:,.0f} KiB in {options.out}; "
        f"in a fresh model, merged: held-out loss {loss_merged:.3f}"
    )


if __name__ == "__main__":
    main()
