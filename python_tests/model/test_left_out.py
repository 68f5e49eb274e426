""" "all-linear" takes what PEFT's takes, and the summary says what it, or a regular expression, left out and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import LLAMA, SIZE, gpt2, llama, transformers
from torch import nn
from toys import adapted, target_names, toy

from lotr_ext import LoTRConfig, apply_lotr, load_adapter, save_adapter, trainable_summary
from lotr_ext.model.adapted import adapted_layers


def classifier(kind: str) -> nn.Module:
    sizes = LLAMA if kind == "Llama" else SIZE
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=3, pad_token_id=1)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, num_local_experts=4))


def mamba() -> nn.Module:
    sizes = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "tie_word_embeddings": False}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Llama": (llama, "CAUSAL_LM"),
    "Llama, tied": (lambda: llama(tie_word_embeddings=True), "CAUSAL_LM"),
    "GPT-2": (gpt2, "CAUSAL_LM"),
    **{f"{kind}, classes": (lambda kind=kind: classifier(kind), "SEQ_CLS") for kind in ("Bert", "Roberta", "Llama")},
}


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_takes_what_pefts_takes(name: str) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    make, task = MODELS[name]
    config = peft.LoraConfig(target_modules="all-linear", task_type=task)
    lora = peft.get_peft_model(make(), config).base_model.model
    want = [n for n, m in lora.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert target_names(make(), target_modules="all-linear") == target_names(make()) == want


def test_a_head_of_a_model_inside_another_is_left_out_and_a_name_takes_it() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.probe = llama(), nn.Linear(67, 2)

    found = target_names(Around())
    assert "inner.lm_head" not in found and "probe" in found
    assert target_names(llama(), target_modules=["lm_head"]) == ["lm_head"]
    assert "lm_head" in target_names(llama(), target_modules=r".*lm_head|.*q_proj")


def left_out(model: nn.Module, **settings) -> dict[str, str]:
    apply_lotr(model, LoTRConfig(**{"rank": 4, "target_modules": "all-linear", **settings}))
    summary = trainable_summary(model)
    assert not set(dict(summary.left_out)) & set(adapted_layers(model))
    return dict(summary.left_out)


def test_the_summary_says_what_all_linear_left_out_and_why(tmp_path) -> None:
    assert left_out(llama()) == {"lm_head": "the output layer: name it to adapt it"}
    assert left_out(llama(tie_word_embeddings=True)) == {"lm_head": "its weight is tied to model.embed_tokens.weight"}
    model = mixtral()
    found = left_out(model)
    assert set(found) == {"lm_head", *(f"model.layers.{i}.mlp.experts" for i in range(2))}
    why = "gate_up_proj is a 3-D parameter, not a linear layer; target_parameters takes experts"
    assert found["model.layers.1.mlp.experts"] == why
    assert f"\nleft out: model.layers.0.mlp.experts and 1 more ({why})" in str(trainable_summary(model))
    save_adapter(model, tmp_path)
    assert dict(trainable_summary(load_adapter(mixtral(), tmp_path)).left_out) == found
    found = left_out(classifier("Roberta"))
    assert set(found) == {"classifier.dense", "classifier.out_proj"} and "modules_to_save" in found["classifier.dense"]
    with pytest.warns(UserWarning, match="left out"):
        found = left_out(mamba())
    assert found["backbone.layers.1.mixer.out_proj"] == "MambaMixer reads its weight without calling it"
    assert not any("conv1d" in name for name in found)


def test_the_summary_says_what_a_regular_expression_left_out_and_why() -> None:
    found = left_out(mixtral(), target_modules=r".*(q_proj|experts|lm_head)", exclude_modules=["lm_head"])
    assert set(found) == {"lm_head", *(f"model.layers.{i}.mlp.experts" for i in range(2))}
    assert found["lm_head"] == "exclude_modules"
    found = left_out(toy(), target_modules=r"head|.*\.q", modules_to_save=["head"])
    assert found == {"head": "trained whole (modules_to_save)"}


def test_named_layers_leave_nothing_out() -> None:
    assert trainable_summary(adapted()).left_out == ()
    assert "left out" not in str(trainable_summary(adapted()))
    foreign = toy()

    class Doubled(nn.Linear):
        pass

    class Packed(nn.Module):
        in_features, out_features = 16, 16

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    foreign.blocks[0].q, foreign.blocks[0].k = Doubled(16, 16), Packed()
    assert left_out(foreign) == {"blocks.0.k": "a Packed: name it to adapt it"}


def test_a_name_given_as_a_string_is_hinted_at() -> None:
    with pytest.raises(ValueError, match=r"got 'q', which matches none; a string is a regular expression.* pass \['q'\]"):
        apply_lotr(toy(), LoTRConfig(target_modules="q"))
    with pytest.raises(ValueError, match=r"got 'qq', which matches none; the closest is 'q'$"):
        apply_lotr(toy(), LoTRConfig(target_modules="qq"))


def test_what_matches_nothing_is_told_the_closest_names() -> None:
    for settings, closest in (
        ({"target_modules": ["querry"]}, r"got 'querry', which matches none; the closest is 'query'"),
        ({"target_modules": ["self.valu"]}, r"got 'self.valu', which matches none; the closest are 'self.value'"),
        ({"modules_to_save": ["clasifier"]}, r"got 'clasifier', which matches none; the closest is 'classifier'"),
        ({"exclude_modules": ["kee"]}, r"got 'kee', which matches none; the closest is 'key'"),
    ):
        with pytest.raises(ValueError, match=closest):
            apply_lotr(classifier("Bert"), LoTRConfig(**settings))
    with pytest.raises(
        ValueError,
        match=r"got 'experts.gate_proj', which matches none; the closest are 'experts.gate_up_proj', 'experts.down_proj'",
    ):
        apply_lotr(mixtral(), LoTRConfig(target_parameters=["experts.gate_proj"]))
    with pytest.raises(ValueError, match=r"got 'zzzz', which matches none$"):
        apply_lotr(toy(), LoTRConfig(target_modules=["zzzz"]))
