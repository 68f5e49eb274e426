"""The tasks and methods of bench.accuracy and bench.transfer, and how a model is trained.

    METHODS   what is trained: LoTR and its forms, LoRA, DoRA, VeRA, full fine-tuning
    TASKS     what it is trained on, and with how many steps and items
    Problem   the models, batches and losses of a task. There are three kinds: a synthetic teacher,
              a sentence encoder on rated texts, and a language model on a text
    adapt     makes a model trainable by a method
    fit       trains it

Not here: which runs are made, and what their tables show (accuracy.py, transfer.py).
"""

import copy
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lotr_ext import LoTRConfig, apply_lotr, init_from_gradient

from .common import ROOT

# `common` and `data` here are modules of the examples, which import each other by name.
sys.path.append(str(ROOT / "examples"))
from common import TextClassifier, minilm_classifier, rated_texts, tokenized
from data import DATA, MINILM, SMOLLM2

HEAD_LR = 1e-2  # the learning rate of a new head, whatever the method
SEQUENCE = 64  # tokens per row of a text


# ---- methods -------------------------------------------------------------------------------------


class ByKind(NamedTuple):
    """A value for each kind of task, by its name."""

    teacher: Any = ()
    classifier: Any = ()
    language: Any = ()


class Method(NamedTuple):
    """What is trained.

    Attributes:
        family: "lotr", "lora", "vera", or what is fully trained: "base" (nothing), "head", "norm",
            "full" (all adapted layers).
        ranks: Those that run. A method without ranks for a kind of task does not run on it.
        rates: Where the search for the learning rate begins. For LoTR, accuracy.LOTR_RATE
            multiplies it.
        settings: Arguments of LoTRConfig or of PEFT's configuration.
        from_gradient: Whether A and B start in the directions of the gradient.
    """

    family: str
    ranks: ByKind
    rates: ByKind = ByKind(teacher=5e-2, classifier=5e-3, language=5e-3)
    settings: Mapping[str, Any] = {}
    from_gradient: bool = False


CORE = {"train": ("core",)}
LORA_RATES = ByKind(teacher=2e-2, classifier=2e-3, language=2e-3)
METHODS = {
    # Without an adapter. There are no ranks: 0 stands for the one size.
    "base": Method(
        "base",
        ranks=ByKind(teacher=(0,), language=(0,)),
        rates=ByKind(teacher=0.0, classifier=0.0, language=0.0),
    ),
    "head": Method("head", ranks=ByKind(classifier=(0,)), rates=ByKind(classifier=HEAD_LR)),
    "full": Method(
        "full",
        ranks=ByKind(teacher=(0,), classifier=(0,), language=(0,)),
        rates=ByKind(teacher=1e-2, classifier=1e-4, language=1e-4),
    ),
    "norm": Method(
        "norm",
        ranks=ByKind(classifier=(0,), language=(0,)),
        rates=ByKind(teacher=5e-3, classifier=5e-3, language=5e-3),
    ),
    # LoTR, its groupings, and its forms.
    "lotr": Method(
        "lotr",
        ranks=ByKind(teacher=(1, 2, 4, 8, 16), classifier=(4, 8, 16, 28), language=(4, 24, 60)),
    ),
    "lotr-width": Method(
        "lotr",
        ranks=ByKind(classifier=(16,), language=(28,)),
        settings={"group_by": "width"},
    ),
    "lotr-block": Method(
        "lotr",
        ranks=ByKind(classifier=(1, 5), language=(6,)),
        settings={"group_by": "block"},
    ),
    "lotr-core": Method(
        "lotr",
        ranks=ByKind(teacher=(8, 16), classifier=(64,), language=(32,)),
        settings=CORE,
    ),
    "lotr-diagonal": Method(
        "lotr",
        ranks=ByKind(teacher=(5, 11, 16, 22, 45), classifier=(8,), language=(48,)),
        rates=ByKind(teacher=5e-2, classifier=2e-2, language=2e-2),
        settings={"core": "diagonal"},
    ),
    "lotr-gradient": Method(
        "lotr",
        ranks=ByKind(teacher=(4, 8), classifier=(8, 16)),
        from_gradient=True,
    ),
    "lotr-name": Method(
        "lotr",
        ranks=ByKind(classifier=(16,)),
        settings={"group_by": "name"},
    ),
    "lotr-core-gradient": Method(
        "lotr",
        ranks=ByKind(teacher=(8, 16), classifier=(64,), language=(32,)),
        settings=CORE,
        from_gradient=True,
    ),
    "lotr-tucker": Method("lotr", ranks=ByKind(teacher=(8,)), settings={"core": "tucker"}),
    "lotr-train": Method("lotr", ranks=ByKind(teacher=(8,)), settings={"core": "train"}),
    "lotr-few": Method(
        "lotr",
        ranks=ByKind(teacher=(8,), classifier=(32,), language=(32,)),
        settings={"core": "few", **CORE},
    ),
    # Factors from each layer's weight: LoRA-XS, arXiv 2405.17604.
    "lora-xs": Method(
        "lotr",
        ranks=ByKind(teacher=(8,), classifier=(32,), language=(32,)),
        settings={"init": "svd", "group_by": "layer", **CORE},
    ),
    # PEFT's methods.
    "lora": Method(
        "lora",
        ranks=ByKind(teacher=(1, 2, 4, 8), classifier=(1, 4, 8, 32), language=(1, 4, 16)),
        rates=LORA_RATES,
    ),
    "dora": Method(
        "lora",
        ranks=ByKind(teacher=(1, 4), classifier=(1,), language=(1,)),
        rates=LORA_RATES,
        settings={"use_dora": True},
    ),
    "vera": Method(
        "vera",
        ranks=ByKind(teacher=(64,), classifier=(256,), language=(256,)),
        rates=ByKind(teacher=2e-2, classifier=1e-2, language=1e-2),
    ),
}
ALL = ",".join(METHODS)


