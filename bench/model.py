"""A transformer trained with each method, at equal rank and at equal size.

    python -m bench.model                     SmolLM2-135M's shape with all linear layers adapted,
                                              MiniLM's with query and value
    python -m bench.model --models minilm --rank 8 --targets query,key,value --batch 16
    python -m bench.model --rivals frozen,lora-peft,lotr_ext,lotr_ext-compiled
    python -m bench.model --against ../other  another checkout's lotr_ext in turns with this one's

Weights are random, because times do not depend on them. A step is forward, a loss, backward and
AdamW. The frozen model goes forward and backward through all layers as well. All methods share its
weights. The gradients of our cores are compared with the three-line formula's first. "-as-lotr" is
LoRA or VeRA at the rank at which its size is nearest to LoTR's, "-as-lora" is LoTR at LoRA's, and
"-core" trains only the cores. Adapters have the dtype that their users get: PEFT's and ours
float32, the original's the model's.
"""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_error, error_of
from .common import Case, dtype_of, listed, some_of
from .models import (
    METHODS,
    MODELS,
    EagerLoTR,
    adapted_model,
    base_model,
    our_layers_in,
    rank_of,
    trained,
    usual_methods,
)
from .program import Program
from .rivals import factors_of
from .timing import Group, Step

TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # of our cores' gradients, through all layers
USUAL = {"cpu": ["smollm2-135m", "minilm"], "cuda": ["llama-8x4096", "smollm2-135m"]}
RANK = 16


def cases(options: argparse.Namespace) -> list[Case]:
    usual = ["tiny-lm"] if options.quick else USUAL[options.device]
    names = options.models or usual
    return [
        {
            "model": name,
            "targets": ",".join(options.targets or MODELS[name].targets),
            "batch": options.batch or MODELS[name].batch,
            "sequence": options.sequence or MODELS[name].sequence,
            "r": options.rank,
        }
        for name in names
    ]


class Training:
    """The model of one method, its optimizer, and its steps on one fixed batch."""

    def __init__(self, model: nn.Module, ids: Tensor, target: Tensor | None):
        self.model = model
        self.parameters = trained(model)
        self.ids = ids
        self.target = target
        self.optimizer = None
        if self.parameters:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3)

    def forward(self, _: object = None) -> Tensor:
        if self.target is None:  # a language model has its own loss
            return self.model(input_ids=self.ids, labels=self.ids).loss
        hidden = self.model(input_ids=self.ids).last_hidden_state
        return nn.functional.mse_loss(hidden.float(), self.target)

    def update(self, _: object) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def drop_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None

    def step(self, facts: dict[str, Any]) -> Step:
        stages = {
            "forward": self.forward,
            "backward": lambda loss: loss.backward(),
            "optimizer": self.update,
        }
        return Step(stages, self.drop_gradients, facts=facts)


def gradient_error(ours: Training, base: nn.Module, case: Case) -> float:
    """Returns the error of our cores' gradients against the three-line formula's.

    Both have the same factors and random cores.
    """
    torch.manual_seed(1)
    targets = case["targets"].split(",")
    eager = Training(adapted_model("lotr-eager", base, targets, case["r"]), ours.ids, ours.target)
    eager_layers = [module for module in eager.model.modules() if isinstance(module, EagerLoTR)]
    our_layers = our_layers_in(ours.model)
    with torch.no_grad():
        for eager_layer, layer in zip(eager_layers, our_layers, strict=True):
            eager_layer.core.normal_(std=0.1)
            factors = factors_of(layer)
            factors["A"].copy_(eager_layer.A)
            factors["B"].copy_(eager_layer.B)
            layer.core.copy_(eager_layer.core)
    for training in (ours, eager):
        training.drop_gradients()
        training.forward().backward()
    expected = torch.cat([layer.core.grad.double().flatten() for layer in eager_layers])
    gradient = torch.cat([layer.core.grad.double().flatten() for layer in our_layers])
    ours.drop_gradients()
    error = error_of(gradient, expected)
    return check_error("gradients of the cores", error, TOLERANCE[case["dtype"]])


def build(case: Case, options: argparse.Namespace) -> Group:
    base = base_model(case["model"], dtype_of(case), options.device)
    rows = case["batch"], case["sequence"]
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, base.config.vocab_size, rows, generator=generator).to(options.device)
    target = None
    if MODELS[case["model"]].family == "encoder":
        target = torch.randn(*rows, base.config.hidden_size, generator=generator).to(options.device)

    def step_of(name: str) -> Step:
        torch.manual_seed(1)
        rank = rank_of(name, case)
        model = adapted_model(name, base, case["targets"].split(","), rank)
        training = Training(model, ids, target)
        parameters = sum(p.numel() for p in training.parameters)
        facts: dict[str, Any] = {"rank": rank, "parameters": parameters}
        if name in ("lotr_ext", "lotr_ext-fused"):
            facts["error"] = gradient_error(training, base, case)
        return training.step(facts).with_peak(options.device)

    names = options.rivals or usual_methods(base, case["r"])
    return Group([name for name in names if rank_of(name, case) is not None], step_of)


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=some_of(MODELS), help=f"some of {', '.join(MODELS)}")
    targets = "endings of the adapted layers' names (the model's usual ones)"
    parser.add_argument("--targets", type=listed, help=targets)
    parser.add_argument("--batch", type=int, help="rows")
    parser.add_argument("--sequence", type=int, help="tokens per row")
    parser.add_argument("--rank", type=int, default=RANK, help=f"of LoTR and LoRA ({RANK})")


PROGRAM = Program(
    name="model",
    doc=__doc__,
    rivals=METHODS,
    build=build,
    form="{model} ({targets}), {batch} x {sequence} tokens, r {r}",
    cases=cases,
    slice_s=0.0,
    compared=("frozen", "lora-peft", "lotr_ext"),
    options=more_options,
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
