"""Training in two processes, compared with one process: the checks of test_distributed.py and test_frameworks.py.

Run by torch.distributed.run: `python -m torch.distributed.run --nproc-per-node 2 distributed.py RESULTS CHECK ..`. Each check
returns the largest relative error of the parameters' changes, or of the tensors that it names, or a count.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import worst
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lotr_ext import (
    LoTRConfig,
    apply_lotr,
    load_adapter,
    merge,
    save_adapter,
    sharded,
    unload,
)
from lotr_ext.core import dispatch
from lotr_ext.cores import FORMS

RATE, STEPS, WIDTH = 0.05, 3, 24
CONFIG = LoTRConfig(
    rank=4, scaling=0.5, target_modules=["q", "k", "v", "o"], modules_to_save=["head"]
)


class Block(nn.Module):
    """A gated mix of q, k and v, which read one x, and o. again: recomputed in backward, by which kind of checkpointing."""

    def __init__(self, again: str | None):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.again = again

    def mix(self, x: Tensor) -> Tensor:
        return x + self.o(torch.tanh(self.q(x) * self.k(x) + self.v(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.again is None:
            return self.mix(x)
        return checkpoint(self.mix, x, use_reentrant=self.again == "reentrant")


class Net(nn.Module):
    """Two blocks and a head that is trained whole: x [b, tokens, 24] -> [b, tokens, 5]."""

    def __init__(self, again: str | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(again) for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()  # reentrant checkpoints need an input with a gradient
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(again: str | None = None, dtype: torch.dtype = torch.float64, **settings: Any) -> Net:
    """An adapted Net, with the same values in all processes."""
    torch.manual_seed(0)
    net = apply_lotr(
        Net(again).to(dtype), LoTRConfig(**{**vars(CONFIG), "adapter_dtype": dtype, **settings})
    )
    for name, parameter in net.named_parameters():
        if name.endswith(".core"):
            nn.init.normal_(parameter, std=0.3)
    return net


def batch(rank: int, step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(2, 40, WIDTH, dtype=torch.float64, generator=generator).to(dtype)


def trained(net: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, whole."""
    found = {
        name: sharded.full_tensor(p).detach().clone()
        for name, p in net.named_parameters()
        if p.requires_grad
    }
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def train(net: nn.Module, ranks: list[int], call: Callable | None = None) -> dict[str, Tensor]:
    """How SGD on the mean loss of these ranks' batches changes each trained parameter. call: the wrapped model."""
    call, before = call or net, trained(net)
    dtype = next(net.parameters()).dtype
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(call(batch(r, step, dtype)).square().mean() for r in ranks) / len(ranks)).backward()
        optimizer.step()
    return {name: after - before[name] for name, after in trained(net).items()}


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    return (
        worst(got.values(), [want[name] for name in got]) if set(got) == set(want) else float("inf")
    )


def shard(net: Net, reshard: bool = False, **options: Any) -> Net:
    sharded.shard_factors(net, reshard_after_forward=reshard, **options)
    for block in net.blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
    return fully_shard(net, **options)


# ---- checks ----------------------------------------------------------------------------------------------------------


def ddp(again: str | None, settings: dict[str, Any] | None = None, **options: Any) -> float:
    net = build(again, **(settings or {}))
    return error(
        train(net, [dist.get_rank()], DistributedDataParallel(net, **options)),
        train(build(**(settings or {})), [0, 1]),
    )


def fsdp2(again: str | None = None, reshard: bool = False, **settings: Any) -> float:
    net = shard(build(again, **settings), reshard)
    return error(train(net, [dist.get_rank()]), train(build(**settings), [0, 1]))


def fsdp2_in_bfloat16(core: str) -> float:
    """FSDP2 that computes in bfloat16 against one process in float32. Returns 0 within 10 %."""
    settings = {"core": core, "dtype": torch.float32}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = shard(build(**settings), mp_policy=policy)
    changes = train(net, [dist.get_rank()])
    relative = error(changes, train(build(**settings), [0, 1]))
    return 0.0 if relative < 0.1 else relative


def fsdp2_collectives() -> list[int]:
    """The reductions of a step (two blocks, the root, A and B), and the gathers of the second of two steps."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    net, counts = shard(build()), {"foreach_reduce": 0, "foreach_all_gather": 0}

    def counted(name: str, real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return call

    net(batch(0, 0, torch.float64)).sum().backward()
    real = {name: getattr(groups, name) for name in counts}
    for name in counts:
        setattr(groups, name, counted(name, real[name]))
    net(batch(0, 1, torch.float64)).sum().backward()
    for name in counts:
        setattr(groups, name, real[name])
    return list(counts.values())


def shared_folder() -> str:
    """A new folder, the same one in both processes."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return folder[0]


def saved_and_loaded(wrap: Callable[[Net], nn.Module], **settings: Any) -> float:
    """Trains, saves in both processes, loads into another wrapped model: the same full tensors.

    A forward without a backward comes before the save and the load. FSDP2 has gathered the
    parameters then.
    """
    folder = shared_folder()
    one, two = wrap(build(**settings)), wrap(build(**settings))
    train(sharded.unwrapped(one), [dist.get_rank()], one)
    x = batch(0, 0, settings.get("dtype", torch.float64))
    with torch.no_grad():
        y = one(x)
        two(x)
    sharded.save_adapter(one, folder)
    sharded.load_adapter(two, folder)
    plain = build(**settings)
    sharded.load_adapter(plain, folder)
    expected = trained(one)
    with torch.no_grad():
        outputs = worst([two(x), plain(x)], [y, y])
    return max(error(trained(two), expected), error(trained(plain), expected), outputs)


