"""save_pretrained and Trainer's checkpoints of adapted models go out and come back whole, or are refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import SIZE, bert, gpt2, llama, transformers, vit
from torch import Tensor, nn
from toys import randomize

from lotr_ext import (
    LoTRConfig,
    add_adapter,
    apply_lotr,
    from_pretrained,
    load_adapter,
    merge,
    set_adapter,
    trainable_summary,
    unload,
)
from lotr_ext.model.adapted import adapted_layers, lotr_parameters

IDS = torch.randint(3, 67, (4, 6), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


QV = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict, type]] = {
    "BERT": (bert, QV, transformers.AutoModelForSequenceClassification),
    "BERT, svd": (bert, {**QV, "init": "svd"}, transformers.BertForSequenceClassification),
    "Llama": (llama, {"target_modules": "all-linear", "rank": (3, 5)}, transformers.AutoModelForCausalLM),
    "GPT-2": (gpt2, {"target_modules": ["c_attn", "c_fc"]}, transformers.GPT2LMHeadModel),
    "ViT, whose names are others on the Hub": (
        vit,
        {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
        transformers.ViTForImageClassification,
    ),
}


def trained(name: str) -> nn.Module:
    make, settings, _ = MODELS[name]
    torch.manual_seed(0)
    model = apply_lotr(make(), LoTRConfig(**{"rank": 4, **settings}))
    randomize(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def out(model: nn.Module) -> Tensor:
    return (model(pixel_values=PIXELS) if "ViT" in type(model).__name__ else model(input_ids=IDS)).logits


@pytest.mark.parametrize("name", MODELS)
def test_what_save_pretrained_writes_comes_back(name: str, tmp_path: Path) -> None:
    model, model_class = trained(name), MODELS[name][2]
    model.save_pretrained(tmp_path)
    again = from_pretrained(model_class, tmp_path)
    assert torch.equal(out(again), out(model)) and again.lotr_config == model.lotr_config
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(out(from_pretrained(model_class, tmp_path / "again")), out(model))
    if "svd" not in name:  # the adapter beside the weights is one like any other
        torch.manual_seed(0)
        assert torch.equal(out(load_adapter(MODELS[name][0]().eval(), tmp_path)), out(model))


def test_layers_that_are_wrapped_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert()
    for layer in model.bert.encoder.layer:
        layer.attention.self.query.register_forward_hook(lambda module, args, y: None)
    apply_lotr(model, LoTRConfig(rank=4, **QV))
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    assert any(".base_layer." in key for key in load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(
        out(from_pretrained(type(model), tmp_path)), out(model)
    )  # the copy has no hooks to be wrapped for


def test_trainers_own_checkpoints_come_back(tmp_path: Path, capsys) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = trained("BERT")
    data = [{"input_ids": IDS[i % 4], "labels": i % 3} for i in range(12)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, per_device_train_batch_size=3
    )
    transformers.Trainer(model, arguments, train_dataset=data).train()
    again = from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path / "checkpoint-4")
    assert torch.equal(out(again), out(model.eval()))
    before = from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path / "checkpoint-2")
    assert not torch.equal(out(before), out(again))
    capsys.readouterr()


def test_only_the_main_process_writes_and_a_given_state_is_taken(tmp_path: Path) -> None:
    model = trained("BERT")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "lotr_adapter.json").exists()
    model.save_pretrained(tmp_path, True, model.state_dict())
    assert torch.equal(out(from_pretrained(type(model), tmp_path)), out(model))


def test_a_model_held_in_parts_is_saved_from_the_whole_tensors_that_are_given(tmp_path: Path) -> None:
    """As Trainer does it under FSDP and ZeRO-3: process 0 alone saves, with the gathered state."""
    model = trained("BERT")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in lotr_parameters(model):
        parameter._fsdp_flattened, parameter.data = True, parameter.data.flatten()[:0]  # as FSDP1 leaves them
    model.save_pretrained(tmp_path, state_dict=dict(state))
    want = {name: value for name, value in state.items() if name.endswith(".core")}
    found = from_pretrained(type(model), tmp_path).state_dict()
    assert want and all(torch.equal(found[name], value) for name, value in want.items())
    del state["lotr_factors.32x32.A"]
    with pytest.raises(RuntimeError, match=r"expected lotr_factors.32x32.A whole in state_dict"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_copies_and_pickles_save_themselves_and_no_model_is_kept_alive(tmp_path: Path) -> None:
    model = trained("BERT")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            next(iter(adapted_layers(other).values())).core.add_(1)
        other.save_pretrained(tmp_path)
        assert torch.equal(out(from_pretrained(type(model), tmp_path)), out(other)) and not torch.equal(out(other), out(model))
    alone, reference = copy.deepcopy(model), None
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(alone.bert.encoder.layer[0].attention.self.query.weight)
        del alone
        assert reference() is None
    finally:
        gc.enable()


class Pair(nn.Module):
    """Two encoders that share the factors, and a head of its own."""

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__()
        self.query_side, self.answer_side = transformers.BertModel(config), transformers.BertModel(config)
        self.head = nn.Linear(32, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"group_by": "width"},
        {"init": "svd"},
        {"group_by": lambda name, module: name.partition(".")[0]},
        {"modules_to_save": ["head", "pooler"]},
    ],
    ids=["shape", "width", "svd", "by side", "saved"],
)
def test_a_part_that_is_a_whole_model_saves_its_own_adapter(settings: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pair(transformers.BertConfig(**SIZE))
    apply_lotr(model, LoTRConfig(rank=4, target_modules=["query", "value"], **settings))
    randomize(model)
    with torch.no_grad():
        model.query_side.pooler.dense.weight.add_(0.1)
    for name, part in (("query", model.eval().query_side), ("answer", model.answer_side)):
        part.save_pretrained(tmp_path / name)
        again = from_pretrained(transformers.BertModel, tmp_path / name)
        with torch.no_grad():
            got, want = (one(input_ids=IDS) for one in (again, part))
        torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state)
        torch.testing.assert_close(got.pooler_output, want.pooler_output)
        assert len(adapted_layers(again)) == 4 and trainable_summary(again).layers == 4
        again.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(from_pretrained(transformers.BertModel, tmp_path / "again").state_dict(), again.state_dict())


def test_the_encoder_of_a_classifier_saves_its_own_adapter(tmp_path: Path) -> None:
    model = trained("BERT")
    model.bert.save_pretrained(tmp_path)
    again = from_pretrained(transformers.AutoModel, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).last_hidden_state, model.bert(input_ids=IDS).last_hidden_state)
    assert again.lotr_config.modules_to_save is None


def test_without_an_adapter_it_is_transformers_own_again(tmp_path: Path) -> None:
    model = trained("BERT")
    model.save_pretrained(tmp_path)
    y = out(model)
    unload(model, merge=True)
    assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.bert)
    model.save_pretrained(tmp_path)  # over the adapted one, whose adapter stays beside it
    torch.testing.assert_close(out(type(model).from_pretrained(tmp_path).eval()), y)
    with pytest.raises(ValueError, match="directory: expected weights saved together with their adapter"):
        from_pretrained(type(model), tmp_path)  # the adapter is in the weights already


def test_what_would_be_lost_is_refused_or_said(tmp_path: Path) -> None:
    model = trained("BERT")
    with pytest.raises(RuntimeError, match=r"expected a part of the model that has the factors, got a BertModel outside of it"):
        part = copy.deepcopy(model.bert)
        part.save_pretrained(tmp_path)
    shared = apply_lotr(bert(), LoTRConfig(rank=4, **QV, core="tucker"))
    with pytest.raises(RuntimeError, match="expected dense cores in the part BertModel"):
        shared.bert.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    with pytest.raises(ValueError, match="push_to_hub: expected False"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(RuntimeError, match="save_pretrained: expected unmerged layers"):
        merged = merge(copy.deepcopy(model))
        merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()  # transformers writes config.json before it reads the tensors
    with pytest.raises(RuntimeError, match="expected a model that is still referenced"):
        copy.deepcopy(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a LoTR adapter"):
        from_pretrained(type(model), tmp_path / "nothing")
    add_adapter(model, "other")
    set_adapter(model, "other")
    with pytest.warns(UserWarning, match="wrote the adapter 'other' beside the weights, but not default"):
        model.save_pretrained(tmp_path)
    assert torch.equal(out(from_pretrained(type(model), tmp_path)), out(model))
