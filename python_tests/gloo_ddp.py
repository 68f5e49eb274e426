"""As `gloo_checks`, under DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from gloo_checks import OTHERS, Collectives, batch, error, few_tokens, loss, on_all_paths, on_path, step, truth
from stacks import make
from torch.nn.parallel import DistributedDataParallel

from lotr_ext import save_adapter


def ddp(rank: int, folder: Path) -> dict:
    """Relative errors by case and path."""
    one, two, x = truth(), truth(2), batch(rank)
    found = {}

    def case(
        name: str, turn: int | None, *, reentrant: bool | None = None, settings: dict[str, str] | None = None, **options
    ) -> None:
        """turn: None for all paths."""
        want = truth(**settings) if settings else one

        def check() -> float:
            model = DistributedDataParallel(make(reentrant=reentrant, **settings or {}), **options)
            step(model, x.clone().requires_grad_(reentrant is not None))
            return error(model, want)

        found[name] = on_all_paths(check) if turn is None else on_path(turn, check)

    case("plain", None)
    case("find_unused_parameters", 0, find_unused_parameters=True)
    case("static_graph", 1, static_graph=True)
    case("non-reentrant checkpointing", 0, reentrant=False)
    case("non-reentrant checkpointing, find_unused_parameters", 1, reentrant=False, find_unused_parameters=True)
    case("reentrant checkpointing, static_graph", None, reentrant=True, static_graph=True)
    case("gradients as views of buckets", 2, gradient_as_bucket_view=True)
    for i, (what, settings) in enumerate(OTHERS.items()):
        case(what, i, settings=settings)
        case(f"{what}, non-reentrant checkpointing", i + 1, reentrant=False, settings=settings)

    def accumulated() -> float:
        model = DistributedDataParallel(make())
        with model.no_sync():
            loss(model, x).backward()
        loss(model, batch(rank, 1)).backward()
        return error(model, two)

    found["no_sync accumulation"] = on_all_paths(accumulated)

    def compiled() -> float:
        torch.compiler.reset()
        model = torch.compile(DistributedDataParallel(make()), backend="aot_eager")
        step(model, x)
        return error(model._orig_mod, one)

    found["torch.compile around DDP"] = {"composite": compiled()}

    def compiled_inside() -> float:
        torch.compiler.reset()
        model = DistributedDataParallel(torch.compile(make(), fullgraph=True, backend="aot_eager"))
        step(model, x)
        return error(model.module._orig_mod, one)

    found["DDP around torch.compile"] = {"composite": compiled_inside()}
    return found


def ddp_reductions(rank: int, folder: Path) -> dict:
    """How often A of the larger group came into a bucket that was reduced in one step, by number of layers."""
    found = {}
    for layers in (1, 4):
        for below in (0, 128):
            model = DistributedDataParallel(make(layers), bucket_cap_mb=1e-4)  # a bucket for each parameter
            seen: list[int] = []

            def hook(state, bucket, seen=seen):
                seen += [id(p) for p in bucket.parameters()]
                work = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
                return work.then(lambda future: future.value()[0])

            model.register_comm_hook(None, hook)
            with few_tokens(below), Collectives() as collectives:
                loss(model, batch(rank)).backward()
            factors = model.module.lotr_factors["16x16"]
            trained = sum(p.requires_grad for p in model.parameters())
            counts = [seen.count(id(factors.A)), seen.count(id(factors.B)), len(seen) - trained]
            found[f"{layers} blocks, {below}"] = [*counts, collectives.calls["allreduce"] <= trained]
    return found


def ddp_saves_once(rank: int, folder: Path) -> bool:
    """Only process 0 writes, whether the model is compiled around DDP or not; each may call."""
    model = DistributedDataParallel(make())
    own = folder / f"ddp-{rank}"
    save_adapter(model, own)
    save_adapter(torch.compile(model), own)
    return own.exists()