# ---- tasks ---------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A problem with the sizes of its runs.

    Attributes:
        kind: "teacher", "classifier" or "language".
        source: A file in data/. For a teacher, a number from "0.0" to "1.0": the part of its change
            that all layers share.
        steps: How many steps a run has.
        validation: How many items choose the learning rate.
        held_out: How many items give the reported loss.
        batch: How many items a step has.
        layers: A regular expression of the adapted layers' names.
        norms: A regular expression of the norm layers' names.
        methods: What runs on it, each with a rank or with its usual ones: "lotr:4,lora".
    """

    kind: str
    source: str
    steps: int
    validation: int
    held_out: int
    batch: int
    layers: str
    norms: str = ""
    methods: str = ALL


# The common fields of each kind of task. An entry of TASKS replaces some of them.
_teacher = partial(
    Task,
    "teacher",
    steps=400,
    validation=1000,
    held_out=2000,
    batch=64,
    layers=r"\d+\.(up|down)",
)
_classifier = partial(
    Task,
    "classifier",
    steps=100,
    validation=400,
    held_out=1000,
    batch=32,
    layers=r".*\.layer\.\d+\..*\.(query|key|value|dense)",
    norms=r".*\.LayerNorm",
    methods="head,full,lotr:4,lotr:16,lora:1,lora:4",
)
_language = partial(
    Task,
    "language",
    steps=60,
    validation=32,
    held_out=96,
    batch=4,
    layers=r".*\.layers\.\d+\..*_proj",
    norms=r".*(norm|layernorm)",
    methods="base,full,lotr,lotr-block:6,lotr-diagonal:48,lora:1,lora:4",
)
TASKS = {
    "teacher-shared": _teacher("1.0"),
    "teacher-half": _teacher("0.5"),
    "teacher-own": _teacher("0.0"),
    "minilm-movies": _classifier(
        "movie_snippets.tsv", steps=150, validation=500, held_out=1500, methods=ALL
    ),
    "minilm-tweets": _classifier("tweets.tsv"),
    "minilm-products": _classifier("product_snippets.tsv"),
    "minilm-editorials": _classifier("editorial_snippets.tsv"),
    "smollm2-kjv": _language("kjv.txt", methods=ALL),
    "smollm2-wycliffe": _language("wycliffe.txt"),
    "smollm2-verilog": _language("verilog.txt"),
}
BASES = {"classifier": MINILM, "language": SMOLLM2}  # folders of models, by kind of task


def shuffled_epochs(count: int, rng: random.Random) -> Iterator[int]:
    """Yields indices without end: each epoch has all of them, in a new order."""
    while True:
        epoch = list(range(count))
        rng.shuffle(epoch)
        yield from epoch


class Problem:
    """Models, batches and losses of a task.

    A subclass sets `base` and `parts`, and defines `losses(model, batch)`. It returns two tensors
    with a value per item: the loss, and the share of the model's answers that are right. A text has
    one answer, a row of tokens one per token, and NaN stands for items without answers.

    Attributes:
        base: The unadapted model.
        parts: The items of "training", "validation" and "held_out", each as tensors or arrays of
            one length: inputs and perhaps targets.
        measured_at_once: How many items `measure` gives to `losses` at a time.
    """

    measured_at_once = 100
    base: nn.Module
    parts: dict[str, tuple]

    def __init__(self, task: Task):
        self.task = task

    def model(self, seed: int) -> nn.Module:
        """Returns a fresh model. Only a new head depends on the seed."""
        return copy.deepcopy(self.base)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Yields batches of training items without end."""
        training = self.parts["training"]
        indices = shuffled_epochs(len(training[0]), random.Random(seed))
        while True:
            rows = [next(indices) for _ in range(self.task.batch)]
            yield tuple(t[rows] for t in training)

    def loss(self, model: nn.Module, batch: tuple) -> Tensor:
        return self.losses(model, batch)[0].mean()

    @torch.no_grad()
    def measure(self, model: nn.Module, part: str) -> tuple[Tensor, Tensor]:
        """Returns the results of `losses` for all items of a part, in float64."""
        order = self.order(part)
        outcomes = []
        for rows in order.split(self.measured_at_once):
            batch = tuple(values[rows] for values in self.parts[part])
            outcomes.append(torch.stack([result.double() for result in self.losses(model, batch)]))
        # argsort of a permutation is its inverse: the results come in the order of the items again.
        return tuple(torch.cat(outcomes, 1)[:, order.argsort()])

    def order(self, part: str) -> Tensor:
        return torch.arange(len(self.parts[part][0]))


