"""The rivals for a transformer: one frozen model, adapted by each method."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .common import Case
from .rivals import STRATEGIES, compiled, fused_reason, with_strategy


@dataclass(frozen=True)
class Shape:
    """The configuration of a model in transformers.

    Attributes:
        family: "encoder" or "causal-lm".
        settings: The arguments of its configuration.
        targets: The adapted layers.
        batch: Rows of a batch.
        sequence: Tokens of a row.
        equal: The rank of a method at which it is nearest in size to LoTR ("-as-lotr") or LoRA
            ("-as-lora") of rank 16.
    """

    family: str
    settings: dict
    targets: tuple[str, ...]
    batch: int
    sequence: int
    equal: dict[str, int] = field(default_factory=dict)


def llama(
    hidden: int, layers: int, heads: int, inner: int, vocabulary: int, heads_per_key: int = 1
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


def bert(hidden: int, layers: int, heads: int, vocabulary: int) -> dict:
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
EQUAL = {"lora-peft-as-lotr": 2, "vera-peft-as-lotr": 896, "lotr_ext-as-lora": 83}
MODELS = {
    "smollm2-135m": Shape("causal-lm", llama(576, 30, 9, 1536, 49152, 3), ALL_LINEAR, 1, 128),
    "minilm": Shape("encoder", bert(384, 6, 12, 30522), ("query", "value"), 16, 64, EQUAL),
    "llama-8x4096": Shape("causal-lm", llama(4096, 8, 32, 14336, 32000, 4), ALL_LINEAR, 4, 2048),
    "tiny-lm": Shape("causal-lm", llama(32, 2, 4, 64, 100, 4), ALL_LINEAR, 2, 8),
    "tiny-encoder": Shape("encoder", bert(32, 2, 2, 100), ("query", "value"), 2, 8),
}
METHODS = (
    "frozen",
    "lora-peft",
    "vera-peft",
    "lotr-eager",
    "lotr_ext",
    "lora-peft-as-lotr",
    "vera-peft-as-lotr",
    "lotr_ext-as-lora",
    "lotr_ext-core",
    "lotr_ext-two_pass",
    "lotr_ext-beta",
    "lotr_ext-fused",
    "lotr_ext-compiled",
)
# On a CPU the strategies are the same products in another order, and compiling takes minutes.
ON_REQUEST = METHODS[-4:]


def usual_methods(base: nn.Module, rank: int) -> list[str]:
    """Returns the methods that are measured by default."""
    methods = [method for method in METHODS if method not in ON_REQUEST]
    if fused_reason(square_weight(base), rank) is None:
        methods.append("lotr_ext-fused")
    return methods


def square_weight(base: nn.Module) -> Tensor:
    """Returns the weight of a layer that keeps the width, as the first one of attention does."""
    width = base.config.hidden_size
    return next(p for p in base.parameters() if p.shape == (width, width))


def random_model(family: str, settings: dict, dtype: torch.dtype, device: str) -> nn.Module:
    """Returns a frozen model with fixed random weights."""
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        if family == "encoder":
            config = transformers.BertConfig(**settings)
            model = transformers.BertModel(config, add_pooling_layer=False)
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
    return copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})


class EagerLoTR(nn.Module):
    """y = base(x) + ((x A) G) B^T as the original implementation computes it.

    All layers of a shape share A and B. They have the dtype of the weights, because the original
    cannot mix dtypes.
    """

    def __init__(self, base: nn.Linear, A: nn.Parameter, B: nn.Parameter):
        super().__init__()
        self.base = base
        self.A = A
        self.B = B
        self.core = nn.Parameter(A.new_zeros(A.shape[1], B.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ((x @ self.A) @ self.core) @ self.B.T


def _eager_lotr(model: nn.Module, targets: list[str], r: int) -> nn.Module:
    pairs: dict[torch.Size, list[nn.Parameter]] = {}
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in targets:
            continue
        weight = module.weight
        if weight.shape not in pairs:
            pairs[weight.shape] = [
                nn.Parameter(weight.new_empty(size, r).normal_(0, size**-0.5))
                for size in (module.in_features, module.out_features)
            ]
        model.set_submodule(name, EagerLoTR(module, *pairs[weight.shape]))
    return model


def rank_of(method: str, case: Case) -> int | None:
    """Returns the rank of a method in a case, None if it is unknown.

    At equal size it is known for the model's usual targets.
    """
    if method == "frozen":
        return 0
    if not method.endswith(("-as-lotr", "-as-lora")):
        return case["r"]
    shape = MODELS[case["model"]]
    is_usual = case["r"] == 16 and case["targets"] == ",".join(shape.targets)
    return shape.equal.get(method) if is_usual else None


def adapted_model(method: str, base: nn.Module, targets: Iterable[str], rank: int) -> nn.Module:
    """Returns a twin of base, adapted.

    Raises:
        ValueError: If the strategy in the method's name cannot run here.
    """
    model = twin(base)
    targets = list(targets)
    variant = method.partition("-")[2]
    if method == "frozen":
        return model
    if method == "lotr-eager":
        return _eager_lotr(model, targets, rank)
    if method.startswith(("lora-peft", "vera-peft")):
        from peft import LoraConfig, VeraConfig, get_peft_model

        if method.startswith("vera"):
            return get_peft_model(model, VeraConfig(r=rank, target_modules=targets))
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    from lotr_ext import LoTRConfig, apply_lotr

    train = {"train": ("core",)} if variant == "core" else {}
    apply_lotr(model, LoTRConfig(rank=rank, scaling=1.0, target_modules=targets, **train))
    if variant == "compiled":
        return compiled(model)
    if variant in STRATEGIES:
        model.forward = with_strategy(variant, model.forward, square_weight(base), rank)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
