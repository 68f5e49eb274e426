"""Tiny mixtures of transformers for the tests, and the truth: their own eager forward, in float64, on experts' weights that
plain autograd has made of the base's and of A, B and the cores."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

from lotr_ext import LoTRConfig, apply_lotr
from lotr_ext.layers.hosted import LoTRHostedExperts
from lotr_ext.layers.layer import LoTRLayer

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
}
_NEMOTRON = {
    "layers_block_type": ["moe", "attention"],
    "n_routed_experts": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "moe_shared_expert_intermediate_size": 24,
    "head_dim": 8,
}
# class, what its configuration needs
MIXTURES = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 5, "head_dim": 8, "intermediate_size": 48},
    "Olmoe": {"intermediate_size": 24, "num_experts": 5},
    "DeepseekV3": {"moe_intermediate_size": 24, **_DEEPSEEK},
    "GptOss": {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 8},  # transposed, interleaved, with biases
    "NemotronH": {"moe_intermediate_size": 24, **_NEMOTRON},  # without a gate
    "AriaText": {"intermediate_size": 24, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},  # transposed
    "Qwen2Moe": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 4},
}
IDS = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(2))


def mixture(name: str = "Mixtral", dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    """The same weights for the same name."""
    torch.manual_seed(0)
    with contextlib.redirect_stderr(io.StringIO()):
        config = getattr(transformers, f"{name}Config")(
            **{**_SIZES, "num_experts_per_tok": 2, "tie_word_embeddings": False, **MIXTURES[name], **settings}
        )
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(dtype)
    if dtype == torch.float64:  # which torch's grouped product refuses
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("_proj_bias"):
                parameter.normal_(0, 0.1)
    return model


def parameters_of(name: str) -> list[str]:
    return ["experts.up_proj" if name == "NemotronH" else "experts.gate_up_proj", "experts.down_proj"]


def adapted(
    name: str = "Mixtral", dtype: torch.dtype = torch.float32, *, random: bool = True, model=None, **settings
) -> nn.Module:
    """With adapters in the experts, of values that matter."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    config = {"rank": 4, "target_parameters": parameters_of(name), "adapter_dtype": wide, **settings}
    model = apply_lotr(model or mixture(name, dtype), LoTRConfig(**config))
    if random:
        randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module, std: float = 0.3) -> None:
    """Gives every core values that matter."""
    gen = torch.Generator().manual_seed(7)
    for key, parameter in model.named_parameters():
        if key.endswith(".core"):
            parameter.copy_(torch.randn(parameter.shape, generator=gen) * std)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


def loss(model: nn.Module, **kwargs) -> Tensor:
    return model(IDS, labels=IDS, use_cache=False, **kwargs).loss


def written_out(
    model: nn.Module,
    plain: nn.Module,
    ids: Tensor = IDS,
    dtype: torch.dtype = torch.float64,
    of: Callable[[Any], Tensor] = lambda out: out.loss,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logits, loss, gradients of the adapter by name): of plain, the same model without an adapter, whose weights get the
    adapter's deltas as tensors in the graph. of: what of its output is differentiated."""
    plain = plain.to(dtype)
    plain.set_experts_implementation("eager")
    leaves = {n: p.detach().to(dtype).requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    factors = {id(m): n for n, m in model.named_modules() if hasattr(m, "r_in")}
    weights = dict(plain.named_parameters())
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, LoTRLayer)):
        at = factors[id(layer.factors)]
        hosted = isinstance(layer, LoTRHostedExperts)
        delta = layer.scaling * leaves[f"{at}.B"] @ leaves[f"{name}.core"].mT @ leaves[f"{at}.A"].T
        delta = delta.mT if hosted and layer.transposed else delta
        key = name.replace(".lotr.", ".") if hosted else f"{name}.weight"
        weights[key] = weights[key].detach() + delta
    out = functional_call(plain, weights, (ids,), {"labels": ids, "use_cache": False})
    grads = torch.autograd.grad(of(out), list(leaves.values()))
    return out.logits, out.loss, dict(zip(leaves, grads, strict=True))
