"""Train cores without a backward, for a reward that has no gradient: evolution strategies over a task bank.

    python examples/data.py minilm snippets
    python examples/evolve.py                         three minutes on two cores

A generation is a bank of perturbed cores; one forward runs all of them on the same rows. The reward is the number of right
answers of MiniLM with a trained head on movie snippets. Writes demo_results/evolve.png.
"""

from __future__ import annotations

import statistics
import sys

import torch
from torch import Tensor, nn

from common import (
    RESULTS,
    arguments,
    bar,
    batches,
    minilm_classifier,
    predict,
    rated_texts,
    text_loss,
    train,
)
from lotr_ext import LoTRConfig, TaskBank, apply_lotr, use_tasks


def ranks(rewards: Tensor) -> Tensor:
    """Rewards as ranks from -0.5 to 0.5, equal rewards with equal ranks, so that the scale of the reward does not matter."""
    order = (rewards[:, None] > rewards).sum(1) + ((rewards[:, None] == rewards).sum(1) - 1) / 2
    return order / max(1, len(rewards) - 1) - 0.5


@torch.no_grad()
def generation(model: nn.Module, bank: TaskBank, centre: list[Tensor], rows, sigma: float) -> float:
    """Sets the centre's gradients from the rewards of perturbed copies. Returns the mean share of right answers."""
    half = len(bank.cores[0]) // 2
    noise = [torch.randn(half, *core.shape) for core in centre]
    for core, middle, own in zip(
        bank.cores, centre, noise
    ):  # each perturbation, and its mirror image
        core.copy_(middle + sigma * torch.cat([own, -own]))
    ids, labels = rows
    each = len(ids)
    with use_tasks(model, torch.arange(2 * half).repeat_interleave(each)):
        right = model(ids * (2 * half)).argmax(1) == labels.repeat(
            2 * half
        )  # every member answers the same rows
    rewards = right.view(2 * half, each).double().mean(1)
    weights = ranks(rewards).float()
    for middle, own in zip(centre, noise):
        middle.grad = -torch.tensordot(weights[:half] - weights[half:], own, 1) / (2 * half * sigma)
    return rewards.mean().item()


def main(words: list[str] | None = None) -> None:
    options = arguments(
        __doc__,
        words,
        generations=60,
        members=16,
        rows=32,
        rank=8,
        sigma=2e-3,
        lr=1e-3,
        head_steps=20,
        held_out=1000,
    )
    if options.members % 2 or not 0 < options.sigma < float("inf"):
        sys.exit(
            f"evolve: expected an even number of members and a positive sigma, got {options.members}, {options.sigma}"
        )
    model, tokenize = minilm_classifier()
    examples, held_out = rated_texts("movie_snippets.tsv", options.held_out)
    data = batches(tokenize([t for t, _ in examples]), [c for _, c in examples], options.rows)
    ids, labels = tokenize([t for t, _ in held_out]), torch.tensor([c for _, c in held_out])
    model.encoder.requires_grad_(False)
    head = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    train("the head", options.head_steps, head, lambda: text_loss(model, next(data)))
    apply_lotr(
        model, LoTRConfig(rank=options.rank, target_modules=["query", "value"], train=("core",))
    )
    bank = TaskBank(model, options.members)
    for _ in range(options.members):
        bank.add()
    centre = [nn.Parameter(torch.zeros_like(core[0])) for core in bank.cores]
    optimizer = torch.optim.Adam(centre, lr=options.lr)
    own = [p for name, p in model.named_parameters() if name.endswith(".core")]

    def accuracy() -> float:
        return 100 * (predict(model, ids).argmax(1) == labels).double().mean().item()

    before, shares = accuracy(), []
    for _ in (progress := bar("evolution", options.generations)):
        shares.append(generation(model, bank, centre, next(data), options.sigma))
        optimizer.step()
        progress.set_postfix_str(f"right {100 * statistics.fmean(shares[-10:]):.1f} %")
    with torch.no_grad():
        for core, middle in zip(own, centre):
            core.copy_(middle)
    after = accuracy()
    numbers = sum(core.numel() for core in centre)
    result = f"held-out accuracy {before:.1f} % before, {after:.1f} % after {options.generations} generations"
    print(f"{result} of {numbers:,} numbers")

    import matplotlib.pyplot as plt

    means = [statistics.fmean(shares[max(0, i - 9) : i + 1]) for i in range(len(shares))]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([100 * mean for mean in means])
    axes.set(
        xlabel="generation", ylabel="right answers of the members, % (mean of 10)", title=result
    )
    figure.savefig(RESULTS / "evolve.png", dpi=120)


if __name__ == "__main__":
    main()
