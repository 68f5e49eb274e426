"""Serves three tasks of SmolLM2 by an OpenAI-compatible server on this machine; each is 211 KiB over shared factors.

The first call trains the tasks together, with rows of all three in each batch (about two minutes). Then vLLM serves them as the
models "bible" (continues in the King James Bible's words), "shout" (in capitals) and "larger" ("25, 71:" -> " 71", mostly),
beside "smollm2", the base model.

    python examples/causal_data.py                          downloads SmolLM2-135M and the text, once
    .venv/vllm/bin/python examples/serve_tasks.py           needs vLLM (make serve has both)

It listens only on 127.0.0.1. Other programs on this machine can push new versions with the secret that it prints (CoreSync).
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causal_data import MODEL, TEXT
from causal_lm import load, read_text
from finetune_text import Bar, check_folder

if TYPE_CHECKING:
    from torch import Tensor

TASKS = ("bible", "shout", "larger")
ROWS, LENGTH = 6, 32  # of each task in a batch
FACTORS = "factors"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="a causal model's folder")
    parser.add_argument("--text", type=Path, default=TEXT, help="text file on which bible is trained")
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    parser.add_argument("--out", type=Path, default=MODEL.parent / "serve", help="folder for the tasks (data/serve)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tasks-only", action="store_true", help="train the tasks and do not serve")
    return parser


def parts(task: str, lines: list[str], draw: random.Random) -> list[tuple[str, bool]]:
    """A text of the task in parts, and whether each part is trained on."""
    if task == "larger":
        pairs = [draw.sample(range(10, 100), 2) for _ in range(5)]
        return [part for a, b in pairs for part in ((f"{a}, {b}:", False), (f" {max(a, b)}\n", True))]
    text = draw.choice(lines)
    if task == "bible":
        return [(text, True)]
    words = text.split(" ")
    return [(" ".join(words[:4]), False), (" " + " ".join(words[4:]).upper(), True)]


def batch(tokenizer: Any, lines: list[str], draw: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [3 ROWS, LENGTH], labels with -100 for tokens that are not trained on, and each row's task."""
    import torch

    index = torch.arange(len(TASKS)).repeat_interleave(ROWS)
    ids, labels = torch.zeros(2, len(index), LENGTH, dtype=torch.int64)
    for row, task in enumerate(index.tolist()):
        found = [(tokenizer(text)["input_ids"], learnt) for text, learnt in parts(TASKS[task], lines, draw)]
        tokens = [token for own, _ in found for token in own][:LENGTH]
        learnt = [token if learn else -100 for own, learn in found for token in own][:LENGTH]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row] = torch.tensor(learnt + [-100] * (LENGTH - len(learnt)))
    return ids, labels, index


def make_tasks(options: argparse.Namespace) -> None:
    """Trains the three tasks in one bank and writes factors and tasks into options.out."""
    import torch
    from torch.nn.functional import cross_entropy

    from lotr_ext import LoTRConfig, TaskBank, apply_lotr, mixed
    from lotr_ext.interop.vllm import export_factors, export_task

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model, "float32")
    lines = [line for line in read_text(options.text).splitlines() if len(line) > 4 * LENGTH]
    if not lines:
        raise ValueError(f"text: expected lines of more than {4 * LENGTH} characters, got none in {options.text}")
    apply_lotr(model, LoTRConfig(rank=16, target_modules="all-linear", group_by="width", train=("core",)))
    bank, draw = TaskBank(model, len(TASKS)), random.Random(0)
    for _ in TASKS:
        bank.add()
    bank.requires_grad_()
    optimizer = torch.optim.Adam(bank.cores, lr=0.02)
    losses: list[float] = []
    with Bar("three tasks", options.steps, show=True) as progress:
        for _ in range(options.steps):
            ids, labels, index = batch(tokenizer, lines, draw)
            with mixed(model, index):
                logits = model(input_ids=ids).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            progress.step(losses)
    for task, name in enumerate(TASKS):
        export_task(model, options.out / name, task=task, base_model=str(options.model))
    export_factors(model, options.out / FACTORS)  # last, because main takes this folder as the sign that all tasks are written


def serve(options: argparse.Namespace) -> None:
    """Replaces this process by vLLM's server."""
    secret = os.environ.get("LOTR_SYNC_SECRET") or secrets.token_hex(16)
    environment = os.environ | {"LOTR_FACTORS": str(options.out / FACTORS), "LOTR_SYNC_SECRET": secret}
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(options.threads),
    }.items():
        environment.setdefault(name, value)
    here = Path(__file__).resolve().parents[1]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(here), environment.get("PYTHONPATH")) if p)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.model)]
    command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(options.port), "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "32", "--enforce-eager", "--enable-lora"]
    command += ["--max-loras", "8", "--max-cpu-loras", "1000", "--lora-modules", *(f"{n}={options.out / n}" for n in TASKS)]
    command += ["--worker-extension-cls", "lotr_ext.interop.vllm.worker.CoreWorker"]
    command += ["--middleware", "lotr_ext.interop.vllm.server.CoreSyncEndpoint"]
    where = f"http://127.0.0.1:{options.port}"
    print(f"serve: {where}/v1 has the models smollm2, {', '.join(TASKS)} after it has started (a minute); Ctrl-C ends it")
    body = '{"model": "larger", "prompt": "25, 71:", "max_tokens": 4, "temperature": 0}'
    print(f"serve: curl {where}/v1/completions -H 'Content-Type: application/json' -d '{body}'")
    print(f'serve: CoreSync(model, "{where}", secret="{secret}")', flush=True)
    os.execve(sys.executable, command, environment)


def main(words: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(words)
    for name in ("steps", "port", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.port > 65535:
        parser.error(f"--port: expected at most 65535, got {options.port}")
    try:
        if not (options.out / FACTORS).is_dir():
            check_folder(options.out)
            make_tasks(options)
            print(f"serve: made {', '.join(TASKS)} in {options.out}")
    except (ValueError, OSError) as error:
        sys.exit(f"serve: {error}")
    if not options.tasks_only:
        serve(options)


if __name__ == "__main__":
    main()
