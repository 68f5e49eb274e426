"""Reinforcement learning of cores: vLLM writes answers, they are rated, the cores are updated and pushed to the engine.

SmolLM2-135M learns to name the larger of two numbers by GRPO. vLLM writes several answers to each prompt. An answer's advantage
is its reward minus the mean of its group, over the group's deviation. One step of Adam raises the likelihood of good answers.
Only the cores change, 54 thousand numbers, so a step sends 211 KiB to the running engine. Each step also compares the engine's
log-likelihood of every token with the trainer's, which detects tokens of an older version.

    python examples/causal_data.py                      downloads SmolLM2-135M, once
    .venv/vllm/bin/python examples/rl_cores.py          needs vLLM (make rl has both); --quick: a few steps, about a minute

TRL's vLLM mode sends whole merged weights and supports vLLM 0.22 to 0.31, so this program has its own loop.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causal_data import MODEL
from finetune_text import end, results_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench's names of machines

from bench.measure.paired import interval_of_many

MOST = 4  # tokens of an answer
STALE = 0.01  # largest difference between trainer and engine on a token, in nats; another version differs by more
HELD_OUT = 200


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="a causal model's folder")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step")
    parser.add_argument("--group", type=int, default=8, help="answers per prompt")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="4 steps, about a minute, results in demo_results")
    parser.add_argument("--results", type=Path, help="folder for JSON and picture (bench/results/<machine>)")
    return parser


def task(draw: random.Random) -> tuple[str, str]:
    """A prompt and the right answer."""
    a, b = draw.sample(range(10, 100), 2)
    return f"25, 71: 71\n{a}, {b}:", str(max(a, b))


def reward(text: str, right: str) -> float:
    """1 for the right number as the first word, else 0."""
    found = re.match(r"\s*(\d+)\b", text)
    return float(found is not None and found[1] == right)


def advantages(rewards: list[float], group: int) -> list[float]:
    """GRPO's advantage of each answer within its group."""
    found = []
    for at in range(0, len(rewards), group):
        own = rewards[at : at + group]
        mean, deviation = statistics.fmean(own), statistics.pstdev(own)
        found += [(one - mean) / (deviation + 1e-4) for one in own]
    return found


