"""apply_lotr on transformers' models, built from small configurations without a network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import DRY, bert, gpt2, llama, roberta, transformers, vit
from torch import Tensor, nn
from toys import plain, randomize
from transformers.utils import ModelOutput

from lotr_ext import LoTRConv1D, LoTRLinear, mixed
from lotr_ext.model.adapted import adapted_layers, lotr_parameters
from lotr_ext.model.apply import apply_lotr, disabled
from lotr_ext.model.config import LoTRConfig
from lotr_ext.model.loading import load_adapter
from lotr_ext.model.merging import merge, unload, unmerge
from lotr_ext.model.saving import save_adapter
from lotr_ext.model.summary import trainable_summary
from lotr_ext.model.targets import select

MODELS: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "bert": (lambda: bert(**DRY), {"target_modules": ["query", "key", "value"], "modules_to_save": ["classifier"]}),
    "roberta": (lambda: roberta(**DRY), {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "gpt2": (lambda: gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "llama": (llama, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]}),
    "vit": (lambda: vit(**DRY), {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
}
IDS = torch.randint(3, 67, (4, 10), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 1, 2, 1])


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def adapted(name: str, **settings) -> nn.Module:
    return apply_lotr(make(name), LoTRConfig(**{"rank": 4, "alpha": 8.0, **MODELS[name][1], **settings}))


def outputs(model: nn.Module, **more: Tensor) -> ModelOutput:
    floating = next(model.parameters()).dtype
    return model(PIXELS.to(floating), **more) if hasattr(model, "vit") else model(input_ids=IDS, **more)


def loss(model: nn.Module) -> Tensor:
    return outputs(model, labels=IDS if model.can_generate() else CLASSES).loss


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return outputs(model.eval()).logits


@pytest.mark.parametrize("name", MODELS)
def test_starts_unchanged_trains_merges_saves_and_loads(name: str, tmp_path: Path) -> None:
    base = logits(make(name))
    model = adapted(name)
    assert torch.equal(logits(model), base)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(loss(model))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = logits(model)
    assert (trained - base).abs().max() > 1e-2
    if "modules_to_save" not in MODELS[name][1]:  # a head that was trained stays trained
        with disabled(model):
            assert torch.equal(logits(model), base)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(make(name), tmp_path)), trained)
    merge(model, safe=True)
    assert torch.allclose(logits(model), trained, atol=2e-5)
    unmerge(model)
    assert torch.equal(logits(model), trained)
    unload(model, merge=True)
    assert torch.allclose(logits(model), trained, atol=2e-5)
    fresh = make(name)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_gradients_equal_the_plain_definition(name: str, checkpointing: str | None) -> None:
    model = adapted(name, adapter_dtype=torch.float64).double()
    randomize(model)
    truth = plain(copy.deepcopy(model)).train()
    loss(truth).backward()
    want = {n: p.grad for n, p in truth.named_parameters() if p.requires_grad}
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        options = {"use_reentrant": checkpointing == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    loss(model).backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == want.keys()
    for key, grad in got.items():
        assert torch.allclose(grad, want[key], rtol=1e-8, atol=1e-12) and grad.abs().max() > 0, key


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_base_and_autocast(name: str) -> None:
    model = adapted(name).to(torch.bfloat16)
    for parameter in lotr_parameters(model):
        parameter.data = parameter.data.float()
    randomize(model)
    loss(model).backward()
    assert {p.grad.dtype for p in lotr_parameters(model)} == {torch.float32}
    mixed = adapted(name)
    randomize(mixed)
    with torch.autocast("cpu", torch.bfloat16):
        loss(mixed).backward()
    assert {p.grad.dtype for p in lotr_parameters(mixed)} == {torch.float32}
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in lotr_parameters(mixed))


def test_gpt2_keeps_conv1d_storage_and_leaves_its_tied_head_out() -> None:
    base, model = make("gpt2"), make("gpt2")
    chosen = [t.name for t in select(model, LoTRConfig()).targets]
    assert len(chosen) == 8 and "lm_head" not in chosen
    with pytest.raises(ValueError, match=r"lm_head.*tied to transformer\.wte\.weight"):
        select(model, LoTRConfig(target_modules=["lm_head"]))
    model = adapted("gpt2")
    layer = model.transformer.h[0].attn.c_attn
    assert (
        isinstance(layer, LoTRConv1D) and layer.weight.shape == (32, 96) and (layer.in_features, layer.out_features) == (32, 96)
    )
    assert list(model.lotr_factors) == ["32x96", "32x32", "32x128", "128x32"]
    assert set(base.state_dict()) <= set(model.state_dict())
    randomize(model)
    before = layer.weight.detach().clone()
    delta = layer.delta_weight()
    merge(model)
    assert delta.shape == (96, 32) and torch.allclose(layer.weight, before + delta.T, atol=1e-6)
    assert torch.equal(model.transformer.wte.weight, base.transformer.wte.weight)


def test_gpt2_svd() -> None:
    model = adapted("gpt2", init="svd")
    assert torch.allclose(logits(model), logits(make("gpt2")), atol=1e-5)
    assert model.transformer.h[0].attn.c_attn.weight.norm() < 0.99 * make("gpt2").transformer.h[0].attn.c_attn.weight.norm()


def test_llama_with_grouped_queries_has_several_groups() -> None:
    model = adapted("llama")
    assert list(model.lotr_factors) == ["32x32", "32x16", "48x32"]
    attention = model.model.layers[1].self_attn
    assert isinstance(attention.q_proj, LoTRLinear) and attention.q_proj.factors is attention.o_proj.factors
    assert attention.k_proj.factors is attention.v_proj.factors is not attention.q_proj.factors
    assert "lm_head" in [t.name for t in select(llama(), LoTRConfig(target_modules=["lm_head", "q_proj"])).targets]
    for tied in (False, True):  # as PEFT's "all-linear", which leaves an output layer out, tied or not
        assert "lm_head" not in [t.name for t in select(llama(tie_word_embeddings=tied), LoTRConfig()).targets]


def test_resizing_an_adapted_output_layer_is_refused_and_keeps_the_adapter() -> None:
    """transformers makes a new layer, which would have no adapter."""
    model = apply_lotr(llama(), LoTRConfig(rank=4, target_modules=["q_proj", "lm_head"]))
    randomize(model)
    ids = torch.randint(3, 67, (2, 5))
    want = model(ids).logits
    with pytest.raises(RuntimeError, match=r"resize_token_embeddings: expected layers without an adapter.*'lm_head'"):
        model.resize_token_embeddings(80)
    assert torch.equal(model(ids).logits, want)
    assert unload(model, merge=True).resize_token_embeddings(80).weight.shape == model.lm_head.weight.shape == (80, 32)
    kept = apply_lotr(llama(), LoTRConfig(rank=4, target_modules=["q_proj"]))
    kept.resize_token_embeddings(80)
    assert kept(ids).logits.shape[-1] == 80


def test_continuous_batching_is_refused_in_contexts_that_its_thread_does_not_see() -> None:
    config = pytest.importorskip("transformers.generation.configuration_utils")
    small = config.ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64)
    how = config.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model = apply_lotr(llama(initializer_range=0.2), LoTRConfig(rank=4, target_modules=["q_proj", "v_proj"])).eval()
    randomize(model, std=0.5)
    prompt = [3, 4, 5, 6]

    def batch(of: nn.Module) -> list[int]:
        (found,) = of.generate_batch([prompt], generation_config=how, continuous_batching_config=small).values()
        return found.generated_tokens

    want = model.generate(torch.tensor([prompt]), generation_config=how)[0, len(prompt) :].tolist()
    assert batch(model) == batch(copy.deepcopy(model)) == want
    for context in (disabled(model), mixed(model, ["default"])):
        with context, pytest.raises(RuntimeError, match="init_continuous_batching: expected a call outside of disabled"):
            batch(model)
    with disabled(apply_lotr(llama(), LoTRConfig(rank=4, target_modules=["q_proj"]))):  # another model's context
        assert batch(model) == want
    assert batch(unload(model, merge=True)) == want and "init_continuous_batching" not in vars(model)


def test_save_pretrained_holds_the_factors_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = adapted("llama")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(model.state_dict())


def test_mamba_mixers_are_refused_by_name() -> None:
    config = transformers.MambaConfig(vocab_size=67, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config)
    with pytest.raises(ValueError, match=r"out_proj.*MambaMixer reads"):
        select(model, LoTRConfig(target_modules=["out_proj"]))
    with pytest.warns(UserWarning, match="left out .*x_proj"):
        assert [t.name.rpartition(".")[2] for t in select(model, LoTRConfig()).targets] == ["in_proj"]


# ---- parameter counts, as published for RoBERTa ----------------------------------------------------------------------


def roberta_on_meta(**settings) -> nn.Module:
    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 2}
    with torch.device("meta"):
        return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes, **settings))


COUNTS = {1: 1560, 2: 3168, 4: 6528, 8: 13824, 16: 30720, 32: 73728, 40: 99840, 80: 276480, 88: 321024}


def test_counts_on_roberta_base() -> None:
    model = roberta_on_meta()
    for rank, count in COUNTS.items():
        apply_lotr(model, LoTRConfig(rank=rank, target_modules=["query", "value"], modules_to_save=["classifier"]))
        summary = trainable_summary(model)
        assert (summary.layers, summary.adapter, summary.trained) == (24, count, count + 592130)
        assert sum(p.numel() for p in lotr_parameters(model)) == count
        assert len(adapted_layers(model)) == 24
        unload(model, merge=False)


def test_counts_on_roberta_large() -> None:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    model = roberta_on_meta(**sizes)
    apply_lotr(model, LoTRConfig(rank=64, target_modules=["query", "value"]))
    assert trainable_summary(model)[:2] == (327680, 327680)
