"""LoTR as a PEFT method, on our operators, against plain PyTorch in float64, over the zoo's nets.

`python python_tests/peft_suite.py` runs PEFT's tests of its methods against LoTR.
"""

import copy
import importlib
import json
import pickle
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
import zoo
from helpers import ERRORS, OLD_FILES, relative, worst
from models import unchanged
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lotr_ext import LoTRConfig
from lotr_ext.init import INIT_GAIN
from lotr_ext.peft import LoTRPeftConfig, LoTRPeftLinear
from lotr_ext.peft import config as peft_config

# (net, settings)
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "two shapes": ("mlp", {"modules_to_save": ["head"]}),
    "siblings": ("attention", {}),
    "by width": (
        "attention",
        {"rank": (2, 4), "group_by": "width", "target_modules": ["q", "v", "head"]},
    ),
    "diagonal": ("bert", {"core": "diagonal", "modules_to_save": ["classifier"]}),
    "cp": ("attention", {"core": "cp", "target_modules": ["q", "k"]}),
    "a pair per layer": ("llama", {"group_by": "layer"}),
    "conv1d by block": ("gpt2", {"group_by": "block"}),
    "by layer": ("attention", {"group_by": "layer"}),
    "regular expression by name": (
        "llama",
        {"group_by": "name", "target_modules": r".*\.(q|k|v|o)_proj"},
    ),
    "identity": ("llama", {"core_init": "identity", "train": ["B", "core"]}),
}
each_case = pytest.mark.parametrize("case", CASES)


def config(net: str, **settings: object) -> LoTRPeftConfig:
    return LoTRPeftConfig(
        **{"target_modules": zoo.TARGETS[net], "rank": 3, "scaling": 2.0, **settings}
    )


def fill(model: nn.Module, name: str = "default", seed: int = 7) -> nn.Module:
    """Gives an adapter's cores, B and modules_to_save values that matter."""
    pattern = re.compile(
        rf"(lotr_adapter|lotr_cores|modules_to_save)\.{name}\.|lotr_factors\.{name}\.(.*\.)?B"
    )
    return zoo.fill(model, seed, 0.3, lambda key: bool(pattern.search(key)))


def adapted(net: str, **settings: object) -> peft.PeftModel:
    """Returns a network of the zoo with an adapter that was moved off its start."""
    return fill(peft.get_peft_model(zoo.net(net), config(net, **settings)).eval())


def tuned(case: str) -> tuple[peft.PeftModel, Tensor]:
    """Returns the adapted network of a case, and an input."""
    net, settings = CASES[case]
    return adapted(net, **settings), zoo.inputs(net)


def layers(model: nn.Module) -> list[LoTRPeftLinear]:
    return [m for m in model.modules() if isinstance(m, LoTRPeftLinear)]


def plain_forward(layer: LoTRPeftLinear, names: tuple[str, ...], x: Tensor) -> Tensor:
    """Computes base(x) plus the sum of s x A G B^T over the adapters, in plain PyTorch."""
    y = layer.base_layer(x)
    for name in set(names).intersection(layer.lotr_adapter):
        adapter = layer.lotr_adapter[name]
        u = x @ adapter.factors.A.value
        y = y + adapter.scaling * (u @ adapter.core_matrix()) @ adapter.factors.B.value.mT
    return y


def truth(model: peft.PeftModel, *names: str) -> nn.Module:
    """Returns a copy of the model in float64 that computes these adapters in plain PyTorch."""
    copied = copy.deepcopy(model).double()
    for layer in layers(copied):
        layer.forward = partial(plain_forward, layer, names)
    return copied