def start(options: argparse.Namespace, folder: Path) -> tuple[nn.Module, Any, Any]:
    """The model with trainable cores, the engine with its factors, and the CoreSync between them."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads), "LOTR_FACTORS": str(folder / "factors")}
    import torch
    from transformers import AutoModelForCausalLM

    from lotr_ext import LoTRConfig, apply_lotr
    from lotr_ext.interop.vllm import CoreSync, export_factors

    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    apply_lotr(model, LoTRConfig(rank=options.rank, target_modules="all-linear", group_by="width", train=("core",)))
    export_factors(model, folder / "factors")

    from vllm import LLM

    worker = "lotr_ext.interop.vllm.worker.CoreWorker"
    sizes = {"max_model_len": 64, "max_num_seqs": options.prompts * options.group, "max_num_batched_tokens": 4096}
    engine = LLM(
        str(options.model),
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_loras=2,
        worker_extension_cls=worker,
        **sizes,
    )
    torch.set_num_threads(options.threads)
    return model, engine, CoreSync(model, engine)


def write(engine: Any, tasks: list[tuple[str, str]], version: Any, group: int) -> list[dict[str, Any]]:
    """Answers by that version: token ids, their log-likelihoods, and the reward. group 0: one greedy answer."""
    from vllm import SamplingParams

    options = {"n": group, "temperature": 1.0} if group else {"temperature": 0.0}
    params = SamplingParams(**options, max_tokens=MOST, stop=["\n"], logprobs=0)
    found = []
    for request, (_, right) in zip(
        engine.generate([prompt for prompt, _ in tasks], params, lora_request=version, use_tqdm=False), tasks, strict=True
    ):
        for one in request.outputs:
            ids = list(one.token_ids)
            values = [at[token].logprob for at, token in zip(one.logprobs, ids, strict=True)]
            found.append(
                {"prompt": request.prompt_token_ids, "ids": ids, "logprobs": values, "reward": reward(one.text, right)}
            )
    return found


def likelihoods(model: nn.Module, answers: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """The trainer's log-likelihood of each token of the answers, the engine's, and which are tokens: [answers, tokens] each."""
    import torch

    rows = [[*one["prompt"], *one["ids"]] for one in answers]
    width, most = max(map(len, rows)), max(len(one["ids"]) for one in answers)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])  # padded on the left
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    ends = [one["ids"] for one in answers]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=places, logits_to_keep=most + 1).logits[:, :-1]
    ours = logits.log_softmax(-1).gather(2, ids[:, -most:, None])[..., 0]
    theirs = torch.tensor([[0.0] * (most - len(one["logprobs"])) + one["logprobs"] for one in answers])
    return ours, theirs, torch.tensor([[0.0] * (most - len(end)) + [1.0] * len(end) for end in ends])


def update(model: nn.Module, optimizer: Any, answers: list[dict[str, Any]], group: int) -> float:
    """One step of GRPO. Returns the largest difference between trainer and engine on a token, in nats."""
    import torch

    ours, theirs, tokens = likelihoods(model, answers)
    advantage = torch.tensor(advantages([one["reward"] for one in answers], group))[:, None]
    ratio = (ours - theirs).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    optimizer.zero_grad()
    (-(gain * tokens).sum() / tokens.sum()).backward()
    optimizer.step()
    return float(((ours - theirs).detach().abs() * tokens).max())


def held_out() -> list[tuple[str, str]]:
    """Different prompts that are not trained on."""
    draw = random.Random("held out")
    found: dict[str, str] = {}
    while len(found) < HELD_OUT:
        prompt, right = task(draw)
        found[prompt] = right
    return list(found.items())


def likeliest(engine: Any, tasks: list[tuple[str, str]], version: Any) -> list[float]:
    """Rewards of that version's greedy answers."""
    return [one["reward"] for one in write(engine, tasks, version, 0)]


