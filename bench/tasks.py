"""The time of a batch with a task per row, over the same batch with one adapter.

    python -m bench.tasks                     64 rows of 16 tokens, then of 1; 1,000 tasks, width
                                              512, 4 blocks (GPU: 64 tokens, width 2,048, 8 blocks)
    python -m bench.tasks --shapes 64x1x1000x512x4x16

A shape is rows x tokens per row x tasks x width x blocks x rank. The model is a small Llama of
random weights. Its q, k, v and o are adapted.

    train   forward, backward and AdamW on the cores; its step runs through all tasks of the bank
    serve   a forward without a gradient. PEFT's LoRA by `adapter_names` runs one adapter after
            another

Each round draws the tasks of the rows again. "lotr_ext-row" has a task per row, "-token" a task per
token. "-half" has a task per row for the second half of its tokens, the base for the first. task:
the bytes of one task, cores or a LoRA.
"""

import argparse
import random
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lotr_ext import LoTRConfig, TaskBank, apply_lotr, use_tasks

from .common import Case, dtype_of
from .model import llama, random_model, trained
from .program import Program
from .timing import Group, Step, training

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
VOCABULARY = 2048
DIMENSIONS = ("rows", "tokens", "tasks", "hidden", "blocks", "r")
FLOOR = "lotr_ext-one"
BANKED = ("lotr_ext-row", "lotr_ext-token", "lotr_ext-half")  # with a bank of tasks
RIVALS = ("frozen", FLOOR, *BANKED, "lora-peft-one", "lora-peft-row")
MODES = {"train": (FLOOR, *BANKED), "serve": RIVALS}  # the rivals of each
PEFT_TASKS = 64  # LoRA adapters in PEFT's model: one per row of a batch


def cases(options: argparse.Namespace) -> list[Case]:
    return [{"mode": mode, **shape} for shape in options.shapes for mode in MODES]


