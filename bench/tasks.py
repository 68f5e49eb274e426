"""A batch whose rows have tasks of their own: a training step, and serving, over one adapter's.

    python -m bench.tasks                     64 rows of 16 tokens, 1,000 tasks, width 512, 4 blocks, r = 16
    python -m bench.tasks --shapes 64x1x1000x512x4x16

A shape is rows x tokens a row x tasks x width x blocks x rank. The model is a small Llama of random weights, whose q, k, v and
o are adapted. train: forward, backward and AdamW on the cores alone; the bank's step moves all tasks. serve: a forward without
a gradient; PEFT's LoRA by `adapter_names` runs one adapter after another. Each round draws the rows' tasks again.
"lotr_ext-row": a task a row; "-token": a task a token; "-half": a task a row for the second half of its tokens, the base for
the first. task: the bytes of one task, cores or a LoRA.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .common import Case, Group, Program, Step, sizes
from .rivals import chosen, dtype_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
KEY = ("rows", "tokens", "tasks", "hidden", "blocks", "r")
SHAPES = {
    "cpu": "64x16x1000x512x4x16,64x1x1000x512x4x16",
    "cuda": "64x64x1000x2048x8x16,64x1x1000x2048x8x16",
}
FLOOR, BANKED = "lotr_ext-one", ("lotr_ext-row", "lotr_ext-token", "lotr_ext-half")
WAYS = {
    "train": (FLOOR, *BANKED),
    "serve": ("frozen", FLOOR, *BANKED, "lora-peft-one", "lora-peft-row"),
}
PEFT_TASKS = 64  # LoRA adapters in PEFT's model: as many as rows have in a batch


def cases(options: argparse.Namespace) -> list[Case]:
    shapes = options.shapes or sizes(*KEY)(SHAPES[options.device])
    return [{"mode": mode, **shape} for shape in shapes for mode in WAYS]


def transformer(case: Case, dtype: torch.dtype, device: str) -> nn.Module:
    """A causal language model with fixed random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": case["hidden"],
        "intermediate_size": 4 * case["hidden"],
        "num_hidden_layers": case["blocks"],
    }
    heads = max(1, case["hidden"] // 64)
    config = LlamaConfig(
        **shape,
        num_attention_heads=heads,
        vocab_size=2048,
        max_position_embeddings=512,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device, dtype).eval()


class Batch:
    """The tokens, and the tasks of the rows, which `deal` draws for each round."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 2048, (case["rows"], case["tokens"]), generator=generator).to(
            device
        )
        self.deal(random.Random(0))

    def deal(self, draw: random.Random) -> None:
        rows, tasks = self.case["rows"], self.case["tasks"]
        chosen = (
            draw.sample(range(tasks), rows)
            if rows <= tasks
            else [draw.randrange(tasks) for _ in range(rows)]
        )
        self.tasks = torch.tensor(chosen, device=self.device)

    def index(self, way: str) -> Tensor:
        """[rows], or [rows, tokens] with -1 for the base."""
        rows, tokens = self.case["rows"], torch.arange(self.case["tokens"], device=self.device)
        if way == "lotr_ext-token":
            return self.tasks[(torch.arange(rows, device=self.device).unsqueeze(1) + tokens) % rows]
        if way == "lotr_ext-half":
            return torch.where(tokens < len(tokens) // 2, -1, self.tasks.unsqueeze(1))
        return self.tasks


def our_model(
    way: str, case: Case, batch: Batch, dtype: torch.dtype
) -> tuple[list[nn.Parameter], Callable, int]:
    """(cores, a function that runs the batch, bytes of a task)."""
    from lotr_ext import LoTRConfig, TaskBank, apply_lotr, disabled, use_tasks

    model = apply_lotr(
        transformer(case, dtype, batch.device), LoTRConfig(rank=case["r"], target_modules=TARGETS)
    )
    model.requires_grad_(False)
    cores = [p for name, p in model.named_parameters() if name.endswith("core")]
    task_bytes = sum(core.nbytes for core in cores)
    if way not in (FLOOR, "frozen"):
        bank = TaskBank(model, case["tasks"])
        for _ in range(case["tasks"]):
            bank.add()
        cores = list(bank.cores)
    for core in cores:
        nn.init.normal_(core.requires_grad_())

    def run() -> Tensor:
        plain = disabled(model) if way == "frozen" else contextlib.nullcontext()
        with use_tasks(model, batch.index(way)) if way in BANKED else plain:
            return model(input_ids=batch.ids).logits

    return cores, run, task_bytes


def peft_model(
    way: str, case: Case, batch: Batch, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], int]:
    """(a function that runs the batch, bytes of a task)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=case["r"], target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(transformer(case, dtype, batch.device), config, adapter_name="t0")
    for i in range(1, PEFT_TASKS if way == "lora-peft-row" else 1):
        model.add_adapter(f"t{i}", config)
    task_bytes = sum(p.nbytes for name, p in model.named_parameters() if ".t0." in name)

    def run() -> Tensor:
        names = (
            [f"t{i % PEFT_TASKS}" for i in range(case["rows"])] if way == "lora-peft-row" else None
        )
        return model.eval()(
            input_ids=batch.ids, **({"adapter_names": names} if names else {})
        ).logits

    return run, task_bytes


def check_moved(way: str, cores: list[nn.Parameter], step: Step, batch: Batch) -> None:
    """Raises ArithmeticError unless one backward gives a gradient to the batch's tasks alone."""
    step.run()
    if way in BANKED:
        got = (
            torch.stack([core.grad.flatten(1).any(1) for core in cores]).any(0).nonzero().flatten()
        )
        if not torch.equal(got, batch.tasks.unique()):
            raise ArithmeticError(
                f"{way}: expected gradients of {batch.case['rows']} tasks, got {len(got)}"
            )


def build(case: Case, options: argparse.Namespace) -> Group:
    batch, steps = Batch(case, options.device), {}
    for way in chosen(options.rivals, WAYS[case["mode"]], WAYS[case["mode"]]):
        if way.startswith("lora"):
            run, task_bytes = peft_model(way, case, batch, dtype_of(case))
            steps[way] = Step(
                {"forward": torch.no_grad()(lambda _, run=run: run())},
                facts={"task_bytes": task_bytes},
            )
            continue
        cores, run, task_bytes = our_model(way, case, batch, dtype_of(case))
        facts = {"task_bytes": 0 if way == "frozen" else task_bytes}
        if case["mode"] == "serve":
            steps[way] = Step({"forward": torch.no_grad()(lambda _, run=run: run())}, facts=facts)
            continue
        optimizer = torch.optim.AdamW(cores, lr=1e-3, weight_decay=0.0, fused=True)
        stages = {
            "forward": lambda _, run=run: run().float().square().mean(),
            "backward": lambda loss: loss.backward(),
            "optimizer": lambda _, optimizer=optimizer: optimizer.step(),
        }
        steps[way] = Step(stages, optimizer.zero_grad, facts=facts)
        check_moved(way, cores, steps[way], batch)
    return Group(steps, batch.deal)


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        type=sizes(*KEY),
        help="rows x tokens x tasks x width x blocks x rank, comma-separated",
    )


FORM = (
    "{mode}, {rows} rows of {tokens} tokens, {tasks} tasks, width {hidden}, {blocks} blocks, r {r}"
)
PROGRAM = Program(
    "tasks",
    __doc__,
    cases,
    build,
    FORM,
    floor=FLOOR,
    slice_s=0.0,
    dtypes="fp32",
    options=more_options,
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
