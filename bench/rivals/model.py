"""A transformer and the methods of adaptation that the model benchmark compares. All copies share the frozen weights.

"equal rank": every method at rank r. "equal size": LoRA and VeRA at the rank whose parameters come nearest to those of LoTR at
rank r (LoRA has a floor: rank 1), and LoTR at the rank whose parameters come nearest to those of LoRA at rank r.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..measure.names import named

FLOOR, LORA, DORA, OURS, MAGNITUDE = "frozen", "lora-peft", "dora-peft", "lotr_ext", "lotr_ext-magnitude"
Widths = list[tuple[int, int]]  # (in, out) of each adapted layer


@dataclass(frozen=True)
class Shape:
    """A transformers configuration: family, its arguments, which layers are adapted, the default batch x sequence, and the
    methods that train it by default (empty: all)."""

    family: str
    settings: dict = field(hash=False)
    targets: tuple[str, ...]
    batch: int
    sequence: int
    methods: tuple[str, ...] = ()


def _bert(hidden: int, layers: int, heads: int, vocabulary: int) -> dict:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    return sizes | {"vocab_size": vocabulary, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _llama(hidden: int, layers: int, heads: int, intermediate: int, vocabulary: int, groups: int = 4) -> dict:
    """groups: how many heads share a key and a value."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": intermediate}
    return sizes | {"num_key_value_heads": heads // groups, "vocab_size": vocabulary, "use_cache": False}


_QV, _LLAMA_QV = ("query", "value"), ("q_proj", "v_proj")
# not the head, which is tied to the embedding
_LLAMA_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MAIN = (FLOOR, LORA, "lotr-eager", OURS, DORA, MAGNITUDE)
_SMOLLM2 = _llama(576, 30, 9, 1536, 49152, groups=3) | {"tie_word_embeddings": True, "max_position_embeddings": 8192}
_TIED = {"tie_word_embeddings": True}
SHAPES = {
    "minilm": Shape("bert", _bert(384, 6, 12, 30522), _QV, 16, 64),
    "smollm2-135m": Shape("causal-lm", _SMOLLM2, _LLAMA_ALL, 1, 128, _MAIN),
    "llama-8x4096": Shape("llama", _llama(4096, 8, 32, 14336, 32000), _LLAMA_QV, 4, 2048),
    "llama-8x2048": Shape("llama", _llama(2048, 8, 32, 5632, 32000), _LLAMA_QV, 4, 2048),
    "llama-lm-8x4096": Shape("causal-lm", _llama(4096, 8, 32, 14336, 32000) | _TIED, _LLAMA_ALL, 4, 2048, _MAIN),
    "llama-lm-8x2048": Shape("causal-lm", _llama(2048, 8, 32, 5632, 32000) | _TIED, _LLAMA_ALL, 2, 2048, _MAIN),
    "tiny-bert": Shape("bert", _bert(32, 2, 2, 100), _QV, 2, 8),
    "tiny-llama": Shape("llama", _llama(32, 2, 4, 64, 100), _LLAMA_QV, 2, 8),
    "tiny-lm": Shape("causal-lm", _llama(32, 2, 4, 64, 100) | _TIED, _LLAMA_ALL, 2, 8, _MAIN),
}
CAUSAL = tuple(name for name, shape in SHAPES.items() if shape.family == "causal-lm")


def base_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model of SHAPES[name] with random weights, frozen. Its embeddings' output requires a gradient, so that every method,
    and the frozen model too, goes backward through all layers."""
    import transformers

    shape = SHAPES[name]
    config, model = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "llama": (transformers.LlamaConfig, transformers.LlamaModel),
        "causal-lm": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[shape.family]
    torch.manual_seed(0)
    with torch.device(device):
        made = model(config(**shape.settings), **({"add_pooling_layer": False} if shape.family == "bert" else {}))
    made = made.to(dtype).requires_grad_(False).train()
    made.get_input_embeddings().register_forward_hook(_ask_for_gradient)
    return made


def _ask_for_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_()


def twin(base: nn.Module) -> nn.Module:
    """A copy of base's modules that uses the same parameter and buffer objects."""
    shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def adapted_widths(base: nn.Module, targets: tuple[str, ...]) -> Widths:
    """(in, out) of each layer whose name ends in one of targets."""
    found = [(m.in_features, m.out_features) for n, m in base.named_modules() if n.rsplit(".", 1)[-1] in targets]
    if not found:
        raise ValueError(f"targets: expected names of linear layers in the model, got {', '.join(targets)}")
    return found


# ---- parameters ------------------------------------------------------------------------------------------------------


def lora_parameters(widths: Widths, r: int) -> int:
    return sum(r * (k + n) for k, n in widths)


def lotr_parameters(widths: Widths, r: int) -> int:
    """S r^2 + r (k + n) for S layers of one shape, summed over shapes."""
    return sum(r * (k + n) for k, n in set(widths)) + r * r * len(widths)


def vera_parameters(widths: Widths, r: int) -> int:
    """d [r] and b [n] a layer; A and B are frozen and drawn from a seed."""
    return sum(r + n for _, n in widths)


def nearest_rank(count: Callable[[Widths, int], int], widths: Widths, budget: int) -> int:
    """The rank, at least 1, whose number of parameters is nearest to budget."""
    r = 1
    while count(widths, r + 1) <= budget:
        r += 1
    return r + 1 if count(widths, r + 1) - budget < budget - count(widths, r) else r


# ---- methods ---------------------------------------------------------------------------------------------------------


class EagerLoTR(nn.Module):
    """y = x W^T + bias + ((x A) G) B^T as the original implementation computes it; all layers of a shape share A and B."""

    def __init__(self, base: nn.Linear, A: nn.Parameter, B: nn.Parameter):
        super().__init__()
        self.base, self.A, self.B = base, A, B
        self.core = nn.Parameter(torch.zeros(A.shape[1], B.shape[1], dtype=A.dtype, device=A.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ((x @ self.A) @ self.core) @ self.B.T


def eager_lotr(model: nn.Module, targets: tuple[str, ...], r: int, core_only: bool = False) -> nn.Module:
    """Puts EagerLoTR around the model's targets, in the weights' dtype: the original cannot mix dtypes."""
    factors: dict[tuple[int, int], tuple[nn.Parameter, nn.Parameter]] = {}
    for name, module in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] not in targets:
            continue
        width = (module.in_features, module.out_features)
        if width not in factors:
            like = module.weight
            factors[width] = tuple(
                nn.Parameter(torch.randn(size, r, dtype=like.dtype, device=like.device) * size**-0.5, not core_only)
                for size in width
            )
        model.set_submodule(name, EagerLoTR(module, *factors[width]))
    return model


def our_lotr(model: nn.Module, targets: tuple[str, ...], r: int, **settings: object) -> nn.Module:
    from lotr_ext import LoTRConfig, apply_lotr

    return apply_lotr(model, LoTRConfig(rank=r, target_modules=list(targets), **settings))


class PerExample(nn.Module):
    """An adapted model whose backward also computes the gradient of each sequence; the last step's is kept."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **given: Tensor) -> object:
        from lotr_ext import per_example

        with per_example(self.model) as self.gradients:
            return self.model(**given)


def peft_lora(model: nn.Module, targets: tuple[str, ...], r: int, dora: bool = False) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=list(targets), use_dora=dora))


def peft_vera(model: nn.Module, targets: tuple[str, ...], r: int) -> nn.Module:
    from peft import VeraConfig, get_peft_model

    return get_peft_model(model, VeraConfig(r=r, target_modules=list(targets)))


@dataclass(frozen=True)
class Method:
    """label: for tables; make(model, targets, rank) -> model; rank(widths, r) -> the method's rank."""

    label: str
    make: Callable[[nn.Module, tuple[str, ...], int], nn.Module]
    rank: Callable[[Widths, int], int] = lambda widths, r: r


def _size_of_lotr(count: Callable[[Widths, int], int]) -> Callable[[Widths, int], int]:
    return lambda widths, r: nearest_rank(count, widths, lotr_parameters(widths, r))


METHODS = {
    FLOOR: Method("frozen model", lambda model, targets, r: model, lambda widths, r: 0),
    LORA: Method(named(LORA), peft_lora),
    "vera-peft": Method(named("vera-peft"), peft_vera),
    "lotr-eager": Method(named("lotr-eager"), eager_lotr),
    OURS: Method(named(OURS), our_lotr),
    "lora-peft-as-lotr": Method(named("lora-peft-as-lotr"), peft_lora, _size_of_lotr(lora_parameters)),
    "vera-peft-as-lotr": Method(named("vera-peft-as-lotr"), peft_vera, _size_of_lotr(vera_parameters)),
    "lotr_ext-as-lora": Method(
        named("lotr_ext-as-lora"), our_lotr, lambda widths, r: nearest_rank(lotr_parameters, widths, lora_parameters(widths, r))
    ),
    "lotr-eager-core": Method(named("lotr-eager-core"), partial(eager_lotr, core_only=True)),
    "lotr_ext-core": Method(named("lotr_ext-core"), partial(our_lotr, train=("core",))),
    DORA: Method(named(DORA), partial(peft_lora, dora=True)),
    MAGNITUDE: Method(named(MAGNITUDE), partial(our_lotr, magnitude=True)),
}


def _compiled(method: Method) -> Method:
    """The same in torch.compile, which traces at the first step, before anything is timed."""
    return replace(
        method, label=f"{method.label}, compiled", make=lambda *given: torch.compile(method.make(*given), dynamic=False)
    )


ON_REQUEST = {f"{name}-compiled": _compiled(METHODS[name]) for name in (FLOOR, "lotr-eager", OURS)}  # compiling takes a minute
PER_EXAMPLE = f"{OURS}-per-example"
ON_REQUEST[PER_EXAMPLE] = Method(named(PER_EXAMPLE), lambda *given: PerExample(our_lotr(*given)))
KNOWN = METHODS | ON_REQUEST
PEFTS = tuple(name for name in KNOWN if "-peft" in name)
QUICK = (FLOOR, LORA, "vera-peft", "lotr-eager", OURS, "lora-peft-as-lotr", "lotr_ext-as-lora")
