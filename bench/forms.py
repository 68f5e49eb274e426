"""What a task of bench.transfer trains: a form, as text and as a model.

    donors/layer/16/dense      only cores: dense ones of rank 16, on a fixed pair of factors per
                               layer, made from the gradients of other texts
    trained/width/4x18/dense   a pair per width as well: A of rank 4 and B of rank 18
    peft/all/4/lora            LoRA of rank 4, to which all others are compared

Not here: how a fixed pair is made (donors.py).
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lotr_ext import LoTRConfig, apply_lotr
from lotr_ext.init import INIT_GAIN

from .donors import BASE_TASK, Pairs, fixed_pairs, layers_named, problem
from .problems import TASKS, adapt

USUAL_NORM = 2.0  # of a row of B in a layer with vectors, about as in VeRA


class Form(NamedTuple):
    """PAIR/GROUP/RANK/CORE and further words, which say what a task trains.

    PAIR       How the pair of factors is made. It is made before the task, and then fixed:
                   random   at random, another one for each seed
                   svd      the leading directions of the base model's weights
                   own      the leading directions of the target's gradient
                   donors   the leading directions of the donors' gradients
                   known    those of the target's and the donors' gradients together
                   loras    by loras_to_bank, from a LoRA of each donor
                   mixed    by training on all donors in turn
               trained: the pair is trained with the cores, from a random start.
               trained-own and so on: from the pair that is otherwise fixed.
               peft: another method, whose name is in the place of CORE
    GROUP      layer, block, shape, width: which layers share A, and which share B
    RANK       of A and B; 4x18: of A, of B
    CORE       dense, diagonal
    only:v,o   only layers of these kinds
    b:o,down   a trained vector b per layer of these kinds, as VeRA has
    norm:20    the norm of a row of B in the layers with b. Elsewhere, and by default, it is 2
    """

    pair: str
    group: str
    rank: tuple[int, int]
    core: str
    only: str = ""
    b: str = ""
    norm: str = ""

    @staticmethod
    def parse(text: str) -> "Form":
        pair, group, rank, core, *words = text.split("/")
        r_in, _, r_out = rank.partition("x")
        return Form(
            pair,
            group,
            (int(r_in), int(r_out or r_in)),
            core,
            **dict(word.split(":") for word in words),
        )

    @property
    def is_trained(self) -> bool:
        return self.pair.startswith("trained")

    def pairs(self, target: str, seed: int) -> Pairs:
        """Returns the fixed pair of each layer of the form, or the start of a trained one.

        There are none for a trained pair with a random start, and for other methods.
        """
        source = re.sub("^(trained|peft)-?", "", self.pair)
        pairs = fixed_pairs(source, self.group, self.rank, target, seed) if source else {}
        return {
            name: pair
            for name, pair in pairs.items()
            if re.fullmatch(layers_named(self.only), name)
        }


def build(form: Form, target: str, seed: int) -> nn.Module:
    """Returns a fresh model of a target, in which only what the form trains requires a gradient."""
    model = problem(target).model(seed).requires_grad_(False)
    torch.manual_seed(seed)
    task = TASKS[BASE_TASK]._replace(layers=layers_named(form.only))
    if form.pair == "peft":
        return adapt(model, task, form.core, form.rank[0])
    pairs = form.pairs(target, seed)
    if form.b:
        return with_vectors(model, form, pairs)
    return with_cores(model, form, pairs, task.layers)


def with_cores(model: nn.Module, form: Form, pairs: Pairs, layers: str) -> nn.Module:
    """Returns the model with lotr_ext's layers: trained pairs, or only cores over fixed ones."""
    train = ("A", "B", "core") if form.is_trained else ("core",)
    config = LoTRConfig(
        rank=form.rank, group_by=form.group, core=form.core, train=train, target_modules=layers
    )
    apply_lotr(model, config)
    for name, (A, B) in pairs.items():
        values = {"A.value": INIT_GAIN * A, "B.value": INIT_GAIN * B}
        model.get_submodule(name).factors.load_state_dict(values)
    return model


class Vectors(nn.Module):
    """y = base(x) + (((x A) * d) B^T) * b with A and B fixed, in plain torch.

    d [r] is a diagonal core. Every layer of a form with b has d, and only some kinds have b [n].
    """

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, with_b: bool, norm: float):
        super().__init__()
        n, r = B.shape
        self.base = base
        self.register_buffer("A", A.to(base.weight.dtype))
        self.register_buffer("B", (norm * (n / r) ** 0.5 * B).to(base.weight.dtype))
        # If d and b both started at zero, neither would have a gradient.
        self.d = nn.Parameter(torch.full((r,), 0.1 if with_b else 0.0))
        self.b = nn.Parameter(torch.zeros(n)) if with_b else None

    def forward(self, x: Tensor) -> Tensor:
        y = ((x @ self.A) * self.d.to(x.dtype)) @ self.B.T
        return self.base(x) + (y if self.b is None else y * self.b.to(y.dtype))


def with_vectors(model: nn.Module, form: Form, pairs: Pairs) -> nn.Module:
    """Returns the model with vectors d, and b where the form has it, over fixed pairs."""
    b_layers = re.compile(layers_named(form.b))
    for name, (A, B) in pairs.items():
        has_b = b_layers.fullmatch(name) is not None
        # Adam moves each number by the rate, so a larger B is a higher rate of b alone.
        norm = float(form.norm) if has_b and form.norm else USUAL_NORM
        model.set_submodule(name, Vectors(model.get_submodule(name), A, B, has_b, norm))
    return model
