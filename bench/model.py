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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .common import Case, check_error, dtype_of, error_of, some_of
from .models import (
    METHODS,
    MODELS,
    EagerLoTR,
    adapted_model,
    base_model,
    rank_of,
    trained,
    usual_methods,
)
from .program import Program
from .rivals import factors_of
from .timing import Group, Step, training

TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # of our cores' gradients, through all layers
USUAL = {"cpu": ["smollm2-135m", "minilm"], "cuda": ["llama-8x4096", "smollm2-135m"]}
RANK = 16


def cases(options: argparse.Namespace) -> list[Case]:
    usual = ["tiny-lm"] if options.quick else USUAL[options.device]
    names = options.models or usual
    return [
        {
            "model": name,
            "targets": options.targets or ",".join(MODELS[name].targets),
            "batch": options.batch or MODELS[name].batch,
            "sequence": options.sequence or MODELS[name].sequence,
            "r": options.rank,
        }
        for name in names
    ]


def core_gradients(
    model: nn.Module, layers: list[nn.Module], loss_of: Callable[[nn.Module], Tensor]
) -> Tensor:
    loss_of(model).backward()
    return torch.cat([layer.core.grad.double().flatten() for layer in layers])


def gradient_error(
    model: nn.Module, base: nn.Module, case: Case, loss_of: Callable[[nn.Module], Tensor]
) -> float:
    """Returns the error of our cores' gradients against the three-line formula's.

    Both models have the same factors and random cores.
    """
    from lotr_ext import LoTRLinear

    torch.manual_seed(1)
    eager = adapted_model("lotr-eager", base, case["targets"].split(","), case["r"])
    eager_layers = [module for module in eager.modules() if isinstance(module, EagerLoTR)]
    layers = [module for module in model.modules() if isinstance(module, LoTRLinear)]
    with torch.no_grad():
        for eager_layer, layer in zip(eager_layers, layers, strict=True):
            eager_layer.core.normal_(std=0.1)
            factors = factors_of(layer)
            factors["A"].copy_(eager_layer.A)
            factors["B"].copy_(eager_layer.B)
            layer.core.copy_(eager_layer.core)
    expected = core_gradients(eager, eager_layers, loss_of)
    error = error_of(core_gradients(model, layers, loss_of), expected)
    return check_error("gradients of the cores", error, TOLERANCE[case["dtype"]])


def build(case: Case, options: argparse.Namespace) -> Group:
    base = base_model(case["model"], dtype_of(case), options.device)
    rows = case["batch"], case["sequence"]
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, base.config.vocab_size, rows, generator=generator).to(options.device)
    target = torch.randn(*rows, base.config.hidden_size, generator=generator).to(options.device)

    def loss_of(model: nn.Module) -> Tensor:
        if MODELS[case["model"]].family == "causal-lm":
            return model(input_ids=ids, labels=ids).loss
        return nn.functional.mse_loss(model(input_ids=ids).last_hidden_state.float(), target)

    def step_of(name: str) -> Step:
        torch.manual_seed(1)
        rank = rank_of(name, case)
        model = adapted_model(name, base, case["targets"].split(","), rank)
        parameters = trained(model)
        facts: dict[str, Any] = {"rank": rank, "parameters": sum(p.numel() for p in parameters)}
        if name in ("lotr_ext", "lotr_ext-fused"):
            facts["error"] = gradient_error(model, base, case, loss_of)
        # A group, because an optimizer refuses an empty list: the frozen model trains nothing.
        optimizer = torch.optim.AdamW([{"params": parameters}], lr=1e-3)
        step = training(lambda: loss_of(model), None, parameters, optimizer, facts=facts)
        return step.with_peak(options.device)

    names = options.rivals or usual_methods(base, case["r"])
    return Group([name for name in names if rank_of(name, case) is not None], step_of)


PROGRAM = Program(
    name="model",
    doc=__doc__,
    rivals=METHODS,
    build=build,
    form="{model} ({targets}), {batch} x {sequence} tokens, r {r}",
    cases=cases,
    slice_s=0.0,
    compared=("frozen", "lora-peft", "lotr_ext"),
    options={
        "models": {"type": some_of(MODELS), "help": f"some of {', '.join(MODELS)}"},
        "targets": {"help": "endings of the adapted layers' names (the model's usual ones)"},
        "batch": {"type": int, "help": "rows"},
        "sequence": {"type": int, "help": "tokens per row"},
        "rank": {"type": int, "default": RANK, "help": f"of LoTR and LoRA ({RANK})"},
    },
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
