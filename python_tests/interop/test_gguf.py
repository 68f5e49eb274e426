"""LoRA files of llama.cpp: names, values and the order of rows, read back by the package gguf."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from torch import Tensor, nn

from lotr_ext import LoTRConfig, apply_lotr, save_adapter
from lotr_ext.convert import main
from lotr_ext.interop import lotr_to_gguf
from lotr_ext.interop.gguf import interleave_halves
from lotr_ext.model.adapted import adapted_layers
from nets import relative

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def adapted(kind: str = "llama", **settings) -> nn.Module:
    of, shape = MODELS[kind]
    torch.manual_seed(0)
    model = of(shape(**SIZES, head_dim=8)).eval()
    model = apply_lotr(model, LoTRConfig(**{"rank": 4, "alpha": 6.0, "target_modules": "all-linear", **settings}))
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.core, 0, 0.3)
    return model


def saved(folder: Path, model: nn.Module) -> Path:
    """The adapter of model; its configuration stands beside it."""
    save_adapter(model, folder / "lotr")
    model.config.save_pretrained(folder / "base")
    return folder / "lotr"


def read(path: Path) -> tuple[float, dict[str, Tensor]]:
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "adapter" and reader.fields["adapter.type"].contents() == "lora"
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    return reader.fields["adapter.lora.alpha"].contents(), tensors


def plain_order(rows: Tensor, heads: int) -> Tensor:
    """The rows of q or k as transformers has them, of rows as llama.cpp has them: one by one."""
    d, out = len(rows) // heads, torch.empty_like(rows)
    for h in range(heads):
        for j in range(d // 2):
            out[h * d + j], out[h * d + d // 2 + j] = rows[h * d + 2 * j], rows[h * d + 2 * j + 1]
    return out


@pytest.mark.parametrize("settings", [{}, {"rank": (3, 5)}, {"init": "svd"}, {"group_by": "width"}], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_adds_what_the_adapter_adds(tmp_path: Path, kind: str, settings: dict) -> None:
    model = adapted(kind, **settings)
    layers, pretrained = adapted_layers(model), adapted(kind)  # the same seed, so the same base weights
    if "init" not in settings:
        for i, layer in enumerate(layers.values()):
            layer.scaling *= 1.0 + 0.25 * i  # a layer may have a scaling of its own
    lotr_to_gguf(saved(tmp_path, model), tmp_path / "lora.gguf", base_model=tmp_path / "base")
    alpha, tensors = read(tmp_path / "lora.gguf")
    seen = set()
    for name, layer in layers.items():
        block, _, rest = name.removeprefix("model.layers.").partition(".")
        at = f"blk.{block}.{NAMES[rest]}.weight.lora_"
        A, B = tensors[f"{at}a"], tensors[f"{at}b"]
        if kind == "llama" and NAMES[rest] in ("attn_q", "attn_k"):
            B = plain_order(B, SIZES["num_attention_heads" if NAMES[rest] == "attn_q" else "num_key_value_heads"])
        want = layer.weight + layer.delta_weight() - pretrained.get_submodule(name).weight
        assert relative(alpha / A.shape[0] * B @ A, want.detach()) < 1e-4
        seen |= {f"{at}a", f"{at}b"}
    assert seen == set(tensors)


def test_interleaved_halves_turn_together() -> None:
    """Rotary embedding of pairs (2j, 2j + 1) on the interleaved rows has the scores of that of halves on the plain rows."""
    torch.manual_seed(0)
    d, heads, tokens = 8, 3, 5
    angles = torch.outer(torch.arange(tokens), 10000.0 ** (-torch.arange(d // 2) / (d // 2)))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def by_halves(x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)

    def by_pairs(x: Tensor) -> Tensor:
        one, two = x[..., ::2], x[..., 1::2]
        return torch.stack((one * cos - two * sin, two * cos + one * sin), -1).flatten(-2)

    x = torch.randn(tokens, 16)
    found = []
    for rotate, order in ((by_halves, lambda w: w), (by_pairs, lambda w: interleave_halves(w, heads))):
        torch.manual_seed(1)
        q, k = (rotate((x @ order(torch.randn(heads * d, 16)).T).view(tokens, heads, d)) for _ in range(2))
        found.append(torch.einsum("thd,shd->hts", q, k))
    assert relative(*found) < 1e-5


def test_the_command_writes_the_same_file(tmp_path: Path) -> None:
    source = saved(tmp_path, adapted())
    lotr_to_gguf(source, tmp_path / "one.gguf", base_model=tmp_path / "base")
    assert main(["lotr-to-gguf", str(source), str(tmp_path / "new" / "two.gguf"), "--base-model", str(tmp_path / "base")]) == 0
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "new" / "two.gguf").read_bytes()


def test_what_llama_cpp_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, base = saved(tmp_path, adapted()), tmp_path / "base"

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            lotr_to_gguf(source, tmp_path / "none" / "x.gguf", base_model=base)
        assert not (tmp_path / "none").exists()

    config = json.loads((base / "config.json").read_text())
    for changed, match in (
        ({"model_type": "bert"}, "base_model: expected a model type of llama, mistral, .*, got 'bert'"),
        ({"num_attention_heads": "4"}, "base_model: expected a positive num_attention_heads in config.json, got '4'"),
        ({"num_attention_heads": 3}, "base_model: expected 3 heads of an even size, got 32 rows"),
        ({"num_hidden_layers": 1}, "source: expected layers of llama as llama.cpp has them, got 'model.layers.1"),
    ):
        (base / "config.json").write_text(json.dumps({**config, **changed}))
        refused(match)
    (base / "config.json").write_text("[")
    refused("base_model: expected a directory with config.json")
    (base / "config.json").write_text(json.dumps(config))
    source = saved(tmp_path, adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    refused(r"source: expected only linear layers, got modules_to_save \(lm_head.weight\)")
    assert main(["lotr-to-gguf", str(source), str(tmp_path), "--base-model", str(base)]) == 2
    assert "destination: expected a file, got the directory" in capsys.readouterr().err