# ---- a synthetic teacher -------------------------------------------------------------------------


class Teacher(Problem):
    """A small residual net learns what a changed copy of it computes, from noisy outputs.

    `task.source` is the part of a change's squared norm that is in spaces which all layers of one
    shape share. The loss is the squared error, divided by the unchanged net's without noise.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.base = nn.Sequential(*(Block() for _ in range(6)))
        teacher = changed(self.base, float(task.source), generator)
        counts = {"training": 2048, "validation": task.validation, "held_out": task.held_out}
        with torch.no_grad():
            inputs = {
                part: torch.randn(items, 32, generator=generator) for part, items in counts.items()
            }
            outputs = {part: teacher(x) for part, x in inputs.items()}
            differences = outputs["training"] - self.base(inputs["training"])
        self.unit = differences.square().mean().item()
        noise = 0.2 * differences.std()
        self.parts = {
            part: (inputs[part], y + noise * torch.randn(y.shape, generator=generator))
            for part, y in outputs.items()
        }

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        losses = (model(x) - y).square().mean(1) / self.unit
        return losses, torch.full_like(losses, torch.nan)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(h)))


@torch.no_grad()
def changed(net: nn.Sequential, shared: float, generator: torch.Generator) -> nn.Sequential:
    """Returns a copy of net with a change of low rank in every weight.

    A change is sqrt(shared) L M R^T + sqrt(1 - shared) L' M' R'^T, each product of rank 4 and norm
    1, scaled to half the norm of the weight. All layers of a shape have the same L and R.
    """
    teacher = copy.deepcopy(net)

    def spaces(n: int, k: int) -> list[Tensor]:
        return [torch.linalg.qr(torch.randn(d, 4, generator=generator)).Q for d in (n, k)]

    for kind in ("up", "down"):
        layers = [getattr(block, kind) for block in teacher]
        common = spaces(*layers[0].weight.shape)
        for layer in layers:
            change = torch.zeros_like(layer.weight)
            separate = spaces(*layer.weight.shape)
            for (L, R), share in ((common, shared), (separate, 1 - shared)):
                direction = L @ torch.randn(4, 4, generator=generator) @ R.T
                change += share**0.5 * direction / direction.norm()
            layer.weight += 0.5 * layer.weight.norm() * change / change.norm()
    return teacher


# ---- rated texts ---------------------------------------------------------------------------------

Texts = tuple[np.ndarray, Tensor]  # lists of token ids, and labels


class RatedTexts(Problem):
    """MiniLM with a new linear head on the mean of its last hidden states.

    It learns whether a text is rated above or below 0. The loss is in nats per text.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        classifier, tokenize = minilm_classifier()
        self.base = classifier.encoder
        training, held_out = rated_texts(task.source, task.held_out)
        random.Random(0).shuffle(training)
        examples = {
            "training": training[: -task.validation],
            "validation": training[-task.validation :],
            "held_out": held_out,
        }
        self.parts = {}
        for part, texts in examples.items():
            ids, labels = tokenized(texts, tokenize)
            self.parts[part] = (np.fromiter(ids, object, len(ids)), labels)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return TextClassifier(copy.deepcopy(self.base), 2)

    def batches(self, seed: int) -> Iterator[Texts]:
        """Yields batches of texts of similar length, to reduce padding.

        Twenty batches at a time are sorted by length, and come in random order.
        """
        ids, labels = self.parts["training"]
        size = self.task.batch
        rng = random.Random(seed)
        indices = shuffled_epochs(len(ids), rng)
        while True:
            chunk = sorted([next(indices) for _ in range(20 * size)], key=lambda i: len(ids[i]))
            batches = [chunk[i : i + size] for i in range(0, 20 * size, size)]
            rng.shuffle(batches)
            # In reverse, so that the recorded runs can be repeated.
            for batch in reversed(batches):
                yield ids[batch], labels[batch]

    def order(self, part: str) -> Tensor:
        """Returns the texts' order by length, so that those measured together need less padding."""
        return torch.tensor([len(row) for row in self.parts[part][0]]).argsort(stable=True)

    def losses(self, model: nn.Module, batch: Texts) -> tuple[Tensor, Tensor]:
        ids, labels = batch
        logits = model(ids)
        is_right = (logits.argmax(1) == labels).double()
        return nn.functional.cross_entropy(logits, labels, reduction="none"), is_right


