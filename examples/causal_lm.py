"""Fine-tune a small language model on a plain text with LoTR, and print what it writes before and after.

    python examples/causal_data.py                              downloads SmolLM2-135M and the King James Bible, once
    python examples/causal_lm.py                                40 steps, a few minutes on two cores
    python examples/causal_lm.py --text mine.txt --prompt "Dear" --rank 8 --steps 100
    python examples/causal_lm.py --model folder --targets q_proj,k_proj,v_proj,o_proj

A twentieth of the text is held out, and its loss is measured before and after training. The adapter is saved in
demo_results/causal-lm, loaded into a fresh model and merged there; the loss must be the same. No network is used.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from causal_data import MODEL, TEXT
from finetune_text import INITS, Bar, check_folder, check_seed, end, machine

if TYPE_CHECKING:
    from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
LOOKED_AT = 4  # batches of a start from the gradient


@dataclass(frozen=True)
class Text:
    """Token ids in rows of one length."""

    train: Tensor
    held_out: Tensor


def read_text(path: Path) -> str:
    """The UTF-8 text in path."""
    if not path.is_file():
        raise FileNotFoundError(f"text: expected a text file, got {path}, which is none; run python examples/causal_data.py")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path}: expected UTF-8, got {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"text: {path}: expected text, got an empty file")
    return text


def split(ids: list[int], length: int, batch: int) -> Text:
    """Rows of `length` tokens; every twentieth row is held out, 16 rows at most."""
    import torch

    rows = len(ids) // length
    if rows < 2 * batch:
        raise ValueError(f"text: expected at least {2 * batch * length} tokens (two batches), got {len(ids)}")
    table = torch.tensor(ids[: rows * length]).view(rows, length)
    every = torch.arange(rows) % 20 == 10 % rows
    return Text(table[~every], table[every][:16])


def load(folder: Path, dtype: str):
    """(model in eval mode, tokenizer) of a Hugging Face folder; nothing is downloaded."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"model: expected a Hugging Face model folder, got {folder}, without config.json; "
            "run python examples/causal_data.py"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=getattr(torch, dtype))
    return model.eval(), tokenizer


def next_token_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross entropy of each row's tokens after its first."""
    return model(input_ids=rows, labels=rows, use_cache=False).loss


def held_out_loss(model: nn.Module, rows: Tensor, batch: int) -> float:
    """Mean over all held-out tokens."""
    import torch

    with torch.no_grad():
        parts = [(next_token_loss(model, part).item(), len(part)) for part in rows.split(batch)]
    return sum(value * count for value, count in parts) / len(rows)


