"""Serve three tasks of SmolLM2 with vLLM's OpenAI-compatible server. Each task is 210 KiB.

    make vllm                                   once: vLLM for the CPU in .venv/vllm (2 GB, minutes)
    python examples/data.py smollm2 kjv
    .venv/vllm/bin/python examples/serve.py     trains the tasks (two minutes, once), then serves
                                                on 127.0.0.1:8000

The model "bible" continues a prompt in the style of the King James Bible, "shout" continues it in
capitals, and "larger" mostly writes " 71" after "25, 71:".
"""

import argparse
import os
import random
import sys

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from causal_lm import language_model
from common import parse_options, train
from data import DATA, KJV, SMOLLM2
from lotr_ext import LoTRConfig, TaskBank, apply_lotr, use_tasks
from lotr_ext.vllm import export_factors, export_task

TASKS = ("bible", "shout", "larger")
ROWS_PER_TASK = 6  # in a batch
ROW_TOKENS = 32
NOT_LEARNED = -100  # cross_entropy ignores this label


def text_parts(task: str, lines: list[str], generator: random.Random) -> list[tuple[str, bool]]:
    """Makes an example of a task.

    Returns:
        Its parts, as pairs (text, is_learned). A prompt is not learned.
    """
    if task == "larger":
        parts = []
        for _ in range(5):
            a, b = generator.sample(range(10, 100), 2)
            parts.append((f"{a}, {b}:", False))
            parts.append((f" {max(a, b)}\n", True))
        return parts
    text = generator.choice(lines)
    if task == "bible":
        return [(text, True)]
    prompt = " ".join(text.split(" ")[:4])
    return [(prompt, False), (text.removeprefix(prompt).upper(), True)]


def make_batch(
    tokenizer, lines: list[str], generator: random.Random
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns token ids and labels [rows, at most ROW_TOKENS], and the task of each row."""
    index = torch.arange(len(TASKS)).repeat_interleave(ROWS_PER_TASK)
    ids = []
    labels = []
    for task in index.tolist():
        row_ids: list[int] = []
        row_labels: list[int] = []
        for text, is_learned in text_parts(TASKS[task], lines, generator):
            tokens = tokenizer(text)["input_ids"]
            row_ids += tokens
            row_labels += tokens if is_learned else [NOT_LEARNED] * len(tokens)
        ids.append(torch.tensor(row_ids[:ROW_TOKENS]))
        labels.append(torch.tensor(row_labels[:ROW_TOKENS]))
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=NOT_LEARNED)
    return pad_sequence(ids, batch_first=True), padded_labels, index


def make_tasks(options: argparse.Namespace) -> None:
    """Trains the tasks in one bank, over frozen factors, and writes factors and tasks."""
    torch.manual_seed(0)
    model, tokenizer = language_model(options.model)
    text = options.text.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if len(line) > 4 * ROW_TOKENS]
    apply_lotr(model, LoTRConfig(rank=16, group_by="width", train=("core",)))
    bank = TaskBank(model, len(TASKS)).requires_grad_()
    for _ in TASKS:
        bank.add()
    generator = random.Random(0)

    def next_loss() -> Tensor:
        ids, labels, index = make_batch(tokenizer, lines, generator)
        with use_tasks(model, index):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    optimizer = torch.optim.AdamW(bank.parameters(), lr=5e-3, weight_decay=0.0)
    train("three tasks", options.steps, optimizer, next_loss)
    for task, name in enumerate(TASKS):
        export_task(model, options.out / name, task=task, base_model=str(options.model))
    # Written last: if this folder exists, `main` does not train again.
    export_factors(model, options.out / "factors")


def serve(options: argparse.Namespace) -> None:
    """Replaces this process with vLLM's server."""
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "OMP_NUM_THREADS": str(options.threads),
        **os.environ,
        "LOTR_FACTORS": str(options.out / "factors"),
    }
    command = [  # options that belong together are on one line
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(options.model), "--served-model-name", "smollm2"),
        *("--max-model-len", "1024", "--max-num-seqs", "32", "--max-loras", "8"),
        *("--host", "127.0.0.1", "--port", str(options.port), "--dtype", "float32"),
        *("--enforce-eager", "--enable-lora", "--max-cpu-loras", "1000"),
        *("--lora-modules", *(f"{name}={options.out / name}" for name in TASKS)),
    ]
    address = f"http://127.0.0.1:{options.port}"
    print(f"serve: in about a minute, {address}/v1 has the models smollm2, {', '.join(TASKS)}")
    print("serve: Ctrl-C ends it. Try:")
    body = '{"model": "larger", "prompt": "25, 71:", "max_tokens": 4, "temperature": 0}'
    header = "Content-Type: application/json"
    print(f"curl {address}/v1/completions -H '{header}' -d '{body}'", flush=True)
    os.execve(sys.executable, command, environment)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(
        __doc__,
        argv,
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