def saved_by_process_0() -> float:
    """`lotr_ext.save_adapter` of a DDP model: returns the number of wrong folders."""
    folder = Path(shared_folder(), str(dist.get_rank()))
    save_adapter(DistributedDataParallel(build()), folder)
    return float(folder.exists() != (dist.get_rank() == 0))


def unsharded_functions_are_refused() -> float:
    """What needs full tensors, of a sharded model. Returns how many calls do not raise."""
    model, folder = shard(build()), shared_folder()
    accepted = 0.0
    for call in (
        lambda: save_adapter(model, folder),
        lambda: load_adapter(model, folder),
        lambda: merge(model),
        lambda: unload(model, merge=True),
    ):
        if dist.get_rank() == 0 and not os.listdir(folder):
            save_adapter(build(), folder)
        dist.barrier()
        try:
            call()
            accepted += 1
        except TypeError as error:
            accepted += "shard" not in str(error)
    return accepted


def a_tied_head() -> float:
    """A sharded model whose head is tied to a frozen layer, saved and loaded."""

    def tied() -> Net:
        net = build()
        net.extra = nn.Linear(WIDTH, 5, bias=False, dtype=torch.float64)
        net.extra.weight = net.head.weight
        return net

    return saved_and_loaded(lambda net: shard(tied()))


def failure_reaches_all() -> float:
    """A save that fails in process 0 fails in process 1, too. Returns the number of processes without an error."""
    try:
        sharded.save_adapter(shard(build()), "/dev/null/adapter")
        failed = 0.0
    except (RuntimeError, OSError, ValueError):
        failed = 1.0
    count = torch.tensor(failed)
    dist.all_reduce(count)
    return 2.0 - count.item()


CHECKS: dict[str, Callable[[], Any]] = {
    "ddp": lambda: ddp(None),
    "ddp, a bucket view, static graph": lambda: ddp(
        None, static_graph=True, gradient_as_bucket_view=True
    ),
    "ddp, find_unused_parameters": lambda: ddp(None, find_unused_parameters=True),
    "ddp, checkpoints": lambda: ddp("non-reentrant"),
    "ddp, reentrant checkpoints": lambda: ddp("reentrant", static_graph=True),
    "fsdp2": lambda: fsdp2(),
    "fsdp2, resharded": lambda: fsdp2(reshard=True),
    "fsdp2, checkpoints": lambda: fsdp2("non-reentrant", reshard=True),
    "fsdp2, a factor a width": lambda: fsdp2(group_by="width"),
    "ddp, saved and loaded": lambda: saved_and_loaded(DistributedDataParallel),
    "fsdp2, saved and loaded": lambda: saved_and_loaded(shard),
    "fsdp2, saved and loaded, resharded": lambda: saved_and_loaded(partial(shard, reshard=True)),
    "fsdp2 without shard_factors, saved and loaded": lambda: saved_and_loaded(
        fully_shard, core="tucker"
    ),
    "ddp, saved by process 0": saved_by_process_0,
    "fsdp2, a tied head": a_tied_head,
    "fsdp2, functions for full tensors": unsharded_functions_are_refused,
    "a failed save": failure_reaches_all,
    "collectives": fsdp2_collectives,
}


for form in FORMS:
    CHECKS |= {
        f"ddp, {form}": partial(ddp, None, {"core": form}),
        f"ddp, {form}, saved and loaded": partial(
            saved_and_loaded, DistributedDataParallel, core=form
        ),
        f"fsdp2, {form}": partial(fsdp2, core=form),
        f"fsdp2, {form}, checkpoints": partial(fsdp2, "non-reentrant", True, core=form),
        f"fsdp2, {form}, saved and loaded": partial(saved_and_loaded, shard, core=form),
        f"fsdp2, {form}, bfloat16": partial(fsdp2_in_bfloat16, form),
    }


# ---- DeepSpeed -------------------------------------------------------------------------------------------------------


def zero_engine(stage: int, net: Net) -> Any:
    """DeepSpeed's engine around net, with SGD; even small tensors are held in parts."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: (
        None
    )  # an extension for speed, which takes minutes to compile
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=RATE)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=net, optimizer=optimizer, config=settings)[0]


def zero_steps(engine: Any, first: int, count: int) -> None:
    for step in range(first, first + count):
        engine.backward(engine(batch(dist.get_rank(), step, torch.float32)).square().mean())
        engine.step()


def zero(stage: int, again: str | None = None, **settings: Any) -> float:
    """Trains two steps, saves, loads into another engine, and takes the third step with that one."""
    folder = shared_folder()
    settings["dtype"] = torch.float32
    before, want = trained(build(**settings)), train(build(**settings), [0, 1])
    one, two = (zero_engine(stage, build(again, **settings)) for _ in range(2))
    zero_steps(one, 0, STEPS - 1)
    sharded.save_adapter(one, folder)
    sharded.load_adapter(two, folder)
    zero_steps(two, STEPS - 1, 1)
    return error(
        {name: tensor - before[name] for name, tensor in trained(two.module).items()}, want
    )


CHECKS |= {
    "zero 2": lambda: zero(2),
    "zero 3": lambda: zero(3),
    "zero 3, checkpoints": lambda: zero(3, "non-reentrant"),
}
CHECKS |= {f"zero 3, {form}": partial(zero, 3, core=form) for form in FORMS}


def main(results: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dispatch.LITTLE_WORK = 0  # siblings share u = x A, as with large inputs
    dist.init_process_group("gloo")
    found = {}
    for name in names:
        try:
            found[name] = CHECKS[name]()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
