"""Trains cores without a backward, for an accuracy and for an exact match, and times a population against plain inference.

    python examples/causal_data.py        downloads SmolLM2-135M, once; without it the second part is left out
    python examples/evolve.py             three seeds, about ten minutes of processor time
    python examples/evolve.py --quick     one seed and few generations, under a minute

accuracy   MiniLM classifies film reviews as good or bad by the nearer of two descriptions. CoreES maximises the accuracy and
           is compared with Adam on the cross-entropy of the same cores
sums       SmolLM2 writes the sum of two digits; the reward is 1 for an exact match
speed      one forward of a population, compared with the same rows through the base model

In the first two parts A and B come from the gradient of a few batches (`init_from_gradient`) and are frozen.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import causal_lm
import torch
from causal_data import MODEL as SMOLLM
from finetune_text import Bar, check_seed, end, results_folder
from torch import Tensor, nn
from torch.nn import functional as F

import text_model as tm
from data import MODEL, SNIPPETS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench's terminal and names of machines

from bench.measure.paired import interval  # noqa: E402
from bench.measure.store import commit, write_whole  # noqa: E402
from bench.measure.terminal import Table  # noqa: E402
from bench.measure.timing import machine  # noqa: E402
from lotr_ext import CoreES, LoTRConfig, TaskBank, apply_lotr, disabled, init_from_gradient, mixed  # noqa: E402

DESCRIPTIONS = ("a bad movie", "a good movie")
SHARPNESS = 20.0  # factor of the cosines for the cross-entropy; it does not change the accuracy
SUMS = [(a, b) for a in range(10) for b in range(10)]
QUESTION, TRAINED_SUMS = "Question: What is {} + {}?\nAnswer:", 70
PARTS = ("accuracy", "sums", "speed")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run (accuracy,sums,speed)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--generations", type=int, default=30, help="generations of the accuracy part (30)")
    parser.add_argument("--population", type=int, default=256, help="members, one text each (256)")
    parser.add_argument("--steps", type=int, default=40, help="steps of Adam, 32 texts each (40)")
    parser.add_argument("--held-out", type=int, default=1500, help="texts that measure the accuracy (1500)")
    parser.add_argument("--sum-generations", type=int, default=8, help="generations of the sums, 32 members each (8)")
    parser.add_argument("--members", default="64,256,1000", help="populations whose forward is timed (64,256,1000)")
    parser.add_argument("--rounds", type=int, default=3, help="timing rounds (3)")
    parser.add_argument("--model", default=str(MODEL), help="folder of a text encoder (MiniLM)")
    parser.add_argument("--language-model", default=str(SMOLLM), help="folder of a causal language model (SmolLM2-135M)")
    parser.add_argument("--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("--results", type=Path, help="folder for JSON and picture (bench/results/<machine>)")
    parser.add_argument("--quick", action="store_true", help="one seed, few generations; kept in demo_results")
    options = parser.parse_args(words)
    if options.quick:
        small = {"seeds": 1, "generations": 3, "population": 64, "steps": 3, "held_out": 100, "sum_generations": 1}
        vars(options).update(small, members="16,64", rounds=2)
    for name in ("seeds", "generations", "population", "steps", "held_out", "sum_generations", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    check_seed(options.seed)
    if not all(word.isdecimal() and int(word) for word in options.members.split(",")):
        parser.error(f"--members: expected whole numbers of 1 or more with commas, got {options.members!r}")
    options.members = [int(word) for word in options.members.split(",")]
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    return options


def evolve(es: CoreES, generations: int, name: str, score: Callable[[Tensor], Tensor]) -> list[float]:
    """Runs `generations` generations; score: rewards for an index of members. Returns the mean reward of each."""
    means, lr = [], es.optimizer.param_groups[0]["lr"]
    with Bar(name, generations, True) as bar, torch.inference_mode():
        for step in range(generations):
            es.optimizer.param_groups[0]["lr"] = lr * (1 - step / generations)
            rewards = score(es.ask())
            es.tell(rewards)
            means.append(rewards.mean().item())
            bar.reach(step + 1)
    return means


def use(model: nn.Module, es: CoreES) -> None:
    """Copies the mean core into the model."""
    with torch.no_grad():
        for name, core in es.mean().items():
            model.get_parameter(name).copy_(core)


# ---- an accuracy -----------------------------------------------------------------------------------------------------


class Nearer(nn.Module):
    """Pooled vectors [b, d] -> logits [b, 2]: their cosines with the vectors of two descriptions."""

    def __init__(self, descriptions: Tensor):
        super().__init__()
        self.register_buffer("descriptions", F.normalize(descriptions.float(), dim=1))

    def forward(self, pooled: Tensor) -> Tensor:
        return SHARPNESS * F.normalize(pooled.float(), dim=1) @ self.descriptions.T


def classifier(folder: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[list[str]], list[list[int]]]]:
    """The encoder with the two descriptions as its classes; it was not trained for them."""
    encoder, tokenize = tm.load_encoder(Path(folder))
    model = tm.build(encoder.to(dtype), 2, 0).eval()
    model.head = nn.Identity()
    model.head = Nearer(tm.predict(model, tokenize(list(DESCRIPTIONS))))
    return model, tokenize


def adapted(model: nn.Module, rank: int, targets: list[str], seed: int, batches: list, loss: Callable) -> nn.Module:
    """The model with an adapter whose A and B come from a few batches and are frozen, and whose cores are zero."""
    torch.manual_seed(seed)
    apply_lotr(model, LoTRConfig(rank=rank, scaling=4.0, target_modules=targets, adapter_dtype=torch.float32))
    init_from_gradient(model, batches, loss, progress=False)
    model.lotr_factors.requires_grad_(False)
    return model


def cross_entropy(model: nn.Module, batch: tuple[list[list[int]], Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy_run(options: argparse.Namespace, seed: int) -> dict:
    """Held-out accuracy at the start, after CoreES on the accuracy, and after Adam on the cross-entropy of the same cores."""
    train, test = tm.split(tm.movie_snippets(SNIPPETS)[0], options.held_out)
    model, tokenize = classifier(options.model, torch.bfloat16)
    ids, classes = tokenize([t for t, _ in train]), [c for _, c in train]
    test_ids, labels = tokenize([t for t, _ in test]), torch.tensor([c for _, c in test])

    def accuracy() -> float:
        return (tm.predict(model, test_ids).argmax(1) == labels).double().mean().item()

    found = {"seed": seed, "start": accuracy()}
    first = tm.Batches(ids, classes, 32, 1000 + seed)
    adapted(model, 4, ["query", "value"], seed, [first.next() for _ in range(4)], cross_entropy)
    bank, pairs = TaskBank(model, options.population), options.population // 2
    texts = tm.Batches(ids, classes, pairs, seed)

    def score(index: Tensor) -> Tensor:
        """Whether each member is right on one text. The two members of a pair get the same text."""
        rows, target = texts.next()
        with mixed(model, index):
            return (model([row for row in rows for _ in range(2)]).argmax(1) == target.repeat_interleave(2)).double()

    begun = time.process_time()
    es = CoreES(bank, options.population, 0.005, lr=0.002, seed=seed)
    found["members"] = evolve(es, options.generations, f"accuracy, {seed}", score)
    found["seconds"] = {"CoreES": time.process_time() - begun}
    use(model, es)
    found["CoreES"] = accuracy()

    with torch.no_grad():
        cores = [model.get_parameter(name).zero_() for name in es.mean()]
    found["numbers"] = sum(core.numel() for core in cores)
    batches, begun = tm.Batches(ids, classes, 32, seed), time.process_time()
    optimizer = torch.optim.Adam(cores, lr=0.005)
    with Bar(f"Adam, {seed}", options.steps, True) as bar:
        for step in range(options.steps):
            optimizer.param_groups[0]["lr"] = 0.005 * (1 - step / options.steps)
            optimizer.zero_grad()
            cross_entropy(model, batches.next()).backward()
            optimizer.step()
            bar.reach(step + 1)
    found["seconds"]["Adam"] = time.process_time() - begun
    found["Adam"] = accuracy()
    return found


# ---- an exact match --------------------------------------------------------------------------------------------------


def sums_run(options: argparse.Namespace, seed: int) -> dict:
    """The share of sums that SmolLM2 writes exactly right, among the rewarded ones and among the others."""
    model, tokenizer = causal_lm.load(Path(options.language_model), "bfloat16")
    # generate passes a slice of the states to the head. If the head is frozen, torch then copies its weight once per row
    model.get_output_embeddings().register_forward_pre_hook(lambda head, states: (states[0].contiguous(),))
    order = torch.randperm(len(SUMS), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [SUMS[i] for i in order]  # the same are held out for every seed
    ids = tokenizer([QUESTION.format(a, b) for a, b in pairs], return_tensors="pt")["input_ids"]  # of one length
    answers = tokenizer([f" {a + b}\n" for a, b in pairs])["input_ids"]
    (end,) = tokenizer("\n")["input_ids"]

    def loss(model: nn.Module, which: range) -> Tensor:
        """Mean cross-entropy of the answers' tokens."""
        longest = max(len(answers[i]) for i in which)
        rows = torch.tensor([[*ids[i].tolist(), *answers[i], *[end] * (longest - len(answers[i]))] for i in which])
        targets = torch.where(torch.arange(rows.shape[1]) < ids.shape[1], -100, rows)
        return model(input_ids=rows, labels=targets, use_cache=False).loss

    def right(which: Tensor, index: Tensor) -> Tensor:
        """Whether each row's answer is the sum and nothing else on its line."""
        rows = ids[which]
        with torch.inference_mode(), mixed(model, index):
            made = model.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=4, do_sample=False, eos_token_id=end,
                pad_token_id=end,
            )  # fmt: skip
        lines = [text.partition("\n") for text in tokenizer.batch_decode(made[:, rows.shape[1] :])]
        return torch.tensor([line.strip() == str(sum(pairs[i])) and bool(stop) for (line, stop, _), i in zip(lines, which)])

    def shares(task: int) -> list[float]:
        found = right(torch.arange(len(pairs)), torch.full((len(pairs),), task)).double()
        return [found[:TRAINED_SUMS].mean().item(), found[TRAINED_SUMS:].mean().item()]

    adapted(model, 2, ["q_proj", "v_proj"], seed, [range(16)], loss)
    draw, members, sums = torch.Generator().manual_seed(seed), 32, 8
    bank = TaskBank(model, members)
    found = {"seed": seed, "start": shares(-1)}  # the base model

    def score(index: Tensor) -> Tensor:
        which = torch.randperm(TRAINED_SUMS, generator=draw)[:sums]
        return right(which.repeat(members), index.repeat_interleave(sums)).view(members, sums).double().mean(1)

    begun = time.process_time()
    es = CoreES(bank, members, 0.003, lr=0.001, seed=seed)
    found["numbers"] = sum(core.numel() for core in es.mean().values())
    found["members"] = evolve(es, options.sum_generations, f"sums, {seed}", score)
    found["seconds"] = time.process_time() - begun
    place = int(es.ask()[0])
    bank.replace(place, es.mean())
    found["CoreES"] = shares(place)
    return found


