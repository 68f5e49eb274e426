"""A transformer trained with each method, at equal rank and at equal size.

    python -m bench.model                     SmolLM2-135M's shape with all linear layers adapted,
                                              MiniLM's with query and value
    python -m bench.model --models minilm --rank 8 --targets query,key,value --batch 16
    python -m bench.model --rivals frozen,lora-peft,lotr_ext,lotr_ext-compiled
    python -m bench.model --against ../other  this lotr_ext over another checkout's

Weights are random, because times do not depend on them. A step is forward, a loss, backward and
AdamW. The frozen model goes forward and backward through all layers as well. All methods share its
weights. The gradients of our cores are compared with the three-line formula's first. "-as-lotr" is
LoRA or VeRA at the rank at which its size is nearest to LoTR's, "-as-lora" is LoTR at LoRA's, and
"-core" trains only the cores. Adapters have the dtype that their users get: float32 for PEFT's
and ours, the model's for LoTR in three lines.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lotr_ext import LoTRConfig, LoTRLinear, apply_lotr

from .common import Case, check_error, dtype_of, error_of, some_of
from .program import Program
from .rivals import STRATEGIES, compiled, factors_of, fused_reason, with_strategy
from .timing import Group, Step, training

TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # of our cores' gradients, through all layers
DEFAULT_MODELS = {"cpu": ["smollm2-135m", "minilm"], "cuda": ["llama-8x4096", "smollm2-135m"]}
RANK = 16


# ---- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSpec:
    """A model of transformers, and what is adapted and measured by default.

    Attributes:
        family: "encoder" or "causal-lm".
        settings: The arguments of its configuration.
        targets: The endings of the adapted layers' names.
        batch: The rows of a batch.
        sequence: The tokens of a row.
    """

    family: str
    settings: dict
    targets: tuple[str, ...]
    batch: int
    sequence: int


def llama(
    *, hidden: int, layers: int, heads: int, inner: int, vocabulary: int, heads_per_key: int = 1
) -> dict:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "num_key_value_heads": heads // heads_per_key,
        "vocab_size": vocabulary,
        "use_cache": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }


def bert(*, hidden: int, layers: int, heads: int, vocabulary: int) -> dict:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


# Not the head, which is tied to the embeddings.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = {
    "smollm2-135m": ModelSpec(
        family="causal-lm",
        settings=llama(
            hidden=576, layers=30, heads=9, inner=1536, vocabulary=49152, heads_per_key=3
        ),
        targets=ALL_LINEAR,
        batch=1,
        sequence=128,
    ),
    "minilm": ModelSpec(
        family="encoder",
        settings=bert(hidden=384, layers=6, heads=12, vocabulary=30522),
        targets=("query", "value"),
        batch=16,
        sequence=64,
    ),
    # Eight layers of Llama-3-8B's size, with a smaller vocabulary.
    "llama-8x4096": ModelSpec(
        family="causal-lm",
        settings=llama(
            hidden=4096, layers=8, heads=32, inner=14336, vocabulary=32000, heads_per_key=4
        ),
        targets=ALL_LINEAR,
        batch=4,
        sequence=2048,
    ),
    "tiny-lm": ModelSpec(
        family="causal-lm",
        settings=llama(hidden=32, layers=2, heads=4, inner=64, vocabulary=100, heads_per_key=4),
        targets=ALL_LINEAR,
        batch=2,
        sequence=8,
    ),
    "tiny-encoder": ModelSpec(
        family="encoder",
        settings=bert(hidden=32, layers=2, heads=2, vocabulary=100),
        targets=("query", "value"),
        batch=2,
        sequence=8,
    ),
}


def random_model(family: str, settings: dict, dtype: torch.dtype, device: str) -> nn.Module:
    """Returns a frozen model with fixed random weights."""
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        if family == "encoder":
            model = transformers.BertModel(
                transformers.BertConfig(**settings), add_pooling_layer=False
            )
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    return model.to(dtype).requires_grad_(False)


def base_model(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Returns the model of MODELS[name].

    The output of its embeddings requires a gradient, so that every method, and the frozen model as
    well, goes backward through all layers.
    """
    model = random_model(MODELS[name].family, MODELS[name].settings, dtype, device)
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_()
    )
    return model.train()  # as its users train; no model here has dropout