def transformer(case: Case, dtype: torch.dtype, device: str) -> nn.Module:
    settings = llama(
        hidden=case["hidden"],
        layers=case["blocks"],
        heads=max(1, case["hidden"] // 64),
        inner=4 * case["hidden"],
        vocabulary=VOCABULARY,
    )
    return random_model("causal-lm", settings, dtype, device).eval()


class Batch:
    """The batch of all rivals.

    Attributes:
        ids: The tokens [rows, tokens].
        tasks: The task of each row [rows], drawn again for each round.
    """

    def __init__(self, case: Case, device: str):
        self.case = case
        self.device = device
        size = (case["rows"], case["tokens"])
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, VOCABULARY, size, generator=generator).to(device)
        self.draw_tasks(random.Random(0))

    def draw_tasks(self, rng: random.Random) -> None:
        rows = self.case["rows"]
        tasks = range(self.case["tasks"])
        drawn = rng.sample(tasks, rows) if rows <= len(tasks) else rng.choices(tasks, k=rows)
        self.tasks = torch.tensor(drawn, device=self.device)

    def index(self, rival: str) -> Tensor:
        """Returns the task of each row [rows], or of each token [rows, tokens], -1 for the base."""
        tokens = torch.arange(self.case["tokens"], device=self.device)
        if rival == "lotr_ext-token":
            # Token t of row r has the task of row r + t, modulo the rows.
            rows = torch.arange(self.case["rows"], device=self.device).unsqueeze(1)
            return self.tasks[(rows + tokens) % self.case["rows"]]
        if rival == "lotr_ext-half":
            return torch.where(tokens < len(tokens) // 2, -1, self.tasks.unsqueeze(1))
        return self.tasks


class Adapted(NamedTuple):
    """A model of one rival.

    Attributes:
        run: Computes the logits of the batch.
        cores: The parameters that a step trains.
        task_bytes: The size of one task.
    """

    run: Callable[[], Tensor]
    cores: list[nn.Parameter]
    task_bytes: int


def our_model(rival: str, case: Case, batch: Batch, dtype: torch.dtype) -> Adapted:
    model = transformer(case, dtype, batch.device)
    if rival == "frozen":
        return Adapted(lambda: model(input_ids=batch.ids).logits, [], 0)
    apply_lotr(model, LoTRConfig(rank=case["r"], target_modules=TARGETS, train=("core",)))
    cores = trained(model)
    task_bytes = sum(core.nbytes for core in cores)
    if rival in BANKED:
        bank = TaskBank(model, case["tasks"])
        for _ in range(case["tasks"]):
            bank.add()
        cores = list(bank.cores)
    # A new core is zero. Random ones make the outputs of tasks differ.
    for core in cores:
        nn.init.normal_(core.requires_grad_())

    def run() -> Tensor:
        if rival == FLOOR:
            return model(input_ids=batch.ids).logits
        with use_tasks(model, batch.index(rival)):
            return model(input_ids=batch.ids).logits

    return Adapted(run, cores, task_bytes)


def peft_model(rival: str, case: Case, batch: Batch, dtype: torch.dtype) -> Adapted:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=case["r"], target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(transformer(case, dtype, batch.device), config, adapter_name="t0")
    task_bytes = sum(p.nbytes for p in trained(model))
    arguments: dict[str, object] = {"input_ids": batch.ids}
    if rival == "lora-peft-row":
        for i in range(1, PEFT_TASKS):
            model.add_adapter(f"t{i}", config)
        arguments["adapter_names"] = [f"t{i % PEFT_TASKS}" for i in range(case["rows"])]
    model.eval()
    return Adapted(lambda: model(**arguments).logits, [], task_bytes)


def check_gradients(cores: list[nn.Parameter], batch: Batch) -> None:
    """Checks which tasks have a gradient.

    Raises:
        ArithmeticError: Unless they are exactly the tasks of the batch.
    """
    # A core is [tasks, ..]. A task has a gradient if its part is not zero in some layer.
    has_gradient = torch.stack([core.grad.flatten(1).any(1) for core in cores]).any(0)
    tasks = has_gradient.nonzero().flatten()
    if not torch.equal(tasks, batch.tasks.unique()):
        raise ArithmeticError(
            f"expected gradients of the batch's tasks, got gradients of {len(tasks)} tasks"
        )


def build(case: Case, options: argparse.Namespace) -> Group:
    batch = Batch(case, options.device)

    def step_of(rival: str) -> Step:
        make = peft_model if rival.startswith("lora") else our_model
        adapted = make(rival, case, batch, dtype_of(case))
        facts = {"task_bytes": adapted.task_bytes}
        if case["mode"] == "serve":
            return Step({"forward": torch.no_grad()(lambda _: adapted.run())}, facts=facts)

        def loss() -> Tensor:
            return adapted.run().float().square().mean()

        optimizer = torch.optim.AdamW(adapted.cores, lr=1e-3, weight_decay=0.0, fused=True)
        step = training(loss, None, adapted.cores, optimizer, facts=facts)
        if rival in BANKED:
            step.run()
            check_gradients(adapted.cores, batch)
        return step

    names = [name for name in MODES[case["mode"]] if name in (options.rivals or RIVALS)]
    return Group(names, step_of, batch.draw_tasks)


PROGRAM = Program(
    name="tasks",
    doc=__doc__,
    rivals=RIVALS,
    build=build,
    title_format=(
        "{mode}, {rows} rows of {tokens} tokens, {tasks} tasks, width {hidden}, "
        "{blocks} blocks, r {r}"
    ),
    dimensions=DIMENSIONS,
    shapes={
        "cpu": "64x16x1000x512x4x16,64x1x1000x512x4x16",
        "cuda": "64x64x1000x2048x8x16,64x1x1000x2048x8x16",
    },
    cases=cases,
    floor=FLOOR,
    measurement_s=0.0,
    dtypes="fp32",
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
