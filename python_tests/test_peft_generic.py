"""What PEFT's generic tests ask of any method, asked of LoTR: each check of theirs on custom models has one here.

Theirs are tests/test_custom_models.py and tests/testing_common.py of huggingface/peft; docs/peft.md lists check by check.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft_toys import CASES, Conv1D, LoTRPeftLinear, base, config, ours, peft, plain, randomize, trained, tuned, with_two
from torch import Tensor, nn
from toys import IDS, loss

each_case = pytest.mark.parametrize("case", CASES)


def made(case: str, **more) -> peft.PeftModel:
    kind, settings = CASES[case]
    return tuned(kind, **{**settings, **more})


def base_of(case: str) -> nn.Module:
    return base(CASES[case][0])


def layers(model: nn.Module) -> list[LoTRPeftLinear]:
    return [m for m in model.modules() if isinstance(m, LoTRPeftLinear)]


def close(y: Tensor, want: Tensor, atol: float = 1e-5) -> bool:
    return torch.allclose(y, want, atol=atol)


def step(model: nn.Module, count: int = 3) -> None:
    """count steps of training."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(count):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    model.eval()


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


# ---- saving and loading ----------------------------------------------------------------------------------------------


def loaded(directory: Path, kind: str = "toy", **settings) -> peft.PeftModel:
    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        return peft.PeftModel.from_pretrained(base(kind), directory, **settings)


@each_case
@pytest.mark.parametrize("settings", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=["plain", "meta", "train"])
def test_roundtrip(case, settings, tmp_path):
    model = made(case, random=False)
    step(model)
    model.save_pretrained(tmp_path)
    other = loaded(tmp_path, CASES[case][0], **settings)
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    assert torch.equal(other.eval()(IDS), model(IDS))
    states = [peft.get_peft_model_state_dict(m) for m in (model, other)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert (trained(other) == trained(model)) if "is_trainable" in settings else trained(other) == []
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert other.peft_config["default"].rank == model.peft_config["default"].rank
    given = config(**CASES[case][1])
    assert loaded(tmp_path, CASES[case][0], config=given).peft_config["default"] is given and given.inference_mode
    result = other.load_adapter(tmp_path, "more", low_cpu_mem_usage="low_cpu_mem_usage" in settings)
    other.set_adapter("more")
    assert result.missing_keys == [] and torch.equal(other.eval()(IDS), model(IDS))
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert torch.equal(loaded(tmp_path / "pickle", CASES[case][0])(IDS), model(IDS))


def test_names_of_adapters_that_are_parts_of_others_and_selected_saving(tmp_path):
    model = tuned()
    want = set(peft.get_peft_model_state_dict(model))
    for seed, name in enumerate(("default2", "other_default", "foodefault_bar", "efaul")):
        model.add_adapter(name, config())
        randomize(model, name, seed)
    model.save_pretrained(tmp_path, selected_adapters=["default", "efaul"])
    from safetensors.torch import load_file

    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"efaul"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == want
    assert torch.equal(loaded(tmp_path)(IDS), model(IDS))
    model.set_adapter("efaul")
    assert torch.equal(loaded(tmp_path / "efaul")(IDS), model(IDS))


def test_the_adapters_name_makes_no_difference():
    models = {name: tuned(name=name) for name in ("default", "adapter", "other-name")}
    saved = {name: peft.get_peft_model_state_dict(model, adapter_name=name) for name, model in models.items()}
    for name, model in models.items():
        assert torch.equal(model(IDS), models["default"](IDS)) and saved[name].keys() == saved["default"].keys()
        assert all(torch.equal(value, saved["default"][key]) for key, value in saved[name].items())
        in_model = {key for key in model.state_dict() if "lotr_" in key}
        assert len(in_model) == len(saved[name]) == 6 and all(f".{name}." in key for key in in_model)


def test_the_base_models_state_dict_goes_out_and_in():
    from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict

    model, want = made("modules_to_save"), base().state_dict()
    found = get_base_model_state_dict(model)
    assert found.keys() == want.keys() and all(torch.equal(found[k], want[k]) for k in want)
    for parameter in model.get_base_model().parameters():
        parameter.data.add_(1.0)
    assert not any(set_base_model_state_dict(model, want, strict=False))
    assert all(torch.equal(v, want[k]) for k, v in get_base_model_state_dict(model).items())


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_adapters(dtype, upcast, low_memory, tmp_path):
    def check(model: nn.Module) -> None:
        assert {p.dtype for n, p in model.named_parameters() if "lotr_" in n} == {torch.float32 if upcast else dtype}
        assert model(IDS).isfinite().all()

    model = peft.get_peft_model(base().to(dtype), config(), autocast_adapter_dtype=upcast)
    model.add_adapter("other", config(), autocast_adapter_dtype=upcast)
    randomize(model)
    check(model)
    model.save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": upcast, "low_cpu_mem_usage": low_memory}
    model = peft.PeftModel.from_pretrained(base().to(dtype), tmp_path, **options)
    model.load_adapter(tmp_path / "other", "other", **options)
    check(model)
    model.merge_adapter(safe_merge=True)
    model(IDS)
    model.unmerge_adapter()
    assert model.merge_and_unload()(IDS).isfinite().all()


@each_case
def test_copies_are_independent(case):
    model = made(case)
    y, copied, restored = model(IDS), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    step(copied)
    step(restored)
    assert torch.equal(model(IDS), y) and not close(copied(IDS), y) and close(copied(IDS), restored(IDS))
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in copied.named_parameters()] == names  # A and B are still one pair a group


