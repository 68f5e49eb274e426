"""A gradient for each example of a batch from one backward, by a task bank: row i uses task i, a copy of the cores.

    python examples/data.py minilm snippets
    python examples/per_example.py                    seconds

MiniLM with adapted query and value layers reads 32 snippets of movie reviews. The gradients of all cores for each snippet are
compared with those of a loop over single snippets. The snippets with the largest gradients are printed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common import arguments, minilm_classifier, rated_texts
from lotr_ext import LoTRConfig, TaskBank, apply_lotr, use_tasks


def gradients(
    model: nn.Module, bank: TaskBank, ids: list[list[int]], labels: Tensor
) -> list[Tensor]:
    """The gradient of each example's loss with respect to each layer's core: [examples, r_in, r_out] a layer.

    The loss is a sum over the examples, so that no example's gradient is divided by their number.
    """
    bank.zero_grad()
    with use_tasks(model, torch.arange(len(ids))):
        cross_entropy(model(ids), labels, reduction="sum").backward()
    return [core.grad[: len(ids)].clone() for core in bank.cores]


def by_a_loop(model: nn.Module, ids: list[list[int]], labels: Tensor) -> list[Tensor]:
    """The same gradients from one backward an example, of the layers' own cores."""
    cores = [p for name, p in model.named_parameters() if name.endswith(".core")]
    rows = [
        torch.autograd.grad(cross_entropy(model([row]), label[None]), cores)
        for row, label in zip(ids, labels)
    ]
    return [torch.stack(own) for own in zip(*rows)]


def main(words: list[str] | None = None) -> None:
    options = arguments(__doc__, words, examples=32, rank=8)
    model, tokenize = minilm_classifier()
    apply_lotr(model, LoTRConfig(rank=options.rank, target_modules=["query", "value"]))
    for name, core in model.named_parameters():
        if name.endswith(".core"):
            nn.init.normal_(core, std=0.01)  # as after some training
    examples = rated_texts("movie_snippets.tsv", 1)[0][: options.examples]
    ids, labels = (
        tokenize([text for text, _ in examples]),
        torch.tensor([label for _, label in examples]),
    )

    expected = by_a_loop(model, ids, labels)
    bank = TaskBank(model, len(ids))
    own = {
        name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".core")
    }
    for _ in ids:
        bank.add(own)
    bank.requires_grad_()
    found = gradients(model, bank, ids, labels)
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected))
    print(
        f"{len(ids)} examples x {len(found)} layers: relative difference to a loop at most {worst:.1e}"
    )
    if not worst < 1e-4:
        raise RuntimeError(
            f"per_example: expected a loop's gradients, got a relative difference of {worst:.1e}"
        )
    norms = sum(core.flatten(1).square().sum(1) for core in found).sqrt()
    for i in norms.topk(min(3, len(ids))).indices.tolist():
        print(
            f"gradient {norms[i]:.3f}, labelled {'positive' if labels[i] else 'negative'}: {examples[i][0]}"
        )


if __name__ == "__main__":
    main()