def twin(base: nn.Module) -> nn.Module:
    """Returns a copy of the modules of base that uses the same parameter and buffer objects."""
    # deepcopy does not copy an object that its memo has.
    return copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})


def square_weight(base: nn.Module) -> Tensor:
    """Returns the weight of a layer that keeps the width, for example attention's first one."""
    width = base.config.hidden_size
    return next(p for p in base.parameters() if p.shape == (width, width))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ---- methods -------------------------------------------------------------------------------------

# Without --rivals these run, and those that `default_methods` adds. The others only run on request:
# on a CPU the strategies are the same products in another order, and compiling takes minutes.
DEFAULT_METHODS = (
    "frozen",
    "lora-peft",
    "vera-peft",
    "lotr-eager",
    "lotr_ext",
    "lotr_ext-core",
)
METHODS = (
    *DEFAULT_METHODS,
    "lora-peft-as-lotr",
    "vera-peft-as-lotr",
    "lotr_ext-as-lora",
    "lotr_ext-two_pass",
    "lotr_ext-beta",
    "lotr_ext-fused",
    "lotr_ext-compiled",
)
# The rank at which a method is nearest in size to LoTR or LoRA, in the one case in which that is
# measured.
EQUAL_CASE = {"model": "minilm", "targets": "query,value", "r": 16}
EQUAL_RANKS = {"lora-peft-as-lotr": 2, "vera-peft-as-lotr": 896, "lotr_ext-as-lora": 83}


def default_methods(base: nn.Module, case: Case) -> list[str]:
    """Returns the methods that are measured by default."""
    methods = list(DEFAULT_METHODS)
    if EQUAL_CASE.items() <= case.items():
        methods += EQUAL_RANKS
    if fused_reason(square_weight(base), case["r"]) is None:
        methods.append("lotr_ext-fused")
    return methods


def rank_of(method: str, case: Case) -> int:
    """Returns the rank of a method in a case, 0 for the frozen model.

    Raises:
        ValueError: If the rank of equal size is not known for the case.
    """
    if method == "frozen":
        return 0
    if method not in EQUAL_RANKS:
        return case["r"]
    if not EQUAL_CASE.items() <= case.items():
        raise ValueError(f"{method}: expected the case {EQUAL_CASE}, whose rank is known")
    return EQUAL_RANKS[method]


def lotr_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LoTRLinear)]


