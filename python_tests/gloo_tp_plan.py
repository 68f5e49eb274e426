"""As `gloo_checks`, for transformers models that `from_pretrained(tp_plan="auto")` has cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lotr_ext import (
    LoTRConfig,
    TaskBank,
    apply_lotr,
    disabled,
    explain,
    load_adapter,
    merge,
    mixed,
    save_adapter,
    unload,
    unmerge,
)
from nets import relative

KINDS = ("Llama", "Qwen3", "Mixtral")
MORE = ("Phi3", "DeepseekV2")  # Phi3 gathers in between, DeepseekV2 has latent attention
IDS = torch.arange(12).view(2, 6) % 30


def settings(kind: str) -> Any:
    import transformers

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    latent = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    more = {
        "Llama": {"attention_bias": True, "mlp_bias": True},
        "Mixtral": {"num_local_experts": 4},
        "DeepseekV2": latent | {"num_key_value_heads": 4, "first_k_dense_replace": 2},
    }
    more = more.get(kind, {})
    return getattr(transformers, f"{kind}Config")(**(sizes | heads | tokens | more))


def exact_norms(model: nn.Module) -> None:
    """From now on the RMSNorms of model's class keep float64: transformers' round to float32 inside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    for kind in {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}:
        kind.forward = forward


def loaded(folder: Path, kind: str, cut: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options = {"tp_plan": "auto"} if cut else {}
    eager = {"experts_implementation": "eager"} if kind == "Mixtral" else {}
    return AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float64, **options, **eager)


def written(folder: Path, kind: str) -> None:
    """A base model in a folder."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings(kind), dtype=torch.float64)
    exact_norms(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / kind)
    dist.barrier()


def adapted(model: nn.Module, seed: int = 1, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    apply_lotr(model, LoTRConfig(**{"rank": 4, "adapter_dtype": torch.float64} | options))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("core"):
                p.copy_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def steps(model: nn.Module, count: int) -> None:
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def off(model: nn.Module, want: Tensor) -> float:
    return relative(logits(model), want)


def more_plans(rank: int, folder: Path) -> dict:
    return plans(rank, folder, MORE)


def plans(rank: int, folder: Path, kinds: tuple[str, ...] = KINDS) -> dict:
    found = {}
    for kind in kinds:
        written(folder, kind)
        alone, cut = loaded(folder, kind, False), loaded(folder, kind, True)
        base = logits(cut)
        adapted(alone), adapted(cut, seed=1 + rank)  # rank 0's factors count
        y, y_cut = alone(IDS, labels=IDS), cut(IDS, labels=IDS)
        y.loss.backward(), y_cut.loss.backward()
        want, got = trained(alone), trained(cut)
        assert want.keys() == got.keys()
        own: dict[str, Any] = {"y": relative(y_cut.logits, y.logits.detach())}
        own["gradients"] = max(relative(got[name].grad, p.grad) for name, p in want.items())
        steps(alone, 3), steps(cut, 3)
        own["steps"] = max(relative(got[name], p.detach()) for name, p in want.items())
        want_y = logits(alone)
        own["inference"] = off(cut, want_y)
        with disabled(cut):
            own["disabled"] = off(cut, base)
        tasks = [TaskBank(m, tasks=2) for m in (alone, cut)]
        for bank in tasks:
            bank.taken.fill_(True)
            torch.manual_seed(5)
            for core in bank.cores:
                core.copy_(torch.randn(core.shape, dtype=core.dtype))
        index = torch.tensor([1, 0])
        with mixed(alone, index), mixed(cut, index):
            own["mixed"] = off(cut, logits(alone))
        own["generated"] = float(not torch.equal(*(m.generate(IDS, max_new_tokens=4, do_sample=False) for m in (alone, cut))))
        save_adapter(cut, folder / f"{kind}-adapter")
        if kind == "Llama":
            own["in one"] = off(load_adapter(loaded(folder, kind, False), folder / f"{kind}-adapter"), want_y)
            own["onto parts"] = off(load_adapter(loaded(folder, kind, True), folder / f"{kind}-adapter"), want_y)
        other = adapted(loaded(folder, kind, True), seed=7)
        own["into parts"] = off(load_adapter(other, folder / f"{kind}-adapter"), want_y)
        before = [p.to_local().clone() for p in cut.parameters() if isinstance(p, DTensor)]
        merge(cut)
        own["merged"] = off(cut, want_y)
        own["merged, with a graph"] = relative(cut(IDS).logits, want_y)
        unmerge(cut)
        after = (p.to_local() for p in cut.parameters() if isinstance(p, DTensor))
        own["bits"] = float(not all(torch.equal(a, b) for a, b in zip(before, after)))
        unload(cut, merge=False)
        own["taken off"] = off(cut, base)
        unload(other, merge=True)
        own["merged and taken off"] = relative(other(IDS).logits, want_y)
        found[kind] = own
    return found


def plans_told(rank: int, folder: Path) -> dict:
    cut = adapted(loaded(folder, "Llama", True))
    at = cut.model.layers[0]
    x = torch.zeros(2, 6, 16, dtype=torch.float64)
    return {"up": str(explain(at.mlp.up_proj, x)), "o": str(explain(at.self_attn.o_proj, x))}
