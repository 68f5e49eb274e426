"""One backward, and a gradient for each example of a batch: row i uses task i, a copy of the cores.

    python examples/data.py minilm snippets
    python examples/per_example.py

MiniLM with adapted query and value layers reads 32 snippets of movie reviews. One backward gives
the gradients of all cores for each snippet, which must equal the gradients from a loop over the
snippets. The snippets with the largest gradients are printed. Takes a few seconds.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common import Batch, minilm_classifier, parse_options, rated_texts, tokenized
from lotr_ext import LoTRConfig, TaskBank, apply_lotr, use_tasks


def named_cores(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the core of each layer."""
    return {name: p for name, p in model.named_parameters() if name.endswith(".core")}


def gradients(model: nn.Module, bank: TaskBank, batch: Batch) -> list[Tensor]:
    """Returns, per layer, each example's gradient with respect to the core [examples, r_in, r_out].

    The loss is a sum over the examples, so that no gradient is divided by their number.
    """
    bank.zero_grad()
    examples = len(batch.ids)
    with use_tasks(model, torch.arange(examples)):
        cross_entropy(model(batch.ids), batch.labels, reduction="sum").backward()
    return [core.grad[:examples].clone() for core in bank.cores]


def gradients_by_a_loop(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Returns the same gradients from one backward per example, of the cores of the layers."""
    cores = list(named_cores(model).values())
    gradients_of_examples = []
    for row, label in zip(batch.ids, batch.labels):
        loss = cross_entropy(model([row]), label[None])
        gradients_of_examples.append(torch.autograd.grad(loss, cores))
    return [torch.stack(layer) for layer in zip(*gradients_of_examples)]


def main(argv: list[str] | None = None) -> None:
    options = parse_options(__doc__, argv, examples=32, rank=8)
    model, tokenize = minilm_classifier()
    apply_lotr(model, LoTRConfig(rank=options.rank, target_modules=["query", "value"]))
    for core in named_cores(model).values():
        nn.init.normal_(core, std=0.01)  # as after some training
    training, _ = rated_texts("movie_snippets.tsv", 1)
    examples = training[: options.examples]
    batch = tokenized(examples, tokenize)

    expected = gradients_by_a_loop(model, batch)
    bank = TaskBank(model, len(examples))
    for _ in examples:
        bank.add(named_cores(model))
    bank.requires_grad_()
    computed = gradients(model, bank, batch)
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(computed, expected))
    print(
        f"{len(examples)} examples x {len(computed)} layers: "
        f"relative difference to a loop at most {worst:.1e}"
    )
    assert worst < 1e-4
    norms = sum(gradient.flatten(1).square().sum(1) for gradient in computed).sqrt()
    for i in norms.topk(min(3, len(examples))).indices.tolist():
        label = "positive" if examples[i].label else "negative"
        print(f"gradient {norms[i]:.3f}, labeled {label}: {examples[i].text}")


if __name__ == "__main__":
    main()