def output(model: nn.Module, x: Tensor, **more: object) -> Tensor:
    """Returns the model's output as one tensor, for an input that is cast to the model's dtype."""
    dtype = next(model.parameters()).dtype
    y = model(x.to(dtype) if x.is_floating_point() else x, **more)
    return y if isinstance(y, Tensor) else y.logits


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output(model, x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def loaded(folder: Path, net: str, **settings: object) -> peft.PeftModel:
    """Returns a fresh base model with a saved adapter. A warning (missing keys) is an error."""
    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(zoo.net(net), folder, **settings)


# ---- the numbers ---------------------------------------------------------------------------------


@each_case
def test_outputs_and_gradients_are_those_of_plain_torch(case: str, form: str) -> None:
    model, x = tuned(case)
    expected = truth(model, "default")
    y = output(model, x)
    assert relative(y, output(expected, x)) < 1e-5
    assert relative(y, output(zoo.net(CASES[case][0]), x)) > 1e-3
    ours = gradients(model, x)
    theirs = gradients(expected, x)
    assert ours.keys() == theirs.keys() == trained_names(model)
    assert worst(ours.values(), theirs.values()) < 2e-4


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("case", ["two shapes", "conv1d by block"])
def test_half_precision_bases_have_float32_adapters(
    case: str, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    net, settings = CASES[case]
    model, x = tuned(case)
    cast = peft.get_peft_model(zoo.net(net, dtype), config(net, **settings)).eval()
    assert {p.dtype for name, p in cast.named_parameters() if "lotr_" in name} == {adapter_dtype}
    cast.load_state_dict(model.state_dict())
    y = output(cast, x)
    assert y.dtype == dtype
    assert relative(y, output(model, x)) < 8 * torch.finfo(dtype).eps + 1e-6
    assert gradients(cast, x).keys() == trained_names(cast)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_and_checkpointing_train_alike(reentrant: bool) -> None:
    model = adapted("llama", dropout=0.4).train()
    x = zoo.inputs("llama")
    torch.manual_seed(3)
    expected = gradients(model, x)
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    assert worst(gradients(model, x).values(), expected.values()) < 1e-5
    assert relative(output(model, x), output(model.eval(), x)) > 1e-3


def test_a_compiled_model_computes_the_same() -> None:
    model, x = tuned("siblings")
    expected = gradients(model, x)
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x), output(model, x)) < 1e-6
    model.zero_grad()
    compiled(x).square().sum().backward()
    assert worst([model.get_parameter(name).grad for name in expected], expected.values()) < 1e-5


# ---- the life of an adapter ----------------------------------------------------------------------


@each_case
def test_a_new_adapter_computes_as_the_base_and_trains_only_its_parts(case: str) -> None:
    net, settings = CASES[case]
    model = peft.get_peft_model(zoo.net(net), config(net, **settings)).eval()
    x = zoo.inputs(net)
    assert relative(output(model, x), output(zoo.net(net), x)) < 1e-6
    trained = trained_names(model)
    assert trained and all("lotr_" in name or ".modules_to_save." in name for name in trained)


@each_case
def test_an_adapter_is_disabled_saved_and_loaded(case: str, tmp_path: Path) -> None:
    net, _ = CASES[case]
    model, x = tuned(case)
    y = output(model, x)
    with model.disable_adapter():
        assert relative(output(model, x), output(zoo.net(net), x)) < 1e-6
        assert not trained_names(model)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        # Not the same bits: the node depends on what is trained.
        assert relative(output(loaded(tmp_path, net, **options), x), y) < 1e-6
    saved = load_file(tmp_path / "adapter_model.safetensors")
    factor_count = len(list(model.base_model.lotr_factors.parameters()))
    assert sum("lotr_factors" in key for key in saved) == factor_count  # A and B once


@each_case
def test_an_adapter_is_merged_unmerged_and_unloaded(case: str) -> None:
    net, settings = CASES[case]
    model, x = tuned(case)
    y = output(model, x)
    base_output = output(zoo.net(net), x)
    weights = [layer.weight.clone() for layer in layers(model)]
    model.merge_adapter()
    assert all(layer.merged for layer in layers(model))
    assert relative(output(model, x), y) < 1e-5
    with model.disable_adapter():
        assert relative(output(model, x), base_output) < 1e-6
    model.unmerge_adapter()
    assert all(map(torch.equal, [layer.weight for layer in layers(model)], weights))
    merged = pickle.loads(pickle.dumps(model)).merge_and_unload(safe_merge=True)
    unloaded = model.unload()
    keys = zoo.net(net).state_dict().keys()
    assert merged.state_dict().keys() == unloaded.state_dict().keys() == keys
    assert relative(zoo.output(merged, x), y) < 1e-5
    if "modules_to_save" not in settings:
        assert relative(zoo.output(unloaded, x), base_output) < 1e-5