# ---- speed -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def speed(options: argparse.Namespace) -> dict[int, dict]:
    """By number of members: processor seconds of one forward with a different member for each row, and of the same rows
    through the base model, in turns."""
    model, tokenize = classifier(options.model, torch.float32)
    apply_lotr(model, LoTRConfig(rank=16, target_modules=["query", "value"]))
    most = max(options.members)
    es = CoreES(TaskBank(model, most), most, 0.05, lr=0.01, antithetic=False)
    begun = time.process_time()
    index = es.ask()
    asked = time.process_time()
    es.tell(torch.arange(most))
    around = {"ask": asked - begun, "tell": time.process_time() - asked}
    texts = tokenize([text for text, _ in tm.movie_snippets(SNIPPETS)[0][:4000]])
    rows = [row for row in texts if len(row) == 24]  # no padding
    found = {}
    with Bar("speed", len(options.members) * options.rounds, True) as bar:
        for n in options.members:
            batch = [rows[i % len(rows)] for i in range(n)]
            times: dict[str, list[float]] = {"base": [], "members": []}
            for turn in range(options.rounds):
                for way in sorted(times, reverse=bool(turn % 2)):
                    begun = time.process_time()
                    with disabled(model) if way == "base" else mixed(model, index[:n]):
                        model(batch)
                    times[way].append(time.process_time() - begun)
                bar.reach(len(found) * options.rounds + turn + 1)
            ratios = [base / own for base, own in zip(*times.values(), strict=True)]
            seconds = {way: statistics.median(own) for way, own in times.items()}
            found[n] = {"rows_per_second": n / seconds["members"], "over_base": statistics.median(ratios), "seconds": seconds}
    return {"tokens": 24, "around": {"members": most, **around}, "by_members": found}