def trained_on(draw: random.Random, count: int, apart: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The prompts of a step, none of them in apart."""
    found: list[tuple[str, str]] = []
    while len(found) < count:
        if (one := task(draw)) not in apart:
            found.append(one)
    return found


def train(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    from rich.progress import Progress

    from lotr_ext import lotr_parameters

    model, engine, sync = start(options, folder)
    optimizer = torch.optim.Adam(lotr_parameters(model), lr=options.lr)
    draw, steps = random.Random(options.seed), []
    apart, version = held_out(), sync.push(name="policy")
    before = likeliest(engine, apart, version.request)
    with Progress(transient=True) as progress:
        line = progress.add_task("steps", total=options.steps)
        for _ in range(options.steps):
            clock = time.perf_counter()
            answers = write(engine, trained_on(draw, options.prompts, set(apart)), version.request, options.group)
            wrote = time.perf_counter()
            gap = update(model, optimizer, answers, options.group)
            if not gap < STALE:
                raise RuntimeError(f"{version.name}: expected tokens of this version, got one that differs by {gap:.3f} nats")
            learned = time.perf_counter()
            version = sync.push(name="policy")
            steps.append({"reward": statistics.fmean(one["reward"] for one in answers), "gap": gap, "bytes": version.bytes})
            steps[-1] |= {"write_s": wrote - clock, "learn_s": learned - wrote, "push_ms": 1000 * version.seconds}
            progress.update(line, advance=1, description=f"reward {steps[-1]['reward']:.2f}")
    after = likeliest(engine, apart, version.request)
    return {"steps": steps, "before": before, "after": after, "trained": sum(p.numel() for p in lotr_parameters(model))}


def gained(before: list[float], after: list[float]) -> tuple[float, float]:
    """Mean difference and half of its 95 % interval, over the same prompts."""
    return interval_of_many([b - a for a, b in zip(before, after, strict=True)])


def show(results: dict[str, Any]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    steps, (mean, half) = results["steps"], gained(results["before"], results["after"])
    table = Table(title=f"GRPO of {results['trained']:,} numbers, {len(steps)} steps")
    table.add_column(""), table.add_column("", justify="right")
    middle = {key: statistics.median(one[key] for one in steps) for key in steps[0]}
    rows = {
        "right answers, held out, before": f"{statistics.fmean(results['before']):.1%}",
        "after": f"{statistics.fmean(results['after']):.1%}",
        "gained (95 % interval over prompts, one seed)": f"{mean:+.1%} ± {half:.1%}",
        "a step: vLLM writes": f"{middle['write_s']:.2f} s",
        "a step: cores are updated": f"{middle['learn_s']:.2f} s",
        "a step: push, median": f"{middle['push_ms']:.1f} ms, {middle['bytes']:,.0f} bytes",
        "a step: push, slowest": f"{max(one['push_ms'] for one in steps):.1f} ms",
        "largest difference between trainer and engine on a token": f"{max(one['gap'] for one in steps):.1e} nats",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def draw(results: dict[str, Any], path: Path) -> None:
    """The reward of each step, its mean over ten steps, and the held-out prompts before and after."""
    import matplotlib.pyplot as plt

    from bench.pictures.figures import save  # which draws without a screen

    rewards = [one["reward"] for one in results["steps"]]
    smooth = [statistics.fmean(rewards[max(0, at - 9) : at + 1]) for at in range(len(rewards))]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(range(1, len(rewards) + 1), rewards, color="0.7", label="a step's answers, sampled")
    axis.plot(range(1, len(rewards) + 1), smooth, color="tab:blue", label="mean of the last ten steps")
    for at, part in ((0, "before"), (len(rewards), "after")):
        values = results[part]
        mean = statistics.fmean(values)
        half = 1.96 * math.sqrt(mean * (1 - mean) / len(values))
        name = "held-out prompts, likeliest answer, 95 %" if part == "before" else None
        axis.errorbar(at, mean, half, fmt="o", capsize=4, color="tab:orange", label=name)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="step", ylabel="reward: share of right answers", ylim=(0, 1.02))
    mean, half = gained(results["before"], results["after"])
    title = f"GRPO of cores alone, {results['trained']:,} numbers, answers by vLLM: {100 * mean:+.1f} ± {100 * half:.1f} points"
    axis.set_title(f"{title}\n{len(results['before'])} held-out prompts, one seed, {results['machine']}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    save({path.stem: figure}, path.parent, dpi=120)


def main(words: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(words)
    if options.quick:
        options.steps = 4
    for name, least in (("steps", 1), ("prompts", 1), ("group", 2), ("rank", 1), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if not (options.model / "config.json").is_file():
        parser.error(f"--model: expected a model's folder, got {options.model}; run python examples/causal_data.py")
    import torch

    from bench.measure.store import write_whole
    from bench.measure.timing import machine

    torch.set_num_threads(options.threads)
    name = machine(torch.device("cpu"))["name"]
    folder = results_folder(options, name)
    with tempfile.TemporaryDirectory() as scratch:
        results = train(options, Path(scratch))
    settings = {key: value for key, value in vars(options).items() if key not in ("model", "results")}
    results = {"settings": settings, "machine": name, "load": os.getloadavg()[0], **results}
    show(results)
    path = write_whole(folder / "rl-cores.json", json.dumps(results, indent=1) + "\n")
    draw(results, folder / "rl-cores.png")
    print(f"results in {path} and .png", flush=True)
    os._exit(0)  # vLLM's shutdown can hang


if __name__ == "__main__":
    end(main, "rl_cores")