@pytest.mark.parametrize("base", [lambda linear: linear, zoo.Codes], ids=["plain", "quantized"])
def test_pefts_conversion_to_lora(base: Callable[[nn.Linear], nn.Module]) -> None:
    model, x = tuned("siblings")
    expected = output(model, x)
    for layer in layers(model):
        # A quantized weight has the dtype of its bytes.
        layer.base_layer = base(layer.base_layer)
    config_of_lora, tensors = peft.convert_to_lora(model, rank=3)
    lora = peft.get_peft_model(zoo.net("attention"), config_of_lora).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    assert relative(output(lora, x), expected) < 1e-4


# ---- what is adapted and trained -----------------------------------------------------------------


def test_without_target_modules_the_layers_are_those_of_the_model_type() -> None:
    model = peft.get_peft_model(zoo.net("llama"), LoTRPeftConfig(rank=2))
    assert {n.rpartition(".")[2] for n, m in model.named_modules() if m in layers(model)} == {
        "q_proj",
        "v_proj",
    }


@pytest.mark.parametrize("train", [["core"], ["A", "core"], ["B", "core"]], ids="+".join)
def test_only_the_named_parts_are_trained(train: list[str]) -> None:
    """The same parts train after another adapter was active."""
    model = peft.get_peft_model(zoo.net("attention"), config("attention", train=train))
    model.add_adapter("other", config("attention"))
    for name in ("default", "other", "default"):
        model.set_adapter(name)
    trained = " ".join(trained_names(model))
    assert {part for part in ("A", "B", "core") if f".{part}" in trained} == set(train)
    assert "other" not in trained


def test_biases_are_trained_and_saved(tmp_path: Path) -> None:
    model = adapted("attention", bias="lotr_only")
    biases = [name for name in trained_names(model) if name.endswith("bias")]
    assert sum(name.endswith(".base_layer.bias") for name in biases) == len(biases) == 8
    zoo.fill(model, 7, 0.3, lambda name: name.endswith("base_layer.bias"))
    model.save_pretrained(tmp_path)
    x = zoo.inputs("attention")
    assert torch.equal(output(loaded(tmp_path, "attention"), x), output(model, x))


# ---- several adapters ----------------------------------------------------------------------------


def two_adapters() -> tuple[peft.PeftModel, Tensor]:
    """Returns a model with two adapters, and an input.

    "default", which is active, is on q, k, v and o, and "other", of another rank, on q, o and head.
    """
    model, x = tuned("siblings")
    settings = LoTRPeftConfig(rank=2, target_modules=["q", "o", "head"], scaling=1.5)
    model.add_adapter("other", settings)
    return fill(model, "other", seed=8).eval(), x


@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"]], ids="+".join)
def test_active_and_merged_adapters_add_up(names: list[str]) -> None:
    model, x = two_adapters()
    expected = output(truth(model, *names), x)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=names)
    assert relative(zoo.output(merged, x), expected) < 1e-5
    model.base_model.set_adapter(names)
    assert relative(output(model, x), expected) < 1e-5
    trained = trained_names(model)
    assert gradients(model, x).keys() == trained
    for name in ("default", "other"):
        assert any(f".{name}." in key for key in trained) == (name in names)


