"""Fine-tune a pretrained text encoder with LoTR, with LoRA, and with only a new head, and compare.

    python examples/finetune_text.py                  MiniLM on snippets of movie reviews: make demo
    python examples/finetune_text.py --seeds 3        three seeds per method

Takes about three minutes on two cores. LoTR and LoRA train at the same learning rate. The results
are in demo_results/: curves.png, table.json and the adapters.
"""

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
    accuracy,
    batches,
    draw,
    minilm_classifier,
    parse_options,
    predict,
    rated_texts,
    running_mean,
    text_loss,
    tokenized,
    train,
)
from lotr_ext import LoTRConfig, apply_lotr, load_adapter, merge, save_adapter

METHODS = {"head": "head only", "lotr": "LoTR", "lora": "LoRA (PEFT)"}
HEAD_RATE = 1e-2


def adapt(model: TextClassifier, method: str, options: argparse.Namespace) -> nn.Module:
    """Freezes the encoder and adds the adapter of a method. The head is always trained."""
    if method == "head":
        model.encoder.requires_grad_(False)
        return model
    targets = {"target_modules": options.targets, "modules_to_save": ["head"]}
    if method == "lotr":
        return apply_lotr(model, LoTRConfig(rank=options.rank, **targets))
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, **targets))


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Returns AdamW with a rate for the adapter and another one for the new head."""
    groups = [
        {"params": [parameter], "lr": HEAD_RATE if "head" in name else lr}
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def run(method: str, seed: int, options: argparse.Namespace) -> dict:
    """Trains, measures and saves one method. Each call needs a new process for its peak memory."""
    torch.set_num_threads(options.threads)
    examples, held_out_examples = rated_texts("movie_snippets.tsv", options.held_out)
    model, tokenize = minilm_classifier(seed=seed)
    model = adapt(model, method, options)
    data = batches(tokenized(examples, tokenize), options.batch, seed)
    optimizer = make_optimizer(model, options.lr)
    start = time.perf_counter()
    losses = train(METHODS[method], options.steps, optimizer, lambda: text_loss(model, next(data)))
    seconds = time.perf_counter() - start

    held_out = tokenized(held_out_examples, tokenize)
    if method == "lotr":
        save_adapter(model, options.out / method)
        check_saved_adapter(model, held_out.ids, options.out / method)
    elif method == "lora":
        model.save_pretrained(str(options.out / method))
    return {
        "method": METHODS[method],
        "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "accuracy": accuracy(model, held_out),
        "seconds per step": seconds / options.steps,
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": losses,
    }


def check_saved_adapter(model: nn.Module, ids: list[list[int]], folder: Path) -> None:
    """Loads an adapter into a fresh model, merges it, and compares the predictions."""
    fresh, _ = minilm_classifier(seed=99)
    merged = merge(load_adapter(fresh, folder))
    assert torch.equal(predict(merged, ids).argmax(1), predict(model, ids).argmax(1))


def report(runs: list[dict], held_out: int, path: Path) -> None:
    """Prints a row per method, with means over the seeds, and draws the training losses.

    Args:
        runs: What `run` returned for each seed and method.
        held_out: The number of held-out texts. The 95 % interval of the accuracy is over them.
        path: The picture.
    """
    print(
        f"{'method':12} {'trained parameters':>18} {'accuracy':>24} {'s per step':>11} "
        f"{'peak memory':>12}"
    )
    curves = {}
    for name in dict.fromkeys(run["method"] for run in runs):
        runs_of_method = [run for run in runs if run["method"] == name]
        mean = statistics.fmean(run["accuracy"] for run in runs_of_method)
        half_width = 1.96 * (mean * (1 - mean) / held_out) ** 0.5
        interval = (
            f"{100 * mean:.1f} % "
            f"({100 * (mean - half_width):.1f} to {100 * (mean + half_width):.1f})"
        )
        seconds = statistics.median(run["seconds per step"] for run in runs_of_method)
        peak = max(run["peak MiB"] for run in runs_of_method)
        parameters = runs_of_method[0]["trained parameters"]
        print(f"{name:12} {parameters:18,} {interval:>24} {seconds:11.3f} {peak:8,.0f} MiB")
        losses = torch.tensor([run["losses"] for run in runs_of_method]).mean(0).tolist()
        curves[f"{name}: {interval}"] = dict(enumerate(running_mean(losses, 15)))
    draw(path, curves, xlabel="step", ylabel="training loss (mean of 15 steps)")


def main(argv: list[str] | None = None) -> None:
    options = parse_options(
        __doc__,
        argv,
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
    runs = []
    for seed in range(options.seeds):
        for method in METHODS:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                runs.append(pool.submit(run, method, seed, options).result())
    table = json.dumps({"options": vars(options), "runs": runs}, indent=1, default=str)
    (options.out / "table.json").write_text(table)
    report(runs, options.held_out, options.out / "curves.png")
    print(f"curves.png, table.json and the adapters are in {options.out}")


if __name__ == "__main__":
    main()