# ---- several adapters ------------------------------------------------------------------------------------------------


def test_active_adapters():
    model = with_two()
    truth = {name: plain(model, [name])(IDS).float() for name in ("default", "other")}
    assert model.active_adapters == ["default"] and close(model(IDS), truth["default"])
    model.set_adapter("other")
    assert model.active_adapter == "other" and close(model(IDS), truth["other"])
    assert {tuple(layer.active_adapters) for layer in layers(model)} == {("other",)}
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("other", config())
    model.set_adapter("default")
    assert close(model(IDS), truth["default"])


def test_requires_grad_follows_the_active_adapter():
    model = with_two(modules_to_save=["head"])
    head = {f"base_model.model.head.modules_to_save.default.{p}" for p in ("weight", "bias")}
    own = {name: {n for n, _ in model.named_parameters() if "lotr_" in n and f".{name}." in n} for name in ("default", "other")}
    assert set(trained(model)) == own["default"] | head and len(own["default"]) == 6 and len(own["other"]) == 8
    for name, want in (("other", own["other"]), ("default", own["default"] | head)):
        model.set_adapter(name, inference_mode=True)
        assert trained(model) == []
        model.set_adapter(name)
        assert set(trained(model)) == want
        model.disable_adapter_layers()
        assert trained(model) == []
        model.enable_adapter_layers()
        assert set(trained(model)) == want
    model.set_requires_grad(["default", "other"], False)
    assert trained(model) == []
    model.set_requires_grad("other")
    assert set(trained(model)) == own["other"]


def test_loading_a_second_adapter_leaves_the_firsts_flags(tmp_path):
    tuned().save_pretrained(tmp_path)
    for first in (True, False):
        model = loaded(tmp_path, is_trainable=first)
        before = set(trained(model))
        for second in (False, True):
            model.load_adapter(tmp_path, f"second-{second}", is_trainable=second)
            now = {n for n in trained(model) if ".second-" not in n}
            assert now == before and (any(".second-True." in n for n in trained(model)) == second)
    model = loaded(tmp_path, is_trainable=True)
    model.set_requires_grad("default", False)
    model.add_adapter("new", config())
    assert trained(model) == []


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_deleting_adapters():
    model = tuned()
    for seed, name in enumerate(("other", "third")):
        model.add_adapter(name, config(rank=2 + seed))
        randomize(model, name, seed)
    truth = plain(model, ["other"])(IDS).float()
    model.delete_adapter("third")
    assert model.active_adapters == ["default"] and set(model.peft_config) == {"default", "other"}
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and close(model(IDS), truth)
    assert not any("default" in name for name, _ in model.named_modules())
    assert set(model.base_model.lotr_factors) == {"other"}
    with pytest.raises(ValueError, match="Adapter default does not exist"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert model.active_adapters == [] and not model.peft_config
    assert not any("lotr_" in name for name in model.state_dict())
    assert torch.equal(model.unload()(IDS), base()(IDS))


def test_a_merged_adapter_is_not_deleted():
    model = with_two()
    model.merge_adapter()
    with pytest.raises(ValueError, match=re.escape("Cannot delete adapter(s) ['default'] while they are merged")):
        model.delete_adapter("default")
    y = model(IDS)
    model.delete_adapter("other")
    assert torch.equal(model(IDS), y) and set(model.peft_config) == {"default"}
    model.unmerge_adapter()


def test_modules_to_save_of_several_adapters(tmp_path):
    model = tuned(modules_to_save=["head"])
    first = model(IDS)
    model.add_adapter("other", config(modules_to_save=["head"]))
    randomize(model, "other", seed=3)
    model.set_adapter("other")
    second = model(IDS)
    assert not close(first, second)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
        model.base_model.set_adapter(["default", "other"])
    model.set_adapter("default")
    assert torch.equal(model(IDS), first)
    with model.disable_adapter():
        assert torch.equal(model(IDS), base()(IDS))
    model.save_pretrained(tmp_path)
    fresh = loaded(tmp_path)
    fresh.load_adapter(tmp_path / "other", "other")
    assert torch.equal(fresh(IDS), first)
    fresh.set_adapter("other")
    assert torch.equal(fresh(IDS), second)


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


def test_every_check_that_the_docs_name_is_here():
    tests = Path(__file__).parent
    text = (tests.parent / "docs" / "peft.md").read_text(encoding="utf-8")
    rows = text[text.index("| PEFT's checks") : text.index("### What cannot be")].strip().splitlines()[2:]
    there = set()
    for file in ("test_peft.py", "test_peft_generic.py"):
        there |= set(re.findall(r"^def test_(\w+)", (tests / file).read_text(encoding="utf-8"), re.MULTILINE))
    for row in rows:
        named = set(re.findall(r"\w+", row.split("|")[2].replace("(test_peft.py)", ""))) & (there | {"roundtrip"})
        assert named and named <= there, row
