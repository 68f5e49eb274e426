"""Six small networks for the tests of models, and two quantized layers.

`net(name)` has the same weights on every machine and with every version of transformers: they are
drawn parameter by parameter, from one generator.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WIDTH = 16
VOCABULARY = 29
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Children(nn.Module):
    """A module with these children, parameters and methods. A subclass adds the forward."""

    def __init__(self, **children: nn.Module | nn.Parameter | Callable) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class Mlp(nn.Module):
    """Two blocks of two shapes, and a head: x [.., 16] -> [.., 3]."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (
            {"up": nn.Linear(WIDTH, 24), "down": nn.Linear(24, WIDTH, bias=False)} for _ in range(2)
        )
        self.blocks = nn.ModuleList(nn.ModuleDict(block) for block in blocks)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


class AttentionBlock(nn.ModuleDict):
    """q, k and v read the same x, o another: x [b, tokens, 16] -> [b, tokens, 16]."""

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.layer_norm(x, (WIDTH,))
        weights = torch.softmax(self["q"](h) @ self["k"](h).mT / WIDTH**0.5, -1)
        return x + self["o"](weights @ self["v"](h))


class FusibleAttention(Children):
    """Three projections of width 8 that can be fused, as in diffusers."""

    fused_projections = False

    def __init__(self) -> None:
        super().__init__(**{f"to_{name}": nn.Linear(8, 8, bias=False) for name in "qkv"})

    def fuse_projections(self, fuse: bool = True) -> None:
        self.to_qkv = nn.Linear(8, 24, bias=False)
        weights = [part.weight for part in (self.to_q, self.to_k, self.to_v)]
        self.to_qkv.weight.data.copy_(torch.cat(weights))
        self.fused_projections = fuse

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_projections:
            return self.to_qkv(x)
        return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], -1)


class Attention(nn.Module):
    """Two attention blocks: token ids [b, tokens] -> [b, tokens, 29]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(
            *(AttentionBlock({n: nn.Linear(WIDTH, WIDTH) for n in "qkvo"}) for _ in range(2))
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids)))


def _transformers(family: str, head: str, **settings: object) -> nn.Module:
    """Returns a model of transformers, such as Bert + ForSequenceClassification."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, family + head)(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped product lacks float64
    return model


_LLAMA = {**_SIZES, **_TOKENS, "num_key_value_heads": 1, "max_position_embeddings": 32}
_NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "attention": Attention,
    "bert": partial(
        _transformers,
        "Bert",
        "ForSequenceClassification",
        **_SIZES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
    ),
    "gpt2": partial(
        _transformers,
        "GPT2",
        "LMHeadModel",
        **_TOKENS,
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "llama": partial(_transformers, "Llama", "ForCausalLM", **_LLAMA, intermediate_size=24),
    "mixture": partial(
        _transformers,
        "Mixtral",
        "ForCausalLM",
        **_LLAMA,
        intermediate_size=12,
        num_local_experts=3,
        num_experts_per_tok=2,
    ),
}
NETS = tuple(_NETS)
# The layers to adapt; of a mixture, the experts' parameters.
TARGETS = {
    "mlp": ["up", "down"],
    "attention": ["q", "k", "v", "o"],
    "bert": ["query", "value", "output.dense"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mixture": ["experts.gate_up_proj", "experts.down_proj"],
}


@torch.no_grad()
def fill(
    module: nn.Module,
    seed: int = 0,
    scale: float = 0.3,
    only: Callable[[str], bool] = lambda name: True,
) -> nn.Module:
    """Gives the named parameters random values, in the order of their names.

    To a vector, such as the weight of a norm, a third of a random value is added instead.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if only(name):
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            parameter.copy_(values if parameter.dim() > 1 else parameter + values / 3)
    return module


def net(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns one of NETS in eval mode.

    `fill` moves norms from their initial values in PyTorch or transformers, and biases from zero.
    """
    model = _NETS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.zero_()
    return fill(model).to(dtype)


def inputs(name: str, rows: int = 3, tokens: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input of the named net: numbers for the MLP, token ids for all others."""
    generator = torch.Generator().manual_seed(1)
    if name == "mlp":
        return torch.randn(rows, tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)


def output(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the model's output as one tensor: the logits of a transformers model."""
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


# ---- quantized layers ----------------------------------------------------------------------------


class Codes(nn.Module):
    """A quantized layer with int8 codes and one scale per row. Its weight must not be read."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (weight / self.scale).round().to(torch.int8))

    @property
    def weight(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Dense(Codes):
    """A quantized layer that can be made dense."""

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale
