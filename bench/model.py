"""A transformer trained with each method, at equal rank and at equal size: time of a step, peak memory, trained numbers.

    python -m bench.model                     SmolLM2-135M's shape with all linear layers adapted; MiniLM's with query and value
    python -m bench.model --models minilm --rank 8 --targets query,key,value --batch 16 --sequence 64
    python -m bench.model --rivals frozen,lora-peft,lotr_ext,lotr_ext-compiled
    python -m bench.model --against ../other  another checkout's lotr_ext in turns with this one's

Weights are random: times do not depend on them. A step is forward, a loss, backward, AdamW; the frozen model goes forward and
backward through all layers too. All methods share its weights. The gradients of our cores are compared with the three-line
formula's first. "-as-lotr": LoRA or VeRA at the rank whose size is nearest to LoTR's, "-as-lora": LoTR at LoRA's; "-core": only
the cores are trained. Adapters have the dtype that their users get: PEFT's and ours float32, the original's the model's own.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor, nn

from . import rivals as rv
from .common import Case, Group, Program, Step, check_error, error_of, listed, peak_bytes

TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # of our cores' gradients, through all layers
USUAL = {"cpu": ["smollm2-135m", "minilm"], "cuda": ["llama-8x4096", "smollm2-135m"]}
RANK = 16


def cases(options: argparse.Namespace) -> list[Case]:
    names = options.models or (["tiny-lm"] if options.quick else USUAL[options.device])
    if bad := [name for name in names if name not in rv.MODELS]:
        raise ValueError(f"models: expected some of {', '.join(rv.MODELS)}, got {bad[0]!r}")
    found = []
    for name in names:
        shape = rv.MODELS[name]
        sizes = {
            "batch": options.batch or shape.batch,
            "sequence": options.sequence or shape.sequence,
            "r": options.rank,
        }
        found.append(
            {"model": name, "targets": ",".join(options.targets or shape.targets), **sizes}
        )
    return found


class Training:
    """One method's model, its optimizer and its steps on one fixed batch."""

    def __init__(self, model: nn.Module, case: Case, ids: Tensor, target: Tensor | None):
        self.model, self.parameters, self.ids, self.target = model, rv.trained(model), ids, target
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3) if self.parameters else None

    def forward(self, _: object = None) -> Tensor:
        if self.target is None:  # a language model has its own loss
            return self.model(input_ids=self.ids, labels=self.ids).loss
        return nn.functional.mse_loss(
            self.model(input_ids=self.ids).last_hidden_state.float(), self.target
        )

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
    """The error of our cores' gradients against the three-line formula's, at the same factors and random cores."""
    torch.manual_seed(1)
    eager = rv.adapted_model("lotr-eager", base, case["targets"].split(","), case["r"])
    theirs = [module for module in eager.modules() if isinstance(module, rv.EagerLoTR)]
    layers = rv.our_layers_in(ours.model)
    with torch.no_grad():
        for other, layer in zip(theirs, layers, strict=True):
            other.core.normal_(std=0.1)
            factors = rv.factors_of(layer)
            for mine, value in (
                (factors["A"], other.A),
                (factors["B"], other.B),
                (layer.core, other.core),
            ):
                mine.copy_(value)
    for one in (ours, Training(eager, case, ours.ids, ours.target)):
        one.drop_gradients()
        one.forward().backward()
    expected = torch.cat([other.core.grad.double().flatten() for other in theirs])
    found = torch.cat([layer.core.grad.double().flatten() for layer in layers])
    ours.drop_gradients()
    return check_error(
        "gradients of the cores", error_of(found, expected), TOLERANCE[case["dtype"]]
    )


def build(case: Case, options: argparse.Namespace) -> Group:
    base = rv.base_model(case["model"], rv.dtype_of(case), options.device)
    targets = case["targets"].split(",")
    rows = case["batch"], case["sequence"]
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, base.config.vocab_size, rows, generator=generator).to(options.device)
    target = None
    if rv.MODELS[case["model"]].family == "encoder":
        target = torch.randn(*rows, base.config.hidden_size, generator=generator).to(options.device)
    usual = [name for name in rv.METHODS if name != "lotr_ext-compiled"]
    steps = {}
    for name in rv.chosen(options.rivals, usual, rv.METHODS):
        if (rank := rv.rank_of(name, case)) is None:
            continue
        torch.manual_seed(1)
        training = Training(rv.adapted_model(name, base, targets, rank), case, ids, target)
        facts: dict[str, Any] = {
            "rank": rank,
            "parameters": sum(p.numel() for p in training.parameters),
        }
        if name == "lotr_ext":
            facts["error"] = gradient_error(training, base, case)
        steps[name] = training.step(facts)
        steps[name].run()
        facts["peak_bytes"] = peak_bytes(steps[name].run, options.device)
    return Group(steps)


def more_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=listed, help=f"some of {', '.join(rv.MODELS)}")
    parser.add_argument(
        "--targets", type=listed, help="endings of the adapted layers' names (the model's own)"
    )
    parser.add_argument("--batch", type=int)
    parser.add_argument("--sequence", type=int, help="tokens a row")
    parser.add_argument("--rank", type=int, default=RANK, help=f"of LoTR and LoRA ({RANK})")


FORM = "{model} ({targets}), {batch} x {sequence} tokens, r {r}"
SIDES = ("frozen", "lora-peft", "lotr_ext")
PROGRAM = Program(
    "model", __doc__, cases, build, FORM, slice_s=0.0, compared=SIDES, options=more_options
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
