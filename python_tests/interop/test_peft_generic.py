"""What PEFT's generic tests ask of any method, asked of LoTR: making, training, disabling, merging, status, conversion.

Theirs are tests/test_custom_models.py and tests/testing_common.py of huggingface/peft; docs/peft.md lists check by check.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from peft_toys import (
    CASES,
    Conv1D,
    base,
    base_of,
    close,
    config,
    layers,
    loaded,
    made,
    ours,
    peft,
    plain,
    randomize,
    step,
    trained,
    tuned,
    with_two,
)
from torch import nn
from toys import IDS, REPARAMETRISED, assert_unchanged, loss, no_warnings, snapshot

each_case = pytest.mark.parametrize("case", CASES)


# ---- making and training ---------------------------------------------------------------------------------------------


@each_case
def test_starts_as_the_base_model_and_shows_what_it_has(case):
    model = made(case, random=False)
    assert close(model(IDS), base_of(case)(IDS), atol=1e-6) and model(IDS).isfinite().all()
    for layer in layers(model):
        inner = layer.get_base_layer()
        factors = layer.lotr_adapter["default"].factors
        assert (layer.in_features, layer.out_features) == (factors.A.shape[0], factors.B.shape[0])
        assert layer.weight is inner.weight and layer.bias is inner.bias
        text = repr(layer)
        assert text.startswith("lotr.LoTRPeftLinear(") and "(default): LoTRCore(rank=" in text
    assert all(hasattr(model, name) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))


@each_case
def test_training_changes_the_adapter_and_nothing_else(case):
    model = made(case, random=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = {n for n in before if "lotr_" in n or ".modules_to_save." in n}
    assert set(trained(model)) == expected
    first = loss(model).item()
    step(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == expected and loss(model).item() < first


@pytest.mark.parametrize("train", [("core",), ("A", "core"), ("B", "core")])
def test_only_the_parts_asked_for_are_trained(train):
    model = tuned(train=list(train))
    want = {"core": 4, "A": 1, "B": 1}
    assert {part: sum(n.endswith(f".{part}") for n in trained(model)) for part in want} == {
        part: n * (part in train) for part, n in want.items()
    }
    model.set_requires_grad("default", False)
    assert trained(model) == []
    model.set_requires_grad("default")
    assert {n.rpartition(".")[2] for n in trained(model)} == set(train)
    with model.disable_adapter():
        assert trained(model) == []
    model.set_adapter("default")
    assert {n.rpartition(".")[2] for n in trained(model)} == set(train)


def test_gradient_checkpointing_and_tasks_of_transformers_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0, "n_positions": 16}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model = peft.get_peft_model(model, ours.LoTRPeftConfig(rank=2, task_type="CAUSAL_LM")).train()
    assert isinstance(model, peft.PeftModelForCausalLM) and len(layers(model)) == 2  # c_attn, as PEFT has it for LoRA
    randomize(model)
    grads = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options is not None:
            model.base_model.model.gradient_checkpointing_enable(options)
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model.zero_grad()
        model.eval() if options is None else model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == 4
    for other in grads[1:]:
        assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(grads[0], other, strict=True))
    model.eval().base_model.model.gradient_checkpointing_disable()
    tokens = model.generate(input_ids=IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    merged = model.merge_and_unload()
    again = merged.generate(input_ids=IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, again) and isinstance(merged.transformer.h[0].attn.c_attn, Conv1D)


# ---- disabling and merging -------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("merge", [False, True])
def test_disabled_is_the_base_model(case, merge):
    model = made(case, random=False)
    step(model)
    y = model(IDS)
    if merge:
        model.merge_adapter()
        assert close(model(IDS), y) and (y - base_of(case)(IDS)).abs().max() > 1e-3
    with model.disable_adapter():
        assert close(model(IDS), base_of(case)(IDS), atol=1e-6)
    assert close(model(IDS), y) and not any(layer.disable_adapters for layer in layers(model))
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert all(layer.disable_adapters for layer in layers(model)) and trained(model) == []


def test_disabling_an_irregular_state_warns():
    model = tuned()
    layers(model)[0].enable_adapters(False)
    with pytest.warns(UserWarning, match="some adapter layers that are enabled and others"), model.disable_adapter():
        pass
    assert not any(layer.disable_adapters for layer in layers(model))


@each_case
def test_merge_unmerge_unload(case):
    model = made(case)
    y, weights = model(IDS), [layer.weight.clone() for layer in layers(model)]
    model.merge_adapter()
    assert close(model(IDS), y) and all(layer.merged for layer in layers(model))
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert close(model(IDS), y)
    model.unmerge_adapter()
    assert all(torch.equal(layer.weight, w) for layer, w in zip(layers(model), weights, strict=True))
    for copied, want in (
        (copy.deepcopy(model).merge_and_unload(), y),
        (copy.deepcopy(model).merge_and_unload(safe_merge=True), y),
        (copy.deepcopy(model).unload(), base_of(case)(IDS)),
    ):
        assert close(copied(IDS), want, atol=1e-5 if want is y or "modules_to_save" not in case else 10)
        assert not layers(copied) and not hasattr(copied, "peft_config") and not copied._forward_hooks
        assert copied.state_dict().keys() == base_of(case).state_dict().keys()
        assert close(pickle.loads(pickle.dumps(copied))(IDS), copied(IDS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_merging_rounds_once_and_unmerging_gives_the_bits_back(dtype):
    model = peft.get_peft_model(base().to(dtype), config())
    randomize(model)
    layer = layers(model)[0]
    before, core = layer.weight.clone(), layer.lotr_adapter["default"]
    want = before.double() + core.scaling * core.factors.B.double() @ core.core.double().T @ core.factors.A.double().T
    model.merge_adapter()
    assert (layer.weight.double() - want).abs().max() <= 0.51 * torch.finfo(dtype).eps * want.abs().max() + 1e-7 * (
        dtype != torch.float64
    )
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)
    assert model.merge_and_unload()(IDS).dtype == dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("unload", [False, True])
def test_safe_merge_refuses_and_changes_nothing(value, unload):
    model = tuned()
    layers(model)[-1].lotr_adapter["default"].core.data[0, 0] = value  # the last: the others must not stay merged
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"):
        model.merge_and_unload(safe_merge=True) if unload else model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in layers(model)) and len(layers(model)) == 4
    assert all(torch.equal(p.nan_to_num(), before[name].nan_to_num()) for name, p in model.named_parameters())


def test_a_failed_merge_keeps_what_was_merged_before():
    model = with_two()
    model.merge_adapter(["default"])
    y = model(IDS)
    layers(model)[-1].lotr_adapter["other"].core.data[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="now additionally merging"), pytest.raises(ValueError, match="adapter other"):
        model.merge_adapter(["other"], safe_merge=True)
    assert [layer.merged_adapters for layer in layers(model)] == [["default"], ["default"], [], ["default"], ["default"], []]
    assert torch.equal(model(IDS), y)


def test_two_adapters_merge_together_one_by_one_and_by_name():
    model = with_two()
    y = {name: plain(model, names)(IDS).float() for name, names in (("default", ["default"]), ("other", ["other"]))}
    y["both"] = plain(model, ["default", "other"])(IDS).float()
    for names, want in ((["default", "other"], "both"), (["other"], "other"), (["default"], "default")):
        assert close(copy.deepcopy(model).merge_and_unload(adapter_names=names)(IDS), y[want])
    together, base_y = copy.deepcopy(model), base()(IDS)
    together.merge_adapter(["default", "other"])
    model.merge_adapter(["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.merge_adapter(["other"])
    assert torch.equal(model(IDS), together(IDS)) and close(model(IDS), y["both"])
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS), base_y)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


# what PEFT's own tests do not cover


@pytest.mark.parametrize("how", ["merge", "unmerge"])
def test_a_weight_changed_before_backward_raises(how, either_path):
    model = tuned(modules_to_save=["embed"]).train()
    if how == "unmerge":
        model.merge_adapter()
    y = model(IDS)
    model.merge_adapter() if how == "merge" else model.unmerge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", REPARAMETRISED)
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_reparametrised_base_is_refused_by_name_and_nothing_is_changed(how, kind):
    model = tuned()
    second = [name for name, m in model.base_model.model.named_modules() if hasattr(m, "lotr_adapter")][1]
    REPARAMETRISED[kind](model.base_model.model.get_submodule(second).base_layer)
    before, y = snapshot(model), model(IDS)
    with pytest.raises(TypeError, match=rf"merge: expected .*{second}"):
        getattr(model, how)()
    assert_unchanged(model, before)
    assert torch.equal(model(IDS), y)


def test_training_while_merged_warns_once():
    model = tuned(modules_to_save=["head"]).train()
    model.merge_adapter()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            model(IDS).sum().backward()
    assert ["not trained" in str(w.message) for w in found] == [True]
    model.unmerge_adapter()
    with no_warnings():
        model(IDS).sum().backward()


# ---- configuration, status, conversion -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"target_modules": "all-linear"}, [f"blocks.{i}.{n}" for i in (0, 1) for n in ("q", "k", "v", "o", "up", "down")]),
        ({"target_modules": ["q", "v"], "exclude_modules": ["blocks.1.q"]}, ["blocks.0.q", "blocks.0.v", "blocks.1.v"]),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "blocks"}, ["blocks.1.q"]),
        ({"target_modules": r"blocks\.0\.(q|v)"}, ["blocks.0.q", "blocks.0.v"]),
    ],
)
def test_targets(settings, names):
    model = tuned(**settings)
    found = model.base_model.targeted_module_names
    assert found == [*names, "head"] if settings["target_modules"] == "all-linear" else found == names
    assert len(layers(model)) == len(found)


def test_default_targets_are_those_of_the_model_type(monkeypatch):
    net = base()
    net.config = {"model_type": "toys"}
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        peft.get_peft_model(net, config(target_modules=None))
    monkeypatch.setattr(ours.LoTRPeftModel, "target_module_mapping", {"toys": ["k"]})
    assert peft.get_peft_model(net, config(target_modules=None)).targeted_module_names == ["blocks.0.k", "blocks.1.k"]


def test_biases_can_be_trained(tmp_path):
    model = tuned(bias="lotr_only")
    names = [n for n in trained(model) if n.endswith(".bias")]
    assert names == [f"base_model.model.blocks.{i}.{n}.base_layer.bias" for i in (0, 1) for n in ("q", "v")]
    step(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(loaded(tmp_path)(IDS), model(IDS))
    with pytest.warns(UserWarning, match="disabling adapter layers with bias"), model.disable_adapter():
        pass
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", config(bias="all"))
    assert any(n.endswith("norm.bias") for n in trained(tuned(bias="all")))


def test_status():
    model = with_two(modules_to_save=["head"])
    status = model.get_model_status()
    assert status.peft_types == {"default": "LOTR", "other": "LOTR"} and status.adapter_model_type == "LoTRPeftModel"
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.available_adapters == ["default", "other"] and status.requires_grad == {"default": True, "other": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]} and status.num_adapter_layers == 7
    assert status.trainable_params == 4 * 16 + 2 * 4 * 16 + 16 * 3 + 3
    model = with_two()
    model.merge_adapter(["default", "other"])
    assert model.get_model_status().merged_adapters == ["default", "other"]
    q = next(s for s in model.get_layer_status() if s.name.endswith("blocks.0.q"))
    assert (q.module_type, q.available_adapters, q.merged_adapters) == ("lotr.LoTRPeftLinear", ["default"], ["default"])
    assert with_two(modules_to_save=["head"]).get_nb_trainable_parameters()[0] == status.trainable_params


@each_case
def test_pefts_own_conversion_to_lora(case):
    model = made(case)
    if CASES[case][1].get("modules_to_save"):
        model = tuned()
    assert model.supports_lora_conversion()
    lora, state = peft.convert_to_lora(model, rank=4)
    other = peft.get_peft_model(base_of(case), lora).eval()
    assert not peft.set_peft_model_state_dict(other, state).unexpected_keys
    assert close(other(IDS), model(IDS), atol=1e-4)