def test_adapters_are_merged_one_after_another_saved_and_deleted(tmp_path: Path) -> None:
    model, x = two_adapters()
    output_of_both = output(truth(model, "default", "other"), x)
    model.set_adapter("other")
    y = output(model, x)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["other"])
    assert relative(output(model, x), output_of_both) < 1e-5
    with pytest.raises(ValueError, match=r"delete adapter\(s\) \['default'\] while"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    model.delete_adapter("default")
    assert torch.equal(output(model, x), y)
    assert set(model.base_model.lotr_factors) == {"other"}
    assert not any("default" in name for name in model.state_dict())
    assert torch.equal(output(loaded(tmp_path / "other", "attention"), x), y)


def test_a_second_adapter_leaves_what_the_first_one_trains() -> None:
    model, _ = tuned("siblings")
    before = trained_names(model)
    model.add_adapter("other", config("attention"))
    assert trained_names(model) == before
    model.add_adapter("only used", config("attention", inference_mode=True))
    assert trained_names(model) == before
    model.set_adapter("other", inference_mode=True)
    assert not trained_names(model)
    assert model.active_adapter == "other"
    model.set_adapter("default")
    assert trained_names(model) == before


def test_a_second_adapter_that_is_refused_leaves_the_first_one() -> None:
    model, _ = tuned("siblings")
    one_group = {name: "g" for name, _ in model.named_modules()}
    for settings in (
        {"target_modules": ["embed"]},
        {"target_modules": ["q", "head"], "group_by": one_group},
    ):
        with unchanged(model), pytest.raises(ERRORS, match="expected"):
            model.add_adapter("other", config("attention", **settings))
        assert set(model.peft_config) == {"default"}
    model.add_adapter("other", config("attention"))


def test_the_status_of_a_model() -> None:
    model, _ = two_adapters()
    assert {
        "enabled": True,
        "active_adapters": ["default"],
        "num_adapter_layers": len(layers(model)),
        "merged_adapters": [],
        "requires_grad": {"default": True, "other": False},
    }.items() <= vars(model.get_model_status()).items()


# ---- an adapter per row --------------------------------------------------------------------------


def test_adapter_names_choose_an_adapter_per_row() -> None:
    settings = {"modules_to_save": ["lm_head"]}
    model = adapted("llama", **settings)
    model.add_adapter("other", LoTRPeftConfig(rank=2, target_modules=["q_proj"], **settings))
    fill(model, "other", 8)
    x = zoo.inputs("llama", rows=5)
    with model.disable_adapter():
        expected = {"__base__": output(model, x)}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = output(model, x)
    names = ["other", "__base__", "default", "default", "other"]
    mixed = output(model, x, adapter_names=names)
    assert all(relative(mixed[i], expected[name][i]) < 1e-5 for i, name in enumerate(names))


def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=20,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=16,
    )
    return zoo.fill(transformers.BartForConditionalGeneration(config).eval())


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("make", [partial(zoo.net, "llama"), bart], ids=["decoder", "encoder too"])
def test_generation_has_an_adapter_per_row(make: Callable[[], nn.Module], beams: int) -> None:
    """A beam search repeats the decoder's rows and not the encoder's."""
    settings = {"target_modules": ["q_proj", "v_proj"], "rank": 2}
    model = peft.get_peft_model(make(), LoTRPeftConfig(**settings)).eval()
    model.add_adapter("other", LoTRPeftConfig(**settings))
    for seed, name in enumerate(("default", "other")):
        fill(model, name, seed)
    x = torch.arange(15).view(3, 5)
    names = ["other", "default", "other"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    mixed = model.generate(input_ids=x, adapter_names=names, **options)
    for i, name in enumerate(names):
        model.set_adapter(name)
        single = model.generate(input_ids=x[i : i + 1], **options)[0]
        assert torch.equal(mixed[i][: len(single)], single)


# ---- files ---------------------------------------------------------------------------------------


def test_parametrized_parts_are_saved_and_loaded_as_such(tmp_path: Path) -> None:
    model, x = tuned("siblings")
    for layer in layers(model):
        weight_norm(layer.lotr_adapter["default"], "core")
    for factor in model.base_model.lotr_factors["default"].values():
        weight_norm(factor, "value")
    other = fill(copy.deepcopy(model), seed=3)
    model.save_pretrained(tmp_path)
    peft.set_peft_model_state_dict(other, load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(output(other, x), output(model, x))
    with pytest.raises(ValueError, match=r"missing .*core"):
        peft.PeftModel.from_pretrained(zoo.net("attention"), tmp_path)


@pytest.mark.parametrize("core", ["diagonal", "cp", "tucker", "train", "few"])
def test_computed_cores_load_onto_a_model_in_another_order(core: str, tmp_path: Path) -> None:
    model = adapted("attention", core=core)
    model.save_pretrained(tmp_path)
    other = zoo.net("attention")
    other.blocks = nn.Sequential(
        *(zoo.AttentionBlock(dict(reversed(block.items()))) for block in other.blocks)
    )
    x = zoo.inputs("attention")
    assert torch.equal(output(peft.PeftModel.from_pretrained(other, tmp_path), x), output(model, x))


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, 4 * (8 / 16) ** 1.5 / INIT_GAIN**3),
        ({"alpha": 8, "r": 4}, 2.0),
        ({"rslora": True, "r": 4}, 2.0),
    ],
)
def test_a_saved_configuration_has_its_scaling_as_a_number(
    settings: dict, scaling: float, tmp_path: Path
) -> None:
    LoTRPeftConfig(target_modules=["q"], **settings).save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["scaling"] == pytest.approx(scaling)
    assert content["alpha"] is None
    assert LoTRPeftConfig.from_pretrained(str(tmp_path)).to_lotr().s == pytest.approx(scaling)


