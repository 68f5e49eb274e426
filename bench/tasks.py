"""A batch with a task per row, over the same batch with one adapter: a training step, and serving.

    python -m bench.tasks                     64 rows of 16 tokens, 1,000 tasks, width 512, 4 blocks
    python -m bench.tasks --shapes 64x1x1000x512x4x16

A shape is rows x tokens per row x tasks x width x blocks x rank. The model is a small Llama of
random weights. Its q, k, v and o are adapted.

    train   forward, backward and AdamW on the cores; its step moves all tasks of the bank
    serve   a forward without a gradient. PEFT's LoRA by `adapter_names` runs one adapter after
            another

Each round draws the tasks of the rows again. "lotr_ext-row" has a task per row, "-token" a task per
token. "-half" has a task per row for the second half of its tokens, the base for the first. task:
the bytes of one task, cores or a LoRA.
"""

import argparse
import contextlib
import random
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .common import Case, dtype_of
from .program import Program
from .timing import Group, Step

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
VOCABULARY = 2048
KEY = ("rows", "tokens", "tasks", "hidden", "blocks", "r")
SHAPES = {
    "cpu": "64x16x1000x512x4x16,64x1x1000x512x4x16",
    "cuda": "64x64x1000x2048x8x16,64x1x1000x2048x8x16",
}
FLOOR = "lotr_ext-one"
BANKED = ("lotr_ext-row", "lotr_ext-token", "lotr_ext-half")
ALL_WAYS = ("frozen", FLOOR, *BANKED, "lora-peft-one", "lora-peft-row")
WAYS = {"train": (FLOOR, *BANKED), "serve": ALL_WAYS}
PEFT_TASKS = 64  # LoRA adapters in PEFT's model: as many as rows have in a batch


def cases(options: argparse.Namespace) -> list[Case]:
    return [{"mode": mode, **shape} for shape in options.shapes for mode in WAYS]


def transformer(case: Case, dtype: torch.dtype, device: str) -> nn.Module:
    """Returns a causal language model with fixed random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case["hidden"],
        intermediate_size=4 * case["hidden"],
        num_hidden_layers=case["blocks"],
        num_attention_heads=max(1, case["hidden"] // 64),
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device, dtype).eval()


class Batch:
    """The tokens, and the tasks of the rows, which `deal` draws for each round."""

    def __init__(self, case: Case, device: str):
        self.case = case
        self.device = device
        size = (case["rows"], case["tokens"])
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, VOCABULARY, size, generator=generator).to(device)
        self.deal(random.Random(0))

    def deal(self, draw: random.Random) -> None:
        rows = self.case["rows"]
        tasks = range(self.case["tasks"])
        drawn = draw.sample(tasks, rows) if rows <= len(tasks) else draw.choices(tasks, k=rows)
        self.tasks = torch.tensor(drawn, device=self.device)

    def index(self, way: str) -> Tensor:
        """Returns the task of each row [rows], or of each token [rows, tokens], -1 for the base."""
        tokens = torch.arange(self.case["tokens"], device=self.device)
        if way == "lotr_ext-token":
            rows = torch.arange(self.case["rows"], device=self.device).unsqueeze(1)
            return self.tasks[(rows + tokens) % self.case["rows"]]
        if way == "lotr_ext-half":
            return torch.where(tokens < len(tokens) // 2, -1, self.tasks.unsqueeze(1))
        return self.tasks


def our_model(
    way: str, case: Case, batch: Batch, dtype: torch.dtype
) -> tuple[list[nn.Parameter], Callable[[], Tensor], int]:
    """Returns the cores, a function that runs the batch, and the bytes of a task."""
    from lotr_ext import LoTRConfig, TaskBank, apply_lotr, disabled, use_tasks

    config = LoTRConfig(rank=case["r"], target_modules=TARGETS)
    model = apply_lotr(transformer(case, dtype, batch.device), config)
    model.requires_grad_(False)
    cores = [p for name, p in model.named_parameters() if name.endswith("core")]
    task_bytes = sum(core.nbytes for core in cores)
    if way in BANKED:
        bank = TaskBank(model, case["tasks"])
        for _ in range(case["tasks"]):
            bank.add()
        cores = list(bank.cores)
    for core in cores:
        nn.init.normal_(core.requires_grad_())

    def run() -> Tensor:
        if way in BANKED:
            context = use_tasks(model, batch.index(way))
        else:
            context = disabled(model) if way == "frozen" else contextlib.nullcontext()
        with context:
            return model(input_ids=batch.ids).logits

    return cores, run, task_bytes


def peft_model(
    way: str, case: Case, batch: Batch, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], int]:
    """Returns a function that runs the batch, and the bytes of a task."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=case["r"], target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(transformer(case, dtype, batch.device), config, adapter_name="t0")
    arguments: dict[str, object] = {"input_ids": batch.ids}
    if way == "lora-peft-row":
        for i in range(1, PEFT_TASKS):
            model.add_adapter(f"t{i}", config)
        arguments["adapter_names"] = [f"t{i % PEFT_TASKS}" for i in range(case["rows"])]
    task_bytes = sum(p.nbytes for name, p in model.named_parameters() if ".t0." in name)
    model.eval()
    return lambda: model(**arguments).logits, task_bytes


def training_step(cores: list[nn.Parameter], run: Callable[[], Tensor], facts: dict) -> Step:
    optimizer = torch.optim.AdamW(cores, lr=1e-3, weight_decay=0.0, fused=True)
    stages = {
        "forward": lambda _: run().float().square().mean(),
        "backward": lambda loss: loss.backward(),
        "optimizer": lambda _: optimizer.step(),
    }
    return Step(stages, optimizer.zero_grad, facts=facts)


def check_moved(way: str, cores: list[nn.Parameter], step: Step, batch: Batch) -> None:
    """Runs a step.

    Raises:
        ArithmeticError: Unless exactly the tasks of the batch have a gradient.
    """
    step.run()
    if way not in BANKED:
        return
    has_gradient = torch.stack([core.grad.flatten(1).any(1) for core in cores]).any(0)
    moved = has_gradient.nonzero().flatten()
    if not torch.equal(moved, batch.tasks.unique()):
        raise ArithmeticError(
            f"{way}: expected gradients of {batch.case['rows']} tasks, got {len(moved)}"
        )


def build(case: Case, options: argparse.Namespace) -> Group:
    batch = Batch(case, options.device)
    dtype = dtype_of(case)

    def step_of(way: str) -> Step:
        if way.startswith("lora"):
            run, task_bytes = peft_model(way, case, batch, dtype)
        else:
            cores, run, task_bytes = our_model(way, case, batch, dtype)
        facts = {"task_bytes": 0 if way == "frozen" else task_bytes}
        if case["mode"] == "serve":
            return Step({"forward": torch.no_grad()(lambda _: run())}, facts=facts)
        step = training_step(cores, run, facts)
        check_moved(way, cores, step, batch)
        return step

    names = [name for name in WAYS[case["mode"]] if name in (options.rivals or ALL_WAYS)]
    return Group(names, step_of, batch.deal)


PROGRAM = Program(
    name="tasks",
    doc=__doc__,
    rivals=ALL_WAYS,
    build=build,
    form=(
        "{mode}, {rows} rows of {tokens} tokens, {tasks} tasks, width {hidden}, "
        "{blocks} blocks, r {r}"
    ),
    key=KEY,
    shapes=SHAPES,
    cases=cases,
    floor=FLOOR,
    slice_s=0.0,
    dtypes="fp32",
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