# ---- a text --------------------------------------------------------------------------------------


class PlainText(Problem):
    """SmolLM2-135M on a text, in bfloat16 with trained parameters in float32.

    An item is a row of SEQUENCE tokens. The loss is in nats per token.
    """

    measured_at_once = 8

    def __init__(self, task: Task):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(task)
        self.base = AutoModelForCausalLM.from_pretrained(
            SMOLLM2, local_files_only=True, dtype=torch.bfloat16
        ).eval()
        # On rows this short torch's fused attention takes longer in backward.
        self.base.set_attn_implementation("eager")
        tokenizer = AutoTokenizer.from_pretrained(SMOLLM2, local_files_only=True)
        text = (DATA / task.source).read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        rows = ids.unfold(0, SEQUENCE, SEQUENCE)
        count = len(rows)
        # Validation and held-out rows are spread over the text, because its parts differ.
        measured = task.validation + task.held_out
        spread_evenly = torch.arange(measured) * (count // measured)
        is_measured = torch.zeros(count, dtype=torch.bool).index_fill_(0, spread_evenly, True)
        order = torch.randperm(measured, generator=torch.Generator().manual_seed(0))
        measured_rows = rows[is_measured][order]
        self.parts = {
            "training": (rows[~is_measured],),
            "validation": (measured_rows[: task.validation],),
            "held_out": (measured_rows[task.validation :],),
        }

    @torch.autocast("cpu", torch.bfloat16)
    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(input_ids=batch[0], labels=batch[0], use_cache=False).loss

    @torch.autocast("cpu", torch.bfloat16)
    def losses(self, model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=batch[0], use_cache=False).logits[:, :-1].float()
        next_ids = batch[0][:, 1:]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), next_ids.flatten(), reduction="none"
        )
        is_right = (logits.argmax(-1) == next_ids).double()
        return losses.view(next_ids.shape).double().mean(1), is_right.mean(1)