# ---- files of the first version ------------------------------------------------------------------


def test_the_first_versions_files_load() -> None:
    expected = load_file(OLD_FILES / "peft" / "expected.safetensors")
    assert relative(output(loaded(OLD_FILES / "peft", "gpt2"), expected["x"]), expected["y"]) < 1e-6
    # PEFT warns where its base class reads the file.
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        assert peft.PeftConfig.from_pretrained(str(OLD_FILES / "peft")).scaling == 1.0


def rewritten(folder: Path, **settings: object) -> str:
    """Writes the first version's configuration with other settings, and returns the folder."""
    content = json.loads((OLD_FILES / "peft" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | settings))
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        # "auto" was 4 (8 / r)^1.5, with an exponent of 0.5 only for the form "diagonal".
        ({"scaling": "auto"}, 32.0),
        ({"scaling": 0.5}, 0.5),
        ({"scaling": "auto", "rank": 4, "r": 4, "core": "cp"}, 4 * 2**1.5),
        ({"scaling": "auto", "rank": 4, "r": 4, "core": "diagonal"}, 4 * 2**0.5),
    ],
)
def test_the_scaling_of_a_configuration_of_the_first_version(
    settings: dict, scaling: float, tmp_path: Path
) -> None:
    config = LoTRPeftConfig.from_pretrained(rewritten(tmp_path, **settings))
    assert config.scaling == pytest.approx(scaling)


@pytest.mark.parametrize("config_class", [LoTRPeftConfig, peft.PeftConfig])
def test_magnitudes_of_the_first_version_are_refused(config_class: type, tmp_path: Path) -> None:
    with pytest.raises(ERRORS, match="magnitude"):
        config_class.from_pretrained(rewritten(tmp_path, magnitude=True))


# ---- refusals ------------------------------------------------------------------------------------


def test_only_a_plain_product_is_merged_into() -> None:
    """test_merging.py tests every other kind of base."""
    net = zoo.net("attention")
    net.blocks[0]["q"].register_forward_hook(lambda module, args, y: 2 * y)
    model = fill(peft.get_peft_model(net, config("attention")).eval())
    x = zoo.inputs("attention")
    y = output(model, x)
    assert relative(y, output(truth(model, "default"), x)) < 1e-5
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=r"merge: expected a .* \(blocks.0.q\)"):
            merge()
    assert torch.equal(output(model, x), y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_values_that_are_not_finite(value: float) -> None:
    model, _ = tuned("siblings")
    layer = layers(model)[0]
    layer.lotr_adapter["default"].core.data[0, 0] = value
    weight = layer.weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight, weight)
    assert not layer.merged


def test_sharded_tensors_are_not_saved(tmp_path: Path) -> None:
    model = adapted("attention")
    state = {key: t[:0] if "lotr_factors" in key else t for key, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"expected full tensors, got base_model.lotr_factors"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_a_configuration_for_apply_lotr_is_refused_by_name() -> None:
    with pytest.raises(AttributeError, match="expected a LoTRPeftConfig, got a LoTRConfig"):
        peft.get_peft_model(zoo.net("mlp"), LoTRConfig(rank=2))
    assert copy.deepcopy(LoTRConfig()) == LoTRConfig()


def test_an_old_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.20.1")
    with pytest.raises(ImportError, match=r"expected PEFT 0.21 or later, got 0.20.1"):
        importlib.reload(peft_config)
