"""Fine-tune the demo's text encoder with LoTR and tensor parallelism: the weights of each block are divided among processes.

    torchrun --nproc-per-node 2 examples/train_tp.py                 half of each weight in each process, on the CPU
    torchrun --nproc-per-node 2 examples/train_tp.py --text mine.tsv --model folder --targets query,value

All processes have the whole A, B and cores, and the same batches. One all-reduce per step sums the gradients of the adapter,
whatever the number of layers. Process 0 writes the adapter, and every process loads it into a whole model, whose accuracy must
be the same. No network is used.
"""

from __future__ import annotations

import argparse

from finetune_text import end, labelled
from train_ddp import build, check_options, common_options, fit, start

ROWS, COLUMNS = ("query", "key", "value", "intermediate.dense"), ("attention.output.dense", "output.dense")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    return check_options(common_options(__doc__.split("\n")[0], "step", "tp").parse_args(argv), "train_tp")


def plan(encoder, processes: int) -> dict:
    """The styles by which `parallelize_module` divides the blocks of a BERT-like encoder, by the names of its layers."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if (heads := encoder.config.num_attention_heads) % processes:
        raise ValueError(f"processes: expected a divisor of {heads} attention heads, got {processes}")
    found = {}
    for name, _ in encoder.named_modules():
        if name.startswith("encoder.layer.") and name.endswith(ROWS):
            found[name] = ColwiseParallel()
        elif name.startswith("encoder.layer.") and name.endswith(COLUMNS):
            found[name] = RowwiseParallel()
    return found


def run(options: argparse.Namespace) -> None:
    """Runs in each process."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    import text_model as tm
    from lotr_ext import LoTRConfig, apply_lotr, load_adapter, save_adapter, trainable_summary

    torch.set_num_threads(options.threads)
    rank, world = dist.get_rank(), dist.get_world_size()
    examples, names, wanted = labelled(options)
    train, test = tm.split(examples, wanted)
    model, tokenize = build(options, len(names), options.seed)
    recipe = tm.RECIPES["lotr"]
    config = LoTRConfig(rank=options.rank, scaling=recipe.scaling, target_modules=options.targets, modules_to_save=["head"])
    apply_lotr(model, config)
    parallelize_module(model.encoder, init_device_mesh("cpu", (world,)), plan(model.encoder, world))
    if rank == 0:
        print(trainable_summary(model))
    batches = tm.Batches(tokenize([t for t, _ in train]), [c for _, c in train], options.batch, options.seed)  # same everywhere
    seconds = fit(model, options, recipe, batches, rank == 0 and not options.quiet)

    ids, labels = tokenize([t for t, _ in test]), torch.tensor([c for _, c in test])
    reached = (tm.predict(model, ids).argmax(1) == labels).float().mean().item()
    save_adapter(model, options.out)  # all processes call it, process 0 writes
    dist.barrier()
    whole, _ = build(options, len(names), options.seed + 1)
    loaded = (tm.predict(load_adapter(whole, options.out), ids).argmax(1) == labels).float().mean().item()
    if rank == 0:
        print(f"tensor parallel, {world} processes, {options.steps} steps of {options.batch}: {seconds:.3f} s per step")
        print(f"held-out accuracy {reached:.2%}; a whole model with the saved adapter: {loaded:.2%}; wrote {options.out}")
    if abs(loaded - reached) > 2 / len(test):
        raise RuntimeError(f"saved adapter: expected an accuracy of {reached}, got {loaded}")


def main(argv: list[str] | None = None) -> int:
    return start(arguments(argv), run)


if __name__ == "__main__":
    end(main, "train_tp")