def missing(task: Task) -> str:
    """Returns the paths of a task's data that do not exist, "" if all do."""
    paths = [BASES[task.kind], DATA / task.source] if task.kind in BASES else []
    return ", ".join(str(path) for path in paths if not path.exists())


@lru_cache(maxsize=1)  # a process keeps the problem of its last run
def problem_of(task: Task) -> Problem:
    return {"teacher": Teacher, "classifier": RatedTexts, "language": PlainText}[task.kind](task)


# ---- training ------------------------------------------------------------------------------------


def adapt(model: nn.Module, task: Task, method: str, rank: int) -> nn.Module:
    """Freezes a fresh model, except for its new head, and adds what a method trains.

    Returns:
        The module to train.
    """
    family = METHODS[method].family
    saved = ["head"] if hasattr(model, "head") else None
    common = {"target_modules": task.layers, "modules_to_save": saved, **METHODS[method].settings}
    if family == "lotr":
        return apply_lotr(model, LoTRConfig(rank=rank, **common))
    if family in ("lora", "vera"):
        from peft import LoraConfig, VeraConfig, get_peft_model

        if family == "vera":
            return get_peft_model(model, VeraConfig(r=rank, **common))
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, **common))
    # Without an adapter: "full" and "norm" train modules of this name and a new head, "head" and
    # "base" only a new head.
    trained = {"full": task.layers, "norm": task.norms}.get(family, "head")
    for name, module in model.named_modules():
        is_trained = re.fullmatch(trained, name) is not None or name == "head"
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(is_trained)
            if parameter.requires_grad:  # bfloat16 would round Adam's small steps away
                parameter.data = parameter.data.float()
    return model


def warmup_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> Callable[[], None]:
    """Returns a function to call after each step, which changes the optimizer's rates.

    They rise linearly over the first 6 % of the steps, then fall linearly to zero.
    """
    warmup = max(1, round(0.06 * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor).step


def parameters_and_head(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the parameters that a method trains, and the parameters of a new head.

    A head belongs to the task: it is not counted in a method's size, and `fit` trains it at another
    rate.
    """
    trained = [(name.split("."), p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for parts, p in trained if "head" in parts]
    return [p for parts, p in trained if "head" not in parts], head


def start_from_gradient(model: nn.Module, problem: Problem, batches: Iterator, steps: int) -> int:
    """Sets A and B from the gradients of eight batches.

    A new head is trained first, for a tenth of the steps, so that it fits the task when they are
    computed.

    Returns:
        The steps that are left.
    """
    _, head = parameters_and_head(model)
    if head:
        head_steps = steps // 10
        steps -= head_steps
        optimizer = torch.optim.AdamW(head, lr=HEAD_LR, weight_decay=0.0)
        for _ in range(head_steps):
            problem.loss(model, next(batches)).backward()
            optimizer.step()
            model.zero_grad()
    init_from_gradient(model, [next(batches) for _ in range(8)], problem.loss)
    return steps


def fit(model: nn.Module, method: str, lr: float, seed: int, problem: Problem) -> list[float]:
    """Trains a model by AdamW without weight decay.

    A new head has the rate HEAD_LR, or `lr` if the method trains nothing else.

    Returns:
        The loss of each step. A run that diverges ends at once, and its last loss is not finite.
    """
    steps = problem.task.steps
    batches = problem.batches(seed)
    if METHODS[method].from_gradient:
        steps = start_from_gradient(model, problem, batches, steps)
    parameters, head = parameters_and_head(model)
    groups = [
        {"params": parameters, "lr": lr},
        {"params": head, "lr": lr if method == "head" else HEAD_LR},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = warmup_and_decay(optimizer, steps)
    losses: list[float] = []
    while len(losses) < steps and (not losses or np.isfinite(losses[-1])):
        loss = problem.loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule()
        losses.append(loss.item())
    return losses
