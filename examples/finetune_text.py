"""Fine-tune a pretrained text encoder with LoTR, with LoRA of the same rank, and with a new head alone, and compare them.

    python examples/finetune_text.py                  MiniLM on snippets of movie reviews, as `make demo` runs it
    python examples/finetune_text.py --seeds 3        three seeds a method

LoTR and LoRA train at the same learning rate. Results go to demo_results/: curves.png, table.json and the adapters.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn

from common import (
    RESULTS,
    TextClassifier,
    arguments,
    batches,
    minilm_classifier,
    predict,
    rated_texts,
    text_loss,
    train,
)
from lotr_ext import LoTRConfig, apply_lotr, load_adapter, merge, save_adapter

METHODS = {"head": "head only", "lotr": "LoTR", "lora": "LoRA (PEFT)"}


def adapt(model: TextClassifier, method: str, options: argparse.Namespace) -> nn.Module:
    """Freezes the encoder and adds the method's adapter; the head is trained in any case."""
    if method == "head":
        model.encoder.requires_grad_(False)
        return model
    targets = {"target_modules": options.targets, "modules_to_save": ["head"]}
    if method == "lotr":
        return apply_lotr(model, LoTRConfig(rank=options.rank, **targets))
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, **targets))


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW; the new head has a rate of its own."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head, adapter = (
        [p for name, p in trained.items() if ("head" in name) == wanted] for wanted in (True, False)
    )
    groups = [{"params": head, "lr": 1e-2}, {"params": adapter, "lr": lr}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def run(method: str, seed: int, options: argparse.Namespace) -> dict:
    """Trains, measures and saves one method, in its own process, so that its peak memory is known."""
    torch.set_num_threads(options.threads)
    examples, held_out = rated_texts("movie_snippets.tsv", options.held_out)
    model, tokenize = minilm_classifier(seed=seed)
    model = adapt(model, method, options)
    data = batches(
        tokenize([t for t, _ in examples]), [c for _, c in examples], options.batch, seed
    )
    begun = time.perf_counter()
    losses = train(
        METHODS[method],
        options.steps,
        optimizer_of(model, options.lr),
        lambda: text_loss(model, next(data)),
    )
    seconds = (time.perf_counter() - begun) / options.steps
    ids, labels = tokenize([t for t, _ in held_out]), torch.tensor([c for _, c in held_out])
    logits = predict(model, ids)
    if method == "lotr":
        save_adapter(model, options.out / method)
        fresh = merge(load_adapter(minilm_classifier(seed=99)[0], options.out / method))
        if changed := int((predict(fresh, ids).argmax(1) != logits.argmax(1)).sum()):
            raise RuntimeError(
                f"merge: expected the trained model's predictions, got {changed} others"
            )
    elif method == "lora":
        model.save_pretrained(str(options.out / method))
    return {
        "method": METHODS[method],
        "trained numbers": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "seconds a step": seconds,
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": losses,
    }


def show(runs: list[dict], held_out: int, path: Path) -> None:
    """Prints the table, with 95 % intervals over the held-out texts, and draws the losses."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    print(
        f"{'method':12} {'trained numbers':>16} {'accuracy':>24} {'s a step':>9} {'peak memory':>12}"
    )
    for name in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == name]
        right = statistics.fmean(run["accuracy"] for run in own)
        low, high = (
            right + sign * 1.96 * (right * (1 - right) / held_out) ** 0.5 for sign in (-1, 1)
        )
        accuracy = f"{100 * right:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        step, peak = (
            statistics.median(run["seconds a step"] for run in own),
            max(run["peak MiB"] for run in own),
        )
        print(
            f"{name:12} {own[0]['trained numbers']:16,} {accuracy:>24} {step:9.3f} {peak:8,.0f} MiB"
        )
        mean = torch.tensor([run["losses"] for run in own]).mean(0)
        axes.plot(
            [mean[max(0, i - 15) : i + 1].mean() for i in range(len(mean))],
            label=f"{name}: {accuracy}",
        )
    axes.set(xlabel="step", ylabel="training loss (mean of 15 steps)")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(words: list[str] | None = None) -> None:
    options = arguments(
        __doc__,
        words,
        rank=16,
        targets=["query", "value"],
        lr=2e-3,
        steps=200,
        batch=32,
        seeds=1,
        held_out=1500,
        out=RESULTS,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    begun, runs = time.perf_counter(), []
    for seed in range(options.seeds):
        for method in METHODS:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                runs.append(pool.submit(run, method, seed, options).result())
    (options.out / "table.json").write_text(
        json.dumps({"options": vars(options), "runs": runs}, indent=1, default=str)
    )
    show(runs, options.held_out, options.out / "curves.png")
    print(
        f"{time.perf_counter() - begun:.0f} s; curves.png, table.json and the adapters are in {options.out}"
    )


if __name__ == "__main__":
    main()