# ---- results ---------------------------------------------------------------------------------------------------------


def summary(results: dict) -> dict:
    """Means over seeds with half of their 95 % intervals; differences are paired by seed."""
    found: dict[str, dict] = {}
    if runs := results.get("accuracy"):
        found["accuracy"] = {way: interval([run[way] for run in runs]) for way in ("start", "CoreES", "Adam")}
        for way, other in (("CoreES", "start"), ("CoreES", "Adam")):
            found["accuracy"][f"{way} - {other}"] = interval([run[way] - run[other] for run in runs])
    if runs := results.get("sums"):
        for i, part in enumerate(("rewarded", "held out")):
            found[f"sums, {part}"] = {way: interval([run[way][i] for run in runs]) for way in ("start", "CoreES")}
            found[f"sums, {part}"]["CoreES - start"] = interval([run["CoreES"][i] - run["start"][i] for run in runs])
    return found


def show(results: dict) -> None:
    """The tables."""
    for what, rows in results["summary"].items():
        table = Table(what, "", "right, %", "95 % interval, +-")
        for way, (mean, half) in rows.items():
            table.add_row(way, f"{100 * mean:.1f}", "one seed" if half is None else f"{100 * half:.1f}")
        print(table)
    if found := results.get("speed"):
        table = Table(f"one forward, {found['tokens']} tokens per row", "members", "rows/s", "over the base model")
        for n, row in found["by_members"].items():
            table.add_row(str(n), f"{row['rows_per_second']:.0f}", f"{row['over_base']:.3f} x")
        print(table)
        around = found["around"]
        print(f"ask {1000 * around['ask']:.0f} ms and tell {1000 * around['tell']:.0f} ms for {around['members']} members")


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(options.threads)
    if "sums" in options.parts and not Path(options.language_model, "config.json").is_file():
        print(f"sums: left out, no model in {options.language_model}; python examples/causal_data.py downloads it")
        options.parts.remove("sums")
    shape = {name: value for name, value in vars(options).items() if name not in ("results", "model", "language_model")}
    results = {"shape": shape, "machine": machine(torch.device("cpu")), "commit": commit()}
    folder = results_folder(options, results["machine"]["name"])
    for part, run in (("accuracy", accuracy_run), ("sums", sums_run)):
        if part in options.parts:
            results[part] = [run(options, options.seed + i) for i in range(options.seeds)]
    if "speed" in options.parts:
        results["speed"] = speed(options)
    results["summary"] = summary(results)
    show(results)
    write_whole(folder / "evolve.json", json.dumps(results, indent=1) + "\n")
    from bench.pictures.evolution import draw_evolution  # needs matplotlib

    draw_evolution(json.loads((folder / "evolve.json").read_text()), folder)
    print(f"results in {folder / 'evolve'}.json and .png")


if __name__ == "__main__":
    end(main, "evolve")
