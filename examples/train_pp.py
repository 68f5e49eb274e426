"""Fine-tune the demo's text encoder with LoTR as a pipeline: each process has some of the encoder's blocks.

    torchrun --nproc-per-node 2 examples/train_pp.py                     1F1B over two stages, on the CPU
    torchrun --nproc-per-node 3 examples/train_pp.py --schedule GPipe    three stages
    torchrun --nproc-per-node 2 examples/train_pp.py --text mine.tsv --model folder --targets query,value

Each stage has its own cores and replicas of A and B. After the last micro-batch, one all-reduce sums the gradients of the
replicas. All processes save one adapter together, and the last loads it into a whole model. No network is used.
"""

from __future__ import annotations

import argparse
import time

from finetune_text import Bar, end, labelled
from train_ddp import build, check_options, common_options, start


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common_options(__doc__.split("\n")[0], "step", "pp")
    parser.add_argument("--schedule", choices=("1F1B", "GPipe"), default="1F1B", help="1F1B or GPipe (1F1B)")
    parser.add_argument("--micro-batches", type=int, default=4, help="parts of a batch (4)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per text, longer ones are cut (32)")
    options = check_options(parser.parse_args(argv), "train_pp")
    if options.batch % options.micro_batches:
        raise ValueError(f"batch: expected a multiple of {options.micro_batches} micro-batches, got {options.batch}")
    return options


def stage_of(model, index: int, stages: int):
    """The part of a BERT-like classifier that one stage has. Its layers keep their names."""
    import torch
    from torch import nn

    encoder, layers = model.encoder, list(model.encoder.encoder.layer)
    if stages > len(layers):
        raise ValueError(f"processes: expected at most one for each of {len(layers)} blocks, got {stages}")

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            own = range(index * len(layers) // stages, (index + 1) * len(layers) // stages)
            encoder.encoder.layer = nn.ModuleDict({str(i): layers[i] for i in own})
            encoder.embeddings = encoder.embeddings if index == 0 else None
            encoder.pooler = None
            self.encoder, self.head = encoder, model.head if index == stages - 1 else None

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = x if self.encoder.embeddings is None else self.encoder.embeddings(input_ids=x)
            seen = mask[:, None, None, :].to(x.dtype)
            for layer in self.encoder.encoder.layer.values():
                x = layer(x, attention_mask=(1 - seen) * torch.finfo(x.dtype).min)
            if self.head is None:
                return x
            weight = mask[..., None].to(x.dtype)
            return self.head((x * weight).sum(1) / weight.sum(1))

    return Stage()


def of_length(ids: list, tokens: int):
    """(token ids, mask) [batch, tokens]: the stages send each other tensors of one shape."""
    import torch.nn.functional as F

    import text_model as tm

    return [F.pad(t, (0, tokens - t.shape[1])) for t in tm.padded([row[:tokens] for row in ids])]


def run(options: argparse.Namespace) -> None:
    """Runs in each process."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    import text_model as tm
    from lotr_ext import LoTRConfig, PipelineStages, apply_lotr, load_adapter, save_adapter, trainable_summary

    torch.set_num_threads(options.threads)
    rank, world = dist.get_rank(), dist.get_world_size()
    last = rank == world - 1
    examples, names, wanted = labelled(options)
    train, test = tm.split(examples, wanted)
    model, tokenize = build(options, len(names), options.seed)
    recipe = tm.RECIPES["lotr"]
    saved = ["head"] if last else None
    config = LoTRConfig(rank=options.rank, scaling=recipe.scaling, target_modules=options.targets, modules_to_save=saved)
    stage = apply_lotr(stage_of(model, rank, world), config)
    stages = PipelineStages(stage)
    if rank == 0:
        print(f"stage 0 of {world}: {trainable_summary(stage)}")
    kind = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}[options.schedule]
    pipeline = kind(PipelineStage(stage, rank, world, torch.device("cpu")), options.micro_batches, loss_fn=F.cross_entropy)
    optimizer, schedule = tm.optimizer_for(stage, recipe, options.steps)
    batches = tm.Batches(tokenize([t for t, _ in train]), [c for _, c in train], options.batch, options.seed)  # same everywhere

    losses, start_s = [], time.perf_counter()
    with Bar("LoTR", options.steps, last and not options.quiet) as bar:
        for _ in range(options.steps):
            ids, target = batches.next()
            tokens, mask = of_length(ids, options.tokens)
            parts: list[torch.Tensor] = []
            optimizer.zero_grad()
            given = {"target": target, "losses": parts} if last else {}
            pipeline.step(*([tokens] if rank == 0 else []), mask=mask, **given)
            stages.reduce_gradients()
            stages.clip_grad_norm_(1.0)
            optimizer.step()
            schedule()
            losses.append(sum(part.item() for part in parts) / options.micro_batches)
            bar.step(losses)
    seconds = (time.perf_counter() - start_s) / options.steps

    ids, labels = tokenize([t for t, _ in test]), torch.tensor([c for _, c in test])
    tokens, mask = of_length(ids[: options.batch], options.tokens)
    given = {"target": labels[: options.batch]} if last else {}  # an evaluation computes the loss too
    out = pipeline.eval(*([tokens] if rank == 0 else []), mask=mask, **given)
    save_adapter(stages, options.out)  # all processes call it: the stages' parts are gathered, process 0 writes
    if last:
        whole, _ = build(options, len(names), options.seed + 1)
        load_adapter(whole, options.out).eval()
        reached = (tm.predict(whole, ids).argmax(1) == labels).float().mean().item()
        with torch.no_grad():
            apart = (whole(tokens, mask) - out).abs().max().item()
        print(f"{options.schedule}, {world} stages, {options.steps} steps of {options.batch}: {seconds:.3f} s per step")
        print(f"held-out accuracy of a whole model with the saved adapter: {reached:.2%}; wrote {options.out}")
        if not apart < 1e-3 * (1 + out.abs().max().item()):
            raise RuntimeError(f"saved adapter: expected the outputs of the pipeline, got others by up to {apart:.2g}")


def main(argv: list[str] | None = None) -> int:
    return start(arguments(argv), run)


if __name__ == "__main__":
    end(main, "train_pp")
