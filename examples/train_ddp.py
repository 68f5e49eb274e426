"""Fine-tune the demo's text encoder with LoTR in several processes, by DistributedDataParallel or sharded by FSDP2.

    torchrun --nproc-per-node 2 examples/train_ddp.py                 a replica in each process, on the CPU
    torchrun --nproc-per-node 2 examples/train_ddp.py --shard         FSDP2: each process holds a part of every tensor
    torchrun --nproc-per-node 2 examples/train_ddp.py --text mine.tsv --model folder --targets q_proj,v_proj

A and B each get one gradient per step, whatever the number of layers, so each is reduced once. Process 0 writes the adapter,
and every process loads it into a fresh model, whose accuracy must be the same. No network is used.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from finetune_text import Bar, check_folder, check_seed, end, labelled

ROOT = Path(__file__).resolve().parent.parent


def common_options(description: str, batch: str, out: str) -> argparse.ArgumentParser:
    """The options of this program, train_tp.py and train_pp.py. batch: the unit of --batch. out: the folder's name."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (16)")
    parser.add_argument("--targets", default="query,value", help="names of the adapted layers (query,value)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (100)")
    parser.add_argument("--batch", type=int, default=16, help=f"examples per {batch} (16)")
    parser.add_argument("--seed", type=int, default=0, help="seed (0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process (1)")
    parser.add_argument("--model", default=str(ROOT / "data" / "all-minilm-l6-v2"), help="a Hugging Face model folder")
    parser.add_argument("--text", help="a .tsv or .csv file of label and text, instead of the movie snippets")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out examples (1000, with --text a fifth at most)")
    parser.add_argument("--out", default=str(ROOT / "demo_results" / out), help="folder for the adapter")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def check_options(options: argparse.Namespace, program: str) -> argparse.Namespace:
    """Raises ValueError for an invalid option, or if torchrun did not start the program."""
    for name, value in vars(options).items():
        if type(value) is int and name != "seed" and value < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {value}")
    check_seed(options.seed)
    check_folder(options.out)
    options.targets = [t for t in options.targets.split(",") if t]
    if not options.targets:
        raise ValueError("targets: expected names of layers, got none")
    if "RANK" not in os.environ:
        raise ValueError(f"processes: expected to be started by torchrun: torchrun --nproc-per-node 2 examples/{program}.py")
    return options


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common_options(__doc__.split("\n")[0], "step and process", "ddp")
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DistributedDataParallel")
    return check_options(parser.parse_args(argv), "train_ddp")


def build(options: argparse.Namespace, classes: int, seed: int):
    """(a plain model with a new head, text -> token ids)"""
    import text_model as tm

    encoder, tokenize = tm.load_encoder(Path(options.model))
    return tm.build(encoder, classes, seed), tokenize


def fit(net, options: argparse.Namespace, recipe, batches, show: bool, mean: Callable = lambda loss: loss) -> float:
    """Trains net on this process's batches. Returns seconds per step. show: a bar. mean: averages a loss over processes."""
    import text_model as tm

    optimizer, schedule = tm.optimizer_for(net, recipe, options.steps)
    losses, start = [], time.perf_counter()
    with Bar("LoTR", options.steps, show) as bar:
        for _ in range(options.steps):
            loss = tm.train_step(net, batches, optimizer, schedule)
            losses.append(mean(loss.detach()).item())
            bar.step(losses)
    return (time.perf_counter() - start) / options.steps


def distribute(model, shard: bool):
    """The adapted model as a replica in each process, or sharded."""
    from torch import nn

    if not shard:
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for blocks in [m for m in model.modules() if type(m) is nn.ModuleList]:
        for block in blocks:
            fully_shard(block)
    return fully_shard(model)  # the rest, including the factors, which are gathered once per forward


def accuracy(model, ids: list, labels, total: int) -> float:
    """The accuracy over the examples of all processes, each of which has a part."""
    import torch
    import torch.distributed as dist

    import text_model as tm

    right = (tm.predict(model, ids).argmax(1) == labels).sum().to(torch.float64)
    dist.all_reduce(right)
    return right.item() / total


def run(options: argparse.Namespace) -> None:
    """Runs in each process."""
    import torch
    import torch.distributed as dist

    import text_model as tm
    from lotr_ext import LoTRConfig, apply_lotr, load_adapter, save_adapter, trainable_summary

    torch.set_num_threads(options.threads)
    rank, world = dist.get_rank(), dist.get_world_size()
    examples, names, wanted = labelled(options)
    train, test = tm.split(examples, max(world, wanted // world * world))  # divisible by world, for FSDP2
    model, tokenize = build(options, len(names), options.seed)
    recipe = tm.RECIPES["lotr"]
    config = LoTRConfig(rank=options.rank, scaling=recipe.scaling, target_modules=options.targets, modules_to_save=["head"])
    apply_lotr(model, config)
    if rank == 0:
        print(trainable_summary(model))
    net = distribute(model, options.shard)
    mine = train[rank::world]
    batches = tm.Batches(tokenize([t for t, _ in mine]), [c for _, c in mine], options.batch, options.seed)

    def mean(loss: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(loss := loss / world)
        return loss

    seconds = fit(net, options, recipe, batches, rank == 0 and not options.quiet, mean)

    own = test[rank::world]
    ids, labels = tokenize([t for t, _ in own]), torch.tensor([c for _, c in own])
    reached = accuracy(net, ids, labels, len(test))
    save_adapter(net, options.out)  # all processes call it: the parts are gathered, process 0 writes
    dist.barrier()
    fresh, _ = build(options, len(names), options.seed + 1)
    loaded = accuracy(load_adapter(fresh, options.out), ids, labels, len(test))
    if rank == 0:
        how = "FSDP2" if options.shard else "DistributedDataParallel"
        print(f"{how}, {world} processes, {options.steps} steps of {world} x {options.batch}: {seconds:.3f} s per step")
        print(f"held-out accuracy {reached:.2%}; a fresh model with the saved adapter: {loaded:.2%}; wrote {options.out}")
    if abs(loaded - reached) > 2 / len(test):
        raise RuntimeError(f"saved adapter: expected an accuracy of {reached}, got {loaded}")


def start(options: argparse.Namespace, run: Callable[[argparse.Namespace], None]) -> int:
    """run(options) in a process that torchrun has started."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch.distributed as dist

    dist.init_process_group("gloo")  # the model stays on the CPU
    try:
        run(options)
    finally:
        dist.destroy_process_group()
    return 0


def main(argv: list[str] | None = None) -> int:
    return start(arguments(argv), run)


if __name__ == "__main__":
    end(main, "train_ddp")
