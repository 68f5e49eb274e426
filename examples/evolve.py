"""Train cores without a backward, for a reward that has no gradient: evolution strategies.

    python examples/data.py minilm snippets
    python examples/evolve.py                         three minutes on two cores

A generation is a task bank of perturbed cores, and one forward runs all of them on the same rows.
The reward is the share of movie snippets that MiniLM, with a trained head, classifies correctly.
"""

import statistics

import torch
from torch import Tensor, nn

from common import (
    Batch,
    accuracy,
    batches,
    minilm_classifier,
    parse_options,
    progress_bar,
    rated_texts,
    text_loss,
    tokenized,
    train,
)
from lotr_ext import LoTRConfig, TaskBank, apply_lotr, use_tasks


def centered_ranks(rewards: Tensor) -> Tensor:
    """Returns ranks from -0.5 to 0.5, so that the scale of the reward does not matter.

    Equal rewards get equal ranks.
    """
    smaller = (rewards[:, None] > rewards).sum(1)
    equal = (rewards[:, None] == rewards).sum(1) - 1
    return (smaller + equal / 2) / max(1, len(rewards) - 1) - 0.5


@torch.no_grad()
def run_generation(
    model: nn.Module, bank: TaskBank, centers: list[nn.Parameter], batch: Batch, sigma: float
) -> float:
    """Sets the gradients of the centers from the rewards of perturbed copies.

    Args:
        model: Has the bank.
        bank: One task per member. Its cores are overwritten.
        centers: The center of the generation, one core per layer.
        batch: The rows that each member answers.
        sigma: The standard deviation of the perturbations.

    Returns:
        The mean share of right answers.
    """
    # The members: each perturbation in the first half, its mirror image in the second.
    members = len(bank)
    half = members // 2
    noise = [torch.randn(half, *core.shape) for core in centers]
    for cores, center, perturbation in zip(bank.cores, centers, noise):
        cores.copy_(center + sigma * torch.cat([perturbation, -perturbation]))
    # All members answer all rows in one forward.
    rows = len(batch.ids)
    with use_tasks(model, torch.arange(members).repeat_interleave(rows)):
        answers = model(batch.ids * members).argmax(1)
    is_right = answers == batch.labels.repeat(members)
    rewards = is_right.view(members, rows).double().mean(1)
    # The gradient: perturbations weighted by how much better each is than its mirror image.
    weights = centered_ranks(rewards).float()
    differences = weights[:half] - weights[half:]
    for center, perturbation in zip(centers, noise):
        center.grad = -torch.tensordot(differences, perturbation, 1) / (members * sigma)
    return rewards.mean().item()


def main(argv: list[str] | None = None) -> None:
    options = parse_options(
        __doc__,
        argv,
        generations=60,
        pairs=8,
        rows=32,
        rank=8,
        sigma=2e-3,
        lr=1e-3,
        head_steps=20,
        held_out=1000,
    )
    model, tokenize = minilm_classifier()
    training_examples, held_out_examples = rated_texts("movie_snippets.tsv", options.held_out)
    data = batches(tokenized(training_examples, tokenize), options.rows)
    held_out = tokenized(held_out_examples, tokenize)
    model.encoder.requires_grad_(False)
    head_optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    train("the head", options.head_steps, head_optimizer, lambda: text_loss(model, next(data)))

    apply_lotr(
        model, LoTRConfig(rank=options.rank, target_modules=["query", "value"], train=("core",))
    )
    bank = TaskBank(model, 2 * options.pairs)
    for _ in range(2 * options.pairs):
        bank.add()
    # The cores of the model are the center of each generation. They start at zero.
    centers = [p for name, p in model.named_parameters() if name.endswith(".core")]
    optimizer = torch.optim.Adam(centers, lr=options.lr)
    before = 100 * accuracy(model, held_out)
    shares = []
    progress = progress_bar("evolution", options.generations)
    for _ in progress:
        shares.append(run_generation(model, bank, centers, next(data), options.sigma))
        optimizer.step()
        progress.set_postfix_str(f"right {100 * statistics.fmean(shares[-10:]):.1f} %")

    after = 100 * accuracy(model, held_out)
    print(
        f"held-out accuracy {before:.1f} % before, {after:.1f} % after {options.generations} "
        f"generations of {sum(core.numel() for core in centers):,} parameters"
    )


if __name__ == "__main__":
    main()