def write(model: nn.Module, tokenizer, prompt: str, tokens: int) -> str:
    """The greedy continuation, in which no sequence of three tokens is repeated."""
    import torch

    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not encoded["input_ids"].numel():
        raise ValueError("prompt: expected at least one token, got none")
    options = {"do_sample": False, "no_repeat_ngram_size": 3, "pad_token_id": tokenizer.eos_token_id}
    with torch.no_grad():
        ids = model.generate(**encoded, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def train(model: nn.Module, rows: Tensor, options: argparse.Namespace, parameters: Sequence[nn.Parameter]) -> list[float]:
    """Trains with AdamW, linear warm-up and decay. Returns the loss of each step."""
    import torch

    from text_model import linear_decay

    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    schedule = linear_decay(optimizer, options.steps, max(1, options.steps // 10))
    losses: list[float] = []
    model.train()
    with Bar("LoTR", options.steps, not options.quiet) as bar:
        for _ in range(options.steps):
            loss = next_token_loss(model, rows[torch.randint(len(rows), (options.batch,), generator=generator)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(f"loss is {losses[-1]} at step {len(losses)}; lower --lr or --scaling")
            bar.step(losses)
    model.eval()
    return losses


# ---- command line ----------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL), help="a Hugging Face causal language model's folder (SmolLM2-135M)")
    parser.add_argument("--text", default=str(TEXT), help="a UTF-8 text file (the King James Bible)")
    parser.add_argument(
        "--prompt", default="My computer would not start this morning, so I", help="the text that the model continues"
    )
    parser.add_argument("--new-tokens", type=int, default=40, help="number of tokens that it writes (40)")
    parser.add_argument("--rank", type=int, default=16, help="rank (16)")
    parser.add_argument("--targets", default="q_proj,v_proj", help="names of the adapted layers (q_proj,v_proj)")
    parser.add_argument("--steps", type=int, default=40, help="training steps (40)")
    parser.add_argument("--batch", type=int, default=4, help="rows per step (4)")
    parser.add_argument("--length", type=int, default=64, help="tokens per row (64)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (1e-2)")
    parser.add_argument("--scaling", type=float, default=4.0, help="scaling of the adapter (4)")
    parser.add_argument("--init", default="orthonormal", choices=INITS, help="how A and B start (orthonormal)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the frozen model (float32)")
    parser.add_argument("--seed", type=int, default=0, help="seed (0)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all)")
    parser.add_argument("--out", default=str(ROOT / "demo_results" / "causal-lm"), help="folder for the adapter")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(argv)
    for name in ("new_tokens", "rank", "steps", "batch", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if options.length < 2:
        raise ValueError(f"length: expected at least 2 tokens, got {options.length}")
    for name in ("lr", "scaling"):
        if not 0 < getattr(options, name) < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {getattr(options, name)}")
    check_seed(options.seed)
    check_folder(options.out)
    options.targets = [t for t in options.targets.split(",") if t]
    if not options.targets:
        raise ValueError("targets: expected names of layers, got none")
    if not options.prompt.strip():
        raise ValueError("prompt: expected some text, got none")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = read_text(Path(options.text))
    import torch

    from lotr_ext import (
        LoTRConfig,
        apply_lotr,
        init_from_gradient,
        load_adapter,
        lotr_parameters,
        merge,
        save_adapter,
        trainable_summary,
    )

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model, tokenizer = load(Path(options.model), options.dtype)
    needed = 2 * options.length * max(160, options.batch * options.steps)  # tokenise no more than is used
    text = split(tokenizer(words[: 8 * needed], verbose=False)["input_ids"], options.length, options.batch)
    print(f"{text.train.numel():,} tokens to train on, {text.held_out.numel():,} held out; {machine(options.threads)}")
    config = LoTRConfig(rank=options.rank, scaling=options.scaling, target_modules=options.targets)
    apply_lotr(model, config)
    print(trainable_summary(model))
    if options.init == "gradient":
        init_from_gradient(model, text.train[: LOOKED_AT * options.batch].split(options.batch), next_token_loss)

    before = held_out_loss(model, text.held_out, options.batch)
    print(
        f"\nbefore, held-out loss {before:.3f}:\n  {write(model, tokenizer, options.prompt, options.new_tokens)!r}\n",
        flush=True,
    )
    start = time.perf_counter()
    train(model, text.train, options, lotr_parameters(model))
    seconds = time.perf_counter() - start
    after = held_out_loss(model, text.held_out, options.batch)
    written = write(model, tokenizer, options.prompt, options.new_tokens)
    print(f"\nafter {options.steps} steps in {seconds:.0f} s, held-out loss {after:.3f}:\n  {written!r}\n")

    out = Path(options.out)
    save_adapter(model, out)
    size = sum(f.stat().st_size for f in out.glob("lotr_adapter.*"))
    fresh, _ = load(Path(options.model), options.dtype)
    load_adapter(fresh, out)
    merged = held_out_loss(merge(fresh), text.held_out, options.batch)
    if abs(merged - after) > 0.02 * after:
        raise RuntimeError(f"merged adapter: expected the held-out loss {after}, got {merged}")
    print(f"adapter of {size / 1024:,.0f} KiB in {out}; loaded into a fresh model and merged: held-out loss {merged:.3f}")
    return 0


if __name__ == "__main__":
    end(main, "causal_lm")
