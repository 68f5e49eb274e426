"""Experts under PEFT's tuner: the same numbers and gradients as apply_lotr's, and all that its other methods can do."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from mixtures import adapted, logits, loss, mixture, parameters_of
from torch import nn
from toys import assert_unchanged, snapshot

from lotr_ext.interop.peft import LoTRPeftConfig
from lotr_ext.model.adapted import adapted_layers
from nets import relative


def config(name: str = "Mixtral", **settings) -> LoTRPeftConfig:
    return LoTRPeftConfig(**{"rank": 4, "target_parameters": parameters_of(name), **settings})


@torch.no_grad()
def randomize(model: nn.Module, adapter: str = "default") -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(f".{adapter}.core"):
            parameter.normal_(0, 0.3)


def copied_from(ours: nn.Module, theirs: nn.Module) -> dict[str, str]:
    """Gives ours the values of theirs; the names of theirs by ours'."""
    names = {n.removeprefix("base_model.model.").replace(".lotr_adapter.default", ""): n for n, _ in theirs.named_parameters()}
    names |= {n.replace("base_model.lotr_factors.default", "lotr_factors"): n for n in names.values()}
    values, found = dict(theirs.named_parameters()), {}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                found[name] = names[name]
                parameter.copy_(values[names[name]])
    return found


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "NemotronH"])
def test_the_numbers_and_gradients_of_apply_lotr(name):
    plain = mixture(name)
    settings = {"target_modules": ["q_proj"]} if name != "NemotronH" else {}
    theirs = peft.get_peft_model(copy.deepcopy(plain), config(name, alpha=6.0, **settings)).eval()
    assert relative(logits(theirs), logits(plain)) < 1e-6
    randomize(theirs)
    ours = adapted(name, model=plain, alpha=6.0, **settings)
    names = copied_from(ours, theirs)
    assert torch.equal(logits(theirs), logits(ours))
    for model in (theirs, ours):
        loss(model).backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert set(names.values()) == grads.keys()
    for n, p in ours.named_parameters():
        assert not p.requires_grad or torch.equal(p.grad, grads[names[n]]), n


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_what_peft_does_with_adapters(tmp_path, name):
    plain = mixture(name)
    base = logits(plain)
    model = peft.get_peft_model(copy.deepcopy(plain), config(name, target_modules=["q_proj"])).eval()
    randomize(model)
    y = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert torch.equal(logits(again), y)
    with model.disable_adapter():
        assert relative(logits(model), base) < 1e-6
    model.merge_adapter(safe_merge=True)
    assert relative(logits(model), y) < 1e-5
    with model.disable_adapter():
        assert relative(logits(model), base) < 1e-6
    assert torch.equal(logits(model), y)  # which has unmerged it
    model.add_adapter("more", config(name, rank=2))
    randomize(model, "more")
    model.set_adapter("more")
    other = logits(model)
    model.base_model.set_adapter(["default", "more"])
    sum_of_both = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert relative(logits(merged), sum_of_both) < 1e-5
    assert not any(torch.allclose(sum_of_both, one, atol=1e-3) for one in (y, other, base))
    model.set_adapter("default")
    model.delete_adapter("more")
    assert torch.equal(logits(model), y)
    bare = model.unload()
    assert relative(logits(bare), base) < 1e-6 and bare.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    "targets",
    [["gate_up_proj"], ["mlp.experts.gate_up_proj", "experts.down_proj"], ["model.layers.1.mlp.experts.down_proj"]],
    ids=["an ending", "endings", "a full name"],
)
def test_parameters_are_matched_as_for_peft_s_lora(targets):
    lora = peft.get_peft_model(mixture(), peft.LoraConfig(r=2, target_modules=[], target_parameters=targets))
    wrappers = ((name, m) for name, m in lora.named_modules() if hasattr(m, "parameter_name"))
    theirs = {(name.split("layers.")[1][0], m.parameter_name) for name, m in wrappers}
    ours = adapted_layers(adapted(target_parameters=targets))
    assert theirs and {(name.split("layers.")[1][0], name.rpartition(".")[2]) for name in ours} == theirs


def test_refusals_leave_the_model_as_it_was():
    model = mixture()
    before = snapshot(model)
    with pytest.raises(ValueError, match="target_parameters: expected names of parameters"):
        peft.get_peft_model(model, config(target_parameters=["experts.nothing"]))
    with pytest.raises(TypeError, match="a 2-D parameter of MixtralTopKRouter"):
        peft.get_peft_model(model, config(target_parameters=["gate.weight"]))
    assert_unchanged(model, before)
    with pytest.raises(TypeError, match="target_parameters: expected a list of name endings"):
        config(target_parameters="experts.down_proj")
    with pytest.raises(ValueError, match=r'core: expected "dense" with target_parameters, .* got .diagonal'):
        config(core="diagonal")