def in_three_lines(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns a forward for an adapted layer in plain torch, by README's formula."""
    factors = factors_of(layer)

    def forward(x: Tensor) -> Tensor:
        h = x @ factors["A"].to(x.dtype) @ layer.core.to(x.dtype)
        y = nn.functional.linear(x, layer.weight, layer.bias)
        return y + layer.scaling * h @ factors["B"].to(x.dtype).T

    return forward


def adapted_model(method: str, base: nn.Module, targets: list[str], rank: int) -> nn.Module:
    """Returns a twin of base, adapted.

    Raises:
        ValueError: If the strategy in the method's name cannot run here.
    """
    model = twin(base)
    family, _, variant = method.partition("-")
    if family == "frozen":
        return model
    if family in ("lora", "vera"):
        from peft import LoraConfig, VeraConfig, get_peft_model

        configs = {
            "lora": LoraConfig(r=rank, lora_alpha=rank, target_modules=targets),
            "vera": VeraConfig(r=rank, target_modules=targets),
        }
        return get_peft_model(model, configs[family])
    # "lotr-eager", or lotr_ext and its variants.
    settings = {
        "core": {"train": ("core",)},
        # A plain product cannot mix dtypes, so adapters in plain torch have the model's.
        "eager": {"adapter_dtype": square_weight(base).dtype},
    }.get(variant, {})
    apply_lotr(model, LoTRConfig(rank=rank, scaling=1.0, target_modules=targets, **settings))
    if variant == "eager":
        for layer in lotr_layers(model):
            layer.forward = in_three_lines(layer)
    if variant == "compiled":
        return compiled(model)
    if variant in STRATEGIES:
        model.forward = with_strategy(variant, model.forward, square_weight(base), rank)
    return model


# ---- the program ---------------------------------------------------------------------------------


def cases(options: argparse.Namespace) -> list[Case]:
    default_models = ["tiny-lm"] if options.quick else DEFAULT_MODELS[options.device]
    return [
        {
            "model": name,
            "targets": options.targets or ",".join(MODELS[name].targets),
            "batch": options.batch or MODELS[name].batch,
            "sequence": options.sequence or MODELS[name].sequence,
            "r": options.rank,
        }
        for name in options.models or default_models
    ]


def core_gradients(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss_of(model), [layer.core for layer in lotr_layers(model)])
    return torch.cat([gradient.double().flatten() for gradient in gradients])


def gradient_error(model: nn.Module, case: Case, loss_of: Callable[[nn.Module], Tensor]) -> float:
    """Returns the error of our cores' gradients against the three-line formula's.

    Both have the same factors and random cores, which the model keeps.
    """
    for layer in lotr_layers(model):
        nn.init.normal_(layer.core, std=0.1)
    gradients = core_gradients(model, loss_of)
    for layer in lotr_layers(model):
        layer.forward = in_three_lines(layer)  # of the instance, in place of its class's
    expected = core_gradients(model, loss_of)
    for layer in lotr_layers(model):
        del layer.forward
    return check_error(
        "gradients of the cores", error_of(gradients, expected), TOLERANCE[case["dtype"]]
    )


def build(case: Case, options: argparse.Namespace) -> Group:
    base = base_model(case["model"], dtype_of(case), options.device)
    shape = (case["batch"], case["sequence"])
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, base.config.vocab_size, shape, generator=generator).to(options.device)
    target = torch.randn(*shape, base.config.hidden_size, generator=generator).to(options.device)

    def loss_of(model: nn.Module) -> Tensor:
        if MODELS[case["model"]].family == "causal-lm":
            return model(input_ids=ids, labels=ids).loss
        return nn.functional.mse_loss(model(input_ids=ids).last_hidden_state.float(), target)

    def step_of(name: str) -> Step:
        torch.manual_seed(1)
        rank = rank_of(name, case)
        model = adapted_model(name, base, case["targets"].split(","), rank)
        parameters = trained(model)
        facts: dict[str, float] = {"rank": rank, "parameters": sum(p.numel() for p in parameters)}
        if name in ("lotr_ext", "lotr_ext-fused"):
            facts["error"] = gradient_error(model, case, loss_of)
        # A group, because an optimizer refuses an empty list: the frozen model trains nothing.
        optimizer = torch.optim.AdamW([{"params": parameters}], lr=1e-3)
        return training(lambda: loss_of(model), None, parameters, optimizer, facts=facts)

    return Group(options.rivals or default_methods(base, case), step_of)


PROGRAM = Program(
    name="model",
    doc=__doc__,
    rivals=METHODS,
    build=build,
    title_format="{model} ({targets}), {batch} x {sequence} tokens, r {r}",
    cases=cases,
    measurement_s=0.0,
    compared=("frozen", "lora-peft", "lotr_ext"),
    options={
        "models": {"type": some_of(MODELS), "help": f"some of {', '.join(MODELS)}"},
        "targets": {"help": "endings of the adapted layers' names (the model's default)"},
        "batch": {"type": int, "help": "rows"},
        "sequence": {"type": int, "help": "tokens per row"},
        "rank": {"type": int, "default": RANK, "help": f"of LoTR and LoRA ({RANK})"},
    },
)
if __name__ == "__main__":
    sys.exit(PROGRAM.main())
